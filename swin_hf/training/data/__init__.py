"""From any image dataset to batches."""

from .prepare import Prepared as Prepared
from .prepare import Shrinking as Shrinking
from .prepare import prepare as prepare
