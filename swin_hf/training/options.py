"""How the options of a run are written down: plain values, and the names that they had in earlier releases."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from os import PathLike, fspath
from typing import Any

# Each group of options, with the flat names that its options had before, and "=" before a name that is new as well.
_MOVED = {
    "model.network": "window_size drop_path_rate overrides attn_implementation gradient_checkpointing compile",
    "model.optimization": "learning_rate lr_scaling weight_decay betas layer_decay schedule warmup_epochs warmup_steps "
    "warmup_lr min_lr milestones gamma",
    "model.mixing": "label_smoothing mixup_alpha cutmix_alpha mix_probability",
    "model.freezing": "freeze_stages=stages linear_probe",
    "model.lora": "lora_rank=rank lora_alpha=alpha lora_targets=targets",
    "model.distillation": "distill_from=teacher distill_weight=weight temperature",
    "model.masking": "mask_cell=cell mask_ratio=ratio norm_targets",
    "data.reading": "config_name revision streaming image_column label_column labelled class_names seed on_error",
    "data.splits": "validation_fraction test_fraction limit_train split_seed=seed",
    "data.augmentation": "crop_scale crop_ratio crop_padding hflip auto_augment erasing",
    "data.pixels": "mean std interpolation resize_mode crop_pct background grey_maximum",
}
RENAMED = {"model.model": "model.weights"} | {
    f"{group.partition('.')[0]}.{old}": f"{group}.{new or old}"
    for group, names in _MOVED.items()
    for old, _, new in (name.partition("=") for name in names.split())
}
_FLAT = {new: old.partition(".")[2] for old, new in RENAMED.items() if new.count(".") == 2}


def plain(value: Any) -> Any:
    """Options as JSON has them: a dataclass as a dictionary, a tuple as a list, a path as text."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return fspath(value) if isinstance(value, PathLike) else value


def dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the names of the command line: those of a group after its name and a dot."""
    groups = {name: value if isinstance(value, dict) else {"": value} for name, value in options.items()}
    return {f"{name}.{inner}".rstrip("."): value for name, group in groups.items() for inner, value in group.items()}


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a module without their groups, under names that say enough by themselves, as a card has them."""
    return {_FLAT.get(f"model.{name}", name.rpartition(".")[2]): value for name, value in dotted(options).items()}


def renamed(names: Iterable[str], section: str = "") -> dict[str, str]:
    """Which of some names an option had before, and the names that they have now."""
    prefix = f"{section}." if section else ""
    return {name: RENAMED[prefix + name] for name in names if prefix + name in RENAMED}
