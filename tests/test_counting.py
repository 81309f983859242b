"""Sizes of models, against the published ones."""

import pytest

from model_cards.render import PUBLISHED
from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.counting import count_macs, count_parameters


def test_parameters_are_the_published_ones():
    config = SwinHFConfig.from_preset("swin_tiny_patch4_window7_224")
    assert count_parameters(config, SwinHFForImageClassification) == 28_288_354


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384"])
def test_multiply_accumulates_are_the_published_ones(name):
    macs = count_macs(SwinHFConfig.from_preset(name), SwinHFForImageClassification) / 1e9
    assert abs(macs - PUBLISHED[name].gflops) < 0.06 * PUBLISHED[name].gflops / 4.5 + 0.05


def test_the_backend_does_not_change_the_count(tiny_config):
    counts = set()
    for backend in ("eager", "sdpa", "auto"):
        tiny_config._attn_implementation = backend
        counts.add(count_macs(tiny_config, SwinHFForImageClassification))
        assert tiny_config._attn_implementation == backend
    assert len(counts) == 1
