"""Exports are opened in their own engine, here once more and independently of the code that checks them."""

import copy
import json

import numpy as np
import pytest
import torch

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinHFModel, export_onnx, export_openvino, export_torch
from swin_hf.export import compare, load_engine, sample_images

FP32 = 1e-4  # another engine adds in another order


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = SwinHFConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_labels=3
    )
    model = SwinHFForImageClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "bias_table" in name:
            torch.nn.init.normal_(parameter)
    model.config.id2label = {0: "cat", 1: "dog", 2: "日本"}
    return model


@torch.no_grad()
def logits(model, images):
    return model(pixel_values=images).logits


def test_onnx_file_runs_on_its_own_at_any_batch_size(model, tmp_path):
    import onnxruntime

    report = export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32)
        (ours,) = session.run(None, {"pixel_values": images.numpy()})
        np.testing.assert_allclose(ours, logits(model, images), atol=FP32)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["id2label"]) == {"0": "cat", "1": "dog", "2": "日本"}
    assert report.largest_difference < FP32
    assert "opset 20" in report.form
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_openvino_file_runs_on_its_own_at_any_batch_size(model, tmp_path):
    import openvino

    report = export_openvino(model, tmp_path / "model.xml")
    compiled = openvino.compile_model(str(tmp_path / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32)
        ours = compiled({"pixel_values": images.numpy()})["logits"]
        np.testing.assert_allclose(ours, logits(model, images), atol=FP32)
    assert report.largest_difference < FP32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_exported_program_runs_at_any_batch_size(model, tmp_path):
    export_torch(model, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(images), logits(model, images), atol=FP32, rtol=0)


@pytest.mark.slow
def test_another_image_size_can_be_exported(model, tmp_path):
    report = export_torch(model, tmp_path / "model.pt2", image_size=(30, 46))
    images = torch.randn(2, 3, 30, 46)
    torch.testing.assert_close(load_engine(report.path)(images), logits(model, images), atol=FP32, rtol=0)


@pytest.mark.slow
def test_int8_files_are_smaller_and_close(model, tmp_path):
    images = sample_images((32, 32))
    plain = export_onnx(model, tmp_path / "plain.onnx")
    dynamic = export_onnx(model, tmp_path / "int8.onnx", int8=True)
    assert dynamic.path.stat().st_size < plain.path.stat().st_size
    calibrated = export_openvino(model, tmp_path / "int8.xml", calibration=[images[:4], images[4:]])
    expected = logits(model, images)
    for report in (dynamic, calibrated):
        # A few percent of the spread of the logits; exactly equal would mean that nothing was quantised.
        difference = (load_engine(report.path)(images) - expected).abs().max()
        assert 0 < difference < 0.2 * expected.std() + 0.05


def test_the_model_is_left_as_it_is(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    export_torch(model, tmp_path / "model.pt2")
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_a_difference_above_the_tolerance_fails_and_leaves_nothing(model, tmp_path):
    with pytest.raises(RuntimeError, match=r"differs from the model by .* more than the tolerance"):
        export_torch(model, tmp_path / "model.pt2", tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_numbers_are_no_agreement(model, tmp_path):
    written = {"path": tmp_path, "engine": "the engine", "form": "fp32", "tolerance": None}
    with pytest.raises(RuntimeError, match="differs from the model by nan"):
        compare(model, lambda part: part.new_full((len(part), 3), torch.nan), sample_images((32, 32)), **written)


def answers_of(kind, expected):
    """What a broken engine may say, for a model that says ``expected``."""
    return {
        "zeros": torch.zeros_like(expected),
        "the mean": expected.mean(0).expand_as(expected),
        "other pictures": expected.roll(3, 0),
        "reversed": 2 * expected.mean(0) - expected,
    }[kind]


@pytest.mark.parametrize("kind", ["zeros", "the mean", "other pictures", "reversed"])
@pytest.mark.parametrize("classes", [2, 3])
def test_an_engine_that_does_not_look_at_the_pictures_is_refused(model, tmp_path, kind, classes):
    """The tolerance of int8 alone, half the range of the logits, lets most of these pass."""
    pair = copy.deepcopy(model).select_labels(range(classes))
    images = sample_images((32, 32))
    expected = logits(pair, images)
    with pytest.raises(
        RuntimeError, match=r"does not tell 8 pictures apart as the model does: correlation -?[01]\.\d\d,"
    ):
        written = {"path": tmp_path, "engine": "the engine", "form": "int8", "tolerance": 100.0}
        compare(pair, lambda part: answers_of(kind, expected)[: len(part)], images, **written)


def test_an_engine_that_is_a_few_percent_off_is_kept(model, tmp_path):
    images = sample_images((32, 32))
    expected = logits(model, images)
    noise = 0.05 * expected.std() * torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    written = {"path": tmp_path, "engine": "the engine", "form": "int8", "tolerance": None, "int8": True}
    report = compare(model, lambda part: (expected + noise)[: len(part)], images, **written)
    assert 0.95 < report.correlation < 1 and report.agreement >= 0.75
    assert f"same class for {report.agreement:.0%} of the pictures" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_without_finite_answers_is_not_exported(model, tmp_path, value):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.classifier.bias[1] = value
    with pytest.raises(ValueError, match="gives NaN or infinite scores for 8 of 8 pictures"):
        export_torch(broken, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(model, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"model.pt2 exists; .*--overwrite"):
        export_torch(model, path)
    assert path.read_text() == "mine"


def test_another_suffix_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"model.bin: the name must end in .onnx"):
        export_onnx(model, tmp_path / "model.bin")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"must end in .onnx, .xml or .pt2"):
        load_engine(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_engine(tmp_path / "none.onnx")


def test_a_model_without_labels_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="SwinHFModel gives no logits"):
        export_torch(SwinHFModel(model.config), tmp_path / "model.pt2")


def test_images_of_another_size_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"images have shape \(8, 3, 28, 28\); give at least 8"):
        export_torch(model, tmp_path / "model.pt2", images=torch.zeros(8, 3, 28, 28))


@pytest.mark.parametrize(
    ("function", "suffix", "package"), [(export_onnx, "onnx", "onnx"), (export_openvino, "xml", "openvino")]
)
def test_a_missing_engine_names_the_extra(model, tmp_path, monkeypatch, function, suffix, package):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(ImportError, match=rf"{package} is not installed; run: pip install 'swin-hf\[{package}\]'"):
        function(model, tmp_path / f"model.{suffix}")
