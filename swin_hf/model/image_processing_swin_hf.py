"""The image processor of the family: the same pixels as in training, from the original picture.

The processors of transformers resize, crop and normalise in the same way, but take pictures as Pillow opens them:
16-bit grey saturates, its transparent value is ignored, EXIF orientation is not applied. This one first decodes with
``pixels.py``, in both backends of transformers.
"""

import os
import urllib.request
from typing import Any

from PIL import Image
from transformers import SegformerImageProcessor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .pixels import GREY_MAXIMUM, IMAGENET_MEAN, IMAGENET_STD, WHITE, open_file, to_8_bits, to_channels

_DOWNLOAD_SECONDS = 30


class SwinHFImagesKwargs(ImagesKwargs, total=False):
    """Values of the processor beyond those that transformers knows."""

    background: list[int] | tuple[int, ...]  # red, green and blue (0..255) behind transparent pixels
    grey_maximum: int  # white in grey pictures of 16 bits


class _Decoding:
    """The part that both backends share: decode before anything else is done."""

    valid_kwargs: Any = SwinHFImagesKwargs
    resample = PILImageResampling.BICUBIC
    image_mean, image_std = IMAGENET_MEAN, IMAGENET_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers copies class attributes before it changes them
    default_to_square = False
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    background = WHITE
    grey_maximum = GREY_MAXIMUM

    def fetch_images(self, images: Any) -> Any:
        """Decode pictures as training does; transformers calls this first for all inputs.

        A pipeline of transformers converts a picture to RGB before its processor sees it, which loses transparency and
        saturates 16-bit grey. To avoid that, call ``pipe(pipe.image_processor.fetch_images(path))``.

        A path, an http(s) address or a PIL image becomes an upright 8-bit PIL image or, of other than 1 or 3 channels,
        an array ``(channels, height, width)`` on the scale of 0..255. Arrays and tensors are returned as they are. A
        list is treated one by one.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if not isinstance(images, str):
            return self._decode(images) if isinstance(images, Image.Image) else images
        file: bytes | str = images
        if images.startswith(("http://", "https://")):
            with urllib.request.urlopen(images, timeout=_DOWNLOAD_SECONDS) as answer:
                file = answer.read()
        elif not os.path.isfile(images):
            raise ValueError(f"{images[:200]!r} is not a file; give the path or address of a picture, or its image")
        with open_file(file) as picture:
            return self._decode(picture)

    # Class numbers of each pixel at the size of the pictures, from the logits of a segmentation model.
    post_process_semantic_segmentation = SegformerImageProcessor.post_process_semantic_segmentation

    def _decode(self, picture: Any) -> Any:
        channels = len(self.image_mean)
        if channels not in (1, 3):
            return to_channels(picture, channels, self.grey_maximum)
        return to_8_bits(picture, "L" if channels == 1 else "RGB", self.background, self.grey_maximum)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Channels come first where there are other than 1 or 3: transformers would have to guess."""
        channels = len(self.image_mean)
        if channels not in (1, 3):
            kwargs["input_data_format"] = kwargs.get("input_data_format") or "channels_first"
            if isinstance(self, PilBackend):
                raise ValueError(f"PIL resizes no pictures of {channels} channels; use the torchvision backend")
        return super().process_image(image, *args, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Values to save, without the name of the class: AutoImageProcessor finds it by the configuration."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values.pop("image_processor_type", None)
        return values


class SwinHFImageProcessor(_Decoding, TorchvisionBackend):
    """Decode, resize, crop and normalise with torchvision: bit for bit what evaluation batches are."""


class SwinHFImageProcessorPil(_Decoding, PilBackend):
    """The same with PIL and NumPy; resized values may differ from torchvision's by the rounding of 8 bits."""
