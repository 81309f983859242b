"""Folders of pictures: what is on the disk is what is loaded, or the difference is told."""

import os
import zipfile

import datasets
import pytest
import torch
from datasets import ClassLabel, Image
from PIL import Image as PILImage
from short import short

from swin_hf.folders import list_pictures, read_folder
from swin_hf.processing import PICTURE_SUFFIXES
from swin_hf.training import ImageDataModule


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write(root, *paths):
    """Write a picture for each path with a suffix of a picture, and a file of one byte for any other."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith((".png", ".jpg", ".JPG")):
            PILImage.new("RGB", (4, 4), (9, 99, 199)).save(root / path)
        else:
            (root / path).write_bytes(b"x")
    return root


def loaded(content):
    """``{split: [(path below its last two folders, class name), ...]}``"""
    return {
        split: [("/".join(row["image"]["path"].split(os.sep)[-2:]), content.class_names[row["label"]]) for row in data]
        for split, data in content.splits.items()
    }


def counts(content):
    """Pictures of each class in each split."""
    return {
        split: {name: list(data["label"]).count(index) for index, name in enumerate(content.class_names)}
        for split, data in content.splits.items()
    }


def names(*folders, each=2, stem="{}.png"):
    return [f"{folder}/{stem.format(number)}" for folder in folders for number in range(each)]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        # The names of splits are whole names, at the first level, of folders that hold class folders.
        (["airport", "bridge", "train_interior", "train_station"], {"train": 4}),
        (["bus", "car", "train"], {"train": 3}),
        (["cat", "dog", "Test"], {"train": 3}),
        (["dev board", "validator"], {"train": 2}),
        (["train/beaker", "train/flask", "train/test tube"], {"train": 3}),
        (["train/car", "train/train", "test/car", "test/train"], {"train": 2, "test": 2}),
        (["TRAIN/cat", "TRAIN/dog", "Dev/cat", "Dev/dog"], {"train": 2, "validation": 2}),
        (["training/a", "training/b", "valid/a", "valid/b", "testing/a"], {"train": 2, "validation": 2, "test": 1}),
        (["train/val", "train/train", "val/val", "val/train"], {"train": 2, "validation": 2}),
        (["test/cat", "test/dog"], {"test": 2}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_splits_and_classes(tmp_path, folders, expected):
    content = read_folder(write(tmp_path / "train trip [1]", *names(*folders)))
    assert {name: sum(count.values()) for name, count in counts(content).items()} == {
        name: 2 * number for name, number in expected.items()
    }
    assert content.class_names == sorted({folder.split("/")[-1] for folder in folders})
    for rows in loaded(content).values():
        assert all(path.split("/")[0] == name for path, name in rows)
        assert rows == sorted(rows)
    assert content.notes == []


@pytest.mark.parametrize("stem", ["my train trip {}.png", "test-{}.png", "VALIDATION.{}.JPG", "val_{}.jpg"])
def test_names_of_files_choose_no_split(tmp_path, stem):
    root = write(tmp_path, *names("cat", "dog", each=7), *names("cat", "dog", each=3, stem=stem))
    assert counts(read_folder(root)) == {"train": {"cat": 10, "dog": 10}}


def test_the_dataset_has_paths_and_class_labels(tmp_path):
    data = read_folder(write(tmp_path, *names("cat", "dog"))).splits["train"]
    assert data.features == {"image": Image(decode=False), "label": ClassLabel(names=["cat", "dog"])}
    assert data[0]["image"] == {"bytes": None, "path": str(tmp_path / "cat" / "0.png")}
    assert data.cast_column("image", Image())[3]["image"].getpixel((0, 0)) == (9, 99, 199)


def test_links_are_followed_and_a_circle_ends(tmp_path):
    write(tmp_path / "elsewhere", *names("emu"), "one.png")
    root = write(tmp_path / "photos", *names("cat", "dog"))
    (root / "emu").symlink_to(tmp_path / "elsewhere" / "emu")
    (root / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    (root / "cat" / "again").symlink_to(root)
    content = read_folder(root)
    assert counts(content) == {"train": {"cat": 2, "dog": 3, "emu": 2}}
    assert any(
        "'cat' that are not used: 1 links to a folder above (such as cat/again)" in note for note in content.notes
    )
    (tmp_path / "farm").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "farm" / name).symlink_to(root / name)
    (tmp_path / "farm" / "fox").symlink_to(tmp_path / "gone")
    content = read_folder(tmp_path / "farm")
    assert "files next to the class folders that are not used: 1 broken links" in content.notes[-1]
    assert content.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("extra", "note"),
    [
        (["test-picture.png"], r"next to the class folders .*: 1 \.png \(such as .*/test-picture.png\)"),
        (["cat/a.heic", "cat/notes.txt"], r"of 'cat' that are not used: 1 \.heic \(such as cat/a.heic\), 1 \.txt"),
        (["dog/raw/a.CR2"], r"of 'dog' that are not used: 1 \.cr2 \(such as raw/a.CR2\)"),
        (
            ["labels/a.xml", "labels/b.xml"],
            r"folder 'labels' holds no picture \(found 2 \.xml .*, so it is not",
        ),
        (
            ["cat/kittens/a.png", "cat/kittens/b.png"],
            r"2 pictures of class 'cat' are in folders inside .*kittens/a.png",
        ),
        (["dog/noname"], r"1 without suffix \(such as dog/noname\)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_not_used_is_told(tmp_path, extra, note):
    content = read_folder(write(tmp_path, *names("cat", "dog"), *extra))
    assert content.class_names == ["cat", "dog"]
    with pytest.warns(UserWarning, match=note):
        short(ImageDataModule, "imagefolder", data_dir=str(tmp_path), validation_fraction=0).load()


def test_pictures_below_a_class_folder_belong_to_the_class(tmp_path):
    content = read_folder(write(tmp_path, *names("cats/young", "dogs/young", "dogs/old/very"), "dogs/x.png"))
    assert counts(content) == {"train": {"cats": 2, "dogs": 5}}


@pytest.mark.parametrize(
    "paths",
    [
        names("cat", "dog") + names("cat", stem="{}.heic", each=3),
        names("cat", "dog") + names("emu", stem="{}.HEIF"),
        names("train/cat", "train/dog", "test/dog") + names("test/cat", stem="{}.mp4"),
        names("cat", "dog") + names("emu", stem="{}"),
    ],
    ids=["heic", "class of heif", "video in test", "without suffix"],
)
def test_most_of_a_class_must_be_used(tmp_path, paths):
    with pytest.raises(
        ValueError, match=r"most files of class '(cat|emu)' cannot be used \(\d of \d\): .*convert them"
    ):
        read_folder(write(tmp_path, *paths))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (names("train", "test"), "test has the name of a split, but its pictures are not in folders of classes"),
        (names("train/a", "train/b", "test"), r"test has the name of a split like train.*data_files: {train: "),
        (names("train/a", "train/b", "val/a", "dev/a"), "two folders for the split validation, dev and val"),
        (
            names("train/a", "bus", "car"),
            r"hold most of the pictures: bus \(2 pictures\), car \(2",
        ),
        (names("."), "holds 2 pictures, such as 0.png, and no folder with pictures"),
        (["notes.txt"], "hold no picture"),
    ],
    ids=["flat splits", "one flat split", "a split twice", "splits or classes", "no folder", "no picture"],
)
def test_what_has_no_one_meaning_is_refused(tmp_path, paths, message):
    with pytest.raises(ValueError, match=message):
        read_folder(write(tmp_path, *paths))


def test_an_archive_is_refused_in_words(tmp_path):
    write(tmp_path / "in", *names("cat", "dog"))
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(tmp_path / "out" / "photos.zip", "w") as archive:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "in"))
    with pytest.raises(ValueError, match=r"holds an archive, photos.zip, which is not opened; unpack it"):
        short(ImageDataModule, "imagefolder", data_dir=str(tmp_path / "out")).load()
    with pytest.raises(ValueError, match=r"photos.zip is an archive, which is not opened; unpack it"):
        short(ImageDataModule, "imagefolder", data_files={"train": str(tmp_path / "out" / "photos.zip")}).load()


def test_other_folders_beside_the_splits_are_named(tmp_path):
    root = write(tmp_path, *names("train/cat", "train/dog", "test/cat", "holdout/cat"), "docs/a.pdf")
    content = read_folder(root)
    assert counts(content) == {"train": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 0}}
    assert content.notes == [f"{root}: folders next to the splits are not used: holdout (2 pictures)"]


def test_without_labels_pictures_are_taken_wherever_they_are(tmp_path):
    content = read_folder(write(tmp_path / "a", "1.png", "x/2.png", "x/y/3.png", "z.heic"), labelled=False)
    assert [len(data) for data in content.splits.values()] == [3]
    assert list(content.splits["train"].features) == ["image"]
    assert "not used: 1 .heic" in content.notes[0]
    content = read_folder(write(tmp_path / "b", *names("train", "val")), labelled=False)
    assert {name: len(data) for name, data in content.splits.items()} == {"train": 2, "validation": 2}


def test_pictures_of_a_folder_for_prediction(tmp_path):
    write(tmp_path, "b.png", "a.jfif", "c.AVIF", "d.heic", "e.heic", ".hidden.png", "in/f.png")
    pictures, notes = list_pictures(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in pictures] == ["a.jfif", "b.png", "c.AVIF", "in/f.png"]
    assert notes[0].startswith(f"{tmp_path}: not used: 2 .heic (such as ") and "convert them" in notes[0]


def test_every_suffix_of_a_picture_is_one_that_pillow_opens_or_that_of_arrays():
    known = PILImage.registered_extensions()
    assert [suffix for suffix in PICTURE_SUFFIXES if known.get(suffix) not in PILImage.OPEN] == [".npy"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("way", ["imagefolder", "folder", "data_files", "pattern"])
def test_every_way_to_name_a_folder_reads_it_alike(tmp_path, way, streaming):
    root = write(tmp_path / "my [best] train", *names("train/train_1", "train/test", "val/test", each=4))
    folders = {"train": f"{root}/train", "validation": f"{root}/val"}
    patterns = {"train": "train/**", "val": "val/*"}
    options = {
        "imagefolder": {"dataset": "imagefolder", "data_dir": str(root)},
        "folder": {"dataset": str(root)},
        "data_files": {"dataset": "imagefolder", "data_files": folders},
        "pattern": {
            "dataset": "imagefolder",
            "data_dir": str(root),
            "data_files": patterns,
        },
    }[way]
    module = short(ImageDataModule, **options, image_size=8, batch_size=4, num_workers=0, streaming=streaming)
    assert module.id2label == {0: "test", 1: "train_1"}
    assert torch.cat([batch["labels"] for batch in module.val_dataloader()]).tolist() == [0] * 4
    if not streaming:
        assert module.class_counts == {"test": 4, "train_1": 4}
