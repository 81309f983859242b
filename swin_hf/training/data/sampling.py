"""Which sample comes when, and where random numbers come from: the part of training that must be exact.

**Order.** The training order is a pure function of (seed, epoch). Rank ``r`` of ``W`` takes every ``W``-th sample from
position ``r`` on, so that global batch ``b`` holds the same samples whatever the number of ranks. Each epoch drops the
remainder that does not fill a global batch (other samples each time). A loader keeps no position of its own: it asks
Lightning's restored progress how many batches of the epoch are done, so the two can never disagree.

**Random numbers.** Nothing is drawn from a stream that would have to be saved:

* each *sample* is augmented with torch's generator seeded from (seed, epoch, row): the picture is the same whatever
  the number of workers, of ranks, or of interruptions; a picture that balanced sampling draws again is another sample;
* each *training batch* (random erasing, Mixup, CutMix, dropout, stochastic depth) is computed with the generators
  seeded from (seed, rank, epoch, batch): ranks differ, and a resumed run draws what the unbroken one drew.

**Evaluation** visits every sample once, on some rank; nothing is repeated to even out the ranks.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

Integers = np.ndarray[Any, np.dtype[np.int64]]
Position = tuple[int, int]  # epoch, batches of it that are done


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part; neighbouring parts give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def training_position(trainer: Trainer) -> Position:
    """Return the running epoch and how many of its batches have been started on, restored progress included."""
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready


def rewind_to_optimizer_step(trainer: Trainer) -> None:
    """Step a restored trainer back over batches whose gradients had not reached the weights.

    Gradients are not in a checkpoint: one from the middle of an accumulation window would go on with part of them.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    excess = progress.current.processed % trainer.accumulate_grad_batches
    if excess == 0 or progress.is_last_batch:  # on the last batch of an epoch, Lightning always steps
        return
    for tracker in (progress.total, progress.current):
        settled = tracker.processed - excess
        tracker.ready = tracker.started = tracker.processed = tracker.completed = settled


def gathered(mine: list[Any]) -> list[Any]:
    """The entries of all processes in the order of their ranks; collective: every process has to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    everyone: list[list[Any]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return [entry for entries in everyone for entry in entries]


def epoch_batches(size: int, batch_size: int, world_size: int) -> int:
    """Training batches per epoch and rank, at least one; ValueError if there are fewer samples than ranks."""
    if size < world_size:
        raise ValueError(
            f"{size} training samples cannot be shared by {world_size} ranks; use fewer devices or more data"
        )
    return max(1, size // (batch_size * world_size))


def balanced_order(classes: Integers, generator: np.random.Generator) -> tuple[Integers, Integers]:
    """Draw as many rows as there are, of each of the ``classes`` of the rows equally many, in random order.

    A class with fewer rows than its share is gone through again, in another order each time; a class with more gives
    others in each epoch. Where the share is not whole, some classes, drawn at random, get one row more.

    Returns:
        The rows, and how often each had been drawn before.
    """
    present, sizes = np.unique(classes, return_counts=True)
    shares = np.full(len(present), len(classes) // len(present))
    shares[generator.permutation(len(present))[: len(classes) % len(present)]] += 1
    rows, draws = [], []
    for name, size, share in zip(present, sizes, shares, strict=True):
        members, passes = np.flatnonzero(classes == name), -(-share // size)
        rows.append(np.concatenate([members[:0], *(generator.permutation(members) for _ in range(passes))])[:share])
        draws.append(np.arange(share) // size)
    order = generator.permutation(len(classes))
    return np.concatenate(rows)[order], np.concatenate(draws)[order]


class EpochSampler(DistributedSampler[tuple[int, ...]]):
    """The samples of one rank for one epoch, as ``(epoch, row)``, or ``(epoch, row, earlier draws)`` where balanced.

    A ``DistributedSampler`` by type, also for one process, so that Lightning never puts its own in place of it.

    It draws from the ``size`` rows of the training split; ``classes``, the class id of each row, are given where
    equally many of each are drawn.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,  # of one rank
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        classes: Integers | None = None,
    ) -> None:
        rows: Any = range(size)
        super().__init__(rows, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True)
        batches = epoch_batches(size, batch_size, world_size)
        self.num_samples = min(batches * batch_size, size // world_size)
        self.total_size = self.num_samples * world_size
        self.size, self.classes = size, classes
        self.start = 0  # samples of this rank to leave out: they were trained on before the interruption

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        seed, epoch = derive_seed(self.seed, "order", self.epoch), self.epoch
        order: tuple[Any, ...]
        if self.classes is None:
            order = (torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)),)
        else:
            order = balanced_order(self.classes, np.random.default_rng(seed))
        mine = (part[self.rank : self.total_size : self.num_replicas][self.start :].tolist() for part in order)
        return ((epoch, *key) for key in zip(*mine, strict=True))


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that begins where Lightning's progress says the run stopped.

    Lightning creates the iterator before it tells the sampler the epoch, and workers would start to prefetch at once;
    so the position is looked up and the workers are started at the first ``next``.

    The sampler is an :class:`EpochSampler`, or the dataset an iterable one, which never runs dry, with a method
    ``set_position(epoch, done)``: its first ``done`` batches are thrown away here.
    """

    def __init__(
        self,
        *args: Any,
        position: Callable[[], Position] | None = None,  # where the run stopped
        steps: int | None = None,  # batches per epoch of an iterable dataset
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.position, self.steps = position, steps
        self.read_seconds = self.waited_seconds = 0.0  # of all batches so far: of the readers, and of who wanted them

    def __len__(self) -> int:
        return super().__len__() if self.steps is None else self.steps

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, done = self.position() if self.position is not None else (0, 0)
        if self.steps is None:
            if isinstance(self.sampler, EpochSampler):
                self.sampler.set_epoch(epoch)
                self.sampler.start = done * (self.batch_size or 1)
            yield from self._timed(super().__iter__())
            return
        self.dataset.set_position(epoch, done)  # type: ignore[attr-defined]
        for index, batch in enumerate(self._timed(super().__iter__())):
            if index >= done:
                yield batch
            if index + 1 == self.steps:
                return

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on, and add up how long they were read and waited for."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited_seconds += time.perf_counter() - started
            if batch is None:
                return
            self.read_seconds += batch.pop("seconds", 0.0) if isinstance(batch, dict) else 0.0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is Lightning's. The method tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept what :meth:`state_dict` returned."""


def check_launch(trainer: Trainer) -> None:
    """Refuse a launcher that started more processes than the trainer knows of, with ValueError.

    ``torchrun --nproc-per-node 2`` with ``devices: 1`` would train two unrelated models into the same files.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and launched != trainer.world_size:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
        raise ValueError(
            f"the launcher started {launched} processes, but this trainer counts {trainer.world_size}: they would train"
            f" {launched} unrelated models; pass --trainer.strategy ddp --trainer.devices {per_node}"
            f" --trainer.num_nodes {launched // per_node}"
        )


def check_stream(num_shards: int, world_size: int, num_workers: int, steps: int | float | None) -> int:
    """Make sure that a streamed run cannot hang: the ``steps`` of an epoch, ``trainer.limit_train_batches``.

    Raises:
        ValueError: If that is not a number of steps, or the shards cannot be dealt out evenly to ranks and workers.
    """
    if not isinstance(steps, int):
        raise ValueError(
            "a stream has no length, and ranks that run out of it at different steps wait for each other for ever; say"
            " how many batches make an epoch: --trainer.limit_train_batches N"
        )
    if num_shards % world_size:
        raise ValueError(
            f"{num_shards} shards cannot be dealt out evenly to {world_size} ranks: every rank would read and decode"
            f" all of the data; use a number of devices that divides {num_shards}, or write the data in a multiple of"
            f" {world_size} shards"
        )
    if num_workers > num_shards // world_size:
        raise ValueError(
            f"{num_workers} workers per rank, but only {num_shards // world_size} of the {num_shards} shards for each"
            f" of {world_size} ranks; pass --data.num_workers {num_shards // world_size} or fewer"
        )
    return steps


def check_restored(trainer: Trainer, restored: dict[str, Any], state: dict[str, Any], batch_size: int) -> None:
    """Refuse to resume on other data or in another order than the state of the data module in a checkpoint says.

    Raises:
        ValueError: If a value differs. At the start of an epoch another global batch is accepted, with as many
            images a step as before where the learning rate is scaled by them: the optimiser keeps its rate.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    inside_epoch = progress.current.processed > 0 and not progress.is_last_batch
    for name, now in state.items():
        before = restored.get(name, now)
        if before != now and name != "images_per_step" and (name != "global_batch" or inside_epoch):
            raise ValueError(
                f"the checkpoint was written with data {name} {before}, and this run has {now}; resume with the same"
                " data and options, or start a new run from the saved weights (--model.weights)"
            )
    images = state["images_per_step"]
    before = restored.get("images_per_step", images)
    optimization = getattr(trainer.lightning_module, "optimization", None)
    if before != images and getattr(optimization, "lr_scaling", False):
        raise ValueError(
            f"the checkpoint was trained with {before} images a step, and this run has {images} (batch_size"
            f" {batch_size} x {trainer.world_size} ranks x {trainer.accumulate_grad_batches} batches accumulated); with"
            " lr_scaling the learning rate follows them, but a restored optimiser keeps its own: resume with options"
            f" that make {before}, or start a new run from the saved weights (--model.weights)"
        )
