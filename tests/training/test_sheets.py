"""Sheets of test pictures: what is kept, and that a sheet shows the pictures, the labels and what the model says."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TRAINING_WARNINGS
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from lightning.pytorch import Trainer, seed_everything
from PIL import Image as Pictures
from torch.utils.data import DataLoader

from swin_hf.predict import read_picture
from swin_hf.processing import as_rgb
from swin_hf.segment import colour, segment
from swin_hf.training import (
    Head,
    ImageDataModule,
    Masks,
    Reading,
    SegmentationDataModule,
    Splits,
    SwinClassifier,
    SwinMultiLabelClassifier,
    SwinRegressor,
    SwinSegmenter,
)
from swin_hf.training.callbacks import to_pixels
from swin_hf.training.tasks.sheets import COVER, NO_CLASS, Sheet, Shown, draw_sheet, overlay

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.* has no names for its"),
]

PRESET = "swin_digits_patch4_window4_32"
# matplotlib leaves the first out of a legend, and would set the second as a formula.
NAMES = ["_ground", "a$b$_c^", "two\nlines", "never seen"]
READABLE = ["_ground", "a$b$_c^", "two lines", "never seen"]
FILES = ["plain", "a$b$ _c", "_hidden", "two\nlines"]
LARGE = (700, 1203)


def shown(number: float, **more) -> Shown:
    return Shown([np.full((4, 4, 3), number)], [str(number)], **more)


def test_a_sheet_keeps_the_highest_of_all_batches_and_makes_no_others():
    sheet, made = Sheet(2), []

    def show(place):
        made.append(place)
        return shown(place)

    sheet.offer([3.0, 1.0, 2.0], show)
    sheet.offer([0.5, 2.5], lambda place: show(place + 10))
    assert [(value, entry.captions) for value, entry in sheet.kept] == [(3.0, ["0"]), (2.5, ["11"])]
    assert made == [0, 1, 2, 11]  # 0.5 is too low: nothing is made of it
    sheet.gather()
    assert len(sheet.kept) == 2


def test_a_legend_names_the_most_frequent_classes_and_counts_the_others():
    entries = [shown(0.0, pixels=Counter({number: 60 - number for number in range(60)}))]
    texts = [text.get_text() for text in draw_sheet(entries, [f"class {n}" for n in range(60)]).legends[0].texts]
    assert texts == [*(f"class {n}" for n in range(48)), "and 12 more"]


# Segmentation.


def write_scenes(folder, split, channels=3, count=4, shape=(30, 40)):
    """Stripes of three classes, and pixels without one above; each picture has a width of its own."""
    for kind in ("images", "masks"):
        (folder / split / kind).mkdir(parents=True)
    for number in range(count):
        height, width = LARGE if number == 1 else (shape[0], shape[1] + 2 * number)
        mask = np.repeat(np.arange(width) * 3 // width, height).reshape(width, height).T.astype(np.uint8)
        mask[: height // 5] = 255
        values = np.linspace(20, 230, height * width * channels).reshape(height, width, channels)
        name = FILES[number]
        if channels == 3:
            Pictures.fromarray(values.astype(np.uint8)).save(folder / split / "images" / f"{name}.png")
        elif channels == 1:
            Pictures.fromarray(values[..., 0].astype(np.uint8)).save(folder / split / "images" / f"{name}.png")
        else:
            np.save(folder / split / "images" / f"{name}.npy", values.astype(np.float32))
        Pictures.fromarray(mask).save(folder / split / "masks" / f"{name}.png")


def measured_segmenter(folder, channels):
    data = SegmentationDataModule(
        str(folder), image_size=32, num_channels=channels, batch_size=2, num_workers=0, masks=Masks(class_names=NAMES),
        splits=Splits(validation_fraction=0),
    )  # fmt: skip
    seed_everything(0, verbose=False)
    names = dict(enumerate(NAMES))
    model = SwinSegmenter(PRESET, image_size=32, num_channels=channels, id2label=names, head=Head(16, 8))
    for name, parameter in model.model.named_parameters():
        if "classifier.weight" in name:
            torch.nn.init.normal_(parameter)  # else the same class wins everywhere
    measure(model, data)
    return model, data


def measure(model, data):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(**options, devices=1, enable_model_summary=False).test(model, data, verbose=False)


def classes_under(picture, covered):
    """The class whose colour covers each pixel, and how far the nearest colour is off."""
    colours = (covered - (1 - COVER) * picture) / COVER
    table = np.array([*(colour(number) for number in range(len(NAMES))), (255, 255, 255)]) / 255
    distances = np.abs(colours[:, :, None] - table).max(-1)
    return np.where(distances.argmin(-1) == len(NAMES), 255, distances.argmin(-1)), distances.min(-1).max()


@pytest.mark.parametrize("channels", [3, 1, 5])
def test_the_sheet_of_a_segmenter_shows_pictures_labels_and_predictions(channels, tmp_path):
    for split in ("train", "test"):
        write_scenes(tmp_path, split, channels)
    model, data = measured_segmenter(tmp_path, channels)
    figure = model.test_report().figures["sample_pictures"]()
    cells = [axes.get_images()[0].get_array() for axes in figure.axes]
    titles = [axes.get_title() for axes in figure.axes]
    assert len(cells) == 3 * len(FILES) and titles[:2] == ["picture", "truth"]
    model.eval()
    said = set()
    for number, name in enumerate(FILES):
        path = tmp_path / "test" / "images" / f"{name}.{'png' if channels < 4 else 'npy'}"
        truth = np.array(Pictures.open(tmp_path / "test" / "masks" / f"{name}.png"))
        picture = read_picture(str(path), channels, data.image_processor())
        seen = as_rgb(picture)
        guess = segment(model.model, data.image_processor(), picture).numpy()
        if number == 1:  # no larger than it is seen: every pixel is the nearest one
            rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((186, 700), (320, 1203)))
            truth, guess = (classes[rows][:, columns] for classes in (truth, guess))
            seen = seen.resize((320, 186), Pictures.Resampling.BOX)
        (place,) = (n for n in range(0, len(cells), 3) if cells[n].shape == (*truth.shape, 3))
        cell, *covered = cells[place : place + 3]
        assert np.abs(np.asarray(seen) / 255 - cell).mean() < 0.03
        (labels, off), (guesses, guessed_off) = (classes_under(cell, overlaid) for overlaid in covered)
        assert off < 1e-5 and np.array_equal(labels, truth)
        assert guessed_off < 1e-5 and (guesses == guess).mean() > 0.99
        said |= set(np.unique(guesses).tolist()) | set(np.unique(labels).tolist())
        known = truth != 255
        scores = [
            (hits & known).sum() / ((guesses == n) | (truth == n))[known].sum()
            for n in range(len(NAMES))
            if ((guesses == n) | (truth == n))[known].any()
            for hits in [(guesses == n) & (truth == n)]
        ]
        assert float(titles[place + 2].removeprefix("prediction, mean IoU ")) == pytest.approx(
            np.mean(scores), abs=0.02
        )
    texts = {text.get_text() for text in figure.legends[0].texts}
    assert texts == {"no class" if number == 255 else READABLE[number] for number in said}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of formulas, glyphs and a layout that does not fit
        assert to_pixels(figure).std() > 0
    lowest = min(axes.get_window_extent().y0 for axes in figure.axes)
    assert 0 <= figure.legends[0].get_window_extent().y0 < figure.legends[0].get_window_extent().y1 < lowest


def test_a_single_picture_without_a_class_is_drawn(tmp_path):
    for split in ("train", "test"):
        write_scenes(tmp_path, split, count=1 if split == "test" else 2)
    path = tmp_path / "test" / "masks" / "plain.png"
    Pictures.fromarray(np.full_like(np.array(Pictures.open(path)), 255)).save(path)
    model, _ = measured_segmenter(tmp_path, 3)
    figure = model.test_report().figures["sample_pictures"]()
    assert [axes.get_title() for axes in figure.axes] == ["picture", "truth", "prediction"]
    picture, truth, _ = (axes.get_images()[0].get_array() for axes in figure.axes)
    np.testing.assert_allclose(truth, (1 - COVER) * picture + COVER, atol=1e-6)
    assert "no class" in [text.get_text() for text in figure.legends[0].texts]


def test_classes_beyond_the_palette_have_colours():
    picture = np.zeros((1, 3, 3))
    found = overlay(picture, torch.tensor([[0, 999, NO_CLASS]]))
    expected = COVER * np.array([colour(0), colour(999), (255, 255, 255)]) / 255
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


# One answer for each picture.


def data_of_labels(folder, kind, channels=3, count=6):
    """Six pictures, each with its number as its shade, and labels of every kind."""
    features = {
        "image": Image(),
        "label": ClassLabel(names=NAMES[:3]),
        "tags": List(ClassLabel(names=NAMES[:3])),
        "light": Value("float64"),
    }
    (folder / "files").mkdir(parents=True)
    files = [folder / "files" / f"{FILES[n % 4]}{n}.{'png' if channels < 4 else 'npy'}" for n in range(count)]
    for number, file in enumerate(files):
        values = np.full((40, 40, channels), 40 * number, dtype=np.uint8)
        if channels < 4:
            Pictures.fromarray(values.squeeze()).save(file)
        else:
            np.save(file, values.astype(np.float32))
    table = {
        "image": [str(file) for file in files],
        "label": [number % 3 for number in range(count)],
        "tags": [[[], [0], [1, 2]][number % 3] for number in range(count)],
        "light": [number / 7 for number in range(count)],
    }
    rows = Dataset.from_dict(table, Features(features))
    DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(folder / "saved")
    column = {SwinClassifier: "label", SwinMultiLabelClassifier: "tags", SwinRegressor: "light"}[kind]
    return kind.data_class(
        str(folder / "saved"),
        image_size=32,
        num_channels=channels,
        batch_size=4,
        num_workers=0,
        reading=Reading(label_column=column),
    )


def measured_on_labels(folder, kind, **options):
    data = data_of_labels(folder, kind, **options)
    data.load()
    seed_everything(0, verbose=False)
    model = kind(PRESET, image_size=32, num_channels=data.num_channels, id2label=data.id2label)
    measure(model, data)
    return model, data


@pytest.mark.parametrize("kind", [SwinClassifier, SwinMultiLabelClassifier, SwinRegressor])
def test_the_sheet_of_a_task_says_what_the_model_answers(kind, tmp_path):
    model, data = measured_on_labels(tmp_path, kind)
    figure = model.test_report().figures["sample_pictures"]()
    assert len(figure.axes) == 6 and not any(axes.get_xlabel() for axes in figure.axes)  # names of files are private
    model.eval()
    for axes in figure.axes:
        picture = np.asarray(axes.get_images()[0].get_array())
        number = round(float(picture.mean()) * 255 / 40)
        np.testing.assert_allclose(picture, 40 * number / 255, atol=2e-3)
        pixels = data.image_processor()(Pictures.new("RGB", (40, 40), (40 * number,) * 3), return_tensors="pt")
        with torch.no_grad():
            logits = model.model(**pixels).logits[0]
        label, prediction = (line.split(" ", 1)[1] for line in axes.get_title().splitlines()[:2])
        if kind is SwinClassifier:
            share, guess = logits.softmax(0).max(0)
            assert (label, prediction) == (READABLE[number % 3], READABLE[guess])
            assert axes.get_title().splitlines()[2] == f"probability {share:.3g}"
        elif kind is SwinRegressor:
            assert float(label) == pytest.approx(number / 7, abs=5e-3)
            assert float(prediction) == pytest.approx(float(logits), rel=1e-2)
        else:
            found = [name for name, share in zip(READABLE, logits.sigmoid().tolist(), strict=False) if share > 0.5]
            assert label == ["none", "_ground", "a$b$_c^|two lines"][number % 3]
            assert prediction == ("|".join(found) or "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_pixels(figure).std() > 0


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_worst_pictures_have_losses_and_names_of_files(channels, tmp_path):
    model, _ = measured_on_labels(tmp_path, SwinClassifier, channels=channels)
    figure = model.draw("worst_pictures")
    losses = [float(axes.get_title().rsplit("loss ", 1)[1]) for axes in figure.axes]
    assert losses == sorted(losses, reverse=True) and len(losses) == 6
    names = {axes.get_xlabel() for axes in figure.axes}
    assert {"_hidden2.png", "two lines3.png"} <= {name.replace(".npy", ".png") for name in names}
    assert any("a$b$ _c1" in name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_pixels(figure).std() > 0


def test_a_sheet_of_one_picture_is_one_column_wide():
    figure = draw_sheet([shown(0.5)], [])
    assert len(figure.axes) == 1 and figure.get_figwidth() < 3 and not figure.legends


def test_a_test_without_a_data_module_keeps_no_pictures(tmp_path):
    model, data = measured_on_labels(tmp_path, SwinClassifier)
    samples = [data.test_dataloader().dataset[number] for number in range(4)]
    batch = {key: torch.stack([torch.as_tensor(it[key]) for it in samples]) for key in ("pixel_values", "labels")}
    batch["pixel_values"] = batch["pixel_values"].float() / 255
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(**options, devices=1).test(model, DataLoader([batch], batch_size=None), verbose=False)
    assert "sample_pictures" not in model.test_report().figures and ImageDataModule is SwinClassifier.data_class
