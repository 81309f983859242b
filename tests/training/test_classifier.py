"""The classification module: losses against their formulas, what is trained, and where weights come from."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY
from PIL import Image
from short import short
from torchvision.transforms import v2
from transformers import SwinConfig, SwinForImageClassification

from swin_hf import SwinHFBackbone, SwinHFConfig, SwinHFForImageClassification, SwinHFForMaskedImageModeling
from swin_hf.training import SwinClassifier
from swin_hf.training.data.transforms import Augmentation, normalize, random_transform
from swin_hf.training.tasks.classification import Mixing
from swin_hf.training.tasks.distillation import load_teacher
from swin_hf.training.tasks.heads import load_classifier

# The models that are built here have no names for their classes.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no names for its")

SMALL = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
NAMES = {0: "bee", 1: "cat", 2: "cow", 3: "dog"}
PRESET = "swin_digits_patch4_window4_32"
# The same fp32 arithmetic in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make(seed=0, **options):
    torch.manual_seed(seed)
    options = {"preset": PRESET, "image_size": 16, "num_labels": 4, "overrides": SMALL, "drop_path_rate": 0.0} | options
    return short(SwinClassifier, **options)


def batch(size=6, classes=4, seed=1):
    torch.manual_seed(seed)
    return {"pixel_values": torch.randn(size, 3, 16, 16), "labels": torch.randint(0, classes, (size,))}


def loss_of(module, data):
    module.log = lambda *args, **kwargs: None  # logging needs a trainer
    return module.training_step(data, 0)


def test_loss_is_cross_entropy_with_label_smoothing():
    module, data = make(label_smoothing=0.1), batch()
    logits = module(data["pixel_values"])
    smooth = F.one_hot(data["labels"], 4) * 0.9 + 0.1 / 4
    by_hand = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss_of(module, data), by_hand, **CLOSE)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
def test_mixed_batches_keep_the_same_loss_on_soft_targets(mixup, cutmix):
    module, data = make(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1), batch()
    torch.manual_seed(5)
    images, targets = module.mix(data["pixel_values"], data["labels"])
    assert targets.shape == (6, 4) and not torch.equal(images, data["pixel_values"])
    torch.testing.assert_close(targets.sum(-1), torch.ones(6), **CLOSE)
    assert ((targets > 0) & (targets < 1)).any()
    smooth = targets * 0.9 + 0.1 / 4
    by_hand = -(smooth * module(images).log_softmax(-1)).sum(-1).mean()
    torch.manual_seed(5)
    torch.testing.assert_close(loss_of(module, data), by_hand, **CLOSE)


def test_cutmix_draws_with_its_own_alpha():
    """An alpha of 1e5 cuts a square of half the picture, less what lies outside; one of 1e-3 cuts all or nothing."""
    mix, cut = make(mixup_alpha=1e-3, cutmix_alpha=1e5).mix, []
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    for _ in range(60):
        mixed, targets = mix(images, torch.arange(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0), rtol=0, atol=2e-3)
        cut.append(mixed[0, 0].count_nonzero().item())  # of the first picture, which is 0
    cut = [area for area in cut if 0 < area < 16 * 16]
    assert 15 < len(cut) < 45 and max(cut) <= 16 * 16 / 2


def test_mix_probability_leaves_some_batches_alone():
    mix = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.5).transform(4)
    data = batch()
    torch.manual_seed(0)
    kept = sum(torch.equal(mix(data["pixel_values"], data["labels"])[0], data["pixel_values"]) for _ in range(60))
    assert 15 < kept < 45
    images, labels = Mixing().transform(4)(data["pixel_values"], data["labels"])
    assert images is data["pixel_values"] and labels is data["labels"]


def test_randaugment_of_the_recipe_survives_todays_pillow():
    # Silent failure 10: timm's "rand-m9-mstd0.5-inc1" asks Pillow 13 for a posterisation to 0 bits and dies.
    posterize, _ = v2.RandAugment()._AUGMENTATION_SPACE["Posterize"]
    assert int(posterize(31, 32, 32).min()) >= 1
    transform = random_transform(
        (16, 16), Augmentation(crop_scale=(0.5, 1.0), auto_augment="randaugment"), fill=[0, 0, 0]
    )
    picture = Image.effect_noise((20, 20), 64).convert("RGB")
    torch.manual_seed(0)
    for _ in range(1500):  # timm's string fails once in 645 pictures
        assert transform(picture).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("label_smoothing", "mixing.label_smoothing"),
        ("mix_probability", "mixing.mix_probability"),
        ("distill_weight", "distillation.weight"),
    ],
)
def test_shares_out_of_range_are_refused(old, name):
    with pytest.raises(ValueError, match=rf"{name} is 1.5; it must be in \[0, 1\]"):
        make(**{old: 1.5})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_negative_rates_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -1; it must be in"):
        make(**{name: -1})


def test_contradicting_class_counts_are_refused():
    with pytest.raises(ValueError, match="num_labels is 4 but id2label names 2 classes"):
        make(id2label={0: "cat", 1: "dog"})


def test_class_names_reach_the_config():
    config = make(num_labels=None, id2label={0: "cat", 1: "dog"}).model.config
    assert config.num_labels == 2 and config.id2label == {0: "cat", 1: "dog"} and config.label2id["dog"] == 1


def test_linear_probe_trains_the_classifier_on_evaluation_features():
    module = make(linear_probe=True, drop_path_rate=0.5, overrides=SMALL | {"depths": [2, 2]}).train()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"model.classifier.weight", "model.classifier.bias"}
    assert module.model.training and not module.model.swin.training
    images = batch()["pixel_values"]
    assert torch.equal(module(images), module(images))  # no stochastic depth
    torch.nn.Module.train(module.model.swin)
    assert not torch.equal(module(images), module(images))  # the comparison can fail


def test_frozen_stages_rest_and_the_others_learn():
    module = make(freeze_stages=1).train()
    frozen = {n.split(".blocks")[0] for n, p in module.model.named_parameters() if not p.requires_grad}
    assert all(n.startswith(("swin.embeddings", "swin.stages.0")) for n in frozen) and frozen
    assert not module.model.swin.stages[0].training and module.model.swin.stages[1].training
    with pytest.raises(ValueError, match=r"freezing\.stages is 3 but the model has 2 stages"):
        make(freeze_stages=3)


@pytest.mark.parametrize(
    ("option", "name"), [({"linear_probe": True}, "linear_probe"), ({"freeze_stages": 1}, "freezing.stages 1")], ids=str
)
def test_lora_beside_another_way_of_freezing_is_refused(option, name):
    with pytest.raises(ValueError, match=f"lora.rank 2 trains adapters in all stages, which contradicts {name}; leave"):
        make(lora_rank=2, **option)


# peft 0.21 asks transformers 5.23 by the old name: https://github.com/huggingface/peft
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_adapters_and_head_and_exports_merged_weights():
    pytest.importorskip("peft")
    module = make(lora_rank=2)
    trained = [n for n, p in module.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n or "classifier" in n for n in trained)
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # adapters start as zero: make them matter
    module.eval()
    data = batch()["pixel_values"]
    exported = module.exportable()
    assert isinstance(exported, SwinHFForImageClassification)
    assert set(exported.state_dict()) == set(make().model.state_dict())
    torch.testing.assert_close(exported(pixel_values=data).logits, module(data), rtol=1e-4, atol=1e-5)
    assert any("lora_" in name for name, _ in module.model.named_parameters())  # the trained one is untouched


def test_distillation_adds_the_softened_divergence_and_keeps_the_teacher_out_of_the_state(tmp_path):
    config = SwinHFConfig.from_preset(PRESET, image_size=16, num_labels=4, **SMALL)
    torch.manual_seed(3)
    SwinHFForImageClassification(config).save_pretrained(tmp_path)
    module, data = make(distill_from=str(tmp_path), distill_weight=0.25, temperature=3.0, label_smoothing=0.0), batch()
    names = set(module.state_dict())
    module.teacher = [load_teacher(str(tmp_path), NAMES, 3)]
    assert set(module.state_dict()) == names and not module.teacher[0].training
    images = data["pixel_values"]
    student, teacher = module(images), module.teacher[0].network(pixel_values=images).logits
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean() * 9
    by_hand = 0.75 * F.cross_entropy(student, data["labels"]) + 0.25 * divergence
    torch.testing.assert_close(loss_of(module, data), by_hand, **CLOSE)
    with pytest.raises(
        ValueError, match=r"the classes of the data are not classes of the teacher .*the data has .*'ant'"
    ):
        load_teacher(str(tmp_path), NAMES | {4: "ant"}, 3)


def save_teacher(folder, mean=None, std=None, **options):
    """A small Swin of transformers; with ``mean`` and ``std``, its image processor too."""
    options = (
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
        | {"num_labels": 4}
        | options
    )
    torch.manual_seed(3)
    network = SwinForImageClassification(SwinConfig(**options)).eval()
    network.save_pretrained(folder)
    if mean is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    return network


@pytest.mark.parametrize("channels", [3, 1])
def test_the_teacher_sees_pixels_in_its_own_normalisation(tmp_path, channels):
    """Raw pixels through either side's processor; a grey student's channel is repeated."""
    theirs = {"mean": [0.4, 0.5, 0.6], "std": [0.5, 0.25, 0.2]}
    ours = {"mean": [0.1, 0.2, 0.3][:channels], "std": [0.3, 0.2, 0.1][:channels]}
    network = save_teacher(tmp_path, **theirs)
    raw = torch.randint(0, 256, (5, channels, 16, 16), dtype=torch.uint8)
    module = make(distill_from=str(tmp_path), num_channels=channels)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(num_classes=4, id2label=NAMES, **ours))
    module.setup("fit")
    wanted = network(pixel_values=normalize(raw.expand(5, 3, 16, 16), **theirs)).logits
    torch.testing.assert_close(module.teacher[0](normalize(raw, **ours)), wanted, rtol=1e-4, atol=1e-5)


def test_a_swin_of_timm_teaches_too(tmp_path):
    import timm

    theirs = {"mean": (0.4, 0.5, 0.6), "std": (0.5, 0.25, 0.2)}
    ours = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, **sizes).eval()
    network.pretrained_cfg |= {"input_size": (3, 32, 32), "num_classes": 4, **theirs}
    config = {"label_names": ["dog", "bee", "cat", "cow"], "num_classes": 4}
    timm.models.save_for_hf(network, tmp_path, model_config=config, safe_serialization=True)
    raw = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    teacher = load_teacher(str(tmp_path), NAMES, 3, (ours["mean"], ours["std"]))  # bee, cat, cow, dog
    wanted = network(normalize(raw, **theirs))[:, [1, 2, 3, 0]]
    torch.testing.assert_close(teacher(normalize(raw, **ours)), wanted, **PARITY)


def test_an_equal_normalisation_leaves_the_pixels_alone(tmp_path):
    network, images = save_teacher(tmp_path, [0.4, 0.5, 0.6], [0.5, 0.25, 0.2]), batch()["pixel_values"]
    teacher = load_teacher(str(tmp_path), NAMES, 3, ([0.4, 0.5, 0.6], [0.5, 0.25, 0.2]))
    torch.testing.assert_close(teacher(images), network(pixel_values=images).logits)
    (tmp_path / "preprocessor_config.json").unlink()
    teacher = load_teacher(str(tmp_path), NAMES, 3, ([0.1, 0.1, 0.1], [0.2, 0.2, 0.2]))
    torch.testing.assert_close(teacher(images), network(pixel_values=images).logits)


def test_the_answers_of_the_teacher_are_brought_into_the_order_of_the_classes(tmp_path):
    network, images = save_teacher(tmp_path, id2label={0: "dog", 1: "bee", 2: "cat", 3: "cow"}), batch()["pixel_values"]
    logits = network(pixel_values=images).logits
    teacher = load_teacher(str(tmp_path), NAMES, 3)  # bee, cat, cow, dog
    torch.testing.assert_close(teacher(images), logits[:, [1, 2, 3, 0]])
    torch.testing.assert_close(load_teacher(str(tmp_path), {0: "cow", 1: "dog"}, 3)(images), logits[:, [3, 0]])


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    save_teacher(tmp_path, id2label={0: "dog", 1: "bee", 2: "cat", 3: "emu"})
    with pytest.raises(
        ValueError, match=r"the data has 'bee', 'cat', 'cow', 'dog'; the teacher '.*' has 'dog', 'bee', 'cat', 'emu'"
    ):
        load_teacher(str(tmp_path), NAMES, 3)


def test_a_teacher_of_other_channels_is_refused(tmp_path):
    save_teacher(tmp_path, num_channels=1)
    with pytest.raises(ValueError, match="takes images of 1 channels but the student's have 3; choose a teacher"):
        load_teacher(str(tmp_path), NAMES, 3)


@pytest.mark.parametrize("name", ["runs/nothing/model", "nothing"])
def test_a_missing_teacher_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' does not exist; give the folder"):
        load_teacher(name, NAMES, 3)


def test_a_folder_without_an_image_classifier_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_teacher(str(tmp_path), NAMES, 3)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not an image classifier of transformers: "):
        load_teacher(str(tmp_path), NAMES, 3)
    save_teacher(tmp_path, [0.5], [0.5])
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is not valid JSON"):
        load_teacher(str(tmp_path), NAMES, 3)


def test_teacher_of_another_image_size_sees_resized_images(tmp_path):
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4, num_labels=4
    )
    SwinForImageClassification(config).save_pretrained(tmp_path)
    module = make(distill_from=str(tmp_path))
    module.teacher = [load_teacher(str(tmp_path), NAMES, 3)]
    seen = []
    module.teacher[0].network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape), with_kwargs=True
    )
    loss_of(module, batch())
    assert seen == [(6, 3, 32, 32)]


def test_pretraining_is_continued_with_a_new_head_and_another_size(tmp_path):
    config = SwinHFConfig.from_preset(PRESET, image_size=16, **(SMALL | {"encoder_stride": 8}))
    pretrained = SwinHFForMaskedImageModeling(config)
    pretrained.save_pretrained(tmp_path)
    module = make(weights=str(tmp_path), image_size=32, overrides=None)
    assert module.model.config.image_hw == (32, 32) and module.model.config.num_labels == 4
    ours, theirs = module.model.swin.state_dict(), pretrained.swin.state_dict()
    for name in ours:
        if not name.startswith(("norm.",)):
            assert torch.equal(ours[name], theirs[name]), name


def test_foreign_checkpoint_is_a_starting_point(tmp_path):
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=7
    )
    torch.manual_seed(0)
    theirs = SwinForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, is_new = load_classifier(SwinClassifier.task, tmp_path, {"num_labels": 4, "drop_path_rate": 0.3}, {})
    ours.eval()
    assert is_new
    assert ours.config.num_labels == 4 and ours.config.drop_path_rate == 0.3
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.swin(images).pooler_output, theirs.swin(images).pooler_output, rtol=1e-4, atol=1e-5)


def test_a_backbone_is_a_starting_point_although_it_has_no_last_norm(tmp_path):
    torch.manual_seed(0)
    theirs = SwinHFBackbone(SwinHFConfig(image_size=32, window_size=4, out_features=["stage1"], **SMALL))
    theirs.save_pretrained(tmp_path)
    ours = SwinClassifier(weights=str(tmp_path), id2label=NAMES).model.state_dict()
    shared = [name for name in theirs.state_dict() if not name.startswith("hidden_states_norms.")]
    assert shared and all(torch.equal(ours[name], theirs.state_dict()[name]) for name in shared)


def test_checkpoint_that_lacks_more_than_the_head_is_refused(tmp_path):
    make().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do(es)? not fit|shape|size"):
        load_classifier(SwinClassifier.task, tmp_path, {"embed_dim": 32, "num_labels": 4}, {})


def test_weights_that_are_not_those_of_the_configuration_are_refused_before_anything_is_built(tmp_path, monkeypatch):
    make().model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"embed_dim": 4096}))
    monkeypatch.setattr(SwinHFForImageClassification, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json"):
        make(weights=str(tmp_path))


def test_gradient_checkpointing_changes_memory_not_gradients():
    plain, frugal = make(), make(gradient_checkpointing=True)
    data = batch()
    for module in (plain, frugal):
        module.train()
        loss_of(module, data).backward()
    for (name, a), b in zip(plain.model.named_parameters(), frugal.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE, msg=name)


def test_compile_is_in_place():
    module = make(compile=True)
    before = set(module.state_dict())
    module._trainer = None
    module.compile_model = True
    module.model.compile()
    assert set(module.state_dict()) == before


def test_checkpoint_of_another_model_is_refused_with_names_and_shapes():
    other = make(overrides=SMALL | {"embed_dim": 32})
    with pytest.raises(ValueError, match=r"belongs to another model, \d+ of \d+ tensors differ \(model\.classifier"):
        make().on_load_checkpoint({"state_dict": other.state_dict()})
    module = make()
    module.on_load_checkpoint({"state_dict": copy.deepcopy(module.state_dict())})


def test_metrics_equal_scikit_learn():
    from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

    module = make(num_labels=8)
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.eval()
    module.model.classifier.bias.data += 0.5  # all logits are then in [0, 1], as probabilities are
    data = [batch(size, 8, seed) for seed, size in enumerate((16, 7, 1))]
    module.on_test_start()
    with torch.no_grad():
        outputs = [module.test_step(part, 0) for part in data]
    labels = torch.cat([part["labels"] for part in data]).numpy()
    logits = torch.cat([part["logits"] for part in outputs]).numpy()
    values = module.test_metrics.compute()
    assert float(values["test_accuracy"]) == pytest.approx(accuracy_score(labels, logits.argmax(1)), abs=1e-7)
    top5 = top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert float(values["test_accuracy_top5"]) == pytest.approx(top5, abs=1e-7)
    shares = torch.from_numpy(logits).softmax(1).numpy()
    sure, right = shares.max(1), shares.argmax(1) == labels
    bins = np.ceil(sure * 15).astype(int)
    gaps = [(bins == n).mean() * abs(sure[bins == n].mean() - right[bins == n].mean()) for n in set(bins.tolist())]
    assert float(values["test_ece"]) == pytest.approx(sum(gaps), abs=1e-6)
    module.on_test_epoch_end()
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(8))
    assert module.tested.tolist() == expected.tolist()
