"""Maps of a model: each number in its place, whatever the windows did, and the model none the wiser."""

import math

import pytest
import torch
from PIL import Image
from torch import nn

import swin_hf
from swin_hf import SwinHFBackbone, SwinHFConfig, SwinHFForImageClassification
from swin_hf.cli import main
from swin_hf.explain import draw_explanation, enlarge, explain, save_figure
from swin_hf.text import one_line

# Probabilities of the same float32 arithmetic, computed in another order.
SAME = {"rtol": 1e-4, "atol": 1e-5}


def blocks_of(model):
    return [(s, b, block) for s, stage in enumerate(model.swin.stages) for b, block in enumerate(stage.blocks)]


def attention_by_definition(block, x, row, column):
    """Where a token looks, written with loops: among the tokens of its (shifted) window, padding included.

    ``x`` is the block's input, ``(H, W, C)``; returns ``{(row, column): (h,) probabilities}`` over the padded map.
    """
    attention = block.attention
    sides, starts = [], []
    covered = [x.shape[axis] <= block.window[axis] for axis in (0, 1)]
    for axis in (0, 1):
        side = min(block.window[axis], x.shape[axis])
        # The windows of a shifted block begin at side // 2 on the unshifted map; what lies before is a window as well.
        starts.append(side // 2 if block.shifted and not any(covered) else 0)
        sides.append(side)

    def window_of(token):
        return tuple((token[axis] - starts[axis]) // sides[axis] for axis in (0, 1))

    padded = [math.ceil(x.shape[axis] / sides[axis]) * sides[axis] for axis in (0, 1)]
    members = [
        (r, c) for r in range(padded[0]) for c in range(padded[1]) if window_of((r, c)) == window_of((row, column))
    ]
    normed = block.norm1(x)

    def heads_of(token, part):
        inside = token[0] < x.shape[0] and token[1] < x.shape[1]
        vector = normed[token] if inside else torch.zeros_like(normed[0, 0])
        return attention.qkv(vector).view(3, attention.num_heads, -1)[part]  # h, d

    scores = []
    for member in members:
        offset = (row - member[0] + block.window[0] - 1) * (2 * block.window[1] - 1) + column - member[1]
        bias = attention.relative_position_bias_table[offset + block.window[1] - 1]
        query, key = heads_of((row, column), 0), heads_of(member, 1)
        scores.append((query * key).sum(dim=-1) / query.shape[-1] ** 0.5 + bias)
    return dict(zip(members, torch.stack(scores).softmax(dim=0), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), (23, 37)], ids=["divisible", "padded"])
@pytest.mark.parametrize("kind", ["tiny", "awkward"])
def test_attention_from_a_token_is_what_the_paper_defines(tiny_config, awkward_config, kind, size):
    torch.manual_seed(0)
    model = SwinHFForImageClassification(tiny_config if kind == "tiny" else awkward_config).eval()
    for _, _, block in blocks_of(model):
        nn.init.normal_(block.attention.relative_position_bias_table)
        nn.init.normal_(block.attention.qkv.weight, std=0.3)
        nn.init.normal_(block.attention.qkv.bias)
    images = torch.randn(2, 3, *size)
    inputs = []
    handles = [
        block.norm1.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for *_, block in blocks_of(model)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    maps = swin_hf.attention_maps(model, images)
    assert [(entry.stage, entry.block) for entry in maps] == [(s, b) for s, b, _ in blocks_of(model)]
    for entry, x, (_, _, block) in zip(maps, inputs, blocks_of(model), strict=True):
        height, width = x.shape[1:3]
        for row, column in {(0, 0), (height // 2, width - 1), (height - 1, width // 2), (height - 1, width - 1)}:
            truth = torch.zeros(block.attention.num_heads, height, width)
            for (r, c), probability in attention_by_definition(block, x[1], row, column).items():
                if r < height and c < width:
                    truth[:, r, c] = probability
            torch.testing.assert_close(entry.from_token(row, column)[1], truth, **SAME)


@torch.no_grad()
def test_received_attention_is_the_sum_over_all_tokens(awkward_config):
    torch.manual_seed(0)
    model = SwinHFForImageClassification(awkward_config).eval()
    for entry in swin_hf.attention_maps(model, torch.randn(1, 3, 30, 46)):
        height, width = entry.geometry.grid
        everyone = sum(entry.from_token(row, column) for row in range(height) for column in range(width))
        torch.testing.assert_close(entry.received(), everyone, **SAME)


@torch.no_grad()
def test_last_block_of_each_stage_agrees_with_the_output_of_the_model(tiny_model):
    images = torch.randn(2, 3, 30, 50)
    theirs = tiny_model(images, output_attentions=True).attentions
    ours = swin_hf.attention_maps(tiny_model, images)
    last = {entry.stage: entry for entry in ours}
    for stage, weights in enumerate(theirs):
        torch.testing.assert_close(last[stage].weights.flatten(0, 1), weights)


@torch.no_grad()
def test_pixel_of_the_image_finds_its_token(tiny_model):
    maps = swin_hf.attention_maps(tiny_model, torch.randn(1, 3, 31, 45))
    for entry in maps:
        cell = 2 * 2**entry.stage
        assert entry.cell == (cell, cell)
        torch.testing.assert_close(entry.from_pixel(30, 44), entry.from_token(30 // cell, 44 // cell))
        image = entry.to_image(entry.received())
        assert image.shape[-2:] == (31, 45)
        torch.testing.assert_close(image[..., 30, 44], entry.received()[..., 30 // cell, 44 // cell])


def test_backbone_and_wrapped_models_have_maps_too(tiny_config, tiny_model):
    tiny_config.out_features = ["stage2"]
    backbone = SwinHFBackbone(tiny_config)
    maps = swin_hf.attention_maps(backbone, torch.randn(1, 3, 32, 48))
    assert [(entry.stage, entry.block) for entry in maps] == [(0, 0), (1, 0), (1, 1)]  # stage 3 does not run
    images = torch.randn(1, 3, 32, 48)
    for wrapped in (nn.Sequential(tiny_model), torch.compile(tiny_model)):
        assert len(swin_hf.attention_maps(wrapped, images)) == 4
        torch.testing.assert_close(swin_hf.grad_cam(wrapped, images), swin_hf.grad_cam(tiny_model, images))


def test_long_class_names_are_cut(tiny_model):
    images = torch.rand(1, 3, 32, 48)
    figure = draw_explanation(
        explain(tiny_model, images, 0), images[0], "", "Chesapeake Bay retriever, Canis familiaris"
    )
    assert figure.axes[1].get_title() == "Grad-CAM for Chesapeak\u2026ever, stage 1"


@pytest.mark.parametrize(
    "name", [r"$\frac$", "$a_{b$ and $x^$", "a_b^c", "two\nlines\t\x1b[31m", "<b>&amp;</b><script>"]
)
def test_class_names_are_text_whatever_they_hold(tiny_model, tmp_path, capsys, name):
    tiny_model.config.id2label = {index: f"{name} {index}" for index in range(5)}
    tiny_model.save_pretrained(tmp_path / "model")
    Image.new("RGB", (48, 32), (90, 20, 160)).save(tmp_path / "a.png")
    output = tmp_path / "map.png"
    words = [
        "explain",
        str(tmp_path / "model"),
        str(tmp_path / "a.png"),
        "--output",
        str(output),
        "--target",
        f"{name} 3",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "\x1b" not in printed
    assert f"Grad-CAM for {one_line(f'{name} 3')}" in printed
    with Image.open(output) as picture:
        assert picture.width > 500
    images = torch.rand(1, 3, 32, 48)
    figure = draw_explanation(explain(tiny_model, images, 0), images[0], one_line(name), name)
    assert figure.axes[0].get_title() == one_line(name)
    assert not any(axes.title.get_parse_math() for axes in figure.axes if axes.get_title())


@pytest.fixture(scope="module")
def lighthouse() -> SwinHFForImageClassification:
    """A model built by hand that knows one thing: class 1 is a bright square, and every head looks for it.

    Channel 0 is brightness, channels 1 and 2 are constants that keep the norms from blowing up the dark.
    """
    config = SwinHFConfig(
        image_size=(48, 64), embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=(5, 6), num_labels=2
    )
    model = SwinHFForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        patches = model.swin.embeddings.patch_embeddings
        patches.weight[0] = 1 / patches.weight[0].numel()
        patches.bias[1:3] = torch.tensor([1.0, -1.0])
        for _, _, block in blocks_of(model):
            attention, dim = block.attention, block.attention.proj.in_features
            first = torch.arange(attention.num_heads) * (dim // attention.num_heads)  # channel 0 of each head
            attention.qkv.bias[first] = 6.0  # every query asks ...
            attention.qkv.weight[dim + first, 0] = 1.0  # ... for brightness ...
            attention.qkv.weight[2 * dim + first, 0] = 1.0
            attention.proj.weight[0, first] = 0.0002  # ... and passes very little of it on
        merging = model.swin.stages[0].downsample.reduction.weight
        for neighbour in range(4):
            for channel in range(3):
                merging[channel, 16 * neighbour + channel] = 0.25
        model.classifier.weight[1, 0] = 1.0
    return model


PLACES = [(0, 0), (0, 44), (28, 0), (9, 21), (16, 24), (30, 43)]  # corners, seams of windows, no multiple of anything


@pytest.mark.parametrize("size", [(48, 64), (50, 70), (47, 61)], ids=["divisible", "padded", "odd"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_maps_light_up_where_the_pattern_is(lighthouse, size, place):
    side = 16  # wherever it lies, it covers a whole token of the last stage, 8 pixels
    image = torch.zeros(1, 3, *size)
    image[:, :, place[0] : place[0] + side, place[1] : place[1] + side] = 6.0

    def assert_lit(heat, cell, dark):
        reach = [slice(max(0, start - cell), start + side + cell) for start in place]  # a token may stick out
        lit = heat[tuple(reach)]
        assert lit.max() == heat.max() > 1.4 * dark
        elsewhere = heat.clone()
        elsewhere[tuple(reach)] = 0
        assert elsewhere.max() <= dark
        middle = heat[place[0] + side // 2, place[1] + side // 2]
        assert middle > dark

    for entry in swin_hf.attention_maps(lighthouse, image):
        # Far from the pattern there is nothing to look at: about the average, 1; less where padding takes part.
        assert_lit(entry.to_image(entry.received().mean(dim=1))[0], entry.cell[0], dark=1.01)
    for stage, cell in ((0, 4), (1, 8)):
        heat = swin_hf.grad_cam(lighthouse, image, target=1, stage=stage)[0]
        assert heat.shape == size
        assert_lit(heat, 2 * cell, dark=0.25)  # smooth maps spread by a token


def test_trained_model_shows_the_pattern_that_it_learned():
    """Class k is a square of colour k, anywhere; nothing tells the model where to look."""
    torch.manual_seed(0)
    config = SwinHFConfig(image_size=(24, 32), embed_dim=16, depths=(2,), num_heads=(2,), window_size=3, num_labels=3)
    model = SwinHFForImageClassification(config)

    def pictures(count, height, width, side=8):
        images, labels = 0.5 * torch.randn(count, 3, height, width), torch.randint(0, 3, (count,))
        corners = [(int(torch.randint(height - side, ())), int(torch.randint(width - side, ()))) for _ in range(count)]
        for image, label, (row, column) in zip(images, labels, corners, strict=True):
            image[label, row : row + side, column : column + side] += 2.5
        return images, labels, corners

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        images, labels, _ = pictures(32, 24, 32)
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels, corners = pictures(64, 30, 38)  # a size that was never seen, with padding
    maps = swin_hf.grad_cam(model, images, labels)
    hits = 0
    for heat, (row, column) in zip(maps, corners, strict=True):
        peak = divmod(int(heat.argmax()), heat.shape[1])
        hits += row - 4 <= peak[0] < row + 12 and column - 4 <= peak[1] < column + 12
    assert hits >= 0.8 * 64  # chance is below 0.25


def test_nothing_is_left_behind(tiny_model):
    images = torch.randn(2, 3, 30, 46)
    tiny_model.train().requires_grad_(False)
    tiny_model.set_attn_implementation("sdpa")
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}

    swin_hf.attention_maps(tiny_model, images)
    swin_hf.grad_cam(tiny_model, images)
    explain(tiny_model, images[:1], 0)
    with pytest.raises(ValueError, match="channels"):
        swin_hf.attention_maps(tiny_model, images[:, :1])
    with pytest.raises(ValueError, match="channels"):
        swin_hf.grad_cam(tiny_model, images[:, :1])

    assert tiny_model.training
    assert tiny_model.config._attn_implementation == "sdpa"
    assert images.grad is None and not images.requires_grad
    for module in tiny_model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_maps_do_not_depend_on_the_mode_of_the_model_or_of_torch(tiny_model):
    images = torch.randn(2, 3, 32, 48)
    expected = swin_hf.grad_cam(tiny_model, images)
    attention = swin_hf.attention_maps(tiny_model, images)
    with torch.inference_mode():
        inside = torch.clone(images)  # an inference tensor, which autograd refuses
        torch.testing.assert_close(swin_hf.grad_cam(tiny_model.train(), inside), expected)
        for ours, theirs in zip(swin_hf.attention_maps(tiny_model, inside), attention, strict=True):
            torch.testing.assert_close(ours.weights, theirs.weights)
    for one in (0, 1):
        torch.testing.assert_close(swin_hf.grad_cam(tiny_model, images[one : one + 1])[0], expected[one], **SAME)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_grad_cam_equals_the_pytorch_grad_cam_package(tiny_model, stage):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    images = torch.randn(3, 3, 32, 64)
    layer = tiny_model.swin.stages[stage].blocks[-1].norm1
    with GradCAM(Logits(tiny_model), [layer], reshape_transform=lambda maps: maps.permute(0, 3, 1, 2)) as theirs:
        expected = theirs(images, [ClassifierOutputTarget(label) for label in (4, 0, 2)])
    ours = swin_hf.grad_cam(tiny_model, images, [4, 0, 2], stage=stage)
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_target_is_the_predicted_class_unless_given(tiny_model):
    images = torch.randn(2, 3, 32, 48)
    predicted = tiny_model(images).logits.argmax(dim=1)
    torch.testing.assert_close(swin_hf.grad_cam(tiny_model, images), swin_hf.grad_cam(tiny_model, images, predicted))
    other = (predicted + 1) % 5
    assert not torch.equal(swin_hf.grad_cam(tiny_model, images), swin_hf.grad_cam(tiny_model, images, other))


def test_class_that_nothing_speaks_for_has_an_empty_map(lighthouse):
    assert not swin_hf.grad_cam(lighthouse, torch.ones(1, 3, 48, 64), target=0).any()


def test_any_norm_can_be_looked_at(tiny_model):
    images = torch.randn(1, 3, 30, 46)
    heat = swin_hf.grad_cam(tiny_model, images, layer=tiny_model.swin.norm)
    assert heat.shape == (1, 30, 46) and heat.max() == 1


def test_enlarging_cuts_off_what_pads():
    maps = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert enlarge(maps, (2, 3), (3, 4), smooth=False).tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: swin_hf.attention_maps(nn.Linear(2, 2), x), TypeError, "Linear holds no Swin of this package"),
        (lambda m, x: swin_hf.grad_cam(m.swin, x), TypeError, "SwinHFModel gives no logits"),
        (lambda m, x: swin_hf.grad_cam(m, x, 5), ValueError, "target is 5; the model has classes 0 to 4"),
        (lambda m, x: swin_hf.grad_cam(m, x, [0, 1, 2]), ValueError, r"one for each of the 1 images"),
        (lambda m, x: swin_hf.grad_cam(m, x, 0.5), ValueError, "target is 0.5"),
        (
            lambda m, x: swin_hf.grad_cam(m, x, stage=3),
            ValueError,
            "stage 3 does not exist; .* stages 0 to 2",
        ),
        (lambda m, x: swin_hf.grad_cam(m, x, layer=nn.Identity()), ValueError, "is not a part of"),
        (lambda m, x: swin_hf.grad_cam(m, x, layer=m.swin.stages[0]), ValueError, r"gives no map \(B, H, W, C\)"),
        (lambda m, x: swin_hf.attention_maps(m, x)[0].from_token(16, 0), ValueError, r"token \(16, 0\) is outside"),
        (lambda m, x: swin_hf.attention_maps(m, x)[0].from_pixel(0, 48), ValueError, r"pixel \(0, 48\) is outside"),
        (lambda m, x: explain(m, torch.cat([x, x]), 0), ValueError, "explain one image"),
        (lambda m, x: explain(m, x, 0, stage=7), ValueError, "stage 7 does not exist"),
    ],
)
def test_wrong_arguments_are_refused(tiny_model, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_model, torch.randn(1, 3, 32, 48))


def test_layer_without_a_stage_of_its_size_is_refused(tiny_model):
    channels_first = tiny_model.swin.embeddings.patch_embeddings  # its 16 channels look like rows
    with pytest.raises(ValueError, match="maps of 16x16; no stage has maps of that size"):
        swin_hf.grad_cam(tiny_model, torch.randn(1, 3, 32, 48), layer=channels_first)


def test_explanation_is_drawn_whole_or_not_at_all(tiny_model, tmp_path):
    images = torch.rand(1, 3, 30, 46)
    explanation = explain(tiny_model, images, 0, stage=1, pixel=(29, 45))
    assert explanation.names == ["stage 2, block 1", "stage 2, block 2"]
    assert all(heat.shape == (30, 46) for heats in explanation[2:] for heat in heats)
    figure = draw_explanation(explanation, images[0], "a title", "a class")
    assert len(figure.axes) == 1 + 3 * 2  # the picture, and the maps
    assert all(len(ax.child_axes) == 1 for ax in figure.axes[1:])  # each with its colour bar
    path = save_figure(figure, tmp_path / "maps.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError):
        save_figure(figure, path / "below a file.png")
    assert [file.name for file in tmp_path.iterdir()] == ["maps.png"]
