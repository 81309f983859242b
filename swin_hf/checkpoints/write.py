"""Write a checkpoint whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from swin_hf.checkpoints.read import CONFIG_NAME, PREPROCESSOR_NAME
from swin_hf.checkpoints.tables import LAYOUTS, Layout
from swin_hf.files import WEIGHT_SUFFIXES, temporary_folder


def check_destination(destination: Path, to: str, overwrite: bool) -> Path:
    """Refuse a destination that could not be written in a layout, before anything is read.

    Returns:
        The file of its weights.

    Raises:
        ValueError: If there is no such layout, or the file is of a kind that is not written.
        FileExistsError: If a file of the destination exists and may not be replaced, or other weights in the folder
            may belong to the JSON files there; ``overwrite`` means the files of one model.
    """
    if to not in LAYOUTS:
        raise ValueError(f"unknown layout {to!r}; choose one of {', '.join(LAYOUTS)}")
    if destination.suffix == ".ckpt":
        raise ValueError(f"{destination}: only Lightning writes .ckpt files; choose .safetensors, .pth, .pt or .bin")
    is_file = destination.suffix in WEIGHT_SUFFIXES
    weights = destination if is_file else destination / LAYOUTS[to].file_name
    texts = [path for path in map(weights.with_name, (CONFIG_NAME, PREPROCESSOR_NAME)) if path.exists()]
    taken = [str(path) for path in (destination, *(texts if is_file else ())) if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists; choose another destination, or pass overwrite (--overwrite)")
    files = weights.parent.iterdir() if texts else ()
    if others := sorted(path.name for path in files if path.suffix in WEIGHT_SUFFIXES and path.name != weights.name):
        raise FileExistsError(
            f"{weights.parent} holds {', '.join(others[:3])}, to which its {' and '.join(path.name for path in texts)} "
            "may belong; nothing was written: choose a folder of its own for the destination"
        )
    return weights


def write_files(
    destination: Path,
    weights: Path,
    state: dict[str, Tensor],
    layout: Layout,
    texts: Mapping[str, Mapping[str, Any] | None],
    classes: list[str],
) -> list[Path]:
    """Write a new folder, or the files of one that exists one by one, the weights last; all of them are returned.

    Args:
        destination: Folder, or file of the weights.
        weights: File of the weights.
        state: The weights, under the keys of the layout.
        layout: How they are wrapped in a pickle.
        texts: JSON files, by name; None leaves one out.
        classes: Their names, for layouts that keep them with the weights.
    """
    contents = {name: values for name, values in texts.items() if values is not None}
    names = [*contents, weights.name]
    with temporary_folder(destination) as stage:
        _write_weights(stage / weights.name, state, layout, classes)
        for name, values in contents.items():
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
            (stage / name).write_text(text + "\n", encoding="utf-8")
        if destination == weights or destination.is_dir():
            for name in names:
                (stage / name).replace(weights.with_name(name))
        else:
            stage.replace(destination)
    return [weights.with_name(name) for name in names]


def _write_weights(path: Path, state: dict[str, Tensor], layout: Layout, classes: list[str]) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors keeps the file from everybody else
    else:
        content: dict[str, Any] = {"meta": {"dataset_meta": {"classes": classes}}} if layout.name == "openmmlab" else {}
        content |= {layout.wrapper: state} if layout.wrapper else state
        with path.open("wb") as file:
            torch.save(content, file)
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # a full disk may show only here


def _plain(value: object) -> object:
    """JSON for what configurations hold besides plain values."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple | set) else str(value)
