"""Reading, recognising, deriving, writing: what is found is said, what is wrong is refused with a remedy."""

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_peers import (
    RECTANGLE,
    SQUARE,
    peer,
    randomise,
    transformers_swin,
)
from conftest import PARITY
from full_disk import files_of_at_most
from PIL import Image
from torchvision.transforms import v2

from swin_hf import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
    convert_checkpoint,
    export_checkpoint,
    load_checkpoint,
)
from swin_hf.checkpoints import LAYOUTS, Kind, open_checkpoint
from swin_hf.checkpoints.preprocessing import image_processor
from swin_hf.checkpoints.tables import Rows
from swin_hf.checkpoints.tables_swinv2 import LAYOUTS_V2
from swin_hf.checkpoints.translate import our_key
from swin_hf.cli import main
from swin_hf.families import FAMILIES


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "in" / "swin.pth"
    path.parent.mkdir()
    torch.save({"model": peer("microsoft").state}, path)
    return path


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", LAYOUTS)
def test_table_names_each_of_our_keys_once(name):
    """For each kind; one of our fused projections has three of their names."""
    ours = [
        (target.key, target.part) if isinstance(target, Rows) else our_key(target)
        for target in LAYOUTS[name].table.values()
        if our_key(target) is not None
    ]
    assert len(ours) == len(set(ours))


def test_our_table_is_the_models_state_dict():
    """Every key of every model class is in the table; a new parameter without a name in it fails here."""
    stages = {"out_features": ["stem", "stage1", "stage2", "stage3"]}
    for model_class, changes in (
        (SwinHFForImageClassification, {"use_absolute_embeddings": True}),
        (SwinHFForMaskedImageModeling, {}),
        (SwinHFBackbone, stages),
        (SwinHFModel, {}),
    ):
        with torch.device("meta"):
            model = model_class(SwinHFConfig(**{**SQUARE, **changes}))
        assert export_checkpoint(model, "swin_hf").keys() == model.state_dict().keys()


# ------------------------------------------------------------------------------------------------------- detection


def without_classes(family, **changes):
    torch.manual_seed(0)
    model = family.model_class("image-classification")(family.config_class(**{**SQUARE, "num_labels": 0, **changes}))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, name)
        for family, layouts in (("swin_hf", LAYOUTS), ("swinv2_hf", LAYOUTS_V2))
        for name, layout in layouts.items()
        if Kind.CLASSIFIER in layout.trunks
    ],
)
def test_a_classifier_that_lost_its_head_is_recognised(family, layout):
    family = FAMILIES[family]
    model = without_classes(family)
    ours = load_checkpoint(export_checkpoint(model, layout), config=family.config_class(**SQUARE))
    assert torch.equal(ours.swin.norm.weight, model.swin.norm.weight) and ours.classifier.out_features == 5


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@pytest.mark.parametrize("to", ["microsoft", "timm", "torchvision", "transformers", "openmmlab", "swin_hf"])
def test_a_model_without_classes_gets_none_in_another_layout(family, to, tmp_path):
    model, x = without_classes(family), torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path / "ours")
    written = convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to=to)
    again = load_checkpoint(written).eval()
    assert again.num_labels == 0
    torch.testing.assert_close(again(x).logits, model(x).logits, **PARITY)


def stranger(name):
    import timm
    import torchvision

    with torch.device("meta"):
        if name == "resnet":
            return torchvision.models.resnet18().state_dict()
        return timm.create_model("vit_tiny_patch16_224").state_dict()


@pytest.mark.parametrize(
    ("name", "looks_like"),
    [
        ("resnet", "looks like ResNet"),
        ("vit", r"looks like Vision Transformer \(ViT\)"),
    ],
)
def test_another_architecture_is_named(name, looks_like):
    with pytest.raises(ValueError, match=looks_like):
        load_checkpoint(stranger(name))


def test_something_unknown_is_listed_not_guessed():
    state = {f"thing.{number}": torch.zeros(1) for number in range(30)}
    with pytest.raises(ValueError, match=r"not a Swin Transformer: there is 30 keys: thing\.0, .* and 10 more"):
        load_checkpoint(state)


def test_wrong_layout_is_refused():
    with pytest.raises(ValueError, match="keys are not those of the torchvision layout"):
        load_checkpoint(peer("timm").state, layout="torchvision")
    with pytest.raises(ValueError, match="unknown layout 'tim'; choose one of"):
        load_checkpoint(peer("timm").state, layout="tim")
    with pytest.raises(ValueError, match="state dict is empty"):
        open_checkpoint({"state_dict": {"n_averaged": torch.zeros(())}})


def test_two_networks_are_not_mixed():
    state = {f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in peer("timm").state.items()}
    with pytest.raises(ValueError, match=r"holds 2 networks, under 'student\.', 'teacher\.'"):
        load_checkpoint(state)


def test_unknown_place_is_refused():
    state = {f"student.{key}": tensor for key, tensor in peer("timm").state.items()}
    with pytest.raises(ValueError, match=r"begin with 'student\.', which is not a place of a Swin in the timm layout"):
        load_checkpoint(state)
    classifier = {f"swin.{key}": tensor for key, tensor in peer("maskformer-swin").state.items()}
    with pytest.raises(ValueError, match=r"begin with 'swin\.model\.', which is not a place"):
        load_checkpoint(classifier)


def test_prefix_of_another_kind_is_refused():
    state = peer("transformers ForMaskedImageModeling").state
    bare = {key.removeprefix("swin."): tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match=r"begin with '', but those of a masked image modeling .* begin with 'swin\.'"):
        load_checkpoint(bare)


def test_wrappers_of_training_programs_are_seen_through():
    state = peer("timm").state
    for prefix in ("module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.", "model._orig_mod.module."):
        wrapped = {"state_dict": {f"{prefix}{key}": tensor for key, tensor in state.items()}, "epoch": 3}
        wrapped |= {"pytorch-lightning_version": "2.6"} if prefix.startswith("model.") else {}
        assert load_checkpoint(wrapped).state_dict().keys() == load_checkpoint(state).state_dict().keys()
    averaged = {"model": state, "model_ema": {"n_averaged": torch.tensor(2), **{k: t * 2 for k, t in state.items()}}}
    bias = "classifier.bias"
    assert torch.equal(load_checkpoint(averaged).state_dict()[bias], state["head.fc.bias"])
    assert torch.equal(load_checkpoint(averaged, weights="ema").state_dict()[bias], state["head.fc.bias"] * 2)
    with pytest.raises(ValueError, match="holds no averaged weights; leave weights= out"):
        load_checkpoint(state, weights="ema")
    with pytest.raises(ValueError, match="weights is 'best'; choose 'ema' or 'raw'"):
        load_checkpoint(state, weights="best")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upernet", "mask2former", "maskformer"])
def test_backbone_inside_a_larger_model_of_transformers(name):
    """The backbone of a whole segmentation model, as saved, gives the maps that it gives there."""
    import transformers
    from checkpoint_peers import images, saved

    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {**SQUARE, "depths": [1, 1, 1, 2], "num_heads": [1, 2, 4, 8], "image_size": 64, "out_features": stages}
    sizes.pop("num_labels")
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_feedforward_dim": 32}
    if name == "upernet":
        config = transformers.UperNetConfig(
            backbone_config=transformers.SwinConfig(**sizes), hidden_size=32, auxiliary_in_channels=32
        )
        whole = transformers.UperNetForSemanticSegmentation(config)
        backbone = whole.backbone
    elif name == "mask2former":
        config = transformers.Mask2FormerConfig(
            backbone_config=transformers.SwinConfig(**sizes), **small, dim_feedforward=32, decoder_layers=1,
            encoder_layers=1, num_attention_heads=2, num_queries=3,
        )  # fmt: skip
        whole = transformers.Mask2FormerModel(config)
        backbone = whole.pixel_level_module.encoder
    else:
        decoder = transformers.DetrConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=3,
        )  # fmt: skip
        config = transformers.MaskFormerConfig(
            fpn_feature_size=32, mask_feature_size=32, decoder_config=decoder,
            backbone_config=transformers.SwinConfig(**sizes),
        )  # fmt: skip
        whole = transformers.MaskFormerModel(config)
        backbone = whole.pixel_level_module.encoder
    randomise(whole)

    for state in (saved(whole), whole.state_dict()):
        ours = load_checkpoint(state, model_class=SwinHFBackbone)
        with torch.inference_mode():
            for one, other in zip(
                ours(images(64, 64)).feature_maps, backbone(images(64, 64)).feature_maps, strict=True
            ):
                torch.testing.assert_close(one, other, **PARITY)


# ------------------------------------------------------------------------------------------------ keys and shapes


def test_unknown_and_missing_keys_are_listed():
    state = dict(peer("timm").state)
    state.update({f"adapter.{number}": torch.zeros(1) for number in range(25)})
    with pytest.raises(ValueError, match=r"timm layout has no place for 25 keys: adapter\.0, .* and 5 more"):
        load_checkpoint(state)
    state = dict(peer("timm").state)
    del state["layers.1.blocks.0.norm2.weight"], state["norm.bias"]
    with pytest.raises(ValueError, match=r"lacks 2 keys: layers\.1\.blocks\.0\.norm2\.weight, norm\.bias"):
        load_checkpoint(state)
    state = dict(peer("transformers ForImageClassification").state)
    del state["swin.encoder.layers.0.blocks.1.attention.self.key.bias"]
    with pytest.raises(ValueError, match=r"of 3 keys: .*key\.bias.* only 2 are there"):
        load_checkpoint(state)
    state = dict(peer("timm").state)
    del state["layers.0.blocks.0.attn.qkv.bias"]  # so that all others are one too many
    with pytest.raises(ValueError, match=r"SwinHFForImageClassification has no place for 5 keys: layers\.0\.blocks\.1"):
        load_checkpoint(state)
    state = dict(peer("timm").state)
    del state["layers.0.blocks.0.mlp.fc1.weight"]
    with pytest.raises(ValueError, match=r"our swin\.stages\.0\.blocks\.0\.mlp\.fc1\.weight has no counterpart"):
        load_checkpoint(state)


def test_shapes_that_contradict_each_other_are_named():
    state = dict(peer("timm").state)
    state["layers.1.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"1 key: layers\.1\.blocks\.0\.mlp\.fc1\.bias; .* is \(3,\) where .* \(64,\)"):
        load_checkpoint(state)


def test_shapes_that_contradict_the_preset_are_refused():
    with pytest.raises(ValueError, match="embed_dim is 96 there but 8 in the weights; depths is"):
        load_checkpoint(peer("timm").state, preset="swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="num_labels is 7 there but 5 in the weights"):
        load_checkpoint(peer("timm").state, config=SwinHFConfig(**{**SQUARE, "num_labels": 7}))
    with pytest.raises(ValueError, match="both preset 'swin_tiny_patch4_window7_224' and a config"):
        load_checkpoint(peer("timm").state, preset="swin_tiny_patch4_window7_224", config=SwinHFConfig())


# ----------------------------------------------------------------------------------------------------- derivation


def test_every_size_is_derived_from_shapes():
    generator_config = SwinHFConfig(
        image_size=48,
        patch_size=(2, 4),
        num_channels=1,
        embed_dim=12,
        depths=(1, 3),
        num_heads=(3, 4),
        window_size=[[4, 3], [2, 6]],
        mlp_ratio=2.0,
        qkv_bias=False,
        num_labels=9,
    )
    state = export_checkpoint(SwinHFForImageClassification(generator_config), "swin_hf")
    found = open_checkpoint(state, config=generator_config).config
    for name in ("patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"):
        assert getattr(found, name) == getattr(generator_config, name), name
    assert found.qkv_bias is False and found.num_labels == 9 and found.image_size == 48


def test_window_that_cannot_be_told_is_asked_for():
    with pytest.raises(
        ValueError, match=r"bias table of stage 1 has 35 rows, which fits 1x18, 3x4, 4x3, 18x1; say which"
    ):
        load_checkpoint(peer("timm rectangle").state)


def test_index_buffer_tells_the_window():
    """35 rows are 4x3 or 3x4; torchvision's file says which."""
    assert open_checkpoint(peer("torchvision rectangle").state).config.window_size == [4, 3]


def test_shift_mask_tells_the_image_size():
    assert open_checkpoint(peer("microsoft").state).config.image_size == 32
    rectangle = dict(peer("timm-old").state)
    mask = export_checkpoint(
        SwinHFForImageClassification(SwinHFConfig(**{**SQUARE, "image_size": (32, 64)})), "microsoft"
    )
    rectangle.update({key: tensor for key, tensor in mask.items() if key.endswith("attn_mask")})
    assert open_checkpoint(rectangle).config.image_size == [32, 64]


def test_position_embeddings_tell_the_image_size():
    config = SwinHFConfig(**{**SQUARE, "image_size": 64, "use_absolute_embeddings": True})
    state = export_checkpoint(randomise(SwinHFForImageClassification(config)), "microsoft")
    found = open_checkpoint({key: tensor for key, tensor in state.items() if "mask" not in key})
    assert found.config.use_absolute_embeddings and found.config.image_size == 64
    odd = {**state, "absolute_pos_embed": torch.zeros(1, 1000, 8)}
    with pytest.raises(ValueError, match="1000 position embeddings do not make a square map"):
        load_checkpoint(odd)


def test_image_size_without_any_hint_makes_the_last_stage_one_window():
    found = open_checkpoint(peer("timm").state)
    assert found.config.image_size == 32
    assert "image size 32 assumed" in str(found)


def test_shrunk_windows_of_microsoft_are_kept_and_stretched_on_demand():
    """At 24 pixels the maps are 12, 6 and 3 tokens: Microsoft's code builds the last stage with a 3x3 window."""
    config = SwinHFConfig(**{**SQUARE, "image_size": 24, "window_size": [[4, 4], [4, 4], [3, 3]]})
    ours = randomise(SwinHFForImageClassification(config))
    state = {k: t for k, t in export_checkpoint(ours, "timm").items()}
    found = load_checkpoint(state, image_size=24)
    assert found.config.window_size == [[4, 4], [4, 4], [3, 3]]
    with pytest.raises(ValueError, match="transformers layout cannot hold this model: it has one square window"):
        export_checkpoint(found, "transformers")
    stretched = load_checkpoint(state, window_size=4)
    assert export_checkpoint(stretched, "transformers")
    with torch.inference_mode():  # our model shrinks the window again, to the central part of a stretched table
        assert stretched(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 5)


def test_another_window_is_resampled():
    from swin_hf.model.resizing import resize_bias_table

    state = peer("timm").state
    asked = SwinHFConfig(**{**SQUARE, "image_size": 48, "window_size": 6})
    for model in (load_checkpoint(state, config=asked), load_checkpoint(state, image_size=48, window_size=6)):
        assert (model.config.image_size, model.config.window_size) == (48, 6)
        name = "layers.1.blocks.0.attn.relative_position_bias_table"
        expected = resize_bias_table(state[name], (4, 4), (6, 6))
        assert torch.equal(model.swin.stages[1].blocks[0].attention.relative_position_bias_table, expected)


def test_simmim_tables_are_resampled_as_simmim_does():
    from swin_hf.model.resizing import resize_bias_table

    state = peer("microsoft simmim").state
    checkpoint = open_checkpoint(state, image_size=48, window_size=6)
    assert "bias tables resampled from window 4 to 6, geometric" in str(checkpoint)
    table = load_checkpoint(state, image_size=48, window_size=6).swin.stages[0].blocks[0].attention
    expected = resize_bias_table(
        state["encoder.layers.0.blocks.0.attn.relative_position_bias_table"], (4, 4), (6, 6), "geometric"
    )
    assert torch.equal(table.relative_position_bias_table, expected)


def test_decoder_can_be_added_to_a_classifier():
    model = load_checkpoint(peer("timm").state, model_class=SwinHFForMaskedImageModeling)
    mask = torch.ones(1, 256, dtype=torch.bool)
    assert model(torch.zeros(1, 3, 32, 32), mask).reconstruction.shape == (1, 3, 32, 32)


def test_adapters_are_not_mistaken_for_weights():
    adapted = {f"base_model.model.swin.x.lora_{part}.weight": torch.zeros(1) for part in "AB"}
    with pytest.raises(ValueError, match="LoRA adapters; the folder model/ of the run holds them merged"):
        load_checkpoint(adapted)


def test_fresh_head_is_said_in_words(caplog):
    with caplog.at_level(logging.INFO, "swin_hf"):
        model = load_checkpoint(peer("microsoft simmim").state)
    assert "microsoft layout, masked image modeling (SimMIM)" in caplog.text
    assert "freshly initialised and not trained: 2 keys: classifier.bias, classifier.weight" in caplog.text
    assert "decoder.0.bias, decoder.0.weight, swin.embeddings.mask_token" in caplog.text
    assert 0 < model.classifier.weight.std() < 0.05 and not model.classifier.bias.any()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_detector_becomes_a_classifier_with_its_last_norm():
    model = load_checkpoint(peer("openmmlab detector").state)
    assert torch.equal(model.swin.norm.weight, torch.full((32,), 1.5))


def test_averaged_index_buffer_is_noticed(caplog):
    state = {key: tensor.clone() for key, tensor in peer("torchvision").state.items()}
    state["features.3.1.attn.relative_position_index"][7] -= 1
    model = load_checkpoint(state)
    assert "relative position index of 1 blocks (first: stage 2, block 2)" in caplog.text
    with torch.inference_mode():
        expected = load_checkpoint(peer("torchvision").state)(torch.ones(1, 3, 32, 32)).logits
        torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)).logits, expected)


# ---------------------------------------------------------------------------------------------- beside the weights


def test_config_of_transformers_beside_the_weights_is_used(tmp_path):
    theirs = transformers_swin("SwinForImageClassification")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.update(id2label={str(i): f"class {i}" for i in range(5)}, image_size=40, layer_norm_eps=1e-6)
    path.write_text(json.dumps(config))

    ours = load_checkpoint(tmp_path).config
    assert (ours.image_size, ours.layer_norm_eps, ours.id2label[3]) == (40, 1e-6, "class 3")
    assert ours.label2id["class 4"] == 4

    config["embed_dim"] = 16
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json contradicts the weights: embed_dim is 16 there but 8"):
        load_checkpoint(tmp_path)


def test_config_of_a_stranger_beside_a_file_is_ignored(weights_file, caplog):
    (weights_file.parent / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    assert load_checkpoint(weights_file).config.image_size == 32
    (weights_file.parent / "config.json").write_text(json.dumps({"model_type": "swin", "embed_dim": 96}))
    assert load_checkpoint(weights_file).config.embed_dim == 8
    assert "is ignored, it is of another model: embed_dim is 96 there but 8 in the weights" in caplog.text
    (weights_file.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON .* repair or remove it"):
        load_checkpoint(weights_file)


def test_config_of_timm_and_classes_of_openmmlab(tmp_path):
    folder = tmp_path / "timm"
    folder.mkdir()
    safetensors.torch.save_file(peer("timm rectangle").state, folder / "model.safetensors")
    names = [f"n{number}" for number in range(5)]
    timm_config = {
        "architecture": "swin_tiny_patch4_window7_224",
        "label_names": names,
        "label_descriptions": {"n2": "tench"},
        "model_args": {"window_size": [4, 3]},
        "pretrained_cfg": {"input_size": [3, 32, 48], "crop_pct": 0.8, "mean": [0.1] * 3, "std": [0.2] * 3},
    }
    (folder / "config.json").write_text(json.dumps(timm_config))
    ours = open_checkpoint(folder)
    assert (ours.config.image_size, ours.config.window_size) == ([32, 48], [4, 3])
    assert ours.config.id2label == {0: "n0", 1: "n1", 2: "tench", 3: "n3", 4: "n4"}
    written = convert_checkpoint(folder, tmp_path / "out", to="swin_hf")
    transform = json.loads((written / "preprocessor_config.json").read_text())
    assert transform["size"] == {"shortest_edge": 60} and transform["image_mean"] == [0.1] * 3

    meta = {"dataset_meta": {"classes": tuple(names)}}
    assert load_checkpoint({"meta": meta, "state_dict": peer("openmmlab").state}).config.id2label[1] == "n1"
    again = convert_checkpoint(written, tmp_path / "mm", to="openmmlab", config=None, window_size=4, image_size=32)
    assert torch.load(again / "model.pth")["meta"]["dataset_meta"]["classes"][2] == "tench"


def test_folders(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json; save a model into it with save_pretrained first"):
        load_checkpoint(tmp_path)
    state = peer("timm").state
    names = sorted(state)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, keys in parts.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, tmp_path / file)
    with pytest.raises(ValueError, match=r"there is 2 of them \(a\.safetensors, b\.safetensors\)"):
        load_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    assert torch.equal(load_checkpoint(tmp_path).classifier.bias, state["head.fc.bias"])
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/weights.safetensors"}}))
    with pytest.raises(ValueError, match=r"points to .*anything else is refused"):
        load_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------- unsafe, broken


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["SWIN_HF_BOMB"]),))


def test_pickle_with_code_is_refused_unread(tmp_path, monkeypatch):
    crater = tmp_path / "crater"
    monkeypatch.setenv("SWIN_HF_BOMB", str(crater))
    torch.save({"model": peer("timm").state, "hook": Bomb()}, tmp_path / "zip.pth")
    torch.save({"hook": Bomb()}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"hook": Bomb()}, protocol=2))
    for name in ("zip.pth", "legacy.pth", "plain.bin"):
        with pytest.raises(ValueError, match=r"(refused unread|cannot be read safely|can be read safely)"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds code or objects \(.*pathlib.*\) and was refused unread; nothing"):
        load_checkpoint(tmp_path / "zip.pth")
    assert not crater.exists()
    pickle.loads(pickle.dumps({"hook": Bomb()}))
    assert crater.exists()  # the bomb is a real one


def test_settings_of_training_programs_are_left_out(tmp_path, monkeypatch):
    """Microsoft's trainer keeps a yacs CfgNode, mmengine arrays and paths; neither is imported, none is needed."""

    class CfgNode(dict):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.__dict__["frozen"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", yacs)
        patch.setitem(sys.modules, "yacs.config", config)
        content = {
            "model": peer("microsoft").state,
            "config": CfgNode(MODEL=CfgNode(TYPE="swin")),
            "path": Path("/somewhere"),
            "history": np.arange(3.0),
            "loss": np.float64(0.5),
        }
        torch.save(content, tmp_path / "epoch.pth")
    assert "yacs" not in sys.modules
    assert load_checkpoint(tmp_path / "epoch.pth").config.image_size == 32
    assert "yacs" not in sys.modules


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
def test_empty_file(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.touch()
    with pytest.raises(ValueError, match=r"is empty \(0 bytes\); download or copy it again"):
        load_checkpoint(path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_cut_short(tmp_path, suffix, share):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(peer("timm").state, path)
    else:
        torch.save(peer("timm").state, path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=r"is damaged or cut short|can be read safely"):
        load_checkpoint(path)


def test_what_is_no_weights_is_named(tmp_path):
    cases = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "is a Git LFS pointer",
        b"<!doctype html><title>404</title>": "is a web page",
        b"hello": "is neither safetensors nor written by torch.save; give the file of the state dict",
        b"\x89HDF\r\n\x1a\n" * 99: "is neither safetensors nor written by torch.save",
        b"\x80\x02hello": "damaged or cut short|can be read safely",
    }
    for content, message in cases.items():
        (tmp_path / "model.pth").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "model.pth")
    np.savez(tmp_path / "model.npz", weight=np.zeros(3))
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(1),)), tmp_path / "model.pt2")
    for name in ("model.npz", "model.pt2"):
        with pytest.raises(ValueError, match=r"is an archive, but not one of torch\.save; give the file of the state"):
            load_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_checkpoint(tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds no state dict; its top level has epoch, lr"):
        load_checkpoint({"epoch": 1, "lr": 0.1})
    with pytest.raises(ValueError, match="holds no state dict; its top level has nothing"):
        load_checkpoint({})
    with pytest.raises(ValueError, match=r"holds more than tensors \(b\)"):
        load_checkpoint({"model": {"a": torch.zeros(1), "b": 2}})
    with pytest.raises(FileNotFoundError, match="does not exist; give the folder of a model"):
        load_checkpoint(tmp_path / "nowhere.pth")


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("to", ["swin_hf", "microsoft"])
@pytest.mark.parametrize("name", ["folder", "new/swin.safetensors", "swin.pth"])
def test_no_space_leaves_nothing_behind(weights_file, tmp_path, to, name):
    with files_of_at_most(20_000), pytest.raises(OSError, match=r"cannot be written: the file is larger .* free there"):
        convert_checkpoint(weights_file, tmp_path / name, to=to)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["in/swin.pth"]


def test_no_space_spares_what_was_there(weights_file, tmp_path):
    old = convert_checkpoint(weights_file, tmp_path / "out", to="swin_hf")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with files_of_at_most(20_000), pytest.raises(OSError, match="cannot be written"):
        convert_checkpoint(weights_file, old, to="swin_hf", overwrite=True)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


@pytest.mark.parametrize("name", ["folder", "swin.pth"])
def test_no_permission_leaves_nothing_behind(weights_file, tmp_path, name):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # to root nothing is forbidden: become nobody for a moment, who may look but not write
        for folder in tmp_path.parents:
            if folder.stat().st_uid == 0 and folder != Path("/") and str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        tmp_path.chmod(0o755)
    checkpoint = open_checkpoint(weights_file)
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot be written .*Permission denied.* choose a folder"):
            convert_checkpoint(checkpoint, locked / name, to="timm")
    finally:
        os.seteuid(user)
    assert not list(locked.iterdir())


def test_destination_that_exists_is_refused(weights_file, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "one" / "swin.safetensors"
    for destination in (folder, file):
        convert_checkpoint(weights_file, destination, to="timm")
        with pytest.raises(FileExistsError, match=r"exists; choose another destination, or pass overwrite"):
            convert_checkpoint(weights_file, destination, to="swin_hf")
    (folder / "notes.txt").write_text("mine")
    convert_checkpoint(weights_file, folder, to="swin_hf", overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert open_checkpoint(folder).place.layout.name == "swin_hf"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "preprocessor_config.json",
    ]
    (file.parent / "swin.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"config\.json, .*preprocessor_config\.json exists"):
        convert_checkpoint(weights_file, file, to="timm")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("destination", ["theirs/new.safetensors", "theirs"])
def test_configuration_of_another_model_is_never_replaced(weights_file, tmp_path, name, destination, overwrite):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / name).write_text('{"of": "another"}')
    (theirs / "pytorch_model.bin").write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        convert_checkpoint(weights_file, tmp_path / destination, to="swin_hf", overwrite=overwrite)
    assert (theirs / name).read_text() == '{"of": "another"}' and len(list(theirs.iterdir())) == 2


def test_weights_without_a_configuration_may_have_new_neighbours(weights_file, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"theirs")
    before = set(tmp_path.iterdir())
    convert_checkpoint(weights_file, tmp_path / "new.pth", to="timm")
    written = {path.name for path in set(tmp_path.iterdir()) - before}
    assert written == {"config.json", "preprocessor_config.json", "new.pth"}
    assert (tmp_path / "other.pth").read_bytes() == b"theirs"
    with pytest.raises(FileExistsError, match=r"holds new.pth, other.pth, to which its config.json and .*may belong"):
        convert_checkpoint(weights_file, tmp_path / "newer.pth", to="timm", overwrite=True)


@pytest.mark.parametrize("name", ["folder", "sub/swin.safetensors", "swin.pth"])
def test_convert_command_names_every_file_it_writes(weights_file, tmp_path, capsys, name):
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["convert", str(weights_file), str(tmp_path / name), "--to", "timm"]) == 0
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    said = capsys.readouterr().out.partition("written (timm):")[2].split()
    assert sorted(said) == sorted(map(str, written)) and len(said) == 3


def test_what_a_layout_cannot_hold_is_refused(tmp_path, tiny_model, caplog):
    with pytest.raises(ValueError, match="unknown layout 'keras'; choose one of"):
        export_checkpoint(tiny_model, "keras")
    with pytest.raises(ValueError, match=r"the microsoft layout cannot hold this model: it has one square .* 4x3"):
        export_checkpoint(tiny_model, "microsoft")
    with pytest.raises(ValueError, match="Linear is not a model of this package"):
        export_checkpoint(torch.nn.Linear(1, 1), "timm")
    mim = SwinHFForMaskedImageModeling(SwinHFConfig(**SQUARE))
    with pytest.raises(ValueError, match=r"timm layout has no masked image modeling .* model_class="):
        export_checkpoint(mim, "timm")
    positions = SwinHFForImageClassification(SwinHFConfig(**SQUARE, use_absolute_embeddings=True))
    with pytest.raises(
        ValueError, match=r"timm layout has no name for our 1 key: swin\.embeddings\.position_embeddings"
    ):
        export_checkpoint(positions, "timm")
    partial = SwinHFBackbone(SwinHFConfig(**SQUARE, out_features=["stage2"]))
    with pytest.raises(ValueError, match=r"it has a norm for every stage, the model has \['stage2'\]"):
        export_checkpoint(partial, "maskformer-swin")
    with pytest.raises(ValueError, match="unknown layout 'keras'"):
        convert_checkpoint(peer("timm").state, tmp_path / "x", to="keras")
    with pytest.raises(ValueError, match=r"only Lightning writes \.ckpt files"):
        convert_checkpoint(peer("timm").state, tmp_path / "x.ckpt", to="timm")
    assert not caplog.text
    two_stages = {**RECTANGLE, "shift_per_axis": False, "mask_padding": True, "layer_norm_eps": 1e-6}
    export_checkpoint(SwinHFForImageClassification(SwinHFConfig(**two_stages, hidden_act="relu")), "timm")
    assert "the 4x6 map of stage 3 is covered by its window on one axis only" in caplog.text
    assert "mask_padding is on" in caplog.text and "hidden_act is 'relu'" in caplog.text
    assert "layer_norm_eps is 1e-06, it has 1e-05;" in caplog.text.replace("\n", ";")
    caplog.clear()
    fields = {**SQUARE, "layer_norm_eps": 1e-6, "hidden_act": "relu"}
    export_checkpoint(SwinHFForImageClassification(SwinHFConfig(**fields)), "transformers")
    assert "it has 1e-05 in the embedding and between the stages" in caplog.text and "hidden_act" not in caplog.text


# -------------------------------------------------------------------------------------------- evaluation transform


def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((600, 450), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("size", "steps"), [(224, "crop"), (384, "squash"), (256, "crop")])
def test_transform_is_that_of_the_original_evaluation(tmp_path, size, steps):
    """Short side 256 of 224 and a centre crop, or squashed at 384: data/build.py of Microsoft."""
    from transformers import AutoImageProcessor

    folder = convert_checkpoint(peer("timm").state, tmp_path / "out", to="swin_hf", image_size=size)
    processor = AutoImageProcessor.from_pretrained(folder)
    ours = processor(picture(), return_tensors="pt")["pixel_values"][0]

    short = int(256 / 224 * size)
    bicubic = v2.InterpolationMode.BICUBIC
    resize = [v2.Resize(short, bicubic), v2.CenterCrop(size)] if steps == "crop" else [v2.Resize((size, size), bicubic)]
    normalise = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    reference = v2.Compose([v2.PILToTensor(), *resize, v2.ToDtype(torch.float32, scale=True), normalise])(picture())
    assert ours.shape == (3, size, size)
    assert (ours - reference).abs().max() < 2 / 255 / 0.224  # rounding of one grey level here or there


def test_torchvision_weights_keep_their_own_transform():
    from swin_hf.checkpoints.preprocessing import processor_values
    from swin_hf.checkpoints.verify import build_peer

    for preset, short in (("tiny", 232), ("small", 246), ("base", 238)):
        config = SwinHFConfig.from_preset(f"swin_{preset}_patch4_window7_224")
        with torch.device("meta"):
            state = build_peer("torchvision", config).state_dict()
        checkpoint = open_checkpoint(state)
        assert processor_values(checkpoint, checkpoint.config)["size"] == {"shortest_edge": short}


def test_transform_beside_the_weights_is_kept(weights_file, tmp_path):
    own = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    (weights_file.parent / "preprocessor_config.json").write_text(json.dumps(own))
    folder = convert_checkpoint(weights_file, tmp_path / "out", to="timm")
    assert json.loads((folder / "preprocessor_config.json").read_text()) == own
    assert list(image_processor(own).image_mean) == [0.5] * 3


def test_transform_beside_the_weights_is_not_kept_for_another_image_size(weights_file, tmp_path):
    own = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    (weights_file.parent / "preprocessor_config.json").write_text(json.dumps(own))
    folder = convert_checkpoint(weights_file, tmp_path / "out", to="timm", image_size=48)
    processor = image_processor(json.loads((folder / "preprocessor_config.json").read_text()))
    assert processor(Image.new("RGB", (60, 50)), return_tensors="pt")["pixel_values"].shape[-2:] == (48, 48)


def test_unknown_normalisation_is_not_guessed(tmp_path, caplog):
    grey = SwinHFForImageClassification(SwinHFConfig(**SQUARE, num_channels=1))
    folder = convert_checkpoint(grey.state_dict(), tmp_path / "out", to="timm")
    assert "how images of 1 channels were normalised is not known" in caplog.text
    assert not (folder / "preprocessor_config.json").exists()


# ---------------------------------------------------------------------------------------------------- command line


def test_convert_command(weights_file, tmp_path, capsys):
    picture().save(tmp_path / "picture.png")
    for to, library in (("torchvision", "torchvision"), ("timm", "timm"), ("transformers", "transformers")):
        arguments = [str(weights_file), str(tmp_path / to), "--to", to, "--verify", str(tmp_path / "picture.png")]
        assert main(["convert", *arguments]) == 0
        output = capsys.readouterr().out
        assert "microsoft layout, classifier" in output and f"verified with {library}: largest difference" in output
    assert main(["convert", *arguments]) == 2
    assert "exists; choose another destination" in capsys.readouterr().err
    assert main(["convert", *arguments, "--overwrite", "--window-size", "6", "--image-size", "48"]) == 0
    assert "resampled from window 4 to 6" in capsys.readouterr().out
    assert main(["convert", *arguments, "--window-size", "1", "2", "3"]) == 2
    assert "--window-size has 3 sides; give one for a square" in capsys.readouterr().err


def test_convert_command_reports_a_library_that_cannot_run_the_model(tmp_path, capsys):
    """transformers looks a whole table up for a window that it has shrunk to the map of 2x2 tokens."""
    SwinHFForImageClassification(SwinHFConfig(**{**SQUARE, "image_size": 16})).save_pretrained(tmp_path / "ours")
    picture().save(tmp_path / "a.png")
    arguments = [str(tmp_path / "ours"), str(tmp_path / "theirs"), "--verify", str(tmp_path / "a.png")]
    assert main(["convert", *arguments, "--to", "transformers"]) == 1
    said = capsys.readouterr()
    assert "verified with swin_hf: largest difference 0.00e+00" in said.out
    assert "verified with transformers: largest difference inf" in said.out


def test_convert_command_cannot_verify_what_it_cannot_normalise(tmp_path, capsys):
    grey = SwinHFForImageClassification(SwinHFConfig(**SQUARE, num_channels=1))
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    picture().save(tmp_path / "picture.png")
    arguments = [str(tmp_path / "grey.pth"), str(tmp_path / "x"), "--to", "timm"]
    assert main(["convert", *arguments, "--verify", str(tmp_path / "picture.png")]) == 2
    assert "--verify needs the normalisation of images of 1 channels" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_output_of_a_stranger_is_refused():
    from swin_hf.checkpoints.verify import output_of

    class Stranger(torch.nn.Linear):
        dtype = torch.float32

    with pytest.raises(TypeError, match="Tensor is not an output of this package"):
        output_of(Stranger(2, 2), torch.zeros(1, 2))


def test_convert_command_asks_the_library_of_the_source_too(tmp_path, capsys):
    """timm pads a map of 10 tokens after the shift: the weights are the same, the logits are not."""
    config = SwinHFConfig(**{**SQUARE, "image_size": 40, "window_size": 4, "shift_per_axis": True})
    torch.manual_seed(0)
    model = SwinHFForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias_table" in name or "classifier" in name:
                parameter.normal_()
    convert_checkpoint(model.state_dict(), tmp_path / "timm", to="timm", config=config)
    picture().save(tmp_path / "a.png")
    arguments = ["--to", "swin_hf", "--verify", str(tmp_path / "a.png")]
    assert main(["convert", str(tmp_path / "timm"), str(tmp_path / "ours"), *arguments]) == 1
    said = capsys.readouterr()
    (difference,) = re.findall(r"verified with swin_hf: largest difference (\S+)", said.out)
    assert float(difference) < PARITY["atol"]  # weights of a file and in memory are aligned differently
    assert "verified with the source's library, timm: largest difference" in said.out
    assert "on one picture of 40x40 pixels" in said.out and "is padded to whole windows" in said.out


def test_convert_command_reports_a_difference(weights_file, tmp_path, capsys, monkeypatch):
    """A file that is changed between writing and verifying: the exit code says so."""
    from swin_hf.checkpoints import convert as room

    written = room.write_files

    def damaged(destination, weights, state, *others):
        state["head.fc.bias"] += 1
        return written(destination, weights, state, *others)

    monkeypatch.setattr(room, "write_files", damaged)
    picture().save(tmp_path / "picture.png")
    arguments = [str(weights_file), str(tmp_path / "x"), "--to", "timm", "--verify", str(tmp_path / "picture.png")]
    assert main(["convert", *arguments]) == 1
    assert "the outputs differ by more than" in capsys.readouterr().err


def test_info_command(weights_file, capsys):
    assert main(["info", str(weights_file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["image size"], facts["classes"]["count"]) == ("microsoft", 32, 5)
    assert facts["parameters"] == sum(tensor.numel() for tensor in peer("timm").state.values())
    assert main(["info", str(weights_file)]) == 0
    output = capsys.readouterr().out
    assert "attention backend" in output and "not triton" in output
    assert main(["info", str(weights_file.parent / "nowhere.pth")]) == 2
    assert "does not exist" in capsys.readouterr().err


# huggingface_hub 2.4 hands its HTTP client raw bytes when it uploads.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_info_of_a_hub_id_reads_the_header_only(hub, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url)
    folder = convert_checkpoint(peer("timm").state, tmp_path / "timm", to="timm")
    for name in ("weights", "nothing"):
        api.create_repo(f"user/{name}")
    api.upload_folder(repo_id="user/weights", folder_path=folder)
    api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id="user/nothing")

    def info(*arguments):
        """A process of its own: the client reads HF_ENDPOINT when it is imported."""
        command = [sys.executable, "-m", "swin_hf.cli", "info", *arguments]
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    facts = json.loads(info("user/weights", "--json").stdout)
    assert (facts["layout"], facts["image size"], facts["classes"]["count"]) == ("timm", 32, 5)
    assert facts["parameters"] == sum(tensor.numel() for tensor in peer("timm").state.values())
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix == ".safetensors"]
    nothing = info("user/nothing")
    assert nothing.returncode == 2 and "holds no config.json and no model.safetensors" in nothing.stderr
    nowhere = info("user/nowhere")
    assert nowhere.returncode == 2 and "user/nowhere" in nowhere.stderr


def test_flops_are_those_of_the_paper():
    """Table 1: 4.5 G multiply-adds of Swin-T at 224, 15.4 G of Swin-B; 47.0 G at 384."""
    from swin_hf.cli.info import describe

    for preset, billions in (("tiny_patch4_window7_224", 4.5), ("base_patch4_window12_384", 47.1)):
        with torch.device("meta"):
            model = SwinHFForImageClassification(SwinHFConfig.from_preset(f"swin_{preset}"))
        facts = describe(open_checkpoint(export_checkpoint(model, "microsoft")))
        assert facts["multiply-adds"] / 1e9 == pytest.approx(billions, abs=0.06)


def test_kinds_are_all_known():
    assert {kind for layout in LAYOUTS.values() for kind in layout.trunks} == set(Kind)


def test_the_preprocessing_of_a_checkpoint_is_saved_with_the_model(tmp_path):
    """torchvision's Swin-T is evaluated with a short side of 232 pixels, which no default of ours has."""
    import torchvision

    load_checkpoint(torchvision.models.swin_t(weights=None).state_dict()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    transform = torchvision.models.Swin_T_Weights.IMAGENET1K_V1.transforms()
    assert (saved["size"], saved["crop_size"]) == (
        {"shortest_edge": transform.resize_size[0]},
        {"height": transform.crop_size[0], "width": transform.crop_size[0]},
    )
    assert (saved["image_mean"], saved["image_std"]) == (transform.mean, transform.std)
