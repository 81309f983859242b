"""One picture has one tensor, whichever way it takes into the model."""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Image, Value
from PIL import Image as PILImage
from short import short
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import swin_hf
from swin_hf import SwinHFConfig, SwinHFForImageClassification, convert_checkpoint
from swin_hf.hub.staging import Card, stage
from swin_hf.model.modeling_swin_hf import SwinHFEmbeddings
from swin_hf.predict import load_classifier, prepare, read_picture
from swin_hf.processing import Preprocessing
from swin_hf.training import ImageDataModule

ROOT = Path(__file__).parents[1]
SIZE = (32, 48)  # height and width
ROUNDING = 1.01 / 255 / min(0.229, 0.224, 0.225)  # one step of 8 bits, after the normalisation
SMALL = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


def smooth(*shape, top=256, dtype=np.uint8):
    """A gradient: PIL and torchvision resize noise with differences of more than a rounding."""
    rows, columns = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    waves = [rows, columns, 1 - rows * columns, (rows + columns) / 2]
    values = np.stack(waves[: shape[2]], -1) if len(shape) > 2 else (rows + columns) / 2
    return np.rint(values * (top - 1)).astype(dtype)


def png16(values, transparent):
    """A 16-bit grey PNG with a transparent value, which Pillow reads but does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    chunks = [
        chunk(b"IHDR", header),
        chunk(b"tRNS", struct.pack(">H", transparent)),
        chunk(b"IDAT", zlib.compress(rows)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def stored(picture, suffix="png", **options):
    stream = io.BytesIO()
    picture.save(stream, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "gif": "GIF", "webp": "WEBP"}[suffix], **options)
    return stream.getvalue()


def turned(picture, suffix, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    return stored(picture, suffix, exif=exif)


def files() -> dict[str, bytes]:
    """Pictures of every kind that decoders treat apart; two and more of each kind."""
    rgb, rgba = PILImage.fromarray(smooth(60, 90, 3)), PILImage.fromarray(smooth(70, 50, 4))
    holes = smooth(40, 40, 4)
    holes[..., 3] = np.where(holes[..., 0] > 128, 255, 0)
    deep, few = smooth(50, 70, top=65536, dtype=np.uint16), smooth(64, 40) // 40 * 40
    palette = PILImage.fromarray(few).convert("P")
    return {
        "opaque.png": stored(rgb),
        "wide.png": stored(PILImage.fromarray(smooth(33, 300, 3))),
        "tall.jpg": stored(PILImage.fromarray(smooth(300, 35, 3)), "jpg"),
        "transparent.png": stored(rgba),
        "holes.webp": stored(PILImage.fromarray(holes), "webp", lossless=True),
        "grey_alpha.png": stored(rgba.convert("LA")),
        "colour_key.png": stored(PILImage.fromarray(few).convert("RGB"), transparency=(40, 40, 40)),
        "palette.png": stored(palette, transparency=0),
        "palette.gif": stored(palette, "gif", transparency=palette.getpixel((0, 0))),
        "rotated.jpg": turned(rgb, "jpg", 6),
        "mirrored.png": turned(rgb, "png", 5),
        "upside_down_16.tif": turned(PILImage.fromarray(deep), "tif", 3),
        "deep.png": stored(PILImage.fromarray(deep)),
        "deep.tif": stored(PILImage.fromarray(deep[::-1].copy()), "tif"),
        "deep_transparent.png": png16(deep // 4096 * 4096, 0),
        "deep_white_transparent.png": png16(deep // 4096 * 4096, 61440),
        "cmyk.jpg": stored(rgb.convert("CMYK"), "jpg"),
        "cmyk.tif": stored(rgb.convert("CMYK"), "tif"),
        "bilevel.png": stored(rgb.convert("1")),
    }


def dark_files(top: int) -> dict[str, bytes]:
    """Grey pictures of 16 bits that use fewer: the values of a camera of 12 bits, or of 8."""
    values = smooth(40, 60, top=top, dtype=np.uint16)
    return {
        "camera.png": stored(PILImage.fromarray(values)),
        "scanner.tif": stored(PILImage.fromarray(values[::-1].copy()), "tif"),
        "dim.png": stored(PILImage.fromarray(values // 5)),
        "transparent.png": png16(values // (top // 16) * (top // 16), 0),
    }


@pytest.fixture(params=["crop", "squash"])
def run(request, tmp_path, monkeypatch):
    """A function: pictures -> the saved model folder, the training's evaluation pixels and the data module."""
    monkeypatch.chdir(tmp_path)

    def make(pictures: dict[str, bytes], channels: int = 3, **options):
        for name, content in pictures.items():
            Path(name).write_bytes(content)
        cells = [{"bytes": content, "path": name} for name, content in pictures.items()]
        data = Dataset.from_dict({"image": cells, "label": ["a", "b"] * (len(cells) // 2) + ["a"] * (len(cells) % 2)})
        data = data.cast_column("image", Image()).cast_column("label", Value("string")).class_encode_column("label")
        data.save_to_disk("data")
        module = short(ImageDataModule, 
            "data", image_size=SIZE, num_channels=channels, validation_fraction=0, num_workers=0, batch_size=64,
            resize_mode=request.param, **options,
        )  # fmt: skip
        module.load()
        dataset = module._samples("train", module.preprocessing.pixels)
        pixels = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
        expected = module.on_after_batch_transfer({"pixel_values": pixels}, 0)["pixel_values"]
        torch.manual_seed(0)
        config = SwinHFConfig(image_size=SIZE, num_channels=channels, num_labels=2, **SMALL)
        SwinHFForImageClassification(config).save_pretrained("user/model")
        module.image_processor().save_pretrained("user/model")
        return dict(zip(pictures, expected, strict=True)), module

    return make


def agree(ours, expected):
    """Where the same code runs, bits agree."""
    assert ours.keys() == expected.keys()
    different = [name for name, pixels in expected.items() if not torch.equal(ours[name].reshape(pixels.shape), pixels)]
    assert not different


def tensors(processor, pictures):
    tensors = {}
    for name in pictures:
        with PILImage.open(name) as picture:
            tensors[name] = processor(picture, return_tensors="pt")["pixel_values"]
    return tensors


@pytest.mark.parametrize("channels", [3, 1])
def test_every_way_gives_the_pixels_of_the_evaluation(run, channels):
    pictures = files()
    expected, module = run(pictures, channels)
    model, processor = load_classifier("user/model", device="cpu")
    agree(
        {name: prepare(model, processor, [read_picture(name, channels, processor)])[0] for name in pictures}, expected
    )
    torchvision = AutoImageProcessor.from_pretrained("user/model")
    assert type(torchvision).__name__ == "SwinHFImageProcessor"
    agree(tensors(torchvision, pictures), expected)
    agree({name: torchvision(name, return_tensors="pt")["pixel_values"] for name in pictures}, expected)  # from paths
    pil = AutoImageProcessor.from_pretrained("user/model", backend="pil")
    assert type(pil).__name__ == "SwinHFImageProcessorPil"
    values = module.preprocessing.stock_values()
    stock = getattr(transformers, f"{values.pop('image_processor_type')}Pil")(**values)
    for name, pixels in tensors(pil, pictures).items():
        decoded = stock(read_picture(name, channels), return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, decoded), name
        assert (pixels[0] - expected[name]).abs().mean() < ROUNDING, name  # PIL resizes with roundings of its own


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves GIF files open
def test_a_pipeline_gives_the_answers_of_the_evaluation(run):
    pictures = files()
    expected, _ = run(pictures)
    pipe = pipeline("image-classification", model="user/model")
    seen = {}
    pipe.model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.update(pixels=keywords["pixel_values"]), with_kwargs=True
    )
    decoded, bare = {}, {}
    for name in pictures:
        pipe(pipe.image_processor.fetch_images(name))
        decoded[name] = seen["pixels"]
        pipe(name)
        bare[name] = seen["pixels"]
    agree(decoded, expected)
    # transformers makes RGB of a picture before a processor sees it: transparency and 16 bits are lost on that way.
    lost = {name for name, pixels in expected.items() if not torch.equal(bare[name][0], pixels)}
    assert lost <= {name for name in pictures if re.search("transparent|holes|alpha|key|palette|deep|16", name)}
    assert {"opaque.png", "rotated.jpg", "mirrored.png", "cmyk.jpg"}.isdisjoint(lost)


@pytest.mark.parametrize("top", [4096, 256, 1024])
def test_few_bits_in_sixteen_are_not_dark(run, top):
    pictures = dark_files(top)
    with pytest.warns(UserWarning, match=f"so {top - 1} is taken as white in all"):
        expected, module = run(pictures, 1, mean=[0.0], std=[1.0])
    assert module.grey_maximum == top - 1
    brightest = expected["camera.png"].max().item()
    assert brightest > 0.75  # 1 in the corner, which the crop cuts off
    assert expected["dim.png"].max().item() == pytest.approx(brightest / 5, abs=0.02)  # scaled alike
    processor = AutoImageProcessor.from_pretrained("user/model")
    agree(tensors(processor, pictures), expected)
    model, loaded = load_classifier("user/model", device="cpu")
    agree({name: prepare(model, loaded, [read_picture(name, 1, loaded)])[0] for name in pictures}, expected)
    deep = PILImage.fromarray(smooth(40, 60, top=65536, dtype=np.uint16))
    with pytest.raises(
        ValueError, match=f"grey values reach 65535, but white is {top - 1} .*that the model was trained on"
    ):
        processor(deep)


def test_dark_pictures_of_sixteen_bits_stay_as_dark_as_they_are(run):
    expected, module = run(
        {"a.png": files()["deep.png"], "b.png": dark_files(256)["camera.png"]}, 1, mean=[0.0], std=[1.0]
    )
    assert module.grey_maximum == 65535 and expected["b.png"].max() < 0.01
    _, module = run(dark_files(4096), 1, grey_maximum=65535)
    assert module.grey_maximum == module.preprocessing.grey_maximum == 65535


def test_a_tiff_says_how_many_bits_it_has():
    """Packed samples of 12 bits, as cameras write them: 4095 is white, whatever the other pictures hold."""
    values = smooth(8, 8, top=4096, dtype=np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    content = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory
    pixels = np.asarray(swin_hf.processing.decode_picture(content, 1))
    np.testing.assert_array_equal(pixels, np.rint(values * np.float32(255 / 4095)).astype(np.uint8))


def test_a_background_of_another_colour_travels(run):
    pictures = {name: content for name, content in files().items() if "transparent" in name or "palette" in name}
    expected, _ = run(pictures, background=(10, 200, 30))
    agree(tensors(AutoImageProcessor.from_pretrained("user/model"), pictures), expected)


def snippet(text: str, heading: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text[text.index(heading) :], re.DOTALL)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a snippet is short: it closes no file
def test_the_snippets_of_the_card_and_the_readme_give_the_pixels_of_the_evaluation(run, tmp_path):
    """As they are printed, but for the name of the picture and of the folder."""
    pictures = files()
    expected, _ = run(pictures)
    (tmp_path / "staged").mkdir()
    card = stage(Path("user/model"), tmp_path / "staged", repo_id="user/model", card=Card()).card
    piped, plain = [code for code in snippet(card, "## Use it") if "import swin_hf" not in code]
    readme = snippet((ROOT / "README.md").read_text(), "# swin_hf")[0].replace("runs/digits/model", "user/model")
    seen = {}

    def watch(module, arguments):
        if isinstance(module, SwinHFEmbeddings):
            seen["pixels"] = arguments[0].detach()

    with torch.nn.modules.module.register_module_forward_pre_hook(watch):
        for code, picture in ((piped, "image.png"), (plain, "image.png"), (readme, "docs/figures/three.png")):
            ours = {}
            for name in pictures:
                assert f'"{picture}"' in code
                exec(code.replace(picture, name), {})
                ours[name] = seen["pixels"]
            agree(ours, expected)


def test_conversion_and_push_describe_the_same_preprocessing(tmp_path):
    """Of a model that comes without a processor: the one of the released models, with every side covered."""
    for size, side in (((64, 64), 73), ((64, 128), 146), ((384, 384), None)):
        config = SwinHFConfig(
            image_size=size, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, num_labels=2
        )
        model, place = SwinHFForImageClassification(config), tmp_path / f"{size}"
        described = Preprocessing.of_release(size)
        assert described.short_side == side
        (place / "staged").mkdir(parents=True)
        stage(model, place / "staged", repo_id="user/x", card=Card())
        convert_checkpoint(model.state_dict(), place / "ours", to="swin_hf", config=config)
        convert_checkpoint(model.state_dict(), place / "theirs", to="transformers", config=config)
        for folder in ("staged", "ours", "theirs"):
            values = json.loads((place / folder / "preprocessor_config.json").read_text())
            assert Preprocessing.from_values(values) == described, folder
        # Even the longer side is covered: nothing is padded with black.
        white = PILImage.new("RGB", (300, 200), "white")
        processor = AutoImageProcessor.from_pretrained(place / "ours")
        assert processor(white, return_tensors="pt")["pixel_values"].min() > 2


def test_other_models_keep_their_processors(tmp_path):
    from transformers import SwinConfig, ViTConfig, ViTImageProcessor

    SwinHFConfig()  # registers
    for config in (ViTConfig(), SwinConfig()):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
        assert type(AutoImageProcessor.from_pretrained(folder)).__name__ == "ViTImageProcessor"
        assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")).__name__ == "ViTImageProcessorPil"


def test_a_folder_with_a_stock_processor_loads_as_before(tmp_path):
    from transformers import BitImageProcessor, ViTImageProcessor

    SwinHFConfig().save_pretrained(tmp_path)
    for processor in (ViTImageProcessor(), BitImageProcessor()):
        processor.save_pretrained(tmp_path)
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(processor)
        assert (
            type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")).__name__
            == f"{type(processor).__name__}Pil"
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_raw_pixels_are_refused(dtype):
    config = SwinHFConfig(image_size=32, num_labels=2, **SMALL)
    model = SwinHFForImageClassification(config).eval()
    with pytest.raises(ValueError, match=rf"pixel_values are {dtype}.*; normalise them with the image processor"):
        model(torch.zeros(1, 3, 32, 32, dtype=dtype))
    AutoModelForImageClassification.from_config(config)(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
