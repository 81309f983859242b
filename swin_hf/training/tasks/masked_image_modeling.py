"""Self-supervised training: SimMIM, which predicts the pixels of masked patches (https://arxiv.org/abs/2111.09886)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from swin_hf.ranges import Options, ranged

from ..callbacks import keep_figure, to_pictures
from ..module import SwinModule
from ..network import Network
from ..optim import Optimization
from .sheets import draw_pictures


@dataclass(frozen=True)
class Masking(Options):
    """What is hidden of each image, and what is predicted there.

    Args:
        cell: Side of a masked cell in pixels, a multiple of the patch.
        ratio: Share of the cells that is masked, in (0, 1).
        norm_targets: Side of the neighbourhood that normalises the targets, odd; raw pixels when it is not given.
    """

    cell: int = ranged(32, "[1, inf)")
    ratio: float = ranged(0.6, "(0, 1)")
    norm_targets: int | None = ranged(None, "[1, inf)")


class SwinMaskedImageModeler(SwinModule):
    """Pre-train a Swin Transformer without labels; its result is a starting point for ``SwinClassifier``.

    The defaults are those of SimMIM's Swin-B. A part of each image is hidden in square cells, and the model predicts
    the hidden pixels; the loss is the mean L1 distance there. The other arguments are those of
    :class:`~swin_hf.training.SwinModule`.

    Args:
        weights: What to go on from: an earlier pre-training, or anyone's Swin, see :mod:`swin_hf.loading`; what it
            lacks of mask token and decoder is new.
        masking: What is hidden, and what is predicted.
    """

    task = "masked-image-modeling"
    default_config = "simmim_digits"
    is_tested = False

    def __init__(
        self,
        preset: str = "swin_base_patch4_window6_192_simmim",
        weights: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_channels: int | None = None,
        network: Network = Network(),
        optimization: Optimization = Optimization(
            learning_rate=1e-4, schedule="multistep", warmup_epochs=10.0, min_lr=0.0
        ),
        masking: Masking = Masking(),
    ) -> None:
        super().__init__(optimization, network.compile)
        self.save_hyperparameters(logger=False)
        norm = masking.norm_targets
        self.build(preset, weights, network, image_size=image_size, num_channels=num_channels, norm_targets=norm)
        patch = self.model.config.patch_hw
        if masking.cell % patch[0] or masking.cell % patch[1]:
            raise ValueError(f"masking.cell is {masking.cell} pixels; it must be a multiple of the patch, {patch}")
        self.masking = masking

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor) -> Any:
        """Loss and reconstruction of normalised images ``(B, C, H, W)`` under a mask ``(B, rows, columns)``."""
        return self.model(pixel_values=pixel_values, bool_masked_pos=bool_masked_pos)

    def draw_masks(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random mask for each image, ``(B, rows, columns)`` booleans on the patch grid."""
        size, patch = (images.shape[-2], images.shape[-1]), self.model.config.patch_hw
        return random_masks(len(images), size, self.masking.cell, patch, self.masking.ratio, images.device, generator)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """L1 loss of one batch under fresh masks."""
        images = batch["pixel_values"]
        loss: Tensor = self(images, self.draw_masks(images)).loss
        self.log_training(loss, len(images))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        """Loss under one fixed mask for all images, so that epochs, ranks and runs can be compared.

        Returns:
            ``reconstruction`` ``(B, C, H, W)`` and ``mask`` ``(B, H, W)`` in pixels, 1 where hidden.
        """
        images, patch = batch["pixel_values"], self.model.config.patch_hw
        height, width = images.shape[-2:]
        one = self.draw_masks(torch.empty(1, 1, height, width), torch.Generator().manual_seed(0))
        masks = one.to(images.device).expand(len(images), -1, -1)
        answer = self(images, masks)
        getattr(self, f"{split}_loss").update(answer.loss, weight=len(images))
        pixels = masks.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, :height, :width]
        return {"reconstruction": answer.reconstruction, "mask": pixels.to(images.dtype)}

    def run_callbacks(self, folder: Path | None) -> list[Callback]:
        """The sheet of reconstructions."""
        return [Reconstructions(folder)]


class Reconstructions(Callback):
    """Draws original, masked input and reconstruction of the first validation pictures of a SimMIM run.

    In the run folder, the sheet of each epoch replaces the one before; TensorBoard has all.
    """

    def __init__(self, folder: Path | None, pictures: int = 4) -> None:
        self.folder = folder
        self.pictures = pictures

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Draw the first batch, unless all of it was unreadable."""
        if batch_idx or not outputs or trainer.sanity_checking or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        images = batch["pixel_values"][: self.pictures]
        mask = outputs["mask"][: self.pictures, None]  # B, 1, H, W in pixels, 1 where hidden
        rebuilt = outputs["reconstruction"][: self.pictures].float()
        rows = [images, images * (1 - mask), images * (1 - mask) + rebuilt * mask]
        sheets = [to_pictures(row, trainer.datamodule) for row in rows]
        pictures = [picture for row in zip(*sheets, strict=True) for picture in row]
        captions = ["original", "input", "reconstruction"] * len(images)
        keep_figure(trainer, self.folder, "reconstructions", lambda: draw_pictures(pictures, captions, columns=3))


def random_masks(
    count: int,
    image: tuple[int, int],
    cell: int,
    patch: tuple[int, int],
    ratio: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks of SimMIM, ``(count, rows, columns)`` booleans on the patch grid, True where hidden.

    Each hides the same number of random square cells: this ``ratio`` of them, rounded up. The side of a cell is a
    multiple of the sides of a patch; an incomplete one at the border counts. ``image`` and ``patch`` are
    ``(height, width)``, all in pixels.
    """
    rows, columns = -(-image[0] // cell), -(-image[1] // cell)
    hidden = math.ceil(rows * columns * ratio)
    ranks = torch.rand(count, rows * columns, device=device, generator=generator).argsort(1).argsort(1)
    cells = (ranks < hidden).view(count, rows, columns)
    grid = (-(-image[0] // patch[0]), -(-image[1] // patch[1]))
    masks = cells.repeat_interleave(cell // patch[0], 1).repeat_interleave(cell // patch[1], 2)
    return masks[:, : grid[0], : grid[1]]
