"""Folders of pictures on the Hub mean what they mean on the disk; the real client asks the loopback Hub."""

import io
import json
import os
import subprocess
import sys

import pytest
from hub_server import STRANGER, WRITER
from PIL import Image

from swin_hf.training.data.sources import load_source

READ = """
import collections, json, sys, warnings
import datasets
from swin_hf.training.data.reading import Reading
from swin_hf.training.data.sources import load_source
from swin_hf.training import SegmentationDataModule

datasets.disable_progress_bars()

def read(dataset, data_dir=None, data_files=None, pairs=False, **reading):
    if pairs:
        module = SegmentationDataModule(dataset, data_files, data_dir, reading=Reading(**reading))
        return {split: len(rows) for split, rows in module.load().splits.items()}
    source = load_source(dataset, data_files, data_dir, Reading(**reading))
    if not source.class_names:
        return {split: len(rows) for split, rows in source.splits.items()}
    names = source.class_names
    return {split: collections.Counter(names[label] for label in source.labels(split)) for split in source.splits}

found = []
for options in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            found.append([read(**options), [str(note.message) for note in notes]])
        except Exception as error:
            found.append([f"{type(error).__name__}: {error}", []])
print(json.dumps(found))
"""


def picture(side=4, colour=(9, 99, 199)):
    file = io.BytesIO()
    Image.new("RGB" if isinstance(colour, tuple) else "L", (side, side), colour).save(file, "png")
    return file.getvalue()


def pictures(*folders, each=2, stem="{}.png"):
    return {f"{folder}/{stem.format(number)}": picture() for folder in folders for number in range(each)}


@pytest.fixture
def read(hub, tmp_path):
    """Read data sets in a process whose Hub is the loopback one; what was found, and the warnings."""

    def run(*asked, **environment):
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(asked)],
            env=os.environ | variables | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_class_folders_on_the_hub_are_read_as_on_the_disk(hub, read):
    hub.put("datasets/user/trips", pictures("airport", "bridge", "train_interior", "train_station"))
    hub.put("datasets/user/vehicles", pictures("bus", "car", "train", stem="train-{}.png"))
    hub.put("datasets/user/splits", pictures("train/cat", "train/dog", "train/test tube", "test/cat", "holdout/cat"))
    hub.put("datasets/user/nested", pictures("photos/cat", "photos/dog/young") | {"banner.png": picture()})
    found = read(
        {"dataset": "user/trips"},
        {"dataset": "user/vehicles"},
        {"dataset": "user/splits"},
        {"dataset": "user/nested", "data_dir": "photos"},
        {"dataset": "user/trips", "labelled": False},
        {"dataset": "user/trips", "streaming": True},
    )
    assert [answer for answer, _ in found[:5]] == [
        {"train": {"airport": 2, "bridge": 2, "train_interior": 2, "train_station": 2}},
        {"train": {"bus": 2, "car": 2, "train": 2}},
        {"train": {"cat": 2, "dog": 2, "test tube": 2}, "test": {"cat": 2}},
        {"train": {"cat": 2, "dog": 2}},
        {"train": 8},
    ]
    assert "folders next to the splits are not used: holdout (2 pictures)" in found[2][1][0]
    assert "are in folders inside of its folder" in found[3][1][0]
    assert found[5][0].startswith("ValueError: user/trips is a folder of 8 pictures on the Hub, and only tables")
    # Out of reach, the copy serves; the Hub is not asked.
    asked = len(hub.requests)
    offline = read({"dataset": "user/trips"}, {"dataset": "user/unknown"}, HF_HUB_OFFLINE="1")
    assert offline[0][0] == found[0][0]
    assert "user/unknown" in offline[1][0]
    assert len(hub.requests) == asked


def test_tables_metadata_masks_and_cards_are_followed(hub, read, tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ash", "elm"])})
    rows = {"image": [{"bytes": picture(), "path": None}] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    table = (tmp_path / "train.parquet").read_bytes()
    hub.put("datasets/user/table", {"data/train-00000.parquet": table, **pictures("assets", each=3)})
    names = [f"scans/train {number}.png" for number in range(3)]
    lines = "\n".join(["file_name,label", *(f"{name},{'abc'[at]}" for at, name in enumerate(names))])
    hub.put("datasets/user/listed", {name: picture() for name in names} | {"metadata.csv": lines.encode()})
    masks = {f"masks/train {number}.png": picture(colour=number) for number in range(10)}
    images = {f"images/train {number}.png": picture() for number in range(10)}
    hub.put("datasets/user/pairs", {**images, **masks, "classes.txt": b"ground\nsky\nsea\n"})
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: some/**\n---\n"
    hub.put("datasets/user/chosen", pictures("some/cat", "some/dog", "other/cow") | {"README.md": card.encode()})
    found = read(
        *[{"dataset": f"user/{name}", "pairs": name == "pairs"} for name in ("table", "listed", "pairs", "chosen")],
        {"dataset": "user/chosen", "config_name": "default", "revision": "main"},
    )
    assert found[0][0] == {"train": {"ash": 2, "elm": 2}}
    assert found[1][0] == {"train": {"a": 1, "b": 1, "c": 1}}
    assert found[2][0] == {"train": 10}
    assert found[3][0] == found[4][0] == {"train": {"cat": 2, "dog": 2}}  # the card says which files are the data


def test_branches_and_private_data_sets(hub, read):
    hub.put("datasets/user/photos", pictures("cat", "dog"))
    hub.repos["datasets/user/photos"].branches["more"] = hub.repos["datasets/user/photos"].branches["main"]
    hub.put("datasets/user/photos", pictures("train_dog"), branch="more")
    hub.create("datasets/user/secret", private=True)
    hub.put("datasets/user/secret", pictures("ash", "elm"))
    asked = ({"dataset": "user/photos"}, {"dataset": "user/photos", "revision": "more"}, {"dataset": "user/secret"})
    (plain, _), (branch, _), (secret, _) = read(*asked)
    assert plain == {"train": {"cat": 2, "dog": 2}}
    assert branch == {"train": {"cat": 2, "dog": 2, "train_dog": 2}}
    assert secret == {"train": {"ash": 2, "elm": 2}}
    refused, missing = read(
        {"dataset": "user/secret"},
        {"dataset": "user/photos", "revision": "nowhere"},
        HF_TOKEN=STRANGER,
    )
    assert refused[0].startswith("HubError: there is no repository user/secret that can be seen from here")
    assert missing[0].startswith("HubError: user/photos has no such revision")


@pytest.mark.parametrize("dataset", ["photos/holiday", "./holiday", "table.csv", "a/b/c", "~/nowhere"])
def test_what_is_not_on_the_disk_is_not_asked_of_the_hub(hub, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "table.csv").write_text("image,label\n")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_source(dataset)
    assert not hub.requests
