"""Describe a Swin checkpoint: layout, sizes, parameters, FLOPs, attention backend.

The source may be a file or folder in any layout, or a repository on the Hub, of whose safetensors only the header is
read.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError
from transformers.modeling_utils import str_to_torch_dtype

from swin_hf.checkpoints import Checkpoint
from swin_hf.checkpoints.load import class_for
from swin_hf.checkpoints.read import CONFIG_NAME, Source
from swin_hf.classes import class_table
from swin_hf.counting import count_macs
from swin_hf.hub.model_card import amount
from swin_hf.hub.remote import HubError, attempt, client
from swin_hf.loading import local_path, open_source, split_hub_id
from swin_hf.model.attention import backend_report

_SHOWN_CLASSES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf info``."""
    parser.add_argument("source", metavar="SOURCE", help="model, see swin-hf --help")
    parser.add_argument("--layout", help="layout of the source (default: detected)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    header = None if local_path(args.source) is not None else read_header(args.source, args.revision)
    facts = describe(open_source(header or args.source, args.layout, revision=args.revision))
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {_readable(value)}")
    return 0


def read_header(source: str, revision: str | None = None) -> Source | None:
    """Names, shapes and types of the weights of a Hub repository; nothing but the header is downloaded.

    Returns:
        A source whose tensors have shapes but no values (they are on the meta device); None where that cannot be read:
        without safetensors, for a file that is named, or without the Hub.

    Raises:
        HubError: If the Hub refuses.
    """
    repo_id, named, _ = split_hub_id(source)
    api = client()

    def read() -> tuple[Any, dict[str, Any]]:
        header = api.get_safetensors_metadata(repo_id, revision=named or revision)
        try:
            path = api.hf_hub_download(repo_id, CONFIG_NAME, revision=named or revision)
        except EntryNotFoundError:
            return header, {}
        return header, json.loads(Path(path).read_text(encoding="utf-8"))

    try:
        header, config = attempt(read, repo_id)
    except HubError as error:
        if error.transient or NotASafetensorsRepoError.__name__ in str(error):
            return None
        raise
    state = {}
    for name, tensor in (item for file in header.files_metadata.values() for item in file.tensors.items()):
        kind = str_to_torch_dtype.get(tensor.dtype, torch.uint8)
        state[name] = torch.empty(tensor.shape, dtype=kind, device="meta")
    return Source(repo_id, state, config, is_folder=True)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that is known of a checkpoint, as plain values."""
    config, kind = checkpoint.config, checkpoint.place.kind
    with torch.device("meta"):
        model_class = class_for(checkpoint.place)
        model: Any = model_class(config)
    macs = count_macs(config, model_class)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_head = "classifier.weight" in checkpoint.translation.state
    labels = class_table(config.id2label) if has_head else []
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
        return f"{amount(value)} ({value:,})"
    if isinstance(value, dict):
        names = ", ".join(value["first"]) + (", ..." if value["count"] > len(value["first"]) else "")
        return f"{value['count']} ({names})" if names else str(value["count"])
    if isinstance(value, list) and value and isinstance(value[0], str):
        return "; ".join(value)
    return "none" if value == [] else str(value)
