"""Pre-train a Swin Transformer without labels (SimMIM); ``swin-hf train --model.weights`` fine-tunes the result.

    swin-hf pretrain                                    # handwritten digits, offline, on the CPU
    swin-hf pretrain --config simmim_pretrain --data.data_dir photos
    swin-hf train --config simmim_finetune --model.weights runs/simmim/model

The run writes the same folder as ``swin-hf train``, with ``reconstructions.png``: pictures, what the model sees of
them, and what it predicts.
"""

from collections.abc import Sequence

from . import train


def main(words: Sequence[str]) -> int:
    """Run ``swin-hf pretrain WORDS`` and return the exit code of :func:`swin_hf.training.run_recipe`."""
    return train.main(words, "masked-image-modeling", __doc__)
