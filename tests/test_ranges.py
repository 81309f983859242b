"""Every number that a user can type has a range, and what is outside of it is refused in one sentence."""

import inspect
import math
import re
import sys
import typing
from dataclasses import is_dataclass, replace

import numpy as np
import pytest
import torch

from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.memory import check_batch, check_training, free_memory, memory_sentence
from swin_hf.ranges import check_range
from swin_hf.training import (
    Augmentation,
    ImageDataModule,
    JointAugmentation,
    Masking,
    Network,
    Optimization,
    Pixels,
    SwinClassifier,
    SwinMaskedImageModeler,
    train,
)
from swin_hf.training.arguments import TRAINER_RANGES, check_numbers

SIZE = {
    "image_size": 32,
    "network": Network(window_size=4, overrides={"embed_dim": 8, "depths": [1], "num_heads": [1]}),
}
ARGUMENTS = {
    SwinClassifier: {**SIZE, "num_labels": 2},
    SwinMaskedImageModeler: {**SIZE, "masking": Masking(cell=8)},
    ImageDataModule: {"data_dir": "photos"},
}
FREE = {"num_labels"}  # decided by the data


def numbers_of(owner):
    """Options that take a number, a pair of them or a list, by their annotations: group (or None) and name."""
    hints = typing.get_type_hints(owner.__init__, vars(sys.modules[owner.__module__]))
    for name, parameter in inspect.signature(owner).parameters.items():
        if is_dataclass(parameter.default):
            yield from ((name, inner) for _, inner in numbers_of(type(parameter.default)))
        elif re.search(r"\b(int|float)\b", str(hints[name]).replace("dict[int", "")) and name not in FREE:
            yield None, name


def refused(owner, group, name, number):
    """The message with which an option is refused."""
    holder = owner if group is None else type(inspect.signature(owner).parameters[group].default)
    default = inspect.signature(holder).parameters[name].default
    hint = str(typing.get_type_hints(holder.__init__, vars(sys.modules[holder.__module__]))[name])
    value = (number,) * len(default) if isinstance(default, tuple) else number
    if "list[" in hint and "int |" not in hint:
        value = [number] * 3 if name in ("mean", "std") else [number]
    given = dict(ARGUMENTS[owner])
    with pytest.raises(ValueError) as caught:
        if group is not None:
            given[group] = replace(given.get(group, holder()), **{name: value})
        owner(**(given if group is not None else given | {name: value}))
    return str(caught.value)


CASES = [(owner, *option) for owner in ARGUMENTS for option in numbers_of(owner)]


@pytest.mark.parametrize("number", [-5, math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("owner", "group", "name"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_options_refuse_numbers_out_of_range(owner, group, name, number):
    if name in ("mean", "class_names") and number == -5:
        pytest.skip("a mean may be negative")
    said = refused(owner, group, name, number)
    assert name in said and "\n" not in said


def test_no_constructor_has_more_than_twelve_arguments():
    groups = {type(p.default) for owner in ARGUMENTS for p in inspect.signature(owner).parameters.values()}
    owners = [*ARGUMENTS, *(group for group in groups if is_dataclass(group))]
    assert len(owners) == 3 + 11 and max(len(inspect.signature(owner).parameters) for owner in owners) <= 12


@pytest.mark.parametrize("number", [-5, math.nan], ids=str)
@pytest.mark.parametrize("name", [name for names in TRAINER_RANGES.values() for name in names.split()])
def test_trainer_refuses_numbers_out_of_range(name, number):
    with pytest.raises(ValueError, match=rf"trainer.{name} is {number}; it must be in"):
        check_numbers({"trainer": {name: number}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed_everything": -5}, r"seed_everything is -5; it must be in \[0, 4294967295\]"),
        ({"seed_everything": 2**32}, "seed_everything is 4294967296"),
        ({"trainer": {"devices": "0"}}, r"trainer.devices is 0; it must be in \[1, inf\)"),
        ({"trainer": {"max_epochs": 0}}, "trainer.max_epochs is 0"),
    ],
)
def test_numbers_of_the_command_line(options, said):
    with pytest.raises(ValueError, match=said):
        check_numbers(options)
    check_numbers({"seed_everything": True, "trainer": {"max_epochs": -1, "devices": "auto", "limit_val_batches": 0.5}})


def test_the_examples():
    for interval, inside, outside in (
        ("[0, 1)", (0, 0.5, None), (1, -0.1, math.nan)),
        ("(0, inf)", (1e-9, 1e300, [1, 2]), (0, math.inf, [1, -1])),
    ):
        for value in inside:
            check_range("x", value, interval)
        for value in outside:
            with pytest.raises(ValueError, match=re.escape(f"x is {value}; it must be in {interval}")):
                check_range("x", value, interval)
    with pytest.raises(ValueError, match=r"optimization.betas is \(1.5, 0.9\); it must be in \[0, 1\)"):
        Optimization(betas=(1.5, 0.9))
    with pytest.raises(ValueError, match=r"pixels\.interpolation is 'box'; it must be 'nearest' or 'bilinear'"):
        Pixels(interpolation="box")
    for name, value in {"num_workers": -1, "batch_size": 0, "eval_batch_size": 0, "image_size": 0}.items():
        with pytest.raises(ValueError, match=rf"{name} is "):
            ImageDataModule(data_dir="photos", **{name: value})


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**53), lambda: np.empty(2**53), lambda: bytearray(2**56)],
    ids=["torch", "numpy", "python"],
)
def test_an_allocation_that_fails_is_a_sentence(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    said = memory_sentence(caught.value)
    assert said and said.startswith("the memory is used up") and "choose a smaller batch" in said and "\n" not in said
    assert "asked for" in said or allocate.__code__.co_names == ("bytearray",)  # Python does not tell


def test_memory_of_a_device_is_told_and_other_errors_are_not():
    said = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB, of which 3.25 GiB is free. See"
    assert "20.00 GiB more were asked for; 3.25 GiB are free" in memory_sentence(torch.OutOfMemoryError(said))
    assert memory_sentence(RuntimeError("shapes differ")) is None


def test_a_batch_larger_than_the_memory_is_refused_before_the_first_step():
    assert free_memory() > 2**20
    check_batch(1, 3, (8, 8))
    for size in ({"batch_size": 10**6, "image_size": 4096}, {"eval_batch_size": 10**5, "image_size": (16384, 9000)}):
        with pytest.raises(
            ValueError, match=r"takes \S+ GiB and \S+ GiB of memory are free; choose a smaller image_size"
        ):
            ImageDataModule(data_dir="photos", **size)
    with pytest.raises(ValueError, match=r"image_size is 200000; it must be in \[1, 16384\]"):
        ImageDataModule(data_dir="photos", image_size=200_000)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_what_training_needs_at_least_is_close_to_what_autograd_keeps(backend, monkeypatch):
    config = SwinHFConfig(image_size=64, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4, num_labels=3)
    model = SwinHFForImageClassification._from_config(config, attn_implementation=backend).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.randn(8, 3, 64, 64)).logits
    measured = sum(size for size, _ in kept.values())
    assert logits.requires_grad
    monkeypatch.setattr("swin_hf.memory.free_memory", lambda: measured)
    check_training(8, (64, 64), config, [True, True])  # what fits is not refused
    monkeypatch.setattr("swin_hf.memory.free_memory", lambda: measured // 2)
    with pytest.raises(ValueError, match=r"a batch of 8 images of 64x64 pixels takes at least .* in training"):
        check_training(8, (64, 64), config, [True, True])
    check_training(8, (64, 64), config, [False, False])  # frozen blocks keep nothing


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_batch_that_cannot_be_trained_here_is_refused_before_the_first_step(tmp_path):
    batch = max(2, free_memory() // (10 * 12 * 2048**2))  # pixels of a tenth of what is free
    with pytest.raises(ValueError, match=r"images of 2048x2048 pixels takes at least \d+\.\d GiB in training and"):
        train(image_size=2048, batch_size=batch, runs=str(tmp_path / "runs"), trainer={"accelerator": "cpu"})
    assert not (tmp_path / "runs").exists()


def test_of_two_numbers_the_lesser_comes_first():
    for make, name in ((Augmentation, "crop_scale"), (Augmentation, "crop_ratio"), (JointAugmentation, "scale")):
        with pytest.raises(ValueError, match=rf"^augmentation\.{name} is \(1\.0, 0\.5\); give the lesser number first"):
            make(**{name: (1.0, 0.5)})
    with pytest.raises(ValueError, match=r"^augmentation\.distort is 2; it must be in \[0, 1\]"):
        JointAugmentation(distort=2)
