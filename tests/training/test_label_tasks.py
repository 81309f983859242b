"""Multi-label classification, regression, class weights, balanced sampling and predictions.csv."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import exact_run
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY, PATIENCE, TRAINING_WARNINGS
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from sklearn.metrics import average_precision_score, f1_score, r2_score
from transformers import AutoModelForImageClassification

from swin_hf import SwinHFBackbone, SwinHFForImageClassification, SwinHFForMaskedImageModeling, cli, push
from swin_hf.hub import TrainingFacts
from swin_hf.training import (
    EMA,
    MODULES,
    Mixing,
    Network,
    Reading,
    Splits,
    SwinClassifier,
    SwinMultiLabelClassifier,
    SwinRegressor,
    train,
)
from swin_hf.training.data.sampling import EpochSampler, balanced_order

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # the Hub's client's own
    pytest.mark.filterwarnings("ignore:.* has no names for its"),  # models that are built here
]

PRESET = "swin_digits_patch4_window4_32"
NETWORK = Network(overrides={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}, drop_path_rate=0.0)
NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures whose channels are bright or dark, as two parquet files."""
    folder, random = tmp_path_factory.mktemp("channels"), np.random.default_rng(0)
    features = Features(
        {
            "image": Image(),
            "tags": List(ClassLabel(names=NAMES)),
            "light": Value("float64"),
            "kind": ClassLabel(names=["common", "rare"]),
        }
    )
    for split, count in (("train", 48), ("test", 21)):
        rows = {"image": [], "tags": [], "light": [], "kind": []}
        for number in range(count):
            bright = random.random(3) < (0.6, 0.4, 0.3)
            pixels = random.integers(0, 60, (16, 16, 3)) + 180 * bright
            rows["image"].append(Pictures.fromarray(pixels.astype("uint8")))
            rows["tags"].append(np.flatnonzero(bright).tolist())
            rows["light"].append(pixels.mean() / 50)
            rows["kind"].append(int(number % 6 == 0))
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return {split: str(folder / f"{split}.parquet") for split in ("train", "test")}


OPTIONS = {
    "preset": PRESET,
    "network": NETWORK,
    "image_size": 16,
    "batch_size": 16,
    "num_workers": 0,
    "optimization": {"lr_scaling": False, "learning_rate": 5e-3, "warmup_epochs": 0},
    "trainer": {"max_epochs": 8, "accelerator": "cpu", "devices": 1},
}


def start(files, runs, task, column, **options):
    return train("parquet", task, data_files=files, runs=runs, reading={"label_column": column}, **(OPTIONS | options))


@pytest.fixture(scope="module")
def tagged(files, tmp_path_factory):
    return start(files, tmp_path_factory.mktemp("runs"), "multi-label-classification", "tags", name="tags")


@pytest.fixture(scope="module")
def measured(files, tmp_path_factory):
    return start(files, tmp_path_factory.mktemp("runs"), "image-regression", "light", name="light")


def make(kind, **options):
    torch.manual_seed(0)
    module = kind(**({"preset": PRESET, "network": NETWORK, "image_size": 16, "num_labels": 3} | options))
    module.log = module.log_dict = lambda *args, **kwargs: None  # logging needs a trainer
    return module


def batch(labels):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(len(labels), 3, 16, 16), "labels": torch.tensor(labels)}


TAGS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


# Losses.


PROBLEMS = {SwinMultiLabelClassifier: "multi_label_classification", SwinRegressor: "regression"}


@pytest.mark.parametrize(("kind", "problem"), PROBLEMS.items(), ids=PROBLEMS.values())
def test_loss_is_that_of_transformers_for_the_problem_type(kind, problem):
    module, data = make(kind), batch(TAGS)
    assert module.model.config.problem_type == problem
    expected = module.model(**data).loss
    torch.testing.assert_close(module.training_step(data, 0), expected, **PARITY)


def test_several_labels_are_smoothed_weighed_and_mixed():
    mixing = Mixing(label_smoothing=0.2, class_weights=[1.0, 2.0, 5.0])
    module, data = make(SwinMultiLabelClassifier, mixing=mixing), batch(TAGS)
    module.weigh_classes(mixing.class_weights)
    shares = module(data["pixel_values"]).sigmoid()
    targets = data["labels"] * 0.8 + 0.1
    by_hand = -(torch.tensor([1.0, 2.0, 5.0]) * targets * shares.log() + (1 - targets) * (1 - shares).log()).mean()
    torch.testing.assert_close(module.training_step(data, 0), by_hand, **PARITY)
    mix = Mixing(mixup_alpha=1.0).transform(3)
    _, mixed = mix(data["pixel_values"], data["labels"])
    share = ((mixed - data["labels"].roll(1, 0)) / (data["labels"] - data["labels"].roll(1, 0))).nanmean()
    torch.testing.assert_close(mixed, share * data["labels"] + (1 - share) * data["labels"].roll(1, 0), **PARITY)


def test_class_weights_multiply_the_loss_of_each_image():
    data, weights = batch([0, 1, 2, 2]), torch.tensor([0.5, 2.0, 4.0])
    module = make(SwinClassifier, mixing=Mixing(0.0, class_weights=weights.tolist()))
    module.weigh_classes(module.mixing.class_weights)
    losses = F.cross_entropy(module(data["pixel_values"]), data["labels"], reduction="none")
    loss = module.training_step(data, 0)
    torch.testing.assert_close(loss, (weights[data["labels"]] * losses).mean(), **PARITY)
    assert "class_weights" not in module.state_dict()


def test_class_weights_are_matched_by_name(files):
    names = {0: "cow", 1: "ant", 2: "bee"}
    module = make(SwinClassifier, id2label=names, mixing=Mixing(class_weights={"ant": 1, "bee": 2, "cow": 3}))
    module.weigh_classes(module.mixing.class_weights)
    assert module.class_weights.tolist() == [3, 1, 2]
    for weights, said in (
        ({"ant": 1.0, "cow": 2.0, "dog": 3.0}, "mixing.class_weights differs from the classes in bee, dog; give"),
        ([1.0, 2.0], "mixing.class_weights has 2 weights for 3 classes; give one for each of cow, ant, bee"),
    ):
        with pytest.raises(ValueError, match=said):
            module.weigh_classes(weights)
    for weights, said in (("even", "is 'even'; it must be 'balanced'"), ([-1.0], r"is \[-1.0\]; it must be in \[0")):
        with pytest.raises(ValueError, match=f"mixing.class_weights {said}"):
            Mixing(class_weights=weights)


@pytest.mark.parametrize(
    ("kind", "column", "asked", "found"), [(SwinClassifier, "kind", None, 2), (SwinMultiLabelClassifier, "tags", 2, 3)]
)
def test_the_number_of_classes_of_the_data_is_said(files, tmp_path, kind, column, asked, found):
    data = kind.data_class("parquet", data_files=files, image_size=16, reading=Reading(label_column=column))
    module = kind(PRESET, num_labels=asked, network=NETWORK, image_size=16)
    said = f"num_labels is {asked or 10} but the data has {found} classes; give num_labels {found}"
    with pytest.raises(ValueError, match=said):
        exact_run.trainer(tmp_path, max_epochs=1).fit(module, data)


def test_a_class_of_every_picture_or_of_none_weighs_one():
    counts = {"all": 8, "some": 2, "none": 0}
    for kind, expected in ((SwinMultiLabelClassifier, [1, 3, 1]), (SwinClassifier, [0.5, 2, 1])):
        module = make(kind, id2label=dict(enumerate(counts)))
        data = SimpleNamespace(class_counts=counts, split_sizes={"train": 8})
        module.trainer = SimpleNamespace(datamodule=data)
        module.weigh_classes("balanced")
        assert module.class_weights.tolist() == expected


def test_weights_are_averaged_of_a_training_with_class_weights(files, tmp_path):
    data = SwinClassifier.data_class("parquet", data_files=files, image_size=16, reading=Reading(label_column="kind"))
    module = SwinClassifier(PRESET, num_labels=2, network=NETWORK, image_size=16, mixing=Mixing(class_weights=[1, 5]))
    trainer = exact_run.trainer(tmp_path, max_epochs=1, callbacks=[EMA(decay=0.5)])
    trainer.fit(module, data)
    assert trainer.global_step == 1 and module.class_weights.tolist() == [1, 5]


def test_balanced_weights_are_counted_in_the_training_split(files, tmp_path):
    for kind, column, expected in (
        (SwinClassifier, "kind", lambda counts: counts.sum() / (2 * counts)),
        (SwinMultiLabelClassifier, "tags", lambda counts: (43 - counts) / counts),
    ):
        options = {"data_files": files, "image_size": 16, "num_workers": 0, "batch_size": 16}
        data = kind.data_class("parquet", reading=Reading(label_column=column), **options)
        counts = np.array(list(data.class_counts.values()))
        module = make(kind, num_labels=len(counts), mixing=Mixing(0.0, class_weights="balanced"))
        trainer = exact_run.trainer(tmp_path, max_epochs=1, limit_val_batches=0)
        del module.log, module.log_dict
        trainer.fit(module, data)
        np.testing.assert_allclose(module.class_weights.numpy(), expected(counts), rtol=1e-6)
    module = make(SwinClassifier)
    module.trainer = exact_run.trainer(tmp_path)
    with pytest.raises(ValueError, match="the pictures of each class cannot be counted, in a stream or without"):
        module.weigh_classes("balanced")


# Balanced sampling.


def test_a_balanced_epoch_has_equally_many_of_each_class():
    classes = np.repeat([0, 1, 3], [70, 25, 5])
    rows, draws = balanced_order(classes, np.random.default_rng(0))
    assert sorted(np.unique(classes[rows], return_counts=True)[1].tolist()) == [33, 33, 34]
    pairs = list(zip(rows.tolist(), draws.tolist(), strict=True))
    assert len(set(pairs)) == 100  # a row that comes again is another draw
    of_rare = np.bincount(rows[classes[rows] == 3])[-5:]
    assert of_rare.max() - of_rare.min() <= 1  # all of a class come before any comes again
    other, _ = balanced_order(classes, np.random.default_rng(1))
    assert set(rows[classes[rows] == 0]) != set(other[classes[other] == 0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_balanced_batches_do_not_depend_on_the_ranks(world_size):
    classes = np.repeat([0, 1], [80, 23])

    def batches(ranks, start=0):
        for rank in range(ranks):
            sampler = EpochSampler(103, 8 // ranks, 0, rank, ranks, classes)
            sampler.set_epoch(3)
            sampler.start = start // ranks
            yield list(sampler)

    (alone,), (later,) = batches(1), batches(1, start=16)
    assert later == alone[16:] and len(alone) == 96
    for number in range(12):
        local = 8 // world_size
        together = {sample for rank in batches(world_size) for sample in rank[number * local : (number + 1) * local]}
        assert together == set(alone[number * 8 : (number + 1) * 8])


def test_a_balanced_run_resumes_bit_for_bit_and_augments_each_draw_anew(tmp_path):
    options = {"data_options": {"splits": Splits(balanced_sampling=True)}}
    whole, weights, runner = exact_run.fit(tmp_path, {"middle": exact_run.middle(2)}, **options)
    again, resumed, _ = exact_run.fit(tmp_path, resume="middle", **options)
    assert again.batches == {place: seen for place, seen in whole.batches.items() if place >= (0, 2)}
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    with pytest.raises(ValueError, match="written with data balanced_sampling True, and this run has False"):
        exact_run.fit(tmp_path, resume="middle")
    dataset = runner.datamodule.train_dataloader().dataset
    first, second, same = (dataset[key]["pixel_values"] for key in ((1, 5, 0), (1, 5, 1), (1, 5)))
    assert torch.equal(first, same) and not torch.equal(first, second)


# Whole runs.


def table(run):
    with (run.folder / "predictions.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_multi_label_run_measures_what_scikit_learn_does(tagged, files):
    rows, truth = table(tagged), np.zeros((21, 3))
    for row, tags in enumerate(Dataset.from_parquet(files["test"])["tags"]):
        truth[row, tags] = 1
    assert [row["path"] for row in rows] == [f"test row {number}" for number in range(21)]
    assert [row["label"] for row in rows] == ["|".join(np.array(NAMES)[line == 1]) for line in truth]
    found = np.array([[name in row["prediction"].split("|") for name in NAMES] for row in rows])
    scores = {name: tagged.metrics[f"test_{name}"] for name in ("map", "f1_macro", "f1_micro")}
    assert scores["f1_macro"] == pytest.approx(f1_score(truth, found, average="macro", zero_division=0), abs=1e-6)
    assert scores["f1_micro"] == pytest.approx(f1_score(truth, found, average="micro"), abs=1e-6)
    data = MODULES["multi-label-classification"].data_class("parquet", data_files=files, image_size=16, num_workers=0)
    shares = []
    with torch.no_grad():
        for part in data.test_dataloader():
            part = data.on_after_batch_transfer(data.on_before_batch_transfer(part, 0), 0)
            shares.append(tagged.model(part["pixel_values"]).logits.sigmoid())
    shares = torch.cat(shares)
    assert scores["map"] == pytest.approx(average_precision_score(truth, shares, average="macro"), abs=1e-5)
    assert scores["map"] > 0.8  # the pictures are easy
    for row, line in zip(rows, shares.tolist(), strict=True):
        told = [f"{share:.3f}" for share in line if share > 0.5]
        assert [f"{float(share):.3f}" for share in row["probability"].split("|") if share] == told
    facts = TrainingFacts.load(tagged.folder / "model")
    assert [score.support for score in facts.per_class] == truth.sum(0).tolist()


def test_average_precision_leaves_out_a_class_that_does_not_occur():
    module = make(SwinMultiLabelClassifier)
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    with torch.no_grad():
        module.validation_step(batch([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), 0)
        shares = module(batch(TAGS[:3])["pixel_values"]).sigmoid()
    module.on_validation_epoch_end()
    expected = np.mean(
        [average_precision_score([1, 0, 0], shares[:, 0]), average_precision_score([0, 1, 0], shares[:, 1])]
    )
    assert logged["val_map"] == pytest.approx(expected, abs=1e-6)


def test_a_regression_measures_what_scikit_learn_does(measured):
    rows = table(measured)
    truth, found = (np.array([float(row[name]) for row in rows]) for name in ("label", "prediction"))
    assert len(rows) == 21 and list(rows[0]) == ["path", "label", "prediction"]
    assert measured.metrics["test_mae"] == pytest.approx(np.abs(truth - found).mean(), abs=1e-4)
    assert measured.metrics["test_rmse"] == pytest.approx(np.sqrt(((truth - found) ** 2).mean()), abs=1e-4)
    assert measured.metrics["test_r2"] == pytest.approx(r2_score(truth, found), abs=1e-4)
    assert measured.metrics["test_r2"] > 0.5  # the pictures are easy


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_regression_measures_a_single_picture(pictures):
    module = make(SwinRegressor, num_labels=2)
    with torch.no_grad():
        found = module.validation_step(batch([[0.5, 2.0], [1.0, -1.0]][:pictures]), 0)
    values = module.val_metrics.compute()
    assert len(found["values"]) == pictures and values["val_mae"].isfinite()
    assert values["val_r2"].isnan() == (pictures == 1)  # nothing varies in one picture


@pytest.mark.parametrize("name", ["tagged", "measured"])
def test_the_run_is_predicted_published_and_described(name, request, hub, tmp_path, capsys):
    run, problem = (
        request.getfixturevalue(name),
        {"tagged": "multi_label_classification", "measured": "regression"}[name],
    )
    config = json.loads((run.folder / "model" / "config.json").read_text())
    assert config["problem_type"] == problem and isinstance(run.model, SwinHFForImageClassification)
    picture = tmp_path / "bright.png"
    Pictures.new("RGB", (16, 16), (220, 30, 220)).save(picture)
    dark = tmp_path / "dark.png"
    Pictures.new("RGB", (16, 16), (30, 30, 30)).save(dark)
    capsys.readouterr()  # where this test is a worker's first to ask for the run, its lines came just now
    assert cli.main(["predict", str(run.folder / "model"), str(picture), str(dark), "--json", "--top-k", "1"]) == 0
    first, second = (result["predictions"] for result in json.loads(capsys.readouterr().out))
    if name == "tagged":
        assert {guess["label"] for guess in first} == {"red", "blue"} and second == []
        assert cli.main(["predict", str(run.folder / "model"), str(dark)]) == 0
        assert capsys.readouterr().out.split()[-2:] == [str(dark), "-"]
    else:
        assert [guess["label"] for guess in first] == ["light"] and first[0]["score"] > second[0]["score"]
    push(run.folder, f"user/{name}", endpoint=hub.url)
    card = hub.files(f"user/{name}")["README.md"].decode()
    said = {
        "tagged": ("mean average precision", "multi-label classification", "sigmoid() > 0.5", "knows 3 classes"),
        "measured": ("mean absolute error", "a number off a picture: regression", "enumerate(logits[0].tolist())"),
    }[name]
    assert all(words in card for words in said) and "argmax" not in card
    assert not {"predictions.csv", "assets/sample_pictures.png"} & hub.files(f"user/{name}").keys()
    assert (run.folder / "sample_pictures.png").is_file()
    (tmp_path / "again").mkdir()
    for file, content in hub.files(f"user/{name}").items():
        (tmp_path / "again" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "again" / file).write_bytes(content)
    pixels = torch.randn(2, 3, 16, 16)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(loaded(pixels).logits, run.model(pixels).logits)
    assert loaded.config.problem_type == problem


def test_a_new_head_of_a_regression_starts_at_the_mean(files, tmp_path):
    data = SwinRegressor.data_class("parquet", data_files=files, image_size=16, num_workers=0)
    module = SwinRegressor(preset=PRESET, network=NETWORK, image_size=16)
    assert not module.model.classifier.bias.any()
    trainer = exact_run.trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, data)
    assert module.model.classifier.bias.item() == pytest.approx(data.label_means[0], abs=0.01)
    assert module.model.config.id2label == {0: "light"}


def test_a_classifier_that_starts_from_several_labels_has_one_again(tagged):
    module = SwinClassifier(weights=str(tagged.folder / "model"), id2label={0: "red", 1: "blue"})
    assert module.model.config.problem_type is None and module.model.config.num_labels == 2


def test_every_test_leaves_its_predictions_in_the_folder_of_its_run(tagged, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = (tagged.folder / "predictions.csv").read_bytes()
    words = ["train", "--task", "multi-label-classification", "test", "--data.dataset", "parquet"]
    words += [f"--data.data_files={json.dumps({'test': files['test']})}", "--data.image_size", "16"]
    words += ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    assert cli.main([*words, "--model.weights", str(tagged.folder / "model")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"predictions: {tagged.folder / 'predictions.csv'}"
    assert (tagged.folder / "predictions.csv").read_bytes() == before and not list(tmp_path.iterdir())
    tagged.model.save_pretrained(tmp_path / "elsewhere")
    assert cli.main([*words, "--model.weights", "elsewhere", "--name", "other"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"predictions: {Path('runs', 'other', 'predictions.csv')}"
    assert (tmp_path / "runs" / "other" / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize("verb", ["test", "validate"])
@pytest.mark.parametrize("start", ["a new model", "a backbone", "a model of pixels"])
def test_a_head_that_nothing_has_trained_is_not_measured(tagged, files, tmp_path, start, verb):
    words = ["train", "--task", "image-classification", verb, "--data.dataset", "parquet", "--data.image_size", "16"]
    words += [f"--data.data_files={json.dumps({'test': files['test'], 'validation': files['test']})}"]
    words += ["--data.reading.label_column", "kind", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    if start == "a backbone":
        SwinHFBackbone(tagged.model.config).save_pretrained(tmp_path / "weights")
    elif start == "a model of pixels":
        SwinHFForMaskedImageModeling(tagged.model.config).save_pretrained(tmp_path / "weights")
    if start != "a new model":
        words += ["--model.weights", str(tmp_path / "weights")]
    with pytest.raises(SystemExit, match="nothing was trained that could be measured"):
        cli.main(words)


@pytest.mark.slow
def test_predictions_name_files_classes_and_no_unreadable_picture(tmp_path):
    random = np.random.default_rng(0)
    for number in range(14):
        name = tmp_path / "photos" / ("test" if number > 9 else "train") / f"kind, {number % 2}" / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Pictures.fromarray(random.integers(0, 255, (16, 16, 3)).astype("uint8")).save(name)
    name.write_bytes(b"no picture")
    trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 1}
    run = train(
        "imagefolder", data_dir=str(tmp_path / "photos"), runs=tmp_path / "runs", reading={"on_error": "skip"},
        splits={"validation_fraction": 0.2}, **(OPTIONS | {"trainer": trainer, "batch_size": 4}),
    )  # fmt: skip
    rows = table(run)
    assert [Path(row["path"]).name for row in rows] == ["10.png", "12.png", "11.png"]
    assert all(Path(row["path"]).is_file() and row["label"] == Path(row["path"]).parent.name for row in rows)
    assert {row["prediction"] for row in rows} <= {"kind, 0", "kind, 1"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


RANK = """
import sys, warnings
warnings.simplefilter("ignore")
from swin_hf.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_ranks_answer_for_every_picture_once(tagged, files, tmp_path):
    """21 pictures in batches of 4: one rank has 11, the other 10."""
    (tmp_path / "rank.py").write_text(RANK)
    before = (tagged.folder / "predictions.csv").read_text()
    tagged.model.save_pretrained(tmp_path / "weights")
    words = ["train", "--task", "multi-label-classification", "test", "--model.weights", str(tmp_path / "weights")]
    words += ["--data.dataset", "parquet", f"--data.data_files={json.dumps({'test': files['test']})}"]
    words += ["--data.image_size", "16", "--data.batch_size", "4", "--data.num_workers", "0", "--name", "two"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    processes = []
    for rank in range(2):
        environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(21000 + os.getpid() % 20000)}
        command = [sys.executable, str(tmp_path / "rank.py"), *words]
        processes.append(
            subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=PATIENCE)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-6000:]
    with (tmp_path / "runs" / "two" / "predictions.csv").open() as file:
        rows = list(csv.reader(file))
    alone = list(csv.reader(before.splitlines()))
    assert [row[:3] for row in rows] == [row[:3] for row in alone] and len(rows) == 22
    assert f"test_map {tagged.metrics['test_map']:.4f}" in outputs[0]
