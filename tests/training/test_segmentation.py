"""Segmentation: pairs of pictures and masks, their joint augmentation, metrics at the stored size, and a whole run."""

import csv
import json
import os
import re
import subprocess
import sys

import exact_run
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY, PATIENCE, TRAINING_WARNINGS
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from lightning.pytorch import Trainer, seed_everything
from PIL import Image as Pictures
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from swin_hf import push
from swin_hf.hub import Card, TrainingFacts
from swin_hf.processing import UnreadablePictureError
from swin_hf.segment import segment
from swin_hf.training import (
    Head,
    JointAugmentation,
    Masks,
    Reading,
    SegmentationDataModule,
    Splits,
    SwinSegmenter,
    train,
)
from swin_hf.training.data.segmentation import JointTransform, find_columns, read_mask, read_pairs
from swin_hf.training.tasks.regions import PictureBootstrap, class_iou, picture_scores, region_counts
from swin_hf.training.tasks.segmentation import slide

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # the Hub's client's own
]

COLOURS = np.array([[40, 40, 40], [220, 50, 50], [50, 220, 50]])
NAMES = ["ground", "red", "green"]
TESTED = 11  # pictures of the test split: an odd number, and enough for an interval


def scene(number: int, noise: float = 12.0) -> tuple[Pictures.Image, np.ndarray]:
    """A picture of two squares on a ground, none of its sides like the next one's, and its mask."""
    random = np.random.default_rng(number)
    height, width = 36 + number % 5, 52 - number % 7
    mask = np.zeros((height, width), np.uint8)
    for label in (1, 2):
        top, left = random.integers(2, height - 17), random.integers(0, width - 17)
        mask[top : top + 15, left : left + 16] = label
    mask[:2] = 255
    colours = COLOURS[np.where(mask == 255, 0, mask)]
    pixels = np.clip(colours + random.normal(0, noise, (*mask.shape, 3)), 0, 255).astype(np.uint8)
    return Pictures.fromarray(pixels), mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 8), ("val", 3), ("test", TESTED)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            picture, mask = scene(number + 10 * count)
            picture.save(root / split / "images" / f"{number}.png")
            Pictures.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


# What a mask says.


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits", "one bit"])
def test_a_mask_is_read_as_class_numbers(kind, tmp_path):
    numbers = np.array([[0, 1, 1], [1, 0, 1]])
    picture = Pictures.fromarray(numbers.astype(np.uint16 if kind == "16 bits" else np.uint8))
    if kind == "palette":
        picture = Pictures.fromarray(numbers.astype(np.uint8), "L").convert("P")
        picture.putdata(numbers.flatten().tolist())
        picture.putpalette([200, 10, 10, 10, 200, 10])
    if kind == "one bit":
        picture = Pictures.fromarray(numbers.astype(bool))
    picture.save(tmp_path / "mask.png")
    read = read_mask({"bytes": None, "path": str(tmp_path / "mask.png")}, Masks(), 2)
    assert read.tolist() == numbers.tolist()


def test_numbers_beyond_255_are_classes_too(tmp_path):
    Pictures.fromarray(np.array([[300, 7]], dtype=np.uint16)).save(tmp_path / "mask.png")
    cell = {"bytes": None, "path": str(tmp_path / "mask.png")}
    assert read_mask(cell, Masks(ignore_index=65535), 301).tolist() == [[300, 7]]


def test_reduced_labels_count_from_1_and_leave_0_and_255_out(tmp_path):
    Pictures.fromarray(np.array([[0, 1, 150, 255]], dtype=np.uint8)).save(tmp_path / "mask.png")
    cell = {"bytes": None, "path": str(tmp_path / "mask.png")}
    assert read_mask(cell, Masks(reduce_labels=True), 150).tolist() == [[255, 0, 149, 255]]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((2, 2, 3), np.uint8), "is a picture of mode RGB; a mask holds one class number"),
        (np.array([[0, 3]], np.uint8), "holds the number 3, and there are 3 classes"),
        (np.array([[254, 1]], np.uint8), "holds the number 254"),
    ],
)
def test_a_mask_that_is_none_is_named(pixels, words, tmp_path):
    Pictures.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(UnreadablePictureError, match=f"mask.png {words}"):
        read_mask({"bytes": None, "path": str(tmp_path / "mask.png")}, Masks(), 3)


# Where pairs are found.


@pytest.mark.parametrize("layout", ["{split}/images", "images/{split}"])
def test_files_of_one_name_belong_together(layout, tmp_path):
    for split, stem in (("train", "a"), ("train", "b"), ("val", "a")):
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            place = tmp_path / layout.format(split=split).replace("images", kind)
            place.mkdir(parents=True, exist_ok=True)
            Pictures.new("L", (4, 4)).save(place / f"{stem}.{suffix}")
    pairs = read_pairs(str(tmp_path))
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 2, "validation": 1}
    row = pairs["train"][1]
    assert row["image"]["path"].endswith("b.jpg") and row["mask"]["path"].endswith("b.png")


@pytest.mark.parametrize(("kind", "words"), [("images", "1 of 3 files have no mask"), ("masks", "have no picture")])
def test_a_file_alone_is_named(kind, words, tmp_path):
    for place in ("images", "masks"):
        (tmp_path / place).mkdir()
        for stem in "ab":
            Pictures.new("L", (4, 4)).save(tmp_path / place / f"{stem}.png")
    Pictures.new("L", (4, 4)).save(tmp_path / kind / "alone.png")
    with pytest.raises(ValueError, match=words) as error:
        read_pairs(str(tmp_path))
    assert "alone.png" in str(error.value)


def test_a_folder_without_masks_is_told_where_they_go(tmp_path):
    (tmp_path / "cats").mkdir()
    Pictures.new("L", (4, 4)).save(tmp_path / "cats" / "a.png")
    with pytest.raises(ValueError, match=r"holds pictures and no masks; put them into images/ and masks/"):
        SegmentationDataModule(str(tmp_path), masks=Masks(class_names=2)).load()


def test_columns_of_a_table_are_told_by_type_and_name():
    features = Features(
        {"image": Image(), "annotation": Image(), "scene": ClassLabel(names=["a"]), "n": Value("int64")}
    )
    assert find_columns(features, None, None) == ("image", "annotation")
    assert find_columns(Features({"left": Image(), "right": Image()}), None, "right") == ("left", "right")
    with pytest.raises(ValueError, match=r"no mask column among .* name one with masks.column"):
        find_columns(Features({"image": Image(), "depth": Image()}), None, None)
    with pytest.raises(ValueError, match=r"masks\.column 'x' does not exist"):
        find_columns(features, None, "x")


def test_a_data_set_of_columns_gives_the_batches_of_the_folder(folder, tmp_path):
    columns = {
        split: Dataset.from_dict(
            {
                "image": [str(folder / place / "images" / f"{n}.png") for n in sorted(range(count), key=str)],
                "label": [str(folder / place / "masks" / f"{n}.png") for n in sorted(range(count), key=str)],
            },
            Features({"image": Image(), "label": Image()}),
        )
        for split, place, count in (("train", "train", 8), ("test", "test", TESTED))
    }
    DatasetDict(columns).save_to_disk(tmp_path / "saved")
    stored = SegmentationDataModule(str(tmp_path / "saved"), image_size=32, masks=Masks(class_names=NAMES))
    plain = SegmentationDataModule(str(folder), image_size=32)
    for ours, theirs in zip(stored.test_dataloader(), plain.test_dataloader(), strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_classes_without_names_are_asked_for(folder, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).symlink_to(folder / "train" / kind)
    with pytest.raises(ValueError, match=r"write classes\.txt"):
        SegmentationDataModule(str(tmp_path)).load()
    (tmp_path / "id2label.json").write_text(json.dumps({"1": "red", "0": "ground", "2": "green"}))
    assert SegmentationDataModule(str(tmp_path)).id2label == dict(enumerate(NAMES))


def test_a_mask_of_another_size_is_named_or_counted(tmp_path):
    for number in range(4):
        picture, mask = scene(number)
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        picture.save(tmp_path / "images" / f"{number}.png")
        Pictures.fromarray(mask[:, : 30 if number == 2 else None]).save(tmp_path / "masks" / f"{number}.png")
    options = {"dataset": str(tmp_path), "image_size": 32, "masks": Masks(class_names=3), "batch_size": 4}
    with pytest.raises(UnreadablePictureError, match=r"2.png has 30x.* a mask has the size of its picture"):
        list(SegmentationDataModule(**options, splits=Splits(validation_fraction=0)).train_dataloader())
    data = SegmentationDataModule(**options, splits=Splits(validation_fraction=0), reading=Reading(on_error="skip"))
    (batch,) = list(data.train_dataloader())
    assert len(batch["labels"]) == 3 and "2.png" in batch["unreadable"][0]


# What is done to both.


def transform(**options) -> JointTransform:
    return JointTransform((32, 24), JointAugmentation(**({"distort": 0.0} | options)), "nearest", [7, 7, 7], 255)


def test_picture_and_mask_stay_together():
    """With nearest for both and no noise, the mask can be read off the picture."""
    augment = transform(scale=(0.5, 2.0), hflip=0.5)
    mirrored = set()
    for seed in range(40):
        torch.manual_seed(seed)
        picture, mask = scene(seed, noise=0.0)
        pixels, labels = augment(picture, torch.from_numpy(mask.astype(np.int64)))
        assert pixels.shape == (3, 32, 24) and labels.shape == (32, 24) and pixels.dtype == torch.uint8
        red, green = pixels[0].int(), pixels[1].int()
        seen = torch.where(red > 200, 1, torch.where(green > 200, 2, 0))
        known = labels != 255
        assert torch.equal(seen[known], labels[known])
        around = (pixels == 7).all(0)
        assert (labels[around] == 255).all()
        mirrored.add(int(labels[:, 0].sum() > labels[:, -1].sum()))
    assert mirrored == {0, 1}


def test_the_colours_change_and_the_mask_does_not():
    picture, mask = scene(3)
    labels = torch.from_numpy(mask.astype(np.int64))
    results = {}
    for distort in (0.0, 1.0):
        torch.manual_seed(1)
        results[distort] = JointTransform((32, 24), JointAugmentation(distort=distort), "bilinear", [7, 7, 7], 255)(
            picture, labels
        )
    assert torch.equal(results[0.0][1], results[1.0][1])
    assert not torch.equal(results[0.0][0], results[1.0][0])


def test_a_crop_that_one_class_fills_is_drawn_again():
    mask = torch.zeros(24, 96, dtype=torch.int64)
    mask[:, :12] = 1  # few places have much of both classes
    picture = Pictures.new("RGB", (96, 24))
    both = {}
    for largest in (0.75, 1.0):
        augment = JointTransform((24, 24), JointAugmentation((1.0, 1.0), largest, 0.0, 0.0), "nearest", [0] * 3, 255)
        count = 0
        for seed in range(60):
            torch.manual_seed(seed)
            count += len(augment(picture, mask)[1].unique()) > 1
        both[largest] = count
    assert both[0.75] > 2 * both[1.0]


# What is measured.


def test_iou_is_that_of_torchmetrics_over_the_whole_set():
    generator = torch.Generator().manual_seed(0)
    metric = MulticlassJaccardIndex(4, average="none", ignore_index=255)
    counts = np.zeros((4, 4), np.int64)
    for _ in range(3):
        guess = torch.randint(0, 3, (2, 9, 7), generator=generator)
        truth = torch.randint(0, 3, (2, 9, 7), generator=generator)
        truth[:, :2] = 255
        metric.update(guess, truth)
        for one, other in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True):
            if one != 255:
                counts[one, other] += 1
    iou = class_iou(counts)
    np.testing.assert_allclose(iou[:3], metric.compute().numpy()[:3], rtol=1e-6)
    assert np.isnan(iou[3])


def random_counts(pictures: int, classes: int, seed: int = 0) -> list[torch.Tensor]:
    """Counts of pictures in which some classes occur; those of one picture are alike."""
    random, found = np.random.default_rng(seed), []
    for _ in range(pictures):
        present = random.random(classes) < 0.4
        truth = random.integers(50, 400, classes) * present
        hits = (truth * random.beta(6, 2)).astype(int)
        found.append(torch.from_numpy(np.stack([hits, truth, np.maximum(hits, truth - 20)], axis=1)))
    return found


def mean_iou(counts: np.ndarray) -> float:
    union = counts[:, 1] + counts[:, 2] - counts[:, 0]
    return float((counts[union > 0, 0] / union[union > 0]).mean())


def test_the_interval_is_that_of_the_classical_bootstrap():
    """It draws as many pictures as there are, with replacement; the ends agree to a fraction of their distance."""
    counts = random_counts(60, 7)
    bootstrap = PictureBootstrap(7)
    for row, count in enumerate(counts):
        bootstrap.add(count, row)
    low, high = bootstrap.interval()
    stacked, random = torch.stack(counts).numpy(), np.random.default_rng(1)
    means = [mean_iou(stacked[random.integers(0, 60, 60)].sum(0)) for _ in range(2000)]
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose([low, high], expected, atol=0.15 * (expected[1] - expected[0]))
    assert low < mean_iou(stacked.sum(0)) < high


def test_the_interval_covers_the_mean_iou_of_all_pictures():
    """19 of 20 samples of a population, or nearly: the bootstrap of 25 pictures is a little too narrow."""
    population = torch.stack(random_counts(4000, 4, seed=5))
    truth, covered, random = mean_iou(population.sum(0).numpy()), 0, np.random.default_rng(2)
    for trial in range(100):
        bootstrap = PictureBootstrap(4)
        for place, row in enumerate(random.integers(0, len(population), 25)):
            bootstrap.add(population[row], trial, place)
        low, high = bootstrap.interval()
        covered += low <= truth <= high
    assert 85 <= covered <= 100


def test_the_interval_does_not_depend_on_order_or_ranks_and_its_memory_not_on_the_pictures():
    counts = random_counts(24, 5)
    whole, parts = PictureBootstrap(5), [PictureBootstrap(5), PictureBootstrap(5)]
    for row, count in enumerate(counts):
        whole.add(count, row)
    for row in reversed(range(24)):
        parts[row % 3 == 0].add(counts[row], row)
    assert torch.equal(whole.totals, parts[0].totals + parts[1].totals)
    assert whole.totals.nbytes == 16_000 * 5
    assert PictureBootstrap(5).interval() is None
    few = PictureBootstrap(5)
    for row in range(9):
        few.add(counts[row], row)
    assert few.interval() is None


def test_the_line_of_a_picture_is_counted_by_hand():
    guess = torch.tensor([[0, 0, 1], [2, 2, 2]])
    truth = torch.tensor([[0, 1, 1], [0, 255, 255]])
    counts = region_counts(guess, truth, 4, 255)
    assert counts.tolist() == [[1, 2, 2], [1, 2, 1], [0, 0, 1], [0, 0, 0]]
    accuracy, miou, worst, worst_iou, ignored = picture_scores(counts, 6, ["a", "b", "c", "d"])
    assert (accuracy, worst, worst_iou) == (0.5, "c", 0.0)
    assert miou == pytest.approx((1 / 3 + 1 / 2 + 0) / 3) and ignored == pytest.approx(1 / 3)
    nothing = region_counts(guess, torch.full_like(truth, 255), 4, 255)
    assert picture_scores(nothing, 6, ["a", "b", "c", "d"]) == (None, None, None, None, 1.0)


@pytest.mark.parametrize(("window", "stride"), [(8, 5), (8, 8), (6, None), (40, None)])
def test_sliding_windows_cover_every_pixel(window, stride):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 17, 21)

    def network(part):  # knows where the border of its window is, as a padded convolution does
        return F.avg_pool2d(part, 3, stride=1, padding=1)

    step = stride or window * 2 // 3
    total, seen = torch.zeros(2, 3, 17, 21), torch.zeros(17, 21)
    rows = range(max(-(-(17 - window) // step), 0) + 1)
    columns = range(max(-(-(21 - window) // step), 0) + 1)
    for row in rows:  # as mmseg's slide_inference counts them
        for column in columns:
            bottom, right = min(row * step + window, 17), min(column * step + window, 21)
            top, left = max(bottom - window, 0), max(right - window, 0)
            total[..., top:bottom, left:right] += network(images[..., top:bottom, left:right])
            seen[top:bottom, left:right] += 1
    torch.testing.assert_close(slide(network, images, window, stride), total / seen, **PARITY)


# A whole run.


OPTIONS = {
    "preset": "swin_digits_patch4_window4_32",
    "image_size": 32,
    "batch_size": 4,
    "head": {"hidden_size": 16, "auxiliary_channels": 8},
    "optimization": {"learning_rate": 5e-3, "lr_scaling": False, "warmup_epochs": 1},
}


def test_four_pictures_are_learned_by_heart(folder, tmp_path):
    for kind in ("images", "masks"):
        place = tmp_path / "four" / "train" / kind
        place.mkdir(parents=True)
        for number in range(4):
            (place / f"{number}.png").symlink_to(folder / "train" / kind / f"{number}.png")
    for split in ("val", "test"):
        (tmp_path / "four" / split).symlink_to(tmp_path / "four" / "train")
    (tmp_path / "four" / "classes.txt").write_text("\n".join(NAMES))
    options = OPTIONS | {
        "image_size": 48,
        "network": {"drop_path_rate": 0.0, "overrides": {"patch_size": 2, "encoder_stride": 4}},
        "augmentation": {"scale": [1.0, 1.2], "distort": 0.0, "largest_class": 1.0},
        "head": {"hidden_size": 32, "auxiliary_channels": 16, "dropout": 0.0},
    }
    run = train(
        str(tmp_path / "four"),
        "semantic-segmentation",
        runs=str(tmp_path / "runs"),
        trainer={"max_epochs": 200, "check_val_every_n_epoch": 100},
        **options,
    )
    assert run.metrics["test_miou"] > 0.95, run.metrics


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return train(str(folder), "semantic-segmentation", runs=str(runs), trainer={"max_epochs": 2}, **OPTIONS)


def test_a_run_leaves_a_model_whose_figures_can_be_measured_again(run, folder):
    """The test's mIoU, from the saved model, transformers' own post-processing and torchmetrics."""
    model = AutoModelForSemanticSegmentation.from_pretrained(run.folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(run.folder / "model")
    assert model.config.id2label == dict(enumerate(NAMES))
    metric = MulticlassJaccardIndex(3, ignore_index=255)
    for number in range(TESTED):
        picture = Pictures.open(folder / "test" / "images" / f"{number}.png")
        with torch.no_grad():
            outputs = model(**processor(picture, return_tensors="pt"))
        # Logits go over the size of the input on their way to that of the picture, as evaluation has it.
        outputs.logits = F.interpolate(outputs.logits, scale_factor=4, mode="bilinear")
        (classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[picture.size[::-1]])
        truth = torch.from_numpy(np.array(Pictures.open(folder / "test" / "masks" / f"{number}.png")).astype(np.int64))
        metric.update(classes[None], truth[None])
    assert run.metrics["test_miou"] == pytest.approx(float(metric.compute()), abs=2e-3)


def interval_of(run) -> list[float]:
    """Ends of the interval that a run has recorded."""
    (metric,) = (m for m in TrainingFacts.load(run.folder / "model").metrics if (m.name, m.split) == ("miou", "test"))
    assert metric.n == TESTED and metric.interval[0] <= metric.value <= metric.interval[1]
    return metric.interval


def read_predictions(folder) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_test_leaves_a_line_for_each_picture(run, folder):
    rows = read_predictions(run.folder)
    assert [row["path"] for row in rows] == sorted(str(path) for path in (folder / "test" / "images").iterdir())
    assert list(rows[0])[1:] == ["pixel_accuracy", "miou", "worst_class", "worst_iou", "ignored"]
    model = AutoModelForSemanticSegmentation.from_pretrained(run.folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(run.folder / "model")
    classes = segment(model, processor, Pictures.open(rows[3]["path"]).convert("RGB"))
    truth = torch.from_numpy(np.array(Pictures.open(rows[3]["path"].replace("images", "masks"))).astype(np.int64))
    known = truth != 255
    accuracy = float((classes == truth)[known].double().mean())
    assert float(rows[3]["pixel_accuracy"]) == pytest.approx(accuracy, abs=2e-3)
    assert float(rows[3]["ignored"]) == pytest.approx(1 - float(known.double().mean()), abs=1e-5)
    metric = MulticlassJaccardIndex(3, ignore_index=255)
    assert float(rows[3]["miou"]) == pytest.approx(float(metric(classes[None], truth[None])), abs=5e-3)


def test_pixels_without_a_class_are_not_counted_whatever_their_number_means_to_the_model(run, folder, tmp_path):
    # The second data number fewer classes in another order; 2, which has no class there, is a class of the model.
    metrics = []
    for name, numbers, classes, ignored in (
        ("known", [0, 255, 2], NAMES, 255),
        ("other", [1, 2, 0], ["green", "ground"], 2),
    ):
        table = np.full(256, ignored, np.uint8)
        table[:3] = numbers
        place = tmp_path / name / "test"
        (place / "masks").mkdir(parents=True)
        (place / "images").symlink_to(folder / "test" / "images")
        for path in (folder / "test" / "masks").iterdir():
            Pictures.fromarray(table[np.array(Pictures.open(path))]).save(place / "masks" / path.name)
        masks = Masks(ignore_index=ignored, class_names=classes)
        data = SegmentationDataModule(str(place.parent), image_size=OPTIONS["image_size"], num_workers=0, masks=masks)
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        metrics += trainer.test(SwinSegmenter(weights=str(run.folder / "model")), data, verbose=False)
    assert metrics[0] == metrics[1] and metrics[0]["test_miou"] > 0
    assert SwinSegmenter.option_of_data("ignore_index", data, {"ignore_index": 0}) > 65535  # in a measurement


def test_a_pipeline_of_transformers_segments(run, folder):
    segment = pipeline("image-segmentation", model=str(run.folder / "model"))
    found = segment(str(folder / "test" / "images" / "0.png"))
    assert {part["label"] for part in found} <= set(NAMES) and found[0]["mask"].size == (52 - 110 % 7, 36 + 110 % 5)


def test_a_push_takes_the_code_of_the_segmenter_and_the_card_its_figures(run, hub):
    push(run.folder, "user/scenes", endpoint=hub.url)
    files = hub.files("user/scenes")
    assert "segmentation_swin_hf.py" in files
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForSemanticSegmentation"] == "segmentation_swin_hf.SwinHFForSemanticSegmentation"
    card = files["README.md"].decode()
    assert "pipeline_tag: image-segmentation" in card and "| Label | IoU |" in card
    low, high = (f"{100 * end:.1f}" for end in interval_of(run))
    assert f"{low}–{high} % | test | {TESTED} |" in re.search(r"\| Mean IoU \|.*test.*", card)[0]
    assert f"95 % confidence interval {low}–{high} %, n = {TESTED}" in card
    assert "- The interval, a bootstrap over the images, covers the random choice of the 11 images" in card
    sheet = "assets/sample_pictures.png"
    assert {name for name in files if name.endswith(".png")} == {"assets/learning_curves.png"} and sheet not in card
    push(run.folder, "user/scenes", card=Card(samples=True), endpoint=hub.url)
    assert hub.files("user/scenes")[sheet] == (run.folder / "sample_pictures.png").read_bytes()
    assert f"![Test pictures with predictions]({sheet})" in hub.files("user/scenes")["README.md"].decode()


def test_a_single_picture_a_device_is_refused_before_the_first_step(folder, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 1, and batch normalisation cannot train on a single picture"):
        train(
            str(folder),
            "semantic-segmentation",
            runs=str(tmp_path),
            trainer={"max_epochs": 1},
            **OPTIONS | {"batch_size": 1},
        )


def test_evaluation_with_a_mirror_image_averages_both(folder):
    seed_everything(0)
    module = SwinSegmenter("swin_digits_patch4_window4_32", num_labels=3, head=Head(hidden_size=8, flip=True)).eval()
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        one, other = module.logits(images).softmax(1), module.logits(images.flip(-1)).softmax(1).flip(-1)
        torch.testing.assert_close(module(images).softmax(1), (one + other) / 2, **PARITY)
        module.model.decode_head.classifier.bias[0] = 1e4  # certain: the probabilities of the others are 0 in float32
        assert module(images).isfinite().all()


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(folder, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the machine

    def weights(**options):
        seed_everything(1)
        head = Head(hidden_size=8, auxiliary_channels=8)
        module = SwinSegmenter("swin_digits_patch4_window4_32", num_labels=3, image_size=32, head=head)
        data = SegmentationDataModule(str(folder), image_size=32, batch_size=4)
        trace = exact_run.Trace({"middle": exact_run.middle(1, epoch=1)}, tmp_path)
        exact_run.trainer(tmp_path, trace, max_epochs=3).fit(module, data, **options)
        return {name: value.clone() for name, value in module.state_dict().items()}

    try:
        whole = weights()
        again = weights(ckpt_path=str(tmp_path / "middle.ckpt"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_two_ranks_measure_an_odd_number_of_pictures_as_one_does(run):
    def measured(*words):
        command = [sys.executable, "-m", "swin_hf.cli", "train", "--task", "semantic-segmentation", "test"]
        command += [
            "--config",
            str(run.folder / "config.yaml"),
            "--ckpt_path",
            str(run.folder / "checkpoints/best.ckpt"),
        ]
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=PATIENCE, cwd=run.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        shown = sorted(line for line in done.stdout.splitlines() if line.startswith(("test_", "95 %", *NAMES)))
        return shown, read_predictions(run.folder)

    one = measured()
    assert len(one[0]) == 4 + len(NAMES) and len(one[1]) == TESTED
    (run.folder / "predictions.csv").unlink()
    assert measured("--trainer.devices", "2", "--trainer.strategy", "ddp") == one
