"""How large a model is and how much it computes, found without allocating it or running it."""

import json
from collections.abc import Callable
from functools import cache
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
    return _count_macs(json.dumps(config.to_dict(), sort_keys=True, default=str), config.__class__, model_class)


@cache
def _count_macs(config: str, config_class: Any, model_class: Any) -> int:
    built = config_class.from_dict({**json.loads(config), "attn_implementation": "eager"})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model_class(built).eval()(torch.empty(1, built.num_channels, *built.image_hw))
    return int(counter.get_total_flops()) // 2
