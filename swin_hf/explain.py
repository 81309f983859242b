"""Attention and Grad-CAM maps of a Swin, moved from shifted windows to pixels of the image.

:func:`attention_maps` and :func:`grad_cam` run a copy of the model that shares its weights, and so do not change it. A
token of stage s covers ``patch * 2^s`` pixels, also where the image was padded; maps are not stretched.

Shape legend:
    B batch, H and W height and width of a map in tokens, C channels,
    nW windows of a map, N tokens of a window, M side of a window, h heads.
"""

import copy
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from swin_hf.classes import require_finite
from swin_hf.files import replacing
from swin_hf.model.modeling_swin_hf import SwinHFAttention, SwinHFEmbeddings, SwinHFStage
from swin_hf.model.windows import Pair, WindowGeometry, cyclic_shift, pad_to_windows, window_partition, window_reverse
from swin_hf.text import one_line


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block in its windows, and methods that move it to the map and to the image."""

    stage: int  # from 0
    block: int  # in its stage, from 0; odd ones have shifted windows
    geometry: WindowGeometry  # how the block cut its map
    image: Pair  # height and width in pixels
    cell: Pair  # height and width of a token in pixels
    weights: Tensor  # probabilities, (B, nW, h, N, N) float32: query tokens before key tokens

    def received(self) -> Tensor:
        """The attention that every token receives, ``(B, h, H, W)``: the sum over the tokens of its window.

        1 is the average, and what uniform attention gives. Tokens that only pad the map neither give nor receive.
        """
        looking = (self._places() >= 0).to(self.weights)[:, None, :, None]  # nW, 1, N, 1
        return self._to_map((self.weights * looking).sum(dim=-2))  # B, nW, h, N -> B, h, H, W

    def from_token(self, row: int, column: int) -> Tensor:
        """The attention of one token, ``(B, h, H, W)``: its probabilities in its window, 0 elsewhere.

        It sums to 1 over the map, less what goes to padding. ValueError for a token outside the map.
        """
        height, width = self.geometry.grid
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"token ({row}, {column}) is outside the {height}x{width} map of stage {self.stage}")
        ((window, position),) = (self._places() == row * width + column).nonzero().tolist()
        looks = torch.zeros_like(self.weights[..., 0, :])  # B, nW, h, N
        looks[:, window] = self.weights[:, window, :, position]
        return self._to_map(looks)

    def from_pixel(self, y: int, x: int) -> Tensor:
        """As :meth:`from_token`, of the token that covers pixel ``(y, x)`` of the image."""
        if not (0 <= y < self.image[0] and 0 <= x < self.image[1]):
            size = f"{self.image[0]}x{self.image[1]}"
            raise ValueError(f"pixel ({y}, {x}) is outside the {size} image; give row and column, from 0 on")
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
        x = window_reverse(windows.flatten(0, 1).transpose(1, 2), geometry.window, geometry.padded)  # B, Hp, Wp, h
        x = cyclic_shift(x, (-rows, -columns))[:, : geometry.grid[0], : geometry.grid[1]]
        return x.permute(0, 3, 1, 2)


@torch.no_grad()
def attention_maps(model: nn.Module, pixel_values: Tensor) -> list[BlockAttention]:
    """Record the attention of every block, from the first stage to the last; the model returns only each stage's last.

    Args:
        model: Any model of this package, or a module that contains one.
        pixel_values: Images, ``(B, channels, height, width)``, as the model takes them; any size.

    Raises:
        TypeError: If there is no Swin of this package in the model.
        ValueError: If the images do not fit the model.
    """
    twin = _twin(model)
    records: list[BlockAttention] = []
    image = (pixel_values.shape[-2], pixel_values.shape[-1])

    def ask(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args[:2], {"output_attentions": True}

    def record(
        stage: int, block: int, _: nn.Module, args: tuple[Any, WindowGeometry], output: tuple[Tensor, Tensor]
    ) -> None:
        weights = output[1].float().unflatten(0, (-1, math.prod(args[1].num_windows)))
        records.append(BlockAttention(stage, block, args[1], image, _cell(twin, stage), weights))

    for number, stage in enumerate(_stages(twin)):
        for block, layer in enumerate(module for module in stage.modules() if isinstance(module, SwinHFAttention)):
            layer.register_forward_pre_hook(ask, with_kwargs=True)
            layer.register_forward_hook(partial(record, number, block))
    twin(pixel_values.to(next(twin.parameters()).device))
    return records


def grad_cam(
    model: nn.Module,
    pixel_values: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    stage: int = -1,
    layer: nn.Module | None = None,
    pixel: Pair | None = None,
) -> Tensor:
    """Show which parts of an image raise the score of a class: Grad-CAM (https://arxiv.org/abs/1610.02391).

    A channel's weight is its mean gradient; the map is the weighted sum of the channels where that is positive,
    enlarged to the image, smallest value 0 and largest 1. It is 0 everywhere if no part raises the score.

    Args:
        model: Classifier or segmenter of this package, or a module that contains one and returns its logits.
        pixel_values: Images, ``(B, channels, height, width)``, as the model takes them; any size.
        target: Class number, for all images or one for each; by default the predicted class.
        stage: Stage to look at, from 0; negative ones count from the last. The map is the output of ``norm1`` of its
            last block: before this norm, gradient and activation are perpendicular, so that their product says nothing.
        layer: Module of ``model`` to look at instead, whose output is a map ``(B, H, W, C)``.
        pixel: Row and column whose score a segmenter explains; the mean over all pixels if not given.

    Returns:
        ``(B, height, width)`` float32 in [0, 1], in pixels of the images.

    Raises:
        TypeError: If there is no Swin of this package in the model, or it gives no logits.
        ValueError: If there is no such stage or class, or the layer is not part of the model or gives no map.
    """
    twin, image = _twin(model), (pixel_values.shape[-2], pixel_values.shape[-1])
    if layer is None:
        last = _stages(twin)[_check_stage(stage, twin)]
        looked_at = last.get_submodule(f"blocks.{len(last.blocks) - 1}.norm1")
    else:
        names = [name for name, module in getattr(model, "_orig_mod", model).named_modules() if module is layer]
        if not names:
            raise ValueError(f"the layer {type(layer).__name__} is not a part of the model; give one that is")
        looked_at = twin.get_submodule(names[0])
    maps: list[Tensor] = []
    looked_at.register_forward_hook(lambda _, __, output: maps.append(output))
    with torch.inference_mode(False), torch.enable_grad():
        images = pixel_values.detach().clone().to(next(twin.parameters()).device)
        # The gradient is taken through the images, so that frozen parameters do not matter.
        logits = _logits(twin(images.requires_grad_()), model, pixel, image)
        if not maps or not isinstance(maps[0], Tensor) or maps[0].ndim != 4:
            raise ValueError("the layer gives no map (B, H, W, C); choose a norm, such as stages[0].blocks[-1].norm1")
        score = logits.gather(1, _targets(target, logits)[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, maps[0])  # B, H, W, C
    weights = gradient.float().mean(dim=(1, 2), keepdim=True)
    cam = (weights * maps[0].detach().float()).sum(dim=-1).relu()  # B, H, W
    cells = [_cell(twin, stage) for stage in range(len(_stages(twin)))]
    height, width = cam.shape[1:]
    found = [(y, x) for y, x in cells if (height, width) == (-(-image[0] // y), -(-image[1] // x))]
    if not found:
        raise ValueError(f"the layer gives maps of {height}x{width}; no stage has maps of that size")
    cam = enlarge(cam, found[0], image, smooth=True)
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


class Explanation(NamedTuple):
    """Maps over one image, ``(height, width)`` each, one for each stage or for each block of one stage."""

    pixel: Pair  # row and column of the pixel that attention_from starts at
    names: list[str]  # of each stage or block
    grad_cam: list[Tensor]
    received: list[Tensor]  # attention that each token receives, mean of the heads; 1 is the average
    attention_from: list[Tensor]  # attention of the pixel's token, mean of the heads


def explain(
    model: nn.Module, pixel_values: Tensor, target: int, *, stage: int | None = None, pixel: Pair | None = None
) -> Explanation:
    """Compute the maps that ``swin-hf explain`` draws over one image ``(1, channels, height, width)``.

    They are of the last block of every stage, or of every block of one ``stage``, from 0. ``pixel`` is the row and
    column whose attention is shown, by default where the last Grad-CAM is highest; ``target`` the class of Grad-CAM.
    ValueError if there is more than one image, or no such class, stage or pixel.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[0] != 1:
        raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; explain one image, (1, channels, H, W)")
    twin = _twin(model)
    stages = _stages(twin)
    if stage is None:
        blocks = [(number, len(layer.blocks) - 1) for number, layer in enumerate(stages)]
        names = [f"stage {number + 1}" for number, _ in blocks]
    else:
        number = _check_stage(stage, twin)
        blocks = [(number, block) for block in range(len(stages[number].blocks))]
        names = [f"stage {number + 1}, block {block + 1}" for _, block in blocks]
    layers = [stages[number].get_submodule(f"blocks.{block}.norm1") for number, block in blocks]
    cams = [grad_cam(twin, pixel_values, target, layer=layer, pixel=pixel)[0] for layer in layers]
    if pixel is None:
        peak = int(cams[-1].argmax())
        pixel = (peak // cams[-1].shape[1], peak % cams[-1].shape[1])
    attention = {(entry.stage, entry.block): entry for entry in attention_maps(twin, pixel_values)}
    chosen = [attention[place] for place in blocks]
    return Explanation(
        pixel=pixel,
        names=names,
        grad_cam=cams,
        received=[entry.to_image(entry.received().mean(dim=1))[0] for entry in chosen],
        attention_from=[entry.to_image(entry.from_pixel(*pixel).mean(dim=1))[0] for entry in chosen],
    )


def draw_explanation(explanation: Explanation, picture: Tensor, title: str, class_name: str) -> Figure:
    """Draw the maps over the picture that the model saw, ``(channels, height, width)`` in [0, 1]."""
    height, width = picture.shape[-2:]
    lines = len(explanation.names)
    figure = Figure(figsize=(12.0, 0.5 + 2.6 * lines * min(1.5, height / width)), layout="constrained")
    grid = figure.add_gridspec(lines, 4, width_ratios=(0.9, 1, 1, 1))
    picture = picture.float().clamp(0, 1).cpu().expand(3, -1, -1)
    original = figure.add_subplot(grid[0, 0])
    original.imshow(picture.permute(1, 2, 0).numpy())
    wrapped = "\n".join(textwrap.fill(line, 30) for line in title.split("\n"))  # wrap=True would parse formulas
    original.set_title(wrapped, fontsize=11, parse_math=False)
    marked = [original]
    target = one_line(class_name.partition(",")[0] or class_name, 14)  # names of ImageNet have up to a hundred letters
    kinds = (
        (f"Grad-CAM for {target}", explanation.grad_cam, 1.0),
        ("attention received", explanation.received, None),
        ("attention from +", explanation.attention_from, None),
    )
    for place, (kind, maps, top) in enumerate(kinds, start=1):
        for line, (name, heat) in enumerate(zip(explanation.names, maps, strict=True)):
            ax = figure.add_subplot(grid[line, place])
            heat = heat.cpu()
            ax.imshow(heat_over(picture, heat, top).permute(1, 2, 0).numpy())
            scale = ScalarMappable(Normalize(0, top or float(heat.max())), "inferno")
            bar = figure.colorbar(scale, cax=ax.inset_axes((1.03, 0, 0.05, 1)), ticks=MaxNLocator(4))
            bar.ax.tick_params(labelsize=8)
            ax.set_title(f"{kind}, {name}", fontsize=10, parse_math=False)
            if maps is explanation.attention_from:
                marked.append(ax)
    row, column = explanation.pixel
    for ax in marked:
        ax.plot(column, row, marker="+", markersize=11, markeredgewidth=2.2, color="#00e5ff", clip_on=False)
    for ax in figure.axes:
        ax.set_xticks([0, width - 1])
        ax.set_yticks([0, height - 1])
        ax.tick_params(labelsize=8)
    return figure


def heat_over(picture: Tensor, heat: Tensor, top: float | None = None) -> Tensor:
    """Draw a map ``(h, w)`` in colours over a picture ``(3, h, w)`` in grey, which shows through where it is low."""
    share = (heat / (top or heat.max().clamp(min=1e-12))).clamp(0, 1)
    colours = torch.tensor(colormaps["inferno"](share.numpy())[..., :3]).float().permute(2, 0, 1)
    alpha = 0.2 + 0.6 * share
    return colours * alpha + (0.2 + 0.6 * picture.mean(dim=0)) * (1 - alpha)


def as_seen(pixels: Tensor, processor: Any) -> Tensor:
    """Undo the normalisation of pixels ``(..., channels, height, width)``: in [0, 1], what a person would see."""
    pixels = pixels.float().cpu()
    if not processor.do_normalize:
        return pixels
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return pixels * std + mean


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    return Path(path)


def enlarge(maps: Tensor, cell: Pair, image: Pair, *, smooth: bool) -> Tensor:
    """Enlarge maps ``(..., H, W)`` to the pixels of the image, ``(..., height, width)``; padding is cut off.

    All ``cell`` pixels of a token get its value; ``smooth`` interpolates between the centres of the cells.
    """
    size = (maps.shape[-2] * cell[0], maps.shape[-1] * cell[1])
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = F.interpolate(flat, size, mode="bilinear" if smooth else "nearest-exact")
    return flat[:, 0, : image[0], : image[1]].reshape(*maps.shape[:-2], *image)


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights, in evaluation mode, to put hooks on."""
    model = getattr(model, "_orig_mod", model)  # the module inside torch.compile's wrapper
    if not _stages(model):
        raise TypeError(f"{type(model).__name__} holds no Swin of this package; load one with load_checkpoint()")
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


def _check_stage(stage: int, model: nn.Module) -> int:
    """The number of a stage from 0; a negative one is counted from the last."""
    count = len(_stages(model))
    if not -count <= stage < count:
        raise ValueError(f"stage {stage} does not exist; the model has stages 0 to {count - 1}")
    return stage % count


def _logits(outputs: Any, model: nn.Module, pixel: Pair | None, size: Pair) -> Tensor:
    """Logits ``(B, classes)`` of a model's output; of a segmenter, those of a pixel of the images, or their mean."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 4:
        whole = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        logits = whole.mean(dim=(2, 3)) if pixel is None else whole[:, :, pixel[0], pixel[1]]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(f"{type(model).__name__} gives no logits; give a classifier or a segmenter")
    return require_finite(logits)


def _targets(target: int | Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    """Class number for each image, ``(B,)``."""
    images, classes = logits.shape
    if target is None:
        return logits.argmax(dim=-1)
    targets = torch.as_tensor(target, device=logits.device)
    if targets.numel() not in (1, images) or targets.ndim > 1 or targets.is_floating_point():
        raise ValueError(f"target is {target!r}; give one class number, or one for each of the {images} images")
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise ValueError(f"target is {target!r}; the model has classes 0 to {classes - 1}")
    return targets.long().expand(images)
