"""Every Swin checkpoint in the world, both ways: key tables, detection, safe reading, conversion.

``open_checkpoint`` reads any layout and says what it is without building a model, ``export_checkpoint`` writes a model
in the names of any layout. What takes a source of the Hub as well is in ``swin_hf.loading``.
"""

from swin_hf.checkpoints.convert import export_checkpoint
from swin_hf.checkpoints.load import Checkpoint, load_checkpoint, open_checkpoint
from swin_hf.checkpoints.replace import replace_backbone
from swin_hf.checkpoints.tables import LAYOUTS, Kind, Layout

__all__ = [
    "LAYOUTS", "Checkpoint", "Kind", "Layout", "export_checkpoint", "load_checkpoint", "open_checkpoint",
    "replace_backbone",
]  # fmt: skip
