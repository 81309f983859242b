"""Train a Swin Transformer to classify images: ``swin-hf train`` from a checkout. ``--help`` describes it.

python recipes/finetune.py fit                                       # handwritten digits, offline, a minute
python recipes/finetune.py fit --config finetune_imagefolder --data.data_dir photos
"""

import sys

from swin_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
