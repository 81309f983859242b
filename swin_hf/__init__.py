"""Swin Transformer for the Hugging Face and Lightning world.

Importing this package registers the ``swin_hf`` family with the Auto classes of transformers and does nothing
else: training, sharing, conversion and export are imported when one of their names is first used.
"""

from importlib import import_module
from typing import Any

from .model import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
    list_presets,
    register_auto_classes,
)

__version__ = "0.1.0"

register_auto_classes()

# Public names that live in heavier rooms: name -> module. Resolved on first use (PEP 562).
_LAZY = {
    "load_checkpoint": "swin_hf.checkpoints",
    "export_checkpoint": "swin_hf.checkpoints",
    "convert_checkpoint": "swin_hf.checkpoints",
    "push": "swin_hf.hub",
    "pull": "swin_hf.hub",
    "load_backbone": "swin_hf.hub",
    "attention_maps": "swin_hf.explain",
    "grad_cam": "swin_hf.explain",
    "export_onnx": "swin_hf.export",
    "export_openvino": "swin_hf.export",
    "export_torch": "swin_hf.export",
}

__all__ = [  # noqa: PLE0604, RUF022 - the model first, then what is done with it
    "SwinHFConfig",
    "SwinHFModel",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFBackbone",
    "list_presets",
    *_LAZY,
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
