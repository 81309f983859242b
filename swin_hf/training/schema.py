"""The JSON schema of a recipe's configuration: editors complete and check YAML with it.

jsonargparse describes a parser; the parser of a recipe would also describe every callback, logger, plugin and module
that is imported, which takes megabytes and fails on some of them. So classes are described by path and arguments.
"""

import json
from typing import Any, NotRequired, TypedDict

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from .arguments import add_run_options
from .module import SwinModule


class ClassSpec(TypedDict):
    """A class by its import path, with the arguments it is made with."""

    class_path: str
    init_args: NotRequired[dict[str, Any]]


# The options of the Trainer that take objects, and what a file may say for each.
OBJECTS: dict[str, Any] = {
    "accelerator": str | ClassSpec,
    "strategy": str | ClassSpec,
    "callbacks": list[str | ClassSpec] | str | ClassSpec | None,
    "logger": bool | list[str | ClassSpec] | str | ClassSpec | None,
    "plugins": list[str | ClassSpec] | str | ClassSpec | None,
    "profiler": str | ClassSpec | None,
}


def recipe_schema(module_class: type[SwinModule]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration file, whole or overlay, of a recipe that trains this module."""
    parser = ArgumentParser(description=f"Configuration of a recipe that trains {module_class.__name__}.")
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="Seed of every random generator.")
    add_run_options(parser)
    parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint to go on from; `last` is the run's newest.")
    parser.add_argument("--weights_only", type=bool | None, help="Refuse checkpoints that hold more than tensors.")
    parser.add_class_arguments(module_class, "model", skip=set(module_class.data_options), fail_untyped=False)
    parser.add_class_arguments(module_class.data_class, "data", fail_untyped=False)
    parser.add_class_arguments(Trainer, "trainer", skip=set(OBJECTS), fail_untyped=False)
    for name, kinds in OBJECTS.items():
        parser.add_argument(f"--trainer.{name}", type=kinds)
    schema: dict[str, Any] = json.loads(parser.get_completion_script("jsonschema"))
    for section in (schema, *schema["properties"].values()):
        section.pop("required", None)  # an overlay says only what it changes
    trainer = schema["properties"]["trainer"]["properties"]
    for name in ("callbacks", "logger", "plugins"):
        trainer[f"{name}+"] = trainer[name]  # appends to the list of the files before
    return schema
