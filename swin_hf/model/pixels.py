"""From a picture as Pillow opens it to upright 8-bit pixels: the rule that training and the image processor share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHITE = (255, 255, 255)
GREY_MAXIMUM = 65535  # white of a grey picture of 16 bits that nothing more is known about

_BITS_PER_SAMPLE = 258  # TIFF tag


def to_8_bits(
    picture: Image.Image,
    mode: str = "RGB",
    background: Sequence[int] = WHITE,
    grey_maximum: int = GREY_MAXIMUM,
) -> Image.Image:
    """Make an upright 8-bit picture of any other.

    * The EXIF orientation is applied; of an animation, the first frame is taken.
    * Grey of more than 8 bits is scaled so that its white becomes 255; PIL's own conversion would saturate it. White is
      ``2**n - 1`` where a TIFF file says that its samples have n < 16 bits, else ``grey_maximum``, for all pictures of
      a data set alike.
    * Floating-point grey is taken as 0..1, or as 0..255 when its largest value exceeds 1; any other range is an error.
    * Transparent pixels (an alpha channel, or a transparent colour or palette entry) are blended with ``background``;
      PIL's own conversion would show whatever colour hides under them.
    * Palette, CMYK, YCbCr and bilevel pictures are converted.

    Args:
        picture: Any PIL image; it is left as it is.
        mode: ``RGB`` or ``L``.
        background: Red, green and blue (0..255) behind transparent pixels.
        grey_maximum: Value (1..65535) that is white in grey pictures of 16 bits.

    Raises:
        ValueError: If grey values have no place on a scale from black to white.
        OSError: If the picture cannot be decoded; decoders raise SyntaxError, struct.error and others, too.
    """
    white = _declared_white(picture) or grey_maximum
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    transparent = picture.info.get("transparency")
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        picture = Image.fromarray(_scale_grey(values, white))
        if isinstance(transparent, int):
            picture.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif isinstance(transparent, tuple) and max(transparent) > 255:  # 16 bits a channel, of which Pillow keeps 8
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        canvas = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(canvas, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def least_white(picture: Image.Image) -> int | None:
    """The least white of a grey picture of 16 bits: what its file says, else its largest value; None for others."""
    if not picture.mode.startswith("I"):
        return None
    return _declared_white(picture) or int(np.asarray(picture).max())


def _declared_white(picture: Image.Image) -> int | None:
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return 2**bits - 1 if 8 < bits < 16 else None


def _scale_grey(pixels: np.ndarray[Any, Any], white: int) -> np.ndarray[Any, Any]:
    """Scale 16-bit, 32-bit or floating-point grey values to ``uint8``."""
    if not np.isfinite(pixels).all() or pixels.min() < 0:
        raise ValueError("grey values are negative or not finite, so they have no place on a scale from 0 to 255")
    if np.issubdtype(pixels.dtype, np.integer):
        if pixels.max() > GREY_MAXIMUM:
            raise ValueError(f"grey values reach {pixels.max()}; at most 16 bits are understood")
        if pixels.max() > white:
            raise ValueError(
                f"grey values reach {pixels.max()}, but white is {white} (grey_maximum); give pictures of the depth "
                f"that the model was trained on, or train with grey_maximum {GREY_MAXIMUM}"
            )
        return np.asarray(np.rint(pixels.astype(np.float32) * (255 / white)), dtype=np.uint8)
    if pixels.max() > 255:
        raise ValueError(f"floating-point grey values reach {pixels.max():g}; a range of 0..1 or 0..255 is understood")
    scale = 255.0 if pixels.max() <= 1 else 1.0
    return np.asarray(np.rint(pixels * scale), dtype=np.uint8)
