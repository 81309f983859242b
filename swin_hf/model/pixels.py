"""From a picture as Pillow opens it, or an array, to pixels: the rules that training and the image processor share.

Pictures of 1 and 3 channels become upright pictures of 8 bits, those of any other number arrays of numbers.
"""

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

Array = np.ndarray[Any, Any]
Picture = Image.Image | Array
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHITE = (255, 255, 255)
GREY_MAXIMUM = 65535  # white of grey pictures of 16 bits, by default

ARRAY_MAGIC = b"\x93NUMPY"  # the first bytes of a .npy file

_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL = 258, 277  # TIFF tags


class PixelsError(ValueError):
    """A picture that can be decoded, but whose values have no meaning here; the message says why."""


def to_8_bits(
    picture: Picture, mode: str = "RGB", background: Sequence[int] = WHITE, grey_maximum: int = GREY_MAXIMUM
) -> Image.Image:
    """Convert any picture to an upright one of 8 bits.

    * The EXIF orientation is applied; of an animation, the first frame is taken.
    * Grey of more than 8 bits is scaled so that its white becomes 255; PIL's own conversion would saturate it. White is
      ``2**n - 1`` where a TIFF file says that its samples have n < 16 bits, else ``grey_maximum``.
    * Floating-point grey is taken as 0..1, or as 0..255 when its largest value exceeds 1; any other range is an error.
    * Transparent pixels (an alpha channel, or a transparent colour or palette entry) are blended with ``background``;
      PIL's own conversion would show whatever colour hides under them.
    * An array has 1 or 3 channels; its numbers are scaled as those of grey pictures are.

    Args:
        picture: Any PIL image, which is left as it is, or an array ``(height, width[, channels])``.
        mode: ``RGB`` or ``L``.
        background: Red, green and blue (0..255) behind transparent pixels.
        grey_maximum: Value (1..65535) that is white in grey pictures of 16 bits, for all pictures of a data set alike.

    Raises:
        PixelsError: If values have no place on a scale from black to white, or an array has other channels.
        OSError: If the picture cannot be decoded; decoders raise SyntaxError, struct.error and others, too.
    """
    if isinstance(picture, np.ndarray):
        values = stack_channels(picture)
        if values.shape[2] not in (1, 3):
            raise PixelsError(f"it has {values.shape[2]} channels, and {len(mode)} are wanted (num_channels)")
        scaled = values if values.dtype == np.uint8 else _scale_grey(values, grey_maximum)
        picture = Image.fromarray(np.ascontiguousarray(scaled.squeeze(2) if values.shape[2] == 1 else scaled))
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


def open_file(file: bytes | str) -> AbstractContextManager[Picture]:
    """Open a picture of a path or of the bytes of a file without decoding it, for ``with``; a ``.npy`` is an array."""
    if isinstance(file, bytes):
        stream = io.BytesIO(file)
        return nullcontext(read_array(stream)) if file.startswith(ARRAY_MAGIC) else Image.open(stream)
    if not file.lower().endswith(".npy"):
        return Image.open(file)
    with open(file, "rb") as array:
        return nullcontext(read_array(array))


def read_array(stream: BinaryIO) -> Array:
    """Read a ``.npy`` file of numbers; PixelsError for one that is cut off, or of objects, which are not loaded."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = headers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError) as error:
        raise PixelsError(f"it is not a .npy file of numbers ({error})") from error
    if dtype.hasobject:
        raise PixelsError("it holds pickled Python objects, which are never loaded; save an array of numbers")
    if dtype.kind not in "buif":
        raise PixelsError(f"it holds values of type {dtype}; save whole numbers or fractions")
    content = stream.read()
    size = dtype.itemsize * math.prod(shape)
    if len(content) != size:
        raise PixelsError(f"it has {len(content)} bytes for an array of {size}; it is cut off or damaged")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def stack_channels(picture: Picture) -> Array:
    """All channels of a picture as they are stored, ``(height, width, channels)``.

    Those of a TIFF file are the bands of all its pages, in their order; other files have those of the first picture.
    PixelsError if an array is not a picture, or Pillow reads only a part of a file.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim not in (2, 3) or 0 in picture.shape:
            raise PixelsError(f"it is an array of shape {picture.shape}; a picture is (height, width, channels)")
        return picture if picture.ndim == 3 else picture[..., None]
    pages = []
    for page in range(getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1):
        picture.seek(page)
        bands, stored = len(picture.getbands()), getattr(picture, "tag_v2", {}).get(_SAMPLES_PER_PIXEL, 1)
        if bands < stored:
            raise PixelsError(f"it has {stored} bands, of which Pillow reads {bands}; save it as .npy")
        stored_as = str(getattr(picture, "tile", ""))
        if bands > 1 and (";16" in stored_as or "RGBa" in stored_as):
            raise PixelsError(
                f"Pillow changes the values of its {bands} bands (of 16 bits, or multiplied by alpha); save it as .npy"
            )
        pages.append(np.asarray(ImageOps.exif_transpose(picture)))
    if len({values.shape[:2] for values in pages}) > 1:
        raise PixelsError(f"its {len(pages)} pages differ in size, so they cannot be the channels of one picture")
    return np.concatenate([np.atleast_3d(values) for values in pages], axis=2)


def count_channels(picture: Picture) -> int:
    """How many channels :func:`stack_channels` gives, or would if Pillow read all bands; nothing is decoded."""
    if isinstance(picture, np.ndarray):
        return int(stack_channels(picture).shape[2])
    pages = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
    stored = getattr(picture, "tag_v2", {}).get(_SAMPLES_PER_PIXEL, 1)
    return int(pages * max(len(picture.getbands()), stored))


def to_channels(picture: Picture, num_channels: int, maximum: int = GREY_MAXIMUM) -> Array:
    """All channels of a picture, ``(channels, height, width)`` float32, on the scale of 8-bit pictures but not rounded.

    Whole numbers of 8 bits stay as they are. Those of 16 bits (``uint16``) are divided by ``maximum`` and multiplied by
    255. Any other number (fractions, signed and longer whole numbers, true and false) is multiplied by 255, so that it
    is in its own unit once the image processor has divided by 255. PixelsError if there is another number of channels,
    or a value is not finite.
    """
    if (count := count_channels(picture)) == num_channels:  # otherwise it is refused without decoding
        values = stack_channels(picture)
        count = values.shape[2]
    if count != num_channels:
        raise PixelsError(f"it has {count} channels, and {num_channels} are wanted (num_channels)")
    factor = {np.dtype(np.uint8): 1.0, np.dtype(np.uint16): 255 / maximum}.get(values.dtype.newbyteorder("="), 255.0)
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, which is refused
        scaled = np.multiply(values.transpose(2, 0, 1), factor, dtype=np.float32, casting="unsafe")
    if not np.isfinite(scaled).all():
        raise PixelsError(
            "it holds NaN, infinity or numbers beyond those of float32; replace missing values by a number"
        )
    return np.ascontiguousarray(scaled)


def least_white(picture: Picture) -> int | None:
    """The smallest possible white of a grey picture of 16 bits: what its file says, else its largest value; or None."""
    if isinstance(picture, np.ndarray):
        return int(picture.max()) if picture.dtype.newbyteorder("=") == np.uint16 and picture.size else None
    if not picture.mode.startswith("I"):
        return None
    return _declared_white(picture) or int(np.asarray(picture).max())


def _declared_white(picture: Image.Image) -> int | None:
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return 2**bits - 1 if 8 < bits < 16 else None


def _scale_grey(pixels: Array, white: int) -> Array:
    """Scale 16-bit, 32-bit or floating-point grey values to ``uint8``."""
    if not np.isfinite(pixels).all() or pixels.min() < 0:
        raise PixelsError("grey values are negative or not finite, so they have no place on a scale from 0 to 255")
    if np.issubdtype(pixels.dtype, np.integer):
        if pixels.max() > GREY_MAXIMUM:
            raise PixelsError(f"grey values reach {pixels.max()}; at most 16 bits are supported")
        if pixels.max() > white:
            raise PixelsError(
                f"grey values reach {pixels.max()}, but white is {white} (grey_maximum); give pictures of the depth "
                f"that the model was trained on, or train with grey_maximum {GREY_MAXIMUM}"
            )
        return np.asarray(np.rint(pixels.astype(np.float32) * (255 / white)), dtype=np.uint8)
    if pixels.max() > 255:
        raise PixelsError(f"floating-point grey values reach {pixels.max():g}; the range is 0..1 or 0..255")
    return np.asarray(np.rint(pixels * 255.0 if pixels.max() <= 1 else pixels), dtype=np.uint8)
