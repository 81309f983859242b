"""``swin-hf train`` and ``swin-hf pretrain``: LightningCLI with the run folder, the guards and the exit codes.

A run has its folder ``runs/<name>/``, or ``runs/<name>-v2/`` and so on, so that nothing is overwritten. ``--ckpt_path
last`` goes on in the newest of them, or starts the first one: one command serves the start, a requeue and a resume.
"""

import contextlib
import json
import logging
import pickle
import re
import shlex
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from swin_hf.files import WriteError, full_disk, remove_leftovers, replacing
from swin_hf.hub.publish import check_access
from swin_hf.hub.remote import HubError
from swin_hf.memory import keep_freed_memory, memory_sentence
from swin_hf.processing import UnreadablePictureError

from .arguments import OneLineParser, add_run_options, check_numbers, refuse_names, with_configs, with_verb
from .callbacks import EpochReport, TrainingBar
from .checkpointing import BestCheckpoint, LastCheckpoint, NonFiniteGuard, NonFiniteLossError, best_checkpoint
from .data.module import MEASURED
from .data.sampling import check_launch
from .facts import command_line
from .loggers import AppendingCSVLogger, WholeTensorBoardLogger
from .module import SwinModule
from .network import resolve
from .options import dotted, plain
from .predictions import Predictions
from .record import RunRecord
from .run_folder import LAST, folder_of_test, last_run, new_run_folder, starts_first
from .schema import recipe_schema
from .tasks.distillation import processor_normalization

EXIT_SIGTERM = 128 + 15  # what a shell reports for a process that SIGTERM ended; schedulers requeue on it
EXIT_SIGINT = 128 + 2

# Model options that may differ from those of a checkpoint, because they do not change what is trained.
FREE_ON_RESUME = {"network.compile", "network.gradient_checkpointing", "network.attn_implementation"}
FREE_ON_RESUME |= {"head.window", "head.stride", "head.flip"}


# By the name of its class, what would undo what a run has planned, and what to give in its place.
UNFIT = {
    "StochasticWeightAveraging": "its average is never validated, so model/ would lack it; use swin_hf.training.EMA",
    "LearningRateFinder": "the parameter groups have rates of their own; set --model.optimization.learning_rate",
    "BatchSizeFinder": "rates and steps are planned for one batch size; set --data.batch_size",
    "GradientAccumulationScheduler": "steps are planned for one window; set --trainer.accumulate_grad_batches",
    "_MultiProcessingLauncher": "what the processes of ddp_spawn, ddp_fork and ddp_notebook do is lost when they end; "
    "use --trainer.strategy ddp, outside of a notebook, or --trainer.devices 1",
}


class WholeConfig(SaveConfigCallback):
    """Writes ``config.yaml`` of the run whole or not at all."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, on rank 0."""
        with replacing(Path(trainer.default_root_dir, self.config_filename)) as partial:
            partial.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")


class RecipeCLI(LightningCLI):
    """``fit`` (the default), ``validate`` and ``test`` of one task on its data module.

    Args:
        module_class: The task.
        default_config: Configuration used when neither ``--config`` nor ``--data.dataset`` is given: a name of the
            package's or a file.
        args: Arguments instead of those of the process.
        program: The words before the arguments, for the record of the run and the command that resumes it.
    """

    def __init__(
        self,
        module_class: type[SwinModule],
        default_config: str | Path,
        args: Sequence[str] | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        self.module_class = module_class
        self.default_config = default_config
        self.words = list(sys.argv[1:] if args is None else args)
        self.program = list(program or sys.argv[:1])
        self.run_folder: Path | None = None
        self.is_new = False  # whether the run folder was made for this run
        self.new_parents: list[Path] = []  # folders above it that were made with it, the deepest first
        self.saved: dict[str, Any] = {}  # the hyper-parameters of the checkpoint, where there is one
        self.record = RunRecord()
        try:
            super().__init__(  # parses, builds and runs
                module_class,
                module_class.data_class,
                args=with_verb(self.words),
                seed_everything_default=0,
                auto_configure_optimizers=False,  # it would decay biases and norms, and step the schedule per epoch
                save_config_callback=WholeConfig,
                save_config_kwargs={"save_to_log_dir": False},
                parser_class=OneLineParser,
                parser_kwargs={"prog": " ".join(self.program)},
                trainer_defaults={
                    "max_epochs": 30,
                    "gradient_clip_val": 5.0,
                    "use_distributed_sampler": False,  # the data module shards exactly; Lightning's sampler pads
                    "enable_model_summary": False,
                },
            )
        except BaseException as error:
            self.leave_in_order(error)
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into the exit code 1
                raise KeyboardInterrupt from None
            if not isinstance(error, SystemExit) and (full := full_disk(error, self.run_folder or Path.cwd())):
                raise full from error
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's verbs without ``predict``, which is ``swin-hf predict``."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declare the options of a run, and link the model options that the data decide."""
        add_run_options(parser)
        for action in parser._actions:  # typing may hand out float | int, of another library, which makes 1 batch 1.0
            if getattr(action, "_typehint", None) == (int | float | None):
                action._typehint = int | float | None
        for name in self.module_class.data_options:
            rule: Any = partial(self.option_of_data, name)
            rule.__name__ = "decided_by"  # the help says: decided_by(data) --> model.image_size
            parser.link_arguments("data", f"model.{name}", rule, apply_on="instantiate")

    def option_of_data(self, name: str, data: Any) -> Any:
        """A model option that the data decide, unless a checkpoint or the weights that are measured do."""
        measured = None if self.config.subcommand == "fit" else self.saved or plain(self.options.model.as_dict())
        return self.module_class.option_of_data(name, data, measured)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; without a configuration, take that of the checkpoint's run, or the default."""
        parser.add_argument("--print_schema", action="store_true", help="Print the JSON schema of YAML files.")
        if "--print_schema" in args:
            print(json.dumps(recipe_schema(self.module_class), indent=1))  # noqa: T201 - the result
            raise SystemExit(0)
        try:
            if args[0] in self.subcommands():
                args = [args[0], *with_configs(args[1:], self.default_config)]
                refuse_names(args, self.module_class.data_options)
            self.config = parser.parse_args(args)
            check_numbers(self.config.get(self.config.get("subcommand")) or {})
        except ValueError as error:
            parser.error(str(error))

    def _parse_ckpt_path(self) -> None:
        # Lightning's own lets the hyper-parameters of a checkpoint override the command line without a word.
        self.options = self.config[self.config.subcommand]
        path = self.choose_run_folder() if self.config.subcommand == "fit" else self.options.ckpt_path
        if path == "last":  # Lightning would test random weights where it finds none
            runs, name = Path(self.options.runs), self.options.name
            self.options.ckpt_path = path = str((last_run(runs, name) or runs / name) / LAST)
        if path is None:
            return
        if not Path(path).is_file():
            sys.exit(f"error: there is no checkpoint {path}; give a file, or 'last' for the newest of the run")
        checkpoint = read_checkpoint(Path(path))
        given = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.config.subcommand]["model"]
        self.saved = checkpoint.get("hyper_parameters", {})
        self.keep_pixels(checkpoint.get(self.module_class.data_class.__qualname__, {}))
        refuse_conflicts(given, self.saved, str(path))

    def keep_pixels(self, found: dict[str, Any]) -> None:
        """Let a model that is measured see other data as it saw those of its training, where the options leave it."""
        if self.config.subcommand == "fit":
            return
        data, pixels = self.options.data, self.options.data.pixels
        for name in MEASURED:
            if pixels[name] in (None, "dataset"):
                pixels[name] = found.get(name, pixels[name])
        data.num_channels = data.num_channels or len(found.get("mean", ())) or None

    def choose_run_folder(self) -> str | None:
        """Make the folder of a new run, or take that of the run to resume; return the checkpoint to continue from."""
        runs, name, path = Path(self.options.runs), self.options.name, self.options.ckpt_path
        if self.options.push is not None and starts_first():
            check_access(self.options.push)
        if path == "last":
            self.run_folder = last_run(runs, name)
            if self.run_folder is not None:
                if starts_first():
                    remove_leftovers(self.run_folder)
                return str(self.run_folder / LAST)
            self.options.ckpt_path = path = None
            if starts_first():
                print(f"no run {name} in {runs} has a checkpoint to resume from: it starts anew", flush=True)  # noqa: T201
        if not self.options.trainer.fast_dev_run:
            self.new_parents = [folder for folder in (runs, *runs.parents) if not folder.exists()]
            self.run_folder, self.is_new = new_run_folder(runs, name), True
        return None if path is None else str(path)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; an error of the input becomes one line."""
        try:
            if self.options.ckpt_path is None and (weights := self.options.model.get("weights")) is not None:
                self.keep_pixels(
                    dict(zip(MEASURED, processor_normalization(resolve(weights).path) or (), strict=False))
                )
            super().instantiate_classes()
            check_launch(self.trainer)
            refuse_unfit(self.trainer)
            if self.config.subcommand != "fit" and self.options.ckpt_path is None and self.model.has_new_head:
                raise ValueError(
                    f"nothing was trained that could be measured: {self.options.model.get('weights') or 'a new model'} "
                    "has no head for this task and these classes; give --ckpt_path of a run, or --model.weights of a "
                    "model that has one"
                )
        except (ValueError, TypeError, OSError, ImportError, MisconfigurationException) as error:
            if full_disk(error):
                raise
            sys.exit(f"error: {_reason(error)}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logs of the run folder and the callbacks that no configuration can drop."""
        trainer, given = self.options.trainer, self._get(self.config_init, "trainer")
        folder = None if trainer.fast_dev_run else self.run_folder
        loggers = [] if isinstance(given.logger, bool) else listed(given.logger)
        if folder is not None:
            kwargs["default_root_dir"] = str(folder)
            table = AppendingCSVLogger(str(folder), name="", version="")
            board = WholeTensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False)
            kwargs["logger"] = False if given.logger is False else [table, board, *loggers]
        else:
            kwargs["logger"] = loggers or False
            self.save_config_callback = None  # without a run folder it would write into the working directory
        chosen = listed(given.callbacks)
        if trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in chosen):
            kwargs["enable_progress_bar"] = sys.stdout.isatty()
            chosen += [TrainingBar()] if sys.stdout.isatty() else []
        kwargs["callbacks"] = [*self.own_callbacks(folder), *chosen]  # checkpoints: the Trainer puts them last
        return super().instantiate_trainer(**kwargs)

    def own_callbacks(self, folder: Path | None) -> list[Any]:
        """The callbacks of every run, in the order in which they have to be called."""
        self.record = RunRecord(folder, command=command_line([*self.program, *self.words]))
        starts = (self.options.ckpt_path, self.options.model.get("weights"))
        tested = partial(folder_of_test, Path(self.options.runs), self.options.name, *starts)
        callbacks = [NonFiniteGuard(), EpochReport(), self.record, *self.model.run_callbacks(folder)]
        callbacks.append(Predictions(folder or tested))
        if folder is not None and self.options.trainer.enable_checkpointing is not False:
            checkpoints = str((folder / "checkpoints").absolute())
            callbacks.append(BestCheckpoint(checkpoints, self.model.monitor, self.model.mode))
            callbacks.append(LastCheckpoint(checkpoints))
        return callbacks

    def before_fit(self) -> None:
        """Give the configuration to the loggers, except the CSV log, which has ``config.yaml`` in its folder."""
        values = yaml.safe_load(self.parser.dump(self.config, skip_none=True))[self.subcommand]
        for logger in self.trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({name: values[name] for name in ("model", "data") if name in values})

    def after_fit(self) -> None:
        """Test the best weights, and publish them if asked."""
        if self.trainer.fast_dev_run:
            return
        if self.is_new and not self.record.trained:
            self.drop_untrained()
            why = "max_time or limit_train_batches leaves no step to take"
            if self.options.ckpt_path is not None:
                why = f"{self.options.ckpt_path} has reached the end of its training already"
                why += "; give a higher --trainer.max_epochs to go on"
            print(f"nothing was trained: {why}")  # noqa: T201 - what happened
            return
        best = best_checkpoint(self.trainer)
        if self.model.is_tested and self.datamodule.has("test"):
            path = getattr(best, "best_model_path", None) or None
            self.trainer.test(self.model, self.datamodule, ckpt_path=path, verbose=False, weights_only=True)
        if self.run_folder is not None and self.trainer.is_global_zero:
            if best is not None and best.best_model_score is not None:
                print(f"best {best.monitor} {float(best.best_model_score):.4f}")  # noqa: T201 - the result
            print(f"best weights: {self.run_folder / 'model'}", flush=True)  # noqa: T201 - the result
        if self.options.push is not None:
            self.push()

    def drop_untrained(self) -> None:
        """Remove the folders that were made for a run in which no step was taken."""
        if self.is_new and self.run_folder is not None and starts_first():
            shutil.rmtree(self.run_folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run has begun in it
                for folder in self.new_parents:
                    folder.rmdir()

    def leave_in_order(self, error: BaseException) -> None:
        """Write the best weights so far and print the command that resumes; remove a run without a step."""
        if self.run_folder is None or not starts_first():
            return
        if not self.record.trained:
            self.drop_untrained()
            return
        try:
            best = best_checkpoint(self.trainer)
            if self.record.started is not None and best is not None and best.best_model_path:
                self.record.write_model(self.trainer, self.model)  # of the training, not of the test after it
        except OSError as failure:
            warnings.warn(f"the best weights so far are in checkpoints/best.ckpt only: {failure}", stacklevel=2)
        if (self.run_folder / LAST).is_file() and not isinstance(error, NonFiniteLossError):
            program = ["python", *self.program] if self.program[0].endswith(".py") else self.program
            config, name = str(self.run_folder / "config.yaml"), self.run_folder.name
            words = [*program, "fit", "--config", config, "--name", name, "--ckpt_path", "last"]
            print(f"resume with: {shlex.join(words)}", flush=True)  # noqa: T201 - the remedy

    @rank_zero_only
    def push(self) -> None:
        """Publish the run; the message of a failure has the command that tries again."""
        from swin_hf import push

        try:
            result = push(str(self.run_folder), self.options.push)
        except Exception as error:
            sys.exit(
                f"error: the training is complete but it could not be published: {error}\n"
                f"try again with: {shlex.join(['swin-hf', 'push', str(self.run_folder), self.options.push])}"
            )
        print(f"published: {result.url}")  # noqa: T201 - the result


def refuse_unfit(trainer: Trainer) -> None:
    """Raise ValueError for a callback or a launcher that would undo what the run has planned."""
    for part in (*trainer.callbacks, trainer.strategy.launcher):
        for name in {kind.__name__ for kind in type(part).__mro__} & UNFIT.keys():
            raise ValueError(f"{name.strip('_')} does not fit a run: {UNFIT[name]}")


def _reason(error: Exception) -> str:
    """The error of a class that the parser could not build, without the parser's words around it."""
    if computed := re.match(r"Call to compute_fn .*?\) failed: (.*)", str(error), re.DOTALL):
        return computed[1]
    built = re.search(r"Problem with given class_path '([\w.]+)':\s*(.+)", str(error))
    return f"{built[1]}: {built[2]}" if built else str(error)


def listed(value: Any) -> list[Any]:
    """An option as a list: it may be a list, one value or None."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a training run; exit with an error if the file is something else or incomplete."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        checkpoint = str(error).splitlines()[0]
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "loops" not in checkpoint:
        reason = f" ({checkpoint})" if isinstance(checkpoint, str) else ""
        sys.exit(
            f"error: {path} is not a whole checkpoint of a training run{reason}; resume from another, such as "
            "best.ckpt in its folder, or start anew from weights: --model.weights PATH"
        )
    return checkpoint


def refuse_conflicts(given: dict[str, Any], saved: dict[str, Any], path: str) -> None:
    """Exit with an error if model options of this command differ from those of a checkpoint."""
    remedy = "start a new run from its weights: --model.weights runs/<name>/model"
    if "optimization" in given and "optimization" not in saved and saved:
        sys.exit(f"error: {path} was written by an earlier release, whose options had other names; {remedy}")
    then = dotted(saved)
    conflicts = [
        f"  --model.{name}: {then[name]!r} in the checkpoint, {value!r} now"
        for name, value in dotted(given).items()
        if name in then and name not in FREE_ON_RESUME and then[name] != value
    ]
    if conflicts:
        sys.exit(
            f"error: the options differ from those of {path}:\n" + "\n".join(conflicts) + "\n"
            f"give the options of its run (--config of the config.yaml in its folder), or {remedy}"
        )


def quieten() -> None:
    """Keep Lightning's advertisements, known warnings and the progress bar of saving out of the output."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
    disable_progress_bar()
    for message in (
        ".*LeafSpec",  # Lightning 2.6.6 calls torch 2.15 by an old name
        "Checkpoint directory .* exists and is not empty",  # going on in the run's own folder is what `last` means
        ".*there is no last checkpoint available",  # then it is the first start
        "Be aware that when using `ckpt_path`",  # a test needs no callback that saves checkpoints
        "Glyph .* missing from",  # letters that the font of a figure lacks are boxes in it
        "The number of training batches .* is smaller than the logging interval",  # the epochs are logged anyway
        "Found .* module.s. in eval mode at the start of training",  # frozen parts, and nothing else: SwinModule.train
    ):
        warnings.filterwarnings("ignore", message)


def run_recipe(
    module_class: type[SwinModule],
    default_config: str | Path,
    args: Sequence[str] | None = None,
    program: Sequence[str] | None = None,
) -> int:
    """Train, validate or test as a command line says; the arguments are those of :class:`RecipeCLI`.

    Returns:
        The exit code: 0 done, 143 stopped by SIGTERM with its state saved, 130 by Ctrl-C, 1 an error.
    """
    quieten()
    keep_freed_memory()
    show = threading.excepthook  # TensorBoard's thread fails before the run hears of it at the next event
    threading.excepthook = lambda failure: None if full_disk(failure.exc_value) else show(failure)
    try:
        RecipeCLI(module_class, default_config, args, program)
    except SIGTERMException:
        return EXIT_SIGTERM
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201 - the message
        return 1
    finally:
        threading.excepthook = show
    return 0


def _sentence(error: Exception) -> str | None:
    """The message of an error that a user understands without its traceback; None for others."""
    innermost = Path([frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1].f_code.co_filename)
    of_options = isinstance(error, ValueError | RuntimeError | MisconfigurationException)
    if of_options and innermost.is_relative_to(Path(lightning.pytorch.__file__).parent):  # its words for the user
        return " ".join(str(error).split())
    if type(error) is ValueError or isinstance(error, ImportError):  # of this package, not of a library
        return str(error) if innermost.is_relative_to(Path(__file__).parents[1]) else None
    if isinstance(error, ValueError | NonFiniteLossError | UnreadablePictureError | WriteError | HubError):
        return str(error)
    return memory_sentence(error) if isinstance(error, RuntimeError | MemoryError) else None
