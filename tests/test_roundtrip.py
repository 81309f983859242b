"""What is read and written again is bit for bit what it was: every layout, every kind, every pair."""

import itertools
import json

import pytest
import torch
from checkpoint_peers import CLASSIFIERS, EVERY_PEER, RECTANGLE, REST_OF_A_DETECTOR, SQUARE, peer

from swin_hf import SwinHFConfig, SwinHFForImageClassification, export_checkpoint, load_checkpoint
from swin_hf.checkpoints import LAYOUTS, open_checkpoint
from swin_hf.checkpoints.load import MODELS
from swin_hf.checkpoints.tables import SmallMaps

# The trunk of transformers' backbones carries a final norm that no output goes through. Ours has none; it is written
# as a new one, so it is set to that before the comparison.
UNUSED = ("swin.layernorm.", "model.layernorm.")


def with_new_unused_norm(state, name):
    if "Backbone" not in name and name != "maskformer-swin":
        return state
    new = {key: torch.ones_like(t) if key.endswith("weight") else torch.zeros_like(t) for key, t in state.items()}
    return {key: new[key] if key.startswith(UNUSED) else tensor for key, tensor in state.items()}


def assert_bit_equal(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        # Bits, not values: 0.0 == -0.0, but they are not the same file.
        assert ours[key].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), key


def load_as_it_is(state, **options):
    kind = open_checkpoint(state, **options).place.kind
    return load_checkpoint(state, model_class=MODELS[kind], **options)


@pytest.mark.parametrize("name", EVERY_PEER)
def test_export_of_load_is_bit_equal(name):
    layout = name.split()[0]
    theirs = with_new_unused_norm(peer(name).state, name)
    config = None
    if name == "timm rectangle":  # without an index buffer, 35 rows of a table are 4x3 or 3x4
        config = SwinHFConfig(**RECTANGLE)

    model = load_as_it_is(theirs, config=config)

    assert open_checkpoint(theirs, config=config).place.layout.name == layout
    assert_bit_equal(export_checkpoint(model, layout), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_keeps_its_bits(dtype):
    theirs = {key: t.to(dtype) if t.is_floating_point() else t for key, t in peer("microsoft").state.items()}

    model = load_checkpoint(theirs)
    ours = export_checkpoint(model, "microsoft")

    assert model.dtype == dtype
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


def test_neighbours_of_a_detectors_backbone_are_dropped_on_purpose():
    alone = peer("openmmlab detector").state
    whole = {**alone, **REST_OF_A_DETECTOR}

    checkpoint = open_checkpoint(whole)

    assert sorted(checkpoint.translation.dropped) == sorted(REST_OF_A_DETECTOR)
    assert_bit_equal(export_checkpoint(load_as_it_is(whole), "openmmlab"), alone)


PAIRS = list(itertools.permutations([name.split()[0] for name in CLASSIFIERS] + ["swin_hf"], 2))


def test_every_pair_of_layouts_loses_nothing():
    """A to ours to B is what B is, for all 72 pairs; the way back is another pair."""
    base = load_checkpoint(peer("microsoft").state)  # its masks show the image size
    states = {layout: export_checkpoint(base, layout) for layout, _ in PAIRS}
    for first, second in PAIRS:
        # Not every layout shows the image size and the rule for shifts; they are the same for this square network.
        there = load_checkpoint(states[first], image_size=SQUARE["image_size"])
        over = export_checkpoint(there, second)
        assert_bit_equal(over, states[second])


def test_nothing_is_shared_with_what_was_given():
    theirs = {key: tensor.clone() for key, tensor in peer("timm").state.items()}
    model = load_checkpoint(theirs)
    exported = export_checkpoint(model, "timm")

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert_bit_equal(theirs, peer("timm").state)
    assert_bit_equal(exported, theirs)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "maskformer-swin"])
def test_awkward_model_survives_every_layout_that_can_hold_it(layout, awkward_config):
    """Padding in every stage; Microsoft's code cannot build its masks, so there are none to write."""
    width = 30 if LAYOUTS[layout].small_maps is SmallMaps.CUT_TO_SHORTER else 46
    model = SwinHFForImageClassification(awkward_config).set_input_size((30, width)).eval()
    images = torch.randn(1, 3, 30, width)
    again = load_checkpoint(export_checkpoint(model, layout), config=model.config)
    assert again.config.shift_per_axis == LAYOUTS[layout].shift_per_axis or layout == "swin_hf"
    again.config.shift_per_axis = model.config.shift_per_axis
    again = load_checkpoint(export_checkpoint(again, "swin_hf"), config=again.config)
    with torch.inference_mode():
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


# Lightning 2.6.6 with torch 2.15: its pytree helper asks for a class that torch has deprecated.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
# Two rows of data in the main process are enough here; Lightning would like workers.
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
def test_lightning_checkpoint_to_pretrained_folder(tmp_path):
    import lightning
    from lightning.pytorch.callbacks import WeightAveraging

    class Module(lightning.LightningModule):
        """Keeps the network as ``model``, like the modules of swin_hf.training."""

        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"preset": "swin_digits_patch4_window4_32", "id2label": {0: "zero", 1: "one"}})
            overrides = {"num_labels": 2, "id2label": {0: "zero", 1: "one"}, "label2id": {"zero": 0, "one": 1}}
            self.model = SwinHFForImageClassification(
                SwinHFConfig.from_preset("swin_digits_patch4_window4_32", **overrides)
            )

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 2)} for i in range(4)]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            WeightAveraging(use_buffers=False, avg_fn=lambda average, current, _: average * 0.5 + current * 0.5),
            Saver(tmp_path / "last.ckpt"),
        ],
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))

    images = torch.randn(1, 3, 32, 32)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    logits = {}
    for weights, key in ((None, "state_dict"), ("ema", "state_dict"), ("raw", "current_model_state")):
        model = load_checkpoint(tmp_path / "last.ckpt", weights=weights)
        expected = {name.removeprefix("model."): tensor for name, tensor in saved[key].items()}
        assert_bit_equal(model.state_dict(), expected)
        with torch.inference_mode():
            logits[weights] = model(images).logits
    assert not torch.allclose(logits["ema"], logits["raw"], atol=1e-4)
    assert model.config.id2label == {0: "zero", 1: "one"}

    load_checkpoint(tmp_path / "last.ckpt").save_pretrained(tmp_path / "model")
    again = SwinHFForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images).logits, logits["ema"])


try:
    from lightning.pytorch import Callback
except ImportError:
    Callback = object


class Saver(Callback):
    """Saves in the last step, while averaged and raw weights differ."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", ".."]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_index_that_leads_out_of_the_folder_is_refused_by_from_pretrained(tiny_model, tmp_path, name, index):
    """transformers joins the name to the folder, and reads whatever is there."""
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = dict.fromkeys(tiny_model.state_dict(), name)
    (tmp_path / "model" / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match=r"points to .*anything else is refused: download the folder again"):
        SwinHFForImageClassification.from_pretrained(tmp_path / "model", variant="fp16" if "fp16" in index else None)


def test_shards_of_the_folder_itself_are_loaded(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = SwinHFForImageClassification.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.classifier.weight, tiny_model.classifier.weight)
