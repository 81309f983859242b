"""What a Swin looks at, brought back from shifted windows to places of the image: attention and Grad-CAM maps.

:func:`attention_maps` and :func:`grad_cam` never touch the model that they are given: they run a twin that shares its
weights. Cells of a map are placed by size, not by stretching: a token of stage s covers ``patch * 2^s`` pixels, also
where the image was padded.

The figures of ``docs/swin.md``, which explain the architecture, are drawn at the end of this file from the functions
of ``swin_hf/model/windows.py`` that the model itself runs; ``python -m swin_hf.explain docs/figures`` writes them.

Shape legend:
    B batch, H and W height and width of a map in tokens, C channels,
    nW windows of a map, N tokens of a window, M side of a window, h heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_hf.model.attention import SwinHFAttention
from swin_hf.model.modeling_swin_hf import SwinHFEmbeddings, SwinHFStage
from swin_hf.model.windows import (
    Pair,
    WindowGeometry,
    cyclic_shift,
    pad_to_windows,
    window_partition,
    window_reverse,
)


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block, in windows as it was computed, and the way back to the map and to the image.

    Args:
        stage: Position of the stage, from 0.
        block: Position of the block in its stage, from 0; odd ones have shifted windows.
        geometry: How the block cut its map.
        image: Height and width of the image in pixels.
        cell: Height and width of a token in pixels of the image.
        weights: Probabilities, ``(B, nW, h, N, N)`` float32: query tokens before key tokens.
    """

    stage: int
    block: int
    geometry: WindowGeometry
    image: Pair
    cell: Pair
    weights: Tensor

    def received(self) -> Tensor:
        """How much every token is looked at: the sum over the tokens that look at it.

        1 is the average: as much as if every token of its window looked everywhere alike. Tokens that only pad the
        map neither look nor are looked at here.

        Returns:
            ``(B, h, H, W)``.
        """
        looking = (self._places() >= 0).to(self.weights)[:, None, :, None]  # nW, 1, N, 1
        return self._to_map((self.weights * looking).sum(dim=-2))  # B, nW, h, N -> B, h, H, W

    def from_token(self, row: int, column: int) -> Tensor:
        """Where one token looks: its probabilities in its window, 0 elsewhere.

        Args:
            row: Row of the token in the map of this stage.
            column: Column of it.

        Returns:
            ``(B, h, H, W)``; sums to 1 over the map, less what goes to padding.

        Raises:
            ValueError: If the token lies outside of the map.
        """
        height, width = self.geometry.grid
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"token ({row}, {column}) lies outside of the {height}x{width} map of stage {self.stage}; rows go "
                f"from 0 to {height - 1} and columns from 0 to {width - 1}"
            )
        ((window, position),) = (self._places() == row * width + column).nonzero().tolist()
        looks = torch.zeros_like(self.weights[..., 0, :])  # B, nW, h, N
        looks[:, window] = self.weights[:, window, :, position]
        return self._to_map(looks)

    def from_pixel(self, y: int, x: int) -> Tensor:
        """Where the token looks that covers pixel ``(y, x)`` of the image; see :meth:`from_token`.

        Raises:
            ValueError: If the pixel lies outside of the image.
        """
        if not (0 <= y < self.image[0] and 0 <= x < self.image[1]):
            raise ValueError(
                f"pixel ({y}, {x}) lies outside of the {self.image[0]}x{self.image[1]} image; give row and column, "
                "counted from 0 at the top left"
            )
        return self.from_token(y // self.cell[0], x // self.cell[1])

    def to_image(self, maps: Tensor) -> Tensor:
        """Enlarge maps ``(..., H, W)`` to pixels of the image, ``(..., height, width)``: every token fills its cell."""
        return enlarge(maps, self.cell, self.image, smooth=False)

    def _places(self) -> Tensor:
        """Number of the token of the map, row by row, at each position of each window; -1 for padding. (nW, N)."""
        height, width = self.geometry.grid
        numbers = torch.arange(1, height * width + 1, device=self.weights.device).view(1, height, width, 1)
        padded = pad_to_windows(numbers, self.geometry)  # padding is 0
        return window_partition(cyclic_shift(padded, self.geometry.shift), self.geometry.window)[..., 0] - 1

    def _to_map(self, windows: Tensor) -> Tensor:
        """One number for each token of each window, ``(B, nW, h, N)``, at its place of the map, ``(B, h, H, W)``."""
        geometry, (rows, columns) = self.geometry, self.geometry.shift
        x = window_reverse(
            windows.flatten(0, 1).transpose(1, 2), geometry.window, geometry.padded
        )  # B, Hp, Wp, h
        x = cyclic_shift(x, (-rows, -columns))[:, : geometry.grid[0], : geometry.grid[1]]
        return x.permute(0, 3, 1, 2)


@torch.no_grad()
def attention_maps(model: nn.Module, pixel_values: Tensor) -> list[BlockAttention]:
    """Record the attention of every block of every stage; the model's own outputs have the last block of each only.

    Args:
        model: Any model of this family, or a module that holds one. It is left as it is: mode, hooks, gradients.
        pixel_values: Images, ``(B, channels, height, width)``, as the model takes them; any size.

    Returns:
        One entry for each block that ran, from the first stage to the last.

    Raises:
        TypeError: If there is no Swin of this family in the model.
        ValueError: If the images do not fit the model.
    """
    twin = _twin(model)
    records: list[BlockAttention] = []
    image = (pixel_values.shape[-2], pixel_values.shape[-1])

    def ask(
        _: nn.Module, args: tuple[Any, ...], __: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args[:2], {"output_attentions": True}

    def recorder(stage: int, block: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            geometry: WindowGeometry = args[1]
            rows, columns = geometry.num_windows
            weights = output[1].float().unflatten(0, (-1, rows * columns))
            records.append(BlockAttention(stage, block, geometry, image, _cell(twin, stage), weights))

        return record

    for number, stage in enumerate(_stages(twin)):
        for block, layer in enumerate(
            module for module in stage.modules() if isinstance(module, SwinHFAttention)
        ):
            layer.register_forward_pre_hook(ask, with_kwargs=True)
            layer.register_forward_hook(recorder(number, block))
    twin(pixel_values.to(next(twin.parameters()).device))
    return records


def grad_cam(
    model: nn.Module,
    pixel_values: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    stage: int = -1,
    layer: nn.Module | None = None,
) -> Tensor:
    """Show which places of an image speak for a class: Grad-CAM (https://arxiv.org/abs/1610.02391).

    A channel's weight is its mean gradient; the map is the weighted sum of the channels where that is positive,
    enlarged to the image, smallest value 0 and largest 1. It is 0 throughout if no place speaks for the class.

    Args:
        model: Image classifier of this family, or a module that holds one and returns its logits. It is left as it
            is: mode, hooks, gradients of the parameters.
        pixel_values: Images, ``(B, channels, height, width)``, as the model takes them; any size.
        target: Class number, for all images or one for each; by default the predicted class.
        stage: Stage to look at, from 0; negative ones count from the last.
        layer: Module of ``model`` to look at instead; its output is a map ``(B, H, W, C)``.

    Returns:
        ``(B, height, width)`` float32 in [0, 1], in pixels of the images.

    Raises:
        TypeError: If there is no Swin of this family in the model, or it gives no logits.
        ValueError: If there is no such stage or class, or the layer is not part of the model or gives no map.
    """
    twin = _twin(model)
    looked_at = _cam_layer(twin, stage) if layer is None else twin.get_submodule(_name_of(layer, model))
    maps: list[Tensor] = []
    looked_at.register_forward_hook(lambda _, __, output: maps.append(output))
    with torch.inference_mode(False), torch.enable_grad():
        images = pixel_values.detach().clone().to(next(twin.parameters()).device)
        # Whatever is frozen: the graph hangs on the images.
        outputs = twin(images.requires_grad_())
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise TypeError(
                f"{type(model).__name__} gives no logits; Grad-CAM needs a class to ask for, so give a "
                "SwinHFForImageClassification"
            )
        if not maps or not isinstance(maps[0], Tensor) or maps[0].ndim != 4:
            raise ValueError(
                "the layer gives no map (B, H, W, C); choose a norm, such as model.swin.stages[0].blocks[-1].norm1"
            )
        targets = _targets(target, logits)
        score = logits.gather(1, targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, maps[0])  # B, H, W, C
    activation = maps[0].detach().float()
    cam = (gradient.float().mean(dim=(1, 2), keepdim=True) * activation).sum(dim=-1).relu()  # B, H, W
    cell = _cell_of_grid(twin, (pixel_values.shape[-2], pixel_values.shape[-1]), (cam.shape[1], cam.shape[2]))
    cam = enlarge(cam, cell, (pixel_values.shape[-2], pixel_values.shape[-1]), smooth=True)
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


def reshape_transform(maps: Tensor) -> Tensor:
    """Turn a map of this model, ``(B, H, W, C)``, into what the pytorch-grad-cam package expects, ``(B, C, H, W)``.

    That package wants a module that returns bare logits, a layer that returns a map, and this function::

        class Logits(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, pixel_values):
                return self.model(pixel_values).logits

        cam = GradCAM(Logits(model), [model.swin.norm], reshape_transform=swin_hf.explain.reshape_transform)

    Any norm of the model will do as a layer: ``model.swin.norm`` is what :func:`grad_cam` looks at by default. The
    package stretches the map over the image, so sizes should be multiples of a token of the stage, ``patch * 2^s``.
    """
    return maps.permute(0, 3, 1, 2)


def enlarge(maps: Tensor, cell: Pair, image: Pair, *, smooth: bool) -> Tensor:
    """Bring maps to the size of the image; what pads the image is cut off, not squeezed in.

    Args:
        maps: ``(..., H, W)``.
        cell: Height and width of a token in pixels.
        image: Height and width of the image in pixels.
        smooth: Interpolate between the centres of the cells, rather than fill every cell with its value.

    Returns:
        ``(..., height, width)``.
    """
    size = (maps.shape[-2] * cell[0], maps.shape[-1] * cell[1])
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = (
        F.interpolate(flat, size, mode="bilinear")
        if smooth
        else F.interpolate(flat, size, mode="nearest-exact")
    )
    return flat[:, 0, : image[0], : image[1]].reshape(*maps.shape[:-2], *image)


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights, in evaluation mode: to be hooked and run at will."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not _stages(model):
        raise TypeError(
            f"{type(model).__name__} holds no Swin of this family; load one with "
            "SwinHFForImageClassification.from_pretrained() or swin_hf.load_checkpoint()"
        )
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin: nn.Module = copy.deepcopy(model, shared)
    return twin.eval()


def _stages(model: nn.Module) -> list[SwinHFStage]:
    return [module for module in model.modules() if isinstance(module, SwinHFStage)]


def _cell(model: nn.Module, stage: int) -> Pair:
    """Pixels of a token of a stage."""
    embeddings = next(module for module in model.modules() if isinstance(module, SwinHFEmbeddings))
    rows, columns = embeddings.patch_embeddings.kernel_size
    return rows * 2**stage, columns * 2**stage


def _cell_of_grid(model: nn.Module, image: Pair, grid: Pair) -> Pair:
    """Pixels of a token of a map: those of the stage that has maps of this size."""
    for stage in range(len(_stages(model))):
        cell = _cell(model, stage)
        if grid == (-(-image[0] // cell[0]), -(-image[1] // cell[1])):
            return cell
    raise ValueError(f"the layer gives maps of {grid[0]}x{grid[1]}; no stage has maps of that size")


def _cam_layer(model: nn.Module, stage: int) -> nn.Module:
    stages = _stages(model)
    if not -len(stages) <= stage < len(stages):
        raise ValueError(f"stage {stage} does not exist; the model has stages 0 to {len(stages) - 1}")
    return stages[stage].blocks[-1].norm1


def _name_of(layer: nn.Module, model: nn.Module) -> str:
    for name, module in getattr(model, "_orig_mod", model).named_modules():
        if module is layer:
            return name
    raise ValueError(
        f"the layer {type(layer).__name__} is not a part of {type(model).__name__}; give one of its modules"
    )


def _targets(target: int | Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    """Class number for each image, ``(B,)``."""
    images, classes = logits.shape
    if target is None:
        return logits.argmax(dim=-1)
    targets = torch.as_tensor(target, device=logits.device)
    if targets.numel() not in (1, images) or targets.ndim > 1 or targets.is_floating_point():
        raise ValueError(
            f"target is {target!r}; give one class number, or one for each of the {images} images"
        )
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise ValueError(f"target is {target!r}; the model has classes 0 to {classes - 1}")
    return targets.long().expand(images)
