"""``swin-hf prepare``: the same data set with smaller pictures, whatever happens while it is written."""

import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import PATIENCE, TRAINING_WARNINGS
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from full_disk import files_of_at_most
from hub_server import WRITER
from PIL import Image as Pictures

from swin_hf.cli import main
from swin_hf.processing import Preprocessing, decode_picture
from swin_hf.training import ImageDataModule, MultiLabelDataModule, Reading, RegressionDataModule, train
from swin_hf.training.data import Shrinking, prepare
from swin_hf.training.data.sources import load_source

pytestmark = [*TRAINING_WARNINGS, pytest.mark.filterwarnings("ignore:.* rows of .* have no label")]
SMALL = Shrinking(short_side=24, pictures_per_file=5)


def photo(seed: int, size: tuple[int, int] = (64, 48)) -> Pictures.Image:
    """A smooth picture, so that JPEG changes it little."""
    random = np.random.default_rng(seed)
    return Pictures.fromarray(random.integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize(size, Pictures.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Class folders of two splits: JPEG and PNG, larger and smaller ones, grey ones and turned ones."""
    for number in range(24):
        split, name = "train" if number % 4 else "test", ("cat", "dog", "fox")[number % 3]
        place = tmp_path / "photos" / split / name
        place.mkdir(parents=True, exist_ok=True)
        if number == 1:
            turned = Pictures.Exif()
            turned[0x0112] = 6
            photo(number).save(place / f"{number}.jpg", quality=95, exif=turned)
        elif number == 2:
            photo(number).convert("L").save(place / f"{number}.png")
        elif number == 3:
            photo(number, (20, 30)).save(place / f"{number}.png")
        else:
            photo(number).save(place / f"{number}.jpg", quality=95)
    return tmp_path / "photos"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path) -> dict[str, list[tuple[str, int, bytes]]]:
    source = load_source(str(folder))
    return {
        name: [(row["image"]["path"], row["label"], row["image"]["bytes"]) for row in split]
        for name, split in source.splits.items()
    }


def test_rows_classes_splits_and_names_stay_and_pictures_get_smaller(folder, tmp_path):
    done = prepare(str(folder), tmp_path / "small", shrinking=SMALL)
    assert done.pictures == {"train": 18, "test": 6} and not done.unreadable
    assert sorted(files_of(done.folder)) == [
        ".prepared.json",
        *(f"data/test-{number:05d}-of-00002.parquet" for number in range(2)),
        *(f"data/train-{number:05d}-of-00004.parquet" for number in range(4)),
    ]
    before, after = load_source(str(folder)), load_source(str(done.folder))
    assert after.class_names == before.class_names == ["cat", "dog", "fox"]
    evaluate = Preprocessing((24, 24), 24, crop=False)
    for split in ("train", "test"):
        assert len(before.splits[split]) == len(after.splits[split])
        for old, new in zip(before.splits[split], after.splits[split], strict=True):
            assert new["label"] == old["label"]
            assert str(folder / new["image"]["path"]) == old["image"]["path"]
            original, stored = decode_picture(old["image"]), decode_picture(new["image"])
            if min(original.size) <= 24:
                assert new["image"]["bytes"] == Path(old["image"]["path"]).read_bytes()
                continue
            assert min(stored.size) == 24
            wanted = evaluate.pixels(original).permute(1, 2, 0).numpy().astype(int)
            assert (
                np.abs(np.asarray(stored) - wanted).mean() < 6
            )  # JPEG's own loss; of a picture that is turned otherwise, 50 and more
            kept = Pictures.open(io.BytesIO(new["image"]["bytes"]))
            with Pictures.open(old["image"]["path"]) as first:
                assert kept.format == "JPEG" and kept.mode == first.mode
            assert kept.getexif().get(0x0112, 1) == 1


PROGRAM = """
import sys, time
from swin_hf.training.data import Shrinking, prepare

def slowly(pictures, total):
    for row in pictures:
        print(row, flush=True)
        time.sleep(float(sys.argv[3]))
        yield row

if __name__ == "__main__":
    shrinking = Shrinking(short_side=24, pictures_per_file=5)
    prepare(sys.argv[1], sys.argv[2], shrinking=shrinking, watch=slowly)
"""


@pytest.mark.parametrize("pictures", [7, 12])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, pictures):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, "0.05"], stdout=subprocess.PIPE, text=True, env=environment)
    for _ in range(pictures):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    process.stdout.close()
    written = files_of(tmp_path / "killed")
    whole = [name for name in written if name.endswith(".parquet")]
    assert len(whole) == pictures // 5 and all(name.startswith(".unfinished/train-") for name in whole)
    with pytest.raises(
        ValueError, match="is not finished; give the command again"
    ):  # a part is never taken for the data
        load_source(str(tmp_path / "killed"))
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in whole}

    again = subprocess.run([*command, "0"], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    prepare(str(folder), tmp_path / "whole", shrinking=SMALL)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    for name, then in times.items():  # not written twice
        assert (tmp_path / "killed" / name.replace(".unfinished", "data")).stat().st_mtime_ns == then
    assert len(again.stdout.split()) == 24 - 5 * len(whole)


def test_training_on_pictures_that_are_small_already_is_the_same_to_the_last_digit(folder, tmp_path):
    kept = prepare(str(folder), tmp_path / "kept", shrinking=Shrinking(short_side=64, pictures_per_file=5)).folder
    answers, sizes = {}, {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    for name, data in (("folder", folder), ("kept", kept)):
        run = train(
            str(data), name=name, runs=str(tmp_path / "runs"), preset="swin_digits_patch4_window4_32", image_size=16,
            batch_size=4, num_workers=0, network={"overrides": sizes},
            trainer={"max_epochs": 1, "accelerator": "cpu"}, splits={"validation_fraction": 0.2},
        )  # fmt: skip
        with (run.folder / "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        answers[name] = [row | {"path": row["path"].removeprefix(f"{folder}/")} for row in rows], run.metrics
    assert answers["folder"] == answers["kept"]
    assert answers["kept"][0][0]["path"] == "test/cat/0.jpg"


LABELS = Features(
    {
        "image": Image(),
        "tags": List(ClassLabel(names=["red", "green"])),
        "light": Value("float32"),
        "kind": Value("string"),
        "mask": Image(),
        "objects": {"bbox": List(List(Value("float32"))), "id": List(Value("int64"))},
    }
)


@pytest.mark.parametrize("stored", ["parquet", "save_to_disk"])
def test_labels_of_every_kind_are_kept_and_what_would_not_fit_is_not(tmp_path, stored, caplog):
    rows = {
        "image": [photo(number) for number in range(8)],
        "tags": [[0], [1], [0, 1], [], [0], [1], [0, 1], []],
        "light": [0.5, 1.5, None, 3.0, 4.0, 5.0, 6.0, 7.0],
        "kind": ["007", "7", " a", None, "007", "7", "a", "a"],
        "mask": [photo(number).convert("L") for number in range(8)],
        "objects": [{"bbox": [[0.0, 0.0, 9.0, 9.0]], "id": [number]} for number in range(8)],
    }
    data = Dataset.from_dict(rows, features=LABELS)
    if stored == "save_to_disk":
        DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(tmp_path / "data")
        source = str(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        data.to_parquet(tmp_path / "data/train.parquet")
        data.select(range(3)).to_parquet(tmp_path / "data/test.parquet")
        source = str(tmp_path / "data")
    caplog.set_level("INFO")
    small = str(prepare(source, tmp_path / "small", reading=Reading(image_column="image"), shrinking=SMALL).folder)
    assert "train: not kept, for they would not fit smaller pictures: columns mask, objects" in caplog.text
    options = {"image_size": 16, "num_workers": 0, "batch_size": 4}
    for kind, column in (
        (ImageDataModule, "kind"),
        (MultiLabelDataModule, "tags"),
        (RegressionDataModule, "light"),
    ):
        reading = Reading(label_column=column, image_column="image")
        before, after = (kind(place, reading=reading, **options) for place in (source, small))
        assert after.load().class_names == before.load().class_names
        for split in ("train", "test"):
            ours, theirs = after.load().labels(split), before.load().labels(split)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")
        assert next(iter(after.train_dataloader()))["pixel_values"].shape == (4, 3, 16, 16)


def test_unreadable_pictures_stop_it_or_are_left_out_and_named(folder, tmp_path, capsys):
    broken = folder / "train/cat/9.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    words = ["prepare", str(folder), str(tmp_path / "small"), "--short-side", "24", "--pictures-per-file", "5"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{broken}: " in error and "--on-error skip" in error and error.count("\n") == 1
    assert main([*words, "--on-error", "skip"]) == 1  # goes on in the same folder
    printed = capsys.readouterr().out
    assert "train: 17 pictures" in printed and "1 pictures could not be read (skip):" in printed
    assert str(broken) in printed
    assert main([*words, "--on-error", "skip"]) == 1  # once more: nothing to do, and the same words
    assert capsys.readouterr().out == printed
    assert [path for path, *_ in rows_of(tmp_path / "small")["train"]].count("train/cat/9.jpg") == 0
    assert len(rows_of(tmp_path / "small")["train"]) == 17
    words[2], words[-1] = str(tmp_path / "single"), "1"  # a file for each picture, one of them empty
    assert main([*words, "--on-error", "skip"]) == 1
    assert rows_of(tmp_path / "single") == rows_of(tmp_path / "small")
    assert main([*words, "--on-error", "skip"]) == 1


@pytest.mark.parametrize("number", [2_000, 0])
def test_a_full_disk_is_one_sentence_and_the_command_goes_on_when_there_is_room(folder, tmp_path, capsys, number):
    words = ["prepare", str(folder), str(tmp_path / "small"), "--short-side", "24", "--pictures-per-file", "5"]
    with files_of_at_most(number):
        assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written: " in error and "make room and run the" in error
    assert not [path for path in (tmp_path / "small").rglob("*.parquet")]
    assert not [path for path in (tmp_path / "small").rglob("*.partial")]
    assert main(words) == 0
    assert "train: 18 pictures" in capsys.readouterr().out


def test_what_cannot_be_is_refused_in_words(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    done = prepare(str(folder), tmp_path / "small", shrinking=SMALL).folder
    before = files_of(done)
    for words, said in (
        ([str(folder), str(other)], "other holds mine.txt, and no earlier run began it"),
        (
            [str(folder), str(done), "--pictures-per-file", "5"],
            "was begun with short_side 24, and this command has 292",
        ),
        (
            [str(folder / "train"), str(done), "--short-side", "24", "--pictures-per-file", "5"],
            "was begun with pictures",
        ),
        ([str(tmp_path / "nowhere"), str(tmp_path / "new")], "nowhere"),
        (["csv", str(tmp_path / "new")], "csv"),
        (["csv", str(tmp_path / "new"), "--data-files", "train=a.csv", "b.csv"], "write SPLIT=FILE for all of them"),
    ):
        assert main(["prepare", *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error and error.startswith("swin-hf prepare: ") and "Traceback" not in error
    assert files_of(done) == before and (other / "mine.txt").read_text() == "mine" and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="a stream cannot be prepared"):
        prepare(str(folder), tmp_path / "new", reading=Reading(streaming=True))
    with pytest.raises(ValueError, match="on_error is 'replace'; it must be 'raise' or 'skip'"):
        Shrinking(on_error="replace")


def test_a_table_with_paths_is_a_source_and_so_are_pictures_without_classes(folder, tmp_path, capsys):
    paths = sorted(path.relative_to(folder) for path in (folder / "train").rglob("*.*"))
    table = "\n".join(["image,label", *(f"{path},{path.parts[1]}" for path in paths)])
    (folder / "list.csv").write_text(table + "\n")
    files = ["--data-files", f"train={folder / 'list.csv'}"]
    assert main(["prepare", "csv", str(tmp_path / "table"), "--short-side", "24", *files]) == 0
    rows = rows_of(tmp_path / "table")["train"]
    assert [path for path, *_ in rows] == [str(path) for path in paths]
    (folder / "list.csv").unlink()
    assert main(["prepare", str(folder / "train"), str(tmp_path / "bare"), "--short-side", "24", "--unlabelled"]) == 0
    assert "train: 18 pictures" in capsys.readouterr().out
    (path,) = (tmp_path / "bare/data").iterdir()
    assert pq.read_schema(path).names == ["image"]


def test_a_data_set_on_the_hub_is_a_source(hub, folder, tmp_path):
    hub.put("datasets/user/photos", {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")})
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["prepare", "user/photos", "small", "--short-side", "24", "--pictures-per-file", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "swin_hf.cli", *words],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    prepare(str(folder), tmp_path / "local", shrinking=SMALL)
    assert rows_of(tmp_path / "small") == rows_of(tmp_path / "local")
