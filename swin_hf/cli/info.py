"""Describe a Swin checkpoint: layout, sizes, parameters, FLOPs, attention backend.

The source may be a file or folder in any layout, or the id of a model on the Hub, of which only the header of the
weights is read.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_hf.loading import local_path, split_hub_id

if TYPE_CHECKING:
    from swin_hf.checkpoints import Checkpoint
    from swin_hf.checkpoints.read import Source

_SHOWN_CLASSES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf info``."""
    parser.add_argument("source", metavar="SOURCE", help="file, folder, run folder or Hub id")
    parser.add_argument("--layout", help="layout of the source; detected")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    from swin_hf.checkpoints import open_checkpoint

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    path = local_path(args.source)
    source = path if path is not None else read_header(*_on_the_hub(args))
    facts = describe(open_checkpoint(source, args.layout))
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {_readable(value)}")
    return 0


def _on_the_hub(args: argparse.Namespace) -> tuple[str, str]:
    repo_id, revision = split_hub_id(args.source)
    return repo_id, revision or args.revision


def read_header(repo_id: str, revision: str = "main") -> "Source":
    """Names, shapes and types of the weights of a Hub repository; nothing but the header is downloaded.

    Returns:
        A source whose tensors have shapes but no values (they are on the meta device).

    Raises:
        ValueError: If the repository has no safetensors.
        RuntimeError: If there is no such repository or the Hub cannot be reached.
    """
    import torch

    from swin_hf.checkpoints.read import Source
    from swin_hf.hub.remote import attempt

    types = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "BOOL": torch.bool,
    }
    header = attempt(lambda: _header_or_none(repo_id, revision), repo_id)
    if header is None:
        raise ValueError(
            f"{repo_id} has no model.safetensors, whose header could be read; download it with `swin-hf pull "
            f"{repo_id}` and give the folder"
        )
    tensors = {name: tensor for file in header.files_metadata.values() for name, tensor in file.tensors.items()}
    source = Source(
        repo_id,
        {
            name: torch.empty(tensor.shape, dtype=types.get(tensor.dtype, torch.uint8), device="meta")
            for name, tensor in tensors.items()
        },
        is_folder=True,
    )
    source.beside = attempt(lambda: _config_or_nothing(repo_id, revision), repo_id)
    return source


def _config_or_nothing(repo_id: str, revision: str) -> dict[str, Any]:
    from huggingface_hub.errors import EntryNotFoundError

    from swin_hf.checkpoints.read import CONFIG_NAME
    from swin_hf.hub.remote import client

    try:
        path = client().hf_hub_download(repo_id, CONFIG_NAME, revision=revision)
    except EntryNotFoundError:
        return {}
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _header_or_none(repo_id: str, revision: str) -> Any:
    from huggingface_hub.errors import NotASafetensorsRepoError

    from swin_hf.hub.remote import client

    try:
        return client().get_safetensors_metadata(repo_id, revision=revision)
    except NotASafetensorsRepoError:
        return None


def describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Everything that is known of a checkpoint, as plain values."""
    import torch

    from swin_hf.checkpoints.derive import class_names
    from swin_hf.checkpoints.load import MODELS
    from swin_hf.counting import count_macs
    from swin_hf.model.attention import backend_report

    config, kind = checkpoint.config, checkpoint.place.kind
    with torch.device("meta"):
        model: Any = MODELS[kind](config)
    macs = count_macs(config, MODELS[kind])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_head = "classifier.weight" in checkpoint.translation.state
    labels = class_names(config) if has_head else []
    return {
        "source": checkpoint.source.name,
        "layout": checkpoint.place.layout.name,
        "kind": kind.value,
        "preset": checkpoint.presets or "none of these sizes",
        "image size": config.image_size,
        "patch size": config.patch_size,
        "channels": config.num_channels,
        "embed_dim": config.embed_dim,
        "depths": config.depths,
        "heads": config.num_heads,
        "window": config.window_size,
        "shift": "per axis (timm, torchvision)" if config.shift_per_axis else "both axes (Microsoft, transformers)",
        "classes": {"count": len(labels), "first": labels[:_SHOWN_CLASSES]},
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "parameters": checkpoint.parameters,
        "FLOPs": 2 * macs,
        "multiply-adds": macs,
        "attention": str(backend_report(model.eval().to(checkpoint.dtype).to_empty(device=device))),
        "notes": [*checkpoint.source.notes, *checkpoint.notes],
    }


def _readable(value: Any) -> str:
    if isinstance(value, int) and value >= 10**6:
        unit, name = (10**9, "G") if value >= 10**9 else (10**6, "M")
        return f"{value / unit:.2f} {name} ({value:,})"
    if isinstance(value, dict):
        names = ", ".join(value["first"]) + (", ..." if value["count"] > len(value["first"]) else "")
        return f"{value['count']} ({names})" if names else str(value["count"])
    if isinstance(value, list) and value and isinstance(value[0], str):
        return "; ".join(value)
    return "none" if value == [] else str(value)
