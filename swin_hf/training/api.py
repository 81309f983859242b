"""Train from Python: what the command ``swin-hf train`` does, as one function."""

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch.utilities.exceptions import SIGTERMException

from swin_hf.families import TASKS
from swin_hf.hub.facts import TrainingFacts

from .command import RecipeCLI, quieten
from .module import SwinModule
from .options import dotted, plain
from .tasks import MODULES


@dataclass(frozen=True)
class Run:
    """The result of a training."""

    task: str
    folder: Path  # the run folder; model/ in it has the best weights
    metrics: dict[str, float]  # measured on the best weights, such as val_accuracy and test_accuracy

    @cached_property
    def model(self) -> Any:
        """The network with the best weights, in evaluation mode."""
        auto_class = getattr(transformers, TASKS[MODULES[self.task].task].auto_class)
        return auto_class.from_pretrained(self.folder / "model").eval()


def train(
    data: Any = None,
    task: str = "image-classification",
    config: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Run:
    """Train a model as ``swin-hf train`` does, with the same options and the same run folder.

    ``train("photos", weights="microsoft/swin-tiny-patch4-window7-224", batch_size=16, trainer={"max_epochs": 5})``

    Args:
        data: Folder, Hub id or format of the pictures (``--data.dataset``), or a data module; that of the
            configuration if not given.
        task: One of ``swin_hf.training.MODULES``.
        config: Name of a configuration of the package, or a YAML file.
        **options: Options of the command by their last name (``batch_size``, ``weights``, ``runs``), and groups of them
            as a dictionary or an object (``optimization={"learning_rate": 1e-3}``, ``mixing=Mixing()``): a dictionary
            changes what it names, an object sets the whole group.

    Raises:
        ValueError: If an option is wrong, or there is no such task.
    """
    if task not in MODULES:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(MODULES)}")
    module_class = MODULES[task]
    if config is None and options.get("weights") is not None:
        config = module_class.finetuning_config
    words = ["fit", *([] if config is None else ["--config", str(config)])]
    words += [f"--{name}={text}" for name, text in words_of(module_class, data, options)]
    program = ["swin-hf", "train", *([] if task == "image-classification" else ["--task", task])]
    quieten()
    try:
        run = RecipeCLI(module_class, module_class.default_config, words, program)
    except SIGTERMException:
        raise
    except SystemExit as end:
        raise ValueError(str(end.__cause__ or end.code).removeprefix("error: ")) from None
    if run.run_folder is None or not (run.run_folder / "model").is_dir():
        raise ValueError("nothing was trained, so there is no model; leave fast_dev_run out")
    facts = TrainingFacts.load(run.run_folder / "model")
    metrics = {f"{metric.split.replace('validation', 'val')}_{metric.name}": metric.value for metric in facts.metrics}
    return Run(task, run.run_folder, metrics)


def words_of(module_class: type[SwinModule], data: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the command line for the arguments of :func:`train`."""
    sections = {
        "data": list(inspect.signature(module_class.data_class).parameters),
        "model": list(inspect.signature(module_class).parameters),
    }
    if isinstance(data, module_class.data_class):
        options = {name: getattr(data, name) for name in sections["data"]} | dict(options)
    elif isinstance(data, str | os.PathLike):
        options = {"dataset": os.fspath(data), "data_dir": None} | dict(options)
    elif data is not None:
        wanted = module_class.data_class.__name__
        raise ValueError(f"data is a {type(data).__name__}; give a folder, a Hub id or a {wanted}")
    for name, value in options.items():
        section = next((f"{section}." for section, names in sections.items() if name in names), "")
        for inner, item in dotted({name: plain(value)}).items():
            yield section + inner, item if isinstance(item, str) else json.dumps(item)
