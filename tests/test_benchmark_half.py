"""Half precision where every map is padded: ours is finite and near float32, and the table tells who is not."""

import pytest
import torch

from benchmarks import half, peers


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
