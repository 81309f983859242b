"""What the tasks share whose answers have names: those of the model and of the data are matched, and shown."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from swin_hf.classes import ClassMismatchError, class_table, has_names, match_classes

from ..callbacks import to_pictures
from ..data.shards import shorten
from ..module import SwinModule, TestReport
from .sheets import Sheet, Shown, caption, draw_sheet


class ClassModule(SwinModule):
    """Trains a network whose classes have names, those of its data.

    Args:
        num_labels: Number of classes, or of numbers in a regression; from the data when run by the command line.
        id2label: Class number to name; from the data when run by the command line.
    """

    data_options = (*SwinModule.data_options, "id2label", "num_labels")
    sheet_sizes: ClassVar[dict[str, int]] = {"sample_pictures": 8}  # pictures of each sheet of a test

    sheets: dict[str, Sheet]
    tested: Any = None  # what `conclude` found in a test

    @property
    def class_names(self) -> list[str]:
        """Names of the model's classes, in the order of their numbers."""
        return class_table(self.model.config.id2label)

    @classmethod
    def option_of_data(cls, name: str, data: Any, measured: Mapping[str, Any] | None) -> Any:
        """Classes of the data to train; those of the model that is measured, where it has any."""
        if name not in ("id2label", "num_labels"):
            return super().option_of_data(name, data, measured)
        if measured and (measured.get("id2label") or measured.get("num_labels")):
            return measured.get(name)
        if measured and measured.get("weights"):
            return None
        return data.id2label if name == "id2label" else data.num_classes

    def setup(self, stage: str) -> None:
        """Make the data number its classes as the model does; a model without names takes those of its training data.

        ValueError if a class of the data is unknown to the model, or it would not be trained on all that it knows.
        """
        super().setup(stage)
        theirs, ours = class_table(getattr(self.datamodule, "id2label", None)), self.class_names
        if stage == "predict" or not theirs or theirs == ours:
            return
        if stage == "fit" and len(theirs) != len(ours):
            found = len(theirs)
            raise ValueError(f"num_labels is {len(ours)} but the data has {found} classes; give num_labels {found}")
        if stage == "fit" and not has_names(ours):
            name_classes(self.model.config, theirs)
        else:
            self.datamodule.renumber(match_classes(theirs, ours), ours)

    def on_test_start(self) -> None:
        """Forget the pictures of an earlier test."""
        self.sheets = {name: Sheet(size) for name, size in self.sheet_sizes.items()}
        self.lots = np.random.default_rng(self.global_rank)

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the images, and keep some of them, where the data module knows how they look."""
        super().on_test_batch_end(outputs, batch, batch_idx, dataloader_idx)
        if outputs and hasattr(self.datamodule, "image_processor"):
            self.fill_sheets(batch, outputs)

    def fill_sheets(self, batch: dict[str, Tensor], outputs: dict[str, Any]) -> None:
        """Keep pictures of a batch of a test, which are drawn by lot."""
        lots = self.lots.random(len(batch["labels"]))
        self.sheets["sample_pictures"].offer(lots, partial(self.shown, batch, outputs))

    def shown(self, batch: dict[str, Tensor], outputs: dict[str, Any], place: int) -> Shown:
        """What a sheet shows of the picture at a place of a batch: the picture and its answer."""
        area = slice(place, place + 1)
        (answer,) = self.answers({name: values[area] for name, values in outputs.items()}, batch["labels"][area])
        pictures = to_pictures(batch["pixel_values"][area], self.datamodule)
        file = Path(self.datamodule.batch_sources[place][1]).name
        return Shown(list(pictures), [caption(self.answer_columns, answer)], file)

    def on_validation_epoch_end(self) -> None:
        """Log what follows from the answers of all processes."""
        self.conclude("val")

    def on_test_epoch_end(self) -> None:
        """Likewise, and keep what was found and the pictures of all processes."""
        self.tested = self.conclude("test")
        for sheet in self.sheets.values():
            sheet.gather()

    def conclude(self, split: str) -> Any:
        """Log what follows from metrics that are not logged with each batch, and reset them; all processes call it.

        What is returned for a test is :attr:`tested` from then on.
        """

    def draw(self, sheet: str) -> Figure:
        """A sheet; without names of files, for a card may show it."""
        return draw_sheet([shown for _, shown in self.sheets[sheet].kept], self.class_names)

    def test_report(self) -> TestReport:
        """How the sheets are drawn that have pictures."""
        return TestReport(figures={name: partial(self.draw, name) for name, sheet in self.sheets.items() if sheet.kept})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of other classes, or of another model, before anything is loaded."""
        ours, theirs = self.class_names, class_table(checkpoint.get("hyper_parameters", {}).get("id2label"))
        if theirs and has_names(theirs) and has_names(ours) and ours != theirs:
            raise ClassMismatchError(
                f"the checkpoint numbers its classes {shorten(theirs)}, and this run {shorten(ours)}; start a new run"
                " from its weights, which are matched by name: --model.weights runs/<name>/model"
            )
        super().on_load_checkpoint(checkpoint)


def class_fields(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    """Fields of a configuration for the classes: their number, or their names too; ValueError if they contradict."""
    if id2label is None:
        return {"num_labels": num_labels}
    if num_labels is not None and num_labels != len(id2label):
        raise ValueError(f"num_labels is {num_labels} but id2label names {len(id2label)} classes; give one of them")
    names = {int(number): name for number, name in id2label.items()}
    return {"num_labels": len(names), "id2label": names, "label2id": {name: number for number, name in names.items()}}


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Write the names of the classes into a configuration of as many classes."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
