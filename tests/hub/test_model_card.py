"""Model cards: a golden one, the numbers in them, foreign text and edits."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import PUSHES
from hub_server import metadata_problems
from huggingface_hub import ModelCard
from PIL import Image
from scipy.stats import binomtest

import swin_hf
from swin_hf import SwinHFConfig, cli, push
from swin_hf.hub import (
    CardSource,
    ClassScore,
    ConfusionMatrix,
    DataFacts,
    Metric,
    SplitFacts,
    TrainingFacts,
    is_edited,
    publish,
    remote,
    render_card,
)
from swin_hf.hub.model_card import amount, check_metadata, confidence_interval
from swin_hf.hub.pictures import draw_pictures
from swin_hf.processing import Preprocessing

pytestmark = PUSHES

GOLDEN = Path(__file__).with_name("golden_card.md")
NASTY = "a|b`c`\n<script>[x](y)*_\\"


def facts() -> TrainingFacts:
    return TrainingFacts(
        data=DataFacts(
            name="user/shapes",
            fingerprint="0123456789abcdef0123456789abcdef01234567",
            splits={
                "train": SplitFacts(100, {"circle": 60, NASTY: 40}),
                "test": SplitFacts(40, {"circle": 20, NASTY: 20}),
            },
            license="cc0-1.0",
            is_hub_id=True,
        ),
        hyper_parameters={"learning_rate": 5e-4, "batch_size": 32, "mixup": True, "betas": [0.9, 0.999]},
        default_settings=["betas"],
        metrics=[
            Metric("accuracy", 0.9, "test", 40),
            Metric("loss", 0.3, "test", 40),
            Metric("f1_macro", 0.89, "test"),
        ],
        per_class=[ClassScore("circle", 0.95, 0.9, 0.924, 20), ClassScore(NASTY, 0.85, 0.9, 0.874, 20)],
        confusion_matrix=ConfusionMatrix(["circle", NASTY], [[18, 2], [1, 19]], "test"),
        curves={
            "train_loss": [[1, 2.0], [2, 1.0]],
            "val_loss": [[1, 1.5], [2, 0.3]],
            "val_accuracy": [[1, 0.5], [2, 0.9]],
        },
        versions={"torch": "2.15.0", "transformers": "5.23.0"},
        hardware={"device": "one CPU", "devices": 1, "precision": "32-true"},
        speed={"train_images_per_s": 812.0},
        duration_s=125.0,
        command="python recipes/finetune.py fit --data.dataset user/shapes",
        seed=7,
        base_model="microsoft/swin-tiny-patch4-window7-224",
        base_model_revision="0123456",
        best_step=2,
    )


def source(tiny_config: SwinHFConfig, **changes) -> CardSource:
    tiny_config.num_labels = 2
    tiny_config.id2label = {0: "circle", 1: NASTY}
    processor = {
        "size": {"height": 32, "width": 48},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    values = {
        "config": tiny_config,
        "architecture": "SwinHFForImageClassification",
        "processor": processor,
        "facts": facts(),
        "repo_id": "user/shapes-swin",
        "tag": "v1.0",
        "license": "apache-2.0",
        "files": (("model.safetensors", 367_972, "ab" * 32),),
    }
    return CardSource(**{**values, **changes})


def test_unreadable_pictures_are_told(tiny_config):
    told = facts()
    told.data.unreadable = 3
    card = render_card(source(tiny_config, facts=told))
    assert "3 pictures could not be decoded and were left out." in card
    assert "could not be decoded" not in render_card(source(tiny_config))


def test_headline_is_of_the_test_split_where_there_is_one(tiny_config):
    told = facts()
    told.metrics = [Metric("accuracy", 0.99, "validation", 100), Metric("accuracy", 0.8, "test", 1000)]
    card = render_card(source(tiny_config, facts=told))
    assert "reaches **80.0 %** accuracy (95 % confidence interval 77.4–82.4 %, n = 1000) on the `test` split" in card
    assert "choice of the 1000 images of the `test` split" in card and "probably lower" not in card
    told.metrics.pop()
    card = render_card(source(tiny_config, facts=told))
    assert "**99.0 %** accuracy" in card and "on the `validation` split" in card
    assert "The weights were chosen on the `validation` split, so the accuracy on new pictures is probably" in card


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".ckpt"])
def test_file_that_the_weights_came_from_is_not_a_model_of_the_hub(tiny_config, suffix):
    told = facts()
    told.base_model = f"weights/swin_tiny{suffix}"
    card = render_card(source(tiny_config, facts=told))
    assert f"Started from `weights/swin_tiny{suffix}`" in card and "base_model:" not in card


def test_command_cannot_leave_its_code_block(tiny_config):
    told = facts()
    told.command = "python x ````\n# Not a heading\n```bash"
    card = render_card(source(tiny_config, facts=told))
    assert f"`````bash\n{told.command}\n`````\n" in card


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_snippet_fits_the_channels_of_the_model(tiny_config, tmp_path, monkeypatch, channels):
    """It runs as it stands: the names lead to a folder, so that no Hub is needed."""
    tiny_config.num_channels = channels
    swin_hf.SwinHFForImageClassification(tiny_config).save_pretrained(tmp_path / "user" / "x")
    processor = Preprocessing.of_release(tiny_config.image_hw, channels).processor()
    processor.save_pretrained(tmp_path / "user" / "x")
    Image.effect_noise((60, 50), 90).convert("RGB").save(tmp_path / "image.png")
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 256, (50, 60, channels), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    card = render_card(CardSource(tiny_config, "SwinHFForImageClassification", processor.to_dict(), repo_id="user/x"))
    blocks = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "import swin_hf" not in block]
    assert [block for block in blocks if "pipeline(" in block] == blocks[: int(channels == 3)]
    names: dict = {}
    exec(blocks[-1], names)
    assert names["inputs"]["pixel_values"].shape == (1, channels, 32, 48) and names["logits"].shape == (1, 5)


def test_golden_card(tiny_config):
    """A change of wording is seen in review; write the new file with UPDATE_GOLDEN=1."""
    import os

    card = render_card(source(tiny_config))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(card, encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8") == render_card(source(tiny_config))


def test_use_comes_first_and_settings_are_folded(tiny_config):
    card = render_card(source(tiny_config))
    assert re.findall(r"^## (.*)$", card, re.MULTILINE)[:3] == ["Use it", "Results", "Data"]
    settings = re.search(
        r"<details><summary>Settings that differ from the defaults</summary>\n(.*?)</details>", card, re.S
    )
    assert "learning_rate" in settings[1] and "betas" not in settings[1]
    told = facts()
    told.base_model = told.base_model_revision = None
    told.hyper_parameters["preset"] = "swin_digits_patch4_window4_32"
    card = render_card(source(tiny_config, facts=told))
    assert "Preset `swin_digits_patch4_window4_32`, drop path rate 0.1." in card


def test_classifier_of_imagenet_offers_pictures_to_try(tiny_config):
    assert "widget" not in ModelCard(render_card(source(tiny_config))).data.to_dict()
    card = source(tiny_config)
    tiny_config.id2label = {0: "circle", 1: "tiger, Panthera tigris"}
    (tiger, *_) = ModelCard(render_card(card)).data.widget
    assert tiger["src"].endswith("/tiger.jpg") and tiger["example_title"] == "tiger"


@pytest.mark.parametrize(("value", "text"), [(28_288_354, "28.3 M"), (4.49e9, "4.49 G"), (303_532, "304 k"), (7, "7")])
def test_amounts_have_three_digits(value, text):
    assert amount(value) == text


def test_metadata_is_what_the_hub_reads(tiny_config):
    card = render_card(source(tiny_config))
    assert metadata_problems(card) == ([], [])
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert data.tags == ["swin", "swin_hf", "vision"] and data.datasets == ["user/shapes"]
    assert data.base_model == "microsoft/swin-tiny-patch4-window7-224"
    accuracy = next(result for result in data.eval_results if result.metric_type == "accuracy")
    assert (accuracy.metric_value, accuracy.dataset_type, accuracy.dataset_split) == (0.9, "user/shapes", "test")


def test_unknown_facts_become_comments_and_nothing_is_promised(tiny_config):
    card = render_card(CardSource(config=tiny_config, architecture="SwinHFModel", processor={}))
    assert "More Information Needed" not in card and "None" not in re.sub(r"<!--.*?-->", "", card)
    for what in (
        "accuracy: not measured",
        "data: not recorded",
        "command: not recorded",
        "energy and CO2: not measured",
    ):
        assert f"<!-- {what}" in card
    check_metadata(card)


def test_foreign_text_cannot_break_the_card(tiny_config):
    card = render_card(source(tiny_config))
    assert "<script>" not in card and "[x](y)" not in card
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1, table
    evil = facts()
    evil.data.name = 'x"\n---\nlicense: evil'
    check_metadata(card := render_card(source(tiny_config, facts=evil)))
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"


@pytest.mark.parametrize(("value", "n"), [(0.9, 40), (0.0, 10), (1.0, 25), (0.972, 360)])
def test_confidence_interval_is_wilsons(value, n):
    low, high = confidence_interval(Metric("accuracy", value, "test", n))
    expected = binomtest(round(value * n), n).proportion_ci(method="wilson")
    if math.isclose(round(value * n) / n, value, abs_tol=1e-9):
        assert math.isclose(low, expected.low, abs_tol=1e-6) and math.isclose(high, expected.high, abs_tol=1e-6)
    assert 0 <= low <= value <= high <= 1
    assert confidence_interval(Metric("loss", value, "test", n)) is None


def test_pictures_are_the_same_bytes_for_the_same_facts(tmp_path):
    first = {path.name: path.read_bytes() for path in draw_pictures(facts(), tmp_path / "a")}
    second = {path.name: path.read_bytes() for path in draw_pictures(facts(), tmp_path / "b")}
    assert first == second and set(first) == {"confusion_matrix.png", "learning_curves.png"}
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(image.convert("L").getcolors(256)) > 10, "an empty picture"
    assert draw_pictures(TrainingFacts(), tmp_path / "c") == []


@pytest.mark.parametrize("edit", [lambda t: t + "x", lambda t: t.replace("v1.0", "v2.0"), lambda t: "# mine\n"])
def test_edit_is_recognised(tiny_config, edit):
    card = render_card(source(tiny_config))
    assert not is_edited(card) and not is_edited(card.replace("\n", "\r\n"))
    assert is_edited(edit(card))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("text", "the card has no metadata"),
        ("---\n: : :\n---\n", "is not YAML"),
        ("---\n- a\n---\n", r"not a list of `name: value` lines"),
        ("---\nlicense: [mit]\n---\n", r"has license: \['mit'\], which must be one string"),
        ("---\ntags: swin\n---\n", "has tags: 'swin', which must be a list of strings"),
    ],
)
def test_wrong_metadata_is_a_sentence_with_the_remedy(card, message):
    with pytest.raises(ValueError, match=f"{message}.*"):
        check_metadata(card)


def test_snippets_of_a_pushed_card_run(hub, tiny_model, tmp_path, monkeypatch):
    """Those for swin_hf here; those for transformers alone run in the same words without the package (test_travel)."""
    push(tiny_model, "user/tiny", tag="v1", endpoint=hub.url)
    blocks = re.findall(r"```python\n(.*?)```", hub.files("user/tiny")["README.md"].decode(), re.DOTALL)
    ours = [block for block in blocks if "import swin_hf" in block]
    assert len(ours) == 2 and len(blocks) == 4
    monkeypatch.setattr(swin_hf.hub.download, "client", lambda endpoint: remote.client(endpoint or hub.url))
    names: dict = {}
    for block in ours:
        exec(block, names)
    assert names["model"].classifier.bias.equal(tiny_model.classifier.bias)
    assert names["backbone"].out_features == ["stage1", "stage2", "stage3"]


# -- facts ------------------------------------------------------------------------------------------------------------


def test_facts_survive_the_file(tmp_path):
    path = facts().save(tmp_path)
    assert TrainingFacts.load(tmp_path) == TrainingFacts.load(path) == facts()
    assert path.name == "training_facts.json" and not list(tmp_path.glob("*.tmp"))


def test_facts_that_are_not_finite_are_unknown(tmp_path):
    TrainingFacts(metrics=[Metric("loss", math.nan, "val")], duration_s=math.inf, seed=1).save(tmp_path)
    assert TrainingFacts.load(tmp_path) == TrainingFacts(seed=1)
    json.loads((tmp_path / "training_facts.json").read_text(), parse_constant=lambda x: pytest.fail(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hyper_parameters": ["a"]}, r"hyper_parameters is .*; it must be an object"),
        ({"metrics": [{"name": "accuracy", "value": "x", "split": "t"}]}, r"metrics\[0\].value is 'x'; .* a number"),
        ({"metrics": [{"name": "accuracy", "value": 0.9}]}, r"metrics\[0\] has no split"),
        ({"metrics": "x"}, "metrics is 'x'; it must be a list"),
        ({"curves": {"val_loss": [1, 2]}}, r"curves.val_loss\[0\] is '1'; it must be a list"),
        ({"curves": {"val_loss": [[1], [2]]}}, r"curves.val_loss is not a list of \[step, value\] points"),
        (
            {"confusion_matrix": {"labels": ["a"], "counts": [[1, 2]], "split": "t"}},
            "confusion_matrix.counts is not a table of 1 x 1",
        ),
        ({"data": {"name": 5}}, "data.name is '5'; it must be text"),
        ({"data": {"name": "x", "is_hub_id": "yes"}}, "data.is_hub_id is 'yes'; it must be true or false"),
        ({"data": {"name": "x", "splits": {"test": {"n": True}}}}, "data.splits.test.n is 'True'; .* an integer"),
        ({"duration_s": "x"}, "duration_s is 'x'; it must be a number"),
        ({"command": ["a"]}, "command is .*; it must be text"),
        (
            {"per_class": [{"label": "a", "precision": "x", "recall": 1, "f1": 1, "support": 1}]},
            r"per_class\[0\].precision is 'x'; it must be a number",
        ),
    ],
    ids=str,
)
def test_facts_of_a_wrong_type_name_the_field(tmp_path, values, message):
    (tmp_path / "training_facts.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"training_facts.json cannot be read \({message}.*delete it or train again"):
        TrainingFacts.load(tmp_path)


def test_points_that_are_not_finite_leave_a_gap(tiny_config, tmp_path):
    told = TrainingFacts(curves={"val_loss": [[1, math.nan], [2, 1.0]]}, speed={"images_per_s": math.inf})
    told.save(tmp_path)
    read = TrainingFacts.load(tmp_path)
    assert read.curves == {"val_loss": [[1, None], [2, 1.0]]} and draw_pictures(read, tmp_path)
    assert "images per s" not in render_card(source(tiny_config, facts=read))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "the top level is not an object"),
        ('{"sed": 1}', "unknown field 'sed' of TrainingFacts; did you mean 'seed'"),
        ('{"data": {"name": "x", "zzz": 1}}', "unknown field 'zzz' of DataFacts; the fields are name"),
    ],
)
def test_facts_that_cannot_be_read_are_a_sentence(tmp_path, text, message):
    (tmp_path / "training_facts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainingFacts.load(tmp_path)


# -- command line -----------------------------------------------------------------------------------------------------


def test_command_line_renders_writes_and_keeps(tiny_model, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "run" / "model")
    facts().save(tmp_path / "run")
    assert cli.main(["card", str(tmp_path / "run"), "--repo-id", "user/x", "--license", "mit"]) == 0
    card = capsys.readouterr().out
    assert "**90.0 %** accuracy" in card and "license: mit" in card and not is_edited(card)
    assert cli.main(["card", str(tmp_path / "run"), "--write"]) == 0
    path = tmp_path / "run" / "model" / "README.md"
    path.write_text(path.read_text() + "mine")
    assert cli.main(["card", str(tmp_path / "run"), "--write"]) == 2
    assert "was edited by hand and is kept; --replace-card overwrites it" in capsys.readouterr().err
    assert path.read_text().endswith("mine")
    assert publish.push(tmp_path / "run", "user/x", dry_run=True).card.endswith("mine")
    assert cli.main(["card", str(tmp_path / "run"), "--write", "--replace-card"]) == 0
    assert not is_edited(path.read_text())
    for wrong, sentence in (("--repo-id", "'bad id' is not a repository id"), ("--tag", "'bad id' cannot name a tag")):
        assert cli.main(["card", str(tmp_path / "run"), wrong, "bad id"]) == 2
        assert sentence in capsys.readouterr().err
