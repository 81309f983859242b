"""Pre-train a Swin Transformer without labels (SimMIM), then fine-tune from the result in one flag.

    swin-hf pretrain                                    # handwritten digits, offline, on the CPU
    swin-hf pretrain --config simmim_pretrain --data.data_dir photos
    swin-hf train --config simmim_finetune --model.weights runs/simmim/model

The run leaves the same folder as ``swin-hf train``; ``reconstructions.png`` in it shows what the model sees and
guesses.
"""

from collections.abc import Sequence

from . import train


def main(words: Sequence[str]) -> int:
    """Run ``swin-hf pretrain WORDS`` and return the exit code of :func:`swin_hf.training.run_recipe`."""
    return train.main(words, "masked-image-modeling", __doc__)
