"""The methods that users of timm (https://github.com/huggingface/pytorch-image-models) know, for our classifiers.

Shape legend:
    B batch, H and W height and width of the last stage's map in tokens, C its channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .outputs import Record


class TimmVerbs:
    """What timm's Swin Transformer and ours can do under the same names; comes first in the bases of a classifier."""

    def forward_features(self: Any, pixel_values: Tensor) -> Tensor:
        """The normalised map of the last stage, ``(B, H, W, C)``, of images ``(B, channels, height, width)``."""
        return self.base_model.norm(self.base_model.run(pixel_values, Record(self.config, False, False)))

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits ``(B, num_labels)`` of the map that :meth:`forward_features` returns.

        ``pre_logits`` stops before the Linear layer: the mean of the tokens, ``(B, C)``.
        """
        x = x.flatten(1, 2).mean(dim=1)  # B, C
        return x if pre_logits else self.classifier(x)

    def no_weight_decay(self: Any) -> set[str]:
        """Names of the parameters that timm's optimisers must not decay; norms and biases they leave out themselves."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if any(part in name for part in self.undecayed)}

    def group_matcher(self: Any, coarse: bool = False) -> dict[str, Any]:
        """Where timm's layer-wise learning rates count their layers: blocks, with ``coarse`` stages, from the stem on.

        A merging belongs to the block before it; the last norm, the head and position embeddings come last.
        """
        merging = [
            (rf"^swin\.stages\.({stage})\.downsample", (depth - 1,)) for stage, depth in enumerate(self.config.depths)
        ]
        blocks: Any = [*merging, (r"^swin\.stages\.(\d+)\.\w+\.(\d+)", None)]
        return {
            "stem": r"^swin\.embeddings\.(?!position)",
            "blocks": r"^swin\.stages\.(\d+)" if coarse else blocks,
        }

    def get_classifier(self: Any) -> nn.Module:
        """The last Linear layer; ``nn.Identity`` in a model without classes."""
        return self.classifier  # type: ignore[no-any-return]

    def reset_classifier(self: Any, num_classes: int) -> None:
        """Replace the last Linear layer by a new, random one; the names of the classes start anew.

        With 0 classes, the model returns the mean of the last stage's tokens; a negative number is a ValueError.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; give the number of classes, or 0 for none")
        weight = self.base_model.norm.weight
        where: Any = {"device": weight.device, "dtype": torch.float32}  # torch 2.11 truncates wrongly in bfloat16
        head = nn.Linear(len(weight), num_classes, **where) if num_classes else nn.Identity()
        self._init_weights(head)
        self.classifier = head.to(weight.dtype).train(self.training)
        names = {number: f"LABEL_{number}" for number in range(num_classes)}  # as transformers names what has no name
        self.config.id2label, self.config.label2id = names, {name: number for number, name in names.items()}
        self.num_labels = num_classes
