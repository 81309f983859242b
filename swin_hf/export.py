"""Export a classifier or a segmenter to ONNX Runtime, OpenVINO or ``torch.export``, and check the file.

Each function writes a temporary file, loads it in its engine, compares the engine's logits with the model's at batch
1, 3 and 8, and only then moves the file to its name. The batch is dynamic; the image size is fixed, because padding
and shift are decided while the graph is traced.
"""

import copy
import importlib.util
import io
import json
import math
import os
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_hf.classes import require_finite
from swin_hf.files import temporary_folder
from swin_hf.memory import check_batch
from swin_hf.model.attention import clear_caches
from swin_hf.model.configuration_swin_hf import Pair, as_pair
from swin_hf.model.modeling_swin_hf import SwinHFForImageClassification
from swin_hf.model.segmentation_swin_hf import SwinHFForSemanticSegmentation

BATCHES = (1, 3, 8)  # compared after writing; the last one is timed
OPSET = 20  # the first with Gelu and its exact erf
TOLERANCE = 1e-4  # fp32: engines sum in another order
INT8_SHARE = 0.5  # tolerance of int8 as a share of the range of the logits; finds broken graphs only, so use --test
CORRELATION = 0.8  # least, of int8 logits with the model's: 0.99 is usual, random answers have 0
BATCH_SIZE = torch.export.Dim("batch", min=1, max=4096)

Engine = Callable[[Tensor], Tensor]  # images (B, channels, height, width) to logits (B, num_labels)


@dataclass(frozen=True)
class ExportReport:
    """The written file, and how its logits compare with the model's."""

    path: Path
    engine: str  # that ran it, and its version
    form: str  # format, opset and number type
    image_size: Pair  # pixels that it takes
    largest_difference: float  # of a logit, over all batches that were compared
    correlation: float  # of the logits from picture to picture; 0 for an engine that always gives the same answer
    agreement: float  # share of the pictures for which both name the same class
    engine_ms: float  # for a batch of 8, the fastest of five
    model_ms: float  # likewise, on the same machine

    def __str__(self) -> str:
        height, width = self.image_size
        return (
            f"{self.path}: {self.form} for {height}x{width} images, any batch\n"
            f"largest difference from the model {self.largest_difference:.1e} in {self.engine} "
            f"(batches of {', '.join(map(str, BATCHES))})\n"
            f"same class for {self.agreement:.0%} of the pictures, correlation {self.correlation:.4f}\n"
            f"batch of {BATCHES[-1]}: {self.engine_ms:.1f} ms, model {self.model_ms:.1f} ms "
            f"({self.model_ms / self.engine_ms:.2f}x)"
        )


def export_onnx(
    model: SwinHFForImageClassification,
    path: str | os.PathLike[str],
    *,
    image_size: int | Pair | None = None,
    images: Tensor | None = None,
    int8: bool = False,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an ONNX file (opset 20) with the class names in its metadata; the model does not change.

    Args:
        model: Image classifier or segmenter.
        path: File to write, ``*.onnx``.
        image_size: Pixels of the images that the file takes; the model's own by default.
        images: At least 8 normalised images ``(B, channels, height, width)`` to compare on; photographs by default.
        int8: Store weights and multiply in int8, activations quantised on the fly (ONNX Runtime's dynamic scheme).
        tolerance: Largest difference of a logit that is accepted; 1e-4, and half the range of the logits for int8.
        overwrite: Replace a file that exists.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is missing; names the extra.
        FileExistsError: If the file exists.
        ValueError: If the file's name or the images do not fit, or a logit of the model is NaN or infinite.
        RuntimeError: If the engine's logits differ by more than ``tolerance``, or do not follow the pictures as the
            model's do; nothing is left behind.
    """
    _require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    size, images = _prepare(model, image_size, images)
    with _destination(path, ".onnx", overwrite) as temporary:
        wrapped = _Logits(model).fold(images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; the result is compared below
            torch.onnx.export(
                wrapped,
                (images[:2],),
                str(temporary),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: BATCH_SIZE}},
                external_data=False,
                verbose=False,
            )
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(str(temporary), str(temporary), weight_type=QuantType.QInt8)
        proto = onnx.load(str(temporary))
        onnx.helper.set_model_props(proto, _facts(model, size))
        onnx.save(proto, str(temporary))
        onnx.checker.check_model(str(temporary))
        form = f"ONNX opset {OPSET} {'int8 (dynamic)' if int8 else 'fp32'}"
        engine = f"ONNX Runtime {onnxruntime.__version__}"
        return compare(model, _onnx_engine(temporary), images, path, engine, form, tolerance, int8)


def export_openvino(
    model: SwinHFForImageClassification,
    path: str | os.PathLike[str],
    *,
    image_size: int | Pair | None = None,
    images: Tensor | None = None,
    calibration: Iterable[Tensor] | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an OpenVINO model, ``*.xml`` and its weights, ``*.bin``.

    Arguments and errors are those of :func:`export_onnx`, which takes no ``calibration``: batches of normalised images,
    some hundreds in all. With them, weights and activations become int8 (NNCF, post-training, ranges measured on these
    images), and the first of them are what is compared if no ``images`` are given.
    """
    _require("openvino", "openvino", *(["nncf"] if calibration is not None else []))
    import openvino

    batches = None if calibration is None else list(calibration)
    if images is None and batches:  # int8 is calibrated on the user's pictures, so it is compared on them
        pictures = torch.cat(batches)[: BATCHES[-1]]
        images = pictures if len(pictures) == BATCHES[-1] else None
    size, images = _prepare(model, image_size, images)
    with _destination(path, ".xml", overwrite) as temporary:
        converted = openvino.convert_model(_program(model, images))
        converted.reshape({0: openvino.PartialShape([-1, images.shape[1], *size])})
        converted.inputs[0].get_tensor().set_names({"pixel_values"})
        converted.outputs[0].get_tensor().set_names({"logits"})
        if batches is not None:
            import nncf
            from nncf.quantization.advanced_parameters import (
                AdvancedQuantizationParameters,
                AdvancedSmoothQuantParameters,
            )

            converted = nncf.quantize(
                converted,
                nncf.Dataset(batches, lambda batch: batch.numpy()),
                model_type=nncf.ModelType.TRANSFORMER,
                # SmoothQuant, NNCF's default for transformers, cost 22 points on Fashion-MNIST; without it, none.
                advanced_parameters=AdvancedQuantizationParameters(
                    smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
                ),
                subset_size=len(batches),
            )
        for key, value in _facts(model, size).items():
            converted.set_rt_info(value, ["swin_hf", key])
        openvino.save_model(converted, str(temporary), compress_to_fp16=False)
        form = f"OpenVINO {'fp32' if calibration is None else 'int8 (calibrated)'}"
        engine = f"OpenVINO {openvino.__version__.split('-')[0]}"
        return compare(model, _openvino_engine(temporary), images, path, engine, form, tolerance, batches is not None)


def export_torch(
    model: SwinHFForImageClassification,
    path: str | os.PathLike[str],
    *,
    image_size: int | Pair | None = None,
    images: Tensor | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an exported program, ``*.pt2``, that ``torch.export.load`` runs without this package.

    Arguments and errors are those of :func:`export_onnx`; the tolerance is 1e-4 if it is not given.
    """
    size, images = _prepare(model, image_size, images)
    with _destination(path, ".pt2", overwrite) as temporary:
        content = io.BytesIO()  # given a path on a full disk, torch 2.14 aborts the process
        torch.export.save(_program(model, images), content, extra_files=_facts(model, size))
        temporary.write_bytes(content.getbuffer())
        engine = f"torch {torch.__version__}"
        return compare(model, _torch_engine(temporary), images, path, engine, "torch.export fp32", tolerance)


def load_engine(path: str | os.PathLike[str]) -> Engine:
    """Open an exported file as a function from normalised images to logits.

    FileNotFoundError if it does not exist, ValueError for another suffix, ImportError if its engine is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; write it with swin-hf export")
    engines = {".onnx": _onnx_engine, ".xml": _openvino_engine, ".pt2": _torch_engine}
    if path.suffix not in engines:
        raise ValueError(f"{path}: the name must end in .onnx, .xml or .pt2")
    return engines[path.suffix](path)


def sample_images(size: Pair, channels: int = 3, count: int = BATCHES[-1]) -> Tensor:
    """Different crops of a photograph that comes with matplotlib, normalised; ``(count, channels, height, width)``."""
    import numpy as np
    from matplotlib import cbook
    from PIL import Image

    with Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as picture:
        photograph = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255
    _, _, height, width = photograph.shape
    crops = []
    for number in range(count):
        side = int(min(height, width) * (1 - number / (2 * count)))
        top, left = (height - side) * number // count, (width - side) * (count - number) // count
        crop = photograph[..., top : top + side, left : left + side]
        crops.append(F.interpolate(crop, size=size, mode="bicubic", antialias=True, align_corners=False))
    images = (torch.cat(crops) - 0.45) / 0.225
    return images if channels == 3 else images.mean(1, keepdim=True).repeat(1, channels, 1, 1)


class _Logits(nn.Module):
    """What is traced: images to logits, with the eager attention, which the engines' own optimisers recognise."""

    def __init__(self, model: SwinHFForImageClassification) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval()
        self.model.set_attn_implementation("eager")

    def fold(self, images: Tensor) -> "_Logits":
        """Compute the bias tables of Swin V2, which a network makes, once, so that they are constants in the graph."""
        layers: list[Any] = [layer for layer in self.modules() if hasattr(layer, "bias_table")]
        for layer in layers:
            layer.bias_table = cache(layer.bias_table)
        clear_caches()  # so that each network runs now, on numbers, and not when it is traced
        with torch.no_grad():
            self(images[:1])
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def _program(model: SwinHFForImageClassification, images: Tensor) -> torch.export.ExportedProgram:
    wrapped = _Logits(model).fold(images)
    with torch.no_grad():
        return torch.export.export(wrapped, (images[:2],), dynamic_shapes={"pixel_values": {0: BATCH_SIZE}})


def _prepare(
    model: SwinHFForImageClassification, image_size: int | Pair | None, images: Tensor | None
) -> tuple[Pair, Tensor]:
    if not isinstance(model, SwinHFForImageClassification | SwinHFForSemanticSegmentation) or not model.num_labels:
        raise ValueError(f"{type(model).__name__} gives no logits; export a classifier or a segmenter with labels")
    size = model.config.image_hw if image_size is None else as_pair(image_size)
    # The first stage needs the most: its map, normalised too, and the four times wider one of its MLP.
    patch = math.prod(model.swin.embeddings.patch_embeddings.kernel_size)
    check_batch(BATCHES[-1], model.config.num_channels + 6 * model.config.embed_dim // patch, size)
    if images is None:
        images = sample_images(size, model.config.num_channels)
    wanted = (model.config.num_channels, *size)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted or images.shape[0] < BATCHES[-1]:
        raise ValueError(f"images have shape {tuple(images.shape)}; give at least {BATCHES[-1]}, each {wanted}")
    with torch.no_grad():
        require_finite(_Logits(model)(images[: BATCHES[-1]].float()))
    return size, images.float()


def _facts(model: SwinHFForImageClassification, size: Pair) -> dict[str, str]:
    """Facts to store in the file, as JSON by name."""
    facts = {"id2label": model.config.id2label, "image_size": size, "model_type": model.config.model_type}
    return {name: json.dumps(value) for name, value in facts.items()}


@torch.no_grad()
def compare(
    model: SwinHFForImageClassification,
    run: Engine,
    images: Tensor,
    path: str | os.PathLike[str],
    engine: str,
    form: str,
    tolerance: float | None,
    int8: bool = False,
) -> ExportReport:
    """Compare a written file, which ``run`` executes, with the model on several batches; time both on the largest.

    Raises:
        RuntimeError: If the logits differ by more than the tolerance, or do not follow the pictures as the model's do.
    """
    reference = copy.deepcopy(model).float().cpu().eval()
    batch = images[: BATCHES[-1]]
    expected: Tensor = reference(batch).logits
    answers = {n: run(images[:n]) for n in BATCHES}
    largest = max(float((answers[n] - expected[:n]).abs().max()) for n in BATCHES)
    if tolerance is None:
        tolerance = INT8_SHARE * float(expected.max() - expected.min()) if int8 else TOLERANCE
    if not largest <= tolerance:  # also true for NaN
        raise RuntimeError(
            f"{engine} differs from the model by {largest:.2e}, more than the tolerance {tolerance:.0e}; nothing was "
            "written. Raise tolerance= if that is good enough"
        )
    theirs, ours = (logits - logits.mean(0) for logits in (answers[len(batch)], expected))
    is_constant = ours.norm() < TOLERANCE  # the model gives all pictures the same logits
    correlation = 1.0 if is_constant else float(F.cosine_similarity(theirs.flatten(), ours.flatten(), 0))
    agreement = float((answers[len(batch)].argmax(1) == expected.argmax(1)).float().mean())
    if largest > TOLERANCE and not correlation >= CORRELATION:
        raise RuntimeError(
            f"{engine} does not tell {len(batch)} pictures apart as the model does: correlation {correlation:.2f}, at"
            f" least {CORRELATION} is needed; nothing was written. Export without int8, or calibrate on other pictures"
        )
    times = _milliseconds(run, batch), _milliseconds(reference, batch)
    size = (images.shape[-2], images.shape[-1])
    return ExportReport(Path(path), engine, form, size, largest, correlation, agreement, *times)


def _onnx_engine(path: Path) -> Engine:
    _require("onnx", "onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


def _openvino_engine(path: Path) -> Engine:
    _require("openvino", "openvino")
    import openvino

    # OpenVINO takes bf16 by itself where the processor has it; the comparison is one of fp32 with fp32.
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def _torch_engine(path: Path) -> Engine:
    return torch.export.load(path).module()


def _milliseconds(engine: Callable[[Tensor], Any], images: Tensor) -> float:
    engine(images)
    return 1000 * min(timeit.repeat(lambda: engine(images), repeat=5, number=1))


def _require(extra: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed; run: pip install 'swin-hf[{extra}]'")


@contextmanager
def _destination(path: str | os.PathLike[str], suffix: str, overwrite: bool) -> Iterator[Path]:
    """Give a temporary file; it and the files next to it are moved to the folder of ``path`` when the block ends."""
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{path}: the name must end in {suffix}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or overwrite it with --overwrite")
    with temporary_folder(path) as folder:
        yield folder / path.name
        for file in sorted(folder.iterdir()):
            file.replace(path.with_name(file.name))
