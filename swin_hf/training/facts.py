"""The facts of a run for its record: options, versions, hardware; without secrets."""

import importlib.metadata
import inspect
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from swin_hf.files import redact, redact_command

from .checkpointing import EMA
from .options import flat, plain

LIBRARIES = ("torch", "torchvision", "transformers", "lightning", "datasets", "torchmetrics", "safetensors")


def hyper_parameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Flat names and JSON values of what the result depends on."""
    data = trainer.datamodule
    options = {name: value for name, value in pl_module.hparams.items() if name not in ("id2label", "num_labels")}
    values = {name: value for name, value in flat(plain(options)).items() if not name.startswith("_")}
    values |= {name: plain(getattr(data, name)) for name in ("batch_size", "image_size", "mean", "std")}
    values |= {"interpolation": data.pixels.interpolation, **data.augmentation.facts()}
    of_trainer = ("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision")
    values |= {name: getattr(trainer, name) for name in of_trainer}
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            values["ema_decay"] = callback.decay
    return {name: redact(value) for name, value in sorted(values.items()) if value not in (None, {}, [])}


def default_settings(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Names of the hyper-parameters that have the default value of their option."""
    defaults: dict[str, Any] = {}
    for owner in (trainer, trainer.datamodule, pl_module):  # of a name that two have, the model's
        parameters = inspect.signature(type(owner)).parameters.values()
        defaults |= flat(plain({p.name: p.default for p in parameters if p.default is not p.empty}))
    values = hyper_parameters(trainer, pl_module)
    return [name for name, value in values.items() if name in defaults and plain(value) == defaults[name]]


def command_line(argv: list[str]) -> str:
    """A command (``swin-hf`` or a script, then the words after it) without absolute paths and without secrets."""
    script = Path(argv[0])
    if script.suffix != ".py":
        return shlex.join([script.name, *redact_command(argv[1:])])
    if script.is_absolute():
        script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else Path(script.name)
    return shlex.join(["python", script.as_posix(), *redact_command(argv[1:])])


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    import swin_hf

    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"swin_hf": swin_hf.__version__, "python": platform.python_version()} | libraries


def hardware(trainer: Trainer) -> dict[str, Any]:
    """Device, number of devices, threads and precision."""
    device = trainer.strategy.root_device
    facts: dict[str, Any] = {"devices": trainer.world_size, "precision": trainer.precision}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    else:
        facts["device"] = f"{device.type.upper()} ({platform.machine()})"
        facts["threads"] = torch.get_num_threads()
    return facts
