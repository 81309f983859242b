"""Self-supervised training: SimMIM, which predicts the pixels of masked patches (https://arxiv.org/abs/2111.09886)."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from swin_hf.hub.weights import check_folder
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFForMaskedImageModeling
from swin_hf.ranges import check_range

from .module import SwinModule, bring, recompute_activations
from .optim import Schedule


class SwinMaskedImageModeler(SwinModule):
    """Pre-train a Swin Transformer without labels; its result is a starting point for ``SwinClassifier``.

    The defaults are those of SimMIM's Swin-B. A part of each image is hidden in square cells, and the model predicts
    the hidden pixels; the loss is the mean L1 distance there.

    Args:
        preset: Size of a new model, one of ``swin_hf.list_presets()``.
        model: ``save_pretrained`` folder or Hub id of an earlier pre-training to go on from.
        image_size: Side, or height and width, of the images in pixels; from the data when run by the command line.
        num_channels: Channels of the images; from the data when run by the command line.
        window_size: Window side in tokens, when another than the preset's.
        drop_path_rate: Stochastic depth of the last block, when another than the preset's.
        norm_targets: Side of the neighbourhood that normalises the targets, odd; nothing for raw pixels.
        overrides: Any other field of ``SwinHFConfig``, by name.
        attn_implementation: ``eager``, ``sdpa``, ``triton`` or ``auto``; the default is that of the model.
        mask_cell: Side of a masked cell in pixels, a multiple of the patch.
        mask_ratio: Share of the cells that is masked, in (0, 1).
        learning_rate: Peak rate for a global batch of 512 images.
        lr_scaling: Whether the rates are scaled by global batch / 512; otherwise they are taken as they are.
        weight_decay: Decay of matrices and kernels; norms, biases and tables are never decayed.
        betas: The two averaging factors of AdamW.
        layer_decay: Factor on the rate for each layer further from the head; 1 is off.
        schedule: Shape after the warm-up: ``cosine``, ``linear``, ``constant`` or ``multistep``.
        warmup_epochs: Length of the linear warm-up in epochs; fractions are allowed.
        warmup_steps: The same in optimiser steps; wins over ``warmup_epochs``.
        warmup_lr: Rate at the first step of the warm-up, scaled like ``learning_rate``.
        min_lr: Rate at the last step, scaled like ``learning_rate``.
        milestones: Epochs at which ``multistep`` drops the rate.
        gamma: Factor of such a drop.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third slower.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: For a value out of range; the message says which.
    """

    monitor = "val_loss"
    mode = "min"

    def __init__(
        self,
        preset: str = "swin_base_patch4_window6_192_simmim",
        model: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_channels: int | None = None,
        window_size: int | list[int] | None = None,
        drop_path_rate: float | None = None,
        norm_targets: int | None = None,
        overrides: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        mask_cell: int = 32,
        mask_ratio: float = 0.6,
        learning_rate: float = 1e-4,
        lr_scaling: bool = True,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float = 1.0,
        schedule: Schedule = "multistep",
        warmup_epochs: float = 10.0,
        warmup_steps: int | None = None,
        warmup_lr: float = 5e-7,
        min_lr: float = 0.0,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_range("mask_ratio", mask_ratio, "(0, 1)")
        check_range("mask_cell", mask_cell, "[1, inf)")
        check_range("norm_targets", norm_targets, "[1, inf)")
        check_range("drop_path_rate", drop_path_rate, "[0, 1)")
        self.configure_training(
            learning_rate=learning_rate,
            lr_scaling=lr_scaling,
            weight_decay=weight_decay,
            betas=betas,
            layer_decay=layer_decay,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            warmup_steps=warmup_steps,
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            milestones=milestones or [],
            gamma=gamma,
            compile=compile,
        )
        if isinstance(image_size, tuple | list) and len(set(image_size)) == 1:
            image_size = image_size[0]
        fields: dict[str, Any] = dict(overrides or {})
        for name, value in (
            ("image_size", image_size),
            ("num_channels", num_channels),
            ("window_size", window_size),
            ("drop_path_rate", drop_path_rate),
            ("norm_targets", norm_targets),
        ):
            if value is not None:
                fields[name] = value
        backend: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        self.starting_point = model
        if model is None:
            config = SwinHFConfig.from_preset(preset, **fields)
            self.model = SwinHFForMaskedImageModeling._from_config(config, **backend)
        else:
            path, self.starting_commit = bring(model)
            if not Path(path).is_dir():
                raise ValueError(f"{model!r} is not a folder; give that of a saved model, or user/name on the Hub")
            check_folder(Path(path))
            options = fields | backend
            self.model = SwinHFForMaskedImageModeling.from_pretrained(path, use_safetensors=True, **options)
        config = self.model.config
        patch = config.patch_hw
        if mask_cell % patch[0] or mask_cell % patch[1] or mask_cell < 1:
            raise ValueError(f"mask_cell is {mask_cell} pixels; it must be a multiple of the patch, {patch}")
        if gradient_checkpointing:
            recompute_activations(self.model)
        self.mask_cell = mask_cell
        self.mask_ratio = mask_ratio
        self.train_loss = MeanMetric()
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> Any:
        """Loss and reconstruction of normalised images ``(B, C, H, W)`` under a mask ``(B, rows, columns)``."""
        return self.model(pixel_values=pixel_values, bool_masked_pos=bool_masked_pos)

    def draw_masks(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random mask for each image, ``(B, rows, columns)`` booleans on the patch grid."""
        height, width = pixel_values.shape[-2:]
        return random_masks(
            len(pixel_values),
            (height, width),
            self.mask_cell,
            self.model.config.patch_hw,
            self.mask_ratio,
            pixel_values.device,
            generator,
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """L1 loss of one batch under fresh masks."""
        images = batch["pixel_values"]
        loss: Tensor = self(images, self.draw_masks(images)).loss
        self.train_loss.update(loss.detach(), weight=len(images))
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train_loss_step", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """L1 loss of one batch."""
        return self.evaluate(batch, self.val_loss, "val_loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """L1 loss of one batch."""
        return self.evaluate(batch, self.test_loss, "test_loss")

    def evaluate(self, batch: dict[str, Tensor], mean_loss: MeanMetric, name: str) -> dict[str, Tensor]:
        """Loss under one fixed mask for all images, so that epochs, ranks and runs can be compared.

        Returns:
            ``reconstruction`` ``(B, C, H, W)`` and ``mask`` ``(B, H, W)`` in pixels, 1 where hidden; nothing for a
            batch of unreadable pictures, which is logged all the same: ranks meet in every metric that is logged.
        """
        if not batch:
            self.log(name, mean_loss, on_step=False, on_epoch=True, prog_bar=True)
            return {}
        images = batch["pixel_values"]
        height, width = images.shape[-2:]
        patch = self.model.config.patch_hw
        generator = torch.Generator().manual_seed(0)
        one = random_masks(1, (height, width), self.mask_cell, patch, self.mask_ratio, torch.device("cpu"), generator)
        masks = one.to(images.device).expand(len(images), -1, -1)
        outputs = self(images, masks)
        mean_loss.update(outputs.loss, weight=len(images))
        self.log(name, mean_loss, on_step=False, on_epoch=True, prog_bar=True)
        pixels = masks.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, :height, :width]
        return {"reconstruction": outputs.reconstruction, "mask": pixels.to(images.dtype)}

    def exportable(self) -> SwinHFForMaskedImageModeling:
        """The network as ``save_pretrained`` should write it."""
        network: SwinHFForMaskedImageModeling = self.model
        return network


def random_masks(
    count: int,
    image: tuple[int, int],
    cell: int,
    patch: tuple[int, int],
    ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks of SimMIM: a fixed number of random square cells, the same number in each image.

    Args:
        count: Number of masks.
        image: Image height and width in pixels; an incomplete cell at the border counts as a cell.
        cell: Side of a cell in pixels, a multiple of the patch sides.
        patch: Patch height and width in pixels.
        ratio: Share of the cells that is masked, rounded up.
        device: Where the masks are wanted.
        generator: Source of the random numbers.

    Returns:
        ``(count, rows, columns)`` booleans on the patch grid, True where hidden.
    """
    rows, columns = -(-image[0] // cell), -(-image[1] // cell)
    hidden = math.ceil(rows * columns * ratio)
    ranks = torch.rand(count, rows * columns, device=device, generator=generator).argsort(1).argsort(1)
    cells = (ranks < hidden).view(count, rows, columns)
    grid = (-(-image[0] // patch[0]), -(-image[1] // patch[1]))
    masks = cells.repeat_interleave(cell // patch[0], 1).repeat_interleave(cell // patch[1], 2)
    return masks[:, : grid[0], : grid[1]]
