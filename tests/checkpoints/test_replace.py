"""Our backbone under models of transformers: the same outputs and files, and the way back."""

import copy

import pytest
import torch
import transformers
from checkpoint_peers import randomise
from safetensors.torch import load_file

from swin_hf import SwinHFBackbone, SwinHFModel, replace_backbone

# 70x90 pixels: the maps are padded in every stage, and windows are shifted.
SIZES = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
SWIN = {**SIZES, "window_size": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def backbone_config(**changes):
    return transformers.SwinConfig(**(SWIN | {"out_features": STAGES} | changes))


def upernet():
    config = transformers.UperNetConfig(
        backbone_config=backbone_config(), hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=32, num_labels=3
    )
    return transformers.UperNetForSemanticSegmentation(config)


SMALL_DECODER = {"hidden_dim": 32, "num_attention_heads": 2, "num_queries": 5}


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(), feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2,
        encoder_feedforward_dim=16, dim_feedforward=16, **SMALL_DECODER,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def maskformer():
    decoder = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=backbone_config(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def detr(kind="Detr", **more):
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone_config(**more.pop("backbone", {})), use_timm_backbone=False, backbone=None,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def classifier():
    return transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, num_labels=3))


def masked():
    return transformers.SwinForMaskedImageModeling(transformers.SwinConfig(**SWIN, encoder_stride=16))


def rt_detr():
    config = transformers.RTDetrConfig(
        backbone_config=backbone_config(out_features=STAGES[1:]), encoder_in_channels=[16, 32, 64], d_model=32,
        encoder_hidden_dim=32, feat_channels=[32, 32, 32], decoder_in_channels=[32, 32, 32], encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_denoising=0,
        encoder_ffn_dim=16, decoder_ffn_dim=16, freeze_backbone_batch_norms=False,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


def grounding_dino(kind="GroundingDino"):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone_config(out_features=STAGES[1:]), text_config={"model_type": "bert"} | text,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_feature_levels=4, use_timm_backbone=False,
        backbone=None,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=backbone_config(), hidden_dim=32, conv_dim=32, mask_dim=32, encoder_layers=1, decoder_layers=2,
        encoder_feedforward_dim=16, dim_feedforward=16, num_attention_heads=2, num_queries=5, is_training=False,
        text_encoder_width=32, text_encoder_num_layers=1, text_encoder_context_length=8, task_seq_len=8,
    )  # fmt: skip
    return transformers.OneFormerForUniversalSegmentation(config)


def donut():
    from transformers.models.donut.modeling_donut_swin import DonutSwinConfig, DonutSwinModel

    encoder = DonutSwinModel(DonutSwinConfig(**SWIN))
    config = {"vocab_size": 20, "d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 2}
    config |= {"decoder_ffn_dim": 16, "max_position_embeddings": 16, "encoder_layers": 1}
    decoder = transformers.MBartForCausalLM(transformers.MBartConfig(**config))
    return transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)


def timm_backbone():
    config = transformers.TimmBackboneConfig(backbone="swin_s3_tiny_224", out_indices=(1, 2, 3), num_channels=3)
    return transformers.TimmBackbone(config)


HOSTS = {
    "upernet": (upernet, SwinHFBackbone),
    "mask2former": (mask2former, SwinHFBackbone),
    "maskformer": (maskformer, SwinHFBackbone),
    "detr": (detr, SwinHFBackbone),
    "conditional-detr": (lambda: detr("ConditionalDetr"), SwinHFBackbone),
    "deformable-detr": (lambda: detr("DeformableDetr", num_feature_levels=4), SwinHFBackbone),
    "rt-detr": (rt_detr, SwinHFBackbone),
    "grounding-dino": (grounding_dino, SwinHFBackbone),
    "mm-grounding-dino": (lambda: grounding_dino("MMGroundingDino"), SwinHFBackbone),
    "oneformer": (oneformer, SwinHFBackbone),
    "classifier": (classifier, SwinHFModel),
    "masked": (masked, SwinHFModel),
    "donut": (donut, SwinHFModel),
    "timm": (timm_backbone, SwinHFModel),
}


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    build, ours = HOSTS[request.param]
    torch.manual_seed(0)
    model = randomise_backbones(build().eval())
    return request.param, model, ours


def randomise_backbones(model):
    """Weights that all matter, in the backbone alone; a head of such weights would explode."""
    for module in model.modules():
        if "Swin" in type(module).__name__ and type(module).__name__.endswith(("Model", "Backbone")):
            randomise(module)
    return model


def inputs(name):
    size = {"classifier": (64, 64), "masked": (64, 64), "timm": (224, 224), "rt-detr": (64, 96)}.get(name, (70, 90))
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([[101, 7, 1012, 102], [101, 9, 1012, 102]])
    more = {name: {"input_ids": words} for name in ("grounding-dino", "mm-grounding-dino")}
    more |= {"donut": {"decoder_input_ids": words[:, :1] * 0}, "oneformer": {"task_inputs": torch.ones(2, 8)}}
    return {"pixel_values": pixels} | more.get(name, {})


def tensors(output):
    """Every tensor of an output, by name."""
    found = {}
    for name, value in output.items():
        parts = value if isinstance(value, tuple | list) else [value]
        found |= {f"{name}.{number}": part for number, part in enumerate(parts) if isinstance(part, torch.Tensor)}
    return found


@torch.no_grad()
def run(model, name):
    return tensors(model(**inputs(name)))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = value[value.isfinite()].abs().max()
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=float(1e-5 * largest), msg=lambda m, n=name: f"{n}: {m}"
        )


def saved(model, folder):
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}, {
        key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()
    }


def test_outputs_and_files_are_the_same_and_the_way_back_is_exact(host, tmp_path):
    name, theirs, ours_class = host
    model = copy.deepcopy(theirs)
    expected = run(theirs, name)
    assert replace_backbone(model) is model
    assert sum(isinstance(module, ours_class) for module in model.modules()) == 1 and not model.training
    assert not [m for m in model.modules() if type(m).__name__ in ("SwinBackbone", "SwinModel", "MaskFormerSwinModel")]
    assert_same(run(model, name), expected)
    texts, weights = saved(model, tmp_path / "ours")
    assert (texts, weights.keys()) == (saved(theirs, tmp_path / "theirs")[0], load_all(tmp_path / "theirs").keys())
    assert all(torch.equal(value, weights[key]) for key, value in load_all(tmp_path / "theirs").items())
    if name != "timm":  # whose from_pretrained takes names of timm only
        again = type(model).from_pretrained(tmp_path / "ours").eval()
        assert_same(run(again, name), expected)
        assert_same(run(replace_backbone(again), name), expected)
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    assert list(model.state_dict()) == list(changed)
    model.load_state_dict(changed)
    assert replace_backbone(model, revert=True) is model
    assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())
    model.load_state_dict(theirs.state_dict())
    again = run(model, name)
    assert all(torch.equal(again[key], value) for key, value in expected.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]


def load_all(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def test_a_backbone_itself_is_replaced_by_ours():
    theirs = randomise(transformers.SwinBackbone(backbone_config(out_features=["stage2", "stage4"])))
    ours = replace_backbone(copy.deepcopy(theirs))
    assert type(ours) is SwinHFBackbone
    pixels = inputs("upernet")["pixel_values"]
    with torch.no_grad():
        for one, other in zip(ours(pixels).feature_maps, theirs(pixels).feature_maps, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=float(1e-5 * other.abs().max()))
    assert type(replace_backbone(ours, revert=True)) is transformers.SwinBackbone


def test_frozen_parameters_stay_frozen_and_training_goes_on():
    model = upernet()
    for key, parameter in model.backbone.named_parameters():
        parameter.requires_grad_("stages.0" not in key and "layers.0" not in key)
    replace_backbone(model.train())
    assert all(module.training for module in model.modules())
    frozen = {key for key, parameter in model.backbone.named_parameters() if not parameter.requires_grad}
    assert {key for key in frozen if key.startswith("swin.stages.0.")} == {
        key for key, _ in model.backbone.named_parameters() if key.startswith("swin.stages.0.")
    }
    labels = torch.zeros(2, 70, 90, dtype=torch.long)
    model(**inputs("upernet"), labels=labels).loss.backward()
    assert model.backbone.swin.stages[1].blocks[0].attention.qkv.weight.grad.abs().sum() > 0


def test_a_model_without_a_swin_is_refused():
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match=r"ViTForImageClassification holds no Swin; looked for SwinBackbone, Mask"):
        replace_backbone(model)
    with pytest.raises(ValueError, match="looked for a backbone that replace_backbone put there"):
        replace_backbone(upernet(), revert=True)
