"""Files of strangers: every value in every field is a sentence, and what loading costs is bounded before it begins."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.hub.weights import check_folder, read_config
from swin_hf.model.configuration_swin_hf import FREE_PARAMETERS

FIELDS = [name for name in SwinHFConfig.__dataclass_fields__ if not name.startswith("_")]
GENERAL = ["num_labels", "model_type", "attribute_map", "torch_dtype", "attn_implementation", "_attn_implementation"]
GENERAL += ["out_features", "out_indices", "sub_configs", "to_dict", "stage_dims", "name_or_path", "_name_or_path"]
GENERAL += ["_commit_hash", "transformers_weights", "quantization_config", "per_layer_config", "rope_parameters"]
GENERAL += ["auto_map", "tie_word_embeddings", "use_return_dict", "configuration_files", "output_attentions", "dtype"]
ODD = [None, True, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "", "7", "gelu", [], [7], [[7]], ["a"], {}]
ODD += [{"0": {"a": []}}, {"a": 1}, {"0": None}, [None], [{}], "a" * 10_000]


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **changes) -> None:
    """Change fields of a configuration; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def outcome(load) -> str:
    """What loading ends in: taken, refused in a sentence, or an error that is none."""
    try:
        load()
    except (ValueError, OSError) as error:
        return "refused" if 10 < len(str(error)) < 2000 else f"a sentence of {len(str(error))} characters"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:80]
    return "taken"


def test_every_odd_value_of_a_configuration_is_taken_or_refused_in_a_sentence(folder):
    path, wrong = folder / "config.json", []
    stored = json.loads(path.read_text())
    for field in sorted({*FIELDS, *GENERAL}):
        for value in ODD:
            path.write_text(json.dumps(stored | {field: value}))
            for load in (lambda: read_config(path), lambda: SwinHFConfig.from_pretrained(folder)):
                if (found := outcome(load)) not in ("taken", "refused"):
                    wrong.append((field, str(value)[:20], found))
    assert not wrong


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": {}},
        {"attribute_map": {"image_size": "embed_dim"}},
        {"architectures": 5},
        {"architectures": [[]]},
        {"dtype": "foo"},
        {"mlp_ratio": "4"},
        {"drop_path_rate": float("nan")},
        {"to_dict": 3},
        {"id2label": ["a"]},
        {"num_labels": 10**9, "id2label": None, "label2id": None},
        {"depths": [1, "2", 1]},
        {"model_type": ["swin_hf"]},
        {"norm_targets": 2**70 + 1},
        {"depths": [1000] * 16, "num_heads": [1] * 16},
        {"depths": [10, 480, 10, 1], "num_heads": [1] * 4, "window_size": 4},
        {"window_size": 2**15},
        {"image_size": 2**18},
        {"embed_dim": 2**17, "window_size": 4},
        {"mlp_ratio": 1e12},
        {"patch_size": 2**18},
    ],
    ids=str,
)
def test_hostile_configuration_is_refused_before_the_model_is_built(folder, changes, monkeypatch):
    change(folder, **changes)
    monkeypatch.setattr(SwinHFForImageClassification, "__init__", lambda *_: pytest.fail("it was built"))
    assert outcome(lambda: SwinHFForImageClassification.from_pretrained(folder)) == "refused"
    assert outcome(lambda: check_folder(folder)) == "refused"


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe{}", b"7", b"null", b'"' + b"a" * 9 + b'"'], ids=repr)
def test_configuration_that_is_not_an_object_is_a_sentence(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="not a JSON object; save the model again"):
        SwinHFForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        read_config(folder / "config.json")


def test_configuration_that_asks_for_far_more_than_the_file_holds_is_refused(folder):
    """One layer within all limits, 2 GB of random numbers beside a file of 60 KB."""
    change(folder, mlp_ratio=1e5, depths=[1, 1, 1])
    config = SwinHFConfig.from_pretrained(folder)
    assert config.parameters > FREE_PARAMETERS
    said = rf"asks for {config.parameters:,} parameters, but the weights have [\d,]+ bytes"
    with pytest.raises(ValueError, match=said):
        SwinHFForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("absolute", [True, False])
def test_parameters_are_counted_without_building(tiny_config, awkward_config, absolute):
    for config in (tiny_config, awkward_config):
        config.use_absolute_embeddings, config.qkv_bias = absolute, not absolute
        built = SwinHFForImageClassification(config).num_parameters()
        decoder = (config.hidden_size + 1) * config.num_channels * config.encoder_stride**2
        assert config.parameters == built + decoder + config.embed_dim  # the mask token


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_fractions_are_refused(folder, dtype):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["classifier.weight"] = state["classifier.weight"].to(dtype)
    save_file(state, path, metadata={"format": "pt"})
    for load in (check_folder, SwinHFForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=r"holds classifier.weight as (I64|U8|BOOL|C64); weights are floa"):
            load(folder)
