"""The model card: facts in, Markdown out, the same text for the same facts.

The wording is in ``card.md.jinja``. A fact that was not recorded becomes a comment, never a guess. The last line of a
rendered card is a fingerprint of the rest: it tells an edited card from one that may be rendered again.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from swin_hf.classes import class_table
from swin_hf.counting import count_macs, count_parameters
from swin_hf.families import architectures
from swin_hf.files import WEIGHT_SUFFIXES
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.text import one_line

from .facts import Metric, TrainingFacts
from .pictures import SAMPLES, picture_names
from .remote import redact

CARD_NAME = "README.md"
FINGERPRINT = re.compile(r"<!-- rendered by swin_hf, fingerprint ([0-9a-f]{64}) -->\s*\Z")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LOG_ROWS = 20
WORST_CONFUSIONS = 10
PROPORTIONS = ("accuracy", "accuracy_top5")  # of n images: these have a binomial confidence interval
TITLES = {
    "accuracy": "Accuracy (top-1)", "accuracy_top5": "Accuracy (top-5)", "f1_macro": "F1, macro average",
    "ece": "Expected calibration error", "loss": "Loss", "miou": "Mean IoU", "pixel_accuracy": "Pixel accuracy",
    "map": "Mean average precision", "f1_micro": "F1, micro average", "mae": "Mean absolute error",
    "rmse": "Root of the mean squared error", "r2": "R2",
}  # fmt: skip
# What a card opens with, of a task that measures it.
HEADLINES = {
    "accuracy": "accuracy", "miou": "mean IoU", "map": "mean average precision", "mae": "mean absolute error",
}  # fmt: skip
QUANTITIES = ("loss", "mae", "rmse", "r2")  # no shares, whatever their value
# Names that the Hub's leaderboards know for ours.
HUB_METRICS = {
    "accuracy": "accuracy", "accuracy_top5": "accuracy", "f1_macro": "f1", "f1_micro": "f1", "miou": "mean_iou",
    "mae": "mae", "r2": "r_squared",
}  # fmt: skip

# The pictures that the Hub's page offers to try a classifier of ImageNet with, as Microsoft's own cards do.
TIGER = "tiger, Panthera tigris"
WIDGET = [
    {"src": f"https://huggingface.co/datasets/mishig/sample_images/resolve/main/{name}.jpg", "example_title": name}
    for name in ("tiger", "teapot", "palace")
]


@dataclass(frozen=True)
class CardSource:
    """What a card is rendered from; nothing is looked up elsewhere."""

    config: SwinHFConfig
    architecture: str  # name of the class of the model
    processor: dict[str, Any]  # values of ``preprocessor_config.json``
    facts: TrainingFacts = field(default_factory=TrainingFacts)  # what the run recorded
    repo_id: str = "user/model"  # where it is published
    tag: str | None = None  # that the snippets pin
    license: str | None = None  # of the weights; that of their start, in ``facts``, if not given
    dtype: str = "float32"  # of the weights
    files: Sequence[tuple[str, int, str]] = ()  # name, size in bytes and sha256 of the others of the repository
    has_code: bool = True  # whether the repository holds the code of the model


def render_card(source: CardSource) -> str:
    """Render the card of a model.

    Raises:
        ValueError: When the facts make metadata that the Hub would refuse.
    """
    facts, config, built = source.facts, source.config, architectures()[source.architecture]
    if facts.data:
        # A name is one line; it becomes a link only where it can be the id of a repository.
        name = " ".join(facts.data.name.split())
        data = replace(facts.data, name=name, is_hub_id=facts.data.is_hub_id and bool(DATASET_ID.fullmatch(name)))
        facts = replace(facts, data=data)
        source = replace(source, facts=facts)
    accuracies = [metric for metric in facts.metrics if metric.name in HEADLINES]
    headline = next((metric for metric in accuracies if metric.split == "test"), next(iter(accuracies), None))
    labels = class_table(config.id2label)
    text = template_environment().get_template("card.md.jinja").render(
        metadata=_metadata(source),
        name=source.repo_id.split("/")[-1],
        source=source,
        facts=facts,
        config=config,
        built=built,
        headline=headline,
        headlines=HEADLINES,
        regions=any(score.iou is not None for score in facts.per_class or ()),
        labels=labels if any(label != f"LABEL_{n}" for n, label in enumerate(labels)) else [],
        confusions=_worst_confusions(facts),
        log=_log_table(facts),
        pictures=picture_names(facts),
        samples=f"assets/{SAMPLES}" in [name for name, *_ in source.files],
        parameters=count_parameters(config, built.model_class),
        macs=count_macs(config, built.model_class),
        revision=source.tag or "main",
        command=redact(facts.command) if facts.command else None,
        fence=_fence(facts.command or ""),
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    return f"{text}\n<!-- rendered by swin_hf, fingerprint {_fingerprint(text)} -->\n"


def read_card(path: Path) -> str:
    """The text of a card; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the card {path} is not UTF-8 text ({error}); save it in that encoding") from None


def is_edited(text: str) -> bool:
    """Whether a card was written or changed by hand: it differs from what was rendered."""
    match = FINGERPRINT.search(text.replace("\r\n", "\n"))
    return match is None or match[1] != _fingerprint(text.replace("\r\n", "\n")[: match.start()])


def _fingerprint(text: str) -> str:
    return hashlib.sha256((text.rstrip() + "\n").encode()).hexdigest()


def check_metadata(card: str) -> None:
    """Raise ValueError for a card whose metadata the Hub would refuse, as far as that can be known here."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|\Z)", card, re.DOTALL)
    remedy = "correct the block between the two lines of --- at the top of README.md"
    if not match:
        raise ValueError(f"the card has no metadata; begin it with a block between two lines of ---, or {remedy}")
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise ValueError(f"the card's metadata is not YAML ({problem}); {remedy}") from None
    if not isinstance(data, dict):
        raise ValueError(f"the card's metadata is not a list of `name: value` lines; {remedy}")
    for name in ("license", "library_name", "pipeline_tag"):
        if name in data and not isinstance(data[name], str):
            raise ValueError(f"the card's metadata has {name}: {data[name]!r}, which must be one string; {remedy}")
    for name in ("tags", "datasets", "metrics"):
        value = data.get(name, [])
        if not (isinstance(value, str) and name != "tags") and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise ValueError(f"the card's metadata has {name}: {value!r}, which must be a list of strings; {remedy}")


def _metadata(source: CardSource) -> str:
    facts = source.facts
    dataset = facts.data
    task = architectures()[source.architecture].pipeline_tag
    known: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["swin", "swin_hf", "vision"],
    }
    if license := source.license or facts.base_model_license:
        known["license"] = license
    if dataset and dataset.is_hub_id:
        known["datasets"] = [dataset.name]
    # A checkpoint is a local file, even if its path looks like an id.
    if facts.base_model and HUB_ID.fullmatch(facts.base_model) and not facts.base_model.endswith(WEIGHT_SUFFIXES):
        known["base_model"] = facts.base_model
    if TIGER in (source.config.id2label or {}).values():
        known["widget"] = WIDGET
    if facts.metrics and dataset:
        known["metrics"] = sorted({HUB_METRICS[m.name] for m in facts.metrics if m.name in HUB_METRICS})
        known["model_name"] = source.repo_id.split("/")[-1]
        slug = re.sub(r"[^a-z0-9]+", "-", dataset.name.lower()).strip("-") or "local"
        known["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=dataset.name if dataset.is_hub_id else slug,
                dataset_name=dataset.name,
                dataset_config=dataset.config,
                dataset_split=metric.split,
                dataset_revision=dataset.fingerprint if dataset.is_hub_id else None,
                metric_type=HUB_METRICS.get(metric.name, metric.name),
                metric_name=TITLES.get(metric.name, metric.name),
                metric_value=round(metric.value, 6),
            )
            for metric in facts.metrics
        ]
    return str(ModelCardData(**known).to_yaml(line_break="\n")).strip()


def confidence_interval(metric: Metric) -> tuple[float, float] | None:
    """The 95 % interval that was recorded, or Wilson's of a proportion of ``n`` images; None for other metrics."""
    if metric.interval is not None and len(metric.interval) == 2:
        return metric.interval[0], metric.interval[1]
    if metric.name not in PROPORTIONS or not metric.n or not 0 <= metric.value <= 1:
        return None
    z, n, p = 1.959964, metric.n, metric.value
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def _worst_confusions(facts: TrainingFacts) -> list[tuple[str, str, int, float]]:
    """Truth, prediction, count and share of the truth's images, the most frequent first."""
    matrix = facts.confusion_matrix
    if matrix is None:
        return []
    pairs = [
        (matrix.labels[row], matrix.labels[column], matrix.counts[row][column], sum(matrix.counts[row]))
        for row, column in product(range(len(matrix.labels)), repeat=2)
        if row != column and matrix.counts[row][column]
    ]
    pairs.sort(key=lambda pair: (-pair[2], -pair[2] / pair[3], pair[0], pair[1]))
    return [(truth, guess, count, count / total) for truth, guess, count, total in pairs[:WORST_CONFUSIONS]]


def _log_table(facts: TrainingFacts) -> dict[str, Any]:
    """Validation curves as rows of at most 20 steps, the best one always among them."""
    names = sorted(name for name in facts.curves if name.startswith("val"))[:5]
    curves = {name: {int(step): value for step, value in facts.curves[name]} for name in names}
    steps = sorted({step for points in curves.values() for step in points})
    if len(steps) > LOG_ROWS:
        stride = (len(steps) - 1) / (LOG_ROWS - 1)
        kept = {steps[round(index * stride)] for index in range(LOG_ROWS)}
        kept |= {step for step in steps if step == facts.best_step}
        steps = sorted(kept)
    return {"columns": list(curves), "rows": [(step, [curves[name].get(step) for name in curves]) for step in steps]}


def _escaped(value: Any) -> str:
    """Text that Markdown, HTML and the formulas of the Hub leave as it is, on one line, also within a table."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")
    text = re.sub(r"([\\`*_|~\[\]])", r"\\\1", text)
    return re.sub(r"^(\d*)(?=[-+.)#]+( |$))", r"\1\\", text)  # else the start of a heading or of a list


def _code(value: Any) -> str:
    """Text for a code span: one line, no backtick, no table bar."""
    return one_line(value).replace("`", "'").replace("|", "¦")


def _fence(text: str) -> str:
    """Backticks around a code block: more of them than the text has anywhere in a row."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def amount(value: float) -> str:
    """A large number with three digits and the letter of its unit, such as 28.3 M."""
    unit, letter = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= pair[0]), (1, ""))
    return f"{value / unit:.3g} {letter}".strip()


def _number(value: Any) -> str:
    """A number with the digits that matter, anything else as code."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"`{_code(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value)}`"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(metric: Metric) -> str:
    return f"{metric.value:.4f}" if metric.name in QUANTITIES or abs(metric.value) > 1 else _percent(metric.value)


def _interval(metric: Metric) -> str:
    bounds = confidence_interval(metric)
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f} %" if bounds else ""


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


@cache
def template_environment() -> Environment:
    """The templates of this folder with the filters that they use; an unknown name in them is an error."""
    environment = Environment(
        loader=PackageLoader("swin_hf", "hub"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; labels and other foreign text go through `escaped` or `code`
    )
    environment.filters |= {
        "escaped": _escaped, "code": _code, "percent": _percent, "number": _number, "value": _value,
        "interval": _interval, "duration": _duration, "size": _size, "amount": amount, "as_dict": asdict,
        "title": lambda name: TITLES.get(name, name),
    }  # fmt: skip
    return environment
