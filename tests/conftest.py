"""Shared fixtures: two awkward configurations, a tiny model, a tiny data set."""

import copy
import os
import signal

# One process may not look at the network or at the user's cache: everything a test needs, it makes.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np
import pytest
import torch
from hub_server import _hub_server, hub, run_commands  # noqa: F401 - the loopback Hub as a fixture
from hypothesis import HealthCheck, settings

from swin_hf import SwinHFConfig, SwinHFForImageClassification

# A slow machine draws and computes slowly; that is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# fp32, two orders of summation: the largest difference seen is 1.2e-5 on unit-scale activations, on another processor
# than this was written on. What is computed otherwise is off by 1e-3 and more.
PARITY = {"rtol": 1e-4, "atol": 5e-5}

# Seconds after which something that a test waits for counts as hung. No measure of speed: a loaded machine is slow.
PATIENCE = 900

# For the `pytestmark` of files that train: what the libraries say of runs as small as theirs.
TRAINING_WARNINGS = [
    pytest.mark.filterwarnings(text)
    for text in (
        "ignore:.*does not have many workers",  # a few pictures are read in the main process
        "ignore:.*smaller than the logging interval",  # an epoch has a few steps
        "ignore:.*isinstance.treespec, LeafSpec",  # torch 2.15 deprecates a check that Lightning 2.6.6 makes
        "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # LightningCLI calls it in the old way
    )
]

# For the `pytestmark` of files that push: huggingface_hub 2.4 passes file objects to httpx2 as `data=`, which httpx2
# deprecates; not ours to change. Waits of ours between two tries are short; those of the client cannot be set.
PUSHES = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]

TINY = {
    "image_size": (32, 48),
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1, 2, 1),
    "num_heads": (2, 2, 4),
    "window_size": (4, 3),
    "encoder_stride": 8,
    "num_labels": 5,
}


@pytest.fixture(autouse=True)
def _interruptible():
    """Lightning ignores Ctrl-C from the first on; the next test of the process may send another."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Workers of pytest-xdist share the cores: more threads would only wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def impatient(monkeypatch):
    """The Hub client tries again at once."""
    monkeypatch.setattr("swin_hf.hub.remote.WAITS", (0.01, 0.02, 0.04))


@pytest.fixture
def offline(monkeypatch):
    """A function that switches offline mode on until the test ends."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    def switch() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()  # the client decides when it opens a session

    yield switch
    monkeypatch.undo()
    close_session()


@pytest.fixture
def tiny_config() -> SwinHFConfig:
    """Three stages, nothing square: the map of 16x24 tokens is cut into windows of 4x3."""
    return SwinHFConfig(**TINY)


@pytest.fixture
def awkward_config() -> SwinHFConfig:
    """Padding in every stage, and a last map that is smaller than its window."""
    return SwinHFConfig(
        image_size=(30, 46),
        patch_size=2,
        embed_dim=16,
        depths=(2, 2, 2),
        num_heads=(2, 2, 4),
        window_size=7,
        encoder_stride=8,
        num_labels=5,
    )


@pytest.fixture(scope="session")
def _built_tiny_model() -> SwinHFForImageClassification:
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = SwinHFForImageClassification(SwinHFConfig(**TINY)).eval()
    torch.set_rng_state(generator_state)
    return model


@pytest.fixture
def tiny_model(_built_tiny_model: SwinHFForImageClassification) -> SwinHFForImageClassification:
    """A classifier with random weights, of ``tiny_config``, in evaluation mode; each test has its own copy."""
    return copy.deepcopy(_built_tiny_model)


@pytest.fixture
def tiny_dataset():
    """24 pictures of 3 classes that differ in colour, as a ``datasets.Dataset`` with Image and ClassLabel columns."""
    import datasets
    from PIL import Image

    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    random = np.random.default_rng(0)
    rows = {"image": [], "label": []}
    for index in range(24):
        label = index % 3
        pixels = np.clip(random.normal(list(colours.values())[label], 40, (20, 28, 3)), 0, 255)
        rows["image"].append(Image.fromarray(pixels.astype("uint8")))
        rows["label"].append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(colours))})
    return datasets.Dataset.from_dict(rows, features=features)
