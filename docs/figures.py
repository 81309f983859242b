"""Draws the figures of ``docs/swin.md`` from the functions of ``swin_hf/model/`` that the model itself runs.

``python docs/figures.py docs/figures`` writes the pictures and ``figures.json``, the numbers that they show. The folder
``zh-CN`` has the same pictures with the labels of ``chinese.json``, drawn where a Chinese font is installed (Debian:
fonts-wqy-zenhei).
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinV2HFConfig, SwinV2HFForImageClassification
from swin_hf.counting import count_macs, count_parameters
from swin_hf.explain import attention_maps, save_figure
from swin_hf.model.modeling_swin_hf import SwinHFAttention, SwinHFPatchMerging
from swin_hf.model.windows import (
    Pair,
    WindowGeometry,
    cyclic_shift,
    gather_neighbours,
    log_spaced_offsets,
    pad_to_windows,
    region_map,
    relative_coordinates,
    relative_position_index,
    shift_mask,
    window_geometry,
    window_partition,
    window_reverse,
)

# Each figure is a function that computes what is drawn, as plain lists and numbers that figures.json keeps and a test
# compares, and a function that draws it.

# Light tints that black text stays legible on; distinct for colour-blind readers too (after Okabe and Ito).
TINTS = ("#f7d9a3", "#bfe3f5", "#a8dcc8", "#fbf3a0", "#b5cfe6", "#f3c0a0", "#e8c6dc", "#d9d9d9", "#c9c3ea")
WINDOW_LINE: dict[str, Any] = {"color": "#c1272d", "linewidth": 2.2}
CHINESE_FONT = "WenQuanYi Zen Hei"
PHOTOGRAPH = Path(__file__).parent / "figures" / "cat.jpg"
LABELS = Path(__file__).parent / "figures" / "chinese.json"

LESSON_MAP = (8, 8)  # the map of the lesson, in tokens
LESSON_WINDOW = (4, 4)  # and its window; both as in figures 2 and 4 of the paper
PLAIN = window_geometry(LESSON_MAP, LESSON_WINDOW, shifted=False)
SHIFTED = window_geometry(LESSON_MAP, LESSON_WINDOW, shifted=True)


def attention_cost(grid: Pair, channels: int, window: Pair | None = None) -> int:
    """Multiply-additions of one attention layer, equations 1 and 2 of the paper.

    ``4 h w C^2 + 2 (h w)^2 C`` for global attention, ``4 h w C^2 + 2 M^2 h w C`` for windows of M by M.

    Args:
        grid: Height and width of the map in tokens.
        channels: C.
        window: Height and width of a window in tokens; None for global attention.
    """
    tokens = grid[0] * grid[1]
    seen = tokens if window is None else window[0] * window[1]
    return 4 * tokens * channels**2 + 2 * tokens * seen * channels


def architecture_data() -> dict[str, Any]:
    """The maps of Swin-T, as they leave the parts of a model that runs on an image of 224x224."""
    config = SwinHFConfig.from_preset("swin_tiny_patch4_window7_224")
    with torch.device("meta"):  # shapes only
        model: Any = SwinHFForImageClassification(config).eval()
    parts: list[dict[str, Any]] = []

    def watch(name: str, module: nn.Module, **facts: Any) -> None:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            shape = list((output[0] if isinstance(output, tuple) else output).shape[1:])
            parts.append({"part": name, "shape": shape, **facts})

        module.register_forward_hook(record)

    watch("embedding", model.swin.embeddings)
    for stage in model.swin.stages:
        window = stage.blocks[0].window[0]
        watch("stage", stage, blocks=len(stage.blocks), heads=stage.blocks[0].attention.num_heads, window=window)
        if stage.downsample is not None:
            watch("merging", stage.downsample)
    watch("norm", model.swin.norm)
    watch("classifier", model.classifier)
    with torch.no_grad():
        model(torch.empty(1, 3, *config.image_hw, device="meta"))
    return {"image": [*config.image_hw, 3], "patch": config.patch_hw[0], "parts": parts}


def draw_architecture(data: dict[str, Any]) -> Figure:
    """The whole network: four stages, and the shape of the map between its parts."""
    figure, axes = _figure(1, 1, width=10.4, height=3.4)
    ax = axes[0][0]
    entries = [part for part in data["parts"] if part["part"] in ("embedding", "merging")]
    stages = [part for part in data["parts"] if part["part"] == "stage"]
    _draw_box(ax, (-0.45, 2), (1.75, 2.2), f"image\n{'x'.join(map(str, data['image']))}", "white")
    for number, (entry, stage) in enumerate(zip(entries, stages, strict=True)):
        left = 2.2 + 4.35 * number
        ax.add_patch(Rectangle((left - 0.3, 0.75), 4.0, 4.7, fill=False, edgecolor="#8a8a8a", linestyle="--"))
        height, width, channels = stage["shape"]
        ax.text(left + 1.7, 5.1, f"stage {number + 1}", ha="center", va="center", fontsize=10)
        text = f"patch\nembedding\n{data['patch']}x{data['patch']}" if number == 0 else "patch\nmerging\n2x2"
        _draw_box(ax, (left, 2), (1.5, 2.2), text, TINTS[0 if number == 0 else 1])
        blocks = f"{stage['blocks']} blocks\n{stage['heads']} heads\nM = {stage['window']}"
        _draw_box(ax, (left + 2.0, 2), (1.4, 2.2), blocks, TINTS[2])
        _draw_arrow(ax, (left - 0.75, 3.1), (left, 3.1))
        _draw_arrow(ax, (left + 1.4, 3.1), (left + 2.0, 3.1))
        _draw_arrow(ax, (left + 3.4, 3.1), (left + 4.0, 3.1))
        ax.text(left + 1.7, 1.3, f"{height}x{width}x{channels}", ha="center", va="center", fontsize=10)
        if entry["shape"] != stage["shape"]:
            raise ValueError(f"the blocks of stage {number + 1} changed the shape of the map")
    left = 2.2 + 4.35 * len(stages)
    classes = data["parts"][-1]["shape"][0]
    _draw_box(ax, (left - 0.35, 2), (1.75, 2.2), f"LayerNorm,\nmean,\nlinear:\n{classes} scores", TINTS[6])
    ax.set_xlim(-0.6, left + 1.7)
    ax.set_ylim(0.4, 5.7)
    _bare(ax)
    ax.set_title("Swin-T: height x width x channels of the map in each stage", fontsize=11)
    return figure


def _blocks_data(config: Any, model_class: Any) -> dict[str, Any]:
    """What happens in the first two blocks of a model, in the order in which it happens."""
    with torch.device("meta"):
        model: Any = model_class(config).eval()
    blocks: list[dict[str, Any]] = []
    for block in model.swin.stages[0].blocks:
        steps: list[str] = []
        facts: dict[str, Any] = {"steps": steps, "hidden": block.mlp.fc1.out_features}
        blocks.append(facts)
        for name in ("norm1", "attention", "norm2", "mlp"):
            block.get_submodule(name).register_forward_hook(lambda *_, name=name, steps=steps: steps.append(name))

        def ask(_: nn.Module, args: Any, __: Any) -> Any:
            return args[:2], {"output_attentions": True}

        def record(_: nn.Module, args: Any, output: Any, facts: dict[str, Any] = facts) -> None:
            x, geometry = args[:2]
            facts["map"], facts["shift"] = list(x.shape[1:]), list(geometry.shift)
            windows = geometry.num_windows[0] * geometry.num_windows[1]
            facts["windows"], facts["scores"] = [windows, geometry.area, x.shape[-1]], list(output[1].shape)

        block.attention.register_forward_pre_hook(ask, with_kwargs=True)
        block.attention.register_forward_hook(record)
    with torch.no_grad():
        model(torch.empty(1, 3, *config.image_hw, device="meta"))
    return {"blocks": blocks}


def block_pair_data() -> dict[str, Any]:
    """The first two blocks of Swin-T."""
    return _blocks_data(SwinHFConfig.from_preset("swin_tiny_patch4_window7_224"), SwinHFForImageClassification)


def block_v2_data() -> dict[str, Any]:
    """The first two blocks of Swin V2-T."""
    config = SwinV2HFConfig.from_preset("swinv2_tiny_patch4_window8_256")
    return _blocks_data(config, SwinV2HFForImageClassification)


def draw_blocks(data: dict[str, Any]) -> Figure:
    """Two blocks, side by side, each read from top to bottom."""
    figure, axes = _figure(1, 2, width=10.4, height=5.6)
    for ax, block in zip(axes[0], data["blocks"], strict=True):
        height, width, channels = block["map"]
        shape = f"{height}x{width}x{channels}"
        shift = block["shift"]
        kind = "SW-MSA" if any(shift) else "W-MSA"
        windows, area, _ = block["windows"]
        notes = {
            "norm1": shape,
            "norm2": shape,
            "attention": f"{windows} windows of {area} tokens\nshifted by {shift[0]}, {shift[1]}\n"
            f"scores {'x'.join(map(str, block['scores']))}",
            "mlp": f"{channels} → {block['hidden']} → {channels}",
        }
        names = {"norm1": "LayerNorm", "norm2": "LayerNorm", "attention": kind, "mlp": "MLP"}
        tints = {"norm1": TINTS[7], "norm2": TINTS[7], "attention": TINTS[2], "mlp": TINTS[0]}
        y = 10.0
        ax.text(0, y + 0.75, shape, ha="center", va="center", fontsize=10)
        for branch in (block["steps"][:2], block["steps"][2:]):
            ax.plot((0, 2.7, 2.7, 0.28), (y, y, y - 4.0, y - 4.0), color="#404040", linewidth=1.2)
            for step in branch:
                _draw_arrow(ax, (0, y + 0.35), (0, y - 0.35))
                _draw_box(ax, (-1.5, y - 1.35), (3.0, 1.0), names[step], tints[step])
                ax.text(-1.75, y - 0.85, notes[step], ha="right", va="center", fontsize=9)
                y -= 1.7
            y -= 0.6
            _draw_arrow(ax, (0, y + 0.95), (0, y + 0.25))
            circle = {"boxstyle": "circle", "facecolor": "white"}
            ax.text(0, y, "+", ha="center", va="center", fontsize=13, bbox=circle, zorder=9)
            y -= 0.4
        _draw_arrow(ax, (0, y + 0.2), (0, y - 0.5))
        ax.set_xlim(-6.2, 3.3)
        ax.set_ylim(y - 0.8, 11.2)
        _bare(ax)
        ax.set_title(f"block with {kind}", fontsize=11)
    return figure


def model_cost_data() -> dict[str, Any]:
    """What Swin-T computes and how many weights it has, with windows of 7x7 and with one window for the whole map."""
    preset, sides = "swin_tiny_patch4_window7_224", (112, 224, 336)
    windows = [SwinHFConfig.from_preset(preset, image_size=side) for side in sides]
    whole = [SwinHFConfig.from_preset(preset, image_size=side, window_size=side // 4) for side in sides]

    def tables(config: SwinHFConfig) -> int:
        sides_and_heads = zip(config.stage_windows, config.num_heads, config.depths, strict=True)
        return sum((2 * window[0] - 1) * (2 * window[1] - 1) * heads * n for window, heads, n in sides_and_heads)

    found: dict[str, Any] = {"sides": list(sides)}
    for name, configs in (("windows", windows), ("whole", whole)):
        weights = [count_parameters(config, SwinHFForImageClassification) for config in configs]
        found[f"{name} GMACs"] = [
            round(count_macs(config, SwinHFForImageClassification) / 1e9, 2) for config in configs
        ]
        found[f"{name} weights"] = [n - tables(config) for n, config in zip(weights, configs, strict=True)]
        found[f"{name} tables"] = [tables(config) for config in configs]
    return found


def draw_model_cost(data: dict[str, Any]) -> Figure:
    """Windows save computation, not weights."""
    figure, axes = _figure(1, 2, width=10.4, height=3.6)
    for ax, unit, title in zip(
        axes[0],
        ("GMACs", "weights"),
        ("billions of multiply-additions, counted", "millions of weights, without bias tables"),
        strict=True,
    ):
        for offset, name, colour, label in (
            (-0.2, "whole", "#c1272d", "attention over the whole map"),
            (0.2, "windows", "#1f4e9c", "windows of 7x7"),
        ):
            values = [value if unit == "GMACs" else value / 1e6 for value in data[f"{name} {unit}"]]
            bars = ax.bar([place + offset for place in range(len(values))], values, 0.38, color=colour, label=label)
            ax.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=9)
        ax.set_xticks(range(len(data["sides"])), data["sides"], fontsize=9)
        ax.set_xlabel("side of the image in pixels", fontsize=10)
        ax.set_title(title, fontsize=10)
        ax.margins(y=0.15)
    axes[0][0].legend(fontsize=9, loc="upper left")
    figure.suptitle("Swin-T", fontsize=11)
    return figure


def pyramid_data() -> dict[str, Any]:
    """The maps of ViT-B/16 and of Swin-T for an image of 224x224."""
    config = SwinHFConfig.from_preset("swin_tiny_patch4_window7_224")
    grid, stages = config.grid_hw, []
    for stage, channels in enumerate(config.stage_dims):
        geometry = window_geometry(grid, config.stage_windows[stage], shifted=False)
        windows = geometry.num_windows[0] * geometry.num_windows[1]
        stages.append({"grid": grid, "channels": channels, "window": geometry.window, "windows": windows})
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))
    return {"image": config.image_hw, "vit": {"grid": (14, 14), "channels": 768}, "swin": stages}


def draw_pyramid(data: dict[str, Any]) -> Figure:
    """One scale against a pyramid."""
    figure, axes = _figure(2, 4, width=10.4, height=5.9)
    height, width = data["image"]
    vit = data["vit"]
    for column, ax in enumerate(axes[0]):
        _draw_lattice(ax, vit["grid"], (1, 1), data["image"])
        ax.set_title(f"ViT-B/16, layers {3 * column + 1} to {3 * column + 3}", fontsize=10)
        tokens = vit["grid"][0] * vit["grid"][1]
        ax.set_xlabel(f"{_x(vit['grid'])} tokens, C = {vit['channels']}\neach attends to all {tokens}", fontsize=9)
    for number, (ax, stage) in enumerate(zip(axes[1], data["swin"], strict=True), start=1):
        _draw_lattice(ax, stage["grid"], stage["window"], data["image"])
        area = stage["window"][0] * stage["window"][1]
        plural = "windows" if stage["windows"] > 1 else "window"
        ax.set_title(f"Swin-T, stage {number}", fontsize=10)
        cut = f"{stage['windows']} {plural}"
        tokens = f"{_x(stage['grid'])} tokens, C = {stage['channels']}"
        ax.set_xlabel(f"{tokens}\neach attends to {area} ({cut})", fontsize=9)
    figure.suptitle(f"Tokens of a {height}x{width} image: thin lines are tokens, red lines are windows", fontsize=11)
    return figure


def patch_partition_data() -> dict[str, Any]:
    """An image of 8x8 pixels, and its patches of 4x4 as rows of numbers."""
    pixels = torch.arange(64).view(1, 8, 8, 1)
    patches = window_partition(pixels, (4, 4))[..., 0]  # a partition into patches is one into windows of pixels
    return {"pixels": pixels[0, ..., 0].tolist(), "patch": (4, 4), "patches": patches.tolist()}


def draw_patch_partition(data: dict[str, Any]) -> Figure:
    """Patches become rows of numbers."""
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.6))
    colours = _patch_colours(data["pixels"], data["patches"])
    _draw_cells(left, data["pixels"], colours)
    _draw_windows(left, (8, 8), data["patch"])
    left.set_title("1 channel, 8x8 pixels, patches of 4x4", fontsize=10)
    _draw_cells(right, data["patches"], [[index] * 16 for index in range(4)])
    right.set_title("4 tokens of 4 * 4 * 1 = 16 numbers (with RGB: 4 * 4 * 3 = 48)", fontsize=10)
    right.set_ylabel("token", fontsize=10)
    right.set_yticks(range(4), ["0", "1", "2", "3"])
    right.tick_params(axis="y", length=0)
    return figure


def patch_merging_data() -> dict[str, Any]:
    """A 4x4 map of one channel in the model's own patch merging, up to the norm."""
    merging = SwinHFPatchMerging(SwinHFConfig(embed_dim=1, num_heads=(1,), depths=(1,)), dim=1)
    concatenated: list[Tensor] = []
    merging.norm.register_forward_pre_hook(lambda _, args: concatenated.append(args[0][0]))
    before = torch.arange(16.0).view(1, 4, 4, 1)
    merging(before)
    merged = concatenated[0]  # 2, 2, 4
    return {
        "before": before[0, ..., 0].int().tolist(),
        "slices": merged.permute(2, 0, 1).int().tolist(),
        "after": merged.flatten(0, 1).int().tolist(),
    }


def draw_patch_merging(data: dict[str, Any]) -> Figure:
    """The 4x4 example of patch merging."""
    figure = Figure(figsize=(10.4, 3.5), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(2.1, 1, 1, 2.6))
    before = figure.add_subplot(grid[:, 0])
    owner = {number: index for index, part in enumerate(data["slices"]) for row in part for number in row}
    _draw_cells(before, data["before"], [[owner[number] for number in row] for row in data["before"]])
    _draw_windows(before, (4, 4), (2, 2))
    before.set_title("4x4, C = 1", fontsize=10)
    for index, part in enumerate(data["slices"]):
        row, column = index % 2, index // 2  # the reference goes down the columns first
        ax = figure.add_subplot(grid[row, 1 + column])
        _draw_cells(ax, part, [[index] * 2] * 2)
        ax.set_title(f"{index + 1}: [{row}::2, {column}::2]", fontsize=10)
    after = figure.add_subplot(grid[:, 3])
    _draw_cells(after, data["after"], [list(range(4))] * 4)
    after.set_title("2x2 tokens of 4C = 4 numbers:\nLayerNorm, then Linear 4C to 2C", fontsize=10)
    after.set_yticks(range(4), ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"], fontsize=9)
    after.set_xticks(range(4), ["1", "2", "3", "4"], fontsize=10)
    after.tick_params(length=0)
    return figure


def reach_data() -> dict[str, Any]:
    """Which tokens can have learned of one token after a W-MSA block, after two, and after W-MSA and SW-MSA."""
    token = (2, 2)
    start = torch.zeros(1, *LESSON_MAP, 1, dtype=torch.bool)
    start[0, token[0], token[1]] = True
    plain = _spread(start, PLAIN)
    return {
        "token": token,
        "one W-MSA block": plain[0, ..., 0].int().tolist(),
        "two W-MSA blocks": _spread(plain, PLAIN)[0, ..., 0].int().tolist(),
        "W-MSA, then SW-MSA": _spread(plain, SHIFTED)[0, ..., 0].int().tolist(),
    }


def _spread(x: Tensor, geometry: WindowGeometry) -> Tensor:
    """Which tokens attend to a marked one, ``(1, H, W, 1)`` bool: a block with the attention left out."""
    windows = window_partition(cyclic_shift(pad_to_windows(x, geometry), geometry.shift), geometry.window)  # nW, N, 1
    visible = shift_mask(geometry) == 0  # nW, N, N
    windows = (visible & windows.transpose(1, 2)).any(dim=2, keepdim=True)
    x = window_reverse(windows, geometry.window, geometry.padded)
    return cyclic_shift(x, (-geometry.shift[0], -geometry.shift[1]))


def draw_reach(data: dict[str, Any]) -> Figure:
    """Why windows must shift."""
    figure, axes = _figure(1, 3, width=10.4, height=4.6)
    titles = ("one W-MSA block", "two W-MSA blocks", "W-MSA, then SW-MSA")
    for ax, title in zip(axes[0], titles, strict=True):
        reached = data[title]
        _draw_cells(ax, reached, [[1 if value else None for value in row] for row in reached], text=False)
        _draw_windows(ax, LESSON_MAP, LESSON_WINDOW)
        ax.plot(data["token"][1], data["token"][0], marker="*", markersize=17, color="black")
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(f"{sum(map(sum, reached))} of 64 tokens know of the star", fontsize=10)
    for line in (1.5, 5.5):
        axes[0][2].plot((line, line), (-0.5, 7.5), color="#1f4e9c", linewidth=2, linestyle="--")
        axes[0][2].plot((-0.5, 7.5), (line, line), color="#1f4e9c", linewidth=2, linestyle="--")
    figure.suptitle("Red: windows of W-MSA. Blue, dashed: windows of SW-MSA, displaced by M / 2 = 2", fontsize=11)
    return figure


def cyclic_shift_data() -> dict[str, Any]:
    """The nine regions, numbered in reading order before the shift, and the map after each step."""
    after = region_map(SHIFTED.padded, SHIFTED.window, SHIFTED.shift)
    # The model counts regions in the order after the shift; only their equality matters. People read from the top left.
    after = (after // 3 + 1) % 3 * 3 + (after % 3 + 1) % 3
    rows, columns = SHIFTED.shift

    def move(x: Tensor, shift: Pair) -> Tensor:
        return cyclic_shift(x[None, :, :, None], shift)[0, :, :, 0]

    before = move(after, (-rows, -columns))
    windows = window_partition(after[None, :, :, None], SHIFTED.window)[..., 0]
    return {
        "shift": SHIFTED.shift,
        "window": SHIFTED.window,
        "before": before.tolist(),
        "rows moved": move(before, (rows, 0)).tolist(),
        "after": move(move(before, (rows, 0)), (0, columns)).tolist(),
        "columns moved back": move(after, (0, -columns)).tolist(),
        "back": move(move(after, (0, -columns)), (-rows, 0)).tolist(),
        "regions of each window": [sorted(set(window.tolist())) for window in windows],
    }


def draw_cyclic_shift(data: dict[str, Any]) -> Figure:
    """The cyclic shift step by step, with its regions."""
    figure, axes = _figure(2, 3, width=10.4, height=8.0)
    rows, columns = data["shift"]
    height, width = LESSON_MAP
    contents = [" ".join(map(str, regions)) for regions in data["regions of each window"]]
    panels = (
        ("before", "1. shifted windows cut 9 regions:\nA = 0, C = 1 and 2, B = 3 and 6", ""),
        ("rows moved", f"2. the top {rows} rows, A and C,\nmove to the bottom", ""),
        ("after", f"3. the left {columns} columns, A and B,\nmove to the right", ""),
        ("after", "4. four windows of equal size", "regions: " + " | ".join(contents)),
        ("columns moved back", f"5. after attention the right {columns} columns\nmove back to the left", ""),
        ("back", f"6. the bottom {rows} rows move back to the top:\neach token is in its place", ""),
    )
    for ax, (values, title, note) in zip(axes.flat, panels, strict=True):
        _draw_cells(ax, data[values], data[values])
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(note, fontsize=10)
    for line in (0, rows, rows + data["window"][0], height):
        axes[0][0].plot((-0.5, width - 0.5), (line - 0.5, line - 0.5), **WINDOW_LINE)
    for line in (0, columns, columns + data["window"][1], width):
        axes[0][0].plot((line - 0.5, line - 0.5), (-0.5, height - 0.5), **WINDOW_LINE)
    first = axes[0][0]
    for letter, left, top, wide, high in (
        ("A", 0, 0, columns, rows),
        ("C", columns, 0, width - columns, rows),
        ("B", 0, rows, columns, height - rows),
    ):
        style = {"fill": False, "edgecolor": "#1f4e9c", "linewidth": 2.0, "linestyle": "--"}
        first.add_patch(Rectangle((left - 0.4, top - 0.4), wide - 0.2, high - 0.2, **style))
        place = (left + wide / 2 - 0.5, top + high / 2 - 0.5)
        first.text(*place, letter, ha="center", va="center", fontsize=20, color="#1f4e9c", fontweight="bold")
    _draw_windows(axes[1][0], LESSON_MAP, data["window"])
    return figure


def padding_data() -> dict[str, Any]:
    """A map of 5x7 tokens where windows have 4x4 and merging takes 2x2; padding is 0, a token its number from 1."""
    geometry = window_geometry((5, 7), (4, 4), shifted=True)
    tokens = torch.arange(1, 36).view(1, 5, 7, 1)
    padded = pad_to_windows(tokens, geometry)
    even = F.pad(tokens, (0, 0, 0, 1, 0, 1))
    merged = gather_neighbours(tokens)[0]  # 3, 4, 4
    small = window_geometry((3, 8), (4, 4), shifted=True)
    return {
        "window": geometry.window,
        "padded": padded[0, ..., 0].tolist(),
        "shifted": cyclic_shift(padded, geometry.shift)[0, ..., 0].tolist(),
        "even": even[0, ..., 0].tolist(),
        "merged": merged.tolist(),
        "small": {"grid": small.grid, "window": small.window, "shift": small.shift},
    }


def draw_padding(data: dict[str, Any]) -> Figure:
    """Padding for windows and for merging."""
    figure, axes = _figure(1, 3, width=10.4, height=4.2)
    for ax, name, window, title in zip(
        axes[0],
        ("padded", "shifted", "even"),
        (data["window"], data["window"], (2, 2)),
        (
            "5x7 tokens, windows of 4x4:\npadded to 8x8 with zeros (grey)",
            "then shifted by 2: the padding\nmoves with the map",
            "before merging 2x2:\n5x7 becomes 6x8, then 3x4",
        ),
        strict=True,
    ):
        values = data[name]
        _draw_cells(ax, values, [[None if value else 7 for value in row] for row in values])
        _draw_windows(ax, (len(values), len(values[0])), window)
        ax.set_title(title, fontsize=10)
    return figure


def shift_mask_data() -> dict[str, Any]:
    """The mask of each of the four windows, and what it does to one row of scores."""
    mask = shift_mask(SHIFTED)  # nW, N, N
    scores = torch.linspace(1.0, -1.0, SHIFTED.area)  # made up, the same for every pair
    window, token = 1, 0  # top right window; its first token is left of the seam
    return {
        "mask": mask.int().tolist(),
        "window": window,
        "token": token,
        "scores": _rounded(scores),
        "masked scores": _rounded(scores + mask[window, token]),
        "without mask": _rounded(scores.softmax(dim=0)),
        "with mask": _rounded((scores + mask[window, token]).softmax(dim=0)),
    }


def draw_shift_mask(data: dict[str, Any]) -> Figure:
    """The masks of the four windows, and a row of attention with and without."""
    figure = Figure(figsize=(10.4, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(1.25, 1))
    regions = cyclic_shift_data()["regions of each window"]
    for index, mask in enumerate(data["mask"]):
        ax = figure.add_subplot(grid[0, index])
        picture = ax.imshow(mask, cmap="gray", vmin=-100, vmax=0)
        noun = "regions" if len(regions[index]) > 1 else "region"
        ax.set_title(f"window {index}: {noun} {' '.join(map(str, regions[index]))}", fontsize=10)
        ax.set_xlabel("key token", fontsize=9)
        ax.set_xticks((0, 4, 8, 12))
        ax.set_yticks((0, 4, 8, 12))
        ax.tick_params(labelsize=8)
        if index == 0:
            ax.set_ylabel("query token", fontsize=9)
        ax.axhline(-0.5, color="black", linewidth=0.8)
        if index == data["window"]:
            ax.axhline(data["token"], color=WINDOW_LINE["color"], linewidth=2)
    bar = figure.colorbar(picture, ax=figure.axes, location="right", shrink=0.7, ticks=(-100, 0))
    bar.set_label("added to the scores", fontsize=9)
    keys = range(len(data["scores"]))
    panels = (
        (grid[1, :2], "scores", "masked scores", "scores of the red row"),
        (grid[1, 2:], "without mask", "with mask", "their softmax"),
    )
    for place, plain, masked, title in panels:
        ax = figure.add_subplot(place)
        ax.bar([key - 0.2 for key in keys], data[plain], width=0.4, color="#9a9a9a", label="without mask")
        ax.bar([key + 0.2 for key in keys], data[masked], width=0.4, color="#c1272d", label="with mask")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("key token", fontsize=9)
        ax.set_xticks(list(keys))
        ax.tick_params(labelsize=8)
        if plain == "scores":  # -100 and numbers around 0
            ax.set_yscale("symlog", linthresh=1)
            ax.set_yticks((-100, -10, -1, 0, 1), ("-100", "-10", "-1", "0", "1"))
            ax.axhline(0, color="black", linewidth=0.8)
        else:
            ax.legend(fontsize=9)
    return figure


def relative_position_data() -> dict[str, Any]:
    """Absolute and relative coordinates of a 2x2 window, and the three steps from a pair of numbers to one."""
    window = (2, 2)
    side = window[0]
    coordinates = relative_coordinates(window)  # N, N, 2
    rows, columns = coordinates[..., 0], coordinates[..., 1]
    return {
        "M": side,
        "absolute": [(index // side, index % side) for index in range(side * side)],
        "relative": coordinates.tolist(),
        "row + column": (rows + columns).tolist(),
        "step 1, rows": (rows + side - 1).tolist(),
        "step 1, columns": (columns + side - 1).tolist(),
        "step 2, rows": ((rows + side - 1) * (2 * side - 1)).tolist(),
        "step 3": relative_position_index(window).tolist(),
    }


def draw_relative_coordinates(data: dict[str, Any]) -> Figure:
    """From absolute to relative coordinates, and why the sum of row and column is not enough."""
    figure, axes = _figure(1, 3, width=10.4, height=4.8, width_ratios=(0.62, 1, 1))
    absolute, relative, naive = axes[0]
    side = data["M"]
    pairs = [[str(tuple(data["absolute"][row * side + column])) for column in range(side)] for row in range(side)]
    _draw_cells(absolute, pairs, [[None] * side] * side)
    absolute.set_title("absolute: (row, column)\nof each token, M = 2", fontsize=10)
    offsets = [[tuple(pair) for pair in row] for row in data["relative"]]
    numbered = {offset: index for index, offset in enumerate(sorted({offset for row in offsets for offset in row}))}
    colours = [[numbered[offset] for offset in row] for row in offsets]
    _draw_cells(relative, [[str(offset) for offset in row] for row in offsets], colours)
    relative.set_title("relative: query minus key,\n9 different offsets", fontsize=10)
    _draw_cells(naive, data["row + column"], colours)
    naive.set_title("row + column: only 5 different sums;\nred: shared by two or more offsets", fontsize=10)
    offsets_of: dict[int, set[Any]] = {}
    for line, sums in zip(offsets, data["row + column"], strict=True):
        for offset, value in zip(line, sums, strict=True):
            offsets_of.setdefault(value, set()).add(offset)
    for label in naive.texts:
        if len(offsets_of[int(label.get_text())]) > 1:
            label.set(color=WINDOW_LINE["color"], fontweight="bold")
    for ax in (relative, naive):
        _label_tokens(ax, data["absolute"])
    return figure


def draw_relative_index(data: dict[str, Any]) -> Figure:
    """The three steps to one index."""
    figure, axes = _figure(1, 4, width=10.4, height=3.4)
    side = data["M"]
    colours = data["step 3"]
    both = [
        [f"({row}, {column})" for row, column in zip(rows, columns, strict=True)]
        for rows, columns in zip(data["step 1, rows"], data["step 1, columns"], strict=True)
    ]
    scaled = [
        [f"({row}, {column})" for row, column in zip(rows, columns, strict=True)]
        for rows, columns in zip(data["step 2, rows"], data["step 1, columns"], strict=True)
    ]
    relative = [[f"({row}, {column})" for row, column in line] for line in data["relative"]]
    steps = (
        ("relative coordinates", relative),
        (f"1. add M - 1 = {side - 1} to both", both),
        (f"2. row times 2M - 1 = {2 * side - 1}", scaled),
        ("3. row + column: the index", data["step 3"]),
    )
    for ax, (title, values) in zip(axes[0], steps, strict=True):
        _draw_cells(ax, values, colours, size=9)
        ax.set_title(title, fontsize=10)
    return figure


def relative_rows_data() -> dict[str, Any]:
    """The relative coordinates of a 2x2 window, once for each query, and flattened into a row."""
    coordinates = relative_coordinates((2, 2))  # N, N, 2
    return {"maps": coordinates.view(4, 2, 2, 2).tolist(), "rows": coordinates.tolist()}


def draw_relative_rows(data: dict[str, Any]) -> Figure:
    """Four maps of relative coordinates become the four rows of a 4x4 matrix."""
    figure = Figure(figsize=(10.4, 5.6), layout="constrained")
    grid = figure.add_gridspec(4, 2, width_ratios=(1, 3))
    for query, (square, row) in enumerate(zip(data["maps"], data["rows"], strict=True)):
        left, right = figure.add_subplot(grid[query, 0]), figure.add_subplot(grid[query, 1])
        labels = [[str(tuple(pair)) for pair in line] for line in square]
        colours = [[2 * line + place for place in range(2)] for line in range(2)]
        _draw_cells(left, labels, colours, size=9)
        _draw_cells(right, [[str(tuple(pair)) for pair in row]], [[0, 1, 2, 3]], size=10)
        place = (query // 2, query % 2)
        left.set_ylabel(f"query {place}", fontsize=10)
        left.add_patch(
            Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, fill=False, edgecolor="#c1272d", linewidth=2.5)
        )
        right.set_ylabel(f"row {query}", fontsize=10)
        if query == 0:
            left.set_title("query minus each key, in the window", fontsize=10)
            right.set_title("the same four pairs in one row: key (0, 0), (0, 1), (1, 0), (1, 1)", fontsize=10)
    return figure


def bias_lookup_data() -> dict[str, Any]:
    """The index of a 2x2 window picks numbers of a table; the numbers of the table are made up."""
    table = torch.tensor([0.1, 0.3, -0.2, 0.5, 0.9, 0.4, -0.3, 0.2, 0.0])
    index = relative_position_index((2, 2))
    return {"table": _rounded(table), "index": index.tolist(), "bias": [_rounded(row) for row in table[index]]}


def draw_bias_lookup(data: dict[str, Any]) -> Figure:
    """Index, table and bias of one head."""
    figure, axes = _figure(1, 3, width=10.4, height=4.4, width_ratios=(1, 0.45, 1))
    index, table, bias = axes[0]
    _draw_cells(index, data["index"], data["index"])
    index.set_title("relative position index, fixed", fontsize=10)
    _draw_cells(table, [[value] for value in data["table"]], [[row] for row in range(9)], size=10)
    table.set_yticks(range(9), range(9), fontsize=10)
    table.tick_params(length=0)
    table.set_title("bias table of one head,\nlearned: 9 rows", fontsize=10)
    _draw_cells(bias, data["bias"], data["index"], size=10)
    bias.set_title("B: added to the scores", fontsize=10)
    return figure


def log_offsets_data() -> dict[str, Any]:
    """V2's coordinates of the offsets of a window of 16 for a model that was trained with windows of 8."""
    trained, used = 8, 16
    offsets = log_spaced_offsets((used, used), (trained, trained)).view(2 * used - 1, 2 * used - 1, 2)
    reach = range(-used + 1, used)
    return {
        "trained": trained,
        "offsets": list(reach),
        "linear": [round(offset / (trained - 1), 4) for offset in reach],
        "logarithmic": _rounded(offsets[0, :, 1]),
    }


def draw_log_offsets(data: dict[str, Any]) -> Figure:
    """Logarithmic coordinates extrapolate less."""
    figure, axes = _figure(1, 1, width=7.2, height=3.8)
    ax = axes[0][0]
    known = data["trained"] - 1
    ax.axvspan(-known, known, color="#e4e4e4", label="offsets of a window of 8")
    ax.plot(data["offsets"], data["linear"], color="#c1272d", label="linear")
    ax.plot(data["offsets"], data["logarithmic"], color="#1f4e9c", marker=".", label="logarithmic: V2")
    ax.set_xlabel("offset in tokens", fontsize=10)
    ax.set_ylabel("input of the network", fontsize=10)
    ax.set_title("A window of 16 after training with windows of 8", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return figure


def bias_table_data() -> dict[str, Any]:
    """How many pairs of tokens share each row of the table, for windows of 2x2 and of 7x7."""
    data = {}
    for side in (2, 7):
        window = (side, side)
        rows = (2 * side - 1) ** 2
        pairs = torch.bincount(relative_position_index(window).flatten(), minlength=rows)
        data[f"M = {side}"] = pairs.view(2 * side - 1, 2 * side - 1).tolist()
    return data


def draw_bias_table(data: dict[str, Any]) -> Figure:
    """Why the table has (2M - 1)^2 rows."""
    figure, axes = _figure(1, 2, width=10.4, height=4.9)
    for ax, (name, pairs) in zip(axes[0], data.items(), strict=True):
        span = len(pairs)
        reach = span // 2
        picture = ax.imshow(pairs, cmap="viridis", vmin=0)
        ax.set_xticks(range(span), range(-reach, reach + 1), fontsize=9)
        ax.set_yticks(range(span), range(-reach, reach + 1), fontsize=9)
        ax.set_xlabel("column offset", fontsize=10)
        ax.set_ylabel("row offset", fontsize=10)
        total = (reach + 1) ** 4
        ax.set_title(f"{name}: {span} * {span} = {span * span} rows serve {total} pairs of tokens", fontsize=10)
        most = max(map(max, pairs))
        for row in range(span):
            for column in range(span):
                label = str(row * span + column)
                if span < 5:
                    label = f"row {label}\nused by {pairs[row][column]}"
                colour = "black" if pairs[row][column] > 0.6 * most else "white"
                ax.text(column, row, label, ha="center", va="center", fontsize=10 if span < 5 else 7, color=colour)
        figure.colorbar(picture, ax=ax, shrink=0.8).set_label("pairs of tokens that share the row", fontsize=9)
    return figure


def draw_photograph(picture: Image.Image, pixel: Pair = (80, 86)) -> Figure:
    """What one pixel of a photograph attends to in blocks of Swin-T, with the windows of each block.

    The weights are random: which tokens attend to each other follows from the windows alone.

    Args:
        picture: A square photograph; it is shown at 224x224.
        pixel: Row and column of the pixel.
    """
    config = SwinHFConfig.from_preset("swin_tiny_patch4_window7_224")
    picture = picture.convert("RGB").resize((config.image_hw[1], config.image_hw[0]))
    pixels = torch.from_numpy(np.array(picture)) / 255  # H, W, 3
    images = (pixels - 0.5).permute(2, 0, 1)[None] / 0.25
    blocks = attention_maps(SwinHFForImageClassification(config), images)
    shown = ((0, 0), (0, 1), (1, 0), (2, 1), (3, 1))
    chosen = [block for block in blocks if (block.stage, block.block) in shown]
    figure, axes = _figure(1, 5, width=11.5, height=2.9)
    for ax, block in zip(axes.flat, chosen, strict=True):
        attended = block.to_image(block.from_pixel(*pixel).mean(dim=1))[0] > 0
        ax.imshow(torch.where(attended[..., None], pixels, 0.25 * pixels + 0.75).numpy())
        geometry, cell = block.geometry, block.cell[0]
        for side, shift, draw in zip(geometry.window, geometry.shift, (ax.axhline, ax.axvline), strict=True):
            for line in range((shift or side) * cell, pixels.shape[0], side * cell):
                draw(line - 0.5, **WINDOW_LINE | {"linewidth": 1.0})
        ax.plot(pixel[1], pixel[0], marker="*", markersize=13, color="#00e5ff", markeredgecolor="black")
        kind = "SW-MSA: shifted" if any(geometry.shift) else "W-MSA: regular"
        kind = "one window" if geometry.num_windows == (1, 1) else kind
        ax.set_title(f"stage {block.stage + 1}, block {block.block + 1}\n{kind}", fontsize=10)
        _bare(ax)
    return figure


def attention_cost_data(measured: dict[str, Any]) -> dict[str, Any]:
    """The two formulas at the image sizes that were measured.

    Args:
        measured: What :func:`measure_attention` returned.
    """
    channels, patch, window = measured["channels"], measured["patch"], tuple(measured["window"])
    grids = [(side // patch, side // patch) for side in measured["image sides"]]
    return {
        **measured,
        "global MACs": [attention_cost(grid, channels) for grid in grids],
        "window MACs": [attention_cost(grid, channels, window) for grid in grids],
    }


def measure_attention(image_sides: Sequence[int] = (56, 112, 224, 336, 448, 560, 672)) -> dict[str, Any]:
    """Time one attention layer of the first stage of Swin-T, on the CPU, with windows and without.

    The windowed layer is the model's own, shift and mask included. The global one has the same weights and, in its
    favour, no position bias and torch's fused kernel, which never holds the (hw)^2 scores in memory.

    Args:
        image_sides: Sides of square images in pixels; multiples of the patch.

    Returns:
        The sides, best seconds out of three of both layers, and what was measured where.
    """
    config = SwinHFConfig.from_preset("swin_tiny_patch4_window7_224")
    window, patch = config.stage_windows[0], config.patch_hw[0]
    layer = SwinHFAttention(config, config.embed_dim, config.num_heads[0], window).eval()
    nn.init.normal_(layer.relative_position_bias_table, std=0.02)

    def globally(x: Tensor) -> Tensor:
        query, key, value = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        projected: Tensor = layer.proj(values.flatten(-2))
        return projected

    def windowed(x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        geometry = window_geometry((height, width), window, shifted=True)
        attended: Tensor = layer(pad_to_windows(x, geometry), geometry)[0]
        return attended

    seconds: dict[str, list[float]] = {"global": [], "window": []}
    with torch.inference_mode():
        for side in image_sides:
            x = torch.randn(1, side // patch, side // patch, config.embed_dim)
            seconds["global"].append(_best_time(globally, x))
            seconds["window"].append(_best_time(windowed, x))
    return {
        "image sides": list(image_sides),
        "channels": config.embed_dim,
        "heads": config.num_heads[0],
        "patch": patch,
        "window": window,
        "global seconds": [float(f"{value:.3g}") for value in seconds["global"]],
        "window seconds": [float(f"{value:.3g}") for value in seconds["window"]],
        "hardware": f"{_processor()}, {torch.get_num_threads()} threads",
        "software": f"torch {torch.__version__.split('+')[0]}, float32, batch 1",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _best_time(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 3) -> float:
    run(x)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        run(x)
        times.append(perf_counter() - start)
    return min(times)


def _processor() -> str:
    """Name of the processor, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def draw_attention_cost(data: dict[str, Any]) -> Figure:
    """Formulas and measured time against image size."""
    figure, axes = _figure(1, 2, width=10.4, height=4.3)
    sides = data["image sides"]
    formulas, times = axes[0]
    styles = (
        ("global", "global attention, MSA", "#c1272d", "o"),
        ("window", "window attention, W-MSA", "#1f4e9c", "s"),
    )
    for key, label, colour, marker in styles:
        formulas.plot(sides, [value / 1e9 for value in data[f"{key} MACs"]], color=colour, marker=marker, label=label)
        milliseconds = [value * 1e3 for value in data[f"{key} seconds"]]
        times.plot(sides, milliseconds, color=colour, marker=marker, label=label)
    formulas.set_ylabel("multiply-additions, billions", fontsize=10)
    formulas.set_title("equations 1 and 2 of the paper", fontsize=10)
    times.set_ylabel("milliseconds", fontsize=10)
    times.set_title(f"measured: {data['hardware']}\n{data['software']}, {data['date']}", fontsize=9)
    for ax in (formulas, times):
        ax.set_xlabel("side of the image in pixels", fontsize=10)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xticks(sides, sides, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
    figure.suptitle(
        f"One attention layer, stage 1 of Swin-T: patches of {data['patch']}, C = {data['channels']}, "
        f"{data['heads']} heads, windows of {_x(data['window'])}",
        fontsize=11,
    )
    return figure


# Name of the picture -> what computes its data, and what draws it.
FIGURES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Figure]]] = {
    "architecture": (architecture_data, draw_architecture),
    "block_pair": (block_pair_data, draw_blocks),
    "pyramid": (pyramid_data, draw_pyramid),
    "model_cost": (model_cost_data, draw_model_cost),
    "patch_partition": (patch_partition_data, draw_patch_partition),
    "patch_merging": (patch_merging_data, draw_patch_merging),
    "reach": (reach_data, draw_reach),
    "cyclic_shift": (cyclic_shift_data, draw_cyclic_shift),
    "shift_mask": (shift_mask_data, draw_shift_mask),
    "padding": (padding_data, draw_padding),
    "relative_rows": (relative_rows_data, draw_relative_rows),
    "relative_coordinates": (relative_position_data, draw_relative_coordinates),
    "relative_index": (relative_position_data, draw_relative_index),
    "bias_lookup": (bias_lookup_data, draw_bias_lookup),
    "bias_table": (bias_table_data, draw_bias_table),
    "block_v2": (block_v2_data, draw_blocks),
    "log_offsets": (log_offsets_data, draw_log_offsets),
}


def figure_data() -> dict[str, Any]:
    """What every figure but the measured one draws, as ``figures.json`` holds it."""
    data: dict[str, Any] = json.loads(json.dumps({name: compute() for name, (compute, _) in FIGURES.items()}))
    return data


def draw_figures(folder: str | Path, *, measure: bool = False) -> list[Path]:
    """Draw every figure of ``docs/swin.md``, and write down what is drawn in ``figures.json``.

    Args:
        folder: Where the pictures go. ``attention_cost.json`` in it holds the measured times.
        measure: Measure these times anew, about a minute on two cores, instead of reading them.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: If the times are neither in the folder nor to be measured.
    """
    folder = Path(folder)
    times = folder / "attention_cost.json"
    if not measure and not times.exists():
        raise FileNotFoundError(f"{times} does not exist; measure the times with --measure")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if measure:
        times.write_text(json.dumps(measure_attention(), indent=1) + "\n")
        written.append(times)
    data = figure_data()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in data.items())
    (folder / "figures.json").write_text(f"{{\n{lines}\n}}\n")  # a figure a line: a change shows in a diff
    written.append(folder / "figures.json")
    data["attention_cost"] = attention_cost_data(json.loads(times.read_text()))
    drawings = {name: draw for name, (_, draw) in FIGURES.items()} | {"attention_cost": draw_attention_cost}
    for name, draw in drawings.items():
        written.append(_save(draw(data[name]), folder / f"{name}.png"))
    with Image.open(PHOTOGRAPH) as picture:
        drawn = save_figure(draw_photograph(picture), folder / "attention.png")
    with Image.open(drawn) as picture:
        picture.convert("RGB").save(drawn.with_suffix(".jpg"), quality=88)
    drawn.unlink()
    written.append(drawn.with_suffix(".jpg"))
    if not has_chinese_font():
        return written
    (folder / "zh-CN").mkdir(exist_ok=True)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the font has one weight, and that is fine
    with mpl.rc_context({"font.family": [CHINESE_FONT, "DejaVu Sans"]}):
        for name, draw in drawings.items():
            written.append(_save(translate(draw(data[name])), folder / "zh-CN" / f"{name}.png"))
    return written


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure with a palette of 256 colours: a third of the bytes."""
    save_figure(figure, path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)
    return path


def has_chinese_font() -> bool:
    """Whether the font of the Chinese figures is installed; matplotlib's own list may be older than the font."""
    found = [path for path in font_manager.findSystemFonts() if Path(path).name == "wqy-zenhei.ttc"]
    for path in found:
        font_manager.fontManager.addfont(path)
    return bool(found)


def translate(figure: Figure) -> Figure:
    """Replace the English labels of a figure by those of ``chinese.json``; ``{}`` in it is a number or a name.

    Raises:
        KeyError: If a label has no translation.
    """
    table = json.loads(LABELS.read_text(encoding="utf-8"))
    patterns = {re.escape(english).replace(r"\{\}", "(.+?)"): chinese for english, chinese in table.items()}
    plain = {re.escape(english): chinese for english, chinese in table.items() if "{" not in english}
    patterns = plain | patterns  # a label without numbers first: "row offset" before "row {}"
    for text in figure.findobj(Text):
        label = text.get_text()
        if not re.search("[A-Za-z]{3}", label):
            continue
        found = [(re.fullmatch(pattern, label, re.DOTALL), chinese) for pattern, chinese in patterns.items()]
        match, chinese = next(((match, chinese) for match, chinese in found if match), (None, ""))
        if match is None:
            raise KeyError(f"the label {label!r} is not in {LABELS.name}; add its translation")
        text.set_text(chinese.format(*match.groups()))
    return figure


def _figure(rows: int, columns: int, *, width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` by ``height`` inches and its axes, ``(rows, columns)``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _draw_cells(ax: Axes, values: Any, colours: Any, *, text: bool = True, size: float | None = None) -> None:
    """Draw a table of cells; ``colours`` are positions in :data:`TINTS` or None for white."""
    rows, columns = len(values), len(values[0])
    for row in range(rows):
        for column in range(columns):
            colour = colours[row][column]
            face = "white" if colour is None else TINTS[colour % len(TINTS)]
            corner = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, facecolor=face, edgecolor="#707070", linewidth=0.7))
            if text:
                label = str(values[row][column])
                ax.text(column, row, label, ha="center", va="center", fontsize=size or (12 if len(label) < 3 else 10))
    ax.set_xlim(-0.55, columns - 0.45)
    ax.set_ylim(rows - 0.45, -0.55)
    ax.set_aspect("equal")
    _bare(ax)


def _draw_windows(ax: Axes, size: Pair, window: Pair) -> None:
    """Draw the borders of windows over cells."""
    for line in range(0, size[0] + 1, window[0]):
        ax.plot((-0.5, size[1] - 0.5), (line - 0.5, line - 0.5), **WINDOW_LINE)
    for line in range(0, size[1] + 1, window[1]):
        ax.plot((line - 0.5, line - 0.5), (-0.5, size[0] - 0.5), **WINDOW_LINE)


def _draw_lattice(ax: Axes, grid: Pair, window: Pair, image: Pair) -> None:
    """Draw a grid of tokens over the extent of an image, and its windows; a window of one token is none."""
    height, width = image
    ax.set_xlim(-2, width + 2)
    ax.set_ylim(height + 2, -2)
    ax.set_aspect("equal")
    _bare(ax)
    for axis, (count, length) in enumerate(zip(grid, image, strict=True)):
        draw = ax.hlines if axis == 0 else ax.vlines
        other = image[1 - axis]
        draw([length * index / count for index in range(count + 1)], 0, other, color="#8a8a8a", linewidth=0.5)
        if window != (1, 1) and list(window) != [1, 1]:
            borders = [length * index / count for index in range(0, count + 1, window[axis])]
            draw(borders, 0, other, color=WINDOW_LINE["color"], linewidth=1.5)


def _label_tokens(ax: Axes, tokens: Any) -> None:
    names = [f"({row}, {column})" for row, column in tokens]
    ax.set_xticks(range(len(names)), names, fontsize=9)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_xlabel("key", fontsize=10)
    ax.set_ylabel("query", fontsize=10)
    ax.tick_params(length=0)


def _draw_box(ax: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.12", "facecolor": colour, "edgecolor": "#505050"}
    ax.add_patch(FancyBboxPatch(corner, *size, **style))
    ax.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", fontsize=8.5)


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#404040", "linewidth": 1.2})


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _patch_colours(pixels: Any, patches: Any) -> list[list[int]]:
    owner = {number: index for index, patch in enumerate(patches) for number in patch}
    return [[owner[number] for number in row] for row in pixels]


def _x(pair: Sequence[int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figures of ``docs/swin.md``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "folder", nargs="?", default="docs/figures", help="where the pictures go (default: %(default)s)"
    )
    parser.add_argument("--measure", action="store_true", help="measure the times of attention_cost.png anew")
    args = parser.parse_args(argv)
    for path in draw_figures(args.folder, measure=args.measure):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
