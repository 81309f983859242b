"""Train a Swin Transformer to segment pictures: ``swin-hf train --task semantic-segmentation`` from a checkout.

python recipes/segment.py fit --config segment_stamps --data.dataset stamps
python recipes/segment.py fit --config segment_ade20k
"""

import sys

from swin_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--task", "semantic-segmentation", *sys.argv[1:]]))
