"""The names of the options: grouped, told to those who know the ones of an earlier release, plain in a checkpoint."""

import dataclasses
import inspect

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import TRAINING_WARNINGS
from short import short

from swin_hf import load_checkpoint
from swin_hf.training import (
    EMA,
    MODULES,
    ImageDataModule,
    Mixing,
    Optimization,
    SwinClassifier,
    SwinMaskedImageModeler,
    SwinSegmenter,
    run_recipe,
)
from swin_hf.training.bundled import CONFIGS
from swin_hf.training.command import refuse_conflicts
from swin_hf.training.options import RENAMED, flat, plain
from swin_hf.training.tasks.segmentation import Head

pytestmark = TRAINING_WARNINGS
SMALL = {"image_size": 16, "overrides": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}}
PRESET = "swin_digits_patch4_window4_32"


def every_option():
    """Dotted names, from the constructors."""
    for section, owner in [("data", ImageDataModule), *(("model", module) for module in MODULES.values())]:
        for name, parameter in inspect.signature(owner).parameters.items():
            yield f"{section}.{name}"
            if dataclasses.is_dataclass(parameter.default):
                yield from (f"{section}.{name}.{field.name}" for field in dataclasses.fields(parameter.default))


def test_every_option_that_was_renamed_exists_and_no_old_name_does():
    options = set(every_option())
    assert set(RENAMED.values()) <= options
    assert not RENAMED.keys() & options
    new = {"model.head", "data.masks"}  # groups of a task that came later, with names of its own
    groups = {name for name in options if name.count(".") == 2 and name.rpartition(".")[0] not in new}
    joint = {f"data.augmentation.{name}" for name in ("scale", "largest_class", "distort")}
    later = {"model.mixing.class_weights", "data.splits.balanced_sampling"}
    assert groups - joint - later == {new for new in RENAMED.values() if new.count(".") == 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.learning_rate 1e-3", "--model.learning_rate is now --model.optimization.learning_rate"),
        ("--model.model=x --data.hflip=0", "--model.model is now --model.weights; --data.hflip is now --data.augm"),
        ("-c FILE", "FILE: data.streaming is now data.reading.streaming; FILE: model.lora_rank is now model.lora.rank"),
    ],
)
def test_an_earlier_name_ends_in_a_line_with_the_new_one(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"model": {"lora_rank": 4}, "data": {"streaming": True}}))
    words = words.replace("FILE", "old.yaml").split()
    with pytest.raises(SystemExit) as end:
        run_recipe(SwinClassifier, "digits", ["fit", *words])
    assert end.value.code == 2 and not (tmp_path / "runs").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said.replace('FILE', 'old.yaml')}")


def test_options_of_a_group_keep_the_others_of_the_file_and_of_the_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, config in ((SwinMaskedImageModeler, None), (SwinClassifier, CONFIGS / "digits.yaml")):
        words = ["fit", "--model.optimization.weight_decay", "0.1", "--print_config"]
        words += ["--data.dataset", "x"] if config is None else ["--config", str(config)]
        with pytest.raises(SystemExit):
            run_recipe(module, "digits", words)
        model = yaml.safe_load(capsys.readouterr().out)["model"]
        expected = inspect.signature(module).parameters["optimization"].default
        told = {} if config is None else yaml.safe_load(config.read_text())["model"]["optimization"]
        assert model["optimization"] == plain(expected) | {k: float(v) for k, v in told.items()} | {"weight_decay": 0.1}


@pytest.fixture
def checkpoint(tmp_path):
    module = short(
        SwinClassifier, PRESET, id2label={0: "a", 1: "b"}, learning_rate=1e-3, milestones=[3], lora_rank=0, **SMALL
    )
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    return module, tmp_path / "some.ckpt"


def test_a_checkpoint_holds_plain_values_from_which_lightning_builds_the_module(checkpoint):
    module, path = checkpoint
    saved = torch.load(path, weights_only=True)["hyper_parameters"]  # refuses anything but plain values and tensors
    assert saved["optimization"]["learning_rate"] == 1e-3 and saved["optimization"]["milestones"] == [3]
    again = SwinClassifier.load_from_checkpoint(path, weights_only=True)
    assert again.optimization == module.optimization and again.model.config.id2label == {0: "a", 1: "b"}
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("module_class", [SwinClassifier, SwinSegmenter])
def test_a_checkpoint_without_its_run_is_a_model_of_the_sizes_that_were_asked_for(module_class, tmp_path):
    overrides = {"depths": [1, 2], "num_heads": [1, 2], "embed_dim": 16, "mlp_ratio": 2.0, "layer_norm_eps": 1e-3}
    options = {"head": Head(hidden_size=16, auxiliary_channels=8)} if module_class is SwinSegmenter else {}
    names = {number: name for number, name in enumerate("abc")}
    module = short(
        module_class, PRESET, id2label=names, image_size=32, overrides=overrides, window_size=2, drop_path_rate=0.3,
        **options,
    )  # fmt: skip
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    model = load_checkpoint(tmp_path / "some.ckpt")
    assert type(model) is type(module.model)
    ours, theirs = model.config.to_dict(), module.model.config.to_dict()
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {
        "architectures", "dtype", "_name_or_path", "out_features", "out_indices",
    }  # fmt: skip
    pixels = torch.randn(1, module.model.config.num_channels, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels).logits, module.model.eval()(pixels).logits)


def test_a_card_has_names_that_say_enough_without_their_group(checkpoint):
    module, _ = checkpoint
    names = flat({name: value for name, value in plain(dict(module.hparams)).items() if name != "id2label"})
    assert {"learning_rate", "mixup_alpha", "lora_rank", "distill_weight", "freeze_stages", "window_size"} <= set(names)
    assert len(names) == sum(
        len(group) if isinstance(group, dict) else 1
        for group in plain({name: value for name, value in module.hparams.items() if name != "id2label"}).values()
    )


def test_a_checkpoint_of_an_earlier_release_is_refused_in_a_sentence():
    given = plain({"preset": PRESET, "optimization": Optimization(), "mixing": Mixing()})
    with pytest.raises(
        SystemExit, match=r"last.ckpt was written by an earlier release, .*--model\.weights runs/<name>"
    ):
        refuse_conflicts(given, {"preset": PRESET, "learning_rate": 1e-3}, "last.ckpt")
    refuse_conflicts(given, plain(given), "last.ckpt")
    changed = plain(given | {"mixing": Mixing(mixup_alpha=0.8)})
    with pytest.raises(SystemExit, match=r"--model\.mixing\.mixup_alpha: 0\.8 in the checkpoint, 0\.0 now"):
        refuse_conflicts(given, changed, "last.ckpt")


def test_the_help_is_grouped(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_recipe(SwinClassifier, "digits", ["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group, option in (
        ("AdamW, its learning rate and the schedule", "Peak rate for a global batch of 512 images"),
        ("How training pictures are changed at random", "Probability of a horizontal flip"),
    ):
        assert 0 < text.index(group) < text.index(option)
    assert "decided_by(data) --> model.id2label" in text


def test_ema_is_not_a_task():
    tasks = {"image-classification", "masked-image-modeling", "semantic-segmentation"}
    tasks |= {"multi-label-classification", "image-regression"}
    assert EMA not in MODULES.values() and set(MODULES) == tasks
