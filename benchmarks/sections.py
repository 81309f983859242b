"""What is measured: whole models, attention alone, the data pipeline, the start, and training against the Trainer."""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_hf import SwinHFConfig
from swin_hf.counting import count_macs

from .clock import ceilings, peak_memory, take_turns
from .foreign import measure_loading, measure_replace
from .peers import build_ours, build_peer, disagreement, gradients_of, logits_of, true_gradients
from .pipeline import measure_epoch, measure_pipeline
from .shortcuts import measure_shortcuts

SECTIONS = ("models", "shortcuts", "attention", "pipeline", "start", "loading", "replace", "trainer", "epoch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}
# Two libraries sum in different orders: 1e-6 in fp32 was seen. In bf16, 0.01 to 0.02 was seen, and with the weights of
# `build_ours` 0.25 and more without bias, without mask, without scale or with equal attention to all.
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2, "amp": 6e-2}
# Of gradients: 0.08 was seen under autocast, 0.8 and more where something is missing.
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "amp": 0.25}


def said(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def model_call(model: nn.Module, setting: dict[str, Any], images: Tensor, labels: Tensor) -> Callable[[], Any]:
    """One forward pass, or one training step, of a model as the setting says."""
    device, execution = setting["device"], setting["execution"]
    training = setting["mode"] == "training"
    autocast = setting["dtype"] == "amp" or (training and setting["dtype"] == "bf16")
    model = model.to(device, torch.float32 if autocast else DTYPES[setting["dtype"]]).train(training)
    images = images.to(device, torch.float32 if autocast else DTYPES[setting["dtype"]])
    labels = labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if training else None
    run = model
    if execution != "eager":
        run = torch.compile(model, mode="reduce-overhead" if execution == "graphs" else "default")

    def context() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()

    def infer() -> Tensor:
        with torch.inference_mode(), context():
            return logits_of(run(images))

    def train() -> None:
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=True)
        with context():
            loss = F.cross_entropy(logits_of(run(images)).float(), labels)
        loss.backward()
        optimizer.step()

    return train if training else infer


def measure_models(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Compare and time all peers in one setting."""
    torch.manual_seed(0)
    ours = build_ours(setting["preset"])
    config, batch = ours.config, setting["batch_size"]
    images = torch.randn(batch, config.num_channels, *config.image_hw)
    labels = torch.randint(config.num_labels, (batch,))
    flops = 2 * count_macs(config, type(ours)) * (3 if setting["mode"] == "training" else 1) * batch
    models: dict[str, nn.Module] = {"swin_hf": ours}
    left_out = {}
    for name in options.peers:
        if name != "swin_hf":
            try:
                models[name] = build_peer(name, ours)
            except Exception as error:
                left_out[name] = said(error)

    probe, training = images[:2], setting["mode"] == "training"
    definition = copy.deepcopy(ours).eval()
    definition.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = definition(probe).logits
    gradients = true_gradients(definition, setting["device"], images, labels) if training else {}
    tolerance = (GRADIENT_TOLERANCE if training else TOLERANCE)[setting["dtype"]]
    calls, differences = {}, {}
    for name, model in models.items():
        try:
            with torch.inference_mode():
                difference = disagreement(logits_of(model.eval()(probe)), logits)
            if difference > TOLERANCE["fp32"]:
                left_out[name] = f"its outputs differ from ours by {difference:.1e}, with the same weights in fp32"
                continue
            call = model_call(model, setting, images, labels)
            output = call()
            if training:
                theirs = gradients_of(model)
                difference = max(disagreement(theirs[key], value) for key, value in gradients.items())
            else:
                difference = disagreement(output[: len(probe)], logits)
        except Exception as error:  # out of memory, a compiler that fails: the others are measured all the same
            left_out[name] = said(error)
            continue
        if not difference <= tolerance:
            left_out[name] = f"it differs from our fp32 definition by {difference:.1e} in this setting"
            continue
        calls[name], differences[name] = call, difference
    del definition
    if "swin_hf" not in calls:
        raise RuntimeError(f"swin_hf: {left_out['swin_hf']}")

    rows = []
    with options.turn():
        dtype = torch.bfloat16 if setting["dtype"] == "amp" else DTYPES[setting["dtype"]]
        limits = ceilings(setting["device"], dtype)
        times = take_turns(calls, setting["device"], options.seconds)
        memory = {name: peak_memory(call, setting["device"]) for name, call in calls.items()}
    for name, values in times.items():
        fastest = min(values)
        rows.append(
            {
                "name": name,
                "median_ms": round(statistics.median(values) * 1e3, 3),
                "min_ms": round(fastest * 1e3, 3),
                "images_per_s": round(batch / fastest, 2),
                "ours_is_faster_by": round(fastest / min(times["swin_hf"]), 3),
                "share_of_matmul_limit": round(flops / fastest / 1e12 / limits["matmul_tflops"], 3),
                "peak_memory_mib": memory[name],
                "difference": differences[name],
                "rounds": len(values),
            }
        )
    return {"gflops_per_call": round(flops / 1e9, 2), "ceilings": limits, "rows": rows, "left_out": left_out}


def measure_attention(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time window attention alone, without its linear layers, in the shapes of the first two stages."""
    from swin_hf.model.modeling_swin_hf import SwinHFAttention
    from swin_hf.model.windows import window_geometry

    device, dtype = setting["device"], DTYPES[setting["dtype"]]
    config = SwinHFConfig.from_preset(setting["preset"], drop_path_rate=0.0)
    limits = ceilings(device, dtype)
    rows, left_out = [], {}
    for stage in (0, 1):
        dim, heads, window = config.stage_dims[stage], config.num_heads[stage], config.stage_windows[stage]
        grid = (config.grid_hw[0] >> stage, config.grid_hw[1] >> stage)
        geometry = window_geometry(grid, window, shifted=True)
        x = torch.randn(setting["batch_size"], *geometry.padded, 3 * dim, device=device, dtype=dtype)
        grad = torch.randn(*x.shape[:-1], dim, device=device, dtype=dtype)
        table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads)
        forward, backward, truth = {}, {}, None
        for backend in ("eager", "sdpa", "triton"):
            chosen = copy.deepcopy(config)
            chosen._attn_implementation = backend
            layer = SwinHFAttention(chosen, dim, heads, window)
            layer.relative_position_bias_table.data.copy_(table)
            layer.to(device, dtype)
            layer.qkv, layer.proj = nn.Identity(), nn.Identity()
            infer, differentiate = attending(layer, x, grad, geometry)
            try:
                outcome = [tensor.float().cpu() for tensor in (infer(), *differentiate())]
            except NotImplementedError as error:
                left_out[backend] = str(error)
                continue
            truth = truth or outcome
            difference = max(disagreement(ours, true) for ours, true in zip(outcome, truth, strict=True))
            if not difference <= TOLERANCE[setting["dtype"]]:
                left_out[backend] = f"it differs from eager by {difference:.1e}"
                continue
            forward[backend], backward[backend] = infer, differentiate
        # What must be read and written at least, in units of the output: qkv and the output; for the backward qkv, the
        # gradient of the output, and that of qkv.
        for direction, calls, units in (("forward", forward, 4), ("backward", backward, 7)):
            for name, values in take_turns(calls, device, options.seconds / 4).items():
                rows.append(
                    {
                        "name": f"{name}, stage {stage + 1}, {direction}",
                        "median_ms": round(statistics.median(values) * 1e3, 3),
                        "min_ms": round(min(values) * 1e3, 3),
                        "share_of_copy_limit": round(units * grad.nbytes / min(values) / 1e9 / limits["copy_gbs"], 3),
                        "rounds": len(values),
                    }
                )
    return {"ceilings": limits, "rows": rows, "left_out": left_out}


def attending(
    layer: nn.Module, x: Tensor, grad: Tensor, geometry: Any
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """The forward pass without gradients, and the backward alone, with respect to qkv and the bias table."""
    inputs = (x.detach().clone().requires_grad_(), layer.relative_position_bias_table)

    def infer() -> Tensor:
        with torch.inference_mode():
            return layer(x, geometry)[0]

    graph: list[Tensor] = []  # of one forward pass, made when it is first needed

    def differentiate() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(layer(inputs[0], geometry)[0])
        return torch.autograd.grad(graph[0], inputs, grad, retain_graph=True)

    return infer, differentiate


def measure_start(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of ``import swin_hf`` in a new process, and of ``from_pretrained`` of swin_base."""

    def importing(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3)]
        return round(min(float(run.stdout.split()[-1]) for run in runs), 3)

    auto = "import torch; from transformers import AutoModelForImageClassification"
    statements = {
        "import swin_hf": "import swin_hf",
        "import torch, and AutoModel of transformers": auto,
        "the same, and PreTrainedModel, which every model class needs": f"{auto}, PreTrainedModel",
    }
    rows = [{"name": name, "seconds": importing(statement)} for name, statement in statements.items()]
    preset = "swin_base_patch4_window7_224"
    ours = build_ours(preset)
    ours.config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        models = {"swin_hf": ours, "transformers": build_peer("transformers", ours)}
        for name, model in models.items():
            model.save_pretrained(Path(folder) / name)
        kinds = {name: type(model) for name, model in models.items()}
        loads = {
            name: (lambda name=name, kind=kind: kind.from_pretrained(Path(folder) / name))
            for name, kind in kinds.items()
        }
        for name, values in take_turns(loads, "cpu", 5.0, least=3).items():
            rows.append({"name": f"from_pretrained of swin_base, {name}", "seconds": round(min(values), 3)})
    return {"rows": rows, "left_out": {}}


def measure_trainer(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch and accuracy, against transformers' Swin under its Trainer."""
    from .trainer import RECIPES, compare

    recipe = dataclasses.replace(RECIPES[setting["recipe"]], epochs=setting["epochs"])
    return {"rows": compare(recipe, setting["rounds"]), "left_out": {}}


MEASURE = {
    "models": measure_models,
    "shortcuts": measure_shortcuts,
    "attention": measure_attention,
    "pipeline": measure_pipeline,
    "start": measure_start,
    "loading": measure_loading,
    "replace": measure_replace,
    "trainer": measure_trainer,
    "epoch": measure_epoch,
}


def settings_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything that the options ask for, one setting after the other."""
    for section in options.sections:
        if section in ("pipeline", "start", "loading", "replace"):
            yield {"section": section, "device": "cpu"}
            continue
        if section == "trainer":
            how = {"epochs": options.trainer_epochs, "rounds": options.trainer_rounds}
            yield from ({"section": section, "device": "cpu", "recipe": recipe, **how} for recipe in options.recipes)
            continue
        if section == "epoch":
            sizes = {"fashion_mnist": 60_000, "jpeg_folder": 2_000}
            for data in options.epoch_data:
                count = min(options.epoch_pictures or sizes[data], sizes[data])
                how = {"pictures": count, "epochs": options.epochs, "rounds": options.trainer_rounds}
                how["workers"] = options.workers
                yield {"section": section, "device": "cpu", "data": data, **how}
            continue
        for device, preset, dtype in itertools.product(options.devices, options.presets, options.dtypes):
            batches = options.batch_sizes or ([128, 256] if device == "cuda" else [1, 8, 32])
            place = {"section": section, "device": device, "preset": preset, "dtype": dtype}
            if section == "attention":
                if dtype != "amp":
                    yield {**place, "batch_size": max(batches) if device == "cuda" else min(8, max(batches))}
                continue
            executions = options.executions if section == "models" else ["eager"]
            for mode, execution, batch in itertools.product(options.modes, executions, batches):
                yield {**place, "mode": mode, "execution": execution, "batch_size": batch}
