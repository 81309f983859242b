"""Measure swin_hf beside transformers, timm and torchvision: same weights, same process, turn and turn about.

    python recipes/benchmark.py                                    # the whole table on this machine, 15 minutes at most
    python recipes/benchmark.py --sections models --modes inference --batch-sizes 1 8 --limit 120
    python recipes/benchmark.py --sections attention models --limit 540   # on a GPU: what is promised comes first
    python recipes/benchmark.py --sections trainer --recipes fashion_mnist --limit 3600   # beside transformers' Trainer
    python recipes/benchmark.py --render-only --readme README.md   # no measurement: the table from docs/speed.json

A setting is a preset, a device, a dtype, a mode, an execution and a batch size. In each, the outputs of all peers, in
training their gradients, are compared with our definition in fp32 before any is timed, and one that computes something
else is reported and left out. Weights are such that attention is peaked, so that a lost bias, mask or scale would show.
Then they take turns (A B C, A B C, ...), so that a machine that slows down slows all of them. A ratio above 1 means
that we are faster; it divides the fastest rounds, which other programs disturb least. The limit is this machine's own
large matrix product in the same run. A result whose median is far above its minimum was disturbed by other programs: it
is marked, holds no promise and stays out of the README. Training is a whole step: forward, cross-entropy, backward,
AdamW, without stochastic depth; in bf16 and amp it runs under autocast. Inference in bf16 has bf16 weights; amp is
autocast. Settings about which something is promised come first; those that fail or that the time limit cuts off are
listed.

Results are merged into --json, setting by setting, each with hardware, versions and date.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import io
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, is talkative

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from swin_hf import SwinHFConfig, SwinHFForImageClassification, export_checkpoint, list_presets

PEERS = ("swin_hf", "transformers", "timm", "torchvision")
SECTIONS = ("models", "attention", "pipeline", "start", "trainer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}
# Two libraries sum in different orders: 1e-6 in fp32 was seen. In bf16, 0.01 to 0.02 was seen, and with the weights of
# `build_ours` 0.25 and more without bias, without mask, without scale or with equal attention to all.
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2, "amp": 6e-2}
# Of gradients: 0.08 was seen under autocast, 0.8 and more where something is missing.
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "amp": 0.25}
# Median over minimum of a quiet machine; rounds of 60 ms and more were seen to stay below 1.25 on one.
STEADY = 1.3
UNITS = ("ms", "epoch_s")
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

TINY, BASE_384 = "swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384"
# What the project promises: (preset, device, mode, execution, dtype, batch size) -> ours against which peers, at least.
TARGETS = {
    (TINY, "cpu", "inference", "eager", "fp32", 1): ("best", 1.15),
    (TINY, "cpu", "inference", "eager", "fp32", 8): ("best", 1.2),
    (TINY, "cpu", "inference", "eager", "fp32", 32): ("best", 1.3),
    (TINY, "cpu", "training", "eager", "fp32", 8): ("best", 1.05),
    (TINY, "cpu", "inference", "compiled", "fp32", 8): ("best", 1.05),
    (TINY, "cuda", "inference", "compiled", "bf16", 128): ("timm", 1.3),
    (TINY, "cuda", "inference", "compiled", "bf16", 256): ("timm", 1.3),
    (TINY, "cuda", "training", "compiled", "bf16", 128): ("timm", 1.25),
    (TINY, "cuda", "inference", "eager", "amp", 128): ("timm", 2.0),
    (BASE_384, "cuda", "inference", "compiled", "bf16", 128): ("timm", 1.2),
    (BASE_384, "cuda", "training", "compiled", "bf16", 128): ("timm", 1.2),
    (BASE_384, "cuda", "inference", "eager", "amp", 128): ("timm", 1.2),
}
# Share of the copy bandwidth that the kernel alone reaches at least.
KERNEL_TARGETS = {"forward": 0.65, "backward": 0.55}
TRAINER_TARGET = ("transformers", 1.11)  # an epoch of Fashion-MNIST in 0.9 times the time


class OutOfTime(BaseException):
    """The limit has passed; what is measured by then is kept. Not an Exception, which compilers catch."""


# ---------------------------------------------------------------------------------------------------- the peers


def build_ours(preset: str) -> SwinHFForImageClassification:
    """Our model with random weights and 1000 classes, without stochastic depth, which would hide what is compared."""
    config = SwinHFConfig.from_preset(preset, num_labels=1000, drop_path_rate=0.0)
    config._attn_implementation = "auto"
    return sharpen(SwinHFForImageClassification(config))


@torch.no_grad()
def sharpen(model: nn.Module) -> Any:
    """Make attention peaked and biased as in a trained model; at its start it is nearly equal everywhere."""
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.normal_()
        elif name.endswith("qkv.weight"):
            parameter.mul_(3)
    return model


def build_peer(name: str, preset: str, ours: SwinHFForImageClassification) -> nn.Module:
    """The same network of another library, with our weights.

    Raises:
        ImportError: If the library is not installed; the message says how to install it.
        ValueError: If the library has no such network.
    """
    config = ours.config
    state = export_checkpoint(ours, name)
    if name == "transformers":
        from transformers import SwinConfig, SwinForImageClassification

        sizes = ("patch_size", "num_channels", "embed_dim", "mlp_ratio", "qkv_bias", "layer_norm_eps", "drop_path_rate")
        theirs = SwinConfig(
            image_size=config.image_hw[0],
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=config.stage_windows[0][0],
            num_labels=config.num_labels,
            **{size: getattr(config, size) for size in sizes},
        )
        with tempfile.TemporaryDirectory() as folder:  # the names in its files are not those of its modules
            theirs.save_pretrained(folder)
            save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return SwinForImageClassification.from_pretrained(folder, attn_implementation="sdpa")
    elif name == "timm":
        try:
            import timm
        except ImportError as error:
            raise ImportError("timm is not installed; pip install 'swin-hf[bench]' adds it") from error
        model = timm.create_model(preset, pretrained=False, num_classes=config.num_labels, drop_path_rate=0.0)
    else:
        from torchvision.models.swin_transformer import SwinTransformer

        model = SwinTransformer(
            patch_size=list(config.patch_hw),
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=list(config.stage_windows[0]),
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=0.0,
            num_classes=config.num_labels,
        )
    model.load_state_dict(state)
    return model


def logits_of(output: Any) -> Tensor:
    """Logits ``(B, classes)`` of whatever a library returns."""
    return output if isinstance(output, Tensor) else output.logits


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """What a training step left behind, in a form that every library has: its names and layouts differ."""
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "bias tables": torch.cat([g.flatten() for name, g in gradients.items() if "position_bias_table" in name]),
        "patches": next(g for g in gradients.values() if g.ndim == 4),  # the first layer: everything is behind it
        "all": torch.stack([g.norm() for g in gradients.values()]).norm(),
    }


def true_gradients(definition: nn.Module, device: str, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of a training step, by the definition in fp32, a few images at a time."""
    definition.to(device).train()
    for part, wanted in zip(images.split(8), labels.split(8), strict=True):
        loss = F.cross_entropy(logits_of(definition(part.to(device))), wanted.to(device), reduction="sum")
        (loss / len(images)).backward()
    return gradients_of(definition)


def said(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def disagreement(output: Tensor, reference: Tensor) -> float:
    """Norm of the difference in units of the reference's norm."""
    return ((output.float().cpu() - reference).norm() / reference.norm()).item()


# ---------------------------------------------------------------------------------------------------- measuring


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call, the mean of ``repeats`` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def take_turns(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Time calls in turn, after two rounds to warm up, for about ``seconds`` and at least ``least`` rounds.

    If the limit of the run passes meanwhile, what is measured by then counts, from three rounds on.
    """
    for call in calls.values():
        seconds_of(call, device)
    estimate = {name: seconds_of(call, device) for name, call in calls.items()}
    repeats = {name: max(1, int(0.01 / value)) for name, value in estimate.items()}
    rounds = max(least, int(seconds / sum(estimate[name] * repeats[name] for name in calls)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for _ in range(min(rounds, 200)):
            for name, call in calls.items():
                times[name].append(seconds_of(call, device, repeats[name]))
    except OutOfTime:
        if min(map(len, times.values())) < 3:  # too few to tell the machine's mood from a difference
            raise
    return times


def peak_memory(call: Callable[[], Any], device: str) -> float | None:
    """MiB that a call needs on top of what is there before; None where nobody counts."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronise(device)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return round(peak / 2**20, 1)


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The machine's own limits: TFLOP/s of a large matrix product and GB/s of a copy, read and write counted."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: a @ b]
    if device == "cpu" and torch.backends.mkldnn.is_available():  # torch has two libraries; the limit is the better
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    source = torch.randn(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    calls = {str(number): product for number, product in enumerate(products)}
    times = take_turns({**calls, "copy": lambda: target.copy_(source)}, device, 2.0, least=5)
    fastest = min(min(times[name]) for name in calls)
    return {
        "matmul_tflops": round(2 * side**3 / fastest / 1e12, 4),
        "copy_gbs": round(2 * source.nbytes / min(times["copy"]) / 1e9, 1),
    }


def count_flops(model: SwinHFForImageClassification, size: tuple[int, int]) -> int:
    """FLOPs of one image, counted by torch on the eager definition."""
    from torch.utils.flop_counter import FlopCounterMode

    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, model.config.num_channels, *size, device=model.device, dtype=model.dtype))
    model.set_attn_implementation(backend)
    return counter.get_total_flops()


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and date of a measurement."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("timm", "torchvision", "triton"):
        with contextlib.suppress(ImportError):
            versions[name] = __import__(name).__version__
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{processor_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"hardware": hardware, "versions": versions, "date": datetime.date.today().isoformat()}


def processor_name() -> str:
    """Name of the processor as Linux knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------- sections


def model_call(model: nn.Module, setting: dict[str, Any], images: Tensor, labels: Tensor) -> Callable[[], Any]:
    """One forward pass, or one training step, of a model as the setting says."""
    device, execution = setting["device"], setting["execution"]
    training = setting["mode"] == "training"
    autocast = setting["dtype"] == "amp" or (training and setting["dtype"] == "bf16")
    model = model.to(device, torch.float32 if autocast else DTYPES[setting["dtype"]]).train(training)
    images = images.to(device, torch.float32 if autocast else DTYPES[setting["dtype"]])
    labels = labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if training else None
    run = torch.compile(model) if execution == "compiled" else model

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
    flops = count_flops(ours, config.image_hw) * (3 if setting["mode"] == "training" else 1) * batch
    models: dict[str, nn.Module] = {"swin_hf": ours}
    left_out = {}
    for name in options.peers:
        if name != "swin_hf":
            try:
                models[name] = build_peer(name, setting["preset"], ours)
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

    limits = ceilings(setting["device"], torch.bfloat16 if setting["dtype"] == "amp" else DTYPES[setting["dtype"]])
    times = take_turns(calls, setting["device"], options.seconds)
    rows = []
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
                "peak_memory_mib": peak_memory(calls[name], setting["device"]),
                "difference": differences[name],
                "rounds": len(values),
            }
        )
    return {"gflops_per_call": round(flops / 1e9, 2), "ceilings": limits, "rows": rows, "left_out": left_out}


def measure_attention(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time window attention alone, without its linear layers, in the shapes of the first two stages."""
    from swin_hf.model.attention import SwinHFAttention
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


def measure_pipeline(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Images per second from JPEG files to training batches, and the time to the first batch."""
    import torchvision
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    from swin_hf.training import ImageDataModule

    workers = options.workers
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.pictures):
            path = Path(folder) / "train" / f"class{number % 4}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = F.interpolate(torch.rand(1, 3, 47, 63) * 255, (375, 500), mode="bicubic")[0]
            v2.functional.to_pil_image(picture.clamp(0, 255).byte()).save(path, quality=90)

        def ours() -> Any:
            data = ImageDataModule(
                "imagefolder", data_dir=folder, image_size=224, batch_size=32, num_workers=workers, seed=0,
                validation_fraction=0.1,
            )  # fmt: skip
            data.prepare_data()
            data.setup("fit")
            return data.train_dataloader()

        def torchvision_alone() -> Any:
            steps = [v2.PILToTensor(), v2.RandomResizedCrop(224, (0.08, 1.0), antialias=True, interpolation=3)]
            steps += [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
            steps += [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
            pictures = torchvision.datasets.ImageFolder(Path(folder) / "train", v2.Compose(steps))
            return DataLoader(pictures, batch_size=32, shuffle=True, num_workers=workers, drop_last=True)

        rows = []
        for name, make in (("swin_hf", ours), ("torchvision", torchvision_alone)):
            best: dict[str, float] = {}
            for _ in range(3):
                with contextlib.redirect_stdout(io.StringIO()):  # the data module prints its classes
                    start = time.perf_counter()
                    batches = iter(make())
                    next(batches)
                    first = time.perf_counter() - start
                    start, count = time.perf_counter(), 0
                    for batch in batches:
                        count += len(batch["pixel_values"] if isinstance(batch, dict) else batch[0])
                rate = count / (time.perf_counter() - start)
                best = {
                    "images_per_s": round(max(rate, best.get("images_per_s", 0)), 1),
                    "first_batch_s": round(min(first, best.get("first_batch_s", first)), 3),
                }
            rows.append({"name": name, **best})
    return {"rows": rows, "left_out": {}, "pictures": "JPEG, 500x375, quality 90", "workers": workers}


def measure_start(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of ``import swin_hf`` in a new process, and of ``from_pretrained`` of swin_base."""

    def importing(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3)]
        return round(min(float(run.stdout.split()[-1]) for run in runs), 3)

    rows = [
        {"name": "import swin_hf", "seconds": importing("import swin_hf")},
        {
            "name": "import torch, and AutoModel of transformers",
            "seconds": importing("import torch; from transformers import AutoModelForImageClassification"),
        },
    ]
    preset = "swin_base_patch4_window7_224"
    ours = build_ours(preset)
    ours.config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        models = {"swin_hf": ours, "transformers": build_peer("transformers", preset, ours)}
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
    """Seconds of an epoch and accuracy, beside transformers' Swin under its Trainer."""
    from compare_trainer import RECIPES, compare

    recipe = dataclasses.replace(RECIPES[setting["recipe"]], epochs=setting["epochs"])
    return {"rows": compare(recipe, setting["rounds"]), "left_out": {}}


MEASURE = {
    "models": measure_models,
    "attention": measure_attention,
    "pipeline": measure_pipeline,
    "start": measure_start,
    "trainer": measure_trainer,
}


def settings_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything that the options ask for, one setting after the other."""
    for section in options.sections:
        if section in ("pipeline", "start"):
            yield {"section": section, "device": "cpu"}
            continue
        if section == "trainer":
            how = {"epochs": options.trainer_epochs, "rounds": options.trainer_rounds}
            yield from ({"section": section, "device": "cpu", "recipe": recipe, **how} for recipe in options.recipes)
            continue
        for device, preset, dtype in itertools.product(options.devices, options.presets, options.dtypes):
            batches = options.batch_sizes or ([128, 256] if device == "cuda" else [1, 8, 32])
            place = {"section": section, "device": device, "preset": preset, "dtype": dtype}
            if section == "attention":
                if dtype != "amp":
                    yield {**place, "batch_size": max(batches) if device == "cuda" else min(8, max(batches))}
                continue
            for mode, execution, batch in itertools.product(options.modes, options.executions, batches):
                yield {**place, "mode": mode, "execution": execution, "batch_size": batch}


# ---------------------------------------------------------------------------------------------------- reporting


def title(setting: dict[str, Any]) -> str:
    """One line that names a setting."""
    if setting["section"] in ("pipeline", "start"):
        return {"pipeline": "From JPEG to batch", "start": "Start"}[setting["section"]]
    if setting["section"] == "trainer":
        return "An epoch beside transformers' Trainer: {recipe}, {epochs} epochs, {rounds} rounds".format(**setting)
    place = f"{setting['preset']}, {setting['device']}, {setting['dtype']}, batch {setting['batch_size']}"
    if setting["section"] == "attention":
        return f"Attention alone: {place}"
    return f"{setting['mode'].capitalize()}, {setting['execution']}: {place}"


def merge(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with those of the same setting on the same hardware replaced."""

    def key(result: dict[str, Any]) -> str:
        return json.dumps([result["setting"], result["environment"]["hardware"]], sort_keys=True)

    replaced = {key(result) for result in new}
    return [result for result in known if key(result) not in replaced] + new


def is_disturbed(result: dict[str, Any]) -> bool:
    """Whether other programs had the machine too: the median round of someone took far longer than the fastest."""
    pairs = [(row.get(f"median_{unit}", 0), row.get(f"min_{unit}", 0)) for row in result["rows"] for unit in UNITS]
    return any(median > STEADY * fastest for median, fastest in pairs)


def promise_of(setting: dict[str, Any]) -> tuple[str, float] | None:
    """Against whom we promise to be faster, and by how much at least."""
    if setting["section"] == "trainer":
        return TRAINER_TARGET if setting["recipe"] == "fashion_mnist" else None
    keys = ("preset", "device", "mode", "execution", "dtype", "batch_size")
    return TARGETS.get(tuple(setting.get(key) for key in keys))  # type: ignore[call-overload]


def verdict(result: dict[str, Any]) -> tuple[str, float, float] | None:
    """Against whom, by how much at least and by how much we are faster; None where nothing is promised."""
    target = promise_of(result["setting"])
    ratios = {row["name"]: row.get("ours_is_faster_by") for row in result["rows"] if row["name"] != "swin_hf"}
    if target is None or is_disturbed(result) or not ratios or (target[0] != "best" and target[0] not in ratios):
        return None
    best = min(ratios, key=lambda name: ratios[name]) if target[0] == "best" else target[0]
    return best, target[1], ratios[best]


def judge(result: dict[str, Any]) -> Iterator[str]:
    """A sentence for each promise that a result is about."""

    def outcome(kept: bool) -> str:
        return "kept." if kept else "**missed**."

    if (judged := verdict(result)) is not None:
        name, least, ratio = judged
        yield f"Promised {least}x of {name}: {ratio}x, {outcome(ratio >= least)}"
    setting, rows = result["setting"], {row["name"]: row for row in result["rows"]}
    memory = [rows[name]["peak_memory_mib"] for name in ("swin_hf", "timm") if "peak_memory_mib" in rows.get(name, {})]
    compiled_training = (setting.get("mode"), setting.get("execution")) == ("training", "compiled")
    if setting["device"] == "cuda" and compiled_training and len(memory) == 2:
        ratio = memory[0] / memory[1]
        yield f"Promised at most the peak memory of timm: {ratio:.2f}x, {outcome(ratio <= 1)}"
    for name, row in rows.items():
        if name.startswith("triton") and not is_disturbed(result):
            least, share = KERNEL_TARGETS[name.rsplit(" ", 1)[1]], row["share_of_copy_limit"]
            yield f"Promised {least} of the copy bandwidth, {name}: {share}, {outcome(share >= least)}"


def render(results: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = ["# Speed", "", "Written by `recipes/benchmark.py`; its docstring says how things are measured.", ""]
    for result in results:
        facts = result["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines += [f"## {title(result['setting'])}", "", f"{facts['hardware']}; {versions}; {facts['date']}."]
        if "ceilings" in result:
            limits = result["ceilings"]
            lines.append(
                f"Limits: {limits['matmul_tflops']} TFLOP/s (matrix product), {limits['copy_gbs']} GB/s (copy)."
            )
        if is_disturbed(result):
            lines.append(f"**Disturbed**: a median is over {STEADY}x its minimum; nothing follows from these numbers.")
        lines += judge(result)
        columns = [column for column in result["rows"][0] if column != "difference"] if result["rows"] else []
        lines += ["", "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in result["rows"]]
        lines += [""] + [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]
        lines += [""] if result["left_out"] else []
    return "\n".join(lines).rstrip() + "\n"


def summary(results: list[dict[str, Any]]) -> str:
    """The README's table: images per second, and how many times faster we are than each peer."""
    models = [result for result in results if result["setting"]["section"] == "models" and result["rows"]]
    chosen = [result for result in models if not is_disturbed(result)]
    lines = []
    for (hardware, date), group in itertools.groupby(
        sorted(chosen, key=lambda result: (result["environment"]["hardware"], result["environment"]["date"])),
        key=lambda result: (result["environment"]["hardware"], result["environment"]["date"]),
    ):
        results_here = list(group)
        versions = ", ".join(f"{k} {v}" for k, v in results_here[0]["environment"]["versions"].items() if k != "python")
        lines += [f"{hardware}; {versions}; {date}.", ""]
        lines += [
            "| Model, setting | ours, images/s | share of limit | " + " | ".join(f"vs {p}" for p in PEERS[1:]) + " |"
        ]
        lines += ["|---|---|---|" + "---|" * len(PEERS[1:])]
        for result in results_here:
            rows = {row["name"]: row for row in result["rows"]}
            setting, ours = result["setting"], rows["swin_hf"]
            name = setting["preset"].split("_patch")[0]
            cells = [
                f"{name}, {setting['mode']}, {setting['execution']}, {setting['dtype']}, batch {setting['batch_size']}"
            ]
            cells += [f"{ours['images_per_s']:g}", f"{ours['share_of_matmul_limit']:.0%}"]
            cells += [f"{rows[p]['ours_is_faster_by']:.2f}x" if p in rows else "-" for p in PEERS[1:]]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for result in results:
        if result["setting"]["section"] == "trainer" and not is_disturbed(result):
            ours, theirs = result["rows"]
            lines.append(
                "An epoch of {recipe} takes {ours[min_epoch_s]} s, with transformers' Swin under its Trainer "
                "{theirs[min_epoch_s]} s; accuracy after {epochs} epochs from the same weights: {ours[test_accuracy]} "
                "and {theirs[test_accuracy]}.".format(ours=ours, theirs=theirs, **result["setting"])
            )
    return "\n".join(lines).strip()


def write_between(text: str, table: str) -> str:
    """Put a table between the markers of a text.

    Raises:
        ValueError: If the markers are not there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the table goes between {BEGIN} and {END}; put both into the file, once and in that order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def replace_file(path: Path, text: str) -> None:
    """Write a file under another name first, so that an interruption cannot leave half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def parse(args: list[str] | None) -> argparse.Namespace:
    """Read the options; what a machine does not have is refused here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = ["cuda"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    presets = [TINY] if here == ["cpu"] else [TINY, BASE_384]
    add("--presets", nargs="+", choices=list_presets(), default=presets, metavar="PRESET")
    add("--devices", nargs="+", choices=("cpu", "cuda"), default=here)
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"] if here == ["cpu"] else ["bf16", "amp"])
    add("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    add("--executions", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    add("--batch-sizes", nargs="+", type=int, help="default: 1 8 32 on a CPU, 128 256 on a GPU")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--seconds", type=float, default=15.0, help="time for the rounds of one setting")
    add("--limit", type=float, default=900.0, help="seconds after which the run ends and keeps what it has")
    add("--workers", type=int, default=0, help="loader processes of the pipeline")
    add("--recipes", nargs="+", choices=("digits", "fashion_mnist"), default=["digits"], help="of the trainer section")
    add("--trainer-epochs", type=int, default=10, help="epochs of each round of the trainer section")
    add("--trainer-rounds", type=int, default=2, help="how often either side trains")
    add("--pictures", type=int, default=320, help="JPEG files that the pipeline reads")
    add("--json", type=Path, default=Path("docs/speed.json"), help="results, merged into those that are there")
    add("--markdown", type=Path, default=Path("docs/speed.md"), help="the same as tables")
    add("--readme", type=Path, help=f"file whose text between {BEGIN} and {END} becomes the table")
    add("--render-only", action="store_true", help="measure nothing; write the tables from --json")
    options = parser.parse_args(args)
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --devices cpu measures what is here")
    if "swin_hf" not in options.peers:
        parser.error("--peers must contain swin_hf, which the others are compared with")
    return options


def main(args: list[str] | None = None) -> int:
    """Measure, print as it goes, and write the tables."""
    options = parse(args)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*Online softmax is disabled.*")  # Inductor on a CPU says so every time

    def stop(*_: object) -> None:
        raise OutOfTime

    results = json.loads(options.json.read_text()) if options.json.is_file() else []
    waiting = [] if options.render_only else sorted(settings_of(options), key=lambda one: promise_of(one) is None)
    if hasattr(signal, "setitimer"):  # not on Windows: there the limit is looked at between settings
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, options.limit)
    deadline = time.monotonic() + options.limit
    try:
        while waiting and time.monotonic() < deadline:
            setting = waiting[0]
            try:
                measured = MEASURE[setting["section"]](setting, options)
            except Exception as error:  # the rest is measured all the same
                print(f"not measured, {said(error)}: {title(waiting.pop(0))}")
                continue
            result = {"setting": setting, "environment": environment(setting["device"]), **measured}
            results = merge(results, [result])
            replace_file(options.json, json.dumps(results, indent=1) + "\n")
            print("\n".join(render([result]).splitlines()[4:]), flush=True)
            waiting.pop(0)
            torch.compiler.reset()
    except OutOfTime:
        pass
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    replace_file(options.markdown, render(results))
    if options.readme is not None:
        replace_file(options.readme, write_between(options.readme.read_text(), summary(results)))
    for setting in waiting:
        print(f"not measured, the limit of {options.limit:.0f} s had passed: {title(setting)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
