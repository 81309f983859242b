"""Every Swin checkpoint in the world, both ways: key tables, detection, safe reading, conversion.

``load_checkpoint`` reads any layout into one of our models, ``export_checkpoint`` writes a model in the names of any
layout, ``convert_checkpoint`` does both on disk, ``open_checkpoint`` says what a file is without building a model.
"""

from swin_hf.checkpoints.convert import convert_checkpoint, export_checkpoint
from swin_hf.checkpoints.load import Checkpoint, load_checkpoint, open_checkpoint
from swin_hf.checkpoints.tables import LAYOUTS, Kind, Layout

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Kind",
    "Layout",
    "convert_checkpoint",
    "export_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
]
