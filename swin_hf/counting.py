"""How large a model is and how much it computes, found without allocating it or running it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(config: Any, model_class: Callable[[Any], nn.Module]) -> int:
    """Number of weights of a model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def count_macs(config: Any, model_class: Callable[[Any], nn.Module]) -> int:
    """Multiply-accumulates of one image of ``config.image_size``, which the papers call FLOPs.

    They are those of the definition (``eager``), whichever backend runs.
    """
    eager = type(config).from_dict({**config.to_dict(), "attn_implementation": "eager"})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model_class(eager).eval()(torch.empty(1, config.num_channels, *config.image_hw))
    return int(counter.get_total_flops()) // 2
