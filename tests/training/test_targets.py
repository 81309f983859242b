"""Several labels a picture, and numbers: every way to store them gives the same rows; what is no label is refused."""

import datetime

import numpy as np
import pytest
from conftest import TRAINING_WARNINGS
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from swin_hf.training import ImageDataModule, MultiLabelDataModule, Reading, RegressionDataModule, Splits

pytestmark = TRAINING_WARNINGS

NAMES = ["red", "green", "blue"]
ROWS = [[int(number % 2 == 0), int(number % 3 == 0), int(number % 10 == 7)] for number in range(30)]
COLUMNS = {
    "labels": (List(ClassLabel(names=NAMES)), [np.flatnonzero(row).tolist() for row in ROWS]),
    "words": (List(Value("string")), [[f" {NAMES[place]}" for place in np.flatnonzero(row)] for row in ROWS]),
    "numbers": (List(Value("int64")), [[10 * place for place in np.flatnonzero(row)] for row in ROWS]),
    **{name: (Value("int64"), [row[place] for row in ROWS]) for place, name in enumerate(NAMES)},
    "is_red": (Value("bool"), [bool(row[0]) for row in ROWS]),
    "says_red": (Value("string"), ["true" if row[0] else "0" for row in ROWS]),
    "age": (Value("float64"), [number / 4 for number in range(30)]),
    "year": (Value("int64"), [1990 + number for number in range(30)]),
    "text": (Value("string"), [str(number / 4) for number in range(30)]),
    "box": (List(List(Value("float32"))), [[[0.0, 0.0, 1.0, 1.0]]] * 30),
    "objects": ({"bbox": List(List(Value("float32"))), "id": List(Value("int64"))}, [{"bbox": [], "id": []}] * 30),
    "nested": (List(List(Value("string"))), [[["a"]]] * 30),
    "about": ({"kind": Value("string")}, [{"kind": "a"}] * 30),
    "day": (Value("date32"), [datetime.date(2020, 1, 1)] * 30),
    "same": (Value("float64"), [1.0] * 30),
    "kind": (ClassLabel(names=["a", "b"]), [number % 2 for number in range(30)]),
}  # fmt: skip


def write(folder, *columns, **changed):
    """The pictures with some of the columns, as a parquet file; ``changed`` gives other values."""
    chosen = {name: COLUMNS[name] for name in columns}
    rows = {name: changed.get(name, values) for name, (_, values) in chosen.items()}
    pictures = [Pictures.new("RGB", (16, 16), (8 * number, 100, 50)) for number in range(30)]
    features = Features({"image": Image(), **{name: feature for name, (feature, _) in chosen.items()}})
    Dataset.from_dict({"image": pictures, **rows}, features=features).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def load(kind, files, column=None, **options):
    splits = options.pop("splits", Splits(validation_fraction=0.0))
    reading = Reading(label_column=column, **options)
    return kind("parquet", data_files=files, image_size=16, num_workers=0, batch_size=8, reading=reading, splits=splits)


@pytest.mark.parametrize(
    ("columns", "asked", "names"),
    [
        (["labels"], None, NAMES),
        (["words"], None, ["blue", "green", "red"]),
        (["numbers"], "numbers", ["0", "10", "20"]),
        (["red", "green", "blue"], ["red", "green", "blue"], NAMES),
        (["is_red", "green", "blue"], ["blue", "is_red"], ["blue", "is_red"]),
        (["says_red"], ["says_red"], ["says_red"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_every_way_to_store_labels_gives_the_same_rows(tmp_path, columns, asked, names):
    data = load(MultiLabelDataModule, write(tmp_path, *columns), asked)
    assert list(data.id2label.values()) == names
    places = [NAMES.index(name.split("_")[-1]) if name[0].isalpha() else int(name) // 10 for name in names]
    expected = np.array(ROWS)[:, places]
    assert data.load().labels("train").tolist() == expected.tolist()
    assert list(data.class_counts.values()) == expected.sum(0).tolist()
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (8, len(names)) and batch["labels"].dtype.is_floating_point


def test_pictures_without_labels_are_left_out_and_without_any_class_are_not(tmp_path):
    labels = [None, [], *COLUMNS["labels"][1][2:]]
    data = load(MultiLabelDataModule, write(tmp_path, "labels", labels=labels))
    with pytest.warns(UserWarning, match="1 of 30 rows of 'train' have no label"):
        assert data.split_sizes == {"train": 29}
    assert data.train_dataloader().dataset[0]["labels"].tolist() == [0, 0, 0]


def test_what_is_held_out_has_its_share_of_the_rarest_class(tmp_path):
    data = load(MultiLabelDataModule, write(tmp_path, "labels"), splits=Splits(validation_fraction=0.34))
    rare = [int(data.load().labels("train")[data._rows[split], 2].sum()) for split in ("train", "validation")]
    assert rare == [2, 1]


def test_labels_follow_the_order_of_a_model(tmp_path):
    for columns, asked in ((["labels"], None), (NAMES, NAMES)):
        data = load(MultiLabelDataModule, write(tmp_path, *columns), asked)
        data.load()
        data.renumber([2, 0, 3], ["green", "more", "red", "blue"])
        expected = np.insert(np.array(ROWS)[:, [1, 0, 2]], 1, 0, axis=1)
        assert data._labels["train"].tolist() == data.load().labels("train").tolist() == expected.tolist()


def test_numbers_are_learned_as_they_are_stored(tmp_path):
    files = write(tmp_path, "age", "year", "text")
    assert load(RegressionDataModule, files).id2label == {0: "age"}  # the only column of fractions
    data = load(RegressionDataModule, files, ["year", "text"])
    expected = [[1990 + number, number / 4] for number in range(30)]
    assert data.id2label == {0: "year", 1: "text"} and data.load().labels("train").tolist() == expected
    assert data.label_means == [2004.5, 3.625] and data.class_counts == {}
    data.renumber([1, 0], ["text", "year"])
    assert data._labels["train"].tolist() == data.load().labels("train").tolist() == [row[::-1] for row in expected]
    with pytest.raises(ValueError, match="the model predicts text, year, more, and the data have 2 of these numbers"):
        data.renumber([0, 1], ["text", "year", "more"])


def test_a_stream_has_the_same_rows(tmp_path):
    streamed = load(MultiLabelDataModule, write(tmp_path, *NAMES), NAMES, streaming=True)
    source = streamed.load()
    rows = [source.target(cells).tolist() for cells in source.splits["train"]]
    assert rows == ROWS


@pytest.mark.parametrize(
    ("kind", "column", "said"),
    [
        (ImageDataModule, "labels", "is of type list of ClassLabel; .* --task multi-label-classification"),
        (ImageDataModule, "age", "is of type float64; .* --task image-regression"),
        (ImageDataModule, "box", "is of type list of list of float32; .*bounding boxes are learned by no task here"),
        (ImageDataModule, "objects", "is of type dict; .*bounding boxes are learned by no task here"),
        (ImageDataModule, "nested", "is of type list of list of string; .*lists of lists or dictionaries are"),
        (ImageDataModule, "about", r"is of type dict; .*a dictionary is several columns: make them with flatten\(\)"),
        (ImageDataModule, "day", "is of type date32; .*dates are neither classes nor numbers"),
        (ImageDataModule, ["red", "green"], "label_column names 2 columns, and a class for each picture is one"),
        (MultiLabelDataModule, "kind", "is of type ClassLabel; .* --task image-classification"),
        (MultiLabelDataModule, "nested", "lists of lists or dictionaries are learned by no task here"),
        (MultiLabelDataModule, "day", "dates are neither classes nor numbers"),
        (MultiLabelDataModule, ["red", "day"], "'day' is of type date32; a column of a class holds 0 or 1"),
        (MultiLabelDataModule, ["year"], "column 'year' holds 1990; a column of a class holds 0 or 1"),
        (MultiLabelDataModule, ["red", "red"], "names a column twice, or none"),
        (MultiLabelDataModule, ["nowhere"], "label_column 'nowhere' does not exist"),
        (MultiLabelDataModule, None, "no column with a list of labels among image .*; name one with label_column"),
        (RegressionDataModule, "kind", "is of type ClassLabel; a regression learns .* --task image-classification"),
        (RegressionDataModule, "day", "is of type date32; .*dates are neither"),
        (RegressionDataModule, "box", "bounding boxes are learned by no task here"),
        (RegressionDataModule, "words", "is of type list of string; a regression learns whole numbers"),
        (RegressionDataModule, "same", "column 'same' has the same number for all training pictures"),
        (RegressionDataModule, "says_red", "column 'says_red' holds 'true'; a regression learns finite numbers"),
        (RegressionDataModule, None, "2 columns with a number .* among"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)  # fmt: skip
def test_what_a_task_cannot_learn_is_refused_by_name(tmp_path, kind, column, said):
    columns = ["kind", "age", "same"] if column is None else column if isinstance(column, list) else [column]
    files = write(tmp_path, *(name for name in columns if name != "nowhere"))
    with pytest.raises(ValueError, match=said) as error:
        load(kind, files, column).load()
    assert "\n" not in str(error.value)


def test_boxes_and_lists_are_refused_by_name_where_no_column_was_named(tmp_path):
    for column, said in (("objects", "bounding boxes"), ("labels", "--task multi-label-classification")):
        with pytest.raises(ValueError, match=said):
            load(ImageDataModule, write(tmp_path, column)).load()


def test_labels_that_are_no_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label 'red' of column 'words' is none of the 2 classes"):
        load(MultiLabelDataModule, write(tmp_path, "words"), class_names=["green", "blue"]).load()
    labels = [["a", ""], *[["b"]] * 29]
    with pytest.raises(ValueError, match=r"column 'words' holds \['a', ''\], and there are 2 classes, a, b"):
        load(MultiLabelDataModule, write(tmp_path, "words", words=labels)).load()
    with pytest.raises(ValueError, match=r"all training pictures have the same labels, in words"):
        load(MultiLabelDataModule, write(tmp_path, "words", words=[["a"]] * 30)).load()


@pytest.mark.parametrize(
    ("kind", "columns", "options", "said"),
    [
        (MultiLabelDataModule, ["labels"], {}, "do not have one class each"),
        (RegressionDataModule, ["age"], {}, "do not have one class each"),
        (ImageDataModule, ["kind"], {"streaming": True}, "the classes of a stream are not known before they come"),
    ],
    ids=["labels", "numbers", "stream"],
)
def test_balanced_sampling_without_a_class_for_each_picture_is_refused(tmp_path, kind, columns, options, said):
    with pytest.raises(ValueError, match=f"splits.balanced_sampling draws equally many .*{said}"):
        load(kind, write(tmp_path, *columns), splits=Splits(balanced_sampling=True), **options).load()


def test_files_that_number_the_classes_of_their_lists_differently_are_refused(tmp_path):
    """Of one split, and of two: the ids would be taken for those of other classes."""
    files = []
    for names in (NAMES, NAMES[::-1]):
        rows = {"image": [Pictures.new("RGB", (8, 8))] * 2, "labels": [[0], [1]]}
        features = Features({"image": Image(), "labels": List(ClassLabel(names=names))})
        files.append(str(tmp_path / f"{names[0]}.parquet"))
        Dataset.from_dict(rows, features=features).to_parquet(files[-1])
    with pytest.raises(ValueError, match="column 'labels': files of split 'train' number the classes of their lists"):
        load(MultiLabelDataModule, {"train": files}).load()
    with pytest.raises(ValueError, match="column 'labels' of split 'test' declares other labels than that of 'train'"):
        load(MultiLabelDataModule, {"train": files[0], "test": files[1]}).load()
