"""The configuration of V2: its fields, its presets, and what it refuses."""

import pytest
import torch

from swin_hf import (
    SwinHFConfig,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
    list_presets,
)
from swin_hf.families import FAMILIES

# Of a classifier: the table of the fact sheet, which Microsoft, timm and transformers agree on.
PARAMETERS = {
    "tiny": {1000: 28_347_154, 21841: 44_373_883},
    "small": {1000: 49_728_418, 21841: 65_755_147},
    "base": {1000: 87_918_816, 21841: 109_280_841},
    "large": {1000: 196_739_932, 21841: 228_772_549},
}
RELEASED = [
    name
    for name in list_presets("swinv2_hf")
    if not any(word in name for word in ("digits", "fashion", "huge", "giant"))
]


def test_defaults_are_those_of_transformers():
    from transformers import Swinv2Config

    ours, theirs = SwinV2HFConfig().to_dict(), Swinv2Config().to_dict()
    derived = {"model_type", "num_layers", "hidden_size", "stage_names"}
    assert {name: value for name, value in theirs.items() if name not in derived} == {
        name: ours[name] for name in theirs if name not in derived
    }


def test_takes_the_dictionary_of_a_transformers_config():
    from transformers import Swinv2Config

    theirs = Swinv2Config(embed_dim=64, depths=[2, 2], num_heads=[2, 4], window_size=8, image_size=64).to_dict()
    ours = SwinV2HFConfig(**{name: value for name, value in theirs.items() if name != "model_type"})
    assert ours.pretrained_window_sizes == [0, 0]  # theirs has four zeros, whatever the depths
    assert (ours.embed_dim, ours.depths, ours.window_size, ours.image_size) == (64, [2, 2], 8, 64)


def test_a_round_trip_changes_nothing(tmp_path):
    config = SwinV2HFConfig.from_preset("swinv2_base_patch4_window12to16_192to256_22kto1k_ft", norm_features=False)
    config.save_pretrained(tmp_path)
    again = SwinV2HFConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.pretrained_window_sizes == [12, 12, 12, 6]


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({"image_size": 256, "window_size": 8}, [8, 8, 8, 8]),
        ({"image_size": 256, "window_size": 16}, [16, 16, 16, 8]),
        ({"image_size": 192, "window_size": 12}, [12, 12, 12, 6]),
        ({"image_size": 384, "window_size": 24}, [24, 24, 24, 12]),
        ({"image_size": 384, "window_size": 24, "pretrained_window_sizes": (12, 12, 12, 6)}, [12, 12, 12, 6]),
        ({"image_size": 384, "window_size": 24, "pretrained_window_sizes": (12, 0, 12, 6)}, [12, 24, 12, 6]),
    ],
)
def test_offsets_are_divided_by_the_pretrained_or_the_effective_window(fields, units):
    assert SwinV2HFConfig(**fields).bias_units == tuple((unit, unit) for unit in units)


def test_units_of_a_rectangle_are_counted_for_each_axis():
    fields = {"image_size": (64, 32), "window_size": (8, 4), "depths": (1, 1, 1), "num_heads": (3, 6, 12)}
    assert SwinV2HFConfig(**fields).bias_units == ((8, 4), (8, 4), (4, 2))
    stored = SwinV2HFConfig(**fields, pretrained_window_sizes=((8, 2), 4, 0))
    assert stored.pretrained_window_sizes == [[8, 2], 4, 0]
    assert stored.bias_units == ((8, 2), (4, 4), (4, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrained_window_sizes": (12, 12, 12, 12, 6)}, r"\[12, 12, 12, 12, 6\] has 5 entries for 4 stages"),
        ({"pretrained_window_sizes": (12, 12)}, r"pretrained_window_sizes \[12, 12\] has 2 entries for 4 stages"),
        ({"pretrained_window_sizes": 12}, "pretrained_window_sizes is 12; give a list with an entry for each stage"),
        ({"pretrained_window_sizes": (12, -1, 12, 6)}, "pretrained_window_sizes of stage 2 is -1; it must be"),
        ({"pretrained_window_sizes": (12, 12, 1.5, 6)}, "pretrained_window_sizes of stage 3 is 1.5; it must be"),
        ({"pretrained_window_sizes": (False, 0, 0, 0)}, "pretrained_window_sizes of stage 1 is False; it must be"),
        ({"extra_norm_every_n_blocks": -6}, "extra_norm_every_n_blocks is -6; give a number of blocks, or 0 for no"),
        ({"extra_norm_every_n_blocks": True}, "extra_norm_every_n_blocks is True; give a number of blocks, or 0"),
        ({"norm_features": "yes"}, "norm_features is 'yes'; it must be of type bool"),
        (
            {"image_size": 32, "window_size": 16},
            r"window_size 16 is larger than the map of the first stage, 8x8 tokens \(image_size 32, patch_size 4\)",
        ),
    ],
)
def test_bad_values_say_what_was_given(fields, message):
    with pytest.raises(ValueError, match=message):
        SwinV2HFConfig(**fields)


def test_a_near_miss_names_the_field():
    with pytest.raises(TypeError, match="'pretrained_window_size'; did you mean 'pretrained_window_sizes'"):
        SwinV2HFConfig(pretrained_window_size=[12, 12, 12, 6])


@pytest.mark.parametrize("field", ["pretrained_window_sizes", "norm_features", "extra_norm_every_n_blocks"])
def test_a_field_of_v2_in_a_configuration_of_v1_is_refused(field):
    with pytest.raises(TypeError, match=f"'{field}' is a field of Swin Transformer V2, not of V1; use SwinV2HFConfig"):
        SwinHFConfig(**{field: True})


def test_a_scale_of_v1_in_a_configuration_of_v2_is_refused():
    with pytest.raises(TypeError, match="'qk_scale' is of Swin Transformer V1; each head of V2 learns its scale"):
        SwinV2HFConfig(qk_scale=0.125)
    assert SwinV2HFConfig(qk_scale=None).window_size == 7  # what Microsoft's configurations say of V1 too


@pytest.mark.parametrize(
    ("config_class", "model_type", "right"),
    [
        (SwinHFConfig, "swinv2_hf", "SwinV2HF"),
        (SwinHFConfig, "swinv2", "SwinV2HF"),
        (SwinV2HFConfig, "swin_hf", "SwinHF"),
        (SwinV2HFConfig, "swin", "SwinHF"),
    ],
)
def test_the_configuration_of_the_other_version_is_refused(config_class, model_type, right, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    message = f"type '{model_type}' and {config_class.__name__} of '{config_class.model_type}'.* begin with {right}"
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("task", ["features", "image-classification", "backbone", "semantic-segmentation"])
@pytest.mark.parametrize(
    ("family", "other", "words"), [("swin_hf", SwinV2HFConfig, "V1"), ("swinv2_hf", SwinHFConfig, "V2")]
)
def test_a_model_is_not_built_from_the_configuration_of_the_other_version(family, other, words, task):
    model_class = FAMILIES[family].model_class(task)
    message = f"{model_class.__name__} is a Swin Transformer {words} and was given a {other.__name__}; give a"
    with pytest.raises(ValueError, match=message):
        model_class(other(depths=(1, 1), num_heads=(1, 1), embed_dim=8))


def test_there_are_ten_fine_tuned_presets_and_two_of_22k():
    assert len(RELEASED) == 12
    assert [name for name in RELEASED if name.endswith("_22k")] == [
        "swinv2_base_patch4_window12_192_22k",
        "swinv2_large_patch4_window12_192_22k",
    ]


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_exactly_the_published_parameters(name):
    config = SwinV2HFConfig.from_preset(name)
    with torch.device("meta"):
        model = SwinV2HFForImageClassification(config)
    classes = 21841 if name.endswith("_22k") else 1000
    assert model.num_parameters() == PARAMETERS[name.split("_")[1]][classes]
    assert str(config.image_size) in name and str(config.window_size) in name
    pretrained = [12, 12, 12, 6] if "12to" in name else [0, 0, 0, 0]
    assert config.pretrained_window_sizes == pretrained


@pytest.mark.parametrize(
    ("name", "norms", "published"),
    [("huge", {2: [5, 11, 17]}, 658e6), ("giant", {2: [5, 11, 17, 23, 29, 35, 41]}, 3.0e9)],
)
def test_the_largest_presets_have_the_extra_norms_and_nearly_the_parameters_of_the_paper(name, norms, published):
    """658 M and 3.0 B, as the paper rounds them; it gives no heads."""
    config = SwinV2HFConfig.from_preset(f"swinv2_{name}_patch4_window12_192")
    with torch.device("meta"):
        model = SwinV2HFForImageClassification(config)
    assert model.num_parameters() == pytest.approx(published, rel=0.005)
    found = {
        stage: extra
        for stage, layers in enumerate(model.swin.stages)
        if (extra := [number for number, block in enumerate(layers.blocks) if hasattr(block.norm3, "weight")])
    }
    assert found == norms
