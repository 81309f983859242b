"""Pre-train a Swin Transformer without labels (SimMIM): ``swin-hf pretrain`` from a checkout. ``--help`` describes it.

python recipes/pretrain.py fit                                       # handwritten digits, offline, on the CPU
python recipes/pretrain.py fit --config simmim_pretrain --data.data_dir photos
"""

import sys

from swin_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
