"""The families of models in this package, and the tasks that each is built for.

Registration with transformers, pushing, the card, conversion and loading read these tables. A family is one row of
:data:`FAMILIES` and its own files in ``model/``; a task is one row of :data:`TASKS` and a class in each of its
families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_relative_import_files

from .presets import SWIN, SWINV2

_ROOM = "swin_hf.model"


@dataclass(frozen=True)
class Task:
    """What a model is built for."""

    auto_class: str  # the Auto class of transformers
    pipeline_tag: str  # the task's name on the Hub
    head: tuple[str, ...] = ()  # prefixes of keys that only its models have; new if another task saved the weights


TASKS = {
    "features": Task("AutoModel", "image-feature-extraction"),
    "image-classification": Task("AutoModelForImageClassification", "image-classification", ("classifier.",)),
    "masked-image-modeling": Task(
        "AutoModelForMaskedImageModeling", "image-feature-extraction", ("decoder.", "swin.embeddings.mask_token")
    ),
    "semantic-segmentation": Task(
        "AutoModelForSemanticSegmentation",
        "image-segmentation",
        ("decode_head.", "auxiliary_head.", "hidden_states_norms."),
    ),
    "backbone": Task("AutoBackbone", "image-feature-extraction", ("hidden_states_norms.",)),
}


@dataclass(frozen=True)
class Family:
    """Models that share one configuration class; classes are named with their module in ``model/``."""

    model_type: str  # in config.json
    config: str  # the configuration class
    models: Mapping[str, str]  # the model class, by task
    processors: Mapping[str, str]  # the image processor, by backend of transformers
    presets: Mapping[str, Mapping[str, Any]]  # fields of the configuration of each released size
    paper: str  # where the architecture is defined
    title: str
    citation: str  # of the paper, in BibTeX

    @property
    def config_class(self) -> Any:
        """The configuration class itself."""
        return _load(self.config)

    def model_class(self, task: str) -> Any:
        """The model class for a task; ValueError if there is none."""
        if task not in self.models:
            raise ValueError(f"{self.model_type} has no model for {task}; it has them for {', '.join(self.models)}")
        return _load(self.models[task])

    def auto_map(self, task: str) -> dict[str, str]:
        """``auto_map`` of ``config.json``: the classes in the files that travel with a pushed model of a task."""
        modules = {path.stem for path in self.travelling_files(task)}
        found = {TASKS[other].auto_class: name for other, name in self.models.items() if name.split(".")[0] in modules}
        return {"AutoConfig": self.config} | found

    def travelling_files(self, task: str) -> list[Path]:
        """The code that a pushed model of a task needs: the modules of its classes and the files that they import."""
        modules = {name.split(".")[0] for name in (self.config, self.models[task], *self.processors.values())}
        found = {Path(import_module(f"{_ROOM}.{module}").__file__ or "") for module in modules}
        for path in tuple(found):
            found |= {Path(name) for name in get_relative_import_files(str(path))}
        return sorted(found)


PROCESSORS = {  # in this order, because transformers reads a pair as PIL's first
    "pil": "image_processing_swin_hf.SwinHFImageProcessorPil",
    "torchvision": "image_processing_swin_hf.SwinHFImageProcessor",
}

FAMILIES = {
    "swin_hf": Family(
        model_type="swin_hf",
        config="configuration_swin_hf.SwinHFConfig",
        models={
            "features": "modeling_swin_hf.SwinHFModel",
            "image-classification": "modeling_swin_hf.SwinHFForImageClassification",
            "masked-image-modeling": "modeling_swin_hf.SwinHFForMaskedImageModeling",
            "backbone": "modeling_swin_hf.SwinHFBackbone",
            "semantic-segmentation": "segmentation_swin_hf.SwinHFForSemanticSegmentation",
        },
        processors=PROCESSORS,
        presets=SWIN,
        paper="https://arxiv.org/abs/2103.14030",
        title="Swin Transformer",
        citation="""@inproceedings{liu2021swin,
  title = {Swin Transformer: Hierarchical Vision Transformer using Shifted Windows},
  author = {Liu, Ze and Lin, Yutong and Cao, Yue and Hu, Han and Wei, Yixuan and Zhang, Zheng and Lin, Stephen and Guo, Baining},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2021}
}""",  # noqa: E501
    ),
    "swinv2_hf": Family(
        model_type="swinv2_hf",
        config="configuration_swinv2_hf.SwinV2HFConfig",
        models={
            "features": "modeling_swinv2_hf.SwinV2HFModel",
            "image-classification": "modeling_swinv2_hf.SwinV2HFForImageClassification",
            "masked-image-modeling": "modeling_swinv2_hf.SwinV2HFForMaskedImageModeling",
            "backbone": "modeling_swinv2_hf.SwinV2HFBackbone",
            "semantic-segmentation": "segmentation_swinv2_hf.SwinV2HFForSemanticSegmentation",
        },
        processors=PROCESSORS,
        presets=SWINV2,
        paper="https://arxiv.org/abs/2111.09883",
        title="Swin Transformer V2",
        citation="""@inproceedings{liu2022swinv2,
  title = {Swin Transformer V2: Scaling Up Capacity and Resolution},
  author = {Liu, Ze and Hu, Han and Lin, Yutong and Yao, Zhuliang and Xie, Zhenda and Wei, Yixuan and Ning, Jia and Cao, Yue and Zhang, Zheng and Dong, Li and Wei, Furu and Guo, Baining},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2022}
}""",  # noqa: E501
    ),
}


@dataclass(frozen=True)
class Architecture:
    """One model class: a family, built for a task."""

    family: Family
    task: str

    @property
    def model_class(self) -> Any:
        """The model class itself."""
        return self.family.model_class(self.task)

    @property
    def pipeline_tag(self) -> str:
        """The task's name on the Hub."""
        return TASKS[self.task].pipeline_tag


def architectures() -> dict[str, Architecture]:
    """Every model class, by the name that ``config.json`` gives it."""
    return {
        name.split(".")[1]: Architecture(family, task)
        for family in FAMILIES.values()
        for task, name in family.models.items()
    }


def family_of(config: Any) -> Family:
    """The family of a configuration or ``model_type``; ValueError if there is none."""
    model_type = config if isinstance(config, str) else config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {str(model_type)[:80]!r}; this package has {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def list_presets(family: str | None = None) -> list[str]:
    """Names that ``from_preset`` accepts: of one family, by its ``model_type``, or of all."""
    chosen = FAMILIES.values() if family is None else [family_of(family)]
    return [name for one in chosen for name in one.presets]


def config_of_preset(name: str, **fields: Any) -> Any:
    """Configuration of a released size, one of :func:`list_presets`, with other values for some fields."""
    families = [family for family in FAMILIES.values() if name in family.presets] or list(FAMILIES.values())
    return families[0].config_class.from_preset(name, **fields)  # which raises for an unknown name


def register(family: Family) -> None:
    """Register a family with the Auto classes of transformers; a second time changes nothing."""
    config = family.config_class
    config.presets.update(family.presets)
    transformers.AutoConfig.register(family.model_type, config, exist_ok=True)
    for task in family.models:
        getattr(transformers, TASKS[task].auto_class).register(config, family.model_class(task), exist_ok=True)
    # Both classes are this package's: transformers looks registered ones up by name, for all models of the process.
    processors = {backend: _load(name) for backend, name in family.processors.items()}
    transformers.AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(".")
    return getattr(import_module(f"{_ROOM}.{module}"), attribute)
