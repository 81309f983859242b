"""Check a folder before anything of it is loaded or sent: configuration, safetensors headers, file names."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from swin_hf.checkpoints.read import check_processor, read_object
from swin_hf.families import FAMILIES, architectures
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.resizing import refuse_types, shard_names

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAVE_AGAIN = "save the model again with save_pretrained"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Keys with which transformers would load other weights than those that are checked here, or replace layers.
FOREIGN_KEYS = {
    "transformers_weights": f"rename the weights to {WEIGHTS} and remove the key",
    "quantization_config": "save the model without quantization",
}


class OtherFamilyError(ValueError):
    """A configuration of another model family."""


def read_config(path: Path) -> SwinHFConfig:
    """The configuration of a ``config.json``; nothing of the model is built, and code is never chosen by a file.

    Raises:
        OtherFamilyError: When it belongs to none of ours.
        ValueError: When it cannot be read, or holds a value out of range.
    """
    values = read_object(path, f"{path.name} cannot be read", SAVE_AGAIN)
    values.pop("auto_map", None)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise OtherFamilyError(
            f"{CONFIG} has model_type {str(model_type)[:80]!r}, not {' or '.join(map(repr, FAMILIES))}; "
            "convert the checkpoint first: swin-hf convert SOURCE FOLDER --to swin_hf"
        )
    for key, remedy in FOREIGN_KEYS.items():
        if values.get(key) is not None:
            raise ValueError(f"{CONFIG} has {key} {str(values[key])[:80]!r}, which this family does not take; {remedy}")
    try:
        config: SwinHFConfig = FAMILIES[model_type].config_class.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{CONFIG} is not valid: {error}") from None
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names; ValueError if there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in shards_present(folder / INDEX, (path.name for path in folder.iterdir()))]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder.name} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when they are "
            "opened; rewrite them as safetensors: swin-hf convert SOURCE FOLDER --to swin_hf"
        )
    raise ValueError(f"{folder.name} holds no {WEIGHTS}; save the model into it with save_pretrained first")


def shards_present(index: Path, present: Iterable[str]) -> list[str]:
    """The shards that an index names; ValueError unless each is a shard of the same folder, and ``present``."""
    names = shard_names(index, SHARD.pattern)
    if missing := sorted(set(names) - set(present)):
        raise ValueError(f"{INDEX} names {missing[0]}, which is missing; copy or download the folder again")
    return names


def check_weights(files: list[Path], config: SwinHFConfig) -> str:
    """Compare the headers of weight files with what ``config.json`` builds, before a byte is allocated for it.

    Returns the name of the architecture; ValueError if it is unknown, or tensors are missing, left over or of another
    shape.
    """
    named = config.architectures
    architecture = named[0] if isinstance(named, list) and named else None
    known = {name: built for name, built in architectures().items() if built.family.model_type == config.model_type}
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"{CONFIG} names the architecture {architecture!r}; it must be one of {', '.join(known)}: {SAVE_AGAIN}"
        )
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                refuse_types(path.name, {name: part.get_dtype() for name, part in parts.items()})
                found |= {name: tuple(part.get_shape()) for name, part in parts.items()}
        except (SafetensorError, OSError) as error:
            reason = f"{path.name} is not a whole safetensors file ({error})"
            raise ValueError(f"{reason}; save or download it again") from None
    # A block has more than ten tensors: a configuration that asks for more is refused before its modules are built.
    if sum(config.depths) > len(found):
        raise ValueError(f"{CONFIG} asks for {sum(config.depths)} blocks but the weights hold {len(found)} tensors")
    try:
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in known[architecture].model_class(config).state_dict().items()}
    except Exception as error:  # torch raises many types of error for sizes that are too large
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{CONFIG} cannot be built: {reason}") from None
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]} where {CONFIG} asks for {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"the weights do not fit {CONFIG}: {'; '.join(problems[:5])}{more}; save both again with save_pretrained"
        )
    return str(architecture)


def check_folder(folder: Path) -> str:
    """Check a folder before anything of it is loaded, as the functions above; returns the name of the architecture."""
    config = read_config(folder / CONFIG)
    path = folder / PROCESSOR
    if path.is_file():
        check_processor(read_object(path, f"{path.name} cannot be read", SAVE_AGAIN), path)
    return check_weights(weight_files(folder), config)
