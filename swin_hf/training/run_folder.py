"""The folder of a run, ``runs/NAME`` or ``runs/NAME-v2`` and so on: who makes it and how it is found again."""

import os
import re
from pathlib import Path

from swin_hf.files import raise_write_error

LAST = Path("checkpoints", "last.ckpt")
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")  # set by launchers, Lightning's own included


def starts_first() -> bool:
    """Whether the launcher gave this process rank 0, which alone makes and removes the folder of a run."""
    return not any(int(os.environ.get(name) or 0) for name in _RANKS)


def last_run(runs: Path, name: str) -> Path | None:
    """The newest folder of a run that has a checkpoint to resume from, ``None`` if there is none."""
    return next((path for _, path in reversed(_folders(runs, name)) if (path / LAST).is_file()), None)


def run_of(path: Path) -> Path | None:
    """The folder of the run that a checkpoint or weights are in, ``None`` if they are in none."""
    return next((folder for folder in (path, *path.parents[:2]) if (folder / "config.yaml").is_file()), None)


def folder_of_test(runs: Path, name: str, *starts: str | None) -> Path:
    """The folder of the run whose checkpoint or weights (``starts``) are tested, else of a new run of this name."""
    found = (run_of(Path(start)) for start in starts if start)
    return next(filter(None, found), None) or new_run_folder(runs, name)


def new_run_folder(runs: Path, name: str) -> Path:
    """Make the folder of a new run, which no other run can get; ValueError if the name is a path.

    A rank other than the first makes nothing and returns a guess: all that is written comes from rank 0, and Lightning
    gives its checkpoint folder to every rank.
    """
    folders = _folders(runs, name)
    number = folders[-1][0] + 1 if folders else 1
    while True:
        path = runs / (name if number == 1 else f"{name}-v{number}")
        if not starts_first():
            return path
        try:
            runs.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # fails where a run that started at the same moment was faster
            return path
        except FileExistsError:
            if not runs.is_dir():
                raise ValueError(f"{runs} is a file; give another folder with --runs") from None
            number += 1
        except OSError as error:
            raise_write_error(error, path)
            raise


def _folders(runs: Path, name: str) -> list[tuple[int, Path]]:
    """Number and path of every folder of a run, the newest last."""
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"the name of a run is {name!r}; use letters, digits, dots, hyphens and underscores")
    pattern = re.compile(re.escape(name) + r"(?:-v(\d+))?")
    found = [(pattern.fullmatch(path.name), path) for path in (runs.iterdir() if runs.is_dir() else ())]
    return sorted((int(match[1] or 1), path) for match, path in found if match)
