"""``trainer.precision`` 16-mixed: float16 under a scaler of gradients, and what becomes of it on a CPU."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import TRAINING_WARNINGS
from exact_run import classifier, data, trainer
from lightning.pytorch.plugins.precision import MixedPrecision

pytestmark = TRAINING_WARNINGS


class Gradients(pl.Callback):
    """What the optimiser has taken at each step."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        parts = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
        if parts:
            self.seen.append(torch.cat(parts))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_scaled_gradients_are_clipped_at_their_own_size(tmp_path, algorithm):
    """A fused optimiser would take the scale off in its step, after the clipping: Lightning refuses it."""
    limit, gradients = {"norm": 1e-3, "value": 1e-5}[algorithm], Gradients()
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "max_epochs": 1}
    runner = trainer(tmp_path, gradients, plugins=[half], limit_train_batches=4, limit_val_batches=0, **options)
    module = classifier()
    before = module.state_dict()["model.classifier.weight"].clone()
    runner.fit(module, data())
    assert runner.precision == "16-mixed" and len(gradients.seen) >= 2
    for gradient in gradients.seen:
        size = gradient.norm() if algorithm == "norm" else gradient.abs().max()
        torch.testing.assert_close(size.item(), limit, rtol=0.02, atol=0)
    weight = module.state_dict()["model.classifier.weight"]
    assert weight.dtype == torch.float32 and weight.isfinite().all() and not torch.equal(weight, before)


def test_a_cpu_trains_in_bfloat16_instead_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="not supported on CPU. Using `precision='bf16-mixed'` instead"):
        runner = trainer(tmp_path, precision="16-mixed", max_epochs=1, limit_train_batches=2, gradient_clip_val=1.0)
    runner.fit(classifier(), data())
    assert runner.precision == "bf16-mixed" and runner.callback_metrics["train_loss"].isfinite()
