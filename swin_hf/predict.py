"""Classify pictures: find them, read them, name what they show.

The command line stands on these functions; they serve a program as well::

    model, processor = load_classifier("runs/digits/model")
    guesses = classify(model, processor, [read_picture("three.png")], top_k=3)

Torch and the model are imported where they are first used: what can be refused without them is refused at once.
"""

from __future__ import annotations

import glob
import io
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image


# What a folder is searched for; a file that is named explicitly may have any name.
PICTURE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

STANDARD_INPUT = "-"
DOWNLOAD_SECONDS = 30  # without an answer
DOWNLOAD_BYTES = 256 * 2**20  # larger than any picture that PIL agrees to decode

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class PictureError(OSError):
    """A picture that cannot be had or read; the message names it and says what to do."""


class Guess(NamedTuple):
    """One class for one picture."""

    index: int  # position in the classifier
    label: str
    score: float  # probability, or the bare output of a regression


def find_pictures(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Turn what a user typed into a list of pictures, without opening any.

    Args:
        arguments: Files, folders (searched with their sub-folders), glob patterns, http(s) addresses, and ``-`` for
            the bytes of one picture on standard input.

    Returns:
        The pictures in the order of the arguments, each folder and pattern sorted, none twice; and a sentence for
        each argument that leads to none.
    """
    pictures: dict[str, None] = {}  # an ordered set
    problems = []
    for argument in arguments:
        try:
            pictures.update(dict.fromkeys(_pictures_of(argument)))
        except PictureError as error:
            problems.append(str(error))
    return list(pictures), problems


def _pictures_of(argument: str) -> list[str]:
    if argument == STANDARD_INPUT or _is_address(argument):
        return [argument]
    path = Path(argument)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        if not found:
            known = " ".join(PICTURE_SUFFIXES)
            raise PictureError(
                f"{argument}: the folder holds no picture; name files, or a folder with some of {known}"
            )
        return found
    if path.exists():
        return [argument]
    if glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise PictureError(f"{argument}: nothing matches the pattern; check it with `ls`")
        return [picture for match in matches for picture in _pictures_of(match)]
    raise PictureError(f"{argument}: no such file or folder; check the spelling, or give the full path")


def _is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def read_picture(source: str, mode: str = "RGB") -> Image:
    """Read one picture, upright as its EXIF says.

    Args:
        source: A path, an http(s) address, or ``-`` for standard input.
        mode: PIL mode that the model wants, ``"RGB"`` or ``"L"``.

    Raises:
        PictureError: If it cannot be fetched, opened or decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(_stream(source)) as picture:
            return _flatten(ImageOps.exif_transpose(picture), mode)
    except PictureError:
        raise
    except Exception as error:  # the decoders of PIL raise whatever a broken file leads them to
        reason = "it is not a picture, or a damaged one" if _is_undecodable(error) else str(error)
        raise PictureError(
            f"{source}: cannot be read: {reason}; open it in a viewer, or leave it out"
        ) from error


def _is_undecodable(error: Exception) -> bool:
    return not isinstance(error, OSError) or error.errno is None


def _stream(source: str) -> Any:
    if source == STANDARD_INPUT:
        return io.BytesIO(sys.stdin.buffer.read())
    if not _is_address(source):
        return source
    request = urllib.request.Request(source, headers={"User-Agent": "swin-hf"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            content = answer.read(DOWNLOAD_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PictureError(
            f"{source}: cannot be fetched: {error}; check the address and the network"
        ) from error
    if len(content) > DOWNLOAD_BYTES:
        raise PictureError(
            f"{source}: more than {DOWNLOAD_BYTES // 2**20} MiB; download it and make it smaller"
        )
    return io.BytesIO(content)


def _flatten(picture: Image, mode: str) -> Image:
    """Bring any PIL mode to ``mode``: transparency onto white, 16 bits to 8."""
    from PIL import Image

    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        extrema: Any = picture.getextrema()
        scale = 255 / 65535 if extrema[1] > 255 else 1.0
        picture = picture.convert("F").point(lambda value: value * scale).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)
