"""Parameter groups against the rules of Microsoft's code; the schedule against timm's, which that code uses."""

from functools import partial

import pytest
import torch
from conftest import TRAINING_WARNINGS
from exact_run import classifier, data, trainer
from lightning.pytorch import Callback
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinHFForMaskedImageModeling
from swin_hf.training.optim import fitting_warmup, is_decayed, layer_id, lr_factor, parameter_groups

DEPTHS = (2, 1, 3)
pytestmark = TRAINING_WARNINGS
EXACT = 1e-12  # double arithmetic on both sides, in another order


@pytest.fixture(scope="module")
def network():
    config = SwinHFConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=DEPTHS,
        num_heads=(1, 2, 4),
        window_size=4,
        use_absolute_embeddings=True,
        num_labels=3,
    )
    return SwinHFForImageClassification(config)


def names_of(network, parameters):
    by_id = {id(parameter): name for name, parameter in network.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


def test_groups_decay_exactly_the_matrices_and_kernels(network):
    groups = {group["name"]: group for group in parameter_groups(network, 1e-3, 0.05)}
    assert set(groups) == {"decay", "no_decay"}
    assert groups["decay"]["weight_decay"] == 0.05 and groups["no_decay"]["weight_decay"] == 0.0
    decayed, free = (names_of(network, groups[name]["params"]) for name in ("decay", "no_decay"))
    assert decayed | free == {name for name, _ in network.named_parameters()}
    # An independent statement of the rule: the weights of Linear and Conv2d modules, nothing else.
    kernels = {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert decayed == kernels
    assert any("relative_position_bias_table" in name for name in free)
    assert any("position_embeddings" in name for name in free)


def test_mask_token_is_not_decayed_although_it_has_three_axes():
    config = SwinHFConfig.from_preset("swin_digits_patch4_window4_32")
    model = SwinHFForMaskedImageModeling(config)
    token = dict(model.named_parameters())["swin.embeddings.mask_token"]
    assert token.ndim == 3 and not is_decayed("swin.embeddings.mask_token", token, model.undecayed)


def test_lightning_would_have_decayed_everything_in_one_group(network):
    # Silent failure 17: the optimiser that LightningCLI makes on its own gets model.parameters().
    plain = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    assert len(plain.param_groups) == 1 and plain.param_groups[0]["weight_decay"] == 0.05
    ours = torch.optim.AdamW(parameter_groups(network, 1e-3, 0.05))
    assert sum(group["weight_decay"] == 0 for group in ours.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swin.embeddings.patch_embeddings.weight", 0),
        ("swin.embeddings.norm.bias", 0),
        ("swin.embeddings.mask_token", 0),
        ("swin.stages.0.blocks.0.attention.qkv.weight", 1),
        ("swin.stages.0.blocks.1.mlp.fc1.bias", 2),
        ("swin.stages.0.downsample.reduction.weight", 2),
        ("swin.stages.1.blocks.0.norm1.weight", 3),
        ("swin.stages.1.downsample.norm.weight", 3),
        ("swin.stages.2.blocks.2.attention.relative_position_bias_table", 6),
        ("base_model.model.swin.stages.2.blocks.0.attention.qkv.lora_A.default.weight", 4),
        ("swin.embeddings.position_embeddings", 7),  # Microsoft's function lets it fall through to the last layer
        ("swin.norm.weight", 7),
        ("classifier.bias", 7),
        ("decoder.0.weight", 7),
    ],
)
def test_layer_ids_are_those_of_microsofts_optimizer(name, expected):
    assert layer_id(name, DEPTHS) == expected


def test_layer_decay_reaches_the_learning_rates_of_the_optimizer(network):
    # Silent failure 18: timm's helper finds no layers on a transformers model, and optimisers ignore "lr_scale".
    groups = parameter_groups(network, 1e-3, 0.05, layer_decay=0.8)
    rates = {group["name"].rpartition("layer")[2]: group["lr"] for group in groups}
    assert len(rates) == sum(DEPTHS) + 2
    for number, rate in rates.items():
        assert rate == pytest.approx(1e-3 * 0.8 ** (7 - int(number)), rel=EXACT)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))

    optimizer = torch.optim.SGD(groups, lr=1e-3)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    moved = {name: float((before[name] - value.detach()).abs().max()) for name, value in network.named_parameters()}
    assert moved["classifier.bias"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["swin.stages.0.blocks.0.mlp.fc1.bias"] == pytest.approx(1e-3 * 0.8**6, rel=1e-3)


def test_frozen_parameters_are_left_out_and_nothing_left_is_an_error(network):
    for parameter in network.swin.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(network, 1e-3, 0.05)
    assert names_of(network, [p for group in groups for p in group["params"]]) == {
        "classifier.weight",
        "classifier.bias",
    }
    network.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable; free at least the classifier"):
        parameter_groups(network, 1e-3, 0.05)
    network.requires_grad_(True)


def test_schedule_equals_the_scheduler_of_microsofts_code():
    base, floor, warm, total, warmup = 1e-3, 1e-5, 1e-6, 50, 10
    parameter = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=base)
    reference = CosineLRScheduler(
        theirs,
        t_initial=total - warmup,
        lr_min=floor,
        warmup_lr_init=warm,
        warmup_t=warmup,
        t_in_epochs=False,
        warmup_prefix=True,
    )
    ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    shape = {"total": total, "warmup": warmup, "warmup_floor": warm / base, "floor": floor / base}
    schedule = LambdaLR(ours, partial(lr_factor, schedule="cosine", **shape))
    for step in range(total):
        reference.step_update(step)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9), step
        ours.step()
        schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(floor, rel=1e-9)


def test_other_schedules_have_their_shape():
    options = {"total": 20, "warmup": 0, "warmup_floor": 0.0, "floor": 0.1}
    assert lr_factor(10, schedule="linear", **options) == pytest.approx(0.55)
    assert lr_factor(25, schedule="linear", **options) == pytest.approx(0.1)  # beyond the end: the floor
    assert lr_factor(19, schedule="constant", **options) == 1.0
    steps = [lr_factor(s, schedule="multistep", milestones=(5, 15), gamma=0.1, **options) for s in (4, 5, 14, 15)]
    assert steps == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_schedule_follows_a_longer_training_after_resume(network):
    def make(total):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, LambdaLR(optimizer, partial(lr_factor, schedule="linear", total=total, warmup=0))

    _, short = make(10)
    optimizer, long = make(100)
    long.load_state_dict(short.state_dict())  # the checkpoint of a run of 10 steps
    optimizer.step()
    long.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.99)


class LastStep(Callback):
    """What a training step leaves in the optimiser, and the rate of each."""

    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, module, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.gradients = [parameter.grad.clone() for parameter in module.parameters()]
        self.moments = [trainer.optimizers[0].state[parameter] for parameter in module.parameters()]


def train(folder, steps, model_options, **options):
    seen = LastStep()
    runner = trainer(folder, seen, max_epochs=1, limit_train_batches=steps, limit_val_batches=0, **options)
    runner.fit(classifier(**model_options), data())
    return seen


def test_the_cosine_ends_at_the_rate_that_was_asked_for_this_batch(tmp_path):
    """``min_lr`` is given for 512 images, as ``learning_rate`` is, and a step takes two batches of 8."""
    rates = train(tmp_path, 8, {"min_lr": 1e-3, "layer_decay": 1.0}, accumulate_grad_batches=2).rates
    assert rates[-1] == min(rates[1:]) == pytest.approx(1e-3 * 16 / 512, rel=1e-6)
    assert max(rates) == pytest.approx(2e-2 * 16 / 512, rel=1e-6)


def test_adamw_averages_with_the_factors_that_were_asked_for(tmp_path):
    seen = train(tmp_path, 1, {"betas": (0.7, 0.4)})
    for gradient, moments in zip(seen.gradients, seen.moments, strict=True):
        torch.testing.assert_close(moments["exp_avg"], 0.3 * gradient, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(moments["exp_avg_sq"], 0.6 * gradient.square(), rtol=1e-4, atol=1e-12)


def test_a_warm_up_as_long_as_the_training_is_shortened_and_said(caplog):
    assert fitting_warmup(7, 36) == 7 and fitting_warmup(35, 36) == 35  # as asked
    assert not caplog.records
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert fitting_warmup(108, 36) == 7
    assert fitting_warmup(36, 36) == 7 and fitting_warmup(5, 1) == 0
    assert "the warm-up of 108 steps is shortened to 7: the whole training has 36 steps" in caplog.text


def test_lightnings_predict_gives_probabilities_of_the_test_split_in_order(tmp_path):
    module, source = classifier(), data()
    probabilities = torch.cat(trainer(tmp_path).predict(module, source))
    expected, module = [], module.eval()
    with torch.no_grad():
        for batch in source.test_dataloader():
            pixels = source.on_after_batch_transfer(dict(batch), 0)["pixel_values"]
            logits = module(pixels)
            expected.append(logits.exp() / logits.exp().sum(1, keepdim=True))
    torch.testing.assert_close(probabilities, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert len(probabilities) == source.split_sizes["test"]
