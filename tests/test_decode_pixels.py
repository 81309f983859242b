"""torchcodec decodes to the pixels of Pillow, which stays the definition and decodes what torchcodec does not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from swin_hf import processing
from swin_hf.processing import UnreadablePictureError, decode_picture, decode_pixels


def encoded(size=(61, 43), mode="RGB", form="JPEG", orientation=None, **options):
    """A picture with flat parts, edges and noise, as a file."""
    random, (width, height) = np.random.default_rng(0), size
    pixels = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    pixels = np.clip(pixels + random.normal(0, 20, pixels.shape) * (np.arange(width)[:, None] % 16 < 8), 0, 255)
    stream = io.BytesIO()
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    Image.fromarray(pixels.astype("uint8")).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def xmp(orientation):
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


@pytest.mark.parametrize(
    "options",
    [
        *({"size": size} for size in ((500, 375), (1, 1), (17, 8), (8, 300))),
        *({"quality": quality} for quality in (5, 75, 100)),
        *({"subsampling": subsampling, "size": (51, 33)} for subsampling in (0, 1, 2)),
        *({"orientation": orientation} for orientation in range(1, 9)),
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"mode": "L"},
        {"mode": "L", "orientation": 6},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_torchcodec_decodes_jpeg_to_the_pixels_of_pillow(options, tmp_path):
    file = encoded(**options)
    (tmp_path / "a.jpg").write_bytes(file)
    for channels in (1, 3) if options.get("mode") == "L" else (3,):
        wanted = tvf.pil_to_tensor(decode_picture(file, channels))
        for cell, root in ((file, None), ({"bytes": file, "path": "a.jpg"}, None), ("a.jpg", str(tmp_path))):
            pixels = decode_pixels(cell, channels, root=root)
            assert isinstance(pixels, torch.Tensor), "Pillow decoded it"
            assert pixels.dtype == torch.uint8 and pixels.shape == wanted.shape
            difference = (pixels.int() - wanted.int()).abs()  # 0 was seen; other builds of libjpeg may round otherwise
            assert difference.max() <= 2 and difference.float().mean() <= 0.1


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({"form": "PNG"}, 3),
        ({"form": "WEBP", "lossless": True}, 3),
        ({"mode": "CMYK"}, 3),
        ({}, 1),
        ({"xmp": xmp(6)}, 3),
        ({"form": "MPO", "save_all": True, "append_images": [Image.new("RGB", (9, 9))]}, 3),
    ],
    ids=["png", "webp", "cmyk", "colour as grey", "xmp", "mpo"],
)
def test_pillow_decodes_what_torchcodec_would_not_or_otherwise(options, channels):
    file = encoded(**options)
    picture = decode_pixels({"bytes": file, "path": "a"}, channels)
    assert isinstance(picture, Image.Image)
    assert picture.mode == {1: "L", 3: "RGB"}[channels]
    assert picture.tobytes() == decode_picture(file, channels).tobytes()
    if "xmp" in options:
        assert picture.size == (43, 61)
    assert decode_pixels(picture, channels).tobytes() == picture.tobytes()


@pytest.mark.parametrize("length", [0, 1, 100, 700, -2, -1])
def test_a_file_that_was_cut_off_is_as_unreadable_as_before(length, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded()[:length])
    said = []
    for decode in (decode_picture, decode_pixels):
        try:
            said.append(np.asarray(decode(str(path))).shape)
        except UnreadablePictureError as error:
            said.append(str(error))
    assert said[0] == said[1] and (length in (-1, -2) or "a.jpg" in said[1])


def test_too_many_pixels_are_refused_with_either(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadablePictureError, match="it has 2623 pixels and Pillow reads at most 2000"):
        decode_pixels(encoded())


def test_without_torchcodec_pillow_decodes_everything(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)  # importing it raises ImportError
    processing.jpeg_decoder.cache_clear()
    try:
        assert processing.jpeg_decoder() is None
        assert isinstance(decode_pixels(encoded()), Image.Image)
    finally:
        processing.jpeg_decoder.cache_clear()
