"""The models alone: shapes, purity, initialisation, errors, masked images, other sizes, strict loading."""

import copy
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import nn

from swin_hf import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
)

ALL = [SwinHFModel, SwinHFForImageClassification, SwinHFForMaskedImageModeling, SwinHFBackbone]
IMAGE = (2, 3, 32, 48)


def config_of(**changes) -> SwinHFConfig:
    return SwinHFConfig(**{**TINY, **changes})


def main_output(model, *args, **kwargs):
    output = model(*args, **kwargs)
    first = output.to_tuple()[0]
    return first[-1] if isinstance(first, tuple) else first


# ------------------------------------------------------------------------------------------------- shapes, outputs


@pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 45), (5, 90), (2, 2), (1, 1)])
def test_any_size_runs(height, width):
    """Sizes are rounded up: to whole patches, then to pairs of tokens at each of the two mergings."""
    x = torch.randn(2, 3, height, width)
    rows, columns = math.ceil(math.ceil(height / 2) / 4), math.ceil(math.ceil(width / 2) / 4)
    for changes in (
        {},
        {"window_size": 7},
        {"window_size": [5, (3, 4), 2]},
        {"shift_per_axis": True, "mask_padding": True},
    ):
        config = config_of(**changes)
        output = SwinHFModel(config).eval()(x, output_hidden_states=True)
        assert output.last_hidden_state.shape == (2, rows * columns, 64)
        assert output.pooler_output.shape == (2, 64)
        assert output.reshaped_hidden_states[-1].shape == (2, 64, rows, columns)
        assert SwinHFForMaskedImageModeling(config).eval()(x).reconstruction.shape == x.shape


def test_hidden_states_are_tokens_and_maps(tiny_config):
    output = SwinHFModel(tiny_config).eval()(torch.randn(IMAGE), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [
        (2, 384, 16),
        (2, 96, 32),
        (2, 24, 64),
        (2, 24, 64),
    ]
    for tokens, maps in zip(output.hidden_states, output.reshaped_hidden_states, strict=True):
        assert maps.is_contiguous()
        assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("model_class", ALL)
def test_outputs_are_none_unless_asked_and_config_can_ask(model_class, tiny_config):
    model, x = model_class(tiny_config).eval(), torch.randn(IMAGE)
    plain = model(x)
    assert plain.hidden_states is None and plain.attentions is None
    asked = model(x, output_hidden_states=True, output_attentions=True)
    assert len(asked.hidden_states) == 4 and len(asked.attentions) == 3
    assert len(asked) == len(plain) + (2 if model_class is SwinHFBackbone else 3)
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == 4
    some = model(x, output_hidden_states=[0, -1]).hidden_states
    assert some[1] is some[2] is None
    for one in (0, 3):  # attention weights are computed by another backend
        torch.testing.assert_close(some[one], asked.hidden_states[one])
    assert model(x, output_hidden_states=2).hidden_states[1] is None


@pytest.mark.parametrize("model_class", ALL)
def test_tuples_hold_the_same(model_class, tiny_config):
    model, x = model_class(tiny_config).eval(), torch.randn(IMAGE)
    for kwargs in ({}, {"output_hidden_states": True, "output_attentions": True}):
        named, plain = model(x, **kwargs).to_tuple(), model(x, return_dict=False, **kwargs)
        assert isinstance(plain, tuple) and len(plain) == len(named)
        for ours, theirs in zip(plain, named, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("model_class", ALL)
def test_gradients_pass_through_returned_states(model_class, tiny_config):
    model = model_class(tiny_config)
    output = model(torch.randn(IMAGE), output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.attentions[0]]
    kept += [] if model_class is SwinHFBackbone else [output.reshaped_hidden_states[1], output.hidden_states[2]]
    for state in kept:
        state.retain_grad()
    first = output.to_tuple()[0]
    (first[0] if isinstance(first, tuple) else first).square().sum().backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in kept)


@pytest.mark.parametrize("model_class", ALL)
def test_a_row_does_not_see_its_batch(model_class, awkward_config):
    model, x = model_class(awkward_config).eval(), torch.randn(5, 3, 30, 46)
    with torch.no_grad():
        torch.testing.assert_close(main_output(model, x)[3:4], main_output(model, x[3:4]), atol=1e-5, rtol=1e-5)


def test_first_argument_is_pixel_values():
    import inspect

    for model_class in ALL:
        assert (
            list(inspect.signature(model_class.forward).parameters)[1] == model_class.main_input_name == "pixel_values"
        )


def test_input_embeddings_are_one_convolution(tiny_config):
    """PEFT hooks what this returns and wants a tensor from it."""
    for model_class in ALL:
        embeddings = model_class(tiny_config).get_input_embeddings()
        assert isinstance(embeddings, nn.Conv2d) and embeddings(torch.randn(IMAGE)).shape == (2, 16, 16, 24)


# ------------------------------------------------------------------------------------------------- purity, locality


def test_another_size_leaves_no_trace():
    """Transformers' Swin shrinks its windows for good when it sees a small image."""
    model = SwinHFForImageClassification(config_of(image_size=224, patch_size=4, window_size=7)).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x).logits
        model(torch.randn(1, 3, 100, 180))
        model(torch.randn(1, 3, 40, 40))
        torch.testing.assert_close(model(x).logits, before)


def test_forward_assigns_nothing(tiny_model):
    state = {name: dict(vars(module)) for name, module in tiny_model.named_modules()}
    with torch.no_grad():
        tiny_model(torch.randn(1, 3, 17, 90), output_hidden_states=True, output_attentions=True)
    for name, module in tiny_model.named_modules():
        assert vars(module).keys() == state[name].keys()
        assert all(vars(module)[key] is value for key, value in state[name].items()), name


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_attention_stays_inside_its_window(shifted):
    """One pixel changes the tokens of its window, no more and no fewer; displaced windows do not wrap around."""
    model = SwinHFModel(config_of(patch_size=1, image_size=12, depths=[2], num_heads=[2], window_size=6)).eval()
    block = model.stages[0].blocks[1 if shifted else 0]
    x = torch.randn(1, 12, 12, 16, requires_grad=True)
    edges = [0, 3, 9, 12] if shifted else [0, 6, 12]
    for row, column in [(0, 0), (2, 11), (4, 4), (8, 3), (11, 11)]:
        top = max(edge for edge in edges if edge <= row)
        left = max(edge for edge in edges if edge <= column)
        bottom, right = edges[edges.index(top) + 1], edges[edges.index(left) + 1]
        (gradient,) = torch.autograd.grad(block(x)[0][0, row, column].sum(), x)
        reached = gradient[0].abs().sum(-1) > 1e-12
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(reached, expected), (row, column)


def test_every_pixel_counts(awkward_config):
    x = torch.randn(1, 3, 31, 45, requires_grad=True)
    SwinHFForImageClassification(awkward_config).eval()(x).logits.square().sum().backward()
    assert (x.grad.abs() > 0).all()


def test_masked_padding_is_never_seen():
    """The 2x2 tokens in the corner of a 6x6 map attend as they do in an image of their own."""
    sizes = {"patch_size": 2, "depths": [1], "num_heads": [2], "window_size": 4, "image_size": 12}
    model = SwinHFModel(config_of(mask_padding=True, **sizes)).eval()
    x = torch.randn(1, 3, 12, 12)
    whole = model(x).last_hidden_state.view(1, 6, 6, 16)[:, 4:, 4:]
    corner = model(x[..., 8:, 8:]).last_hidden_state.view(1, 2, 2, 16)
    torch.testing.assert_close(whole, corner, atol=1e-5, rtol=1e-5)
    model.config.mask_padding = False  # the reference lets padded tokens take part
    assert not torch.allclose(model(x).last_hidden_state.view(1, 6, 6, 16)[:, 4:, 4:], corner, atol=1e-4)


# ----------------------------------------------------------------------------------------------- numbers and memory


@pytest.mark.parametrize("model_class", ALL)
def test_double_precision_is_honoured(model_class, tiny_config):
    model = model_class(tiny_config).eval()
    x = torch.randn(IMAGE)
    single = main_output(model, x)
    double = main_output(model.double(), x.double())
    assert double.dtype == torch.float64
    assert 0 < (double - single).abs().max() < 1e-4
    # A step in float32 anywhere would leave noise of 1e-7 in the difference quotient.
    direction = torch.randn(IMAGE, dtype=torch.float64)
    steps = [main_output(model, x + step * direction) - double for step in (1e-9, 2e-9)]
    torch.testing.assert_close(steps[1], 2 * steps[0], atol=1e-13, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_runs(dtype, tiny_model):
    x = torch.randn(IMAGE)
    expected = tiny_model(x).logits
    logits = copy.deepcopy(tiny_model).to(dtype)(x).logits  # images are converted
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=2e-2, rtol=5e-2)


def test_memory_layout_does_not_matter(tiny_model):
    x = torch.randn(IMAGE)
    expected = tiny_model(x).logits
    strided = torch.randn(2, 3, 48, 64)[:, :, ::2, ::1].transpose(2, 3)[:, :, :32, :]
    for image in (x.contiguous(memory_format=torch.channels_last), strided):
        reference = tiny_model(image.contiguous()).logits
        torch.testing.assert_close(tiny_model(image).logits, reference, atol=1e-5, rtol=1e-5)
    channels_last = copy.deepcopy(tiny_model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(x).logits, expected, atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_after_giving_hidden_states(tiny_model):
    x = torch.randn(IMAGE)
    expected = tiny_model(x, output_hidden_states=True, output_attentions=True).logits
    for twin in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
        torch.testing.assert_close(twin(x).logits, expected)


def test_inference_mode_does_not_spoil_training(tiny_model):
    with torch.inference_mode():
        tiny_model(torch.randn(IMAGE))
    tiny_model.train()(torch.randn(IMAGE), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tiny_model.parameters())


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_nothing_is_read_before_it_is_written(tmp_path, tiny_model):
    """Fresh memory is filled with NaN; what a checkpoint or an initialiser forgets would show."""
    tiny_model.save_pretrained(tmp_path)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        model = SwinHFForImageClassification.from_pretrained(tmp_path)
        assert model(torch.randn(IMAGE)).logits.isfinite().all()
        for model_class in ALL:
            fresh = model_class(tiny_model.config)
            assert all(parameter.isfinite().all() for parameter in fresh.parameters())
            assert main_output(fresh, torch.randn(1, 3, 30, 45)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(was)


# ---------------------------------------------------------------------------------------------------- initialisation


def test_weights_start_as_microsofts(tiny_config):
    tiny_config.use_absolute_embeddings = True
    model = SwinHFForMaskedImageModeling(config_of(embed_dim=64, num_heads=[2, 2, 2], use_absolute_embeddings=True))
    for name, parameter in model.state_dict().items():
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif "patch_embeddings" in name or "decoder" in name:  # torch's own: uniform within 1 / sqrt(inputs)
            inputs = 3 * 2 * 2 if "patch" in name else 256
            assert parameter.abs().max() <= inputs**-0.5
            assert parameter.numel() < 99 or parameter.std() == pytest.approx((inputs * 3) ** -0.5, rel=0.15), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.numel() > 1000:
            assert parameter.std() == pytest.approx(0.02, rel=0.15), name
        else:
            assert 0.01 < parameter.std() < 0.03, name


@pytest.mark.parametrize("model_class", ALL)
def test_no_tensor_hides_and_meta_works(model_class, tiny_config):
    with torch.device("meta"):
        model = model_class(tiny_config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    for module in model.modules():
        for name, value in vars(module).items():
            assert not isinstance(value, torch.Tensor), name
    model.to_empty(device="cpu")
    model.init_weights()
    assert main_output(model.eval(), torch.randn(IMAGE)).isfinite().all()


@pytest.mark.parametrize("model_class", ALL)
def test_an_empty_checkpoint_is_filled_as_a_new_model(model_class, tiny_config):
    with torch.device("meta"):
        fresh = model_class(tiny_config)
    fresh.to_empty(device="cpu")
    torch.manual_seed(0)
    fresh.init_weights()
    torch.manual_seed(0)
    loaded, report = model_class.from_pretrained(None, config=tiny_config, state_dict={}, output_loading_info=True)
    assert set(report["missing_keys"]) == set(fresh.state_dict())
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- training


# The new names (activation_checkpointing_*) are unknown to the lowest transformers that is supported.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("model_class", [SwinHFForImageClassification, SwinHFForMaskedImageModeling])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_runs_each_block_twice(model_class, reentrant, awkward_config):
    awkward_config.drop_path_rate = 0.0
    model = model_class(awkward_config).train()
    twin = copy.deepcopy(model)
    calls, blocks = [], [block for stage in twin.swin.stages for block in stage.blocks]
    for block in blocks:
        block.attention.register_forward_hook(lambda module, args, output: calls.append(module))
    assert not any(block.gradient_checkpointing for block in blocks)
    twin.gradient_checkpointing_enable(*([] if reentrant is None else [{"use_reentrant": reentrant}]))
    x = torch.randn(2, 3, 30, 46, requires_grad=bool(reentrant))
    target = (
        {"labels": torch.tensor([1, 2])}
        if model_class is SwinHFForImageClassification
        else {"bool_masked_pos": torch.rand(2, 15 * 23) < 0.5}
    )
    for each in (model, twin):
        each(x, **target).loss.backward()
    assert len(calls) == 2 * sum(awkward_config.depths)
    for (name, theirs), ours in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None and theirs.grad.abs().sum() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    twin.gradient_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in blocks)


def test_stochastic_depth_drops_both_branches_only_in_training(tiny_config):
    """With a rate near one a block is the identity in training; in evaluation it is not."""
    tiny_config.drop_path_rate = 0.999
    block = SwinHFModel(tiny_config).stages[2].blocks[0]
    assert block.drop_path.rate == pytest.approx(0.999)
    x = torch.randn(64, 4, 6, 64)
    torch.manual_seed(0)
    same = (block.train()(x)[0] == x).flatten(1).all(1)
    assert same.sum() >= 60
    assert not (block.eval()(x)[0] == x).any()


def test_stochastic_depth_keeps_the_mean():
    from swin_hf.model.modeling_swin_hf import SwinHFDropPath

    torch.manual_seed(0)
    dropped = SwinHFDropPath(0.3).train()(torch.ones(10_000, 1, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert (dropped[:, 0, 0] == dropped[:, 0, 1]).all()


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [
        ("single_label_classification", torch.tensor([3, 0]), lambda y, t: F.cross_entropy(y, t)),
        (
            "multi_label_classification",
            torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]),
            lambda y, t: F.binary_cross_entropy_with_logits(y, t),
        ),
        ("regression", torch.randn(2, 5), lambda y, t: F.mse_loss(y, t)),
    ],
)
def test_problem_types_have_their_loss(problem, labels, expected, tiny_model):
    tiny_model.config.problem_type = problem
    output = tiny_model(torch.randn(IMAGE), labels=labels)
    torch.testing.assert_close(output.loss, expected(output.logits, labels))


def test_overfits_one_batch(tiny_config):
    torch.manual_seed(0)
    model = SwinHFForImageClassification(tiny_config).train()
    x, labels = torch.randn(8, 3, 16, 24), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_autocast_training_is_finite(tiny_model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model.train()(torch.randn(IMAGE), labels=torch.tensor([0, 4]))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in tiny_model.parameters())


# ------------------------------------------------------------------------------------------------------------ SimMIM


def test_masked_loss_is_the_mean_over_masked_pixels():
    model = SwinHFForMaskedImageModeling(config_of()).eval()
    x, mask = torch.randn(2, 3, 30, 47), torch.rand(2, 15, 24) < 0.5  # the last column of patches is half outside
    output = model(x, bool_masked_pos=mask.flatten(1).long())
    distances = [
        (x[b, :, row, column] - output.reconstruction[b, :, row, column]).abs().sum()
        for b in range(2)
        for row in range(30)
        for column in range(47)
        if mask[b, row // 2, column // 2]
    ]
    torch.testing.assert_close(output.loss, torch.stack(distances).sum() / len(distances) / 3, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x, bool_masked_pos=mask).loss, output.loss)


def test_masked_pixels_are_not_seen():
    model = SwinHFForMaskedImageModeling(config_of()).eval()
    nn.init.normal_(model.swin.embeddings.mask_token)
    mask = torch.rand(1, 16, 24) < 0.5
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    x = torch.randn(1, 3, 32, 48)
    other = torch.where(hidden, torch.randn_like(x), x)
    first, second = model(x, bool_masked_pos=mask), model(other, bool_masked_pos=mask)
    torch.testing.assert_close(first.reconstruction, second.reconstruction)
    assert first.loss != second.loss
    assert not torch.allclose(model(x).reconstruction, first.reconstruction, atol=1e-4)
    base = model.swin(other, bool_masked_pos=mask).last_hidden_state
    torch.testing.assert_close(base, model.swin(x, bool_masked_pos=mask).last_hidden_state)


def test_local_targets_are_normalised_by_their_neighbourhood():
    """Swin V2's targets, pixel by pixel: (pixel - mean) / sqrt(unbiased variance + 1e-6) of what lies in the image."""
    from swin_hf.model.inputs import normalise_locally

    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    for row in range(6):
        for column in range(7):
            for channel in range(2):
                around = x[0, channel, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
                expected = (x[0, channel, row, column] - around.mean()) / (around.var() + 1e-6).sqrt()
                torch.testing.assert_close(normalise_locally(x, 5)[0, channel, row, column], expected)


def test_norm_targets_change_the_loss():
    from swin_hf.model.inputs import normalise_locally

    model = SwinHFForMaskedImageModeling(config_of(norm_targets=5)).eval()
    x, mask = torch.randn(1, 3, 32, 48), torch.ones(1, 16, 24, dtype=torch.bool)
    output = model(x, bool_masked_pos=mask)
    expected = (normalise_locally(x, 5) - output.reconstruction).abs().mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "pixel_values is missing; give images of shape"),
        (torch.zeros(3, 32, 48), r"pixel_values has shape \(3, 32, 48\); give \(batch, channels, height, width\)"),
        (torch.zeros(1, 1, 32, 48), "pixel_values has 1 channels but the model takes num_channels 3"),
    ],
)
@pytest.mark.parametrize("model_class", ALL)
def test_bad_images_are_refused(model_class, image, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config)(image)


def test_bad_masks_are_refused(tiny_config):
    model = SwinHFForMaskedImageModeling(tiny_config)
    with pytest.raises(
        ValueError, match=r"bool_masked_pos has shape \(1, 99\); the images have a grid of 16x24 patches"
    ):
        model(torch.zeros(1, 3, 32, 48), bool_masked_pos=torch.ones(1, 99))
    with pytest.raises(ValueError, match="the model has no mask token; build it with use_mask_token=True"):
        SwinHFModel(tiny_config)(torch.zeros(1, 3, 32, 48), bool_masked_pos=torch.ones(1, 384))


def test_a_stride_that_contradicts_the_patches_is_refused():
    model = SwinHFForMaskedImageModeling(config_of(encoder_stride=16))
    with pytest.raises(
        ValueError, match=r"encoder_stride is 16 but patches of \(2, 2\) in 3 stages shrink .* encoder_stride=8"
    ):
        model(torch.zeros(1, 3, 32, 48), bool_masked_pos=torch.ones(1, 384))


# ----------------------------------------------------------------------------------------------------- other sizes


@pytest.fixture
def folder(tmp_path, tiny_model):
    tiny_model.config.id2label = {number: f"class {number}" for number in range(5)}
    tiny_model.config.label2id = {f"class {number}": number for number in range(5)}
    nn.init.normal_(tiny_model.classifier.bias)  # zeros would hide where they come from
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_windows_resize_live_and_on_load_alike(folder, tiny_model, method, tmp_path):
    from transformers import AutoModelForImageClassification

    from swin_hf.model.resizing import resize_bias_table

    old = tiny_model.swin.stages[1].blocks[1].attention.relative_position_bias_table.detach().clone()
    live = tiny_model.set_input_size(image_size=64, window_size=(8, 6), method=method)
    assert live is tiny_model and live.config.window_size == [8, 6] and live.config.image_size == 64
    table = live.swin.stages[1].blocks[1].attention.relative_position_bias_table
    assert torch.equal(table, resize_bias_table(old, (4, 3), (8, 6), method))
    x = torch.randn(1, 3, 64, 64)
    sizes = {"image_size": 64, "window_size": (8, 6), "method": method}
    loaded = SwinHFForImageClassification.from_pretrained(folder, **sizes)
    auto = AutoModelForImageClassification.from_pretrained(folder, **sizes)
    given = SwinHFForImageClassification.from_pretrained(folder, config=live.config, method=method)
    live.save_pretrained(tmp_path / "again")
    again = SwinHFForImageClassification.from_pretrained(tmp_path / "again")
    for model in (loaded, auto, given, again):
        assert model.config.window_size == [8, 6] and model.config.image_size == 64
        torch.testing.assert_close(model(x).logits, live(x).logits, atol=1e-5, rtol=1e-5)
    live.train()(x, labels=torch.tensor([1])).loss.backward()
    assert table.grad is not None


def test_windows_can_grow_for_each_stage_and_come_back(tiny_model):
    x = torch.randn(IMAGE)
    expected = tiny_model(x).logits
    tiny_model.set_input_size(window_size=(4, 3))
    torch.testing.assert_close(tiny_model(x).logits, expected)
    tiny_model.set_input_size(window_size=[6, (4, 2), 3])
    assert [stage.blocks[0].window for stage in tiny_model.swin.stages] == [(6, 6), (4, 2), (3, 3)]
    assert tiny_model(x).logits.isfinite().all()


def test_absolute_positions_follow_the_image(tmp_path):
    model = SwinHFForImageClassification(config_of(use_absolute_embeddings=True)).eval()
    x = torch.randn(1, 3, 40, 60)
    expected = model(x).logits  # interpolated on the way
    model.save_pretrained(tmp_path)
    resized = SwinHFForImageClassification.from_pretrained(tmp_path, image_size=(40, 60))
    assert resized.swin.embeddings.position_embeddings.shape == (1, 20 * 30, 16)
    torch.testing.assert_close(resized(x).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(resized(x).logits, resized(x.roll(20, 3)).logits, atol=1e-4)


@pytest.mark.parametrize("num_channels", [1, 2, 5])
@pytest.mark.parametrize("model_class", [SwinHFForImageClassification, SwinHFForMaskedImageModeling])
def test_channels_adapt_and_grey_stays_grey(num_channels, model_class, tmp_path):
    model = model_class(config_of()).eval()
    model.save_pretrained(tmp_path)
    adapted = model_class.from_pretrained(tmp_path, num_channels=num_channels)
    assert adapted.config.num_channels == num_channels
    grey = torch.randn(1, 1, 32, 48)
    ours = main_output(adapted, grey.expand(-1, num_channels, -1, -1))
    theirs = main_output(model, grey.expand(-1, 3, -1, -1))
    if model_class is SwinHFForMaskedImageModeling:
        assert ours.shape[1] == num_channels
        if num_channels == 1:  # the mean of what the three channels were
            theirs = theirs.mean(1, keepdim=True)
        else:  # channels in turn; two of three share a place, the third has its own
            theirs = (
                theirs[:, [0, 1, 2, 0, 1]]
                if num_channels == 5
                else torch.stack([theirs[:, [0, 2]].mean(1), theirs[:, 1]], dim=1)
            )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_patches_are_resampled(tmp_path):
    model = SwinHFForMaskedImageModeling(config_of(use_absolute_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    larger = SwinHFForMaskedImageModeling.from_pretrained(tmp_path, patch_size=4, image_size=(64, 96))
    assert (larger.config.patch_size, larger.config.encoder_stride) == (4, 16)
    x = torch.randn(1, 3, 2, 2)  # one patch, enlarged
    enlarged = F.interpolate(x, size=(4, 4), mode="bicubic")
    torch.testing.assert_close(
        larger.swin.embeddings.patch_embeddings(enlarged),
        model.swin.embeddings.patch_embeddings(x),
        atol=1e-5,
        rtol=1e-5,
    )
    assert larger(torch.randn(1, 3, 64, 96), bool_masked_pos=torch.ones(1, 16, 24)).loss.isfinite()
    with pytest.raises(ValueError, match=r"patches of \(2, 4\) in 3 stages .* the decoder needs a square patch"):
        model.resize_patches((2, 4))
    assert model.config.patch_size == 2


def test_impossible_sizes_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"image_size 1 is smaller than one patch of 2; choose a larger image"):
        tiny_model.set_input_size(image_size=1)
    with pytest.raises(ValueError, match="window_size is 0; it must be a positive integer"):
        tiny_model.set_input_size(window_size=0)
    with pytest.raises(ValueError, match="unknown method 'nearest'"):
        tiny_model.set_input_size(window_size=5, method="nearest")
    with pytest.raises(ValueError, match="num_channels is 0"):
        tiny_model.resize_channels(0)
    assert tiny_model(torch.randn(IMAGE)).logits.isfinite().all()


def test_a_new_number_of_labels_keeps_everything_but_the_head(folder, tiny_model):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SwinHFForImageClassification.from_pretrained(folder, num_labels=9)
    model = SwinHFForImageClassification.from_pretrained(
        folder, num_labels=9, ignore_mismatched_sizes=True, strict=True
    )
    assert model.classifier.weight.shape == (9, 64)
    for (name, ours), theirs in zip(model.named_parameters(), tiny_model.parameters(), strict=True):
        assert name.startswith("classifier") or torch.equal(ours, theirs)


@pytest.mark.parametrize("through_auto", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_labels": 3}])
def test_a_head_picks_rows(folder, tiny_model, through_auto, more):
    from transformers import AutoModelForImageClassification

    loader = AutoModelForImageClassification if through_auto else SwinHFForImageClassification
    x, rows = torch.randn(IMAGE), [4, 0, 2]
    model = loader.from_pretrained(folder, head_rows=rows, **more)
    torch.testing.assert_close(model(x).logits, tiny_model(x).logits[:, rows])
    assert model.config.id2label == {0: "class 4", 1: "class 0", 2: "class 2"}
    assert model.config.num_labels == model.num_labels == 3
    assert model(x, labels=torch.tensor([2, 1])).loss.isfinite()


def test_rows_that_are_no_classes_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"rows \[5, -1\] are not classes of the model; give numbers from 0 to 4"):
        tiny_model.select_labels([1, 5, -1])
    with pytest.raises(ValueError, match=r"rows \[\] are not classes"):
        tiny_model.select_labels([])


# --------------------------------------------------------------------------------------------------- strict loading


def test_a_checkpoint_of_another_depth_is_refused(folder, caplog):
    with pytest.raises(
        ValueError,
        match=r"does not fit .*: 13 keys are missing and would be random \(swin.stages.2.blocks.1",
    ):
        SwinHFForImageClassification.from_pretrained(folder, depths=[1, 2, 2], strict=True)
    with pytest.raises(
        ValueError,
        match=r"0 keys are missing and would be random; 13 have no place in the model \(swin.stages.1.blocks.1",
    ):
        SwinHFForImageClassification.from_pretrained(folder, depths=[1, 1, 1], strict=True)
    SwinHFForImageClassification.from_pretrained(folder, depths=[1, 1, 1])
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("model_class", ALL)
def test_random_layers_are_refused_unless_asked_for(folder, caplog, model_class):
    with pytest.raises(
        ValueError, match=r"13 keys are missing .*; .* ask for random layers on purpose with strict=False"
    ):
        model_class.from_pretrained(folder, depths=[1, 2, 2])
    with pytest.raises(
        ValueError, match=r"missing .* would be random \(swin.stages.0.blocks.0.attention.relative|stages.0"
    ):
        model_class.from_pretrained(folder, config=None, ignore_mismatched_sizes=True, num_heads=[1, 2, 4])
    _, info = model_class.from_pretrained(folder, depths=[1, 2, 2], output_loading_info=True)  # which tells
    assert len(info["missing_keys"]) >= 13
    caplog.clear()
    SwinHFForImageClassification.from_pretrained(folder, depths=[1, 2, 2], strict=False)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "13 of 79 weights of SwinHFForImageClassification are not in" in errors[0].getMessage()


def test_a_checkpoint_with_a_hole_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 keys are missing and would be random \(classifier.weight\)"):
        SwinHFForImageClassification.from_pretrained(folder, strict=True)


def test_new_heads_and_mask_tokens_are_no_fault(folder, tmp_path, caplog):
    for model_class in ALL:
        model = model_class.from_pretrained(folder, strict=True)
        model.save_pretrained(tmp_path / model_class.__name__)
    for source in ALL[:3]:
        for target in ALL:
            target.from_pretrained(tmp_path / source.__name__, strict=True)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_offloaded_weights_cannot_be_resized(folder, tmp_path):
    from accelerate import infer_auto_device_map  # noqa: F401 - device_map needs it

    with pytest.raises(ValueError, match=r"\['window_size'\] cannot change while weights are offloaded; load without"):
        SwinHFForImageClassification.from_pretrained(
            folder, window_size=6, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        )
