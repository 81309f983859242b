"""Swin Transformer for the Hugging Face and Lightning world.

Importing this package registers the ``swin_hf`` family with the Auto classes of transformers and does nothing
else: training, sharing, conversion and export are imported when one of their names is first used.
"""

from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_hf.checkpoints import convert_checkpoint, export_checkpoint, load_checkpoint
    from swin_hf.explain import attention_maps, grad_cam
    from swin_hf.export import export_onnx, export_openvino, export_torch
    from swin_hf.hub import load_backbone, pull, push
    from swin_hf.model.configuration_swin_hf import SwinHFConfig
    from swin_hf.model.modeling_swin_hf import (
        SwinHFBackbone,
        SwinHFForImageClassification,
        SwinHFForMaskedImageModeling,
        SwinHFModel,
    )
    from swin_hf.presets import list_presets

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first used (PEP 562).
_ROOMS = {
    "SwinHFConfig": "model.configuration_swin_hf",
    "list_presets": "presets",
    "SwinHFModel": "model.modeling_swin_hf",
    "SwinHFForImageClassification": "model.modeling_swin_hf",
    "SwinHFForMaskedImageModeling": "model.modeling_swin_hf",
    "SwinHFBackbone": "model.modeling_swin_hf",
    "load_checkpoint": "checkpoints",
    "export_checkpoint": "checkpoints",
    "convert_checkpoint": "checkpoints",
    "push": "hub",
    "pull": "hub",
    "load_backbone": "hub",
    "attention_maps": "explain",
    "grad_cam": "explain",
    "export_onnx": "export",
    "export_openvino": "export",
    "export_torch": "export",
}

__all__ = [
    "SwinHFBackbone",
    "SwinHFConfig",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFModel",
    "__version__",
    "attention_maps",
    "convert_checkpoint",
    "export_checkpoint",
    "export_onnx",
    "export_openvino",
    "export_torch",
    "grad_cam",
    "list_presets",
    "load_backbone",
    "load_checkpoint",
    "pull",
    "push",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _ROOMS[name].startswith("model."):
        register_models()
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def register_config() -> None:
    """Teach AutoConfig the model type ``swin_hf``, and have the models follow with the first configuration.

    The model and image processor classes of transformers import torchvision and more, several seconds of it. Every
    road to them leads over a configuration, so they are registered when the first one is made.
    """
    from transformers import AutoConfig

    from swin_hf.model.configuration_swin_hf import SwinHFConfig
    from swin_hf.presets import PRESETS

    SwinHFConfig.presets.update(PRESETS)
    AutoConfig.register(SwinHFConfig.model_type, SwinHFConfig, exist_ok=True)
    plain_init = SwinHFConfig.__init__

    @wraps(plain_init)
    def register_and_init(self: SwinHFConfig, *args: Any, **kwargs: Any) -> None:
        SwinHFConfig.__init__ = plain_init  # type: ignore[method-assign]
        register_models()
        plain_init(self, *args, **kwargs)

    SwinHFConfig.__init__ = register_and_init  # type: ignore[method-assign]


def register_models() -> None:
    """Teach the other Auto classes the model type ``swin_hf``; doing it twice changes nothing."""
    from transformers import (
        AutoBackbone,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskedImageModeling,
    )

    from swin_hf.model import image_processing_swin_hf as processing
    from swin_hf.model import modeling_swin_hf as modeling
    from swin_hf.model.configuration_swin_hf import SwinHFConfig

    AutoModel.register(SwinHFConfig, modeling.SwinHFModel, exist_ok=True)
    AutoModelForImageClassification.register(SwinHFConfig, modeling.SwinHFForImageClassification, exist_ok=True)
    AutoModelForMaskedImageModeling.register(SwinHFConfig, modeling.SwinHFForMaskedImageModeling, exist_ok=True)
    AutoBackbone.register(SwinHFConfig, modeling.SwinHFBackbone, exist_ok=True)
    # Classes of our own, for both backends: what is registered here is looked up by name for all models of the process.
    processors: dict[str, type] = {
        "torchvision": processing.SwinHFImageProcessor,
        "pil": processing.SwinHFImageProcessorPil,
    }
    AutoImageProcessor.register(SwinHFConfig, image_processor_classes=processors, exist_ok=True)


register_config()
