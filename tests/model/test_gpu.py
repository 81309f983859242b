"""Whole models on a CUDA device: ``pytest -m gpu tests/model`` runs these and the tests of the kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F

from swin_hf import (
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
)
from swin_hf.model.attention import backend_report

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SIZES = {"embed_dim": 96, "depths": (2, 2, 2), "num_heads": (3, 6, 12), "drop_path_rate": 0.0, "num_labels": 10}
FAMILIES = {
    "v1": (SwinHFConfig, SwinHFForImageClassification, 7),
    "v2": (SwinV2HFConfig, SwinV2HFForImageClassification, 8),
}


def build(family: str, backend: str, **changes):
    torch.manual_seed(0)
    config_class, model_class, window = FAMILIES[family]
    config = config_class(image_size=window * 16, window_size=window, encoder_stride=16, **{**SIZES, **changes})
    config._attn_implementation = backend
    model = model_class(config)
    with torch.no_grad():  # at its start a model attends nearly equally everywhere, and blocks of V2 are the identity
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if "bias_table" in name else 0.05)
    return model.to(DEVICE)


def step(model, images, labels, dtype):
    """Loss and gradients of a step under autocast, by name."""
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(images).logits.float(), labels)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def batch(size: int | tuple[int, int], count: int = 4):
    torch.manual_seed(1)
    shape = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, *shape, device=DEVICE), torch.randint(10, (count,), device=DEVICE)


def distance(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", [112, (90, 137)], ids=["whole", "padded"])
def test_a_step_with_the_kernels_is_as_exact_as_the_definition_and_repeats_itself(size, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images, labels = batch(size)
    fused, plain = build("v1", "triton"), build("v1", "eager")
    assert backend_report(fused).backend == "triton"
    truth = step(copy.deepcopy(plain), images, labels, torch.float32)
    theirs, ours, again = (step(model, images, labels, dtype) for model in (plain, fused, fused))
    for name, exact in truth.items():
        assert torch.equal(ours[name], again[name]), f"two runs differ in {name}"
        allowed = distance(theirs[name], exact)
        assert distance(ours[name], exact) <= 1.5 * allowed + (1e-4 if dtype == torch.float32 else 2e-3), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_compiles_to_one_graph(family, mode):
    model = build(family, "auto").eval().bfloat16()
    images, _ = batch(model.config.image_hw)
    with torch.inference_mode():
        plain = model(images).logits
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):  # CUDA graphs are recorded in the second call
            found = compiled(images).logits.clone()
            assert distance(found, plain) < 2e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_under_autocast_compiles_to_one_graph(family):
    model = build(family, "auto")
    images, labels = batch(model.config.image_hw)
    plain = step(model, images, labels, torch.bfloat16)
    model.compile(fullgraph=True)
    for name, found in step(model, images, labels, torch.bfloat16).items():
        assert distance(found, plain[name]) < 0.1, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, dtype):
    model = build(family, "auto").train()
    images, labels = batch((72, 90))
    plain = step(model, images, labels, dtype)
    model.gradient_checkpointing_enable()
    for name, found in step(model, images, labels, dtype).items():
        assert found.isfinite().all(), name
        assert distance(found, plain[name]) < 1e-2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_weights_give_the_logits_of_float32_on_padded_maps(family, dtype):
    model = build(family, "auto").eval()
    images, _ = batch((72, 90))
    with torch.inference_mode():
        exact = model(images).logits
        found = model.to(dtype)(images).logits
    assert found.isfinite().all()
    assert distance(found, exact) < 5e-2


def test_sdpa_takes_more_windows_than_one_launch_can():
    model = build("v1", "sdpa", depths=(2,), num_heads=(3,)).eval().half()
    images, _ = batch(model.config.image_hw, 4100)  # of 4x4 windows each
    with torch.inference_mode():
        found = model(images).logits
        model.set_attn_implementation("triton")
        assert distance(found, model(images).logits) < 1e-2
