"""Pictures: which files are pictures, how they are decoded, and how they become the input of a model."""

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

import fsspec  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from transformers import BaseImageProcessor

from swin_hf.model.image_processing_swin_hf import SwinHFImageProcessor, SwinHFImageProcessorPil
from swin_hf.model.pixels import (
    GREY_MAXIMUM,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WHITE,
    Picture,
    open_file,
    to_8_bits,
    to_channels,
)

# Suffixes of the pictures that are found in a folder; a file that is named may have any.
PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip

Interpolation = Literal["nearest", "bilinear", "bicubic"]
# PIL's numbers. Only these three exist with antialiasing in PIL, torchvision and transformers.
RESAMPLING: dict[Interpolation, int] = {"nearest": 0, "bilinear": 2, "bicubic": 3}


class UnreadablePictureError(OSError):
    """A picture that cannot be decoded; the message says why."""


class TooManyPixelsError(ValueError):
    """A picture with more pixels than Pillow's limit, which protects from files that would fill the memory."""


def decode_picture(
    cell: Any,
    num_channels: int = 3,
    background: Sequence[int] = WHITE,
    root: str | None = None,
    grey_maximum: int = GREY_MAXIMUM,
) -> Image.Image | Tensor:
    """Decode a cell of an image column with ``to_8_bits`` or, for other than 1 or 3 channels, with ``to_channels``.

    Args:
        cell: ``{"bytes", "path"}`` as ``datasets.Image(decode=False)`` gives it, a path or URL, bytes, or a PIL image.
        num_channels: 3 for ``RGB``, 1 for ``L``; any other number gives ``(C, H, W)`` float32.
        background: Red, green and blue (0..255) behind transparent pixels.
        root: Folder that relative paths start from.
        grey_maximum: Value that is white in grey pictures of 16 bits.

    Raises:
        UnreadablePictureError: If the picture cannot be decoded; the cause is chained.
    """
    try:
        # A picture that was given stays open; one that is opened here is closed.
        with nullcontext(cell) if isinstance(cell, Image.Image) else open_picture(cell, root) as picture:
            if num_channels in (1, 3):
                return to_8_bits(picture, "RGB" if num_channels == 3 else "L", background, grey_maximum)
            return torch.from_numpy(to_channels(picture, num_channels, grey_maximum))
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size, limit = re.findall(r"\d+", str(error))[:2]
        most = f"{limit} without a warning" if isinstance(error, Warning) else limit
        reason = TooManyPixelsError(f"it has {size} pixels and Pillow reads at most {most}; make it smaller")
        raise UnreadablePictureError(f"{_describe(cell)}: {reason}") from reason
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise UnreadablePictureError(f"{_describe(cell)}: {type(error).__name__}: {error}") from error


def decode_pixels(
    cell: Any,
    num_channels: int = 3,
    background: Sequence[int] = WHITE,
    root: str | None = None,
    grey_maximum: int = GREY_MAXIMUM,
) -> Image.Image | Tensor:
    """Decode as :func:`decode_picture` does, faster where torchcodec is installed (``pip install 'swin-hf[decode]'``).

    torchcodec decodes JPEG files, to the same pixels as Pillow and with the same EXIF orientation. Pillow decodes all
    others, and the JPEG files that torchcodec refuses or would read differently: CMYK, colour that becomes grey,
    several pictures in a file, and an orientation in XMP. torchcodec gives ``(C, H, W)`` uint8.
    """
    decode = None if isinstance(cell, Image.Image) or num_channels not in (1, 3) else jpeg_decoder()
    if decode is not None:
        with suppress(Exception):  # Pillow decodes it again below and raises the error
            file = _file(cell, root)
            if isinstance(file, bytes):  # what was fetched is not fetched again
                cell = {"bytes": file, "path": cell.get("path") if isinstance(cell, dict) else cell}
            data = file if isinstance(file, bytes) else Path(file).read_bytes()
            with Image.open(io.BytesIO(data)) as header:
                modes = ("L", "RGB")[:num_channels]
                is_same = header.format == "JPEG" and header.mode in modes and "xmp" not in header.info
            if is_same:
                return decode(data, mode="RGB" if num_channels == 3 else "GRAY")
    return decode_picture(cell, num_channels, background, root, grey_maximum)


@cache
def jpeg_decoder() -> Callable[..., Tensor] | None:
    """``decode_jpeg`` of torchcodec; None if it is not installed, older than 0.16, or built for another torch."""
    try:
        decoder: Callable[..., Tensor] = import_module("torchcodec.decoders").decode_jpeg
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    return decoder


def decoding(processor: object) -> dict[str, Any]:
    """Keywords of :func:`decode_picture` from an image processor of this package; the defaults for another one."""
    return {
        "background": getattr(processor, "background", WHITE),
        "grey_maximum": getattr(processor, "grey_maximum", GREY_MAXIMUM),
    }


def open_picture(cell: Any, root: str | None = None) -> AbstractContextManager[Picture]:
    """Open a cell of an image column without decoding it, for ``with``; a ``.npy`` file is an array."""
    return open_file(_file(cell, root))


def picture_bytes(cell: Any, root: str | None = None) -> bytes:
    """The file of a cell of an image column."""
    file = _file(cell, root)
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _file(cell: Any, root: str | None) -> bytes | str:
    """The bytes of a stored cell, or the path of its file."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not cell:
        raise ValueError("the cell is empty")
    if isinstance(cell, str) and "://" in cell:
        with fsspec.open(cell, "rb") as stream:
            return bytes(stream.read())
    return os.path.join(root or "", cell)


def as_rgb(picture: Image.Image | Tensor) -> Image.Image:
    """A picture to look at, of what :func:`decode_picture` returns.

    Of 4 or more channels, the first three are shown, each scaled from its lowest to its highest value; of 2, the first
    as grey.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    shown = picture[:3] if len(picture) > 2 else picture[:1].expand(3, -1, -1)
    low, high = (bound(-1).values[:, None, None] for bound in (shown.flatten(1).min, shown.flatten(1).max))
    stretched = (shown - low) / (high - low).clamp(min=1e-12) * 255
    return Image.fromarray(stretched.byte().permute(1, 2, 0).contiguous().numpy())


def to_tensor(picture: Image.Image | Tensor) -> Tensor:
    """A decoded picture as ``(C, H, W)``: ``uint8`` of 1 or 3 channels, float32 of any other number."""
    return tvf.pil_to_tensor(picture) if isinstance(picture, Image.Image) else picture


def _describe(cell: Any) -> str:
    path = cell.get("path") if isinstance(cell, dict) else cell
    return str(path) if isinstance(path, str) else "picture without a path"


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the input of a model: decoded, resized, cropped or squashed, normalised.

    The shorter side is resized to ``short_side`` pixels and ``size`` is cut out of the centre. Without ``crop``, the
    whole picture stays, in its proportions, as for dense predictions. Without ``short_side``, it is resized to ``size``
    and changes its proportions ("squash").
    """

    size: tuple[int, int]  # height and width of the result, in pixels
    short_side: int | None
    mean: tuple[float, ...] = IMAGENET_MEAN  # of each channel, for values in 0..1
    std: tuple[float, ...] = IMAGENET_STD  # likewise
    interpolation: Interpolation = "bicubic"  # always antialiased
    background: tuple[int, ...] = WHITE  # red, green and blue (0..255) behind transparent pixels
    grey_maximum: int = GREY_MAXIMUM  # white in grey pictures of 16 bits
    crop: bool = True

    @classmethod
    def of_release(cls, size: tuple[int, int], num_channels: int = 3) -> Self:
        """What Microsoft evaluates its models with (TEST.CROP of its configs): a crop, or a squash from 384 pixels on.

        RGB is normalised with the mean and deviation of ImageNet, any other number of channels with 0.5.
        """
        short = None if min(size) >= 384 else short_side(size, crop_pct=224 / 256)
        half = (0.5,) * num_channels
        return cls(size, short) if num_channels == 3 else cls(size, short, half, half)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self | None:
        """Read ``preprocessor_config.json``; None if it does more than resize, crop, rescale to 0..1 and normalise."""
        size, crop, crops = values.get("size"), values.get("crop_size"), bool(values.get("do_center_crop"))
        names = {number: name for name, number in RESAMPLING.items()}
        has_steps = all(values.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
        has_numbers = values.get("image_mean") and values.get("image_std") and values.get("resample") in names
        is_unit = abs(values.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
        if not (isinstance(size, Mapping) and has_steps and has_numbers and is_unit) or values.get("do_pad"):
            return None
        short = int(size["shortest_edge"]) if set(size) == {"shortest_edge"} else None
        if short is None:
            box = None if crops and isinstance(crop, Mapping) else size
        else:
            box = crop if crops else {"height": short, "width": short}
        if not (isinstance(box, Mapping) and {"height", "width"} <= box.keys()):
            return None
        return cls(
            (int(box["height"]), int(box["width"])),
            short,
            tuple(values["image_mean"]),
            tuple(values["image_std"]),
            names[values["resample"]],
            tuple(values.get("background") or WHITE),
            int(values.get("grey_maximum") or GREY_MAXIMUM),
            crop=crops or short is None,
        )

    @property
    def crop_pct(self) -> float:
        """Share of the shorter side that the crop keeps; 1 where the picture is squashed."""
        return 1.0 if self.short_side is None or not self.crop else max(self.size) / self.short_side

    def values(self) -> dict[str, Any]:
        """Arguments of an image processor, for JSON."""
        box = dict(zip(("height", "width"), self.size, strict=True))
        values: dict[str, Any] = {
            "do_resize": True,
            "size": box if self.short_side is None else {"shortest_edge": self.short_side},
            "resample": RESAMPLING[self.interpolation],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": len(self.mean) == 3,
            "background": list(self.background),
            "grey_maximum": self.grey_maximum,
        }
        if self.short_side is not None and self.crop:
            values |= {"do_center_crop": True, "crop_size": box}
        return values

    def stock_values(self) -> dict[str, Any]:
        """``preprocessor_config.json`` with a class of transformers, for models of other packages."""
        kind = (
            "ViTImageProcessor" if self.short_side is None else "BitImageProcessor"
        )  # the first squashes, the second crops
        values = {key: value for key, value in self.values().items() if key not in ("background", "grey_maximum")}
        return {"image_processor_type": kind, **values}

    def processor(self, backend: Literal["torchvision", "pil"] = "torchvision") -> BaseImageProcessor:
        """The image processor to use and to save with a model of this package."""
        kind = SwinHFImageProcessor if backend == "torchvision" else SwinHFImageProcessorPil
        return kind(**self.values())

    def pixels(self, picture: Image.Image | Tensor) -> Tensor:
        """Resize (and crop) a decoded picture, ``(C, H, W)`` of its type: the processor before it normalises."""
        (height, width), resampling = self.size, resampling_of(self.interpolation)
        size = [height, width] if self.short_side is None else [self.short_side]
        pixels: Tensor = tvf.resize(to_tensor(picture), size, interpolation=resampling, antialias=True)
        if self.short_side is not None and self.crop:
            top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
            pixels = tvf.crop(pixels, top, left, height, width)
        return pixels

    def words(self) -> dict[str, str]:
        """The resize and the crop in words, for a card."""
        size = "x".join(map(str, self.size))
        if self.short_side is None:
            return {"resize": f"squash to {size} pixels", "crop": "none"}
        if not self.crop:
            return {"resize": f"short side to {self.short_side} pixels, in proportion", "crop": "none"}
        return {"resize": f"short side to {self.short_side} pixels", "crop": f"{size} from the centre"}


def resampling_of(interpolation: Interpolation) -> InterpolationMode:
    """Torchvision's name of a resampling; nearest of PIL and of transformers is its NEAREST_EXACT."""
    return InterpolationMode["NEAREST_EXACT" if interpolation == "nearest" else interpolation.upper()]


def short_side(size: tuple[int, int], crop_pct: float) -> int:
    """Length of the shorter side before a centre crop: long enough for both sides of ``size``."""
    return int(max(size) / crop_pct)
