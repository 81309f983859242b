"""Semantic segmentation: UperNet (https://arxiv.org/abs/1807.10221) on the maps of a Swin Transformer.

The heads are the modules of transformers' ``UperNetForSemanticSegmentation``, with the dropout before the classifiers
that OpenMMLab's recipe has and transformers leaves out.

Shape legend:
    B batch, K classes, height and width of an image in pixels.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers import initialization as init
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
from transformers.utils.generic import can_return_tuple

from .configuration_swin_hf import SwinHFConfig
from .modeling_swin_hf import SwinHFPreTrainedModel
from .outputs import Record, SwinHFSemanticSegmenterOutput


@dataclass(frozen=True)
class UperNetSizes:
    """Sizes of the heads, ``config.upernet``; the defaults are those of the paper.

    Raises:
        ValueError: If a size is out of its range; the message gives both.
    """

    hidden_size: int = 512  # channels of the main head, in [1, 16384]
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)  # sides of the maps of the pyramid pooling, each in [1, 256]
    dropout: float = 0.1  # of whole channels before each classifier, in [0, 1)
    auxiliary_channels: int = 256  # of the auxiliary head, which reads the map before the last, in [1, 16384]
    auxiliary_loss_weight: float = 0.4  # share of its loss, in [0, 1000]; 0 leaves the head out
    ignore_index: int = 255  # label of pixels that have none

    def __post_init__(self) -> None:
        scales = tuple(self.pool_scales) if isinstance(self.pool_scales, list | tuple) else ()
        if not scales or not all(isinstance(side, int) and 1 <= side <= 256 for side in scales):
            raise ValueError(f"upernet.pool_scales is {self.pool_scales!r}; it is a list of sides, each in [1, 256]")
        object.__setattr__(self, "pool_scales", scales)
        ranges = {"hidden_size": (1, 16384), "auxiliary_channels": (1, 16384), "auxiliary_loss_weight": (0, 1000)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ValueError(f"upernet.{name} is {value!r}; it must be in [{least}, {most}]")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"upernet.dropout is {self.dropout!r}; it must be in [0, 1)")

    @classmethod
    def of(cls, config: SwinHFConfig) -> "UperNetSizes":
        """Read them from ``config.upernet``, where anything may be left out; ValueError for anything else."""
        given = config.upernet or {}
        names = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or not set(given) <= set(names):
            raise ValueError(f"upernet is {str(given)[:80]}; it is a dictionary of {', '.join(names)}")
        return cls(**given)


class SwinHFPixelClassifier(nn.Conv2d):
    """The last convolution of a head, behind a dropout of whole channels; its keys are those of a plain convolution."""

    def __init__(self, channels: int, num_labels: int, dropout: float) -> None:
        super().__init__(channels, num_labels, kernel_size=1)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, height, width)`` to ``(B, K, height, width)``."""
        return super().forward(F.dropout2d(x, self.dropout, self.training))


class SwinHFForSemanticSegmentation(SwinHFPreTrainedModel):
    """Swin Transformer with UperNet and an auxiliary FCN head, for a class of each pixel.

    The trunk is that of ``SwinHFBackbone``, key by key: the maps before merging, a LayerNorm for each, windows always
    partitioned.
    """

    _left_out = r"(^|swin\.)norm\.(weight|bias)$"  # each map has a norm of its own
    always_partition = True

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        sizes = UperNetSizes.of(config)
        if not config.num_labels:
            raise ValueError(f"num_labels is {config.num_labels}; a segmenter has at least one class")
        if config.num_layers < 2:
            raise ValueError(f"depths {config.depths} make 1 stage; UperNet needs at least 2")
        config.upernet = asdict(sizes) | {"pool_scales": list(sizes.pool_scales)}
        self.num_labels, self.sizes = config.num_labels, sizes
        self.swin = self.trunk_class(config, False, always_partition=self.always_partition, add_final_norm=False)
        channels = config.stage_dims
        norms = {f"stage{n}": nn.LayerNorm(dim, eps=config.layer_norm_eps) for n, dim in enumerate(channels, start=1)}
        self.hidden_states_norms = nn.ModuleDict(norms)
        shared: Any = {name: getattr(sizes, name) for name in ("hidden_size", "pool_scales", "auxiliary_channels")}
        heads = UperNetConfig(**shared | {"num_labels": config.num_labels})
        self.decode_head = UperNetHead(heads, in_channels=channels)
        self.auxiliary_head = None
        if sizes.auxiliary_loss_weight:
            self.auxiliary_head = UperNetFCNHead(heads, in_channels=channels, in_index=len(channels) - 2)
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                head.classifier = SwinHFPixelClassifier(head.channels, self.num_labels, sizes.dropout)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the heads as OpenMMLab does; all else as the family."""
        layer: Any = module
        if isinstance(module, nn.BatchNorm2d):
            for ones, zeros in ((layer.weight, layer.bias), (layer.running_var, layer.running_mean)):
                init.ones_(ones)
                init.zeros_(zeros)
            init.zeros_(layer.num_batches_tracked)
        elif isinstance(module, SwinHFPixelClassifier):
            init.normal_(layer.weight, std=0.01)
            init.zeros_(layer.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SwinHFSemanticSegmenterOutput:
        """Classify every pixel of images ``(B, channels, height, width)``.

        ``labels`` are ``(B, height, width)`` class numbers, ``upernet.ignore_index`` where a pixel has none. The loss
        is the mean cross-entropy of the other pixels, 0 where there are none, plus the auxiliary head's share.
        ValueError if images or labels do not fit, or for a single picture in training, because batch normalisation
        needs two.
        """
        norms = dict(enumerate(self.hidden_states_norms.values(), start=1))
        record = Record(self.config, output_attentions, output_hidden_states, merged=False, norms=norms)
        self._check_batch(pixel_values, labels)
        self.swin.run(pixel_values, record)
        logits = self.decode_head(record.maps)  # B, K, height / patch, width / patch
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels)
            if self.auxiliary_head is not None:
                loss = loss + self.sizes.auxiliary_loss_weight * self._loss(self.auxiliary_head(record.maps), labels)
        return SwinHFSemanticSegmenterOutput(loss=loss, logits=logits, **record.states())

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the pixels that have a label."""
        ignored = self.sizes.ignore_index
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum")
        return total / (labels != ignored).sum().clamp(min=1)

    def _check_batch(self, pixel_values: Tensor | None, labels: Tensor | None) -> None:
        if pixel_values is None:
            return  # the trunk refuses it
        if labels is not None and labels.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)} and pixel_values {tuple(pixel_values.shape)}; a label "
                "map has the batch, height and width of its images"
            )
        if labels is not None and labels.is_floating_point():
            raise ValueError(f"labels are of the type {labels.dtype}; class numbers are integers")
        alone = self.decode_head.training and len(pixel_values) == 1
        if alone and not any(isinstance(module, nn.SyncBatchNorm) for module in self.decode_head.modules()):
            raise ValueError(
                "batch normalisation cannot train on a single picture; give at least two to each device, or "
                "synchronise it over devices (sync_batchnorm)"
            )


__all__ = ["SwinHFForSemanticSegmentation", "UperNetSizes"]
