"""Supervised training: cross-entropy on hard or soft targets, everything else is regularisation."""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # a re-export
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)
from torchvision.transforms import v2
from transformers import AutoConfig, AutoModelForImageClassification

from swin_hf.classes import ClassMismatchError, class_table, has_names, match_classes
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFForImageClassification
from swin_hf.ranges import check_range

from .module import SwinModule, bring, count_parameters, freeze_stages, recompute_activations
from .optim import Schedule
from .sources import shorten

# A confusion matrix of more classes than this (8 MB of counts at 1000) is neither kept nor drawn.
MAX_CONFUSION_CLASSES = 1000


class SwinClassifier(SwinModule):
    """Train a Swin Transformer to classify images.

    The defaults are Microsoft's fine-tuning of a pre-trained model without Mixup; the full recipe stands in
    ``swin_hf/training/configs``. Learning rates are given for 512 images a step and scaled to the real global batch.

    Args:
        preset: Size of a new model, one of ``swin_hf.list_presets()``; ignored when ``model`` is given.
        model: Weights to start from: a ``save_pretrained`` folder (SimMIM too), a Hub id, or a checkpoint of
            Microsoft, timm, torchvision, transformers or OpenMMLab. The head is replaced when the classes differ.
        num_labels: Number of classes; from the data when run by the command line.
        id2label: Class number to name; from the data when run by the command line.
        image_size: Side, or height and width, of the images in pixels; from the data when run by the command line.
        num_channels: Channels of the images; from the data when run by the command line.
        window_size: Window side in tokens, when another than the preset's or the checkpoint's.
        drop_path_rate: Stochastic depth of the last block, when another than the preset's.
        overrides: Any other field of ``SwinHFConfig``, by name.
        attn_implementation: ``eager``, ``sdpa``, ``triton`` or ``auto``; the default is that of the model.
        learning_rate: Peak rate for a global batch of 512 images.
        lr_scaling: Whether the rates are scaled by global batch / 512; otherwise they are taken as they are.
        weight_decay: Decay of matrices and kernels; norms, biases and tables are never decayed.
        betas: The two averaging factors of AdamW.
        layer_decay: Factor on the rate for each layer further from the head; 1 is off, 0.7 to 0.9 is usual.
        schedule: Shape after the warm-up: ``cosine``, ``linear``, ``constant`` or ``multistep``.
        warmup_epochs: Length of the linear warm-up in epochs; fractions are allowed.
        warmup_steps: The same in optimiser steps; wins over ``warmup_epochs``.
        warmup_lr: Rate at the first step of the warm-up, scaled like ``learning_rate``.
        min_lr: Rate at the last step, scaled like ``learning_rate``.
        milestones: Epochs at which ``multistep`` drops the rate.
        gamma: Factor of such a drop.
        label_smoothing: Probability spread over all classes, in [0, 1).
        mixup_alpha: Beta parameter of Mixup; 0 is off.
        cutmix_alpha: Beta parameter of CutMix; 0 is off. With both, each batch takes one of them.
        mix_probability: Share of the batches that are mixed.
        freeze_stages: Number of stages frozen together with the patch embedding; 0 trains everything.
        linear_probe: Train nothing but the classifier, on the features of evaluation mode.
        lora_rank: Rank of LoRA adapters (needs peft); 0 is off. Only they and the classifier are trained.
        lora_alpha: Scale of the adapters; twice the rank when it is not given.
        lora_targets: Linear layers that get an adapter.
        distill_from: Teacher: folder or Hub id of any image classifier of transformers with the same classes, in any
            order. It sees the pixels as its preprocessor_config.json has them.
        distill_weight: Share of the teacher's loss, in [0, 1].
        temperature: Softening of both distributions in that loss.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third slower.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: For a value out of range, or a checkpoint that does not fit; the message says which.
    """

    monitor = "val_accuracy"
    mode = "max"

    def __init__(
        self,
        preset: str = "swin_tiny_patch4_window7_224",
        model: str | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_channels: int | None = None,
        window_size: int | list[int] | None = None,
        drop_path_rate: float | None = None,
        overrides: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        learning_rate: float = 5e-4,
        lr_scaling: bool = True,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float = 1.0,
        schedule: Schedule = "cosine",
        warmup_epochs: float = 5.0,
        warmup_steps: int | None = None,
        warmup_lr: float = 5e-7,
        min_lr: float = 5e-6,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        label_smoothing: float = 0.1,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float = 1.0,
        freeze_stages: int = 0,
        linear_probe: bool = False,
        lora_rank: int = 0,
        lora_alpha: int | None = None,
        lora_targets: list[str] | None = None,
        distill_from: str | None = None,
        distill_weight: float = 0.5,
        temperature: float = 2.0,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        # Not to the loggers: the callbacks log the whole configuration once, without clashes with the data's.
        self.save_hyperparameters(logger=False)
        for name, share in (
            ("label_smoothing", label_smoothing),
            ("mix_probability", mix_probability),
            ("distill_weight", distill_weight),
        ):
            check_range(name, share, "[0, 1]")
        check_range("drop_path_rate", drop_path_rate, "[0, 1)")
        check_range("mixup_alpha", mixup_alpha, "[0, inf)")
        check_range("cutmix_alpha", cutmix_alpha, "[0, inf)")
        check_range("temperature", temperature, "(0, inf)")
        check_range("freeze_stages", freeze_stages, "[0, inf)")
        check_range("lora_rank", lora_rank, "[0, inf)")
        check_range("lora_alpha", lora_alpha, "[1, inf)")
        if lora_rank and (linear_probe or freeze_stages):
            other = "linear_probe" if linear_probe else f"freeze_stages {freeze_stages}"
            raise ValueError(
                f"lora_rank {lora_rank} trains adapters in all stages, which contradicts {other}; leave one of them out"
            )
        if num_labels is not None and id2label is not None and num_labels != len(id2label):
            raise ValueError(f"num_labels is {num_labels} but id2label names {len(id2label)} classes; give one of them")
        self.configure_training(
            learning_rate=learning_rate,
            lr_scaling=lr_scaling,
            weight_decay=weight_decay,
            betas=betas,
            layer_decay=layer_decay,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            warmup_steps=warmup_steps,
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            milestones=milestones or [],
            gamma=gamma,
            compile=compile,
        )
        if isinstance(image_size, tuple | list) and len(set(image_size)) == 1:
            image_size = image_size[0]
        fields: dict[str, Any] = dict(overrides or {})
        for name, value in (
            ("num_labels", num_labels if id2label is None else len(id2label)),
            ("image_size", image_size),
            ("num_channels", num_channels),
            ("window_size", window_size),
            ("drop_path_rate", drop_path_rate),
        ):
            if value is not None:
                fields[name] = value
        if id2label is not None:
            fields["id2label"] = {int(number): name for number, name in id2label.items()}
            fields["label2id"] = {name: number for number, name in fields["id2label"].items()}
        self.starting_point = model
        if model is not None:
            model, self.starting_commit = bring(model)
        network = build_classifier(preset, model, fields, attn_implementation)
        if gradient_checkpointing:
            recompute_activations(network)
        if linear_probe:
            network.swin.requires_grad_(False)
            self.resting = [network.swin]
        elif freeze_stages:
            self.resting = freeze_stages_of(network, freeze_stages)
        self.model = add_lora(network, lora_rank, lora_alpha, lora_targets) if lora_rank else network

        self.label_smoothing = label_smoothing
        classes = int(network.config.num_labels or 0)
        self.mix = mixing(mixup_alpha, cutmix_alpha, mix_probability, classes)
        self.distill_from = distill_from
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.teacher: list[nn.Module] = []  # in a list: neither saved, nor averaged, nor trained
        self.configure_metrics(classes)

    def configure_metrics(self, classes: int) -> None:
        """Create the metrics: objects that hold counts, hence exact over any number of processes."""
        accuracies: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False)
        }
        if classes > 5:
            accuracies["accuracy_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro", validate_args=False)
        metrics = MetricCollection(accuracies, compute_groups=False)
        self.train_loss = MeanMetric()
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.test_metrics.add_metrics({"ece": MulticlassCalibrationError(classes, n_bins=15, validate_args=False)})
        self.confusion: MulticlassConfusionMatrix | None = None
        if classes <= MAX_CONFUSION_CLASSES:
            self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)
        self.confusion_counts: Tensor | None = None  # (classes, classes), after a test: rows are the truth

    def setup(self, stage: str) -> None:
        """Check the model against the data, and load the teacher.

        Raises:
            ValueError: If the data has another number of classes, or the teacher does not fit.
        """
        super().setup(stage)
        if stage != "predict":
            self.match_data(fitting=stage == "fit")
        if stage == "fit" and self.distill_from is not None and not self.teacher:
            data: Any = getattr(self.trainer, "datamodule", None)
            names = self.model.config.id2label
            normalization = (data.mean, data.std) if hasattr(data, "mean") and hasattr(data, "std") else None
            self.teacher = [load_teacher(self.distill_from, names, self.model.config.num_channels, normalization)]

    def match_data(self, fitting: bool) -> None:
        """Make the data number its classes as the model does; a model without names takes those of its training data.

        Raises:
            ValueError: If a class of the data is unknown to the model, or it would not be trained on all that it knows.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        theirs = class_table(getattr(data, "id2label", None))
        ours = class_table(self.model.config.id2label)
        if not theirs or theirs == ours:
            return
        if fitting and not has_names(ours) and len(ours) == len(theirs):
            name_classes(self.model.config, theirs)
            return
        if fitting and len(theirs) != len(ours):
            raise ValueError(
                f"num_labels is {len(ours)} but the data has {len(theirs)} classes; leave num_labels out, it comes from"
                " the data"
            )
        data.renumber(match_classes(theirs, ours), ours)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of other classes, or of another model, before anything is loaded.

        Raises:
            ValueError: If classes, or names or shapes of tensors differ.
        """
        ours = class_table(self.model.config.id2label)
        theirs = class_table(checkpoint.get("hyper_parameters", {}).get("id2label"))
        if theirs and has_names(theirs) and has_names(ours) and ours != theirs:
            raise ClassMismatchError(
                f"the checkpoint numbers its classes {shorten(theirs)}, and this run {shorten(ours)}; start a new run"
                " from its weights, which are matched by name: --model.model runs/<name>/model"
            )
        super().on_load_checkpoint(checkpoint)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(B, num_labels)`` of normalised images ``(B, C, H, W)``."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits

    def on_fit_start(self) -> None:
        """Bring the teacher to the device, and say what is trained."""
        total, trainable = count_parameters(self.model)
        rank_zero_info(f"{trainable:,} of {total:,} parameters are trained")
        for teacher in self.teacher:
            teacher.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, after mixing."""
        images, labels = batch["pixel_values"], batch["labels"]
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)  # targets: B, num_labels
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if self.teacher:
            imitation = self.imitation_loss(logits, images)
            loss = (1 - self.distill_weight) * loss + self.distill_weight * imitation
        self.train_loss.update(loss.detach(), weight=len(labels))
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train_loss_step", loss.detach(), prog_bar=True)
        return loss

    def imitation_loss(self, logits: Tensor, images: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the teacher, softened; scaled so that gradients keep their size."""
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher[0](images) / self.temperature, -1)
        given = F.log_softmax(logits / self.temperature, -1)
        return F.kl_div(given, wanted, reduction="batchmean", log_target=True) * self.temperature**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss and accuracies of one batch."""
        return self.evaluate(batch, self.val_metrics, self.val_loss, "val_loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss, accuracies and confusion counts of one batch."""
        outputs = self.evaluate(batch, self.test_metrics, self.test_loss, "test_loss")
        if self.confusion is not None and outputs:
            self.confusion.update(outputs["logits"], batch["labels"])
        return outputs

    def evaluate(
        self, batch: dict[str, Tensor], metrics: MetricCollection, mean_loss: MeanMetric, name: str
    ) -> dict[str, Tensor]:
        """Add a batch to the metrics of a split; returns ``logits`` and the ``losses`` of the images.

        A batch of unreadable pictures is empty. It is logged all the same: ranks meet in every metric that is logged.
        """
        outputs = {}
        if batch:
            labels = batch["labels"]
            logits = self(batch["pixel_values"])
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            mean_loss.update(losses)
            metrics.update(logits, labels)
            outputs = {"logits": logits, "losses": losses}
        self.log(name, mean_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)
        return outputs

    def on_test_epoch_end(self) -> None:
        """Keep the confusion counts of all processes."""
        if self.confusion is not None:
            self.confusion_counts = self.confusion.compute().cpu()
            self.confusion.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Probabilities ``(B, num_labels)``."""
        return self.forward(batch["pixel_values"]).softmax(-1)

    def exportable(self) -> SwinHFForImageClassification:
        """The network as ``save_pretrained`` should write it, with LoRA merged into its weights."""
        network: SwinHFForImageClassification = self.model
        if hasattr(self.model, "merge_and_unload"):
            network = copy.deepcopy(self.model).merge_and_unload()
        return network


def build_classifier(
    preset: str, source: str | None, fields: dict[str, Any], attn_implementation: str | None
) -> SwinHFForImageClassification:
    """A new model of a preset, or the model of a checkpoint with some fields changed.

    Args:
        preset: Name of a preset, for a new model.
        source: Folder or foreign checkpoint file; ``None`` for a new model.
        fields: Fields of ``SwinHFConfig`` to set.
        attn_implementation: Attention backend; ``None`` for the default.

    Raises:
        ValueError: If the checkpoint lacks more than a classifier, or its weights are not those of its configuration.
    """
    backend: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if source is None:
        config = SwinHFConfig.from_preset(preset, **fields)
        network: SwinHFForImageClassification = SwinHFForImageClassification._from_config(config, **backend)
        return network
    if _is_ours(source):
        from swin_hf.hub.weights import check_folder

        check_folder(Path(source))
        return _start_from(source, fields, backend)
    from swin_hf.checkpoints import load_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        load_checkpoint(source).save_pretrained(folder)
        return _start_from(folder, fields, backend)


def _is_ours(source: str) -> bool:
    if not Path(source).is_dir():
        return False
    try:
        return bool(AutoConfig.from_pretrained(source).model_type == SwinHFConfig.model_type)
    except (OSError, ValueError, KeyError):  # no config.json, or none that transformers knows
        return False


def _start_from(folder: str, fields: dict[str, Any], backend: dict[str, Any]) -> SwinHFForImageClassification:
    """Load a folder; its head stays for the classes that it knows by name, and is new where it does not know all."""
    stored: Any = SwinHFConfig.from_pretrained(folder)
    known = class_table(stored.id2label) if stored.architectures == ["SwinHFForImageClassification"] else []
    wanted = class_table(fields.get("id2label"))
    rows = _rows_of_head(wanted, known)
    if rows is not None:
        fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id", "num_labels")}
    model: SwinHFForImageClassification
    model, report = SwinHFForImageClassification.from_pretrained(
        folder, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **fields, **backend
    )
    missing = [name for name in report["missing_keys"] if not name.startswith("classifier.")]
    unfit = [str(name[0] if isinstance(name, tuple) else name) for name in report["mismatched_keys"]]
    missing += [name for name in unfit if not name.startswith("classifier.")]
    if missing:
        raise ValueError(
            f"the checkpoint does not fit the model: {len(missing)} tensors besides the classifier are missing or of "
            f"another size ({', '.join(sorted(missing)[:5])}); change only image_size and window_size, or start anew"
        )
    if rows is not None:
        model.select_labels(rows)
        name_classes(model.config, wanted)
    elif wanted and known:
        rank_zero_info(f"a new head for {shorten(wanted, 5)}: that of the starting point knows {shorten(known, 5)}")
        head: Any = model.classifier
        head = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
        model._init_weights(head)
        model.classifier = head
    return model


def _rows_of_head(wanted: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Number of each class in a stored head; ``None`` where it does not know them all."""
    try:
        return match_classes(wanted, known, model="the starting point") if wanted and known else None
    except ClassMismatchError:
        return None


def name_classes(config: Any, names: Sequence[str]) -> None:
    """Write the names of the classes into a configuration of as many classes."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def freeze_stages_of(network: SwinHFForImageClassification, stages: int) -> list[nn.Module]:
    """Freeze the first stages of a classifier; see :func:`freeze_stages`."""
    return freeze_stages(network.swin, stages)


def add_lora(
    network: SwinHFForImageClassification, rank: int, alpha: int | None, targets: list[str] | None
) -> nn.Module:
    """Wrap a classifier so that only low-rank adapters and its head are trained.

    Raises:
        ImportError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install peft") from error
    return get_peft_model(
        network,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=targets or ["qkv", "proj"],
            modules_to_save=["classifier"],
        ),
    )


def mixing(mixup: float, cutmix: float, probability: float, classes: int) -> v2.Transform | None:
    """Mixup, CutMix or a choice of both, for a batch and its labels; ``None`` when both are off.

    Targets of a mixed batch become ``(B, classes)``.
    """
    choices: list[nn.Module] = []
    if mixup:
        choices.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix:
        choices.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    if not choices:
        return None
    mix = choices[0] if len(choices) == 1 else v2.RandomChoice(choices)
    return mix if probability == 1 else v2.RandomApply([mix], p=probability)


class Teacher(nn.Module):
    """A frozen image classifier that takes the student's pixels and answers with the student's classes.

    Args:
        network: Image classifier of transformers.
        order: The network's number of each class of the student.
        scale: Factor on the student's normalised pixels, for each channel of the network.
        shift: What is added then.
    """

    order: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, order: Sequence[int], scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_labels)`` of images ``(B, C, H, W)``; grey ones are repeated where colours are wanted."""
        network: Any = self.network
        images = (images * self.scale + self.shift).to(network.dtype)
        size = getattr(network.config, "image_size", None)
        if size is not None:
            sides = (size, size) if isinstance(size, int) else tuple(size)
            if sides != tuple(images.shape[-2:]):
                images = F.interpolate(images, sides, mode="bicubic", antialias=True)
        logits: Tensor = network(pixel_values=images).logits
        return logits[:, self.order]


def load_teacher(
    source: str,
    id2label: Mapping[int, str],
    num_channels: int,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Teacher:
    """A frozen image classifier of transformers, adapted to its student.

    Args:
        source: Folder or Hub id.
        id2label: Class number to name, of the student.
        num_channels: Channels of the student's images.
        normalization: Mean and standard deviation of each channel that the student's images are normalised with;
            ``None`` where they are unknown, and taken for the teacher's.

    Raises:
        ValueError: If it is missing, knows other classes or takes images of other channels.
    """
    folder = Path(bring(source)[0])
    try:
        network: Any = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the teacher {source!r} is not an image classifier of transformers: {reason}") from error
    order = match_classes(class_table(id2label), class_table(network.config.id2label), model=f"the teacher {source!r}")
    channels = getattr(network.config, "num_channels", 3)
    if channels != num_channels and (num_channels, channels) != (1, 3):
        raise ValueError(
            f"the teacher {source!r} takes images of {channels} channels but the student's have {num_channels}; choose"
            " a teacher of as many channels (data.num_channels)"
        )
    scale, shift = torch.ones(channels), torch.zeros(channels)
    theirs = processor_normalization(folder)
    if normalization is not None and theirs is not None:
        (mean, std), (their_mean, their_std) = (map(torch.tensor, pair) for pair in (normalization, theirs))
        scale, shift = scale * std / their_std, shift + (mean - their_mean) / their_std
    return Teacher(network, order, scale, shift)


def processor_normalization(folder: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that an image processor normalises with; ``None`` where the folder does not say.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); save the image processor again") from error
    if values.get("do_normalize") is False:
        return [0.0], [1.0]
    if "image_mean" not in values or "image_std" not in values:
        return None
    return values["image_mean"], values["image_std"]
