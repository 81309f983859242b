"""Semantic segmentation: a class for each pixel, as section 4.3 of the paper has it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.v2 import functional as tvf

from swin_hf.loading import read_foreign_config
from swin_hf.ranges import Options, ranged

from ..callbacks import to_pictures
from ..data.segmentation import SegmentationDataModule
from ..module import TestReport
from ..network import Network, load_network
from ..optim import Optimization
from .classes import ClassModule, class_fields
from .classification import class_scores, score_table
from .regions import PictureBootstrap, class_iou, picture_scores, region_counts
from .sheets import NO_CLASS, Shown, overlay

NOT_MEASURED = 65536  # label of pixels without a class in a measurement: the number of no class
SHOWN_SIDE = 320  # pixels of the longer side of a picture on a sheet


@dataclass(frozen=True)
class Head(Options):
    """The UperNet head, and how it evaluates.

    Args:
        hidden_size: Channels of the main head; those of the weights if not given, or else 512.
        auxiliary_channels: Channels of the auxiliary head; likewise, or else 256.
        auxiliary_weight: Share of the auxiliary head's loss; 0 leaves it out.
        dropout: Dropout of whole channels before each classifier.
        window: Side in pixels of the windows that evaluation slides over a picture; the whole picture at once if not
            given.
        stride: Pixels from one window to the next; two thirds of the window if not given.
        flip: Whether evaluation averages a picture and its mirror image.
    """

    hidden_size: int | None = ranged(None, "[1, 16384]")
    auxiliary_channels: int | None = ranged(None, "[1, 16384]")
    auxiliary_weight: float = ranged(0.4, "[0, 1000]")
    dropout: float = ranged(0.1, "[0, 1)")
    window: int | None = ranged(None, "[1, 16384]")
    stride: int | None = ranged(None, "[1, 16384]")
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and self.stride > (self.window or 0):
            raise ValueError(f"head.stride is {self.stride} and head.window {self.window}; windows may not leave gaps")


class SwinSegmenter(ClassModule):
    """Train a Swin Transformer with UperNet to name the class of each pixel.

    The defaults are those of the paper for ADE20K with 16 pictures a step: AdamW at 6e-5, a warm-up and a linear decay
    to 0. Metrics are measured at the size of the stored pictures, from one confusion matrix over the whole split. The
    other arguments are those of :class:`~swin_hf.training.tasks.classes.ClassModule` and
    :class:`~swin_hf.training.SwinModule`.

    Args:
        weights: Weights to start from: any Swin (classifier, SimMIM, backbone), whose heads are new, or a segmenter.
        ignore_index: Label of pixels without a class; from the data when run by the command line.
        head: The UperNet head, and how it evaluates.
    """

    task = "semantic-segmentation"
    monitor = "val_miou"
    mode = "max"
    data_class = SegmentationDataModule
    default_config = "segment_stamps"
    answer_columns = ("pixel_accuracy", "miou", "worst_class", "worst_iou", "ignored")
    data_options = (*ClassModule.data_options, "ignore_index")

    def __init__(
        self,
        preset: str = "swin_tiny_patch4_window7_224",
        weights: str | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_channels: int | None = None,
        ignore_index: int = 255,
        network: Network = Network(drop_path_rate=0.3),
        optimization: Optimization = Optimization(
            learning_rate=6e-5, lr_scaling=False, weight_decay=0.01, schedule="linear", warmup_epochs=1.0, min_lr=0.0
        ),
        head: Head = Head(),
    ) -> None:
        super().__init__(optimization, network.compile)
        self.save_hyperparameters(logger=False)
        sizes = {name: getattr(head, name) for name in ("hidden_size", "auxiliary_channels", "dropout")}
        sizes |= {"auxiliary_loss_weight": head.auxiliary_weight, "ignore_index": ignore_index}
        fields = {"image_size": image_size, "num_channels": num_channels, **class_fields(num_labels, id2label)}
        fields["upernet"] = {name: size for name, size in sizes.items() if size is not None}
        self.build(preset, weights, network, load_segmenter, **fields)
        self.head, self.ignore_index = head, ignore_index
        counts = MulticlassConfusionMatrix(int(self.model.config.num_labels), ignore_index, validate_args=False)
        self.val_confusion, self.test_confusion = counts, counts.clone()
        self.bootstrap = PictureBootstrap(0)  # of the pictures of a test

    @classmethod
    def option_of_data(cls, name: str, data: Any, measured: Mapping[str, Any] | None) -> Any:
        """Likewise; pixels without a class get a label of their own where the classes of a model may be others."""
        is_other = name == "ignore_index" and measured is not None
        return NOT_MEASURED if is_other else super().option_of_data(name, data, measured)

    def setup(self, stage: str) -> None:
        """Prepare training; batch normalisation is synchronised over the devices, and a single picture is refused."""
        super().setup(stage)
        if hasattr(self.datamodule, "ignore_index"):
            self.datamodule.ignore_index = self.ignore_index
        if stage == "fit" and self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        elif stage == "fit" and getattr(self.datamodule, "batch_size", 2) < 2:
            raise ValueError(
                "batch_size is 1, and batch normalisation cannot train on a single picture; give 2 or more a device"
            )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(B, num_labels, height, width)`` of normalised images ``(B, C, height, width)``."""
        window = self.head.window
        whole = self.logits if window is None else partial(slide, self.logits, window=window, stride=self.head.stride)
        logits = whole(pixel_values)
        if self.head.flip:
            mirrored = whole(pixel_values.flip(-1)).flip(-1)
            logits = torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1))  # of the sum of both probabilities
        return logits

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Logits at the size of the images, at once."""
        logits = self.model(pixel_values=pixel_values).logits
        return F.interpolate(logits.float(), size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of both heads on one batch of crops."""
        loss: Tensor = self.model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        self.log_training(loss, len(batch["labels"]))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Any]:
        """Add a batch to the metrics of a split.

        Returns:
            ``predictions`` ``(B, height, width)`` at the size of the labels; of a test also the ``regions`` of each
            picture, see :func:`~swin_hf.training.tasks.regions.region_counts`.
        """
        labels, logits = batch["labels"], self(batch["pixel_values"])
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        pixels = int((labels != self.ignore_index).sum())
        total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        getattr(self, f"{split}_loss").update(total / max(pixels, 1), weight=pixels)
        outputs: dict[str, Any] = {"predictions": logits.argmax(1)}
        getattr(self, f"{split}_confusion").update(outputs["predictions"], labels)
        if split == "test":
            outputs["regions"] = self.count_regions(outputs["predictions"], labels)
        return outputs

    def on_test_start(self) -> None:
        """Forget the pictures of an earlier test."""
        super().on_test_start()
        self.bootstrap = PictureBootstrap(int(self.model.config.num_labels))

    def count_regions(self, predictions: Tensor, labels: Tensor) -> list[Tensor]:
        """Counts of each picture of a batch of a test, which are added to the bootstrap."""
        has_rows = not getattr(getattr(self.datamodule, "reading", None), "streaming", True)
        found = []
        for number, (guess, truth) in enumerate(zip(predictions, labels, strict=True)):
            counts = region_counts(guess, truth, int(self.model.config.num_labels), self.ignore_index)
            # A row is the same picture on any number of processes; a stream has no rows.
            row = (self.datamodule.batch_sources[number][0],) if has_rows else None
            self.bootstrap.add(counts, *(row or (self.global_rank, int(self.bootstrap.pictures))))
            found.append(counts)
        return found

    def answers(self, outputs: Any, labels: Tensor) -> list[tuple[Any, ...]]:
        """What a user sorts the pictures by: :func:`~swin_hf.training.tasks.regions.picture_scores`."""
        return [picture_scores(counts, labels[0].numel(), self.class_names) for counts in outputs["regions"]]

    def shown(self, batch: dict[str, Tensor], outputs: dict[str, Any], place: int) -> Shown:
        """The picture, and overlays of its labels and its prediction, no larger than they are seen on the sheet."""
        labels, guesses = batch["labels"][place], outputs["predictions"][place]
        labels = labels.where(labels != self.ignore_index, NO_CLASS)
        factor = min(1.0, SHOWN_SIDE / max(labels.shape))
        size = [max(1, round(factor * side)) for side in labels.shape]
        masks = tvf.resize(torch.stack([labels, guesses]), size, tvf.InterpolationMode.NEAREST_EXACT).cpu()
        (picture,) = to_pictures(tvf.resize(batch["pixel_values"][[place]], size, antialias=True), self.datamodule)
        ((_, iou, *_),) = self.answers({"regions": [outputs["regions"][place]]}, batch["labels"][[place]])
        captions = ["picture", "truth", "prediction" if iou is None else f"prediction, mean IoU {iou:.2f}"]
        overlays = [overlay(picture, mask) for mask in masks]
        return Shown([picture, *overlays], captions, pixels=Counter(masks.flatten().tolist()))

    def conclude(self, split: str) -> np.ndarray[Any, Any]:
        """Log the mean IoU and the accuracy of the pixels; return the confusion counts, whose rows are the truth.

        It warns where the validation masks have a single class, which says nothing.
        """
        confusion = getattr(self, f"{split}_confusion")
        counts: np.ndarray[Any, Any] = confusion.compute().cpu().numpy()
        confusion.reset()
        iou = class_iou(counts)
        mean = float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0
        accuracy = float(np.diag(counts).sum() / max(counts.sum(), 1))
        self.log_dict({f"{split}_miou": mean, f"{split}_pixel_accuracy": accuracy}, prog_bar=True)
        seen = [name for name, pixels in zip(self.class_names, counts.sum(axis=1), strict=True) if pixels]
        if split == "test":
            for name in ("totals", "pictures"):
                mine = getattr(self.bootstrap, name).to(self.device)
                setattr(self.bootstrap, name, self.trainer.strategy.reduce(mine, reduce_op="sum").cpu())
        elif len(seen) < 2 and not self.trainer.sanity_checking:
            ignored = getattr(self.datamodule, "masks", self).ignore_index
            rank_zero_warn(
                f"the validation masks have no pixel of another class than {', '.join(seen) or 'none'}; pixels of "
                f"{ignored} have no class (masks.ignore_index): if they are one, give a number there that is none"
            )
        return counts

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Class numbers ``(B, height, width)``."""
        return self.forward(batch["pixel_values"]).argmax(1)

    def test_report(self) -> TestReport:
        """IoU and share of the pixels of each class, and the interval of the mean IoU."""
        report, counts, labels = super().test_report(), self.tested, self.class_names
        iou = [None if np.isnan(value) else float(value) for value in class_iou(counts)]
        scores = [replace(score, iou=value) for score, value in zip(class_scores(counts, labels), iou, strict=True)]
        report.facts["per_class"] = scores
        report.table = score_table(scores, ("IoU", "recall", "precision"), max(int(counts.sum()), 1))
        if (interval := self.bootstrap.interval()) is not None:
            report.intervals["miou"] = interval
            ends = "{:.4f} to {:.4f}".format(*interval)
            report.table += f"\n95 % interval of the mean IoU, by a bootstrap over the pictures: {ends}"
        return report


def load_segmenter(task: str, path: Path, fields: dict[str, Any], backend: dict[str, Any]) -> tuple[Any, bool]:
    """:func:`~swin_hf.training.network.load_network`, with the head of the weights where they have one."""
    fields["upernet"] = (read_foreign_config(path).upernet or {}) | fields["upernet"]
    return load_network(task, path, fields, backend)


def slide(network: Callable[[Tensor], Tensor], images: Tensor, window: int, stride: int | None) -> Tensor:
    """Mean of the logits of windows that overlap, as OpenMMLab's sliding evaluation has it; ``(B, K, H, W)``.

    The ``network`` answers to images ``(B, C, height, width)`` with logits ``(B, K, height, width)``. A side of the
    ``images`` that is shorter than the window is taken whole; ``window`` and ``stride`` as in :class:`Head`.
    """
    step = stride or max(1, window * 2 // 3)
    height, width = images.shape[-2:]
    tops, lefts = (
        sorted({max(min(start, side - window), 0) for start in range(0, max(side - window + step, 1), step)})
        for side in (height, width)
    )
    total: Any = None
    seen = images.new_zeros(height, width)
    for top, left in product(tops, lefts):
        area = (..., slice(top, top + window), slice(left, left + window))
        logits = network(images[area])
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], height, width)
        total[area] += logits
        seen[area] += 1
    return total / seen
