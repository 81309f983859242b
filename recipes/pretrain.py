"""Pre-train a Swin Transformer without labels (SimMIM), then fine-tune from the result in one flag.

    python recipes/pretrain.py fit                                    # handwritten digits, offline, on the CPU
    python recipes/pretrain.py fit --config recipes/configs/simmim_pretrain.yaml --data.data_dir photos
    python recipes/finetune.py fit --config recipes/configs/simmim_finetune.yaml --model.model runs/simmim/model

The run leaves the same folder as finetune.py; ``reconstructions.png`` in it shows what the model sees and guesses.
"""

import sys
from pathlib import Path

from options import refuse_foreign_options

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "simmim_digits.yaml"

if __name__ == "__main__":
    refuse_foreign_options(sys.argv[1:])
    from swin_hf.training import SwinMaskedImageModeler, run_recipe  # takes seconds

    sys.exit(run_recipe(SwinMaskedImageModeler, DEFAULT_CONFIG))
