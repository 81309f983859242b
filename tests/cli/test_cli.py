"""The dispatcher of the command line, and the verb ``export``; the other verbs have files of their own."""

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from swin_hf.ranges import Number
from swin_hf_cli import TRAINING, VERBS, main


def test_help_answers_without_loading_torch():
    code = """
import sys
sys.argv = ["/usr/bin/swin-hf", "--help"]
from swin_hf_cli import main
try:
    main()
except SystemExit as stop:
    print(stop.code, "torch" in sys.modules, "transformers" in sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "0 False False"
    assert "hf://user/name/FILE" in printed
    for verb, summary in VERBS.items():
        assert f"{verb} " in printed
        assert summary in printed


def test_unknown_verb_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predcit"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'predcit'" in error
    assert all(verb in error for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict"], "the following arguments are required: MODEL, IMAGE"),
        (["predict", "model", "a.png", "--topk", "3"], "unrecognized arguments: --topk 3"),
        (["export", "model", "--to", "onxx"], "argument --to: invalid choice: 'onxx'"),
        (
            ["explain", "model", "a.png", "--stage", "two"],
            "argument --stage: 'two' is given; it must be a whole number in [1, inf)",
        ),
    ],
)
def test_a_wrong_command_is_answered_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"swin-hf {words[0]}: ") and said in error and error.count("\n") == 1


def numeric_options():
    """Every option of every verb whose text becomes something else than text or a path, from the parsers."""
    for verb in VERBS:
        if verb not in TRAINING:  # tests/test_ranges.py
            parser = argparse.ArgumentParser()
            import_module(f"swin_hf.cli.{verb}").add_arguments(parser)
            typed = [action for action in parser._actions if action.type not in (None, str, Path)]
            yield from (pytest.param(verb, parser, action, id=f"{verb} {action.dest}") for action in typed)


@pytest.mark.parametrize(("verb", "parser", "option"), list(numeric_options()))
def test_every_number_has_a_range(verb, parser, option, capsys):
    assert isinstance(option.type, Number), f"{verb} {option.option_strings}: type=swin_hf.ranges.Number(...)"
    outside = ["-5", "-0.5", "nan", "inf", "1e999", "two", "", "9" * 5000, "0x10"]
    if option.type.kind is int:
        outside += ["1.5", "1e3"]
    if option.type.interval != "[0, inf)":
        outside.append("0")
    needed = [
        word
        for action in parser._actions
        if action.required
        for word in (*action.option_strings[:1], next(iter(action.choices or ["x"])))
    ]
    count = option.nargs if isinstance(option.nargs, int) else 1
    for text in outside:
        with pytest.raises(SystemExit) as stop:
            main(
                [verb, *needed, f"{option.option_strings[0]}={text}" if count == 1 else option.option_strings[0]]
                + ([] if count == 1 else [text] * count)
            )
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 300
        assert f"argument {option.option_strings[0]}: " in error and "it must be a" in error


def test_version_and_bare_call(capsys):
    import swin_hf

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == swin_hf.__version__
    assert main([]) == 0
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_describes_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: swin-hf {verb}" in capsys.readouterr().out


@pytest.fixture
def folder(tiny_model, tmp_path):
    names = ["red", "blue", "grey", "green", "pink"]  # not in the order of the folders, and more than there are
    tiny_model.config.id2label = dict(enumerate(names))
    tiny_model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    names = {"0": "red", "1": "green", "2": "blue", "3": "black", "4": "white"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": names}))
    return tmp_path / "model"


@pytest.fixture
def pictures(tiny_dataset, tmp_path):
    """Labelled pictures: a folder with one sub-folder for each class."""
    for index, row in enumerate(tiny_dataset):
        place = tmp_path / "pictures" / tiny_dataset.features["label"].int2str(row["label"])
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{index}.png")
    return tmp_path / "pictures"


def test_export_writes_compares_and_measures(folder, pictures, tmp_path, capsys):
    output = tmp_path / "swin.pt2"
    assert main(["export", str(folder), "--to", "torch", "--output", str(output), "--test", str(pictures)]) == 0
    printed = capsys.readouterr().out
    assert "torch.export fp32 for 32x48 images" in printed
    assert "largest difference from the model" in printed
    assert "accuracy on 24 pictures: model 0." in printed
    assert output.exists()


@pytest.mark.slow
def test_export_calibrates_on_labelled_pictures(folder, pictures, tmp_path, capsys):
    output = tmp_path / "swin.xml"
    command = ["export", str(folder), "--to", "openvino", "--int8", "--output", str(output)]
    assert main([*command, "--calibration", str(pictures), "--test", str(pictures)]) == 0
    assert "OpenVINO int8 (calibrated)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "torch", "--int8"], "--int8 goes with --to onnx or --to openvino"),
        (["--to", "openvino", "--int8"], "needs --calibration"),
        (
            ["--to", "torch", "--image-size", "32", "32", "32"],
            "has 3 sides; give one for a square, or height and width",
        ),
        (["--to", "torch", "--image-size", "16384"], "a batch of 8 images of 16384x16384 pixels takes"),
        (["--to", "torch", "--images", "nowhere.png"], "--images: nowhere.png: no such file or folder"),
        (["--to", "torch", "--images", "{empty}"], "empty: the folder holds no picture"),
        (["--to", "torch", "--images", "{exists}"], "exists.pt2: cannot be read: it is not a picture"),
        (["--to", "onnx", "--int8", "--test", "{empty}"], "empty"),
        (["--to", "torch", "--test", "{hollow}"], "hollow"),
        (["--to", "torch", "--test", "nowhere"], "nowhere: no such folder or file"),
        (["--to", "torch", "--output", "{exists}"], "exists; choose another name with --output"),
        (["--to", "openvino", "--int8", "--calibration", "nowhere"], "nowhere: no such folder or file"),
    ],
)
def test_export_refuses_in_one_sentence(arguments, message, folder, tmp_path, capsys):
    exists = tmp_path / "exists.pt2"
    exists.write_text("mine")
    empty, hollow = tmp_path / "empty", tmp_path / "hollow"
    for place in (empty, hollow / "cat", hollow / "dog"):
        place.mkdir(parents=True)
    words = [word.format(exists=exists, empty=empty, hollow=hollow) for word in arguments]
    if "--output" not in words:
        suffix = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}[words[1]]
        words += ["--output", str(tmp_path / f"swin{suffix}")]
    assert main(["export", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("swin-hf export: ")
    assert message in error and error.count("\n") == 1
    assert exists.read_text() == "mine" and not list(tmp_path.glob("*swin*"))


def test_export_of_an_unknown_model_says_so(capsys):
    assert main(["export", "no-such-folder", "--to", "onnx"]) == 2
    assert "no-such-folder" in capsys.readouterr().err


def test_export_of_a_model_without_labels_says_so(folder, capsys, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    values.update(architectures=["SwinHFModel"])
    (folder / "config.json").write_text(json.dumps(values))
    assert main(["export", str(folder), "--to", "torch", "--output", str(tmp_path / "swin.pt2")]) == 2
    assert "has no classes" in capsys.readouterr().err
