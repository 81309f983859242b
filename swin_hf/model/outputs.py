"""What a model returns: transformers' conventions for losses, hidden states and attentions.

Shape legend:
    B batch, H and W height and width of a map in tokens, L = H * W, C channels of a stage,
    nW windows of a map, N tokens of a window, h heads.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from .configuration_swin_hf import SwinHFConfig


@dataclass
class SwinHFModelOutput(ModelOutput):
    """Output of ``SwinHFModel``."""

    last_hidden_state: Tensor | None = None  # tokens of the last stage, (B, L, C)
    pooler_output: Tensor | None = None  # their mean, (B, C); None without a pooling layer
    hidden_states: tuple[Tensor | None, ...] | None = None  # patch embeddings, and stages after merging, (B, L, C) each
    attentions: tuple[Tensor, ...] | None = None  # probabilities of each stage's last block, (B * nW, h, N, N) each
    reshaped_hidden_states: tuple[Tensor | None, ...] | None = None  # hidden_states as maps, (B, C, H, W) each

    def states(self) -> dict[str, Any]:
        """Hidden states and attentions by name, for the output of a head."""
        names = ("hidden_states", "attentions", "reshaped_hidden_states")
        return {name: getattr(self, name) for name in names}


@dataclass
class SwinHFImageClassifierOutput(ModelOutput):
    """Output of ``SwinHFForImageClassification``; the other fields are those of :class:`SwinHFModelOutput`."""

    loss: Tensor | None = None  # scalar, if labels were given
    logits: Tensor | None = None  # (B, num_labels)
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor | None, ...] | None = None


@dataclass
class SwinHFMaskedImageModelingOutput(ModelOutput):
    """Output of ``SwinHFForMaskedImageModeling``; the other fields are those of :class:`SwinHFModelOutput`."""

    loss: Tensor | None = None  # scalar, if a mask was given
    reconstruction: Tensor | None = None  # predicted pixels, (B, channels, height, width) of the image
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor | None, ...] | None = None


@dataclass
class SwinHFSemanticSegmenterOutput(SwinHFImageClassifierOutput):
    """Output of ``SwinHFForSemanticSegmentation``: logits for each patch, hidden states before merging.

    ``logits`` are ``(B, num_labels, H, W)`` of the patch grid, a quarter of the image for patches of 4 pixels.
    """


class Record:
    """What one call returns besides its result; the loop over the stages gives it every map.

    Args:
        config: Decides where the call says nothing.
        attentions: Whether to return attentions.
        hidden_states: Whether to return hidden states, or the numbers of those to return.
        merged: Whether the hidden state of a stage is the map after merging, as in transformers' ``SwinModel``, or
            before it, as in its ``SwinBackbone``.
        norms: The LayerNorm of each stage, by number, whose map is added to ``maps``; 0 is the stem.
    """

    def __init__(
        self,
        config: SwinHFConfig,
        attentions: bool | None,
        hidden_states: bool | int | Iterable[int] | None,
        merged: bool = True,
        norms: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.wants_attentions = bool(config.output_attentions if attentions is None else attentions)
        wanted = config.output_hidden_states if hidden_states is None else hidden_states
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            wanted = (wanted,)
        self.wanted: bool | tuple[int, ...] = tuple(wanted) if isinstance(wanted, Iterable) else bool(wanted)
        self.merged, self.last = merged, config.num_layers
        self.norms = norms or {}
        self.maps: list[Tensor] = []  # B, C, H, W
        self._attentions: list[Tensor] = []
        self._tokens: list[Tensor] = []  # B, L, C
        self._images: list[Tensor] = []  # B, C, H, W

    @property
    def wants_all(self) -> bool:
        """Whether every stage has to run."""
        return self.wants_attentions or self.wanted is not False

    def keep(self, x: Tensor, stage: int, attention: Tensor | None = None) -> Tensor:
        """Record the map ``(B, H, W, C)`` of a stage before merging; returns the map to continue with."""
        if attention is not None:
            self._attentions.append(attention)
        if not self.merged or stage in (0, self.last):
            x = self._keep_state(x)
        if stage in self.norms:
            self.maps.append(self.norms[stage](x).permute(0, 3, 1, 2).contiguous())
        return x

    def keep_merged(self, x: Tensor) -> Tensor:
        """Record the map ``(B, H/2, W/2, 2C)`` after merging; returns the map to continue with."""
        return self._keep_state(x) if self.merged else x

    def _keep_state(self, x: Tensor) -> Tensor:
        """Keep x as tokens and as an image, and rebuild it from them, so that gradients reach the returned states."""
        if self.wanted is False:
            return x
        self._tokens.append(x.flatten(1, 2))
        self._images.append(self._tokens[-1].unflatten(1, x.shape[1:3]).permute(0, 3, 1, 2).contiguous())
        return self._images[-1].permute(0, 2, 3, 1)

    def states(self) -> dict[str, Any]:
        """Attentions and both forms of the hidden states, tokens and images, by the names that outputs have."""
        return {
            "hidden_states": self._select(self._tokens),
            "attentions": tuple(self._attentions) if self.wants_attentions else None,
            "reshaped_hidden_states": self._select(self._images),
        }

    def _select(self, states: list[Tensor]) -> tuple[Tensor | None, ...] | None:
        """The wanted states, with None in place of the others."""
        if isinstance(self.wanted, bool):
            return tuple(states) if self.wanted else None
        count = len(states)
        numbers = {number % count for number in self.wanted if -count <= number < count}
        return tuple(state if number in numbers else None for number, state in enumerate(states))
