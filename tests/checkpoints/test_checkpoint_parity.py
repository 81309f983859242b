"""Weights of other libraries compute with us what they compute at home, and ours compute there what they do here.

Reference sources: microsoft/Swin-Transformer models/swin_transformer.py, transformers models/swin, timm and torchvision
swin_transformer.py, OpenMMLab mmpretrain/models/backbones/swin_transformer.py.
"""

from itertools import product

import pytest
import torch
from checkpoint_peers import (
    BACKBONES,
    CLASSIFIERS,
    RECTANGLE,
    SQUARE,
    images,
    maskformer_swin,
    microsoft_index,
    peer,
    randomise,
    timm_swin,
    torchvision_swin,
    transformers_swin,
)
from torch import nn

from swin_hf import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
    export_checkpoint,
    list_presets,
    load_checkpoint,
)
from swin_hf.checkpoints import open_checkpoint
from swin_hf.checkpoints.tables import LAYOUTS, Kind
from swin_hf.checkpoints.translate import Place, differences, fold, unfold, windows_at_home
from swin_hf.checkpoints.verify import build_peer
from swin_hf.model.configuration_swin_hf import as_pair

# fp32, two orders of summation; of the largest activation.
CLOSE = 5e-5


def assert_equal(ours, theirs):
    if isinstance(ours, tuple | list):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
        return
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= CLOSE * max(1.0, float(theirs.abs().max()))


def stage_outputs(module, stages, run):
    """Output of each stage, before merging, as (B, H, W, C)."""
    seen = []
    hooks = [stage.register_forward_hook(lambda _, __, output: seen.append(output)) for stage in stages]
    with torch.inference_mode():
        run(module)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in seen]


def logits_of(module, pixel_values):
    with torch.inference_mode():
        output = module(pixel_values)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_equal_the_peers(name):
    theirs, state = peer(name)
    ours = load_checkpoint(state)
    assert_equal(logits_of(ours, images()), logits_of(theirs, images()))


@pytest.mark.parametrize("layout", ["torchvision", "transformers-memory"])
def test_padded_maps_equal_the_peers(layout):
    """At 48 pixels every map needs padding. A new peer: transformers' forgets its shift after a smaller image."""
    state = peer("torchvision").state if layout == "torchvision" else peer(f"{layout} ForImageClassification").state
    theirs = build_peer(layout, SwinHFConfig(**SQUARE))
    theirs.load_state_dict(state)
    assert_equal(logits_of(load_checkpoint(state), images(48, 44)), logits_of(theirs, images(48, 44)))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_rectangles_shift_as_they_do_at_home(library):
    """The last map is covered by its window on one axis: these libraries still shift on the other."""
    theirs = timm_swin(True) if library == "timm" else torchvision_swin(True)
    pixel_values = images(32, 48)

    ours = load_checkpoint(theirs.state_dict(), config=SwinHFConfig(**RECTANGLE))

    assert ours.config.shift_per_axis
    assert_equal(logits_of(ours, pixel_values), logits_of(theirs, pixel_values))
    ours_stages = stage_outputs(ours, ours.swin.stages, lambda m: m(pixel_values))
    parts = theirs.layers if library == "timm" else theirs.features[1::2]
    for ours_map, their_map in zip(ours_stages, stage_outputs(theirs, parts, lambda m: m(pixel_values)), strict=True):
        assert_equal(ours_map, their_map)
    wrong = load_checkpoint(export_checkpoint(ours, "swin_hf"), config=SwinHFConfig(**RECTANGLE))
    assert (logits_of(wrong, pixel_values) - logits_of(theirs, pixel_values)).abs().max() > 1e-3


def test_hidden_states_equal_transformers():
    theirs = transformers_swin("SwinForImageClassification")
    ours = load_checkpoint(theirs.state_dict(), image_size=32)
    with torch.inference_mode():
        ours_output = ours(images(), output_hidden_states=True)
        their_output = theirs(images(), output_hidden_states=True)
    for ours_state, their_state in zip(ours_output.hidden_states, their_output.hidden_states, strict=True):
        assert_equal(ours_state, their_state)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_stage_outputs_equal_the_peers(library):
    theirs = timm_swin() if library == "timm" else torchvision_swin()
    ours = load_checkpoint(theirs.state_dict())
    parts = theirs.layers if library == "timm" else theirs.features[1::2]
    ours_stages = stage_outputs(ours, ours.swin.stages, lambda m: m(images()))
    for ours_map, their_map in zip(ours_stages, stage_outputs(theirs, parts, lambda m: m(images())), strict=True):
        assert_equal(ours_map, their_map)


@pytest.mark.parametrize("layout", ["timm", "torchvision", "transformers-memory"])
def test_ours_load_strictly_at_home(layout):
    ours = randomise(SwinHFForImageClassification(SwinHFConfig(**SQUARE)), seed=3)
    theirs = build_peer(layout, ours.config)
    theirs.load_state_dict(export_checkpoint(ours, layout), strict=True)
    assert_equal(logits_of(theirs, images()), logits_of(ours, images()))


@pytest.mark.parametrize(
    ("model_class", "name"),
    [
        (SwinHFForImageClassification, "SwinForImageClassification"),
        (SwinHFForMaskedImageModeling, "SwinForMaskedImageModeling"),
        (SwinHFBackbone, "SwinBackbone"),
        (SwinHFModel, "SwinModel"),
    ],
)
@pytest.mark.parametrize("layout", ["transformers", "transformers-4"])
def test_folders_load_without_a_word_in_transformers(model_class, name, layout, tmp_path):
    import transformers

    from swin_hf import convert_checkpoint

    stages = {"out_features": ["stage1", "stage2", "stage3"]} if name == "SwinBackbone" else {}
    ours = randomise(model_class(SwinHFConfig(**SQUARE, **stages)), seed=3)
    ours.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to=layout)

    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)

    assert not report["missing_keys"]
    surplus = {key for key in report["unexpected_keys"] if not key.endswith("relative_position_index")}
    assert not surplus and not report["mismatched_keys"]
    with torch.inference_mode():
        one, other = ours(images()), theirs(images())
    for key in ("logits", "reconstruction", "last_hidden_state", "feature_maps"):
        if getattr(one, key, None) is not None:
            assert_equal(getattr(one, key), getattr(other, key))


def test_timm_builds_our_folder(tmp_path):
    import timm

    from swin_hf import convert_checkpoint

    ours = randomise(SwinHFForImageClassification(SwinHFConfig(**SQUARE)), seed=3)
    ours.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", to="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    assert_equal(logits_of(theirs, images()), logits_of(ours, images()))
    assert theirs.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("name", ["transformers Backbone", "maskformer-swin"])
def test_feature_maps_equal_the_peers(name):
    theirs, state = peer(name)
    ours = load_checkpoint(state, model_class=SwinHFBackbone)
    with torch.inference_mode():
        for ours_map, their_map in zip(ours(images()).feature_maps, theirs(images()).feature_maps, strict=True):
            assert_equal(ours_map, their_map)


@pytest.mark.parametrize("layout", ["maskformer-swin", "transformers-memory"])
def test_our_backbone_loads_strictly_at_home(layout):
    stages = ["stage1", "stage2", "stage3"]
    ours = randomise(SwinHFBackbone(SwinHFConfig(**SQUARE, out_features=stages)), seed=3)
    theirs = maskformer_swin() if layout == "maskformer-swin" else transformers_swin("SwinBackbone")
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    try:
        theirs.load_state_dict(export_checkpoint(ours, layout), strict=True)
        with torch.inference_mode():
            for ours_map, their_map in zip(ours(images()).feature_maps, theirs(images()).feature_maps, strict=True):
                assert_equal(ours_map, their_map)
    finally:
        theirs.load_state_dict(before)  # the peers are shared by all tests


def test_detectors_of_two_names_are_one_network():
    """Microsoft's fork and OpenMMLab hold the same backbone, one of them with merging in the order of nn.Unfold."""
    maps = []
    for name in ("microsoft detector", "openmmlab detector"):
        backbone = load_checkpoint(peer(name).state, model_class=SwinHFBackbone)
        with torch.inference_mode():
            maps.append(backbone(images()).feature_maps)
    for one, other in zip(*maps, strict=True):
        assert_equal(one, other)


def test_reconstruction_equals_transformers():
    theirs = transformers_swin("SwinForMaskedImageModeling")
    ours = load_checkpoint(theirs.state_dict(), model_class=SwinHFForMaskedImageModeling)
    mask = torch.arange(2 * 256).reshape(2, 256) % 3 == 0
    with torch.inference_mode():
        one, other = ours(images(), mask), theirs(images(), mask)
    assert_equal(one.reconstruction, other.reconstruction)
    assert_equal(one.loss, other.loss)


def test_simmim_file_gives_decoder_and_classifier():
    """Encoder as in the classifier whose trunk it is; the decoder as plain tensors say."""
    state = peer("microsoft simmim").state
    whole = load_checkpoint(state, model_class=SwinHFForMaskedImageModeling)
    torch.testing.assert_close(whole.decoder[0].weight, state["decoder.0.weight"], rtol=0, atol=0)
    torch.testing.assert_close(whole.swin.embeddings.mask_token, state["encoder.mask_token"], rtol=0, atol=0)
    classifier = load_checkpoint(state)
    trunk = load_checkpoint(peer("microsoft").state)
    with torch.inference_mode():
        one, other = classifier.swin(images()), trunk.swin(images())
    assert_equal(one.pooler_output, other.pooler_output)


def test_fold_is_the_order_of_unfold():
    """Merging by nn.Unfold with their weights equals our merging with the folded ones."""
    channels, generator = 6, torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, channels, generator=generator)
    weight = torch.randn(2 * channels, 4 * channels, generator=generator)
    scale = torch.randn(4 * channels, generator=generator)

    columns = nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # B, L, C * 4
    theirs = nn.functional.layer_norm(columns, (4 * channels,), scale) @ weight.T

    taps = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1).flatten(1, 2)
    ours = nn.functional.layer_norm(taps, (4 * channels,), fold(scale)) @ fold(weight).T

    torch.testing.assert_close(ours, theirs)
    assert torch.equal(unfold(fold(weight)), weight)


# Parameters of the released models, from Microsoft's and timm's tables.
PARAMETERS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
}


QUICK = ("swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384_22k", "swin_digits_patch4_window4_32")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in list_presets("swin_hf")]
)
def test_every_size_by_shape(preset):
    """On the meta device: strict at home in three libraries, and recognised from its shapes alone."""
    with torch.device("meta"):
        ours = SwinHFForImageClassification(SwinHFConfig.from_preset(preset))
        for layout in ("timm", "torchvision", "transformers-memory"):
            theirs = build_peer(layout, ours.config).state_dict()
            written = export_checkpoint(ours, layout)
            assert {key: tensor.shape for key, tensor in written.items()} == {k: t.shape for k, t in theirs.items()}
    if preset in PARAMETERS:
        assert sum(tensor.numel() for tensor in ours.parameters()) == PARAMETERS[preset]
    for layout in ("microsoft", "timm", "torchvision", "transformers", "openmmlab", "swin_hf"):
        found = open_checkpoint(export_checkpoint(ours, layout))
        assert found.place.layout.name == layout
        assert preset in found.presets
        for field in ("image_size", "embed_dim", "depths", "num_heads", "num_labels", "patch_size"):
            assert getattr(found.config, field) == getattr(ours.config, field), field
        assert list(found.config.stage_windows) == windows_at_home(ours.config, found.place)


def test_all_layouts_have_a_peer_here():
    from swin_hf.checkpoints import LAYOUTS

    assert {name.split()[0] for name in (*CLASSIFIERS, *BACKBONES)} | {"swin_hf"} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("layout", "side"),
    [
        *product(("timm", "torchvision"), (16, 24, 32, 34, 36, 40, 48, 50)),
        ("transformers-memory", 32),
        ("transformers-memory", 34),
        ("transformers-memory", 40),
    ],
)
def test_a_difference_of_geometry_is_told_exactly_where_there_is_one(layout, side, caplog):
    """Windows of 4 on maps of 2 to 16 tokens: whole, padded, and smaller than the window."""
    sizes = {"image_size": side, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    config = SwinHFConfig(**sizes, num_labels=5, shift_per_axis=LAYOUTS[layout].shift_per_axis)
    theirs = randomise(build_peer(layout, config))
    ours = load_checkpoint(theirs.state_dict(), layout, image_size=side)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = theirs(pixels), ours(pixels).logits
    distance = float((found - getattr(expected, "logits", expected)).abs().max())
    told = differences(ours.config, Place(LAYOUTS[layout], Kind.CLASSIFIER, ours.config.depths))
    assert (distance > 1e-4) == bool(told), (distance, told)
    assert all(difference in caplog.text for difference in told)


@pytest.mark.parametrize("image_size", [16, 24, 32, (16, 32), (48, 24)], ids=str)
def test_tables_are_cut_where_timm_builds_smaller_ones(image_size):
    """A window of 8 on maps of 2 to 24 tokens: strict there, and the same logits there, here, and read again."""
    sizes = {"image_size": image_size, "patch_size": 2, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 2)}
    config = SwinHFConfig(**sizes, window_size=8, num_labels=5, shift_per_axis=True)
    ours, theirs = randomise(SwinHFForImageClassification(config)), build_peer("timm", config)
    pixels = images(*config.image_hw)
    expected, state = logits_of(ours, pixels), export_checkpoint(ours, "timm")
    theirs.load_state_dict(state, strict=True)
    assert_equal(logits_of(theirs, pixels), expected)
    again = load_checkpoint(state, config=config)
    assert_equal(logits_of(again, pixels), expected)
    assert again.config.stage_windows[2] == as_pair(side // 8 for side in config.image_hw)
    assert all(torch.equal(tensor, state[key]) for key, tensor in export_checkpoint(again, "timm").items())


@pytest.mark.parametrize(
    ("image_size", "window"), [((32, 32), 4), ((32, 64), 4), ((64, 32), 4), ((64, 64), 8)], ids=str
)
@pytest.mark.parametrize("kind", ["", "encoder."], ids=["classifier", "simmim"])
def test_tables_are_cut_where_microsoft_builds_smaller_ones(image_size, window, kind, caplog):
    """Its ``SwinTransformerBlock`` has one square window, of the shorter side of the map where that is smaller."""
    sizes = {"image_size": image_size, "patch_size": 2, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2)}
    config = SwinHFConfig(**sizes, window_size=8, encoder_stride=8)
    ours = (SwinHFForMaskedImageModeling if kind else SwinHFForImageClassification)(config)
    state = export_checkpoint(ours, "microsoft")
    attention = f"{kind}layers.2.blocks.0.attn.relative_position_"
    assert state[attention + "index"].equal(microsoft_index(window))
    assert state[attention + "bias_table"].shape == ((2 * window - 1) ** 2, 2)
    is_other = image_size[0] != image_size[1]  # ours shrinks by axis there
    assert ("there it is cut to a square of the shorter side" in caplog.text) == is_other
    again = load_checkpoint(state, model_class=type(ours), config=config)
    assert again.config.stage_windows == ((8, 8), (8, 8), (window, window))
    again = export_checkpoint(again, "microsoft")
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    backbone = export_checkpoint(SwinHFBackbone(config), "microsoft")  # detection forks never shrink a window
    assert backbone["backbone.layers.2.blocks.0.attn.relative_position_bias_table"].shape == (225, 2)
