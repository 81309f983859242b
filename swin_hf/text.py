"""Foreign text, such as the name of a class, on one line of a terminal, a figure or a card."""

import re
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len

# Characters that move the cursor, break the line or turn text around; joiners, which some languages need, are kept.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def one_line(text: object, limit: int | None = None) -> str:
    r"""Text without line breaks and without control characters, which are written as ``\x1b``.

    Of more than ``limit`` characters, the middle becomes "…", because ends tell names apart.
    """
    characters = re.sub(r"\s+", " ", str(text)).strip()
    hidden = {c for c in characters if c in _TURNS or unicodedata.category(c) in ("Cc", "Cs")}
    line = "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in characters)
    if limit is None or len(line) <= limit:
        return line
    tail = (limit - 1) // 3
    return f"{line[: limit - 1 - tail]}…{line[len(line) - tail :]}"


def shorten(names: Sequence[object], limit: int = 20) -> str:
    """The first ``limit`` names for a message, and how many there are beyond: ``a, b and 3 more``."""
    listed = ", ".join(map(str, names[:limit]))
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def text_table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Lines of a table with columns two blanks apart, of which ``left`` is flush left and the others are flush right.

    Widths are counted in cells of the terminal: a Chinese letter takes two.
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [(cell, " " * (width - cell_len(cell))) for cell, width in zip(row, widths, strict=True)]
        cells = [cell + blank if n == left else blank + cell for n, (cell, blank) in enumerate(padded)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
