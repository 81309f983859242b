"""The arguments of a training command: the configurations that they name or imply, and errors of one line."""

import argparse
import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from swin_hf.ranges import check_range

from .bundled import find_config
from .options import renamed
from .run_folder import run_of

# Numbers of Lightning's Trainer and what they may be; -1 is its word for "all" or "no limit" where it is in UNLIMITED.
TRAINER_RANGES = {
    "[1, inf)": "max_epochs max_steps devices num_nodes check_val_every_n_epoch log_every_n_steps "
    "accumulate_grad_batches",
    "[0, inf)": "min_epochs min_steps limit_train_batches limit_val_batches limit_test_batches limit_predict_batches "
    "overfit_batches num_sanity_val_steps gradient_clip_val fast_dev_run reload_dataloaders_every_n_epochs",
    "(0, inf)": "val_check_interval",
}
UNLIMITED = {"max_epochs", "max_steps", "devices", "num_sanity_val_steps"}

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_LONGEST_ERROR = 400  # characters


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, not a page of usage; that of an unknown option names the nearest."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and leave with exit code 2."""
        message = " ".join(message.split())
        if unknown := re.search(r"unrecognized arguments: ([^\s=]+)", message):
            message = f"there is no option {unknown[1]}{_nearest(unknown[1], self)}; --help lists them"
        if wrong := re.fullmatch(r'Parser key "([\w.]+)": (.*Expected .*(?:Got|Given) value: (.*))', message):
            kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing.Literal(\[.*?\]))", wrong[2])
            wanted = " or ".join(dict.fromkeys(_KINDS.get(kind, kind) or choices for kind, choices in kinds))
            message = f"--{wrong[1]} is {wrong[3]}; it must be {wanted}" if kinds else message
        message = message[:_LONGEST_ERROR]
        print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the message
        raise SystemExit(2) from ValueError(message)


def _nearest(unknown: str, parser: argparse.ArgumentParser) -> str:
    """The options with the most similar names, to append to a message."""
    inner = [part for action in parser._actions for part in (getattr(action, "_name_parser_map", None) or {}).values()]
    options = [option for part in (parser, *inner) for action in part._actions for option in action.option_strings]
    words = {f"--{option.rpartition('.')[2]}": option for option in options if "." in option}
    words |= {option: option for option in options}
    near = get_close_matches(unknown.replace("-", "_").replace("__", "--", 1), words)
    return f", the nearest are {' and '.join(dict.fromkeys(words[word] for word in near))}" if near else ""


def add_run_options(parser: ArgumentParser) -> None:
    """The options of a run that are neither of the model, nor of the data, nor of Lightning."""
    parser.add_argument("--name", type=str, default="run", help="Name of the run: it lives in runs/<name>.")
    parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--push", type=str | None, default=None, help="Hub id to publish the best weights at.")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers that Lightning would refuse later or less clearly."""
    if not isinstance(options.get("seed_everything"), bool):
        check_range("seed_everything", options.get("seed_everything"), "[0, 4294967295]")
    trainer = options.get("trainer") or {}
    for interval, names in TRAINER_RANGES.items():
        for name in names.split():
            value = trainer.get(name)
            if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
                value = int(value)
            if isinstance(value, int | float) and not (value == -1 and name in UNLIMITED):
                check_range(f"trainer.{name}", value, interval)


def with_verb(words: list[str]) -> list[str]:
    """The words with ``fit`` in front where they begin with an option of it."""
    is_option = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--print_schema"))
    return ["fit", *words] if is_option else words


def with_configs(words: Sequence[str], default: str | Path) -> list[str]:
    """The words after the verb, with every configuration as ``--config=FILE``; ValueError if there is no such file.

    Where they name neither a configuration nor a data set, that of the checkpoint's run is taken, or else the default.
    """
    joined: list[str] = []
    for word in words:
        is_value = bool(joined) and joined[-1] in ("-c", "--config", "--ckpt_path")
        joined.append(f"{joined.pop()}={word}" if is_value else word)
    pairs = [word.partition("=") for word in joined]
    values = {name: value for name, _, value in pairs}
    if not values.keys() & {"-c", "--config", "--data.dataset", "--help", "-h"}:
        checkpoint = values.get("--ckpt_path", "last")
        run = None if checkpoint == "last" else run_of(Path(checkpoint))
        pairs.insert(0, ("--config", "=", str(default if run is None else run / "config.yaml")))
    return [
        f"--config={find_config(value)}" if equals and name in ("-c", "--config") else f"{name}{equals}{value}"
        for name, equals, value in pairs
    ]


def refuse_names(words: Sequence[str], linked: Sequence[str]) -> None:
    """Refuse the option names of earlier releases in the words of :func:`with_configs`: ValueError gives the new ones.

    Options of the model that the data decide (``linked``) end the process when they are in a configuration file: the
    parser would drop them without a word.
    """
    given = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    found = [f"--{old} is now --{new}" for old, new in renamed(given).items()]
    decided = []
    for path in (word.removeprefix("--config=") for word in words if word.startswith("--config=")):
        values: Any = None
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # the parser says what is wrong
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for section, options in values.items() if isinstance(values, dict) else ():
            if isinstance(options, dict):
                found += [f"{path}: {section}.{old} is now {new}" for old, new in renamed(options, section).items()]
                told = sorted(set(linked) & options.keys()) if section == "model" else []
                decided += [f"{path} sets {', '.join(f'model.{name}' for name in told)}"] if told else []
    if found:
        raise ValueError("; ".join(found))
    if decided:
        sys.exit(f"error: {decided[0]}; the data decide this: remove it")
