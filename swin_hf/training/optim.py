"""Parameter groups, the learning rate and its schedule, by the rules of Microsoft's ``optimizer.py`` and others."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # a re-export
from torch import nn

from swin_hf.ranges import Options, choice, ranged

Schedule = Literal["cosine", "linear", "constant", "multistep"]


@dataclass(frozen=True)
class Optimization(Options):
    """AdamW, its learning rate and the schedule. The defaults are Microsoft's for fine-tuning a classifier.

    Args:
        learning_rate: Peak rate for a global batch of 512 images.
        lr_scaling: Whether the rates are scaled by global batch / 512; otherwise they are taken as they are.
        weight_decay: Decay of matrices and kernels; norms, biases and tables are never decayed.
        betas: The two averaging factors of AdamW.
        layer_decay: Factor on the rate for each layer further from the head; 1 is off, 0.7 to 0.9 is usual.
        schedule: Shape after the warm-up: ``cosine``, ``linear``, ``constant`` or ``multistep``.
        warmup_epochs: Length of the linear warm-up in epochs; fractions are allowed.
        warmup_steps: The same in optimiser steps; takes precedence over ``warmup_epochs``.
        warmup_lr: Rate at the first step of the warm-up, scaled like ``learning_rate``.
        min_lr: Rate at the last step, scaled like ``learning_rate``.
        milestones: Epochs at which ``multistep`` lowers the rate.
        gamma: Factor on the rate at each milestone.
    """

    learning_rate: float = ranged(5e-4, "[0, inf)")
    lr_scaling: bool = True
    weight_decay: float = ranged(0.05, "[0, inf)")
    betas: tuple[float, float] = ranged((0.9, 0.999), "[0, 1)")
    layer_decay: float = ranged(1.0, "(0, 1]")
    schedule: Schedule = choice("cosine", Schedule)
    warmup_epochs: float = ranged(5.0, "[0, inf)")
    warmup_steps: int | None = ranged(None, "[0, inf)")
    warmup_lr: float = ranged(5e-7, "[0, inf)")
    min_lr: float = ranged(5e-6, "[0, inf)")
    milestones: list[int] | None = ranged(None, "[0, inf)")
    gamma: float = ranged(0.1, "(0, inf)")


_STAGE = re.compile(r"\bstages\.(\d+)\.(?:blocks\.(\d+)|downsample)\.")
REFERENCE_BATCH = 512  # images; the batch that the learning rates of the recipes are given for


def is_decayed(name: str, parameter: nn.Parameter, undecayed: Sequence[str] = ()) -> bool:
    """Whether weight decay applies to a parameter: to matrices and kernels, except the ``undecayed`` ones."""
    return parameter.ndim > 1 and not name.endswith(".bias") and not any(part in name for part in undecayed)


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Depth of a parameter for layer-wise learning rate decay; its name may have a prefix, such as LoRA's.

    The patch embedding and the mask token are 0, block ``k`` (counted through all stages) is ``k + 1``, a downsampling
    shares the id of the block before it, and everything else (last norm, head, position embeddings) comes last.
    """
    if match := _STAGE.search(name):
        stage, block = int(match[1]), match[2]
        return sum(depths[: stage + 1]) if block is None else sum(depths[:stage]) + int(block) + 1
    if "embeddings." in name and "position_embeddings" not in name:
        return 0
    return sum(depths) + 1


def parameter_groups(
    model: Any, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters by weight decay and, below a ``layer_decay`` of 1, by depth, in its order.

    The deepest has the ``learning_rate``; matrices have the ``weight_decay``, everything else 0. Each has a ``name``.
    """
    depths, undecayed = model.config.depths, model.undecayed
    last = sum(depths) + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = layer_id(name, depths) if layer_decay < 1 else last
            groups.setdefault((depth, is_decayed(name, parameter, undecayed)), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable; free at least the classifier")
    return [
        {
            "params": groups[depth, decayed],
            "lr": learning_rate * layer_decay ** (last - depth),
            "weight_decay": weight_decay if decayed else 0.0,
            "name": ("decay" if decayed else "no_decay") + (f"/layer{depth}" if layer_decay < 1 else ""),
        }
        for depth, decayed in sorted(groups)
    ]


def fitting_warmup(warmup: int, total: int) -> int:
    """Steps of a warm-up that fits into the training: one that is as long as all of it becomes a fifth, and says so."""
    if warmup < total:
        return warmup
    shorter = total // 5
    rank_zero_info(f"the warm-up of {warmup} steps is shortened to {shorter}: the whole training has {total} steps")
    return shorter


def lr_factor(
    step: int,  # optimiser steps done
    *,
    schedule: Schedule,  # shape after the warm-up
    total: int,  # steps of the whole training
    warmup: int,  # steps of the warm-up
    warmup_floor: float = 0.0,  # factor at step 0, when there is a warm-up
    floor: float = 0.0,  # factor at the last step of a cosine or a line
    milestones: Sequence[int] = (),  # steps at which "multistep" drops
    gamma: float = 0.1,  # factor of each drop
) -> float:
    """Learning rate of a step, as a factor on the peak.

    Linear from ``warmup_floor`` to 1 over ``warmup`` steps; then, over the remaining steps, a half cosine or a line
    down to ``floor``, the constant 1, or ``gamma`` to the power of the milestones passed.
    """
    if step < warmup:
        return warmup_floor + (1 - warmup_floor) * step / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "multistep":
        return gamma ** sum(step >= milestone for milestone in milestones)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * remaining
