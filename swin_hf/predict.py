"""Find pictures, read them and classify them.

Example::

    model, processor = load_classifier("runs/digits/model")
    guesses = classify(model, processor, [read_picture("three.png")], top_k=3)
"""

import glob
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BaseImageProcessor

from swin_hf.checkpoints.load import quiet
from swin_hf.classes import class_table, require_finite
from swin_hf.families import architectures
from swin_hf.hub.weights import CONFIG, read_config
from swin_hf.loading import find_model, is_ours, load_model, processor_of
from swin_hf.model.modeling_swin_hf import SwinHFForImageClassification
from swin_hf.model.pixels import PixelsError
from swin_hf.processing import PICTURE_SUFFIXES, TooManyPixelsError, UnreadablePictureError, decode_picture, decoding
from swin_hf.text import shorten

STANDARD_INPUT = "-"
DOWNLOAD_SECONDS = 30  # to wait for an answer
DOWNLOAD_BYTES = 256 * 2**20  # larger than any picture that PIL agrees to decode

FOUND = 0.5  # a model of several labels an image gives those that are more probable
READERS = 4  # threads that read pictures
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class PictureError(OSError):
    """A picture that cannot be fetched or read; the message names it and says what to do."""


@dataclass(frozen=True)
class Guess:
    """One class for one picture."""

    index: int  # position in the classifier
    label: str
    score: float  # probability; of a regression the bare output, of a segmenter the share of the pixels


def find_pictures(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """List the pictures of files, folders (with their sub-folders), glob patterns, http(s) addresses and ``-``.

    ``-`` is one picture on standard input. No picture is opened, and none is listed twice. The second list has a
    sentence for each argument without a picture.
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
        if found := sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES):
            return found
        known = " ".join(PICTURE_SUFFIXES)
        raise PictureError(f"{argument}: the folder holds no picture; name files, or a folder with some of {known}")
    if path.exists():
        return [argument]
    if not glob.has_magic(argument):
        raise PictureError(f"{argument}: no such file or folder; check the spelling, or give the full path")
    if matches := sorted(glob.glob(argument, recursive=True)):
        return [picture for match in matches for picture in _pictures_of(match)]
    raise PictureError(f"{argument}: nothing matches the pattern; check it with `ls`")


def _is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def read_picture(source: str, num_channels: int = 3, processor: BaseImageProcessor | None = None) -> Any:
    """Read one picture of a path, an http(s) address or standard input (``-``) as training does, else PictureError.

    The image processor of a model knows the colour behind transparent pixels and the white of 16-bit grey; without it,
    they are white and 65535.
    """
    cell = sys.stdin.buffer.read() if source == STANDARD_INPUT else _fetch(source) if _is_address(source) else source
    try:
        return decode_picture(cell, num_channels, **decoding(processor))
    except UnreadablePictureError as error:
        cause, reason = error.__cause__, "it is not a picture, or a damaged one"  # a decoder's own errors say no more
        is_of_system = isinstance(cause, OSError) and cause.errno is not None
        if is_of_system or isinstance(cause, TooManyPixelsError | PixelsError):
            reason = str(cause)
        raise PictureError(f"{source}: cannot be read: {reason}; open it in a viewer, or leave it out") from error


def _fetch(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "swin-hf"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            content = answer.read(DOWNLOAD_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # which closes the connection
        raise PictureError(f"{address}: cannot be fetched: {error}; check the address and the network") from error
    if len(content) > DOWNLOAD_BYTES:
        raise PictureError(f"{address}: more than {DOWNLOAD_BYTES // 2**20} MiB; download it and make it smaller")
    return bytes(content)


def load_classifier(source: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, BaseImageProcessor]:
    """Load a classifier or a segmenter in evaluation mode, and its image processor; no layer has random values.

    Args:
        source: Any model, see :mod:`swin_hf.loading`.
        device: One of :data:`DEVICES`; ``auto`` takes a GPU if there is one.
        dtype: One of :data:`DTYPES`; ``auto`` keeps that of the weights.

    Raises:
        ValueError: If there is no such model, or it has no classes, or the device or dtype does not exist.
        OSError: If files of it are missing or damaged.
    """
    others = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = ["cpu", *(kind for kind, is_there in others.items() if is_there)]
    if device.partition(":")[0] not in ("auto", *available):
        raise ValueError(f"device {device!r} is not available here; choose one of {', '.join(['auto', *available])}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    path = find_model(source).path
    name = next(iter(read_config(path / CONFIG).architectures or ()), "") if is_ours(path) else ""
    built = architectures().get(name)
    task = "image-classification" if built is None else built.task
    if task not in ("image-classification", "semantic-segmentation"):
        raise ValueError(f"{source} is a {name}, which has no classes; fine-tune it first: swin-hf train")
    with quiet():
        (model, info), _ = load_model(path, task, strict=True, output_loading_info=True)
    if info["missing_keys"] or not model.config.num_labels:
        raise ValueError(f"{source} has no classifier; fine-tune it first: swin-hf train")
    wanted = model.dtype if dtype == "auto" else getattr(torch, dtype)
    torch.nn.Module.to(model, torch.device(available[-1] if device == "auto" else device), wanted)
    return model.eval(), processor_of(model, path)


def has_names(model: SwinHFForImageClassification) -> bool:
    """Whether the classes of a model have other names than transformers' placeholders ``LABEL_0, LABEL_1, ...``."""
    return any(name != f"LABEL_{index}" for index, name in enumerate(class_names(model)))


def class_names(model: SwinHFForImageClassification) -> list[str]:
    """Names of the classes, in the order of their numbers."""
    return class_table(model.config.id2label)


def class_number(text: str, names: Sequence[str]) -> int:
    """The class that a user means: its name, else its number; ValueError if there is none."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    known = f"a number below {len(names)}: {shorten(names, 10)}"
    raise ValueError(f"{text!r} is not a class of the model; choose a name, or {known}")


def prepare(
    model: SwinHFForImageClassification, processor: BaseImageProcessor, pictures: Sequence[Image | Tensor]
) -> list[Tensor]:
    """Turn pictures into what the model takes, ``(channels, height, width)`` each, on its device and in its dtype."""
    prepared = [processor(images=picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]
    return [pixels.to(model.device, model.dtype) for pixels in prepared]


def classify(
    model: SwinHFForImageClassification,
    processor: BaseImageProcessor,
    pictures: Sequence[Image | Tensor],
    *,
    top_k: int = 5,
) -> list[list[Guess]]:
    """The ``top_k`` classes of each picture, the most probable first; ValueError if a score is NaN or infinite.

    Pictures are what :func:`read_picture` returns. Scores are probabilities: a softmax over the classes, or a sigmoid
    each for a model of several labels an image; for a regression they are the outputs.
    """
    return classify_pixels(model, prepare(model, processor, pictures), top_k)


def classify_pixels(model: SwinHFForImageClassification, pixels: Sequence[Tensor], top_k: int) -> list[list[Guess]]:
    """As :func:`classify`, of what :func:`prepare` returned."""
    alike = len({tensor.shape for tensor in pixels}) == 1  # a processor that does not resize keeps sizes apart
    with torch.inference_mode():
        batches = [torch.stack(tuple(pixels))] if alike else [tensor[None] for tensor in pixels]
        logits = require_finite(torch.cat([model(batch).logits.float() for batch in batches]))  # B, num_labels
    problem = model.config.problem_type
    if problem == "regression":
        scores = logits
    elif problem == "multi_label_classification" or logits.shape[1] == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(dim=1)
    best = scores.topk(min(top_k, scores.shape[1]), dim=1)
    names = class_names(model)
    return [
        [Guess(index, names[index], score) for index, score in zip(indices, row, strict=True)]
        for indices, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def check_drawable(model: SwinHFForImageClassification) -> None:
    """Raise ValueError for a model of pictures of other than 1 or 3 channels, on which no maps can be drawn."""
    channels = model.config.num_channels
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes {channels} channels, and maps are drawn on pictures of 1 or 3; compute them in Python "
            "with swin_hf.attention_maps and swin_hf.grad_cam"
        )


def predict(
    model: SwinHFForImageClassification,
    processor: BaseImageProcessor,
    sources: Sequence[str],
    *,
    top_k: int = 5,
    batch_size: int = 16,
) -> Iterator[tuple[str, list[Guess] | PictureError]]:
    """Classify what :func:`find_pictures` found in batches, reading the next one while the model computes.

    The thread that reads a picture resizes it too, so that memory holds no more full pictures than there are threads.

    Yields:
        Each source in order, with its ``top_k`` classes or with the reason why it cannot be read. Of a model of several
        labels an image, the classes that are more probable than not, which may be none; of a regression, all numbers.
    """
    problem = model.config.problem_type
    if problem in ("multi_label_classification", "regression"):
        top_k = len(class_names(model))

    def shown(guesses: list[Guess]) -> list[Guess]:
        if problem == "regression":
            return sorted(guesses, key=lambda guess: guess.index)
        return [guess for guess in guesses if problem != "multi_label_classification" or guess.score > FOUND]

    def read(source: str) -> Tensor | PictureError:
        try:
            return prepare(model, processor, [read_picture(source, model.config.num_channels, processor)])[0]
        except PictureError as error:
            return error

    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="read") as pool:
        ahead = [pool.submit(read, source) for source in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            results = [future.result() for future in ahead]
            following = batches[number + 1] if number + 1 < len(batches) else []
            ahead = [pool.submit(read, source) for source in following]
            readable = [pixels for pixels in results if not isinstance(pixels, PictureError)]
            guesses = iter(classify_pixels(model, readable, top_k) if readable else [])
            for source, result in zip(batch, results, strict=True):
                yield source, result if isinstance(result, PictureError) else shown(next(guesses))
