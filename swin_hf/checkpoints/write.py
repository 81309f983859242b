"""Write files whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from swin_hf.checkpoints.tables import Layout
from swin_hf.files import WEIGHT_SUFFIXES, raise_write_error


@dataclass
class Contents:
    """What is written for one checkpoint.

    Args:
        layout: How the weights are wrapped in a pickle, and what they are called in a folder.
        state: The weights, under the keys of the layout.
        texts: JSON files, by name; None leaves one out.
        classes: Class names, for layouts that keep them with the weights.
    """

    layout: Layout
    state: dict[str, Tensor]
    texts: Mapping[str, Mapping[str, Any] | None]
    classes: list[str]


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise FileExistsError if one of the paths is taken and may not be replaced."""
    taken = [str(path) for path in paths if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists; choose another destination, or pass overwrite (--overwrite)")


def refuse_neighbours(weights: Path, names: Iterable[str]) -> None:
    """Refuse to replace a configuration that other weights in the same folder may belong to.

    Args:
        weights: File that will be written.
        names: JSON files that will be written next to it.

    Raises:
        FileExistsError: With both; ``overwrite`` means the files of this destination, not those of another model.
    """
    folder = weights.parent
    taken = sorted(name for name in names if (folder / name).exists())
    others = [path.name for path in (folder.iterdir() if taken else ()) if path.suffix in WEIGHT_SUFFIXES]
    if others := sorted(name for name in others if name != weights.name):
        raise FileExistsError(
            f"{folder} holds {', '.join(others[:3])}, to which its {' and '.join(taken)} may belong; nothing was "
            "written: choose a folder of its own for the destination"
        )


def write_folder(folder: Path, contents: Contents) -> list[Path]:
    """Write a folder under a temporary name and rename it; files of a folder that exists are replaced one by one.

    Returns:
        Every file that was written.
    """
    with _stage(folder.parent, folder.name) as stage:
        _write_weights(stage / contents.layout.file_name, contents)
        _write_texts(stage, contents)
        names = sorted(file.name for file in stage.iterdir())
        if folder.is_dir():
            for file in stage.iterdir():
                file.replace(folder / file.name)
        else:
            stage.chmod(0o777 & ~_umask())  # a temporary folder is private, the finished one is not
            os.replace(stage, folder)
    return [folder / name for name in names]


def write_neighbours(file: Path, contents: Contents) -> list[Path]:
    """Write one file of weights, and the JSON files next to it; all of them are returned."""
    with _stage(file.parent, file.name) as stage:
        _write_weights(stage / file.name, contents)
        _write_texts(stage, contents)
        names = sorted((path.name for path in stage.iterdir()), key=file.name.__eq__)  # the weights come last
        for name in names:
            (stage / name).replace(file.parent / name)
    return [file.parent / name for name in names]


@contextmanager
def _stage(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder on the disk of the destination that is gone afterwards, whatever happens.

    Raises:
        WriteError: If anything in it cannot be written; the message names the destination and the remedy.
    """
    stage = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent))
        yield stage
    except Exception as error:
        raise_write_error(error, parent / name)
        raise
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _write_weights(path: Path, contents: Contents) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(contents.state, path, metadata={"format": "pt"})
    else:
        with path.open("wb") as file:
            torch.save(_wrapped(contents), file)
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # a full disk may show only here
    path.chmod(0o666 & ~_umask())


def _wrapped(contents: Contents) -> dict[str, Any]:
    """The top level of a pickled file, as the layout's own code expects it."""
    wrapper = contents.layout.wrapper
    if wrapper is None:
        return dict(contents.state)
    if contents.layout.name == "openmmlab":
        return {"meta": {"dataset_meta": {"classes": contents.classes}}, wrapper: contents.state}
    return {wrapper: contents.state}


def _write_texts(folder: Path, contents: Contents) -> None:
    for name, values in contents.texts.items():
        if values is not None:
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """JSON for what configurations hold besides plain values."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple | set) else str(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
