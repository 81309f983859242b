"""What the tasks share whose answer is one row of numbers for an image: the network and what of it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchvision.transforms import v2

from swin_hf.classes import ClassMismatchError, class_table, match_classes
from swin_hf.families import TASKS, architectures
from swin_hf.loading import read_foreign_config
from swin_hf.ranges import Options, check_range, ranged

from ..data.shards import shorten
from ..network import Network, load_network
from ..optim import Optimization
from .classes import ClassModule, class_fields, name_classes

ClassWeights = Literal["balanced"] | list[float] | dict[str, float] | None


@dataclass(frozen=True)
class Freezing(Options):
    """What is not trained.

    Args:
        stages: Number of stages frozen together with the patch embedding; 0 trains everything.
        linear_probe: Train nothing but the classifier, on the features of evaluation mode.
    """

    stages: int = ranged(0, "[0, inf)")
    linear_probe: bool = False


@dataclass(frozen=True)
class Lora(Options):
    """Low-rank adapters (LoRA, needs peft): only they and the classifier are trained.

    Args:
        rank: Rank of the adapters; 0 is off.
        alpha: Scale of the adapters; twice the rank when it is not given.
        targets: Linear layers that get an adapter; those of the attention when it is not given.
    """

    rank: int = ranged(0, "[0, inf)")
    alpha: int | None = ranged(None, "[1, inf)")
    targets: list[str] | None = None


@dataclass(frozen=True)
class Mixing(Options):
    """What the loss compares: label smoothing, Mixup and CutMix make soft targets, and classes may weigh more or less.

    Args:
        label_smoothing: Probability spread over all classes, in [0, 1].
        mixup_alpha: Beta parameter of Mixup; 0 is off.
        cutmix_alpha: Beta parameter of CutMix; 0 is off. With both, each batch takes one of them.
        mix_probability: Share of the batches that are mixed.
        class_weights: Weight of each class in the training loss: a list in the order of the classes, or by name, or
            balanced, which is pictures / (classes x pictures of the class); with several labels an image, the weight
            of its presence, which balanced makes absences / presences.
    """

    label_smoothing: float = ranged(0.1, "[0, 1]")
    mixup_alpha: float = ranged(0.0, "[0, inf)")
    cutmix_alpha: float = ranged(0.0, "[0, inf)")
    mix_probability: float = ranged(1.0, "[0, 1]")
    class_weights: ClassWeights = None

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.class_weights
        if isinstance(weights, str):
            if weights != "balanced":
                raise ValueError(f"mixing.class_weights is {weights!r}; it must be 'balanced', a list, or by name")
        elif weights is not None:
            numbers = list(weights.values() if isinstance(weights, dict) else weights)
            check_range("mixing.class_weights", numbers, "[0, inf)")

    def transform(self, classes: int) -> v2.Transform:
        """Mixup, CutMix or a choice of both, for a batch and its labels, which become ``(B, classes)``; or nothing."""
        kinds = ((v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha))
        choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        if not choices:
            return v2.Identity()
        mix = choices[0] if len(choices) == 1 else v2.RandomChoice(choices)
        return mix if self.mix_probability == 1 else v2.RandomApply([mix], p=self.mix_probability)


class HeadModule(ClassModule):
    """Trains an ``...ForImageClassification``; the ``problem_type`` of its configuration says what its answers mean.

    A subclass makes its metrics in :meth:`configure_metrics`, and may set :attr:`mixing`. The other arguments are those
    of :class:`~swin_hf.training.tasks.classes.ClassModule` and :class:`~swin_hf.training.SwinModule`.

    Args:
        weights: Weights to start from: a ``save_pretrained`` folder (SimMIM too), a Hub id, or a checkpoint of
            Microsoft, timm, torchvision, transformers or OpenMMLab. The head is replaced when the classes differ.
        freezing: What is not trained.
        lora: Low-rank adapters.

    Raises:
        ValueError: If options contradict each other, or a checkpoint does not fit.
    """

    task = "image-classification"
    finetuning_config = "finetune_imagefolder"
    problem_type: ClassVar[str | None] = None
    default_labels: ClassVar[int | None] = None  # num_labels where nothing says how many there are

    mixing: Mixing | None = None
    class_weights: Tensor | None = None  # in the loss, (num_labels,), where there are some; an average has none

    def __init__(
        self,
        preset: str = "swin_tiny_patch4_window7_224",
        weights: str | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_channels: int | None = None,
        network: Network = Network(),
        optimization: Optimization = Optimization(),
        freezing: Freezing = Freezing(),
        lora: Lora = Lora(),
    ) -> None:
        super().__init__(optimization, network.compile)
        # Not to the loggers: the command logs the whole configuration once, without clashes with the data's.
        self.save_hyperparameters(logger=False)
        if lora.rank and (freezing.linear_probe or freezing.stages):
            other = "linear_probe" if freezing.linear_probe else f"freezing.stages {freezing.stages}"
            raise ValueError(
                f"lora.rank {lora.rank} trains adapters in all stages, which contradicts {other}; leave one of them out"
            )
        fields = class_fields(num_labels or self.default_labels, id2label)
        fields |= {"image_size": image_size, "num_channels": num_channels}
        self.build(preset, weights, network, load_classifier, **fields)
        self.model.config.problem_type = self.problem_type
        self.frozen_parts = freeze(self.model.base_model, freezing)
        if lora.rank:
            self.model = add_lora(self.model, lora, [name.rstrip(".") for name in TASKS[self.task].head])
        self.configure_metrics(int(self.model.config.num_labels or 0))

    def configure_metrics(self, labels: int) -> None:
        """Make the metrics for answers of this length: objects that hold counts, exact over any number of processes."""
        raise NotImplementedError(f"{type(self).__name__} has to make its metrics")

    def setup(self, stage: str) -> None:
        """Check the model against the data, and weigh the classes; ValueError if they do not fit."""
        super().setup(stage)
        if stage == "fit" and self.mixing is not None and self.mixing.class_weights is not None:
            self.weigh_classes(self.mixing.class_weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(B, num_labels)`` of normalised images ``(B, C, H, W)``."""
        return self.model(pixel_values=pixel_values).logits

    def on_fit_start(self) -> None:
        """Bring the class weights to the device, and say what is trained."""
        super().on_fit_start()
        self.class_weights = None if self.class_weights is None else self.class_weights.to(self.device)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.model.parameters()]
        trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
        rank_zero_info(f"{trained:,} of {total:,} parameters are trained")

    def weigh_classes(self, wanted: str | list[float] | dict[str, float]) -> None:
        """Set :attr:`class_weights`; the data number their classes as the model does by now."""
        names = self.class_names
        if isinstance(wanted, Mapping):
            if different := set(wanted) ^ set(names):
                problem = f"mixing.class_weights differs from the classes in {shorten(sorted(different))}"
                raise ValueError(f"{problem}; give the weight of each of {shorten(names)}")
            wanted = [wanted[name] for name in names]
        elif isinstance(wanted, str):
            counts = torch.tensor(list(getattr(self.datamodule, "class_counts", {}).values()), dtype=torch.float64)
            if not len(counts):
                raise ValueError(
                    "mixing.class_weights is 'balanced', and the pictures of each class cannot be counted, in a stream "
                    "or without an ImageDataModule; give the weights"
                )
            # A weight of 1 for classes that no picture has, or each: nothing shows what they are worth.
            balanced = self.balanced_weights(counts, self.datamodule.split_sizes["train"])
            wanted = torch.where((counts > 0) & (balanced > 0), balanced, 1.0).tolist()
        values = torch.tensor(wanted)
        if len(values) != len(names):
            problem = f"mixing.class_weights has {len(values)} weights for {len(names)} classes"
            raise ValueError(f"{problem}; give one for each of {shorten(names)}, in this order or by name")
        self.class_weights = values.float()
        shown = [f"{name} {value:.4g}" for name, value in zip(names, values.tolist(), strict=True)]
        rank_zero_info(f"class weights: {shorten(shown)}")

    def balanced_weights(self, counts: Tensor, pictures: int) -> Tensor:
        """The weights for these training pictures of each class, out of so many; where a count is 0, any value."""
        return pictures / (counts * (counts > 0).sum())


def freeze(base: Any, freezing: Freezing) -> list[nn.Module]:
    """Freeze parts of a base model, and return them: they stay in evaluation mode."""
    if freezing.stages > len(base.stages):
        raise ValueError(f"freezing.stages is {freezing.stages} but the model has {len(base.stages)} stages")
    parts: list[nn.Module] = [base] if freezing.linear_probe else []
    if freezing.stages and not freezing.linear_probe:
        parts = [base.embeddings, *base.stages[: freezing.stages]]
    for part in parts:
        part.requires_grad_(False)
    return parts


def add_lora(network: Any, lora: Lora, head: list[str]) -> nn.Module:
    """Wrap a network so that only low-rank adapters and the modules of its head are trained; ImportError if no peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora.rank needs peft: pip install peft") from error
    alpha, targets = lora.alpha or 2 * lora.rank, lora.targets or ["qkv", "proj"]
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, modules_to_save=head)
    return get_peft_model(network, config)


def load_classifier(task: str, path: Path, fields: dict[str, Any], backend: dict[str, Any]) -> tuple[Any, bool]:
    """Load a classifier as :func:`~swin_hf.training.network.load_network` does.

    Its head stays for the classes that it knows by name, and is new where it does not know them all.
    """
    stored = read_foreign_config(path)
    built = architectures().get(next(iter(stored.architectures or ()), ""))
    known = class_table(stored.id2label) if built is not None and built.task == task else []
    wanted = class_table(fields.get("id2label"))
    if not (wanted and known):
        return load_network(task, path, fields, backend)
    try:
        rows = match_classes(wanted, known, model="the starting point")  # of the stored head, for each wanted class
    except ClassMismatchError:
        network, _ = load_network(task, path, fields, backend)
        rank_zero_info(f"a new head for {shorten(wanted, 5)}: that of the starting point knows {shorten(known, 5)}")
        network.reset_classifier(len(wanted))
        has_new_head = True
    else:
        fields = {name: fields[name] for name in fields.keys() - {"id2label", "label2id", "num_labels"}}
        network, has_new_head = load_network(task, path, fields, backend)
        network.select_labels(rows)
    name_classes(network.config, wanted)
    return network, has_new_head
