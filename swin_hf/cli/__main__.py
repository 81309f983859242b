"""``python -m swin_hf.cli`` is ``swin-hf``."""

import sys

from swin_hf.cli import main

sys.exit(main())
