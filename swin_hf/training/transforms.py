"""From a decoded picture to a ``uint8`` tensor: the training pipeline of a classifier.

That of evaluation is :meth:`swin_hf.processing.Preprocessing.pixels`.

Everything here is a plain function or a small class that can be pickled: loader workers, whatever their start method,
get nothing but these objects. Random numbers come from torch's global generator; who seeds it, and with what, is
written in :mod:`swin_hf.training.sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from swin_hf.processing import Interpolation, resampling_of

AutoAugment = Literal["randaugment", "trivialaugment"]


class TrainTransform:
    """Random crop, flip and automatic augmentation, to a ``uint8`` tensor.

    Each step runs where it is faster: the resized crop on tensors, three times as fast as on PIL images; RandAugment
    and TrivialAugment on PIL images, three times as fast as on tensors. Normalisation, random erasing, Mixup and CutMix
    belong to the whole batch and run on the device.

    Args:
        image_size: Height and width of the result, in pixels.
        crop_scale: Least and greatest area of the random resized crop, as a share of the picture.
        crop_ratio: Least and greatest width-to-height ratio of that crop.
        crop_padding: If given, the picture is resized to ``image_size``, padded by this many black pixels on each side
            and cropped at random, in place of the random resized crop: the habit for CIFAR-sized pictures.
        hflip: Probability of a horizontal flip; 0 for digits and letters.
        auto_augment: ``randaugment`` (two operations of magnitude 9), ``trivialaugment``, or None.
        interpolation: Resampling of the crop.
        fill: Grey value or colour (0..255) of the corners that a rotation or shear uncovers.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_padding: int | None = None,
        hflip: float = 0.5,
        auto_augment: AutoAugment | None = None,
        interpolation: Interpolation = "bicubic",
        fill: Sequence[int] = (0,),
    ) -> None:
        resampling = resampling_of(interpolation)
        steps: list[Any] = []
        if crop_padding is None:
            steps.append(v2.PILToTensor())
            steps.append(v2.RandomResizedCrop(image_size, crop_scale, crop_ratio, interpolation=resampling))
        else:
            steps.append(v2.Resize(image_size, interpolation=resampling))
            steps.append(v2.RandomCrop(image_size, padding=crop_padding))
        if hflip > 0:
            steps.append(v2.RandomHorizontalFlip(hflip))
        if auto_augment is not None and crop_padding is None:
            steps.append(v2.ToPILImage())
        colour = list(fill) if len(fill) > 1 else fill[0]
        if auto_augment == "randaugment":
            steps.append(v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR, fill=colour))
        elif auto_augment == "trivialaugment":
            steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=colour))
        self.steps = steps

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return the augmented picture, ``(C, H, W)`` of ``uint8``."""
        value: Any = picture
        for step in self.steps:
            value = step(value)
        pixels: Tensor = value if isinstance(value, Tensor) else tvf.pil_to_tensor(value)
        return pixels


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn ``uint8`` pixels into normalised ``float32``, bit for bit as transformers' image processors do.

    Args:
        pixels: ``(B, C, H, W)`` or ``(C, H, W)`` of ``uint8``, on any device.
        mean: Mean of each channel, for values in 0..1.
        std: Standard deviation of each channel, for values in 0..1.
    """
    scale = 1.0 / (1 / 255)  # the processors multiply mean and std by this, and round as this does
    centre = torch.tensor(mean, device=pixels.device) * scale
    spread = torch.tensor(std, device=pixels.device) * scale
    normalized: Tensor = tvf.normalize(pixels.to(torch.float32), centre, spread, inplace=True)
    return normalized
