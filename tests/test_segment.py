"""``swin-hf predict`` with a segmenter: the mask, the overlay and the shares of the classes."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from swin_hf import SwinHFConfig, SwinHFForSemanticSegmentation
from swin_hf.cli import main
from swin_hf.explain import grad_cam
from swin_hf.predict import load_classifier, read_picture
from swin_hf.processing import Preprocessing
from swin_hf.segment import class_shares, segment

NAMES = {0: "ground", 1: "a_$b$", 2: "树"}


def opened(path):
    with Image.open(path) as picture:
        return picture.copy()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(0)
    config = SwinHFConfig(
        image_size=32, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, encoder_stride=8,
        id2label=NAMES, label2id={name: number for number, name in NAMES.items()},
        upernet={"hidden_size": 8, "auxiliary_channels": 8},
    )  # fmt: skip
    model = SwinHFForSemanticSegmentation(config).eval()
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(100)
    model.save_pretrained(folder)
    Preprocessing((32, 32), 32, crop=False).processor().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for place, shape in (("a", (40, 61)), ("b", (33, 32))):
        (tmp_path / place).mkdir()
        coarse = random.integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape[::-1]).save(tmp_path / place / "one.png")
    return tmp_path


def test_masks_hold_the_class_of_each_pixel(model_folder, pictures, capsys):
    words = ["predict", str(model_folder), str(pictures / "a"), str(pictures / "b"), "--json"]
    assert main([*words, "--output", str(pictures / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    names = ["one_mask.png", "one-2_mask.png", "one_overlay.png", "one-2_overlay.png"]
    assert {path.name for path in (pictures / "out").iterdir()} == set(names)
    model, processor = load_classifier(str(model_folder))
    for place, name, answer in zip("ab", names, said, strict=False):
        picture = opened(pictures / place / "one.png")
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(pixels).logits
        logits = F.interpolate(logits, size=pixels.shape[-2:], mode="bilinear")
        truth = F.interpolate(logits, size=picture.size[::-1], mode="bilinear")[0].argmax(0).numpy()
        mask = opened(pictures / "out" / name)
        assert mask.mode == "P" and np.array_equal(np.array(mask), truth)
        assert sum(guess["score"] for guess in answer["predictions"]) == pytest.approx(1)
        for guess in answer["predictions"]:
            assert guess["score"] == pytest.approx(float((truth == guess["index"]).mean()))
            assert guess["label"] == NAMES[guess["index"]]
        overlay = opened(pictures / "out" / name.replace("mask", "overlay"))
        assert overlay.width > picture.width and overlay.height >= picture.height


def test_a_picture_that_cannot_be_read_is_told_and_the_others_are_segmented(model_folder, pictures, capsys):
    (pictures / "a" / "broken.png").write_bytes(b"no picture")
    assert main(["predict", str(model_folder), str(pictures / "a"), "--output", str(pictures / "out")]) == 1
    told = capsys.readouterr()
    assert "broken.png: cannot be read" in told.err and "one.png" in told.out
    assert {path.name for path in (pictures / "out").iterdir()} == {"one_mask.png", "one_overlay.png"}


def test_a_processor_of_transformers_post_processes_alike(model_folder, pictures):
    model, processor = load_classifier(str(model_folder))
    picture = read_picture(str(pictures / "b" / "one.png"))
    found = segment(model, processor, picture)
    with torch.no_grad():
        outputs = model(**processor(picture, return_tensors="pt"))
    (theirs,) = processor.post_process_semantic_segmentation(outputs, [picture.size[::-1]])
    assert (found == theirs).float().mean() > 0.95  # transformers resizes the logits once, past the size of the input


def test_shares_are_those_of_the_pixels():
    classes = torch.tensor([[0, 0, 2], [0, 1, 2]])
    assert [(guess.label, guess.score) for guess in class_shares(classes, NAMES, 2)] == [("ground", 0.5), ("树", 1 / 3)]


@pytest.mark.parametrize(
    "form", ["torch", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_its_export_is_compared_with_it(model_folder, tmp_path, capsys, form):
    output = tmp_path / f"segmenter.{ {'torch': 'pt2', 'onnx': 'onnx', 'openvino': 'xml'}[form] }"
    words = ["export", str(model_folder), "--to", form, "--output", str(output), "--image-size", "24", "44"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "for 24x44 images" in said and "same class for 100% of the pictures" in said and output.exists()


def test_explain_asks_for_the_class_of_a_pixel(model_folder, pictures, capsys):
    model, processor = load_classifier(str(model_folder))
    pixels = processor(opened(pictures / "a" / "one.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        shares = F.interpolate(model(pixels).logits, size=pixels.shape[-2:], mode="bilinear")[0].softmax(0)
    words = ["explain", str(model_folder), str(pictures / "a" / "one.png"), "--output", str(pictures / "map.png")]
    assert main([*words, "--pixel", "5", "30"]) == 0
    said = capsys.readouterr().out
    score, index = shares[:, 5, 30].max(0)
    assert f"is {NAMES[int(index)]} ({score:.1%})" in said and "attention from pixel 5 30" in said
    assert main([*words, "--overwrite"]) == 0  # the class with the largest share
    assert main([*words, "--overwrite", "--pixel", "5", "300"]) == 2
    assert "pixel (5, 300) is outside the 32x" in capsys.readouterr().err


def test_grad_cam_of_a_pixel_is_that_of_its_logit(model_folder):
    model, _ = load_classifier(str(model_folder))
    images = torch.rand(1, 3, 32, 40)
    layer = model.swin.stages[1].blocks[0].norm1
    kept = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = F.interpolate(model(images.requires_grad_()).logits, size=(32, 40), mode="bilinear")
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 2, 7, 9], kept[0])
    cam = (gradient.mean(dim=(1, 2), keepdim=True) * kept[0]).sum(-1).relu()  # 1, rows, columns
    ours = grad_cam(model, images.detach(), 2, layer=layer, pixel=(7, 9))
    assert ours.shape == (1, 32, 40)
    assert (cam.max() > 0) == (ours.max() > 0)
    if cam.max() > 0:  # the same cell is the brightest
        row, column = divmod(int(cam[0].argmax()), cam.shape[2])
        top, left = divmod(int(ours[0].argmax()), 40)
        assert (top * cam.shape[1] // 32, left * cam.shape[2] // 40) == (row, column)


def test_what_takes_a_classifier_says_so(model_folder, pictures, capsys):
    assert main(["export", str(model_folder), "--to", "torch", "--test", str(pictures)]) == 2
    assert "--test and --calibration take the labelled pictures of a classifier" in capsys.readouterr().err
