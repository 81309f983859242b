"""Masks as users store them: tables of paths, folders that are not whole, names that cannot be read, empty rows."""

import numpy as np
import pytest
import torch
from conftest import TRAINING_WARNINGS
from datasets import Dataset, Features, Image
from PIL import Image as Pictures

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinHFForSemanticSegmentation
from swin_hf.processing import UnreadablePictureError
from swin_hf.training import Head, Masks, Reading, SegmentationDataModule, Splits, SwinSegmenter, train

pytestmark = TRAINING_WARNINGS


def pair(folder, name, mask=None, size=(12, 10)):
    """A grey picture and its mask, of class 0 above and 1 below, as files of one name."""
    default = np.repeat([0, 1], size[1] // 2)[:, None].repeat(size[0], 1)
    for kind, values in (("images", np.full(size[::-1], 90)), ("masks", default if mask is None else mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Pictures.fromarray(np.asarray(values, np.uint8)).save(folder / kind / f"{name}.png")


def module(dataset, **options):
    options = {"image_size": 8, "batch_size": 2, "splits": Splits(validation_fraction=0.0)} | options
    return SegmentationDataModule(str(dataset), **options)


def read(data):
    """What the training batches of an epoch could not read; all of them have been read after it."""
    return [message for batch in data.train_dataloader() for message in batch.get("unreadable", ())]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_paths_in_a_table_start_from_its_folder(suffix, tmp_path, monkeypatch):
    for name in "abcd":
        pair(tmp_path / "scans", name)
    rows = [(f"images/{name}.png", f"masks/{name}.png") for name in "abcd"]
    lines = ["picture,mask", *map(",".join, rows)]
    if suffix == "jsonl":
        lines = [f'{{"picture": "{picture}", "mask": "{mask}"}}' for picture, mask in rows]
    (tmp_path / "scans" / f"table.{suffix}").write_text("\n".join(lines) + "\n")
    (tmp_path / "scans" / "classes.txt").write_text("sky\nground\n")
    monkeypatch.chdir("/")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of an earlier test: other colours are distorted
    data = module(suffix.removesuffix("l"), data_files=str(tmp_path / "scans" / f"table.{suffix}"))
    assert data.id2label == {0: "sky", 1: "ground"}
    assert read(data) == []
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].unique().tolist() == [0, 1] and (batch["pixel_values"] == 90).any()


@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_name_pictures_and_masks(streaming, tmp_path):
    """The layout that ``datasets`` documents for rows of several pictures."""
    lines = {split: "image_file_name,annotation_file_name\n" for split in ("train", "val")}
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        pair(tmp_path / split / "deep", name)
        lines[split] += f"deep/images/{name}.png,deep/masks/{name}.png\n"
    for split, text in lines.items():
        (tmp_path / split / "metadata.csv").write_text(text)
    data = module(tmp_path, masks=Masks(class_names=["sky", "ground"]), reading=Reading(streaming=streaming))
    assert list(data.load().splits) == ["train", "validation"]
    row = next(iter(data.load().splits["validation"]))
    assert [row[kind]["path"][-12:] for kind in ("image", "annotation")] == ["images/c.png", "/masks/c.png"]
    assert streaming or read(data) == []
    (tmp_path / "val" / "metadata.csv").write_text(lines["val"] + "deep/images/c.png,\n")
    with pytest.raises(ValueError, match=r"val/metadata.csv has no annotation_file_name in row 1; name one"):
        module(tmp_path, masks=Masks(class_names=2)).load()


def test_a_row_whose_mask_cannot_be_read_is_named_and_each_is_counted(tmp_path):
    for name in "abcdef":
        pair(tmp_path, name, mask=np.full((10, 12), 7) if name == "c" else None)

    def cell(kind, name):
        return {"bytes": (tmp_path / kind / f"{name}.png").read_bytes(), "path": None}

    columns = {"image": [cell("images", name) for name in "abcdef"], "mask": [cell("masks", name) for name in "abcdef"]}
    columns["mask"][4] = None
    Dataset.from_dict(columns, Features({"image": Image(), "mask": Image()})).save_to_disk(tmp_path / "rows")
    skipping = module(tmp_path / "rows", masks=Masks(class_names=2), reading=Reading(on_error="skip"))
    first, second = sorted(read(skipping))
    assert first.startswith("train row 2: a mask holds the number 7") and second.startswith("train row 4: a mask: ")
    with pytest.raises(UnreadablePictureError, match=r"train row [24]: a mask.*pass --data\.reading\.on_error skip"):
        read(module(tmp_path / "rows", masks=Masks(class_names=2)))


def test_a_split_without_masks_is_said_to_be_left_out(tmp_path):
    for split in ("train", "val", "test"):
        pair(tmp_path / split, "a")
    (tmp_path / "val" / "masks").rename(tmp_path / "val" / "answers")
    with pytest.warns(UserWarning, match=r"the folders of validation are not used.*both images/ and masks/"):
        data = module(tmp_path, masks=Masks(class_names=2))
        assert data.split_sizes == {"train": 1, "test": 1}


@pytest.mark.parametrize("content", [b"", b"sky\n\nground\n", b"sky\nground\nsky\n", "sky\nfläche\n".encode("latin-1")])
def test_names_that_do_not_number_the_classes_are_refused(content, tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"classes\.txt"):
        module(tmp_path).load()


def test_names_written_by_windows_are_read(tmp_path):
    pair(tmp_path, "a")
    (tmp_path / "classes.txt").write_bytes("himmel\r\nfläche\r\n\r\n".encode("utf-8-sig"))
    assert module(tmp_path).id2label == {0: "himmel", 1: "fläche"}


def test_other_masks_are_other_data(tmp_path):
    pair(tmp_path, "a")
    pair(tmp_path, "b")
    before = module(tmp_path, masks=Masks(class_names=2)).fingerprint
    assert module(tmp_path, masks=Masks(class_names=2)).fingerprint == before
    pair(tmp_path, "b", mask=np.ones((10, 12)))
    assert module(tmp_path, masks=Masks(class_names=2)).fingerprint != before


SIZES = {"image_size": 16, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_labels": 3}


def test_the_head_of_the_weights_stays_whatever_its_sizes(tmp_path):
    upernet = {"hidden_size": 12, "auxiliary_channels": 6, "pool_scales": [1, 2]}
    stored = SwinHFForSemanticSegmentation(SwinHFConfig(**SIZES, upernet=upernet))
    stored.save_pretrained(tmp_path)
    ours = SwinSegmenter(weights=str(tmp_path)).model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stored.state_dict().items())
    asked = SwinSegmenter(weights=str(tmp_path), head=Head(hidden_size=20)).model
    assert asked.config.upernet["hidden_size"] == 20 and asked.config.upernet["auxiliary_channels"] == 6
    SwinHFForImageClassification(SwinHFConfig(**SIZES)).save_pretrained(tmp_path / "classifier")
    new = SwinSegmenter(weights=str(tmp_path / "classifier")).model.config.upernet
    assert (new["hidden_size"], new["auxiliary_channels"]) == (512, 256)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")  # that of our loader is exact
def test_masks_of_0_and_255_are_told_to_have_one_class_also_in_a_stream(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            pair(tmp_path / split, name, mask=np.repeat([0, 255], 5)[:, None].repeat(12, 1))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    with pytest.warns(UserWarning, match=r"no pixel of another class than ground; pixels of 255 have no class"):
        train(
            str(tmp_path), "semantic-segmentation", runs=str(tmp_path / "runs"), image_size=16, batch_size=2,
            preset="swin_digits_patch4_window4_32", head={"hidden_size": 8, "auxiliary_channels": 4},
            reading={"streaming": True}, trainer={"max_epochs": 1, "accelerator": "cpu", "limit_train_batches": 1},
        )  # fmt: skip
