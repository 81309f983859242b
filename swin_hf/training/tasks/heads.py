"""What the tasks share whose answer is one row of numbers for an image: the network and what of it is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from swin_hf.classes import ClassMismatchError, class_table, match_classes
from swin_hf.families import TASKS, architectures
from swin_hf.ranges import check_fields, check_range, ranged

from ..data.sources import shorten
from ..module import count_parameters
from ..network import (
    Network,
    add_lora,
    freeze_stages,
    load_network,
    new_network,
    recompute_activations,
    resolve,
    starting_folder,
    stored_config,
)
from .classes import ClassModule, class_fields, name_classes

ClassWeights = Literal["balanced"] | list[float] | dict[str, float] | None


@dataclass(frozen=True)
class Freezing:
    """What is not trained.

    Args:
        stages: Number of stages frozen together with the patch embedding; 0 trains everything.
        linear_probe: Train nothing but the classifier, on the features of evaluation mode.
    """

    stages: int = ranged(0, "[0, inf)")
    linear_probe: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, needs peft): only they and the classifier are trained.

    Args:
        rank: Rank of the adapters; 0 is off.
        alpha: Scale of the adapters; twice the rank when it is not given.
        targets: Linear layers that get an adapter; those of the attention when it is not given.
    """

    rank: int = ranged(0, "[0, inf)")
    alpha: int | None = ranged(None, "[1, inf)")
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


class HeadModule(ClassModule):
    """Trains an ``...ForImageClassification``; what its answers mean is the ``problem_type`` of its configuration.

    A subclass calls :meth:`build` in its constructor, and :meth:`weigh_classes` where it has class weights.

    Attributes:
        class_weights: Weight of each class in the loss, ``(num_labels,)``, where there are some.
    """

    task = "image-classification"
    problem_type: ClassVar[str | None] = None

    class_weights: Tensor | None

    def build(
        self,
        preset: str,
        weights: str | None,
        num_labels: int | None,
        id2label: dict[int, str] | None,
        image_size: int | tuple[int, int] | None,
        num_channels: int | None,
        network: Network,
        freezing: Freezing,
        lora: Lora,
    ) -> int:
        """Make :attr:`model`, out of arguments of the task.

        Returns:
            The length of its answers.

        Raises:
            ValueError: If the options contradict each other, or a checkpoint does not fit.
        """
        if lora.rank and (freezing.linear_probe or freezing.stages):
            other = "linear_probe" if freezing.linear_probe else f"freezing.stages {freezing.stages}"
            raise ValueError(
                f"lora.rank {lora.rank} trains adapters in all stages, which contradicts {other}; leave one of them out"
            )
        fields = network.fields(image_size=image_size, num_channels=num_channels, **class_fields(num_labels, id2label))
        self.starting_point = weights
        if weights is not None:
            self.origin = resolve(weights)
            weights = str(self.origin.path)
        self.model = build_classifier(preset, weights, fields, network.backend)
        self.model.config.problem_type = self.problem_type
        answers = int(self.model.config.num_labels or 0)
        if network.gradient_checkpointing:
            recompute_activations(self.model)
        if freezing.linear_probe:
            self.model.base_model.requires_grad_(False)
            self.frozen_parts = [self.model.base_model]
        elif freezing.stages:
            self.frozen_parts = freeze_stages(self.model.base_model, freezing.stages)
        if lora.rank:
            head = [name.rstrip(".") for name in TASKS[self.task].head]
            self.model = add_lora(self.model, lora.rank, lora.alpha, lora.targets, head)
        self.register_buffer("class_weights", None, persistent=False)
        return answers

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(B, num_labels)`` of normalised images ``(B, C, H, W)``."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits

    def on_fit_start(self) -> None:
        """Say what is trained."""
        super().on_fit_start()
        total, trainable = count_parameters(self.model)
        rank_zero_info(f"{trainable:,} of {total:,} parameters are trained")

    def weigh_classes(self, wanted: ClassWeights) -> None:
        """Set :attr:`class_weights`, ``(num_labels,)``; the data number their classes as the model does by now.

        Raises:
            ValueError: If the weights are not those of the classes, or would have to be counted in a stream.
        """
        if wanted is None:
            return
        names = class_table(self.model.config.id2label)
        if wanted == "balanced":
            data: Any = getattr(self.trainer, "datamodule", None)
            counts = list(getattr(data, "class_counts", {}).values())
            if not counts:
                raise ValueError(
                    "mixing.class_weights is 'balanced', and the pictures of each class cannot be counted, in a stream "
                    "or without an ImageDataModule; give the weights"
                )
            found = torch.tensor(counts, dtype=torch.float64)
            values = self.balanced_weights(found, data.split_sizes["train"])
            values = torch.where(found > 0, values, 1.0)  # no picture shows what the others are worth
        elif isinstance(wanted, Mapping):
            if sorted(wanted) != sorted(names):
                different = sorted(set(wanted) ^ set(names))
                raise ValueError(
                    f"mixing.class_weights differs from the classes in {shorten(different)}; give the weight of each of"
                    f" {shorten(names)}"
                )
            values = torch.tensor([wanted[name] for name in names])
        else:
            if len(wanted) != len(names):
                raise ValueError(
                    f"mixing.class_weights has {len(wanted)} weights for {len(names)} classes; give one for each of"
                    f" {shorten(names)}, in this order or by name"
                )
            values = torch.tensor(wanted)
        self.class_weights = values.float()
        shown = [f"{name} {value:.4g}" for name, value in zip(names, values.tolist(), strict=True)]
        rank_zero_info(f"class weights: {shorten(shown)}")

    def balanced_weights(self, counts: Tensor, pictures: int) -> Tensor:
        """The weights that ``balanced`` means.

        Args:
            counts: Training pictures of each class, ``(num_labels,)``.
            pictures: Training pictures.
        """
        return pictures / (counts * (counts > 0).sum())


def check_weights(weights: ClassWeights) -> None:
    """Refuse weights that no loss can have.

    Raises:
        ValueError: If one is negative or not finite, or the word is another.
    """
    if isinstance(weights, str) and weights != "balanced":
        raise ValueError(f"mixing.class_weights is {weights!r}; it must be 'balanced', a list, or names with weights")
    if weights is not None and not isinstance(weights, str):
        check_range(
            "mixing.class_weights", list(weights.values() if isinstance(weights, dict) else weights), "[0, inf)"
        )


def build_classifier(preset: str, path: str | None, fields: dict[str, Any], backend: dict[str, Any]) -> Any:
    """A new model of a preset, or the model of a checkpoint with some fields changed.

    Its head stays for the classes that it knows by name, and is new where it does not know them all.

    Args:
        preset: Name of a preset, for a new model.
        path: Folder or foreign checkpoint file; ``None`` for a new model.
        fields: Fields of the configuration to set.
        backend: See :attr:`~swin_hf.training.network.Network.backend`.

    Raises:
        ValueError: If the checkpoint lacks more than a classifier, or its weights are not those of its configuration.
    """
    task = HeadModule.task
    if path is None:
        return new_network(task, preset, fields, backend)
    with starting_folder(path) as folder:
        stored = stored_config(folder)
        built = architectures().get(next(iter(stored.architectures or ()), ""))
        known = class_table(stored.id2label) if built is not None and built.task == task else []
        wanted = class_table(fields.get("id2label"))
        rows = rows_of_head(wanted, known)
        if rows is not None:
            fields = {name: fields[name] for name in fields.keys() - {"id2label", "label2id", "num_labels"}}
        network = load_network(task, folder, fields, backend)
    if rows is not None:
        network.select_labels(rows)
        name_classes(network.config, wanted)
    elif wanted and known:
        rank_zero_info(f"a new head for {shorten(wanted, 5)}: that of the starting point knows {shorten(known, 5)}")
        head: Any = network.classifier
        head = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
        network._init_weights(head)
        network.classifier = head
    return network


def rows_of_head(wanted: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Number of each class in a stored head; ``None`` where it does not know them all."""
    try:
        return match_classes(wanted, known, model="the starting point") if wanted and known else None
    except ClassMismatchError:
        return None
