"""Train a Swin Transformer to classify images, from scratch or from any Swin checkpoint.

    python recipes/finetune.py fit                                              # handwritten digits, offline, a minute
    python recipes/finetune.py fit --config recipes/configs/finetune_imagefolder.yaml --data.data_dir photos
    python recipes/finetune.py test --ckpt_path runs/digits/checkpoints/best.ckpt
    python recipes/finetune.py fit --help                                       # every option
    python recipes/finetune.py --print_schema                                   # the same for editors (JSON schema)

Configurations are merged from left to right, and options win over those before them:

    python recipes/finetune.py fit -c recipes/configs/imagenet1k_swin_tiny.yaml -c recipes/configs/ddp.yaml \
        --trainer.devices 8 --ckpt_path last

``--ckpt_path last`` starts, goes on after a crash and resumes after SIGTERM (exit code 143). The run leaves
``runs/<name>/``: config.yaml, checkpoints/, metrics.csv, tensorboard/, figures, and model/ with the best weights.
"""

import sys
from pathlib import Path

from options import refuse_foreign_options

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"

if __name__ == "__main__":
    refuse_foreign_options(sys.argv[1:])
    from swin_hf.training import SwinClassifier, run_recipe  # takes seconds

    sys.exit(run_recipe(SwinClassifier, DEFAULT_CONFIG))
