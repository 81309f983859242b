"""Swin V2 is compared with its peers, in half precision too: ours is finite, and the table tells who is not."""

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import half, peers, sections
from swin_hf import SwinV2HFForImageClassification


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return half.build_ours()


@pytest.mark.parametrize("way", half.WAYS)
def test_ours_is_finite_and_near_float32(way, ours):
    dtype, autocast = half.WAYS[way]
    found = half.measure(ours, dtype, autocast)
    assert found["bad_outputs"] == found["bad_gradients"] == 0
    assert found["gradients"] == len(list(ours.parameters()))
    rounding = 20 * torch.finfo(dtype).eps  # of a few dozen layers
    assert found["output_difference"] < rounding and found["gradient_difference"] < rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers", "timm", "torchvision"])
def test_the_same_weights_are_not_finite_elsewhere(name, ours):
    theirs = peers.build_peer(name, ours)
    assert half.measure(theirs, torch.float16, False)["bad_outputs"] > 0
    found = half.measure(theirs, torch.bfloat16, False)
    assert found["bad_outputs"] == found["bad_gradients"] == 0


def test_a_library_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(half, "WAYS", {"bf16": (torch.bfloat16, False)})

    def fail(*args):
        raise ImportError("timm is not installed")

    monkeypatch.setattr(half, "build_peer", fail)
    *_, row, other = half.table(peers=("swin_hf", "timm")).splitlines()
    assert row.startswith("| bf16 | swin_hf | 0 of 20 | 0 of 116 |")
    assert other == "| bf16 | timm | ImportError: timm is not installed | | | |"


def test_a_preset_of_v2_builds_v2_with_blocks_that_do_something():
    model = peers.build_ours("swinv2_digits_patch4_window4_32").eval()
    assert type(model) is SwinV2HFForImageClassification and model.config.num_labels == 1000
    x = torch.randn(1, 8, 8, 48)
    assert not torch.allclose(model.swin.stages[0].blocks[0](x)[0], x, atol=0.1)


@pytest.mark.parametrize("mode", [pytest.param("inference", marks=pytest.mark.slow), "training"])
def test_peers_of_v2_are_compared_and_timed(mode, ours, monkeypatch):
    monkeypatch.setattr(sections, "build_ours", lambda _: half.build_ours())
    monkeypatch.setattr(sections, "ceilings", lambda *_: {"matmul_tflops": 0.2, "copy_gbs": 30.0})
    setting = {"device": "cpu", "preset": "", "dtype": "fp32", "mode": mode, "execution": "eager", "batch_size": 1}
    options = command.parse(["--peers", "swin_hf", "transformers", "torchvision", "--seconds", "0"])
    measured = sections.measure_models(setting, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf", "transformers", "torchvision"]
    assert all(row["difference"] < 1e-3 for row in measured["rows"])
