"""Write files whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from swin_hf.checkpoints.tables import Layout
from swin_hf.files import WEIGHT_SUFFIXES, temporary_folder


@dataclass
class Contents:
    """What is written for one checkpoint."""

    layout: Layout  # how the weights are wrapped in a pickle, and what they are called in a folder
    state: dict[str, Tensor]  # the weights, under the keys of the layout
    texts: Mapping[str, Mapping[str, Any] | None]  # JSON files, by name; None leaves one out
    classes: list[str]  # their names, for layouts that keep them with the weights


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise FileExistsError if one of the paths is taken and may not be replaced."""
    taken = [str(path) for path in paths if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists; choose another destination, or pass overwrite (--overwrite)")


def refuse_neighbours(weights: Path, names: Iterable[str]) -> None:
    """Refuse to replace JSON files next to weights that other weights in the same folder may belong to.

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
    """Write a new folder whole or not at all; the files of one that exists are replaced one by one; returns all."""
    with temporary_folder(folder) as stage:
        _write(stage, contents.layout.file_name, contents)
        names = sorted(file.name for file in stage.iterdir())
        if folder.is_dir():
            for name in names:
                (stage / name).replace(folder / name)
        else:
            stage.replace(folder)
    return [folder / name for name in names]


def write_neighbours(file: Path, contents: Contents) -> list[Path]:
    """Write one file of weights, and the JSON files next to it; all of them are returned."""
    with temporary_folder(file) as stage:
        _write(stage, file.name, contents)
        names = sorted((path.name for path in stage.iterdir()), key=file.name.__eq__)  # the weights come last
        for name in names:
            (stage / name).replace(file.parent / name)
    return [file.parent / name for name in names]


def _write(folder: Path, name: str, contents: Contents) -> None:
    path = folder / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(contents.state, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors keeps the file from everybody else
    else:
        with path.open("wb") as file:
            torch.save(_wrapped(contents), file)
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # a full disk may show only here
    for name, values in contents.texts.items():
        if values is not None:
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _wrapped(contents: Contents) -> dict[str, Any]:
    """The top level of a pickled file, as the layout's own code expects it."""
    wrapper = contents.layout.wrapper
    if wrapper is None:
        return dict(contents.state)
    if contents.layout.name == "openmmlab":
        return {"meta": {"dataset_meta": {"classes": contents.classes}}, wrapper: contents.state}
    return {wrapper: contents.state}


def _plain(value: object) -> object:
    """JSON for what configurations hold besides plain values."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple | set) else str(value)
