"""Files of strangers: every value in every field is a sentence, and what loading costs is bounded before it begins."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from swin_hf import SwinHFConfig, SwinHFForImageClassification, convert_checkpoint, load_checkpoint
from swin_hf.checkpoints import export_checkpoint, open_checkpoint
from swin_hf.cli import main
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
    with torch.device("meta"):
        asked = SwinHFForImageClassification(SwinHFConfig.from_pretrained(folder)).num_parameters()
    assert asked > FREE_PARAMETERS
    said = rf"asks for {asked:,} parameters, but the weights have [\d,]+ bytes"
    with pytest.raises(ValueError, match=said):
        SwinHFForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_fractions_are_refused(folder, dtype):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["classifier.weight"] = state["classifier.weight"].to(dtype)
    save_file(state, path, metadata={"format": "pt"})
    for load in (check_folder, SwinHFForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=r"holds classifier.weight as (I64|U8|BOOL|C64); weights are floa"):
            load(folder)


def repeated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier of 40,000,000 rows that is one number, stride 0."""
    head = {name: tensor for name, tensor in state.items() if "head" not in name}
    return {**head, "head.fc.weight": torch.zeros(1).expand(4 * 10**7, 64), "head.fc.bias": state["head.fc.bias"]}


def shared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two hundred layers that are the same numbers."""
    one = torch.zeros(2**10, 2**10)
    return {**state, **{f"layers.0.blocks.{block}.mlp.fc1.weight": one for block in range(200)}}


@pytest.mark.parametrize("make", [repeated, shared], ids=["stride 0", "shared"])
def test_tensors_that_claim_more_than_their_file_are_refused(tiny_model, tmp_path, make, capsys):
    path = tmp_path / "a.pth"
    torch.save(make(export_checkpoint(tiny_model, "timm")), path)
    assert path.stat().st_size < 2**24
    said = r"a.pth has [\d,]+ bytes, but its tensors claim [\d,]+ \("
    with pytest.raises(ValueError, match=said):
        load_checkpoint(path)
    assert main(["info", str(path)]) == 2 and "its tensors claim" in capsys.readouterr().err
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(path, tmp_path / "out", to="swin_hf")
    assert not (tmp_path / "out").exists()


def test_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data/0", "w") as entry:
        for _ in range(300):
            entry.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, but unpacks to 314,572,800; save it again"):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_foreign_weights_that_are_no_fractions_are_refused(tiny_model, tmp_path, dtype):
    state = export_checkpoint(tiny_model, "timm")
    state["head.fc.weight"] = state["head.fc.weight"].to(dtype)
    with pytest.raises(ValueError, match=r"1 weights are not floating-point numbers \(classifier.weight is "):
        load_checkpoint(state)


@pytest.mark.parametrize(
    "processor",
    [
        {"size": {"height": 20_000, "width": 20_000}},
        {"size": {"shortest_edge": 10**6}},
        {"size": 224, "crop_size": {"height": 2**16, "width": 2**16}},
        {"size": "large"},
        {"size": {"height": -1, "width": 3}},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_image_processor_without_measure_is_refused(folder, tiny_model, tmp_path, processor, is_ours, capsys):
    if not is_ours:
        (folder / "model.safetensors").unlink()
        torch.save(export_checkpoint(tiny_model, "timm"), folder / "model.pth")
        (folder / "config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for arguments in (
        ["info", folder],
        ["predict", folder, tmp_path / "a.png"],
        ["convert", folder, "x", "--to", "timm"],
    ):
        assert main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert "preprocessor_config.json asks for pictures of" in said or "a side is a positive" in said
