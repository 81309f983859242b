"""What both LightningModules share, seen through ``Trainer.fit``: modes, windows of accumulation, clipping."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINING_WARNINGS
from short import short
from torch.utils.data import DataLoader

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinHFForMaskedImageModeling, export_checkpoint
from swin_hf.model.modeling_swin_hf import SwinHFMLP
from swin_hf.training import EMA, SwinClassifier, SwinMaskedImageModeler

PRESET = "swin_digits_patch4_window4_32"
SMALL = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft says so
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


def pictures(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": image, "labels": number % 4} for number, image in enumerate(images)]


def loader(count=12, batch=4):
    return DataLoader(pictures(count), batch_size=batch)


def fit(module, batches=2, epochs=1, callbacks=(), train=None, **options):
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    } | options
    trainer = pl.Trainer(
        max_epochs=epochs, limit_train_batches=batches, enable_model_summary=False, callbacks=list(callbacks), **options
    )
    trainer.fit(module, train or loader(), loader())
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Starting points: a folder of each kind, and a foreign file."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = SwinHFConfig.from_preset(PRESET, image_size=16, num_labels=4, **SMALL)
    model = SwinHFForImageClassification(config)
    model.save_pretrained(folder / "classifier")
    SwinHFForMaskedImageModeling(config).save_pretrained(folder / "simmim")
    torch.save({"model": export_checkpoint(model, "microsoft")}, folder / "microsoft.pth")
    return folder


class Effects(pl.Callback):
    """Asks the model itself, in the middle of each epoch: do two passes of a batch differ?"""

    def __init__(self):
        self.differ = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with torch.no_grad():
            if isinstance(module, SwinMaskedImageModeler):
                masks = module.draw_masks(batch["pixel_values"])
                first, second = (module(batch["pixel_values"], masks).loss for _ in range(2))
            else:
                first, second = (module(batch["pixel_values"]) for _ in range(2))
        self.differ.append(not torch.equal(first, second))


STARTS = {
    "scratch": {"preset": PRESET, "overrides": SMALL, "image_size": 16, "num_labels": 4},
    "folder": {"weights": "classifier"},
    "foreign file": {"weights": "microsoft.pth"},
    "lora": {"weights": "classifier", "lora_rank": 2},
    "first stage frozen": {"weights": "classifier", "freeze_stages": 1},
}


def start(saved, name, **options):
    options = STARTS[name] | {"lr_scaling": False, "warmup_epochs": 0.0} | options
    if "weights" in options:
        options["weights"] = str(saved / options["weights"])
    return short(SwinClassifier, **options)


@pytest.mark.parametrize("name", STARTS)
def test_stochastic_depth_is_at_work_whatever_the_start(saved, name):
    effects = Effects()
    fit(start(saved, name, drop_path_rate=0.5), epochs=2, callbacks=[effects])
    assert effects.differ == [True] * 4  # also after the validation between the epochs


@pytest.mark.parametrize("name", ["folder", "foreign file"])
def test_dropout_is_at_work(saved, name):
    effects = Effects()
    overrides = {"hidden_dropout_prob": 0.5}
    fit(start(saved, name, drop_path_rate=0.0, overrides=overrides), callbacks=[effects])
    assert effects.differ == [True] * 2


def test_masked_image_modelling_from_a_folder_trains_in_training_mode(saved):
    effects = Effects()
    module = short(
        SwinMaskedImageModeler,
        weights=str(saved / "simmim"),
        mask_cell=8,
        drop_path_rate=0.5,
        lr_scaling=False,
        warmup_epochs=0.0,
    )
    fit(module, epochs=2, callbacks=[effects])
    assert effects.differ == [True] * 4


def test_an_average_of_the_weights_changes_no_mode(saved):
    effects = Effects()
    fit(start(saved, "folder", drop_path_rate=0.5), epochs=2, callbacks=[effects, EMA(decay=0.9)])
    assert effects.differ == [True] * 4


def test_frozen_parts_stay_in_evaluation_mode(saved):
    effects = Effects()
    fit(start(saved, "folder", drop_path_rate=0.5, linear_probe=True), epochs=2, callbacks=[effects])
    assert effects.differ == [False] * 4
    module = start(saved, "folder", freeze_stages=1)
    fit(module)
    stages = module.model.swin.stages
    assert not any(part.training for part in stages[0].modules()) and all(part.training for part in stages[1].modules())


@pytest.mark.parametrize(("recompute", "passes"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("name", ["scratch", "folder"])
def test_gradient_checkpointing_runs_the_mlp_of_a_block_twice_a_step(saved, name, recompute, passes):
    module = start(saved, name, gradient_checkpointing=recompute, drop_path_rate=0.0)
    mlp = next(part for part in module.modules() if isinstance(part, SwinHFMLP))
    calls = []
    mlp.register_forward_pre_hook(lambda part, _: calls.append(part.training))
    fit(module, batches=3, limit_val_batches=0)
    assert calls == [True] * 3 * passes


def loss_by_hand(module, batch):
    return F.cross_entropy(module(batch["pixel_values"]), batch["labels"])


def still(**options):
    """A classifier whose weights do not move, so that a gradient depends on its batches alone."""
    torch.manual_seed(3)
    options = {"learning_rate": 0.0, "drop_path_rate": 0.0, "label_smoothing": 0.0} | options
    return short(SwinClassifier, **STARTS["scratch"], lr_scaling=False, warmup_epochs=0.0, **options)


@pytest.mark.parametrize(
    ("batches", "window", "held"), [(5, 4, 1), (6, 4, 2), (3, 7, 3), (4, 4, 4), (1, 1, 1)],
    ids=["one left", "two left", "window longer than the epoch", "full", "no accumulation"],
)  # fmt: skip
def test_a_step_is_the_mean_of_the_batches_of_its_window(batches, window, held):
    module, data = still(), DataLoader(pictures(2 * batches), batch_size=2)
    fit(module, batches=batches, train=data, accumulate_grad_batches=window, limit_val_batches=0)
    given = {name: parameter.grad for name, parameter in module.named_parameters()}  # of the last step
    module.zero_grad()
    last = list(data)[-held:]
    sum(loss_by_hand(module, batch) for batch in last).div(held).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_in_every_precision(algorithm, precision):
    limits, seen = {"norm": 1e-3, "value": 1e-5}, []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append([p.grad.float().flatten() for p in module.parameters() if p.grad is not None])

    module = still()
    fit(module, 3, callbacks=[Watch()], precision=precision, limit_val_batches=0,
        gradient_clip_val=limits[algorithm], gradient_clip_algorithm=algorithm)  # fmt: skip
    gradients = [torch.cat(parts) for parts in seen if parts]
    assert len(gradients) >= 2
    for gradient in gradients:
        size = gradient.norm() if algorithm == "norm" else gradient.abs().max()
        torch.testing.assert_close(size.item(), limits[algorithm], rtol=0.02, atol=0)
