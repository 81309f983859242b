"""A teacher for a classifier: any image classifier of transformers with the same classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig

from swin_hf.classes import class_table, match_classes
from swin_hf.loading import load_model, processor_of
from swin_hf.ranges import Options, ranged

from ..network import resolve


@dataclass(frozen=True)
class Distillation(Options):
    """A teacher whose answers are imitated.

    Args:
        teacher: Folder or Hub id of any image classifier of transformers with the same classes, in any order. It sees
            the pixels as its preprocessor_config.json has them.
        weight: Share of the teacher's loss, in [0, 1].
        temperature: Softening of both distributions in that loss.
    """

    teacher: str | None = None
    weight: float = ranged(0.5, "[0, 1]")
    temperature: float = ranged(2.0, "(0, inf)")


class Teacher(nn.Module):
    """A frozen image classifier that takes the student's pixels and answers with the student's classes.

    ``order`` has the network's number of each class of the student; ``scale`` ``(C,)`` is the factor on the student's
    normalised pixels, and ``shift`` ``(C,)`` what is added then.
    """

    order: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, order: Sequence[int], scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_labels)`` of images ``(B, C, H, W)``; grey ones are repeated where colours are wanted."""
        network: Any = self.network
        images = (images * self.scale + self.shift).to(network.dtype)
        size = getattr(network.config, "image_size", None) or images.shape[-2:]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if sides != tuple(images.shape[-2:]):
            images = F.interpolate(images, sides, mode="bicubic", antialias=True)
        logits: Tensor = network(pixel_values=images).logits
        return logits[:, self.order]


def imitation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of a student's logits ``(B, num_labels)`` from those of its teacher, softened.

    The square of the temperature keeps the size of the gradients.
    """
    given, target = (F.log_softmax(scores / temperature, -1) for scores in (logits, wanted))
    return F.kl_div(given, target, reduction="batchmean", log_target=True) * temperature**2


def load_teacher(
    source: str,
    id2label: Mapping[int, str],
    num_channels: int,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Teacher:
    """Any image classifier of transformers, or anyone's Swin, adapted to the classes and images of its student.

    ``normalization`` is the mean and standard deviation of each channel of these images; the teacher's if not given.

    Raises:
        ValueError: If it is missing, knows other classes or takes images of other channels.
    """
    path = resolve(source).path
    network: Any
    theirs: Any
    try:
        if path.is_file() or "architecture" in PreTrainedConfig.get_config_dict(path)[0]:  # a Swin of timm, or a file
            network, _ = load_model(path, "image-classification")
            processor: Any = processor_of(network, path)
            theirs = processor.image_mean, processor.image_std
        else:
            network = AutoModelForImageClassification.from_pretrained(path, use_safetensors=True)
            theirs = processor_normalization(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the teacher {source!r} is not an image classifier of transformers: {reason}") from error
    order = match_classes(class_table(id2label), class_table(network.config.id2label), model=f"the teacher {source!r}")
    channels = getattr(network.config, "num_channels", 3)
    if channels != num_channels and (num_channels, channels) != (1, 3):
        problem = f"the teacher {source!r} takes images of {channels} channels but the student's have {num_channels}"
        raise ValueError(f"{problem}; choose a teacher of as many channels (data.num_channels)")
    scale, shift = torch.ones(channels), torch.zeros(channels)
    if normalization is not None and theirs is not None:
        (mean, std), (their_mean, their_std) = (map(torch.tensor, pair) for pair in (normalization, theirs))
        scale, shift = scale * std / their_std, shift + (mean - their_mean) / their_std
    return Teacher(network, order, scale, shift)


def processor_normalization(folder: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that an image processor normalises with; ``None`` where the folder does not say."""
    path = folder / "preprocessor_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the image processor again") from error
    if values.get("do_normalize") is False:
        return [0.0], [1.0]
    return (values["image_mean"], values["image_std"]) if {"image_mean", "image_std"} <= values.keys() else None
