"""The backbone: its maps, its frozen rest, and the heads of transformers that are built on it."""

import pytest
import torch
from conftest import TINY
from torch import nn
from transformers import AutoBackbone
from transformers.backbone_utils import BackboneType

from swin_hf import SwinHFBackbone, SwinHFConfig, SwinHFForImageClassification

FOUR = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def backbone_of(**changes) -> SwinHFBackbone:
    return SwinHFBackbone(SwinHFConfig(**{**TINY, **changes})).eval()


def test_is_what_transformers_expects_of_a_backbone(tiny_config):
    tiny_config.out_features = ["stem", "stage2"]
    model = AutoBackbone.from_config(tiny_config)
    assert isinstance(model, SwinHFBackbone) and model.backbone_type is BackboneType.TRANSFORMERS
    assert model.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert (model.out_features, model.out_indices) == (["stem", "stage2"], [0, 2])
    assert model.num_features == [16, 16, 32, 64]
    assert model.channels == [16, 32]
    assert [model.out_feature_channels[name] for name in model.stage_names] == [16, 16, 32, 64]


@pytest.mark.parametrize("size", [(32, 48), (33, 90), (3, 7)])
def test_maps_have_the_declared_geometry(size):
    model = backbone_of(out_features=["stem", "stage1", "stage2", "stage3"])
    maps = model(torch.randn(2, 3, *size)).feature_maps
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    grids = [(rows, columns), (rows, columns), (-(-rows // 2), -(-columns // 2)), (-(-rows // 4), -(-columns // 4))]
    assert [tuple(x.shape) for x in maps] == [(2, c, *g) for c, g in zip(model.channels, grids, strict=True)]
    assert all(x.is_contiguous() for x in maps)


def test_the_default_is_the_last_stage(tiny_config):
    model = SwinHFBackbone(tiny_config).eval()
    assert model.out_features == ["stage3"]
    assert model(torch.randn(1, 3, 32, 48)).feature_maps[0].shape == (1, 64, 4, 6)


def test_each_map_has_its_own_norm():
    model = backbone_of(out_features=["stage1", "stage2"])
    assert list(model.hidden_states_norms) == ["stage1", "stage2"]
    assert not [name for name in model.state_dict() if name.startswith("swin.norm")]
    maps = model(torch.randn(1, 3, 32, 48)).feature_maps
    for x in maps:
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x.mean(1)), atol=1e-5, rtol=0)
    with torch.no_grad():
        model.hidden_states_norms["stage1"].bias += 1
    again = model(torch.randn(1, 3, 32, 48)).feature_maps
    torch.testing.assert_close(again[0].mean(1), torch.ones_like(again[0].mean(1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("out_features", [["stem"], ["stage1"], ["stage1", "stage2"], ["stage3"]])
def test_what_no_map_needs_is_not_trained_and_not_run(out_features):
    """DDP would wait for the gradients of parameters that never get one."""
    model = backbone_of(out_features=out_features).train()
    ran = []
    for number, stage in enumerate(model.swin.stages, start=1):
        stage.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
    torch.stack([x.square().mean() for x in model(torch.randn(1, 3, 32, 48)).feature_maps]).sum().backward()
    last = max(model.out_indices)
    assert ran == list(range(1, last + 1))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad and "blocks" in name}
    assert frozen == {str(stage) for stage in range(last, 3)}


def test_a_classifier_becomes_a_backbone(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    model = SwinHFBackbone.from_pretrained(tmp_path, out_indices=[1, 3], strict=True)
    assert model.out_features == ["stage1", "stage3"]
    for name, value in model.swin.state_dict().items():
        assert torch.equal(value, tiny_model.swin.state_dict()[name])


def test_windows_are_always_partitioned():
    """A map that one window covers is shifted in a backbone, and not in a classifier."""
    sizes = {"image_size": 8, "depths": [2], "num_heads": [2], "window_size": 4}
    backbone = backbone_of(**sizes)
    x = torch.randn(1, 4, 4, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(backbone.swin.stages[0].blocks[1](x)[0][0, 0, 0].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    classifier = SwinHFForImageClassification(SwinHFConfig(**{**TINY, **sizes})).eval()
    (gradient,) = torch.autograd.grad(classifier.swin.stages[0].blocks[1](x)[0][0, 0, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()


def upernet(config: SwinHFConfig) -> tuple[nn.Module, dict]:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    head = UperNetConfig(
        backbone_config=config, hidden_size=16, num_labels=3, use_auxiliary_head=True, auxiliary_in_channels=64,
        auxiliary_channels=8,
    )  # fmt: skip
    return UperNetForSemanticSegmentation(head), {"labels": torch.randint(0, 3, (2, 64, 64))}


def maskformer(config: SwinHFConfig) -> tuple[nn.Module, dict]:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation

    decoder = DetrConfig(
        d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2,
        decoder_ffn_dim=16, encoder_ffn_dim=16, num_queries=4,
    )  # fmt: skip
    head = MaskFormerConfig(
        backbone_config=config, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )
    return MaskFormerForInstanceSegmentation(head), masks()


def mask2former(config: SwinHFConfig) -> tuple[nn.Module, dict]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    head = Mask2FormerConfig(
        backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4, num_labels=3,
        train_num_points=64,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(head), masks()


def detr(config: SwinHFConfig) -> tuple[nn.Module, dict]:
    from transformers import DetrConfig, DetrForObjectDetection

    config.out_features = ["stage4"]
    head = DetrConfig(
        backbone_config=config, use_timm_backbone=False, d_model=16, decoder_layers=1, encoder_layers=1,
        decoder_attention_heads=2, encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16, num_queries=4,
        num_labels=3,
    )  # fmt: skip
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
    return DetrForObjectDetection(head), {"labels": [box, box]}


def masks() -> dict:
    return {
        "mask_labels": [(torch.rand(2, 64, 64) > 0.5).float() for _ in range(2)],
        "class_labels": [torch.tensor([0, 2]), torch.tensor([1, 0])],
    }


@pytest.mark.slow
@pytest.mark.parametrize("build", [upernet, maskformer, mask2former, detr], ids=lambda build: build.__name__)
def test_heads_of_transformers_train_save_and_load(build, tmp_path):
    torch.manual_seed(0)
    model, targets = build(SwinHFConfig(**FOUR))
    backbone = [module for module in model.modules() if isinstance(module, SwinHFBackbone)]
    assert len(backbone) == 1
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = backbone[0].swin.stages[0].blocks[0].attention.qkv.weight.detach().clone()
    loss = model.train()(pixel_values=x, **targets).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in backbone[0].parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(before, backbone[0].swin.stages[0].blocks[0].attention.qkv.weight)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert isinstance(again.config.backbone_config, SwinHFConfig)
    with torch.no_grad():
        ours, theirs = model.eval()(pixel_values=x).to_tuple(), again(pixel_values=x).to_tuple()
    compared = [pair for pair in zip(ours, theirs, strict=True) if isinstance(pair[0], torch.Tensor)]
    assert compared
    for first, second in compared:
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
