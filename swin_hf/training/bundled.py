"""The configurations and the data set (handwritten digits) that the package contains."""

import os
from difflib import get_close_matches
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
DATA_SETS = {"swin_hf:digits": CONFIGS / "digits"}  # a colon: neither a folder nor a Hub id has this name by chance


def find_config(name: str | os.PathLike[str]) -> Path:
    """The file of a configuration: one of the package, such as ``digits``, or any YAML file; ValueError if neither."""
    names = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    path = names.get(str(name), Path(name))
    if path.is_file():
        return path
    near = get_close_matches(path.stem, names, n=1)
    hint = f"give the path of a YAML file, or one of these names: {', '.join(names)}"
    raise ValueError(f"there is no configuration {name}; {f'did you mean --config {near[0]}?' if near else hint}")


def find_data_set(dataset: str) -> str:
    """The folder of a data set of the package, ``swin_hf:NAME``, ValueError if there is none; other names unchanged."""
    if not dataset.startswith("swin_hf:"):
        return dataset
    if dataset not in DATA_SETS:
        raise ValueError(f"dataset is {dataset}; the package has {' and '.join(DATA_SETS)}")
    return str(DATA_SETS[dataset])
