"""The configuration of a Swin Transformer V2: that of V1, and what its bias is scaled by.

The fields carry the names of transformers' own ``Swinv2Config``, whose dictionary can be handed to this one.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from .configuration_swin_hf import Pair, SwinHFConfig, as_pair, check_sides


class SwinV2HFConfig(SwinHFConfig):
    """Sizes and switches of a Swin Transformer V2 (https://arxiv.org/abs/2111.09883).

    All fields of :class:`SwinHFConfig` mean the same here; these are new, or have another default.

    Args:
        pretrained_window_sizes: For each stage, the window that the weights were pre-trained with, an integer or
            ``(height, width)`` in tokens; 0 where they still have it. It is part of the weights, like a scale: the
            coordinates of the bias are divided by it. ``set_input_size`` fills it in when windows change. Left out,
            zeros.
        extra_norm_every_n_blocks: After how many blocks of a stage the main branch has a LayerNorm, 6 in the two
            largest models of the paper (section 3.2); 0 for never. The name is OpenMMLab's.
        qkv_bias: Whether queries and values have a bias; keys have none.
        norm_targets: As in V1; the 47 pixels of V2's SimMIM unless it is given, ``None`` for raw pixels.
        norm_features: Whether a backbone has a LayerNorm for each of its maps, as OpenMMLab's have. transformers' own
            ``Swinv2Backbone`` has none.
    """

    model_type = "swinv2_hf"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    cosine_attention: ClassVar[bool] = True
    _sequences: ClassVar[frozenset[str]] = SwinHFConfig._sequences | {"pretrained_window_sizes"}
    _peers: ClassVar[tuple[str, ...]] = ("swinv2",)
    _strangers: ClassVar[dict[str, str]] = {"swin": "SwinHF", "swin_hf": "SwinHF", "maskformer-swin": "SwinHF"}

    pretrained_window_sizes: Sequence[int | Sequence[int]] = ()
    extra_norm_every_n_blocks: int = 0
    norm_targets: int | None = 47
    norm_features: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.pretrained_window_sizes and isinstance(self.depths, list):
            self.pretrained_window_sizes = [0] * len(self.depths)
        super().__post_init__(**kwargs)

    @property
    def bias_units(self) -> tuple[Pair, ...]:
        """For each stage, the window that the coordinates of the bias are divided by.

        It is the pre-trained one; or else the stage's own, as it is on the map of an image of ``image_size``.
        """
        units, grid = [], self.grid_hw
        for window, pretrained in zip(self.stage_windows, self.pretrained_window_sizes, strict=True):
            units.append(as_pair(pretrained) if pretrained else as_pair(map(min, window, grid)))
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        return tuple(units)

    def _check_windows(self) -> None:
        super()._check_windows()
        period: Any = self.extra_norm_every_n_blocks
        if not isinstance(period, int) or isinstance(period, bool) or period < 0:
            raise ValueError(f"extra_norm_every_n_blocks is {period!r}; give a number of blocks, or 0 for no such norm")
        window, grid = self.stage_windows[0], self.grid_hw
        if window[0] > grid[0] and window[1] > grid[1]:  # in later stages it may be, as in all released models
            raise ValueError(
                f"window_size {self.window_size} is larger than the map of the first stage, {grid[0]}x{grid[1]} tokens "
                f"(image_size {self.image_size}, patch_size {self.patch_size}); give a smaller window, or a "
                "larger image_size"
            )
        sizes = self.pretrained_window_sizes
        if not isinstance(sizes, list):
            raise ValueError(f"pretrained_window_sizes is {sizes!r}; give a list with an entry for each stage")
        stages = self.num_layers
        if len(sizes) < stages or any(sizes[stages:]):  # transformers' default has four zeros, whatever the stages
            raise ValueError(
                f"pretrained_window_sizes {sizes} has {len(sizes)} entries for {stages} stages (depths {self.depths}); "
                "give one for each stage, 0 where the weights still have the window they were trained with"
            )
        self.pretrained_window_sizes = sizes[:stages]
        for stage, size in enumerate(self.pretrained_window_sizes, start=1):
            if size != 0 or isinstance(size, bool):
                check_sides(f"pretrained_window_sizes of stage {stage}", size)

    @classmethod
    def _refuse_near_misses(cls, kwargs: dict[str, Any]) -> None:
        if kwargs.get("qk_scale") is not None:
            raise TypeError("'qk_scale' is of Swin Transformer V1; each head of V2 learns its scale, leave it out")
        super()._refuse_near_misses(kwargs)


__all__ = ["SwinV2HFConfig"]
