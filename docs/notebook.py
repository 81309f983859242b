"""Writes ``docs/finetune.ipynb`` from ``docs/finetune.md``: ``python docs/notebook.py``."""

import json
import re
from pathlib import Path
from typing import Any

GUIDE = Path(__file__).with_name("finetune.md")


def notebook(text: str) -> dict[str, Any]:
    """A notebook whose code cells are the Python blocks of a guide, without outputs."""
    cells: list[dict[str, Any]] = []
    for piece in re.split(r"(^```python\n.*?^```\n?)", text, flags=re.DOTALL | re.MULTILINE):
        code = re.match(r"```python\n(.*?)^```", piece, re.DOTALL | re.MULTILINE)
        source = (code[1] if code else piece).strip("\n")
        if source:
            kind = {"cell_type": "code", "execution_count": None, "outputs": []} if code else {"cell_type": "markdown"}
            cells.append(
                {**kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": source.splitlines(keepends=True)}
            )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    guide = GUIDE.read_text(encoding="utf-8")
    GUIDE.with_suffix(".ipynb").write_text(json.dumps(notebook(guide), indent=1, ensure_ascii=False) + "\n")
