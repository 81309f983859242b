"""A disk without room, for tests: a limit on the size of files works for every user and in one process."""

import resource
from contextlib import contextmanager

from lightning.pytorch import Callback


@contextmanager
def files_of_at_most(size):
    """A disk that is full after ``size`` bytes of a file; Python ignores the signal that comes with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class FullFrom(Callback):
    """The disk is full from a hook on; whoever uses it makes room again."""

    def __init__(self, hook: str, size: int = 0, epoch: int = 0):
        def fill(trainer, *_, **__):
            if trainer.current_epoch >= epoch and not trainer.sanity_checking:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        setattr(self, hook, fill)
