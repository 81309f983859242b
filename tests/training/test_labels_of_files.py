"""Labels are names: tables are read as the text that is in them, and files that number their classes apart by name."""

import json

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from short import short

from swin_hf.training import ImageDataModule
from swin_hf.training.data.sources import load_source

OPTIONS = {"image_size": 8, "batch_size": 4, "validation_fraction": 0, "num_workers": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()


def picture(value):
    return PILImage.new("RGB", (4, 4), (value, value, value))


def names_of(source, split="train"):
    """Class name of each row; None without a label."""
    return [None if label < 0 else source.class_names[label] for label in source.labels(split)]


# Shards: the brightness of a picture says its class, whatever number the file gives it.

SHADES = {"ant": 40, "bee": 120, "cow": 200}


def shard(path, labels, declared=None):
    """Write pictures of the shades of ``labels``; ``declared`` are the file's own names, none for text labels."""
    feature = Value("string") if declared is None else ClassLabel(names=declared)
    features = Features({"image": Image(), "label": feature})
    values = labels if declared is None else [declared.index(label) for label in labels]
    data = Dataset.from_dict(
        {"image": [picture(SHADES[label]) for label in labels], "label": values}, features=features
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        data.save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        data.to_parquet(path)
    return str(path)


def shown_and_said(module, loader):
    """``{(class by brightness, class by label)}`` of a loader's batches."""
    by_shade = {shade: name for name, shade in SHADES.items()}
    return {
        (by_shade[int(pixels.float().mean().round())], module.id2label[int(label)])
        for batch in loader
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    }


ALL = [["ant", "bee", "cow"] * 4, ["ant", "bee", "cow"]]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([ALL], (["ant", "cow"] * 3, ["ant", "cow"]), ["ant", "bee", "cow"]),
        ([(["ant", "bee"] * 3, ["ant", "bee"]), (["bee", "cow"] * 3, ["bee", "cow"])], ALL, ["ant", "bee", "cow"]),
        ([(["cow", "ant"] * 3, ["cow", "ant"]), (["bee", "cow"] * 3, None)], ALL, ["ant", "bee", "cow"]),
        ([(ALL[0], None), ALL], (["bee"] * 4, ["cow", "bee", "ant"]), ["ant", "bee", "cow"]),
        ([(["ant", "bee"] * 3, ["bee", "cow", "ant"])], ALL, ["bee", "cow", "ant"]),
    ],
    ids=["test apart", "two shards", "text after names", "text before names", "another order"],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder", "stream"])
def test_shards_are_matched_by_name(tmp_path, kind, train, test, expected):
    if kind == "stream" and any(declared is None for _, declared in train):
        pytest.skip("a stream does not tell its texts")
    suffix = "arrow" if kind == "arrow" else "parquet"
    files = {
        "train": [shard(tmp_path / "d" / f"train-{n}.{suffix}", *one) for n, one in enumerate(train)],
        "test": [shard(tmp_path / "d" / f"test-0.{suffix}", *test)],
    }
    if kind == "folder":
        module = short(ImageDataModule, str(tmp_path / "d"), **OPTIONS)
    else:
        module = short(ImageDataModule, suffix, data_files=files, streaming=kind == "stream", **OPTIONS)
    assert list(module.id2label.values()) == expected
    for loader, parts in ((module.test_dataloader(), [test]), (None, train)):
        if loader is None and kind == "stream":
            source = module.load()
            rows = list(source.splits["train"])
            assert [source.class_names[row["label"]] for row in rows] == [
                name for labels, _ in parts for name in labels
            ]
        elif loader is None:
            data = module._samples("train", torch_pixels)
            said = [module.id2label[int(sample["labels"])] for sample in data.__getitems__(range(len(data)))]
            assert said == [name for labels, _ in parts for name in labels]
        else:
            assert shown_and_said(module, loader) == {(name, name) for labels, _ in parts for name in labels}


def torch_pixels(image):
    return torch.from_numpy(np.asarray(image)[..., :1].copy()).permute(2, 0, 1)


def test_splits_saved_to_disk_are_matched_by_name(tmp_path):
    splits = {}
    for split, declared in (("train", ["ant", "bee", "cow"]), ("test", ["cow", "ant", "bee"])):
        splits[split] = Dataset.from_parquet(shard(tmp_path / f"{split}.parquet", ALL[0], declared))
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = load_source(str(tmp_path / "saved"))
    assert names_of(source, "test") == names_of(source, "train") == ALL[0]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (ALL, (["ant"] * 3, None, Value("int64")), "some files declare the classes ant, bee, cow, others have numbers"),
        (ALL, (["ant"] * 3, ["0", "1"], None), r"numbers without names \(0, 1\)"),
        (ALL, (["cow"] * 3, ["Ant", "cow"], None), "'test' declares the classes Ant, cow, and 'train' ant, bee, cow"),
    ],
    ids=["integers", "numbers as names", "another name"],
)
def test_classes_that_cannot_be_matched_are_refused_with_both_tables(tmp_path, first, second, message):
    labels, declared, feature = second
    ids = [0] * len(labels)
    features = Features({"image": Image(), "label": feature or ClassLabel(names=declared)})
    Dataset.from_dict({"image": [picture(9)] * len(labels), "label": ids}, features=features).to_parquet(
        tmp_path / "test.parquet"
    )
    files = {"train": shard(tmp_path / "train.parquet", *first), "test": str(tmp_path / "test.parquet")}
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            short(load_source, "parquet", data_files=files, streaming=streaming)


# Tables.


def write_table(folder, text, name="train.csv", rows=9):
    """Write a table and its pictures ``0.png``, ``1.png``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rows):
        picture(number).save(folder / f"{number}.png")
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


LABELS = [
    (["007", "7", "012", "7"], ["007", "7", "012"]),
    (["None", "scratch", "dent"], ["None", "dent", "scratch"]),
    (["NA", "null", "nan", "N/A"], ["N/A", "NA", "nan", "null"]),
    (["1e3", "1000", "1.0"], ["1.0", "1000", "1e3"]),
    (["True", "true", "yes"], ["True", "true", "yes"]),
    (["2024-01-01", "2024-02-28"], ["2024-01-01", "2024-02-28"]),
    (["", "a", "b", ""], ["a", "b"]),
    ([" cat", "cat ", "dog", "cat"], ["cat", "dog"]),
]


@pytest.mark.filterwarnings("ignore:.*have no label")
@pytest.mark.parametrize("kind", [",", ";", "\t", "|", "jsonl", "json", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize(("labels", "classes"), LABELS, ids=lambda value: "+".join(value))
def test_a_label_of_a_table_is_the_text_in_the_file(tmp_path, kind, labels, classes):
    column = "file_name" if kind.startswith("metadata") else "path"
    if kind.endswith("jsonl"):
        lines = [f'{{"{column}": "{n}.png", "label": "{label}"}}' for n, label in enumerate(labels)]
    elif kind == "json":
        lines = [json.dumps([{"path": f"{n}.png", "label": label} for n, label in enumerate(labels)], indent=1)]
    else:
        separator = "," if kind.startswith("metadata") else kind
        lines = [f"{column}{separator}label", *(f"{n}.png{separator}{label}" for n, label in enumerate(labels))]
    name = kind if kind.startswith("metadata") else f"train.{kind}" if "json" in kind else "train.csv"
    path = write_table(tmp_path / "t", "\n".join(lines) + "\n", name, rows=len(labels))
    if kind.startswith("metadata"):
        source = load_source("imagefolder", data_dir=str(tmp_path / "t"))
    else:
        source = load_source("json" if "json" in kind else "csv", data_files=path)
    assert source.class_names == classes
    assert names_of(source) == [label.strip() or None for label in labels]


def test_empty_cells_are_counted(tmp_path):
    path = write_table(tmp_path / "t", "path,label\n0.png,a\n1.png,\n2.png,b\n3.png,None\n")
    with pytest.warns(UserWarning, match="1 of 4 rows of 'train' have no label"):
        module = short(ImageDataModule, "csv", data_files=path, **OPTIONS)
        assert module.class_counts == {"None": 1, "a": 1, "b": 1}


def test_a_table_that_is_not_utf_8_or_names_a_column_twice(tmp_path):
    write_table(tmp_path / "t", "")
    (tmp_path / "t" / "train.csv").write_bytes("path,größe\n0.png,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train.csv is not UTF-8 text .*save the table as CSV in UTF-8"):
        load_source("csv", data_files=str(tmp_path / "t" / "train.csv"))
    path = write_table(tmp_path / "t", "path,label,label\n0.png,a,b\n")
    with pytest.raises(ValueError, match="names a column twice in its first line: path, label, label"):
        load_source("csv", data_files=path)


@pytest.mark.parametrize(
    "text",
    ['{"path": "0.png", "label": "a"}\n{"path": "1.png", "label": 1}', '{"data": [\n{"path": "0.png"}]}', "[1, 2]"],
    ids=["types", "nested", "no objects"],
)
def test_json_that_is_no_table(tmp_path, text):
    path = write_table(tmp_path / "t", text, "train.json")
    with pytest.raises(ValueError, match=r"train.json is neither a list of objects nor one object in each line"):
        load_source("json", data_files=path)


def test_a_mark_at_the_start_of_the_file_and_blanks_around_columns(tmp_path):
    path = write_table(tmp_path / "t", "\ufeffpath, label\n0.png, a\n1.png, b\n")
    source = load_source("csv", data_files=path)
    assert (source.image_column, source.label_column, source.class_names) == ("path", "label", ["a", "b"])
    assert source.splits["train"][0]["path"]["path"] == "0.png"


@pytest.mark.parametrize("way", ["file", "folder", "file in folder", "split"])
@pytest.mark.parametrize("place", ["a [b]", "x*y", "what?[1-2]"])
def test_names_of_files_and_folders_are_no_patterns(tmp_path, place, way):
    path = write_table(tmp_path / place, "path,label\n0.png,a\n1.png,b\n", "train[1].csv", rows=2)
    options = {
        "file": {"data_files": path},
        "folder": {"data_dir": str(tmp_path / place)},
        "file in folder": {"data_dir": str(tmp_path / place), "data_files": "train[1].csv"},
        "split": {"data_files": {"train": [path]}},
    }[way]
    source = load_source("csv", **options)
    assert names_of(source) == ["a", "b"]
    assert source.roots == {"train": str(tmp_path / place)}


# A column that is the split.


@pytest.mark.parametrize("kind", ["csv", "json", "metadata", "parquet"])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ["train", "test", "train", "val", "test", "train"]),
        ("Fold", ["Train", "TEST", "training", "dev", "testing", "train"]),
        ("set", ["train", " test", "train ", "valid", "test", "train"]),
    ],
)
def test_a_column_of_splits_divides_the_data(tmp_path, caplog, kind, column, values):
    rows = [(f"{n}.png", "ab"[n % 2], value) for n, value in enumerate(values)]
    key = "file_name" if kind == "metadata" else "path"
    text = "\n".join([f"{key},label,{column}", *(",".join(row) for row in rows)]) + "\n"
    path = write_table(tmp_path / "t", text, "metadata.csv" if kind == "metadata" else "train.csv", rows=len(rows))
    options = {"dataset": "csv", "data_files": path}
    if kind == "metadata":
        options = {"dataset": "imagefolder", "data_dir": str(tmp_path / "t")}
    elif kind != "csv":
        data = Dataset.from_dict(dict(zip((key, "label", column), map(list, zip(*rows, strict=True)), strict=True)))
        options = {"dataset": kind, "data_files": str(tmp_path / "t" / f"data.{kind}")}
        (data.to_json if kind == "json" else data.to_parquet)(options["data_files"])
    with caplog.at_level("INFO"):
        source = load_source(**options)
    assert {name: names_of(source, name) for name in source.splits} == {
        "train": ["a", "a", "b"],
        "validation": ["b"],
        "test": ["b", "a"],
    }
    assert f"column '{column}' is used as the split: 3 train, 1 validation, 2 test" in caplog.text


def test_what_a_column_of_splits_does_not_say(tmp_path, caplog):
    text = "path,label,fold\n0.png,a,1\n1.png,b,2\n2.png,a,1\n"
    with caplog.at_level("INFO"):
        source = load_source("csv", data_files=write_table(tmp_path / "t", text))
    assert names_of(source) == ["a", "b", "a"]
    assert (
        "column 'fold' is not used as the split: it has no names of splits, but 1 (2 rows), 2 (1 rows)" in caplog.text
    )
    text = "path,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,trian\n3.png,a,\n"
    with pytest.warns(UserWarning, match=r"2 rows are not used, .*: trian \(1 rows\), None \(1 rows\)"):
        source = load_source("csv", data_files=write_table(tmp_path / "t", text))
    assert names_of(source) == ["a", "b"]
    with pytest.warns(UserWarning, match="column 'split' is not used as the split, for the rows of a stream"):
        short(load_source, "csv", data_files=write_table(tmp_path / "t", text), streaming=True, class_names=["a", "b"])
    source = short(load_source, "csv", data_files=write_table(tmp_path / "t", text), label_column="split")
    assert source.class_names == ["train", "trian"]


# Tables of metadata in a folder of pictures.


def test_metadata_of_splits_and_their_pictures(tmp_path):
    for split in ("train", "test"):
        text = "file_name,species\n0.png,a\n1.png,b\n"
        write_table(tmp_path / split, text, "metadata.csv", rows=2 + (split == "test"))
    with pytest.warns(UserWarning, match=r"1 pictures, such as .*test/2.png, are not used: no metadata name them"):
        source = short(load_source, "imagefolder", data_dir=str(tmp_path), label_column="species")
    assert {name: names_of(source, name) for name in source.splits} == {"train": ["a", "b"], "test": ["a", "b"]}
    assert source.splits["test"][1]["image"]["path"] == str(tmp_path / "test" / "1.png")


def test_metadata_above_the_splits(tmp_path):
    for split in ("train", "val"):
        write_table(tmp_path / split, "", "empty.txt", rows=2)
    (tmp_path / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{s}/{n}.png", "label": "{n}"}}\n' for s in ("train", "val") for n in (0, 1))
    )
    source = load_source(str(tmp_path))
    assert {name: names_of(source, name) for name in source.splits} == {"train": ["0", "1"], "validation": ["0", "1"]}


def test_metadata_name_the_column_of_their_pictures(tmp_path):
    write_table(tmp_path, "photo_file_name,label\n0.png,a\n1.png,b\n", "metadata.csv", rows=2)
    source = load_source(str(tmp_path))
    assert source.image_column == "photo" and names_of(source) == ["a", "b"]


def test_metadata_that_names_other_pictures(tmp_path):
    write_table(tmp_path, "file_name,label\n0.png,a\n1.png,b\ngone.png,b\n", "metadata.csv", rows=2)
    with pytest.warns(UserWarning, match=r"1 pictures that the metadata name do not exist, such as .*gone.png"):
        load_source("imagefolder", data_dir=str(tmp_path))
    write_table(tmp_path, "picture,label\n0.png,a\n", "metadata.csv", rows=2)
    with pytest.raises(ValueError, match=r"has the columns picture, label; it must name the pictures in .* file_name"):
        load_source("imagefolder", data_dir=str(tmp_path))
