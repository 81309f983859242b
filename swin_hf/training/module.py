"""What both LightningModules share: optimiser, schedule, random numbers per rank, checks of checkpoints."""

# mypy: disable-error-code="attr-defined"
# Lightning sets attributes of its Trainer dynamically and re-exports names without saying so.

from collections.abc import Sequence
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, SumMetric

from swin_hf.loading import local_path, split_hub_id
from swin_hf.model.modeling_swin_hf import SwinHFModel
from swin_hf.ranges import check_range

from .optim import Schedule, build_schedule, fitting_warmup, parameter_groups, scaled_learning_rate
from .sampling import seed_rank


class SwinModule(LightningModule):
    """Trains a Swin model of transformers with AdamW as Microsoft does; subclasses say with which loss.

    Attributes:
        model: The network; it knows nothing of Lightning.
        resting: Frozen parts of it, which stay in evaluation mode.
        monitor: Metric that chooses the best checkpoint.
        mode: ``max`` or ``min``, what is better.
        starting_point: Checkpoint that the weights started from, for the record; ``None`` for random weights.
        starting_commit: Its commit, when it came from the Hub.
    """

    model: Any  # an nn.Module; one class of ours or another, or peft's wrapper
    resting: Sequence[nn.Module] = ()
    monitor: str
    mode: str
    starting_point: str | None
    starting_commit: str | None = None
    train_loss: MeanMetric
    interrupted_loss: list[float] | None = None  # sum and weight of the epoch that a checkpoint interrupts

    def configure_training(
        self,
        *,
        learning_rate: float,
        lr_scaling: bool,
        weight_decay: float,
        betas: tuple[float, float],
        layer_decay: float,
        schedule: Schedule,
        warmup_epochs: float,
        warmup_steps: int | None,
        warmup_lr: float,
        min_lr: float,
        milestones: list[int],
        gamma: float,
        compile: bool,
    ) -> None:
        """Keep what :meth:`configure_optimizers` needs; see the arguments of the subclasses."""
        for name, value in (
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("warmup_epochs", warmup_epochs),
            ("warmup_steps", warmup_steps),
            ("warmup_lr", warmup_lr),
            ("min_lr", min_lr),
            ("milestones", milestones),
        ):
            check_range(name, value, "[0, inf)")
        check_range("betas", betas, "[0, 1)")
        check_range("layer_decay", layer_decay, "(0, 1]")
        check_range("gamma", gamma, "(0, inf)")
        self.learning_rate = learning_rate
        self.lr_scaling = lr_scaling
        self.weight_decay = weight_decay
        self.betas = betas
        self.layer_decay = layer_decay
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.warmup_steps = warmup_steps
        self.warmup_lr = warmup_lr
        self.min_lr = min_lr
        self.milestones = milestones
        self.gamma = gamma
        self.compile_model = compile
        self.val_images, self.test_images = SumMetric(), SumMetric()  # what the metrics were measured on

    def setup(self, stage: str) -> None:
        """Prepare training; the model is compiled in place, so that the names in its state dict stay."""
        if stage == "fit":
            self.train()
            if self.compile_model:
                self.model.compile()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every module but the frozen parts, which draw no stochastic depth."""
        super().train(mode)
        for part in self.resting:
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
        seed_rank(self.trainer, self.run_seed)
        if self.interrupted_loss is not None:
            # Where no batch of the epoch is left, nothing else would log it.
            self.train_loss.update(0.0, weight=0.0)
            if self.trainer.is_global_zero:
                self.train_loss.mean_value += self.interrupted_loss[0]
                self.train_loss.weight += self.interrupted_loss[1]
            self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
            self.interrupted_loss = None

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the images."""
        self.count_images("val_images", self.val_images, batch)

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the images."""
        self.count_images("test_images", self.test_images, batch)

    def count_images(self, name: str, count: SumMetric, batch: Any) -> None:
        """Add the images of a batch, which is empty where all of them were unreadable."""
        count.update(len(batch["pixel_values"]) if batch else 0)
        self.log(name, count, on_step=False, on_epoch=True, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the mean loss of an epoch that is not complete, over all ranks."""
        epoch = self.trainer.fit_loop.epoch_progress.current
        if epoch.processed < epoch.ready:
            state = torch.stack([self.train_loss.mean_value.detach(), self.train_loss.weight.detach()])
            checkpoint["train_loss"] = self.trainer.strategy.reduce(state.clone(), reduce_op="sum").tolist()

    @property
    def run_seed(self) -> int:
        """The seed of the data module, 0 without one."""
        return int(getattr(getattr(self.trainer, "datamodule", None), "seed", 0) or 0)

    def planned_steps(self) -> tuple[int, int]:
        """Optimiser steps of one epoch and of the whole training.

        Computed from lengths alone. ``trainer.estimated_stepping_batches`` would build the loader before a
        checkpoint is restored, and its position in the epoch would be lost.

        Raises:
            ValueError: If the trainer has neither a data module of ours nor ``limit_train_batches``.
        """
        trainer = self.trainer
        accumulate = trainer.accumulate_grad_batches
        datamodule: Any = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "steps_per_epoch"):
            steps = datamodule.steps_per_epoch(trainer.world_size, accumulate)
        elif isinstance(trainer.limit_train_batches, int):
            steps = -(-trainer.limit_train_batches // accumulate)
        else:
            raise ValueError(
                "the length of an epoch is unknown without an ImageDataModule; set trainer.limit_train_batches"
            )
        steps = max(1, steps)
        totals = []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            totals.append(steps * trainer.max_epochs)
        if trainer.max_steps > 0:
            totals.append(trainer.max_steps)
        if not totals:
            raise ValueError("the end of the training is unknown; set trainer.max_epochs or trainer.max_steps")
        return steps, min(totals)

    def lr_scale(self) -> float:
        """Factor on the learning rates: global batch / 512, or 1 without ``lr_scaling``.

        Raises:
            ValueError: If the batch is unknown.
        """
        if not self.lr_scaling:
            return 1.0
        batch = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if batch is None:
            raise ValueError(
                "the batch size is unknown without an ImageDataModule; set lr_scaling to False and give the learning "
                "rate of your batch"
            )
        return scaled_learning_rate(1.0, batch, self.trainer.world_size, self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> Any:
        """AdamW on the parameter groups, with the schedule stepped per optimiser step."""
        scale = self.lr_scale()
        peak = self.learning_rate * scale
        groups = parameter_groups(self.model, self.model.config.depths, peak, self.weight_decay, self.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=self.betas, fused=self._can_fuse())
        per_epoch, total = self.planned_steps()
        warmup = self.warmup_steps if self.warmup_steps is not None else round(self.warmup_epochs * per_epoch)
        warmup = fitting_warmup(warmup, total)
        floor = self.min_lr * scale / peak if peak else 0.0
        scheduler = build_schedule(
            optimizer,
            schedule=self.schedule,
            total=total,
            warmup=warmup,
            warmup_floor=self.warmup_lr * scale / peak if peak else 0.0,
            floor=floor,
            milestones=[epoch * per_epoch for epoch in self.milestones],
            gamma=self.gamma,
        )
        origin = f" = {self.learning_rate:g} x {scale * 512:g} images / 512" if self.lr_scaling else ""
        rank_zero_info(
            f"learning rate {peak:.4g}{origin}; {total} steps ({per_epoch} an epoch), {warmup} of them warm-up, "
            f"then {self.schedule}; weight decay {self.weight_decay:g} on matrices only"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _can_fuse(self) -> bool:
        # Under the GradScaler of 16-mixed, a fused step unscales the gradients itself: too late for clipping.
        return self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda")

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
        """Refuse the checkpoint of another model before anything is loaded.

        Raises:
            ValueError: If names or shapes differ; the message gives the first few.
        """
        self.interrupted_loss = checkpoint.get("train_loss")
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if ours != theirs:
            different = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
            lines = [
                f"{name}: {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here" for name in different
            ]
            raise ValueError(
                f"the checkpoint belongs to another model, {len(different)} of {len(ours)} tensors differ "
                f"({'; '.join(lines[:3])}); use the configuration of its run (config.yaml beside its checkpoints)"
            )


def freeze_stages(swin: SwinHFModel, stages: int) -> list[nn.Module]:
    """Freeze the patch embedding and the first stages of a Swin.

    Args:
        swin: The base model.
        stages: Number of leading stages to freeze with the embedding; 0 freezes nothing.

    Returns:
        The frozen parts, to be kept in evaluation mode.

    Raises:
        ValueError: If there are fewer stages.
    """
    if not 0 <= stages <= len(swin.stages):
        raise ValueError(f"freeze_stages is {stages} but the model has {len(swin.stages)} stages")
    frozen: list[nn.Module] = [swin.embeddings, *list(swin.stages)[:stages]] if stages else []
    for part in frozen:
        part.requires_grad_(False)
    return frozen


def recompute_activations(network: Any) -> None:
    """Switch gradient checkpointing on, in the variant that works under DDP."""
    # transformers renamed the method in 5.2x; the old name warns there, the new one is absent before.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, all and trainable."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest logit is that of the label, ``(B,)`` booleans."""
    return logits.argmax(-1) == labels


def bring(source: str) -> tuple[str, str | None]:
    """Path of a checkpoint, and its commit where it had to be pulled from the Hub.

    Nothing of the Hub is handed to ``from_pretrained``: :func:`swin_hf.pull` takes safetensors only and checks them.

    Args:
        source: A file or folder, the folder of a training run, or ``user/name`` or ``user/name@revision`` on the Hub.

    Raises:
        ValueError: If it is a path that does not exist, or a repository that cannot be pulled.
    """
    path = local_path(source)
    if path is not None:
        return str(path), None
    from swin_hf.hub import HubError, pull

    repo_id, revision = split_hub_id(source)
    try:
        pulled = pull(repo_id, revision=revision)
    except HubError as error:
        raise ValueError(f"there is no path {source!r}, and it cannot be pulled from the Hub: {error}") from error
    return str(pulled.path), pulled.commit
