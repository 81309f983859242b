"""ImageDataModule: every kind of source, columns by type, splits, policies and clear errors."""

import csv
import gc
import io
import json
import os
import pickle
import tarfile
from dataclasses import asdict

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from exact_run import DIGITS, trainer
from PIL import Image as PILImage
from short import short
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from swin_hf import SwinHFConfig
from swin_hf.processing import Preprocessing, UnreadablePictureError
from swin_hf.training import ImageDataModule, SwinClassifier, SwinMaskedImageModeler
from swin_hf.training.data.pictures import collate
from swin_hf.training.data.sources import Source, load_source, natural_order
from swin_hf.training.data.splits import stratified_split
from swin_hf.training.record import RunRecord

COLOURS = {"blue": (20, 20, 220), "green": (20, 220, 20), "red": (220, 20, 20)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is read from or left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )  # 5 s at the end of every stream
    datasets.disable_progress_bars()


def picture(colour, size=(12, 10), seed=0) -> PILImage.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (*size[::-1], 3))
    return PILImage.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def write_folder(folder, per_class=6, splits=("train",), names=COLOURS):
    for split in splits:
        for index, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for number in range(per_class):
                colour = list(COLOURS.values())[index % 3]
                picture(colour, seed=number).save(folder / split / name / f"{number}.png")
    return folder


def table(rows=24, **columns) -> Dataset:
    """Pictures and ClassLabels; ``columns`` replaces or adds columns, None removes."""
    names = sorted(COLOURS)
    values = {
        "image": [picture(COLOURS[names[i % 3]], seed=i) for i in range(rows)],
        "label": [i % 3 for i in range(rows)],
    } | columns
    values = {name: value for name, value in values.items() if value is not None}
    features = Features(
        {
            name: Image() if name == "image" else ClassLabel(names=names) if name == "label" else _feature(value)
            for name, value in values.items()
        }
    )
    return Dataset.from_dict(values, features=features)


def _feature(values):
    return Value("string" if isinstance(values[0], str) else "int64")


def write_table(folder, name="train", **columns):
    path = folder / f"{name}.parquet"
    table(**columns).to_parquet(path)
    return str(path)


def check_batches(module: ImageDataModule, names=("blue", "green", "red")):
    """Labels fit the colours, in every loader."""
    module.setup("fit")
    assert [module.id2label[i] for i in range(module.num_classes)] == list(names)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        batches = list(loader)
        assert batches
        for batch in batches:
            assert batch.keys() == {"pixel_values", "labels"}
            assert batch["pixel_values"].dtype == torch.uint8
            assert batch["labels"].dtype == torch.int64
            assert batch["pixel_values"].shape[1:] == (3, *module.image_size)
            brightest = batch["pixel_values"].float().mean((2, 3)).argmax(1)
            expected = [{"blue": 2, "green": 1, "red": 0}[names[label]] for label in batch["labels"]]
            assert brightest.tolist() == expected


OPTIONS = {"image_size": 8, "batch_size": 4, "validation_fraction": 0.25, "num_workers": 0}


# Every kind of source.


def test_parquet(tmp_path):
    check_batches(short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **OPTIONS))


def test_imagefolder(tmp_path):
    folder = write_folder(tmp_path / "pictures", splits=("train", "val"), per_class=4)
    module = short(ImageDataModule, "imagefolder", data_dir=str(folder), **OPTIONS)
    check_batches(module)
    assert module.split_sizes == {"train": 12, "validation": 12}


def test_local_folder_without_a_format(tmp_path):
    check_batches(short(ImageDataModule, str(write_folder(tmp_path / "pictures")), **OPTIONS))


@pytest.mark.parametrize("wrap", [False, True], ids=["dataset", "dataset-dict"])
def test_saved_to_disk(tmp_path, wrap):
    data = table()
    (DatasetDict({"train": data, "test": data}) if wrap else data).save_to_disk(tmp_path / "saved")
    check_batches(short(ImageDataModule, str(tmp_path / "saved"), **OPTIONS))
    module = short(ImageDataModule, "arrow", data_dir=str(tmp_path / "saved"), **OPTIONS)
    assert module.has("test") == wrap


def test_webdataset(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for index in range(24):
            stream = io.BytesIO()
            picture(list(COLOURS.values())[index % 3], seed=index).save(stream, "PNG")
            for extension, content in (("png", stream.getvalue()), ("cls", str(index % 3).encode())):
                entry = tarfile.TarInfo(f"{index:04d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    module = short(ImageDataModule, "webdataset", data_files={"train": str(tmp_path / "train.tar")}, **OPTIONS)
    assert module.id2label == {0: "0", 1: "1", 2: "2"}
    batch = next(iter(module.train_dataloader()))
    assert (2 - batch["pixel_values"].float().mean((2, 3)).argmax(1)).tolist() == batch["labels"].tolist()


def test_csv_with_relative_paths_and_text_labels(tmp_path):
    with open(tmp_path / "train.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label"])
        for index in range(24):
            name = sorted(COLOURS)[index % 3]
            picture(COLOURS[name], seed=index).save(tmp_path / f"{index}.png")
            writer.writerow([f"{index}.png", name])
    check_batches(short(ImageDataModule, "csv", data_files={"train": str(tmp_path / "train.csv")}, **OPTIONS))


def write_paths(folder, kind="csv", labels=("blue", "green", "red"), rows=24, shift=0):
    """A table beside its pictures: row ``i`` is ``i.png``, of colour ``i + shift``, with label ``i``."""
    folder.mkdir(exist_ok=True)
    colours = [COLOURS[key] for key in sorted(COLOURS)]
    for index in range(rows):
        picture(colours[(index + shift) % 3], seed=index).save(folder / f"{index}.png")
    values = [(f"{index}.png", labels[index % len(labels)]) for index in range(rows)]
    if kind == "csv":
        lines = ["path,label", *(f"{path},{label}" for path, label in values)]
    else:
        lines = [json.dumps({"path": path, "label": label}) for path, label in values]
    (folder / f"train.{kind}").write_text("\n".join(lines) + "\n")
    return str(folder / f"train.{kind}")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_relative_paths_start_from_the_folder_of_their_own_split(tmp_path, kind):
    """Both splits name their pictures alike; those of the test split have other colours."""
    files = {"train": write_paths(tmp_path / "a", kind), "test": write_paths(tmp_path / "b", kind, shift=1)}
    options = OPTIONS | ({"streaming": True, "class_names": sorted(COLOURS)} if kind == "json" else {})
    module = short(ImageDataModule, kind, data_files=files, **options)
    batch = next(iter(module.test_dataloader()))
    colours = 2 - batch["pixel_values"].float().mean((2, 3)).argmax(1)  # blue is class 0 and the last channel
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    assert colours.tolist() == [1, 2, 0, 1]


def test_relative_paths_of_a_split_in_several_folders_are_refused(tmp_path):
    write_paths(tmp_path / "a"), write_paths(tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"files of split 'train' are in 2 folders .*path '0.png' starts; give data_dir"
    ):
        short(ImageDataModule, "csv", data_files=str(tmp_path / "*" / "train.csv")).load()
    for name in "ab":
        table = tmp_path / name / "train.csv"
        header, *lines = table.read_text().splitlines()
        table.write_text("\n".join([header, *(f"{tmp_path}/{name}/{line}" for line in lines)]))
    check_batches(short(ImageDataModule, "csv", data_files=str(tmp_path / "*" / "train.csv"), **OPTIONS))


def test_stream_of_parquet_shards(tmp_path):
    for shard in range(4):
        table().shard(4, shard).to_parquet(tmp_path / f"train-{shard}.parquet")
    table().to_parquet(tmp_path / "validation.parquet")
    files = {"train": str(tmp_path / "train-*.parquet"), "validation": str(tmp_path / "validation.parquet")}
    module = short(ImageDataModule, "parquet", data_files=files, streaming=True, **OPTIONS)
    assert module.num_classes == 3
    assert module.load().num_shards == 4
    labels = torch.cat([batch["labels"] for batch in module.val_dataloader()])
    assert labels.tolist() == [i % 3 for i in range(24)]


# Columns and labels.


def test_columns_are_found_by_type_not_by_name(tmp_path):
    data = table().rename_columns({"image": "scan", "label": "kind"})
    data.to_parquet(tmp_path / "train.parquet")
    source = load_source("parquet", data_files=str(tmp_path / "train.parquet"))
    assert (source.image_column, source.label_column) == ("scan", "kind")


def test_two_class_columns_are_ambiguous_unless_one_has_a_usual_name(tmp_path):
    data = table().add_column("coarse", [0] * 24).cast_column("coarse", ClassLabel(names=["a", "b"]))
    data.to_parquet(tmp_path / "train.parquet")
    assert load_source("parquet", data_files=str(tmp_path / "train.parquet")).label_column == "label"
    data.rename_column("label", "fine").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"2 label columns \['fine', 'coarse'\].*label_column"):
        load_source("parquet", data_files=str(tmp_path / "train.parquet"))


def test_no_class_column_names_the_columns(tmp_path):
    path = write_table(tmp_path, label=None, note=["x"] * 24)
    with pytest.raises(ValueError, match=r"no label column among image \(Image\), note \(string\)"):
        short(ImageDataModule, "parquet", data_files=path).num_classes  # noqa: B018


def test_no_image_column_names_the_columns(tmp_path):
    path = write_table(tmp_path, image=None)
    with pytest.raises(ValueError, match=r"no image column among label \(ClassLabel\)"):
        short(ImageDataModule, "parquet", data_files=path).load()


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_a_column_that_does_not_exist_is_named(tmp_path, option):
    with pytest.raises(ValueError, match=rf"{option} 'nothing' does not exist; the columns are image \(Image\)"):
        short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **{option: "nothing"}).load()


def test_a_label_column_of_another_type_is_refused(tmp_path):
    data = table().remove_columns("label").add_column("score", [float(i) for i in range(24)])
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"label column 'score' is of type float64"):
        short(ImageDataModule, "parquet", data_files=str(tmp_path / "train.parquet"), label_column="score").load()


def test_a_missing_integer_label_is_pointed_out(tmp_path):
    path = tmp_path / "train.parquet"
    for labels, message in (
        ([0.0, 1.0, None] * 8, r", because row 2 of 'train' has no value \(write -1"),
        ([0.5] * 24, ";"),
    ):
        table(label=None).add_column("label", labels).to_parquet(path)
        with pytest.raises(ValueError, match=rf"'label' is of type float64{message}"):
            short(ImageDataModule, "parquet", data_files=str(path)).load()


@pytest.mark.parametrize("names", [None, ["no", "yes"]])
def test_true_and_false_are_classes(tmp_path, names):
    path = write_paths(tmp_path / "a", "json", labels=[True, False])
    module = short(ImageDataModule, "json", data_files=path, class_names=names, **OPTIONS)
    assert list(module.id2label.values()) == (names or ["False", "True"])
    assert module.load().labels("train")[:3].tolist() == [1, 0, 1]


def test_class_names_of_integer_labels(tmp_path):
    path = write_paths(tmp_path / "a", labels=[0, 2])
    module = short(ImageDataModule, "csv", data_files=path, class_names=["a", "b", "c"], **OPTIONS)
    assert module.class_counts == {"a": 9, "b": 0, "c": 9}
    with pytest.raises(ValueError, match=r"label '2' of column 'label' is none of the 2 .*name all classes"):
        short(ImageDataModule, "csv", data_files=path, class_names=2).load()


def test_class_names_that_contradict_the_data_are_refused(tmp_path):
    path = write_table(tmp_path)
    assert short(ImageDataModule, "parquet", data_files=path, class_names=sorted(COLOURS)).num_classes == 3
    with pytest.raises(ValueError, match="class_names says 0, 1, but label column 'label' declares blue, green, red"):
        short(ImageDataModule, "parquet", data_files=path, class_names=2).load()


def test_a_stream_is_told_its_classes(tmp_path):
    files = {
        "train": write_paths(tmp_path / "a", "json", range(3)),
        "test": write_paths(tmp_path / "b", "json", [0, 7]),
    }
    module = short(ImageDataModule, "json", data_files=files, streaming=True, class_names=3, **OPTIONS)
    assert module.id2label == {0: "0", 1: "1", 2: "2"}
    stream = module._samples("train", Preprocessing((8, 8), None).pixels)
    assert sorted({int(sample["labels"]) for sample, _ in zip(stream, range(24), strict=False)}) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"label 7 of column 'label' is none of the 3 classes 0, 1, 2"):
        list(module.test_dataloader())


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves csv streams open
def test_a_stream_of_a_format_that_declares_no_columns(tmp_path):
    path = write_paths(tmp_path / "a", labels=range(3))
    module = short(ImageDataModule, "csv", data_files=path, streaming=True, class_names=3, **OPTIONS)
    assert module.num_classes == 3
    assert module.load().image_column == "path"
    gc.collect()


def test_texts_that_are_numbers_come_in_numeric_order():
    assert natural_order({"10", "2", "1"}) == ["1", "2", "10"]
    assert natural_order({"b", "10", "a"}) == ["10", "a", "b"]


def test_a_label_of_the_test_split_that_training_never_saw(tmp_path):
    train = write_table(tmp_path, label=None, category=[sorted(COLOURS)[i % 2] for i in range(24)])
    test = write_table(tmp_path, "test", label=None, category=["mauve"] * 24)
    with pytest.raises(ValueError, match=r"label 'mauve' of column 'category'.*blue, green"):
        short(ImageDataModule, "parquet", data_files={"train": train, "test": test}).load()


def test_a_single_class_is_refused(tmp_path):
    data = table().remove_columns("label").add_column("label", ["only"] * 24)
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"a single class, \['only'\]"):
        short(ImageDataModule, "parquet", data_files=str(tmp_path / "train.parquet")).load()
    path = write_table(tmp_path, "same", label=[1] * 24)
    with pytest.raises(ValueError, match="all training pictures are of one class, 'green'"):
        short(ImageDataModule, "parquet", data_files=path).load()


def test_a_split_without_the_label_column_is_refused(tmp_path):
    splits = DatasetDict({"train": table(), "test": table().remove_columns("label")})
    splits.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"split 'test' has no column 'label'; its columns are image"):
        short(ImageDataModule, str(tmp_path / "both")).load()


def test_hidden_labels_of_a_test_split_leave_no_test(tmp_path):
    splits = DatasetDict({"train": table(), "test": table(label=[-1] * 24)})
    splits.save_to_disk(tmp_path / "both")
    module = short(ImageDataModule, str(tmp_path / "both"), **OPTIONS)
    with pytest.warns(UserWarning, match="24 of 24 rows of 'test' have no label"):
        assert not module.has("test")
    with pytest.raises(ValueError, match="no test split with labels"):
        module.test_dataloader()


def test_a_training_split_without_any_label(tmp_path):
    with (
        pytest.warns(UserWarning, match="no label"),
        pytest.raises(ValueError, match="no row of the training split has a label in column 'label'"),
    ):
        short(ImageDataModule, "parquet", data_files=write_table(tmp_path, label=[-1] * 24)).load()


def test_class_ids_beyond_the_names_are_refused():
    with pytest.raises(ValueError, match="class ids run from 0 to 7, but there are 3 classes"):
        Source({}, "image", class_names=["a", "b", "c"]).counts(np.array([0, 7]))


def test_the_class_table_shows_ids_names_and_counts(tmp_path, caplog):
    folder = write_folder(tmp_path / "p", names={"1": 0, "2": 0, "10": 0}, splits=("train", "validation"), per_class=2)
    (folder / "train" / "10" / "scan.heic").touch()
    module = short(ImageDataModule, "imagefolder", data_dir=str(folder), **OPTIONS)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match=r"of '10' that are not used: 1 \.heic"):
        module.setup("fit")
    lines = [line.split() for line in caplog.text.splitlines()]
    assert ["1", "10", "5", "4", "2", "2"] in lines  # id 1 is class "10", for names are sorted as text
    assert ["all", "13", "12", "6", "6"] in lines


def test_classes_without_a_training_picture_are_pointed_out(tmp_path):
    path = write_table(tmp_path, label=[i % 2 for i in range(24)])
    module = short(ImageDataModule, "parquet", data_files=path, **OPTIONS)
    with pytest.warns(UserWarning, match="1 classes have no training picture: red"):
        module.setup("fit")


# Files and splits.


@pytest.mark.parametrize("given", ["gone.parquet", ["gone.parquet"], {"train": "gone.parquet"}], ids=str)
def test_a_missing_file_is_named(given):
    with pytest.raises(FileNotFoundError, match=r"data file 'gone.parquet' does not exist \(looked in /"):
        short(ImageDataModule, "parquet", data_files=given).load()


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="data_dir 'gone' is not a folder"):
        short(ImageDataModule, "imagefolder", data_dir="gone").load()


def test_a_format_needs_files():
    with pytest.raises(ValueError, match="dataset 'parquet' is a format; say where the files are"):
        ImageDataModule()


def test_an_empty_split_is_named(tmp_path):
    if tuple(map(int, datasets.__version__.split(".")[:2])) < (5, 2):
        pytest.skip("earlier releases of datasets write no table without rows")
    train, test = write_table(tmp_path), tmp_path / "test.parquet"
    table().select([]).to_parquet(test)
    with pytest.raises(ValueError, match=r"a split of 'parquet' is empty: .*test"):
        short(ImageDataModule, "parquet", data_files={"train": train, "test": str(test)}).load()
    DatasetDict({"train": table(), "test": table().filter(lambda _: False)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"split 'test' of .* is empty: it has columns"):
        short(ImageDataModule, str(tmp_path / "saved")).load()


@pytest.mark.parametrize("names", [["test"], ["validation"], ["test", "validation"]], ids=str)
def test_splits_without_a_training_split_can_be_measured_but_not_trained_on(tmp_path, names):
    DatasetDict({name: table() for name in names}).save_to_disk(tmp_path / "saved")
    module = short(ImageDataModule, str(tmp_path / "saved"), **OPTIONS)
    module.setup("test")
    assert module.id2label == dict(enumerate(sorted(COLOURS)))
    assert module.split_sizes == dict.fromkeys(sorted(names, reverse=True), 24)
    assert module.class_counts == {} and not any(split.classes for split in module.facts().splits.values())
    loader = module.test_dataloader() if "test" in names else module.val_dataloader()
    assert torch.cat([batch["labels"] for batch in loader]).tolist() == [i % 3 for i in range(24)]
    with pytest.raises(ValueError, match=r"has no training split, only .*; give one to train on"):
        module.setup("fit")


def test_no_split_with_a_known_name(tmp_path):
    DatasetDict({"one": table(), "two": table()}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no training split among \['one', 'two'\]"):
        short(ImageDataModule, str(tmp_path / "saved")).load()


def test_validation_is_held_out_of_training_never_of_test(tmp_path):
    module = digits(validation_fraction=0.1)
    train, validation = module._rows["train"], module._rows["validation"]
    assert len(train) + len(validation) == 1437
    assert not set(train) & set(validation)
    assert module.split_sizes["test"] == 360
    counts = np.bincount(module._labels["validation"])
    assert counts.min() >= 14 and counts.max() <= 15  # a tenth of 139 to 146
    again = digits(validation_fraction=0.1, seed=99)
    assert again.split_sizes == module.split_sizes
    np.testing.assert_array_equal(again._rows["validation"], validation)  # another seed is measured on the same rows
    assert digits(split_seed=1).load() and not np.array_equal(digits(split_seed=1)._rows.get("validation"), validation)


def digits(**options) -> ImageDataModule:
    files = {"train": str(DIGITS / "train.parquet"), "test": str(DIGITS / "test.parquet")}
    module = short(ImageDataModule, "parquet", data_files=files, **options)
    module.load()
    return module


def test_a_stored_validation_split_is_used(tmp_path):
    files = {"train": write_table(tmp_path), "validation": write_table(tmp_path, "validation", rows=6)}
    module = short(ImageDataModule, "parquet", data_files=files, **OPTIONS)
    assert module.split_sizes == {"train": 24, "validation": 6}


def test_a_test_split_can_be_held_out(tmp_path):
    options = OPTIONS | {"test_fraction": 0.25}
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **options)
    assert module.split_sizes == {"train": 14, "validation": 4, "test": 6}
    rows = np.concatenate([module._rows[name] for name in ("train", "validation", "test")])
    assert sorted(rows) == list(range(24))


def test_a_fraction_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"validation_fraction 0.01 of 24 training pictures is none"):
        short(ImageDataModule, "parquet", data_files=write_table(tmp_path), validation_fraction=0.01).load()


def test_held_out_rows_are_recorded(tmp_path):
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **OPTIONS)
    module.save_split(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "split.json").read_text())
    assert record["validation"] == module._rows["validation"].tolist()
    assert record["fingerprint"] == module.fingerprint
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)  # Lightning 2.6.6
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("place", ["run", "."])
def test_held_out_rows_are_recorded_without_a_logger_where_the_run_has_a_folder(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    data = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **(OPTIONS | {"image_size": 16}))
    model = short(SwinClassifier, "swin_digits_patch4_window4_32", image_size=16, num_labels=3, warmup_epochs=0)
    trainer(place, max_epochs=1, limit_train_batches=1, limit_val_batches=1).fit(model, data)
    assert (tmp_path / place / "split.json").is_file() == (place == "run")


def state_after(tmp_path, **options):
    """Checkpoint and data of one epoch with batches of 4, two of which make a step."""
    trained = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    data = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **(OPTIONS | {"image_size": 16}))
    trained.fit(small_classifier(**options), data)
    trained.save_checkpoint(tmp_path / "end.ckpt")
    return tmp_path / "end.ckpt"


def small_classifier(**options):
    options = {"image_size": 16, "num_labels": 3, "warmup_epochs": 0, "drop_path_rate": 0.0} | options
    return short(SwinClassifier, "swin_digits_patch4_window4_32", **options)


def go_on(tmp_path, checkpoint, batch_size, accumulate, **options):
    data = short(
        ImageDataModule,
        "parquet",
        data_files=write_table(tmp_path),
        **(OPTIONS | {"image_size": 16, "batch_size": batch_size}),
    )
    resumed = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    try:
        resumed.fit(small_classifier(**options), data, ckpt_path=checkpoint, weights_only=True)
    finally:
        resumed.save_checkpoint(tmp_path / "after.ckpt")  # as a run's last.ckpt, whatever happened
    return tmp_path / "after.ckpt"


@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)  # Lightning 2.6.6
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_resume_with_other_images_a_step_is_refused_where_the_rate_follows_them(tmp_path):
    checkpoint = state_after(tmp_path)
    go_on(tmp_path, checkpoint, batch_size=8, accumulate=1)
    for batch_size, accumulate in ((4, 1), (8, 2)):
        with pytest.raises(ValueError, match=r"trained with 8 images a step, and this run has \d+ \(batch_size"):
            go_on(tmp_path, checkpoint, batch_size, accumulate)
        with pytest.raises(ValueError, match="trained with 8 images a step"):  # trying again does not help
            go_on(tmp_path, tmp_path / "after.ckpt", batch_size, accumulate)
    old = torch.load(checkpoint, weights_only=True)
    del old["ImageDataModule"]["images_per_step"]  # as it was written before there was such an entry
    torch.save(old, tmp_path / "old.ckpt")
    after = go_on(tmp_path, tmp_path / "old.ckpt", batch_size=8, accumulate=2)
    assert torch.load(after, weights_only=True)["ImageDataModule"]["images_per_step"] == 16


@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)  # Lightning 2.6.6
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_resume_with_other_images_a_step_is_accepted_where_the_rate_is_given(tmp_path):
    checkpoint = state_after(tmp_path, lr_scaling=False)
    go_on(tmp_path, checkpoint, batch_size=8, accumulate=2, lr_scaling=False)


def test_stratified_split_keeps_proportions_and_one_of_each():
    labels = np.repeat([0, 1, 2, 3], [1, 100, 40, 9])
    kept, held = stratified_split(labels, 30, seed=0)
    assert len(held) == 30
    assert sorted([*kept, *held]) == list(range(150))
    assert np.bincount(labels[held], minlength=4).tolist() in ([0, 20, 8, 2], [0, 20, 9, 1], [0, 21, 8, 1])
    kept, held = stratified_split(labels, 150, seed=0)
    assert np.bincount(labels[kept]).tolist() == [1, 1, 1, 1]


def test_limit_train_is_exact_and_stratified():
    module = digits(limit_train=100)
    assert module.split_sizes["train"] == 100
    assert set(module.class_counts.values()) <= {9, 10, 11}
    module = digits(limit_train=1290)  # of 1294: more than the classes can spare if each keeps one
    assert module.split_sizes["train"] == 1290 == len(set(module._rows["train"]))


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    prints = []
    for folder, columns in (("a", {}), ("b", {}), ("b", {"label": [0, 0, 1] * 8})):
        path = write_table(tmp_path / folder, **columns)
        module = short(ImageDataModule, "parquet", data_files=path, **OPTIONS)
        prints.append(module.fingerprint)
    assert prints[0] == prints[1] != prints[2]


# Unreadable pictures.


def broken(tmp_path, rows=24, bad=(2, 5), **options) -> ImageDataModule:
    for index in range(rows):
        picture(COLOURS[sorted(COLOURS)[index % 3]], seed=index).save(tmp_path / f"{index}.png")
    for index in bad:
        (tmp_path / f"{index}.png").write_bytes(b"half a file")
    features = Features({"image": Image(), "label": ClassLabel(names=sorted(COLOURS))})
    values = {"image": [str(tmp_path / f"{i}.png") for i in range(rows)], "label": [i % 3 for i in range(rows)]}
    Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "saved")
    return short(ImageDataModule, str(tmp_path / "saved"), **(OPTIONS | {"validation_fraction": 0} | options))


def test_unreadable_picture_stops_with_its_name_by_default(tmp_path):
    module = broken(tmp_path)
    with pytest.raises(UnreadablePictureError, match=r"train row [25]: .*[25]\.png: UnidentifiedImageError.*on_error"):
        list(module.train_dataloader())


@pytest.mark.parametrize(("policy", "total"), [("skip", 22), ("replace", 24)])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_passed_over_and_counted(tmp_path, caplog, policy, total, workers):
    module = broken(tmp_path, on_error=policy, num_workers=workers)
    batches = [module.on_before_batch_transfer(batch, 0) for batch in module.train_dataloader()]
    assert sum(len(batch["labels"]) for batch in batches) == total
    assert all(set(batch) == {"pixel_values", "labels"} for batch in batches)
    for batch in batches:
        assert (2 - batch["pixel_values"].float().mean((2, 3)).argmax(1)).tolist() == batch["labels"].tolist()
    assert module.facts().unreadable == 2
    with caplog.at_level("INFO"):
        module.teardown("fit")
    assert "2 pictures could not be read" in caplog.text
    assert "5.png" in caplog.text


def test_evaluation_never_counts_a_picture_twice(tmp_path):
    module = broken(tmp_path, on_error="replace", validation_fraction=0, test_fraction=0.5)
    module.load()
    bad = set(module._rows["test"]) & {2, 5}
    seen = sum(len(batch["labels"]) for batch in module.test_dataloader())
    assert seen == 12 - len(bad)


def test_a_training_batch_is_never_empty(tmp_path):
    module = broken(tmp_path, bad=range(20), on_error="skip", batch_size=2)
    assert all(len(batch["labels"]) >= 1 for batch in module.train_dataloader())


def test_only_unreadable_pictures_are_an_error(tmp_path):
    module = broken(tmp_path, bad=range(24), on_error="replace")
    with pytest.raises(UnreadablePictureError, match="pictures tried in its place are all unreadable"):
        list(module.train_dataloader())
    with pytest.raises(UnreadablePictureError, match="no picture of a batch of 2 can be read: a"):
        module.on_before_batch_transfer(collate([{"unreadable": "a"}, {"unreadable": "b"}]), 0)


@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)  # Lightning 2.6.6
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_evaluation_batch_that_cannot_be_read_changes_no_metric(tmp_path, batch_size):
    """The metrics are those of the readable pictures, even where a batch has none."""
    found = []
    for name, bad in (("three bad", range(3)), ("good only", ())):
        rows = [row for row in range(8) if bad or row > 2]
        folder = tmp_path / name
        (folder / "files").mkdir(parents=True)
        for row in rows:
            picture(COLOURS[sorted(COLOURS)[row % 3]], seed=row).save(folder / "files" / f"{row}.png")
        for row in bad:
            (folder / "files" / f"{row}.png").write_bytes(b"half a file")
        features = Features({"image": Image(), "label": ClassLabel(names=sorted(COLOURS))})
        files = [str(folder / "files" / f"{row}.png") for row in rows]
        test = Dataset.from_dict({"image": files, "label": [row % 3 for row in rows]}, features=features)
        DatasetDict(train=table(), test=test).save_to_disk(folder / "saved")
        options = OPTIONS | {"image_size": 16, "on_error": "skip", "eval_batch_size": batch_size}
        data = short(ImageDataModule, str(folder / "saved"), **options)
        names = dict(enumerate(sorted(COLOURS)))
        model = short(SwinClassifier, "swin_digits_patch4_window4_32", image_size=16, id2label=names)
        model.load_state_dict(found[0][1].state_dict() if found else model.state_dict())
        found.append((trainer(tmp_path, RunRecord()).test(model, data, verbose=False)[0], model))
        worst = [shown for _, shown in model.sheets["worst_pictures"].kept]
        assert len(worst) == len(model.sheets["sample_pictures"].kept) == 5
        for shown in worst:  # each picture has the name of its file, although others could not be read
            assert shown.captions[0].startswith(f"label {sorted(COLOURS)[int(shown.file.split('.')[0]) % 3]}\n")
        simmim = short(SwinMaskedImageModeler, "swin_digits_patch4_window4_32", image_size=16, mask_cell=8)
        trainer(tmp_path).test(simmim, data, verbose=False)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)


# Pixels.


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"resize_mode": "squash"},
        {"resize_mode": "squash", "image_size": (24, 40), "interpolation": "bilinear"},
        {"resize_mode": "crop"},
        {"resize_mode": "crop", "image_size": (40, 24), "crop_pct": 0.9, "interpolation": "nearest"},
    ],
    ids=["squash", "squash-rectangle", "crop", "crop-rectangle"],
)
def test_the_image_processor_gives_the_pixels_of_the_evaluation(tmp_path, channels, options):
    """Saved, loaded by AutoImageProcessor, bit for bit: what is measured is what a user of the weights gets."""
    sizes = ((8, 8), (100, 57), (33, 300))
    pictures = [picture((90, 120, 30), size, seed) for seed, size in enumerate(sizes)]
    if channels == 3:
        pictures.append(PILImage.fromarray(np.random.default_rng(3).integers(0, 256, (30, 20, 4), dtype=np.uint8)))
    else:
        pictures = [item.convert("L") for item in pictures]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    labels = [0, 1, 0, 1][: len(pictures)]
    data = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    module = short(
        ImageDataModule, str(tmp_path / "saved"), num_channels=channels, validation_fraction=0, num_workers=0, **options
    )
    module.image_processor().save_pretrained(tmp_path / "model")
    SwinHFConfig().save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    (batch,) = module.test_dataloader()
    ours = module.on_after_batch_transfer(batch, 0)["pixel_values"]
    for index, item in enumerate(pictures):
        theirs = processor(item, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours[index], theirs)


def test_channel_statistics_of_the_dataset(tmp_path):
    module = short(
        ImageDataModule, "parquet", data_files=write_table(tmp_path), mean="dataset", std="dataset", **OPTIONS
    )
    module.load()
    train = [np.asarray(table()[int(i)]["image"]) / 255 for i in module._rows["train"]]
    stacked = np.stack(train).reshape(-1, 3)
    np.testing.assert_allclose(module.mean, stacked.mean(0), atol=0.01)
    np.testing.assert_allclose(module.std, stacked.std(0), atol=0.02)
    assert list(module.image_processor().image_mean) == module.mean


def test_statistics_of_one_colour_are_refused(tmp_path):
    path = write_table(tmp_path, image=[PILImage.new("RGB", (4, 4), (9, 9, 9))] * 24)
    with pytest.raises(ValueError, match="training pictures are of one colour"):
        short(ImageDataModule, "parquet", data_files=path, mean="dataset", **OPTIONS).load()


def test_random_erasing_is_for_training_only(tmp_path):
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), erasing=1.0, **OPTIONS)
    batch = {"pixel_values": torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)}
    pixels = module.on_after_batch_transfer(batch, 0)["pixel_values"]
    assert (pixels.amax((2, 3)) == pixels.amin((2, 3))).all()


def test_loaders_can_be_pickled_and_hold_no_trainer(tmp_path):
    """Bound methods of the data module would drag the Trainer along: "cannot pickle '_thread.lock'", in DDP only."""
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **OPTIONS)
    module.trainer = module_trainer()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        dataset = pickle.loads(pickle.dumps(loader.dataset))
        assert len(dataset) == len(loader.dataset)
        pickle.dumps(loader.collate_fn)


def module_trainer():
    from exact_run import trainer

    return trainer("unused")


@pytest.mark.slow
def test_workers_started_afresh_give_the_same_batches(tmp_path):
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **OPTIONS)
    loader = module.train_dataloader()
    here = DataLoader(loader.dataset, batch_size=4, sampler=range(18), collate_fn=collate)
    spawned = DataLoader(
        loader.dataset,
        batch_size=4,
        sampler=range(18),
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context="forkserver",
    )
    for ours, theirs in zip(here, spawned, strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


# Facts, arithmetic and options.


def test_facts_are_plain_and_hold_no_absolute_path(tmp_path):
    module = short(ImageDataModule, "parquet", data_files={"train": write_table(tmp_path)}, **OPTIONS)
    facts = module.facts()
    assert str(tmp_path) not in json.dumps(asdict(facts))
    assert facts.splits["train"].classes == {"blue": 6, "green": 6, "red": 6}


@pytest.mark.parametrize(
    ("size", "batch", "world", "accumulate", "steps"),
    [(18, 4, 1, 1, 4), (18, 4, 2, 1, 2), (18, 4, 1, 3, 2), (18, 64, 1, 1, 1), (18, 9, 2, 4, 1)],
)
def test_steps_per_epoch(tmp_path, size, batch, world, accumulate, steps):
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path), **(OPTIONS | {"batch_size": batch}))
    assert module.split_sizes["train"] == size
    assert module.steps_per_epoch(world, accumulate) == steps
    if world == 1 and accumulate == 1:
        assert len(module.train_dataloader()) == len(list(module.train_dataloader())) == steps


def test_unlabelled_pictures(tmp_path):
    module = short(ImageDataModule, "parquet", data_files=write_table(tmp_path, label=None), labelled=False, **OPTIONS)
    module.setup("fit")
    assert module.num_classes == 0
    assert set(next(iter(module.train_dataloader()))) == {"pixel_values"}
    assert module.split_sizes == {"train": 18, "validation": 6}


def test_the_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert short(ImageDataModule, "someone/pictures").seed == 17
    assert short(ImageDataModule, "someone/pictures", seed=4).seed == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 0}, "num_channels is 0; it must be in"),
        ({"batch_size": 0}, "batch_size is 0; it must be in"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1; it must be in"),
        ({"image_size": (0, 8)}, r"image_size is \(0, 8\); it must be in"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; it must be in"),
        ({"test_fraction": -0.1}, "test_fraction is -0.1; it must be in"),
        ({"crop_pct": 0}, "crop_pct is 0; it must be in"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'; it must be"),
        ({"resize_mode": "pad"}, "resize_mode is 'pad'; it must be"),
        ({"auto_augment": "rand-m9"}, "auto_augment is 'rand-m9'; it must be"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; it must be"),
        ({"limit_train": 0}, "limit_train is 0; it must be in"),
        ({"class_names": ["a", "b", "a"]}, "class_names a, b, a names a class twice"),
        ({"std": [0.5, 0.0, 0.5]}, r"std is \[0.5, 0.0, 0.5\]; it must be in"),
        ({"background": (300, -1, 0)}, r"background is \(300, -1, 0\); it must be in"),
        ({"mean": [0.5]}, r"1 values \[0.5\] in mean or std for 3 channels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        short(ImageDataModule, "someone/pictures", **options)


def test_streams_refuse_what_they_cannot_know(tmp_path):
    path = write_table(tmp_path)
    with pytest.raises(ValueError, match='mean="dataset" needs the pictures at hand'):
        short(ImageDataModule, "parquet", data_files=path, streaming=True, mean="dataset").load()
    path = write_table(tmp_path, label=None, category=["a", "b"] * 12)
    with pytest.raises(ValueError, match="a stream does not tell which classes will come"):
        short(ImageDataModule, "parquet", data_files=path, streaming=True).load()


def test_the_default_recipe_data_are_what_their_readme_says():
    module = digits(validation_fraction=0)
    assert module.split_sizes == {"train": 1437, "test": 360}
    assert (min(module.class_counts.values()), max(module.class_counts.values())) == (139, 146)
    assert os.path.getsize(DIGITS / "train.parquet") + os.path.getsize(DIGITS / "test.parquet") < 300_000
