"""What all tasks share: optimiser, schedule, random numbers per rank, checks of checkpoints."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, SumMetric

from swin_hf.loading import Origin
from swin_hf.memory import check_training

from .data.module import ImageDataModule
from .data.sampling import derive_seed
from .network import Network, load_network, new_network, resolve
from .optim import REFERENCE_BATCH, Optimization, fitting_warmup, lr_factor, parameter_groups
from .options import plain


@dataclass
class TestReport:
    """What a task adds to the logged metrics of a test."""

    table: str = ""  # text that is printed above the metrics
    metrics: dict[str, float] = field(default_factory=dict)  # more of them, for the facts
    facts: dict[str, Any] = field(default_factory=dict)  # fields of swin_hf.hub.facts.TrainingFacts
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of metrics, by the task's own rule
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)  # of the run folder: how each is drawn


class SwinModule(LightningModule):
    """Trains a network with AdamW as Microsoft does; each task is a subclass.

    A subclass sets :attr:`task`, :attr:`monitor` and :attr:`mode`, builds :attr:`model`, and writes ``training_step``
    and :meth:`evaluate`. Batches are ``{"pixel_values": (B, C, H, W)}``, normalised, with the ``labels`` of the task.

    Args:
        preset: Size of a new model, one of ``swin_hf.list_presets()``; ignored when ``weights`` are given.
        image_size: Side, or height and width, of the images in pixels; from the data when run by the command line.
        num_channels: Channels of the images; from the data when run by the command line.
        network: What is changed in the network of the preset or the weights.
        optimization: AdamW, its learning rate and the schedule.
        compile: Whether the network is compiled.
    """

    task: ClassVar[str]  # one of swin_hf.families.TASKS
    monitor: ClassVar[str] = "val_loss"  # metric that chooses the best checkpoint
    mode: ClassVar[str] = "min"  # or "max": which of its values is better
    data_class: ClassVar[type[ImageDataModule]] = ImageDataModule
    data_options: ClassVar[tuple[str, ...]] = ("image_size", "num_channels")  # options that come from the data
    default_config: ClassVar[str] = "digits"  # of the package, where neither a configuration nor data are given
    finetuning_config: ClassVar[str | None] = None  # the same where Python gives weights: swin_hf.training.train
    answer_columns: Sequence[str] = ()  # of predictions.csv after the path, see `answers`; none: no such file
    is_tested: ClassVar[bool] = True  # on the test split, with the best weights, at the end of the training

    model: Any  # the network, which knows nothing of Lightning: one of ours, another, or peft's wrapper
    frozen_parts: Sequence[nn.Module] = ()  # parts of it that are not trained and stay in evaluation mode
    has_new_head: bool = False  # whether training has to begin before the answers mean anything
    origin: Origin | None = None  # of the weights that it started from, for the record
    interrupted_loss: list[float] | None = None  # sum and weight of the epoch that a checkpoint interrupts

    def __init__(self, optimization: Optimization, compile: bool = False) -> None:
        super().__init__()
        self.optimization = optimization
        self.compile_model = compile
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_images, self.test_images = SumMetric(), SumMetric()  # what the metrics were measured on

    def build(
        self, preset: str, weights: str | None, network: Network, load: Callable[..., Any] = load_network, **fields: Any
    ) -> None:
        """Build :attr:`model`: a new one of a preset, or one that starts from weights, which ``load`` loads.

        ``fields`` of its configuration are set, those that are not None; ValueError if the weights do not fit.
        """
        fields = network.fields(**fields)
        if weights is None:
            self.model, self.has_new_head = new_network(self.task, preset, fields, network.backend), True
        else:
            self.origin = resolve(weights)
            self.model, self.has_new_head = load(self.task, self.origin.path, fields, network.backend)
        if network.gradient_checkpointing:
            # transformers renamed the method in 5.2x; the old name warns there, the new one is absent before.
            enable = (
                getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})  # the variant that works under DDP

    @classmethod
    def option_of_data(cls, name: str, data: Any, measured: Mapping[str, Any] | None) -> Any:
        """One of the :attr:`data_options`, from the data module.

        ``measured`` are the options of the model that ``validate`` or ``test`` measures; ``None`` in training.
        """
        if getattr(data, name) is None:
            data.load()  # finds it
        return getattr(data, name)

    def run_callbacks(self, folder: Path | None) -> list[Callback]:
        """Callbacks of every run of the task; the folder of the run is ``None`` where nothing is written."""
        return []

    def test_report(self) -> TestReport:
        """What a test found in addition to the logged metrics; called on rank 0 when it ends."""
        return TestReport()

    def answers(self, outputs: Any, labels: Tensor) -> list[tuple[Any, ...]]:
        """The :attr:`answer_columns` of each picture of a batch, from what ``test_step`` returned and its labels."""
        raise NotImplementedError(f"{type(self).__name__} has answer_columns; it has to say what they hold")

    def exportable(self) -> Any:
        """The network as ``save_pretrained`` should write it, with LoRA merged into its weights."""
        merged = hasattr(self.model, "merge_and_unload")
        return copy.deepcopy(self.model).merge_and_unload() if merged else self.model

    def log_training(self, loss: Tensor, images: int) -> None:
        """Log the loss of a training step, and add it to the mean of the epoch."""
        self.train_loss.update(loss.detach(), weight=images)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train_loss_step", loss.detach(), prog_bar=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str = "val") -> dict[str, Any]:
        """Evaluate a batch, and log the loss of its split and the collection ``<split>_metrics``, where there is one.

        A batch of unreadable pictures is empty. It is logged all the same: ranks meet in every metric that is logged.
        """
        outputs = self.evaluate(batch, split) if batch else {}
        shown: Any = {"on_step": False, "on_epoch": True, "prog_bar": True}
        self.log(f"{split}_loss", getattr(self, f"{split}_loss"), **shown)
        if hasattr(self, f"{split}_metrics"):
            self.log_dict(getattr(self, f"{split}_metrics"), **shown)
        return outputs

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Likewise."""
        return self.validation_step(batch, batch_idx, "test")

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Any]:
        """Add a batch, never an empty one, to the metrics of a split, ``val`` or ``test``.

        Returns:
            What the callbacks of the task look at.
        """
        raise NotImplementedError(f"{type(self).__name__} has to say what is measured")

    def setup(self, stage: str) -> None:
        """Prepare training; the model is compiled in place, so that the names in its state dict stay."""
        if stage == "fit":
            self.train()
            if self.compile_model:
                self.model.compile()

    def on_fit_start(self) -> None:
        """Refuse a batch that the memory of this machine cannot train: Linux would kill the process without a word."""
        data, device = self.datamodule, self.trainer.strategy.root_device
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if device.type != "cpu" or data is None or recomputes:
            return
        base = next(module for module in self.model.modules() if hasattr(module, "stages"))
        trained = [any(parameter.requires_grad for parameter in stage.parameters()) for stage in base.stages]
        size = 2 if "16" in str(self.trainer.precision) else 4
        check_training(data.batch_size * self.trainer.num_devices, data.image_size, base.config, trained, size)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every module but the frozen parts, which draw no stochastic depth."""
        super().train(mode)
        for part in self.frozen_parts:
            part.eval()
        return self

    def on_train_epoch_start(self) -> None:
        """Train in training mode: Lightning keeps the mode that it finds, and ``from_pretrained`` sets evaluation."""
        self.train()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the gradients of a window that the end of the epoch cut off: Lightning divides by the full window."""
        window = self.trainer.accumulate_grad_batches
        held = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % window
        if held:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(window / held)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the learning rate of the step, every ``trainer.log_every_n_steps``."""
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[-1]["lr"])

    def on_train_start(self) -> None:
        """Give this rank its own random numbers; the data module seeds each batch anew from there on."""
        seed = int(getattr(self.datamodule, "seed", 0) or 0)
        torch.manual_seed(derive_seed(seed, "rank", self.trainer.global_rank))
        if self.interrupted_loss is not None:
            # Where no batch of the epoch is left, nothing else would log it.
            self.train_loss.update(0.0, weight=0.0)
            if self.trainer.is_global_zero:
                self.train_loss.mean_value += self.interrupted_loss[0]
                self.train_loss.weight += self.interrupted_loss[1]
            self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
            self.interrupted_loss = None

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the images; a batch is empty where all of them were unreadable."""
        name = "test_images" if self.trainer.testing else "val_images"
        getattr(self, name).update(len(batch["pixel_values"]) if batch else 0)
        self.log(name, getattr(self, name), on_step=False, on_epoch=True, logger=False)

    on_test_batch_end = on_validation_batch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the options as plain values, and the mean loss of an epoch that is not complete, over all ranks."""
        if self.hparams:  # load_from_checkpoint of Lightning builds the groups of options with jsonargparse
            options = {"_instantiator": "lightning.pytorch.cli.instantiate_module"} | plain(dict(self.hparams))
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = options
        epoch = self.trainer.fit_loop.epoch_progress.current
        if epoch.processed < epoch.ready:
            state = torch.stack([self.train_loss.mean_value.detach(), self.train_loss.weight.detach()])
            checkpoint["train_loss"] = self.trainer.strategy.reduce(state.clone(), reduce_op="sum").tolist()

    @property
    def datamodule(self) -> Any:
        """The data module of the run, ``None`` without one."""
        return getattr(self.trainer, "datamodule", None)

    def planned_steps(self) -> tuple[int, int]:
        """Optimiser steps of one epoch and of the whole training, from lengths alone.

        ``trainer.estimated_stepping_batches`` would build the loader before a checkpoint is restored, and its position
        in the epoch would be lost.
        """
        trainer = self.trainer
        if hasattr(self.datamodule, "steps_per_epoch"):
            steps = self.datamodule.steps_per_epoch(trainer.world_size, trainer.accumulate_grad_batches)
        elif isinstance(trainer.limit_train_batches, int):
            steps = -(-trainer.limit_train_batches // trainer.accumulate_grad_batches)
        else:
            raise ValueError("an epoch has no length without an ImageDataModule; set trainer.limit_train_batches")
        steps = max(1, steps)
        totals = [total for total in (steps * (trainer.max_epochs or 0), trainer.max_steps) if total > 0]
        if not totals:
            raise ValueError("the end of the training is unknown; set trainer.max_epochs or trainer.max_steps")
        return steps, min(totals)

    def configure_optimizers(self) -> Any:
        """AdamW on the parameter groups, with the schedule stepped per optimiser step."""
        options, scale = self.optimization, 1.0
        if options.lr_scaling:
            batch = getattr(self.datamodule, "batch_size", None)
            if batch is None:
                raise ValueError(
                    "the batch size is unknown without an ImageDataModule; set optimization.lr_scaling to False"
                )
            scale = batch * self.trainer.world_size * self.trainer.accumulate_grad_batches / REFERENCE_BATCH
        peak = options.learning_rate * scale
        groups = parameter_groups(self.model, peak, options.weight_decay, options.layer_decay)
        # Under the GradScaler of 16-mixed, a fused step unscales the gradients itself: too late for clipping.
        fused = self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=options.betas, fused=fused)
        per_epoch, total = self.planned_steps()
        asked = round(options.warmup_epochs * per_epoch) if options.warmup_steps is None else options.warmup_steps
        warmup = fitting_warmup(asked, total)
        factor = partial(
            lr_factor,
            schedule=options.schedule,
            total=total,
            warmup=warmup,
            warmup_floor=options.warmup_lr * scale / peak if peak else 0.0,
            floor=options.min_lr * scale / peak if peak else 0.0,
            milestones=[epoch * per_epoch for epoch in options.milestones or ()],
            gamma=options.gamma,
        )
        images = f"{scale * REFERENCE_BATCH:g} images / {REFERENCE_BATCH}"
        origin = f" = {options.learning_rate:g} x {images}" if options.lr_scaling else ""
        rank_zero_info(
            f"learning rate {peak:.4g}{origin}; {total} steps ({per_epoch} an epoch), {warmup} of them warm-up, "
            f"then {options.schedule}; weight decay {options.weight_decay:g} on matrices only"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; Lightning would refuse a fused optimiser in bf16-mixed too, where gradients are not scaled at all."""
        if self.trainer.precision != "bf16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
            clip(self.parameters(), gradient_clip_val)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, by names and shapes, before anything is loaded."""
        self.interrupted_loss = checkpoint.get("train_loss")
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if ours != theirs:
            different = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
            some = [f"{n}: {theirs.get(n, 'absent')} there, {ours.get(n, 'absent')} here" for n in different[:3]]
            raise ValueError(
                f"the checkpoint belongs to another model, {len(different)} of {len(ours)} tensors differ "
                f"({'; '.join(some)}); use the configuration of its run (config.yaml in its folder)"
            )
