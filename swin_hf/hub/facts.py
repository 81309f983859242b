"""The facts that a training run leaves for its model card: ``training_facts.json``.

The run collects facts, the template (``card.md.jinja``) holds the wording, and nothing here touches the network.
Every field may stay unknown (``None`` or empty): an unknown fact becomes a comment in the card, never a guess.
"""

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from swin_hf.files import replacing

FACTS_NAME = "training_facts.json"


@dataclass
class SplitFacts:
    """One split of the data set."""

    n: int  # images
    classes: dict[str, int] = field(default_factory=dict)  # images of each label, in order; empty if not counted


@dataclass
class DataFacts:
    """What the model was trained and measured on."""

    name: str  # Hub id (``org/name``) or the name of a local folder; never an absolute path
    fingerprint: str | None = None  # what pins the content: a Hub commit or the fingerprint of ``datasets``
    splits: dict[str, SplitFacts] = field(default_factory=dict)  # by name: {"train": SplitFacts(1500), ...}
    license: str | None = None  # SPDX-like identifier of the data's licence
    config: str | None = None  # name of the data set's configuration, when it has several
    is_hub_id: bool = False  # whether ``name`` is a repository on the Hub (then the card links it)
    unreadable: int = 0  # pictures that could not be decoded and were left out, as the run was told to


@dataclass
class Metric:
    """One measured number."""

    name: str  # ``accuracy``, ``accuracy_top5``, ``f1_macro``, ``ece``, ``map``, ``mae``, ``loss`` or any other name
    value: float  # accuracies, F1, ECE and average precision in [0, 1]
    split: str  # that it was measured on
    n: int | None = None  # images behind it; the confidence interval of a proportion follows from it
    interval: list[float] | None = None  # 95 % ends where it is not a proportion, by a bootstrap over the images


@dataclass
class ClassScore:
    """Precision, recall and F1, in [0, 1], of one label over ``support`` images or pixels; None where undefined."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    iou: float | None = None  # intersection over union, of a segmenter


@dataclass
class ConfusionMatrix:
    """Counts, rows are the truth and columns the prediction, both in the order of ``labels``."""

    labels: list[str]
    counts: list[list[int]]
    split: str


@dataclass
class TrainingFacts:
    """Everything that a run knows about itself."""

    data: DataFacts | None = None
    hyper_parameters: dict[str, Any] = field(default_factory=dict)  # flat names (``batch_size``, ...) to JSON values
    default_settings: list[str] = field(default_factory=list)  # names of those that have their default value
    metrics: list[Metric] = field(default_factory=list)  # of the weights that were saved
    per_class: list[ClassScore] = field(default_factory=list)  # on the split of ``confusion_matrix``
    confusion_matrix: ConfusionMatrix | None = None  # of one split
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # by name, [step, value] in ascending steps
    versions: dict[str, str] = field(default_factory=dict)  # of libraries (``torch``, ``swin_hf``, ``python``, ...)
    hardware: dict[str, Any] = field(default_factory=dict)  # {"device": "NVIDIA H200", "devices": 1, ...}
    speed: dict[str, float] = field(default_factory=dict)  # measured only, by name with unit: ``train_images_per_s``
    duration_s: float | None = None  # training time, seconds
    command: str | None = None  # the command line as it was; the card removes whatever looks like a token
    seed: int | None = None
    base_model: str | None = None  # Hub id or file name that the weights started from; None means random weights
    base_model_revision: str | None = None  # its commit
    base_model_license: str | None = None  # what its card names as the licence of its weights, if it is known
    best_step: int | None = None  # global step that the saved weights come from

    def to_json(self) -> str:
        """The same JSON for the same facts; a value that is not finite becomes ``null``."""
        return json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``training_facts.json`` into a folder, whole or not at all, and return its path."""
        path = Path(folder) / FACTS_NAME
        with replacing(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from parsed JSON; TypeError or ValueError names the field that is unknown or does not fit."""
        metrics = values.get("metrics")
        if isinstance(metrics, list):  # a value that was not finite is unknown
            known = [m for m in metrics if not (isinstance(m, dict) and m.get("value", 0) is None)]
            values = {**values, "metrics": known}
        facts: Self = _typed(cls, values, "")
        for name, points in facts.curves.items():
            if any(len(point) != 2 or point[0] is None for point in points):
                raise ValueError(f"curves.{name} is not a list of [step, value] points")
        matrix = facts.confusion_matrix
        if matrix and {len(matrix.counts), *map(len, matrix.counts)} - {len(matrix.labels)}:
            raise ValueError(f"confusion_matrix.counts is not a table of {len(matrix.labels)} x {len(matrix.labels)}")
        return facts

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ``training_facts.json``, given the file or its folder; ValueError if it is not one."""
        path = Path(path)
        if path.is_dir():
            path = path / FACTS_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError("the top level is not an object")
            return cls.from_dict(values)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path.name} cannot be read ({error}); delete it or train again") from error


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the type of its field; ``where`` is its path, such as ``metrics[0].value``."""
    if kind is Any:
        return value
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _typed(get_args(kind)[0], value, where)
    types: dict[Any, tuple[Any, str]] = {
        float: ((int, float), "a number"), int: (int, "an integer"), str: (str, "text"), bool: (bool, "true or false"),
        list: (list, "a list"),
    }  # fmt: skip
    accepted, what = types.get(get_origin(kind) or kind, (dict, "an object"))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where} is {str(value)[:60]!r}; it must be {what}")
    if is_dataclass(kind):
        return _object(kind, value, where)
    *_, inner = get_args(kind) or [None]
    inner = float | None if inner is float else inner  # ``null`` in a list or table is a number that is not finite
    if get_origin(kind) is list:
        return [_typed(inner, item, f"{where}[{index}]") for index, item in enumerate(value)]
    if get_origin(kind) is dict:
        return {name: _typed(inner, item, f"{where}.{name}") for name, item in value.items()}
    return value


def _object(kind: Any, values: dict[str, Any], where: str) -> Any:
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(names)}"
            raise TypeError(f"unknown field {name!r} of {kind.__name__}; {hint}")
    for f in fields(kind):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise TypeError(f"{where} has no {f.name}")
    hints = get_type_hints(kind)
    return kind(**{n: _typed(hints[n], item, f"{where}.{n}".removeprefix(".")) for n, item in values.items()})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | bool | type(None)) else str(value)
