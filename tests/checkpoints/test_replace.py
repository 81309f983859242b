"""Our backbone under models of transformers: the same outputs and files, and the way back."""

import copy
import re

import pytest
import timm
import torch
import transformers
from checkpoint_peers import randomise
from safetensors.torch import load_file

from swin_hf import SwinHFBackbone, SwinHFModel, SwinV2HFBackbone, SwinV2HFModel, replace_backbone
from swin_hf.checkpoints.replace import PEERS

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


def timm_backbone(name="swin_s3_tiny_224"):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=(1, 2, 3), num_channels=3)
    model = transformers.TimmBackbone(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # those of V2's branches begin at zero, and nothing of a block would be seen
            parameter.data.fill_(0.5)
    return model


def v2(name=None, **changes):
    """Its own units for the last stages, whose windows cover the map of an image of ``image_size``."""
    more = {"pretrained_window_sizes": [0, 6, 3, 0], "window_size": 8} | changes
    config = transformers.Swinv2Config(**SWIN | more, num_labels=3, encoder_stride=16)
    return config if name is None else getattr(transformers, f"Swinv2{name}")(config)


def dpt():
    config = transformers.DPTConfig(
        backbone_config=v2(out_features=STAGES), hidden_size=8, neck_hidden_sizes=[8, 16, 32, 64],
        fusion_hidden_size=16, reassemble_factors=[1, 1, 1, 1], use_batch_norm_in_fusion_residual=False,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def zoedepth():
    config = transformers.ZoeDepthConfig(
        backbone_config=v2(out_features=STAGES), backbone=None, neck_hidden_sizes=[8, 16, 32, 64],
        fusion_hidden_size=16, reassemble_factors=[1, 1, 1, 1], bottleneck_features=16, num_relative_features=8,
        bin_embedding_dim=16, num_attractors=[4, 2, 2, 1], readout_type="ignore",
        bin_configurations=[{"name": "nyu", "n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
    )  # fmt: skip
    return transformers.ZoeDepthForDepthEstimation(config)


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
    "dpt": (dpt, SwinV2HFBackbone),
    "zoedepth": (zoedepth, SwinV2HFBackbone),
    "v2-classifier": (lambda: v2("ForImageClassification"), SwinV2HFModel),
    "v2-masked": (lambda: v2("ForMaskedImageModeling"), SwinV2HFModel),
    "v2-timm": (lambda: timm_backbone("swinv2_tiny_window8_256"), SwinV2HFModel),
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
        if re.fullmatch(".*Swin.*(Model|Backbone)", type(module).__name__):
            randomise(module)
    return model


def inputs(name):
    sizes = {"timm": (224, 224), "v2-timm": (256, 256), "rt-detr": (64, 96)}
    size = sizes.get(name, (64, 64) if name.endswith(("classifier", "masked")) else (70, 90))
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
    assert not [m for m in model.modules() if type(m).__name__ in PEERS]
    assert_same(run(model, name), expected)
    texts, weights = saved(model, tmp_path / "ours")
    assert (texts, weights.keys()) == (saved(theirs, tmp_path / "theirs")[0], load_all(tmp_path / "theirs").keys())
    assert all(torch.equal(value, weights[key]) for key, value in load_all(tmp_path / "theirs").items())
    if "timm" not in name:  # whose from_pretrained takes names of timm only
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


@pytest.mark.parametrize("build", [lambda: transformers.SwinBackbone(backbone_config()), lambda: v2("Backbone")])
def test_a_backbone_itself_is_replaced_by_ours(build, tmp_path):
    theirs = randomise(build())
    ours = replace_backbone(copy.deepcopy(theirs))
    assert isinstance(ours, SwinHFBackbone)
    pixels = inputs("upernet")["pixel_values"]
    with torch.no_grad():
        expected = tensors(theirs(pixels))
        assert_same(tensors(ours(pixels)), expected)
        ours.save_pretrained(tmp_path)
        again = tensors(type(theirs).from_pretrained(tmp_path)(pixels))
        assert all(torch.equal(value, expected[name]) for name, value in again.items())
        assert_same(tensors(ours(pixels)), expected)
    assert type(replace_backbone(ours, revert=True)) is type(theirs)


def test_the_mask_that_is_added_once_is_enough_for_the_steepest_heads():
    """transformers' V2 adds -100 twice. In float64, because rounding alone is 1e-2 of the largest at such scales."""
    theirs = randomise_backbones(v2("Model", window_size=4)).double()
    for name, parameter in theirs.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.fill_(9.0)  # beyond the largest, which cuts it off
    pixels = inputs("dpt")["pixel_values"].double()
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state
        ours = replace_backbone(theirs)(pixels).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=0, atol=float(1e-6 * expected.abs().max()))


def test_images_of_other_sizes_have_the_windows_and_shifts_that_v2_was_built_with():
    theirs = randomise_backbones(v2("Backbone", out_features=STAGES))
    ours = replace_backbone(copy.deepcopy(theirs))
    for size in ((128, 128), (48, 96)):  # whose last maps are larger than the windows, and smaller
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            asked = {"output_hidden_states": True, "output_attentions": True}
            assert_same(tensors(ours(pixels, **asked)), tensors(theirs(pixels, **asked)))


def test_a_swin_of_timm_that_shifts_before_it_pads_is_refused():
    theirs = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=256)
    with pytest.raises(ValueError, match=r"FeatureListNet, cannot be replaced: .* after it"):
        replace_backbone(theirs)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_swin_of_timm_that_always_cuts_windows_does_so_here(name):
    """Windows of 4 on maps of 16, 8, 4 and 2 tokens; a map of 6 under a window of 8 is refused."""
    sizes = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "always_partition": True}
    theirs = timm.create_model(name, features_only=True, img_size=64, window_size=4, **sizes).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(pixels)
        found = replace_backbone(theirs)(pixels)
    for ours, map_of_theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, map_of_theirs, rtol=1e-4, atol=1e-5)
    uneven = timm.create_model(name, features_only=True, img_size=96, window_size=8, **sizes)
    with pytest.raises(ValueError, match="a 6x6 map is padded, here before the cyclic shift"):
        replace_backbone(uneven)


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
