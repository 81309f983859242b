"""From a decoded picture to a tensor: the training pipeline of a classifier, and the options of pixels.

Loader workers get these objects, so all of them can be pickled. Random numbers come from torch's global generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from swin_hf.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from swin_hf.processing import Interpolation, resampling_of, to_tensor
from swin_hf.ranges import Options, check_range, choice, ranged

from ..options import plain

AutoAugment = Literal["randaugment", "trivialaugment"]
ResizeMode = Literal["crop", "squash"]
ChannelValues = list[float] | Literal["dataset"]


@dataclass(frozen=True)
class Augmentation(Options):
    """How training pictures are changed at random.

    Args:
        crop_scale: Least and greatest area of the random resized crop, as a share of the picture.
        crop_ratio: Least and greatest width-to-height ratio of that crop.
        crop_padding: Resize, pad by so many black pixels on each side and crop at random, in place of the random
            resized crop: the habit for CIFAR-sized pictures.
        hflip: Probability of a horizontal flip; 0 for digits and letters.
        auto_augment: randaugment (two operations of magnitude 9), trivialaugment, or nothing.
        erasing: Probability of random erasing, with noise.
    """

    crop_scale: tuple[float, float] = ranged((0.08, 1.0), "(0, 1]", ascending=True)
    crop_ratio: tuple[float, float] = ranged((3 / 4, 4 / 3), "(0, inf)", ascending=True)
    crop_padding: int | None = ranged(None, "[0, 4096]")
    hflip: float = ranged(0.5, "[0, 1]")
    auto_augment: AutoAugment | None = choice(None, AutoAugment)
    erasing: float = ranged(0.0, "[0, 1]")

    def facts(self) -> dict[str, Any]:
        """What a card says of it."""
        facts = plain(self)
        scale, ratio, padding = (facts.pop(f"crop_{name}") for name in ("scale", "ratio", "padding"))
        return {"crop": {"scale": scale, "ratio": ratio} if padding is None else {"padding": padding}, **facts}


@dataclass(frozen=True)
class Pixels(Options):
    """What the values of a picture mean, in training and evaluation, and what evaluation sees of it.

    Args:
        mean: Mean of each channel for values in 0..1; ImageNet's if not given, "dataset" to measure it, as it is
            without being asked for where there are other than 1 or 3 channels.
        std: Standard deviation of each channel; likewise.
        interpolation: nearest, bilinear or bicubic.
        resize_mode: Evaluation: crop (shorter side, then centre crop) or squash (all of the picture).
        crop_pct: Evaluation: share of the shorter side that the centre crop keeps.
        background: Red, green and blue (0..255) behind transparent pixels.
        grey_maximum: Value that is white in grey pictures of 16 bits: 4095 where they hold 12; found from a sample of
            the pictures if not given.
    """

    mean: ChannelValues | None = None
    std: ChannelValues | None = None
    interpolation: Interpolation = choice("bicubic", Interpolation)
    resize_mode: ResizeMode = choice("crop", ResizeMode)
    crop_pct: float = ranged(0.875, "(0, 1]")
    background: tuple[int, int, int] = ranged((255, 255, 255), "[0, 255]")
    grey_maximum: int | None = ranged(None, "[1, 65535]")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, interval in (("mean", "(-inf, inf)"), ("std", "(0, inf)")):
            if getattr(self, name) != "dataset":
                check_range(name, getattr(self, name), interval)
        if len(self.background) != 3:
            raise ValueError(f"background is {self.background}; give red, green and blue in [0, 255]")

    def channel_values(self, num_channels: int) -> tuple[ChannelValues, ChannelValues]:
        """Mean and standard deviation of each channel, "dataset" where they have yet to be measured."""
        found: list[ChannelValues] = []
        for values, imagenet in ((self.mean, IMAGENET_MEAN), (self.std, IMAGENET_STD)):
            if values is None:  # the grey of ImageNet is the mean of its colours
                known: dict[int, ChannelValues] = {3: list(imagenet), 1: [sum(imagenet) / 3]}
                values = known.get(num_channels, "dataset")
            if values != "dataset" and len(values) != num_channels:
                raise ValueError(f"{len(values)} values {list(values)} in mean or std for {num_channels} channels")
            found.append(values if values == "dataset" else [float(value) for value in values])
        return found[0], found[1]


def random_transform(
    image_size: tuple[int, int],  # height and width of the result, in pixels
    options: Augmentation = Augmentation(),
    interpolation: Interpolation = "bicubic",  # of the crop
    fill: Sequence[int] = (0,),  # grey value or colour (0..255) of the corners that a rotation or shear uncovers
) -> v2.Compose:
    """Random crop, flip and automatic augmentation of a picture, to a tensor ``(C, H, W)`` of its type.

    Each step runs where it is faster: the resized crop on tensors, three times as fast as on PIL images; RandAugment
    and TrivialAugment on PIL images, three times as fast as on tensors. Normalisation, random erasing, Mixup and CutMix
    run on the whole batch, on the device.
    """
    resampling = resampling_of(interpolation)
    steps: list[Any]
    if options.crop_padding is None:
        crop = v2.RandomResizedCrop(image_size, options.crop_scale, options.crop_ratio, interpolation=resampling)
        steps = [v2.PILToTensor(), crop]
    else:
        crop = v2.RandomCrop(image_size, padding=options.crop_padding)
        steps = [v2.ToPILImage(), v2.Resize(image_size, interpolation=resampling), crop]
    if options.hflip > 0:
        steps.append(v2.RandomHorizontalFlip(options.hflip))
    if options.auto_augment is not None:
        colour = list(fill) if len(fill) > 1 else fill[0]
        look: Any = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": colour}
        is_random = options.auto_augment == "randaugment"
        steps += [v2.ToPILImage()] if options.crop_padding is None else []
        steps.append(v2.RandAugment(2, 9, **look) if is_random else v2.TrivialAugmentWide(**look))
    return v2.Compose([*steps, to_tensor])


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise pixels in 0..255, ``(..., C, H, W)``, to ``float32``, bit for bit as transformers' image processors do.

    Mean and standard deviation of each channel are those of values in 0..1.
    """
    scale = 1.0 / (1 / 255)  # the processors multiply mean and std by this, and round as this does
    centre, spread = (torch.tensor(values, device=pixels.device) * scale for values in (mean, std))
    return tvf.normalize(pixels.to(torch.float32), centre, spread, inplace=True)
