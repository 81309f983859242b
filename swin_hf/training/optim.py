"""What the optimiser sees: parameter groups, the learning rate and its schedule.

The rules are those of Microsoft's ``optimizer.py``, ``lr_scheduler.py`` and ``main.py``; the arithmetic needs no
data loader, so that a resumed run finds its loader untouched.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # a re-export
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "linear", "constant", "multistep"]

# Never decayed: anything one-dimensional (norms), biases, and these tables, which are offsets rather than weights.
_NO_DECAY = re.compile(r"\.bias$|relative_position_bias_table|position_embeddings|mask_token")
_STAGE = re.compile(r"\bstages\.(\d+)\.(?:blocks\.(\d+)|downsample)\.")
REFERENCE_BATCH = 512  # images; the batch that the learning rates of the recipes are given for


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: matrices and kernels only."""
    return parameter.ndim > 1 and not _NO_DECAY.search(name)


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Depth of a parameter for layer-wise learning rate decay.

    The patch embedding and the mask token are 0, block ``k`` (counted through all stages) is ``k + 1``, a downsampling
    shares the id of the block before it, and everything else (last norm, head, position embeddings) comes last,
    ``sum(depths) + 1``.

    Args:
        name: Parameter name in our state dict; a prefix such as LoRA's does not matter.
        depths: Blocks of each stage.
    """
    if match := _STAGE.search(name):
        stage, block = int(match[1]), match[2]
        return sum(depths[: stage + 1]) if block is None else sum(depths[:stage]) + int(block) + 1
    if "embeddings." in name and "position_embeddings" not in name:
        return 0
    return sum(depths) + 1


def parameter_groups(
    model: nn.Module,
    depths: Sequence[int],
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and, below a ``layer_decay`` of 1, by depth.

    Args:
        model: The network; frozen parameters are left out.
        depths: Blocks of each stage.
        learning_rate: Rate of the deepest group.
        weight_decay: Decay of the matrices; everything else gets 0.
        layer_decay: Factor on the rate for each layer further from the head, in ``(0, 1]``.

    Returns:
        Groups in order of depth, each with ``params``, ``lr``, ``weight_decay`` and a ``name``.

    Raises:
        ValueError: If ``layer_decay`` is out of range or nothing is trainable.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it is a factor in (0, 1], 1 for the same rate everywhere")
    last = sum(depths) + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = layer_id(name, depths) if layer_decay < 1 else last
            groups.setdefault((depth, is_decayed(name, parameter)), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable; free at least the classifier")
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (last - depth),
            "weight_decay": weight_decay if decayed else 0.0,
            "name": ("decay" if decayed else "no_decay") + (f"/layer{depth}" if layer_decay < 1 else ""),
        }
        for (depth, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def scaled_learning_rate(base: float, batch_size: int, world_size: int, accumulate: int) -> float:
    """Scale a rate given for 512 images linearly to the images behind one optimiser step."""
    return base * batch_size * world_size * accumulate / REFERENCE_BATCH


def fitting_warmup(warmup: int, total: int) -> int:
    """Steps of a warm-up that fits into the training: one that is as long as all of it becomes a fifth, and says so."""
    if warmup < total:
        return warmup
    shorter = total // 5
    rank_zero_info(f"the warm-up of {warmup} steps is shortened to {shorter}: the whole training has {total} steps")
    return shorter


def lr_factor(
    step: int,
    *,
    schedule: Schedule,
    total: int,
    warmup: int,
    warmup_floor: float,
    floor: float,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """Learning rate of a step, as a factor on the peak.

    Linear from ``warmup_floor`` to 1 over ``warmup`` steps; then, over the remaining steps, a half cosine or a line
    down to ``floor``, the constant 1, or ``gamma`` to the power of the milestones passed.

    Args:
        step: Optimiser steps done.
        schedule: Shape after the warm-up.
        total: Steps of the whole training.
        warmup: Steps of the warm-up.
        warmup_floor: Factor at step 0, when there is a warm-up.
        floor: Factor at the last step of a cosine or a line.
        milestones: Steps at which ``multistep`` drops.
        gamma: Factor of each drop.
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


def build_schedule(
    optimizer: Optimizer,
    *,
    schedule: Schedule,
    total: int,
    warmup: int,
    warmup_floor: float = 0.0,
    floor: float = 0.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> LambdaLR:
    """Attach :func:`lr_factor` to an optimiser; to be stepped once per optimiser step.

    Raises:
        ValueError: If the warm-up is not shorter than the training.
    """
    if not 0 <= warmup < total:
        raise ValueError(
            f"a warm-up of {warmup} steps does not fit into a training of {total} steps; "
            "lower warmup_epochs / warmup_steps or train longer (trainer.max_epochs)"
        )
    factor = partial(
        lr_factor,
        schedule=schedule,
        total=total,
        warmup=warmup,
        warmup_floor=warmup_floor,
        floor=floor,
        milestones=tuple(milestones),
        gamma=gamma,
    )
    return LambdaLR(optimizer, factor)
