"""Segment pictures: a class for each pixel, the mask as a file, and an overlay with a legend.

Example::

    model, processor = load_classifier("runs/stamps/model")
    classes = segment(model, processor, read_picture("photo.png"))
"""

import colorsys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from transformers import BaseImageProcessor

from swin_hf.classes import require_finite
from swin_hf.files import replacing
from swin_hf.predict import Guess, PictureError, class_names, classify_pixels, prepare, read_picture
from swin_hf.processing import as_rgb
from swin_hf.text import one_line

PALETTE_CLASSES = 256  # a palette has no more entries; masks of more classes are grey pictures of 16 bits
LEGEND_ROW, LEGEND_WIDTH = 16, 170  # pixels


def is_segmenter(model: Any) -> bool:
    """Whether a model classifies every pixel."""
    return type(model).__name__.endswith("ForSemanticSegmentation")


def segment(model: Any, processor: BaseImageProcessor, picture: Image.Image | Tensor) -> Tensor:
    """The class number of each pixel of a picture, ``(height, width)`` int64; ValueError for a NaN or infinite logit.

    The logits are resized to the input of the model, then to the picture, as when training measures the mIoU.
    """
    (pixels,) = prepare(model, processor, [picture])
    with torch.inference_mode():
        logits = require_finite(model(pixels[None]).logits.float())
        for size in (pixels.shape[-2:], tvf.get_size(picture)):
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits[0].argmax(0).cpu()


def class_shares(classes: Tensor, names: Sequence[str], top_k: int = 5) -> list[Guess]:
    """The classes of a picture by their share of its pixels, the largest first."""
    numbers, counts = classes.unique(return_counts=True)
    order = counts.argsort(descending=True)[:top_k]
    pairs = zip(numbers[order].tolist(), counts[order].tolist(), strict=True)
    return [Guess(number, names[number], count / classes.numel()) for number, count in pairs]


def class_at(model: Any, pixels: Tensor, pixel: tuple[int, int] | None) -> Guess:
    """The most probable class of ``pixels`` that :func:`~swin_hf.predict.prepare` made, ``(channels, height, width)``.

    Of a segmenter, the class of one pixel (row, column) or else that with the largest share; ValueError for a pixel
    outside.
    """
    if not is_segmenter(model):
        return classify_pixels(model, [pixels], 1)[0][0]
    height, width = pixels.shape[-2:]
    if pixel is not None and not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel {pixel} is outside the {height}x{width} image; rows and columns are counted from 0")
    with torch.inference_mode():
        logits = F.interpolate(model(pixels[None]).logits.float(), size=pixels.shape[-2:], mode="bilinear")[0]
    if pixel is None:
        return class_shares(logits.argmax(0), class_names(model), 1)[0]
    score, index = logits[:, pixel[0], pixel[1]].softmax(0).max(0)
    return Guess(int(index), class_names(model)[int(index)], float(score))


def predict_masks(
    model: Any, processor: BaseImageProcessor, sources: Sequence[str], folder: Path, *, top_k: int = 5
) -> Iterator[tuple[str, list[Guess] | PictureError]]:
    """Segment what :func:`~swin_hf.predict.find_pictures` found, and write the mask and the overlay of each picture.

    Yields:
        Each source in order, with its ``top_k`` classes or with the reason why it cannot be read.
    """
    names, taken = class_names(model), set()
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        try:
            picture = read_picture(source, model.config.num_channels, processor)
        except PictureError as error:
            yield source, error
            continue
        stem = Path(source).stem if source != "-" else "picture"
        numbered = (stem, *(f"{stem}-{n}" for n in range(2, len(sources) + 2)))  # two pictures may have one name
        name = next(name for name in numbered if name not in taken)
        taken.add(name)
        classes = segment(model, processor, picture)
        drawn = {"mask": draw_mask(classes, len(names)), "overlay": draw_overlay(picture, classes, names)}
        for kind, image in drawn.items():
            with replacing(folder / f"{name}_{kind}.png") as partial:
                image.save(partial, "PNG")
        yield source, class_shares(classes, names, top_k)


def colour(number: int) -> tuple[int, int, int]:
    """A colour for a class: hues at the golden angle, so that neighbours differ; class 0 is dark."""
    if number == 0:
        return 30, 30, 30
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618 % 1, 0.65 + 0.3 * (number % 2), 0.95 - 0.2 * (number % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_mask(classes: Tensor, num_classes: int) -> Image.Image:
    """A picture whose values are the class numbers, with the colours of the overlay as its palette."""
    if num_classes > PALETTE_CLASSES:
        return Image.fromarray(classes.numpy().astype(np.uint16))
    mask = Image.fromarray(classes.numpy().astype(np.uint8))
    mask.putpalette([part for number in range(num_classes) for part in colour(number)])
    return mask


def draw_overlay(picture: Image.Image | Tensor, classes: Tensor, names: Sequence[str]) -> Image.Image:
    """The picture under the colours of its classes, with a legend of those that occur."""
    colours, picture = np.array([colour(number) for number in range(len(names))], dtype=np.uint8), as_rgb(picture)
    blended = Image.blend(picture, Image.fromarray(colours[classes.numpy()]), 0.5)
    shares = class_shares(classes, names, len(names))
    sheet = Image.new("RGB", (picture.width + LEGEND_WIDTH, max(picture.height, LEGEND_ROW * len(shares))), "white")
    sheet.paste(blended)
    draw = ImageDraw.Draw(sheet)
    for row, share in enumerate(shares):
        left, top = picture.width + 6, row * LEGEND_ROW + 3
        draw.rectangle((left, top, left + 10, top + 10), fill=colour(share.index))
        draw.text((left + 16, top - 1), f"{one_line(share.label, 18)} {share.score:.0%}", fill="black")
    return sheet
