"""Swin Transformer for the Hugging Face and Lightning world.

Importing this package registers its families with the Auto classes of transformers and does nothing else: training,
sharing, conversion and export are imported when one of their names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swin_hf.families import FAMILIES, list_presets, register
from swin_hf.model import configuration_swin_hf, resizing
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
from swin_hf.model.modeling_swin_hf import (
    SwinHFBackbone,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
)
from swin_hf.model.modeling_swinv2_hf import (
    SwinV2HFBackbone,
    SwinV2HFForImageClassification,
    SwinV2HFForMaskedImageModeling,
    SwinV2HFModel,
)
from swin_hf.model.segmentation_swin_hf import SwinHFForSemanticSegmentation
from swin_hf.model.segmentation_swinv2_hf import SwinV2HFForSemanticSegmentation

if TYPE_CHECKING:
    from swin_hf.checkpoints import export_checkpoint, replace_backbone
    from swin_hf.explain import attention_maps, grad_cam
    from swin_hf.export import export_onnx, export_openvino, export_torch
    from swin_hf.hub import pull, push
    from swin_hf.loading import convert_checkpoint, load_backbone, load_checkpoint

__version__ = "0.1.0"

# The other public names, by the module that defines them; it is imported when one is first used (PEP 562).
_LATER = {
    "loading": ("load_checkpoint", "load_backbone", "convert_checkpoint"),
    "checkpoints": ("export_checkpoint", "replace_backbone"),
    "hub": ("push", "pull"),
    "explain": ("attention_maps", "grad_cam"),
    "export": ("export_onnx", "export_openvino", "export_torch"),
}

__all__ = [
    "SwinHFBackbone", "SwinHFConfig", "SwinHFForImageClassification", "SwinHFForMaskedImageModeling",
    "SwinHFForSemanticSegmentation", "SwinHFModel", "SwinV2HFBackbone", "SwinV2HFConfig",
    "SwinV2HFForImageClassification", "SwinV2HFForMaskedImageModeling", "SwinV2HFForSemanticSegmentation",
    "SwinV2HFModel", "__version__", "attention_maps", "convert_checkpoint", "export_checkpoint", "export_onnx",
    "export_openvino", "export_torch", "grad_cam", "list_presets", "load_backbone", "load_checkpoint", "pull", "push",
    "replace_backbone",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _imported_later(name: str) -> Any:
    """A function of ``loading.py``, which is imported when it is first called."""
    return lambda *args, **options: getattr(import_module("swin_hf.loading"), name)(*args, **options)


resizing.foreign_reader = _imported_later("read_foreign")
configuration_swin_hf.foreign_reader = _imported_later("read_foreign_config")
for _family in FAMILIES.values():
    register(_family)
