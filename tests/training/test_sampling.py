"""The order of samples, the seeds, and what is refused before the first step."""

import pytest
import torch
from exact_run import trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DistributedSampler

from swin_hf.training.data.sampling import (
    EpochSampler,
    ResumableLoader,
    check_launch,
    check_stream,
    derive_seed,
    epoch_batches,
)


def rows(size=103, batch_size=4, world_size=1, epoch=0, seed=0, start=0) -> list[list[int]]:
    """What every rank visits in an epoch."""
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(size, batch_size, seed, rank, world_size)
        sampler.set_epoch(epoch)
        sampler.start = start
        pairs = list(sampler)
        assert {pair[0] for pair in pairs} <= {epoch}
        ranks.append([row for _, row in pairs])
    return ranks


def test_order_is_a_function_of_seed_and_epoch():
    """Silent failure 8: a resumed run must not repeat the order of epoch 0."""
    assert rows(epoch=3) == rows(epoch=3)
    assert rows(epoch=3) != rows(epoch=4)
    assert rows(epoch=0, seed=1) != rows(epoch=1, seed=0)


def test_an_epoch_visits_each_sample_at_most_once_and_leaves_out_others_each_time():
    (first,), (second,) = rows(epoch=0), rows(epoch=1)
    assert len(first) == len(set(first)) == 100
    assert set(range(103)) - set(first) != set(range(103)) - set(second)


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    (alone,) = rows(batch_size=8)
    shared = rows(batch_size=8 // world_size, world_size=world_size)
    local = 8 // world_size
    for batch in range(103 // 8):
        together = {row for rank in shared for row in rank[batch * local : (batch + 1) * local]}
        assert together == set(alone[batch * 8 : (batch + 1) * 8])


def test_start_skips_what_was_trained_on():
    assert rows(start=12)[0] == rows()[0][12:]


@pytest.mark.parametrize(("size", "expected"), [(103, 12), (8, 1), (7, 1), (2, 1)])
def test_epoch_batches(size, expected):
    assert epoch_batches(size, 4, 2) == expected
    lengths = {len(rank) for rank in rows(size, 4, 2)}
    assert lengths == {min(expected * 4, size // 2)}  # every rank takes the same number of steps


def test_fewer_samples_than_ranks_are_refused():
    with pytest.raises(ValueError, match="3 training samples cannot be shared by 4 ranks"):
        epoch_batches(3, 1, 4)


def test_lightning_keeps_our_samplers():
    """It replaces any sampler that is not a DistributedSampler (silent failures 3 and 6)."""
    assert isinstance(EpochSampler(8, 2), DistributedSampler)
    assert issubclass(UnrepeatedDistributedSampler, DistributedSampler)


def test_every_evaluation_sample_is_on_one_rank_only():
    ranks = [list(UnrepeatedDistributedSampler(range(37), 2, rank, shuffle=False)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(37))


def test_derived_seeds_differ_in_every_part():
    seeds = {derive_seed(a, b, c) for a in range(10) for b in ("x", "y") for c in range(10)}
    assert len(seeds) == 200
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_asks_for_its_position_at_the_first_batch_not_before(workers):
    """Lightning calls ``iter`` before it tells the epoch; prefetching workers would run ahead in the wrong one."""
    position = [0, 0]
    sampler = EpochSampler(24, 4)
    loader = ResumableLoader(
        Pairs(), batch_size=4, sampler=sampler, num_workers=workers, position=lambda: tuple(position)
    )
    iterator = iter(loader)
    position[:] = [2, 3]
    seen = torch.cat([batch for batch in iterator]).tolist()
    assert seen == [[2, row] for row in rows(24, epoch=2)[0][12:]]
    assert len(loader) == 6  # the length is that of the whole epoch: Lightning counts from the start
    assert loader.state_dict() == {}
    loader.load_state_dict({})


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, key):
        return torch.tensor(key)


def test_more_processes_than_the_trainer_knows_of_are_refused(monkeypatch, tmp_path):
    """Silent failure 4: torchrun with ``devices: 1`` trains unrelated models into the same files."""
    runner = trainer(tmp_path)
    check_launch(runner)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 4 processes.*counts 1.*--trainer.devices 2 --trainer.num_nodes 2"):
        check_launch(runner)


@pytest.mark.parametrize(
    ("shards", "world_size", "workers", "steps", "message"),
    [
        (4, 1, 0, None, "how many batches make an epoch: --trainer.limit_train_batches N"),
        (4, 2, 0, 1.0, "limit_train_batches N"),
        (3, 2, 0, 10, "3 shards cannot be dealt out evenly to 2 ranks"),
        (4, 2, 3, 10, "3 workers per rank, but only 2 of the 4 shards for each of 2 ranks"),
    ],
)
def test_streams_that_could_hang_are_refused_before_the_first_step(shards, world_size, workers, steps, message):
    """Silent failure 12: ranks that run dry at different steps wait for each other for ever."""
    with pytest.raises(ValueError, match=message):
        check_stream(shards, world_size, workers, steps)


def test_a_safe_stream_is_accepted():
    assert check_stream(4, 2, 2, 10) == 10
