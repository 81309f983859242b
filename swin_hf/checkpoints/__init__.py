"""Every Swin checkpoint in the world, both ways: key tables, detection, safe reading, conversion.

What takes a source of the Hub as well is in ``swin_hf.loading``.
"""

from swin_hf.checkpoints.convert import export_checkpoint
from swin_hf.checkpoints.load import Checkpoint, open_checkpoint
from swin_hf.checkpoints.replace import replace_backbone
from swin_hf.checkpoints.tables import LAYOUTS, Kind

__all__ = ["LAYOUTS", "Checkpoint", "Kind", "export_checkpoint", "open_checkpoint", "replace_backbone"]
