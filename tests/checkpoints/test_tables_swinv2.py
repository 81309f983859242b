"""Swin V2 in five layouts, both ways: the same numbers, bit-equal weights, and windows that are never guessed."""

import functools
import math

import pytest
import safetensors.torch
import torch
from checkpoint_peers import (
    images,
    microsoft_index,
    microsoft_mask,
    peer,
    saved,
    under_microsoft_names,
    under_openmmlab_names,
)
from conftest import PARITY
from torch import Tensor, nn

from swin_hf import (
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinV2HFBackbone,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
    SwinV2HFForMaskedImageModeling,
    SwinV2HFModel,
    convert_checkpoint,
    export_checkpoint,
    load_checkpoint,
)
from swin_hf.checkpoints import open_checkpoint
from swin_hf.checkpoints.sizes_swinv2 import told_by_name
from swin_hf.checkpoints.tables import QueryValue, Rows
from swin_hf.checkpoints.tables_swinv2 import LAYOUTS_V2
from swin_hf.checkpoints.translate import our_key
from swin_hf.checkpoints.verify import build_peer

SIZES = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (2, 2, 4)}
FIELDS = {**SIZES, "image_size": 32, "patch_size": 2, "window_size": 8}
CONFIG = SwinV2HFConfig(**FIELDS, num_labels=5)  # maps of 16, 8 and 4: the last window is cut to 4
UNITS = {"own": (0, 0, 0), "pretrained": (6, 6, 3)}


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "logit_scale" in name:
            parameter.data = noise + math.log(10)
        else:
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = noise * (0.3 if parameter.ndim > 1 else 0.1) + offset
    return module.eval()


@functools.cache
def timm_v2(units: str = "own") -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes = {"img_size": 32, "patch_size": 2, "window_size": 8, "num_classes": 5}
    return randomise(SwinTransformerV2(**SIZES, **sizes, pretrained_window_sizes=UNITS[units]))


@functools.cache
def torchvision_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in SIZES.items()}
    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    model = randomise(SwinTransformer(patch_size=[2, 2], window_size=[4, 4], num_classes=5, **sizes, **parts))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data.chunk(3)[1].zero_()  # what no output depends on
    return model


@functools.cache
def transformers_v2(name: str):
    import transformers

    stages = {"out_features": ["stage1", "stage3"]} if name == "Backbone" else {}
    config = transformers.Swinv2Config(
        **FIELDS, pretrained_window_sizes=(6, 6, 3), num_labels=5, encoder_stride=8, **stages
    )
    return randomise(getattr(transformers, f"Swinv2{name}")(config))


def microsoft_coordinates(window: int, pretrained: int) -> Tensor:
    """``relative_coords_table`` as models/swin_transformer_v2.py of Microsoft builds it."""
    offsets = torch.arange(-(window - 1), window, dtype=torch.float32)
    table = torch.stack(torch.meshgrid([offsets, offsets], indexing="ij")).permute(1, 2, 0).contiguous().unsqueeze(0)
    table[:, :, :, 0] /= (pretrained or window) - 1
    table[:, :, :, 1] /= (pretrained or window) - 1
    table *= 8
    return torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / 3.0


def microsoft_state(units: str = "own", buffers: bool = True) -> dict[str, Tensor]:
    """timm's state dict as Microsoft's: merging at the end of a stage, ``head``, persistent buffers."""
    state = under_microsoft_names(timm_v2(units).state_dict(), buffers=False)
    if buffers:
        for stage, window in enumerate((8, 8, 4)):
            for block in range(2):
                prefix = f"layers.{stage}.blocks.{block}.attn."
                state[prefix + "relative_coords_table"] = microsoft_coordinates(window, UNITS[units][stage])
                state[prefix + "relative_position_index"] = microsoft_index(window)
        state["layers.0.blocks.1.attn_mask"] = microsoft_mask(16, 8)  # the other maps are one window
    return state


def transformers_4_state() -> dict[str, Tensor]:
    state = saved(transformers_v2("ForImageClassification"))
    for stage, window in enumerate((8, 8, 4)):
        for block in range(2):
            prefix = f"swinv2.encoder.layers.{stage}.blocks.{block}.attention.self."
            state[prefix + "relative_coords_table"] = microsoft_coordinates(window, (6, 6, 3)[stage])
            state[prefix + "relative_position_index"] = microsoft_index(window)
    return state


def peer_v2(name: str) -> tuple[nn.Module, dict[str, Tensor], SwinV2HFConfig | None]:
    """Network of the peer, its state dict, and the configuration that a file without windows needs."""
    pretrained = SwinV2HFConfig(**FIELDS, pretrained_window_sizes=(6, 6, 3), num_labels=5)
    match name:
        case "timm":
            return timm_v2(), timm_v2().state_dict(), CONFIG
        case "timm pretrained":
            return timm_v2("pretrained"), timm_v2("pretrained").state_dict(), pretrained
        case "timm-old":
            return timm_v2(), microsoft_state(buffers=False), CONFIG
        case "microsoft":
            return timm_v2(), microsoft_state(), None
        case "microsoft pretrained":
            return timm_v2("pretrained"), microsoft_state("pretrained"), None
        case "torchvision":
            return torchvision_v2(), torchvision_v2().state_dict(), None
        case "openmmlab":
            return timm_v2(), under_openmmlab_names(microsoft_state(), v2=True), None
        case "openmmlab pretrained":
            return timm_v2("pretrained"), under_openmmlab_names(microsoft_state("pretrained"), v2=True), None
        case "transformers":
            model = transformers_v2("ForImageClassification")
            return model, saved(model), pretrained
        case "transformers-4":
            return transformers_v2("ForImageClassification"), transformers_4_state(), None
    raise KeyError(name)


PEERS = (
    "microsoft",
    "microsoft pretrained",
    "timm",
    "timm pretrained",
    "timm-old",
    "torchvision",
    "transformers",
    "transformers-4",
    "openmmlab",
    "openmmlab pretrained",
)


@pytest.fixture(autouse=True)
def _single_mask(monkeypatch):
    """transformers adds the shift mask twice: with half of it, its sum is the reference's -100."""
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    mask_of = Swinv2Layer.get_attn_mask

    def half(self, *args, **kwargs):
        mask = mask_of(self, *args, **kwargs)
        return None if mask is None else mask / 2

    monkeypatch.setattr(Swinv2Layer, "get_attn_mask", half)


# ------------------------------------------------------------------------------------------------------- tables, parity


@pytest.mark.parametrize("name", LAYOUTS_V2)
def test_table_names_each_of_our_keys_once(name):
    ours = []
    for target in LAYOUTS_V2[name].table.values():
        if isinstance(target, Rows):
            ours.append((target.key, target.part))
        elif isinstance(target, QueryValue):
            ours += target
        elif our_key(target):
            ours.append(our_key(target))
    assert len(set(ours)) == len(ours)
    assert not any("relative_position_bias_table" in str(key) for key in ours)


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_the_peers(name):
    module, state, config = peer_v2(name)
    ours = load_checkpoint(state, config=config)
    assert type(ours) is SwinV2HFForImageClassification and not ours.training
    with torch.no_grad():
        expected = module(images())
        torch.testing.assert_close(ours(images()).logits, getattr(expected, "logits", expected), **PARITY)


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_is_bit_equal(name):
    _, state, config = peer_v2(name)
    again = export_checkpoint(load_checkpoint(state, config=config), name.split()[0])
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key


@pytest.mark.parametrize("name", ["timm", "timm pretrained", "torchvision", "transformers"])
def test_ours_load_strictly_at_home(name):
    module, state, config = peer_v2(name)
    exported = export_checkpoint(load_checkpoint(state, config=config), name.split()[0])
    module.load_state_dict(exported, strict=True)


@pytest.mark.parametrize("source", ["microsoft pretrained", "openmmlab", "torchvision", "transformers-4"])
@pytest.mark.parametrize("to", ["microsoft", "timm", "openmmlab", "transformers", "swin_hf"])
def test_from_layout_to_layout_is_the_same_model(source, to):
    _, state, config = peer_v2(source)
    model = load_checkpoint(state, config=config)
    config = model.config if to in ("timm", "transformers", "swin_hf") else None
    again = load_checkpoint(export_checkpoint(model, to), config=config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config.bias_units == model.config.bias_units
    assert again.config.window_size == model.config.window_size


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Model", SwinV2HFModel),
        ("ForMaskedImageModeling", SwinV2HFForMaskedImageModeling),
        ("Backbone", SwinV2HFBackbone),
    ],
)
def test_other_kinds_of_transformers_go_both_ways(name, ours, tmp_path):
    module = transformers_v2(name)
    module.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.pretrained_window_sizes == [6, 6, 3]
    model = load_checkpoint(tmp_path, model_class=ours)
    with torch.no_grad():
        outputs, expected = model(images()), module(images())
    if name == "Backbone":
        assert not model.config.norm_features and model.config.out_features == ["stage1", "stage3"]
        for map_, their_map in zip(outputs.feature_maps, expected.feature_maps, strict=True):
            torch.testing.assert_close(map_, their_map, **PARITY)
    else:
        torch.testing.assert_close(outputs[0], expected[0], **PARITY)
    exported = export_checkpoint(model, "transformers")
    state = saved(module)
    assert exported.keys() == state.keys() and all(torch.equal(exported[key], state[key]) for key in state)


def test_from_pretrained_reads_their_folders(tmp_path):
    module = transformers_v2("ForImageClassification")
    module.save_pretrained(tmp_path)
    ours = SwinV2HFForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()).logits, module(images()).logits, **PARITY)


def test_simmim_of_microsoft_gives_decoder_and_classifier():
    state = {f"encoder.{key}": tensor for key, tensor in microsoft_state().items() if not key.startswith("head.")}
    early = {key.replace("cpb_mlp", "rpe_mlp"): tensor for key, tensor in state.items()}
    early |= {
        "encoder.mask_token": torch.ones(1, 1, 8),
        "decoder.0.weight": torch.ones(192, 32, 1, 1),
        "decoder.0.bias": torch.ones(192),
    }
    model = load_checkpoint(early, model_class=SwinV2HFForMaskedImageModeling)
    assert model.config.encoder_stride == 8 and model.config.norm_targets == 47
    assert export_checkpoint(model, "microsoft").keys() == {key.replace("rpe_mlp", "cpb_mlp") for key in early}
    assert load_checkpoint(early).classifier.weight.shape[1] == 32


def test_folders_are_read_at_home(tmp_path):
    import timm
    from transformers import AutoModelForImageClassification

    module, state, _ = peer_v2("microsoft pretrained")
    convert_checkpoint(state, tmp_path / "hf", to="transformers")
    convert_checkpoint(state, tmp_path / "timm", to="timm")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    timms = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert type(theirs).__name__ == "Swinv2ForImageClassification"
    with torch.no_grad():
        expected = module(images())
        torch.testing.assert_close(theirs(images()).logits, expected, **PARITY)
        torch.testing.assert_close(timms(images()), expected, **PARITY)
        for folder in ("hf", "timm"):  # whose config.json say the windows
            torch.testing.assert_close(load_checkpoint(tmp_path / folder)(images()).logits, expected, **PARITY)


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("units", "expected"), [("own", [0, 0, 0]), ("pretrained", [6, 6, 3])], ids=["own", "pretrained"]
)
def test_buffers_tell_the_windows(units, expected, caplog):
    checkpoint = open_checkpoint(microsoft_state(units))
    assert not caplog.records  # the index of the cut window is the right one
    assert (checkpoint.config.window_size, checkpoint.config.image_size) == (8, 32)
    assert checkpoint.config.pretrained_window_sizes == expected
    assert ("pre-trained in [6, 6, 3]" in str(checkpoint)) == (units == "pretrained")
    assert "Swin V2 classifier" in str(checkpoint)


@pytest.mark.parametrize("name", ["timm", "timm-old", "transformers"])
def test_windows_that_nothing_tells_are_asked_for(name):
    with pytest.raises(ValueError, match=r"do not say in which windows they were trained.*config=SwinV2HFConfig\("):
        load_checkpoint(peer_v2(name)[1])


@pytest.mark.parametrize(
    ("name", "window", "image", "pretrained"),
    [
        ("swinv2_tiny_patch4_window8_256.pth", 8, 256, None),
        ("microsoft/swinv2-small-patch4-window16-256", 16, 256, None),
        ("timm/swinv2_base_window12_192.ms_in22k", 12, 192, None),
        ("swinv2_base_patch4_window12_192_22k.pth", 12, 192, None),
        ("timm/swinv2_large_window12to24_192to384.ms_in22k_ft_in1k", 24, 384, (12, 12, 12, 6)),
        ("swinv2-base-patch4-window12to16-192to256-22kto1k-ft", 16, 256, (12, 12, 12, 6)),
    ],
)
def test_names_tell_the_windows(name, window, image, pretrained):
    told = told_by_name(name)
    assert (told["window_size"], told["image_size"], told.get("pretrained_window_sizes")) == (window, image, pretrained)
    assert told_by_name("model.safetensors") == {}


def test_the_name_of_a_file_is_read(tmp_path):
    config = SwinV2HFConfig.from_preset("swinv2_tiny_patch4_window8_256", embed_dim=24, num_labels=3)
    state = export_checkpoint(SwinV2HFForImageClassification(config), "timm")
    path = tmp_path / "swinv2_tiny_window8_256.safetensors"
    safetensors.torch.save_file(state, path)
    assert open_checkpoint(path).config.window_size == 8
    with pytest.raises(ValueError, match="do not say in which windows"):
        open_checkpoint(path.rename(tmp_path / "weights.safetensors"))


def test_other_windows_on_load_follow_the_transfer_rule():
    model = load_checkpoint(microsoft_state(), image_size=64, window_size=16)
    assert model.config.pretrained_window_sizes == [8, 8, 4]
    assert model.config.stage_windows == ((16, 16),) * 3
    by_hand = load_checkpoint(microsoft_state()).set_input_size(64, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images(64, 64)).logits, by_hand(images(64, 64)).logits)


def test_a_layout_that_cannot_hold_pretrained_windows_refuses():
    model = load_checkpoint(peer_v2("torchvision")[1]).set_input_size(64, 8)
    with pytest.raises(
        ValueError, match="torchvision layout cannot hold this model: it divides offsets by the window, 8x8"
    ):
        export_checkpoint(model, "torchvision")
    backbone = SwinV2HFBackbone(CONFIG)
    with pytest.raises(ValueError, match="its backbone has no norms for its maps"):
        export_checkpoint(backbone, "transformers")
    positions = SwinV2HFModel(SwinV2HFConfig(**{**CONFIG.to_dict(), "use_absolute_embeddings": True}))
    with pytest.raises(ValueError, match="its position embeddings have a row for a class token, which its forward"):
        export_checkpoint(positions, "transformers")
    with pytest.raises(ValueError, match="the maskformer-swin layout has no Swin Transformer V2; choose one of"):
        export_checkpoint(backbone, "maskformer-swin")


@pytest.mark.parametrize(
    ("image_size", "window", "told"),
    [
        (
            (32, 64),
            8,
            "is smaller than its window of 8x8: here the window shrinks, there it is cut to a square of the height",
        ),
        (
            (64, 32),
            4,
            "map of stage 3 is covered by its window in width only: here it is not shifted, there it is",
        ),
        ((64, 64), 8, ""),
    ],
    ids=["wide", "tall", "square"],
)
def test_transformers_looks_at_the_height_of_a_map(image_size, window, told, caplog):
    sizes = {**FIELDS, "image_size": image_size, "window_size": window, "pretrained_window_sizes": (6, 6, 3)}
    config = SwinV2HFConfig(**sizes, num_labels=5)
    ours, theirs = randomise(SwinV2HFForImageClassification(config)), build_peer("transformers", config)
    theirs.load_state_dict(export_checkpoint(ours, "transformers"), strict=True)
    with torch.no_grad():
        distance = (ours(images(*image_size)).logits - theirs(images(*image_size)).logits).abs().max()
    assert (distance > 1e-4) == bool(told) == bool(caplog.records)
    assert told in caplog.text


def test_extra_norms_go_where_a_layout_has_them():
    """OpenMMLab is the only other one; neither Microsoft nor timm has weights of the models that have these norms."""
    config = SwinV2HFConfig(**{**FIELDS, "extra_norm_every_n_blocks": 2}, num_labels=5)
    model = SwinV2HFForImageClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for to, key in (("openmmlab", "backbone.stages.1.blocks.1.norm3.bias"), ("swin_hf", None)):
        exported = export_checkpoint(model, to)
        assert key is None or torch.equal(exported[key], model.swin.stages[1].blocks[1].norm3.bias)
        again = load_checkpoint(exported, config=config)
        assert again.config.extra_norm_every_n_blocks == 2
        assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"the timm layout has no name for our .*\.norm3\.bias"):
        export_checkpoint(model, "timm")


# ------------------------------------------------------------------------------------------------------ mistaken models


def test_the_other_version_is_named(tmp_path):
    v1, v2 = peer("microsoft").state, microsoft_state()
    with pytest.raises(
        ValueError, match="holds Swin Transformer V2 and SwinHFForImageClassification is Swin Transformer V1"
    ):
        load_checkpoint(v2, model_class=SwinHFForImageClassification)
    with pytest.raises(
        ValueError, match="holds Swin Transformer V1 and SwinV2HFModel is Swin Transformer V2; use SwinHF"
    ):
        load_checkpoint(v1, model_class=SwinV2HFModel)
    with pytest.raises(ValueError, match="those of Swin Transformer V2, and SwinHFConfig is of Swin Transformer V1"):
        load_checkpoint(v2, config=SwinHFConfig())
    with pytest.raises(ValueError, match="those of Swin Transformer V1, and SwinV2HFConfig is of Swin Transformer V2"):
        load_checkpoint(v1, preset="swinv2_tiny_patch4_window8_256")
    SwinV2HFForImageClassification(CONFIG).save_pretrained(tmp_path / "v2")
    with pytest.raises(ValueError, match="Swin Transformer"):
        SwinHFForImageClassification.from_pretrained(tmp_path / "v2")
    safetensors.torch.save_file(
        {key: x.contiguous() for key, x in peer("transformers Model").state.items()},
        tmp_path / "v2" / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"of Swin Transformer V1, and config\.json is of model_type 'swinv2_hf'"):
        load_checkpoint(tmp_path / "v2")


def test_swinv2_cr_is_refused_by_name():
    import timm

    state = timm.create_model(
        "swinv2_cr_tiny_224", img_size=224, embed_dim=24, depths=(1, 1), num_heads=(2, 2)
    ).state_dict()
    with pytest.raises(ValueError, match="it looks like swinv2_cr of timm"):
        load_checkpoint(state)
