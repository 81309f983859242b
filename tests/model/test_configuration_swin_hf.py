import json

import pytest
from transformers import AutoConfig, SwinConfig

from swin_hf import SwinHFConfig, SwinHFModel, list_presets

# Parameters of the models that Microsoft published, in millions (README of microsoft/Swin-Transformer).
PUBLISHED = {
    "swin_tiny_patch4_window7_224": 28,
    "swin_small_patch4_window7_224": 50,
    "swin_base_patch4_window7_224": 88,
    "swin_base_patch4_window12_384": 88,
    "swin_large_patch4_window7_224_22k": 229,
}


def test_defaults_are_those_of_transformers():
    ours, theirs = SwinHFConfig(), SwinConfig()
    shared = set(theirs.to_dict()) & set(ours.to_dict()) - {"model_type", "transformers_version", "_name_or_path"}
    assert {"image_size", "embed_dim", "depths", "num_heads", "window_size", "encoder_stride"} <= shared
    ours_json, theirs_json = json.loads(ours.to_json_string(False)), json.loads(theirs.to_json_string(False))
    for name in shared:
        assert ours_json[name] == theirs_json[name], name
    assert ours.hidden_size == theirs.hidden_size == 768


def test_takes_the_dictionary_of_a_transformers_config():
    theirs = SwinConfig(
        image_size=64, depths=[1, 3], num_heads=[2, 4], embed_dim=8, out_features=["stage1"], num_labels=7
    )
    ours = SwinHFConfig(**{k: v for k, v in theirs.to_dict().items() if k != "model_type"})
    assert (ours.depths, ours.num_heads, ours.out_indices, ours.num_labels) == ([1, 3], [2, 4], [1], 7)


def test_derived_sizes(awkward_config):
    assert awkward_config.image_hw == (30, 46)
    assert awkward_config.patch_hw == (2, 2)
    assert awkward_config.grid_hw == (15, 23)
    assert awkward_config.stage_dims == (16, 32, 64)
    assert awkward_config.hidden_size == 64
    assert awkward_config.num_hidden_layers == 3
    assert awkward_config.stage_windows == ((7, 7),) * 3
    assert SwinHFConfig(image_size=33, patch_size=4).grid_hw == (9, 9)


@pytest.mark.parametrize(
    ("window_size", "expected"),
    [
        (5, ((5, 5),) * 3),
        ((4, 6), ((4, 6),) * 3),
        ([[8, 8], [4, 6], [2, 2]], ((8, 8), (4, 6), (2, 2))),
        ([8, 4, 2], ((8, 8), (4, 4), (2, 2))),
        ([8, (4, 6), 2], ((8, 8), (4, 6), (2, 2))),
    ],
)
def test_window_forms(window_size, expected):
    config = SwinHFConfig(embed_dim=16, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=window_size)
    assert config.stage_windows == expected


def test_stochastic_depth_grows_linearly_over_all_blocks():
    config = SwinHFConfig(depths=[2, 1, 2], num_heads=[1, 1, 1], drop_path_rate=0.4)
    rates = [rate for stage in config.drop_path_rates for rate in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert SwinHFConfig(depths=[1], num_heads=[3], drop_path_rate=0.4).drop_path_rates == ((0.0,),)


def test_heads_left_out_have_32_channels_each():
    assert SwinHFConfig(embed_dim=128).num_heads == [4, 8, 16, 32]
    assert SwinHFConfig(embed_dim=100).num_heads == [2, 4, 8, 16]  # 3 does not divide 100
    assert SwinHFConfig(embed_dim=37).num_heads == [1, 2, 4, 8]


def test_a_round_trip_changes_nothing(tmp_path, tiny_config):
    tiny_config.window_size = (4, 3)  # set later, as transformers' from_pretrained(window_size=...) does
    tiny_config.save_pretrained(tmp_path / "folder")
    again = AutoConfig.from_pretrained(tmp_path / "folder")
    assert isinstance(again, SwinHFConfig)
    assert again.to_dict() == tiny_config.to_dict() | {"_name_or_path": str(tmp_path / "folder")}
    assert again.image_size == [32, 48]
    assert SwinHFConfig(**tiny_config.to_diff_dict()).to_dict() == tiny_config.to_dict()
    assert json.loads(tiny_config.to_json_string())["window_size"] == [4, 3]


def test_labels_follow_num_labels():
    config = SwinHFConfig(num_labels=5)
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3


def test_backbone_fields_keep_each_other_aligned():
    config = SwinHFConfig(out_features=["stage2", "stage4"])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.out_indices == [2, 4]
    config.out_indices = [1, -1]
    assert config.out_features == ["stage1", "stage4"]
    config.out_features = None
    assert config.out_indices == [4]
    assert SwinHFConfig(out_indices=[0, 1, 2, 3]).out_features == ["stem", "stage1", "stage2", "stage3"]


def test_is_silent_and_keeps_unknown_fields(caplog):
    config = SwinHFConfig(path_norm=True, layer_norm_epsilon=1.0)
    assert config.path_norm and config.layer_norm_epsilon == 1.0
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "right"),
    [("windw_size", "window_size"), ("depth", "depths"), ("num_label", "num_labels"), ("out_feature", "out_features")],
)
def test_a_near_miss_names_the_field(name, right):
    with pytest.raises(TypeError, match=f"unknown config field '{name}'; did you mean '{right}'"):
        SwinHFConfig(**{name: 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size is 0; it must be a positive integer"),
        ({"image_size": [32, -1]}, "image_size is -1; it must be a positive"),
        ({"patch_size": [2, 2, 2]}, r"patch_size is \[2, 2, 2\]; give one integer or \(height, width\)"),
        ({"num_channels": 0}, "num_channels is 0; it must be"),
        ({"embed_dim": -96}, "embed_dim is -96; it must be"),
        ({"depths": [2, 0, 2, 2]}, "depths of stage 2 is 0; it must be"),
        ({"depths": []}, r"depths is \[\]; give a list"),
        ({"depths": [2, 2]}, r"depths \[2, 2\] has 2 stages but num_heads \[3, 6, 12, 24\] has 4"),
        ({"depths": [2, 1001, 2, 2]}, "depths of stage 2 is 1001; it must be at most 500"),
        ({"depths": [1] * 10**5, "num_heads": [1] * 10**5}, "depths has 100000 stages; a model has at most 16"),
        ({"embed_dim": 2**61 - 1}, "embed_dim is 2305843009213693951; it must be at most 1048576"),
        ({"image_size": [32, 10**9]}, "image_size is 1000000000; it must be at most 1048576"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights is '../x.safetensors'; give the name of"),
        ({"num_heads": [3, 6, 12]}, r"depths \[2, 2, 6, 2\] has 4 stages but num_heads \[3, 6, 12\] has 3"),
        ({"num_heads": [3, 5, 12, 24]}, "num_heads 5 of stage 2 does not divide its 192 channels"),
        ({"window_size": 0}, "window_size is 0; it must be"),
        ({"window_size": [7, -7]}, "window_size is -7; it must be"),
        ({"window_size": [7, 7, 0, 7]}, "window_size of stage 3 is 0; it must be"),
        ({"window_size": [7, 7, 7]}, r"window_size \[7, 7, 7\] has 3 entries for 4 stages"),
        ({"window_size": [[7, 7], [7, 7, 7], [7, 7], [7, 7]]}, r"window_size of stage 2 is \[7, 7, 7\]; give one"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; it is a probability in \[0, 1\)"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob is -0.1; it is a probability"),
        ({"attention_probs_dropout_prob": 1.5}, "attention_probs_dropout_prob is 1.5; it is a probability"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0; it must be positive"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; it must be positive"),
        ({"initializer_range": -0.02}, "initializer_range is -0.02; it must be positive"),
        ({"norm_targets": 8}, "norm_targets is 8; a neighbourhood has an odd side of 3 or more"),
        ({"norm_targets": -3}, "norm_targets is -3; it must be a positive integer"),
        ({"out_features": ["stage9"]}, r"out_features must be a subset .*stage9"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "should correspond to the same stages"),
    ],
)
def test_bad_values_say_what_was_given(fields, message):
    with pytest.raises(ValueError, match=message):
        SwinHFConfig(**fields)


def test_a_model_checks_again(tiny_config):
    tiny_config.num_heads = [3, 2, 4]
    with pytest.raises(ValueError, match="num_heads 3 of stage 1 does not divide its 16 channels"):
        SwinHFModel(tiny_config)


@pytest.mark.parametrize("name", list_presets("swin_hf"))
def test_presets_are_whole(name):
    config = SwinHFConfig.from_preset(name, num_channels=1)
    assert config.num_channels == 1
    assert f"window{config.window_size}" in name
    assert config.image_size % config.window_size == 0
    if "patch" in name:
        assert f"patch{config.patch_size}" in name


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    import torch

    with torch.device("meta"):
        model = SwinHFModel(SwinHFConfig.from_preset(name))
    classes = 21841 if "22k" in name else 1000
    head = (model.config.hidden_size + 1) * classes  # published with the head
    assert round((model.num_parameters() + head) / 1e6) == PUBLISHED[name]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown preset 'swin_tiny_patch4_window7_244'; did you mean 'swin_tiny_patch4_window7_224'"
    ):
        SwinHFConfig.from_preset("swin_tiny_patch4_window7_244")
    with pytest.raises(ValueError, match="'swinv2_tiny_patch4_window8_256'; it is one of SwinV2HFConfig; there are"):
        SwinHFConfig.from_preset("swinv2_tiny_patch4_window8_256")


def test_a_folder_that_is_not_there_is_an_os_error():
    """Its name cannot be that of a repository either, which the client says with a ValueError inside."""
    with pytest.raises(OSError, match="no/such/folder"):
        SwinHFConfig.from_pretrained("./no/such/folder")
