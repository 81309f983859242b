"""Classes are names: wherever two tables meet, a class is found by its name and never by its number."""

import json
import re

import pytest
import torch
import yaml
from conftest import TRAINING_WARNINGS
from PIL import Image
from short import short

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinHFForMaskedImageModeling
from swin_hf.classes import ClassMismatchError, class_table, match_classes
from swin_hf.cli import main
from swin_hf.training import ImageDataModule, SwinClassifier, run_recipe

PRESET = "swin_digits_patch4_window4_32"
SMALL = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16}
COLOURS = {"blue": (20, 20, 230), "green": (20, 230, 20), "red": (230, 20, 20), "grey": (120, 120, 120)}

pytestmark = TRAINING_WARNINGS


# The rule.


def test_names_are_found_wherever_they_are():
    assert match_classes(["dog", "cat"], ["bird", "cat", "dog"]) == [2, 1]
    assert match_classes(["7", "3"], [str(digit) for digit in range(10)]) == [7, 3]
    assert match_classes(["crane", "crane"], ["crane", "crane"]) == [0, 1]  # ImageNet has two cranes
    assert class_table({"10": "k", "9": "j"}) == ["j", "k"]


def test_placeholders_are_matched_by_number_where_both_tables_have_nothing_else():
    assert match_classes(["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]) == [0, 1, 2]


def test_a_model_without_names_takes_those_of_as_many_classes_and_says_so():
    with pytest.warns(UserWarning, match="the model has no names for its 2 classes: .* 'cat', 'dog'"):
        assert match_classes(["cat", "dog"], ["LABEL_0", "LABEL_1"]) == [0, 1]


@pytest.mark.parametrize(
    ("wanted", "known"),
    [
        (["cat", "dog"], ["Dog", "cat"]),
        (["cat", "dog"], ["car", "bus"]),
        (["0", "1"], ["cat", "dog"]),
        (["cat", "dog"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["crane", "cat"], ["crane", "crane", "cat"]),
    ],
    ids=["capital", "other", "data-without-names", "other-count", "twice"],
)
def test_tables_that_cannot_be_matched_are_both_shown(wanted, known):
    tables = f"the data has {', '.join(map(repr, wanted))}; the model has {', '.join(map(repr, known))};"
    with pytest.raises(ClassMismatchError, match=re.escape(tables)):
        match_classes(wanted, known)


def test_a_preset_keeps_the_names_it_is_given():
    config = SwinHFConfig.from_preset("swin_tiny_patch4_window7_224", id2label={0: "ant", 1: "bee", 2: "cow"})
    assert config.num_labels == 3 and config.id2label == {0: "ant", 1: "bee", 2: "cow"} and config.label2id["cow"] == 2
    again = SwinHFConfig.from_preset(PRESET, id2label={"0": "ant", "1": "bee"}, num_labels=2)  # as in a JSON file
    assert again.id2label == {0: "ant", 1: "bee"}
    assert SwinHFConfig.from_preset(PRESET, num_labels=4).num_labels == 4
    with pytest.raises(ValueError, match="num_labels is 3 but id2label names 2 classes; give one of them"):
        SwinHFConfig.from_preset(PRESET, id2label={0: "ant", 1: "bee"}, num_labels=3)


# The head of a starting point.


def stored(folder, names=None, kind=SwinHFForImageClassification):
    torch.manual_seed(0)
    fields = {"id2label": dict(enumerate(names))} if names else {"num_labels": 3}
    model = kind(SwinHFConfig.from_preset(PRESET, **SMALL, **fields, encoder_stride=8))
    if hasattr(model, "classifier"):
        torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(folder)
    return model


def head(folder, *names):
    module = short(SwinClassifier, weights=str(folder), id2label=dict(enumerate(names)))
    assert class_table(module.model.config.id2label) == list(names)
    assert module.model.config.label2id == {name: number for number, name in enumerate(names)}
    assert module.model.classifier.out_features == module.model.num_labels == len(names)
    return module.model.classifier


@pytest.mark.parametrize("names", ["cab", "abc", "ca"], ids=["permuted", "equal", "some"])
def test_the_rows_of_a_head_follow_the_names(tmp_path, names):
    theirs = stored(tmp_path, "abc").classifier
    rows = ["abc".index(name) for name in names]
    ours = head(tmp_path, *names)
    assert torch.equal(ours.weight, theirs.weight[rows]) and torch.equal(ours.bias, theirs.bias[rows])


@pytest.mark.parametrize("names", ["xyz", "abx", "abcd"], ids=["as-many", "one-other", "more"])
def test_a_head_of_other_classes_is_new(tmp_path, names, caplog):
    theirs = stored(tmp_path, "abc").classifier
    ours = head(tmp_path, *names)
    assert ours.bias.abs().max() == 0 and not set(ours.weight[:, 0].tolist()) & set(theirs.weight[:, 0].tolist())
    assert "a new head for" in caplog.text and "that of the starting point knows a, b, c" in caplog.text


def test_a_head_without_names_is_kept_for_as_many_classes_and_that_is_said(tmp_path):
    theirs = stored(tmp_path).classifier
    with pytest.warns(UserWarning, match="the starting point has no names for its 3 classes"):
        assert torch.equal(head(tmp_path, *"xyz").weight, theirs.weight)


def test_pretraining_has_no_classes_to_lose(tmp_path, caplog):
    stored(tmp_path, kind=SwinHFForMaskedImageModeling)
    assert head(tmp_path, "x", "y").bias.abs().max() == 0
    assert "a new head" not in caplog.text


# Checkpoints and data, through the command line.


def pictures(folder, names, count=6, split=None):
    for name in names:
        place = folder / (split or "") / name
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = COLOURS.get(name.lower(), (200, 200, 20))
            Image.new("RGB", (20, 20), tuple(min(255, value + 4 * number) for value in colour)).save(
                place / f"{number}.png"
            )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned blue, green and red."""
    folder = tmp_path_factory.mktemp("classes")
    data = folder / "data"
    for split in ("train", "validation", "test"):
        pictures(data, ["blue", "green", "red"], split=split)
    config = {
        "model": {
            "preset": PRESET,
            "network": {
                "overrides": {name: value for name, value in SMALL.items() if name != "image_size"},
                "drop_path_rate": 0.0,
            },
            "optimization": {"learning_rate": 1e-2, "lr_scaling": False, "warmup_epochs": 0.5},
        },
        "data": {
            "dataset": "imagefolder",
            "data_dir": str(data),
            "image_size": 16,
            "batch_size": 6,
            "augmentation": {"crop_padding": 1},
            "pixels": {"resize_mode": "squash"},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 6},
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(config))
    assert run_recipe(SwinClassifier, folder / "colours.yaml", ["fit", "--runs", str(folder / "runs")]) == 0
    return folder


def measure(run, data, verb="test", start="checkpoint"):
    arguments = {
        "checkpoint": ["--ckpt_path", str(run / "runs/run/checkpoints/last.ckpt")],
        "model": ["--model.weights", str(run / "runs/run/model")],
    }
    return run_recipe(
        SwinClassifier,
        run / "colours.yaml",
        [
            verb,
            "--runs",
            str(run / "runs"),
            "-c",
            str(run / "colours.yaml"),
            *arguments[start],
            "--data.data_dir",
            str(data),
        ],
    )


def accuracy(text):
    return float(re.search(r"(?:test|val)_accuracy\W+([\d.]+)", text).group(1))


@pytest.mark.parametrize("start", ["checkpoint", "model"])
@pytest.mark.parametrize("names", [["green", "red"], ["red"], ["blue", "green", "red"]], ids=["two", "one", "all"])
def test_a_checkpoint_is_measured_on_some_of_its_classes(run, tmp_path, capsys, names, start):
    data = pictures(tmp_path / "some", names, split="test")  # no training split
    assert measure(run, data, start=start) == 0
    assert accuracy(capsys.readouterr().out) == 1.0


def test_validation_finds_the_classes_by_name_too(run, tmp_path, capsys):
    data = pictures(pictures(tmp_path / "some", ["green", "red"], split="train"), ["green", "red"], split="val")
    assert measure(run, data, verb="validate") == 0
    assert accuracy(capsys.readouterr().out) == 1.0


@pytest.mark.parametrize("names", [["Red", "blue", "green"], ["blue", "grey"], ["cat", "dog", "emu"]])
def test_a_checkpoint_is_not_measured_on_classes_that_it_does_not_know(run, tmp_path, capsys, names):
    data = pictures(tmp_path / "other", names, split="test")
    assert measure(run, data) == 1
    error = capsys.readouterr().err
    assert f"the data has {', '.join(map(repr, names))}; the model has 'blue', 'green', 'red'" in error


def test_a_run_does_not_go_on_with_other_classes(run, tmp_path, capsys):
    """As many classes, so that no shape tells."""
    data = tmp_path / "other"
    for split in ("train", "validation", "test"):
        pictures(data, ["cat", "dog", "emu"], split=split)
    assert measure(run, data, verb="fit") == 1
    error = capsys.readouterr().err
    assert "blue, green, red" in error and "cat, dog, emu" in error


def test_python_users_get_the_same_answers(tmp_path):
    """A data module of another order is numbered as the model does."""
    data = short(
        ImageDataModule, "imagefolder", data_dir=str(pictures(tmp_path, ["green", "red"], split="test")), image_size=16
    )
    data.renumber(match_classes(class_table(data.id2label), ["red", "blue", "green"]), ["red", "blue", "green"])
    labels = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    assert sorted(labels.tolist()) == [0] * 6 + [2] * 6 and data.num_classes == 3
    assert data.load().class_id(-1) == -1


# Export.


def test_export_measures_by_name_and_on_the_test_split(run, tmp_path, capsys):
    arguments = ["export", str(run / "runs/run/model"), "--to", "torch", "--overwrite"]
    arguments += ["--output", str(tmp_path / "m.pt2"), "--test"]
    assert main([*arguments, str(pictures(tmp_path / "some", ["green", "red"]))]) == 0
    assert "accuracy on 12 pictures: model 1.0000" in capsys.readouterr().out
    data = pictures(tmp_path / "both", ["blue", "green", "red"], split="train", count=9)
    assert main([*arguments, str(pictures(data, ["blue", "red"], split="test", count=2))]) == 0
    assert "accuracy on 4 pictures: model 1.0000" in capsys.readouterr().out
    (tmp_path / "m.pt2").unlink()
    assert main([*arguments, str(pictures(tmp_path / "other", ["blue", "grey"]))]) != 0
    assert not (tmp_path / "m.pt2").exists()
    assert "the model has 'blue', 'green', 'red'" in capsys.readouterr().err


def test_calibration_pictures_are_those_of_the_training_split(run, tmp_path):
    from swin_hf.cli.export import _read_labelled

    data = pictures(pictures(tmp_path, ["blue", "red"], split="train"), ["green", "red"], split="test", count=1)
    rows = _read_labelled(str(data), "train")
    assert sorted(rows.features["label"].int2str(rows["label"])) == ["blue"] * 6 + ["red"] * 6
    assert len(_read_labelled(str(data), "train", 5)) == 5 and "/train/" in rows["image"][0]["path"]
    values = json.loads((run / "runs/run/model/config.json").read_text())
    assert values["id2label"] == {"0": "blue", "1": "green", "2": "red"}
