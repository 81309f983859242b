"""Pictures: which files are pictures, and how one becomes 8-bit pixels. The one decoder of the package.

Training, evaluation, prediction, export and the saved image processor read pictures through :func:`decode_picture`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
from PIL import Image, ImageOps

# Suffixes that make a file of a folder a picture, wherever folders are searched. A file that is named may have any.
PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip


class UnreadablePictureError(OSError):
    """A picture that cannot be decoded; the message says why."""


def decode_picture(
    cell: Any,
    num_channels: int = 3,
    background: Sequence[int] = (255, 255, 255),
    root: str | None = None,
) -> Image.Image:
    """Decode a cell of an image column into an upright 8-bit picture.

    * The EXIF orientation is applied; of an animation, the first frame is taken.
    * 16-bit grey is scaled by 255/65535; PIL's own conversion would saturate it to white.
    * Floating-point grey is taken as 0..1, or as 0..255 when its largest value exceeds 1; any other range is an error.
    * Transparent pixels (an alpha channel, or a transparent colour or palette entry) are blended with ``background``;
      PIL's own conversion would show whatever colour hides under them.
    * Palette, CMYK, YCbCr and bilevel pictures are converted.

    Args:
        cell: ``{"bytes", "path"}`` as ``datasets.Image(decode=False)`` gives it, a path or URL, bytes, or a PIL image.
        num_channels: 3 for ``RGB``, 1 for ``L``.
        background: Red, green and blue (0..255) behind transparent pixels.
        root: Folder that relative paths start from.

    Returns:
        A loaded PIL image in mode ``RGB`` or ``L``.

    Raises:
        UnreadablePictureError: If the picture cannot be decoded, for whatever reason; the cause is chained.
    """
    try:
        picture = _open(cell, root)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        return _to_8_bits(picture, "RGB" if num_channels == 3 else "L", tuple(background))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise UnreadablePictureError(f"{_describe(cell)}: {type(error).__name__}: {error}") from error


def _open(cell: Any, root: str | None) -> Image.Image:
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return Image.open(io.BytesIO(cell))
    if not cell:
        raise ValueError("the cell is empty")
    if "://" in cell:
        with fsspec.open(cell, "rb") as stream:
            return Image.open(io.BytesIO(stream.read()))
    return Image.open(os.path.join(root or "", cell))


def _describe(cell: Any) -> str:
    path = cell.get("path") if isinstance(cell, dict) else cell
    return str(path) if isinstance(path, str) else "picture without a path"


def _to_8_bits(picture: Image.Image, mode: str, background: tuple[int, ...]) -> Image.Image:
    transparent = picture.info.get("transparency")
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        picture = Image.fromarray(_scale_grey(values))
        if isinstance(transparent, int):
            picture.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif isinstance(transparent, tuple) and max(transparent) > 255:  # 16 bits a channel, of which Pillow keeps 8
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        canvas = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(canvas, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def _scale_grey(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scale 16-bit, 32-bit or floating-point grey values to ``uint8``."""
    if not np.isfinite(pixels).all() or pixels.min() < 0:
        raise ValueError("grey values are negative or not finite, so they have no place on a scale from 0 to 255")
    if np.issubdtype(pixels.dtype, np.integer):
        if pixels.max() > 65535:
            raise ValueError(f"grey values reach {pixels.max()}; at most 16 bits are understood")
        return np.asarray(np.rint(pixels.astype(np.float32) * (255 / 65535)), dtype=np.uint8)
    if pixels.max() > 255:
        raise ValueError(f"floating-point grey values reach {pixels.max():g}; a range of 0..1 or 0..255 is understood")
    scale = 255.0 if pixels.max() <= 1 else 1.0
    return np.asarray(np.rint(pixels * scale), dtype=np.uint8)
