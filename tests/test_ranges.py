"""Every number that a user can type has a range, and what is outside of it is refused in one sentence."""

import inspect
import math
import re
import typing

import numpy as np
import pytest
import torch

from swin_hf.memory import check_batch, free_memory, memory_sentence
from swin_hf.ranges import check_range
from swin_hf.training import ImageDataModule, SwinClassifier, SwinMaskedImageModeler
from swin_hf.training.command import TRAINER_RANGES, check_numbers

SIZE = {"overrides": {"embed_dim": 8, "depths": [1], "num_heads": [1]}, "image_size": 32, "window_size": 4}
MODELS = {SwinClassifier: {**SIZE, "num_labels": 2}, SwinMaskedImageModeler: {**SIZE, "mask_cell": 8}}
FREE = {"num_labels"}  # decided by the data


def numbers_of(function):
    """Names of the parameters that take a number, a pair of them or a list, from their annotations."""
    hints = typing.get_type_hints(function.__init__)
    for name in inspect.signature(function.__init__).parameters:
        text = str(hints.get(name, ""))
        if hints.get(name) in (int, float) or re.search(r"\b(int|float)\b", text.replace("dict[int", "")):
            yield name


def as_given(function, name, number):
    default = inspect.signature(function.__init__).parameters[name].default
    hint = str(typing.get_type_hints(function.__init__)[name])
    if isinstance(default, tuple):
        return (number,) * len(default)
    if "list[" in hint and "int |" not in hint:
        return [number] * 3 if name in ("mean", "std") else [number]
    return number


CASES = [(model, name) for model in MODELS for name in numbers_of(model) if name not in FREE]


@pytest.mark.parametrize("number", [-5, math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_models_refuse_numbers_out_of_range(model, name, number):
    with pytest.raises(ValueError) as caught:
        model(**{**MODELS[model], name: as_given(model, name, number)})
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [-5, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", list(numbers_of(ImageDataModule)))
def test_data_refuse_numbers_out_of_range(name, number):
    if name in ("mean", "class_names") and number == -5:
        pytest.skip("a mean may be negative")
    with pytest.raises(ValueError) as caught:
        ImageDataModule(data_dir="photos", **{name: as_given(ImageDataModule, name, number)})
    assert name in str(caught.value) and "\n" not in str(caught.value)


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
    with pytest.raises(ValueError, match=r"betas is \(1.5, 0.9\); it must be in \[0, 1\)"):
        SwinClassifier(**MODELS[SwinClassifier], betas=(1.5, 0.9))
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
