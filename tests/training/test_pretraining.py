"""SimMIM: masks against the rule of the reference's generator, the loss, and the way to fine-tuning."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from short import short

from swin_hf.training import ImageDataModule, Reading, Splits, SwinMaskedImageModeler
from swin_hf.training.tasks.masked_image_modeling import random_masks

SMALL = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}


def make(**options):
    torch.manual_seed(0)
    return short(
        SwinMaskedImageModeler,
        **{"preset": "swin_digits_patch4_window4_32", "image_size": (16, 32), "mask_cell": 8, "overrides": SMALL}
        | options,
    )


def reference_mask(random, size=192, cell=32, patch=4, ratio=0.6):
    """MaskGenerator of the SimMIM repository, from its description."""
    rand_size, scale = size // cell, cell // patch
    count = int(np.ceil(rand_size**2 * ratio))
    mask = np.zeros(rand_size**2, dtype=int)
    mask[random.permutation(rand_size**2)[:count]] = 1
    return mask.reshape(rand_size, rand_size).repeat(scale, axis=0).repeat(scale, axis=1)


def test_masks_have_the_size_the_count_and_the_cells_of_the_reference():
    theirs = reference_mask(np.random.default_rng(0))
    ours = random_masks(50, (192, 192), 32, (4, 4), 0.6, torch.device("cpu"))
    assert ours.shape == (50, *theirs.shape) and ours.dtype == torch.bool
    assert set(ours.sum((1, 2)).tolist()) == {theirs.sum()} == {22 * 64}
    cells = ours.view(50, 6, 8, 6, 8)
    assert torch.equal(cells.all(4).all(2), cells.any(4).any(2))  # a cell is hidden whole or not at all
    share = cells.any(4).any(2).float().mean(0)
    assert share.min() > 0.3 and share.max() < 0.9  # every cell takes its turn
    assert len({tuple(mask.flatten().tolist()) for mask in ours}) == 50


@pytest.mark.parametrize(("image", "patch"), [((40, 72), (4, 4)), ((30, 46), (4, 2))], ids=["whole", "cut"])
def test_masks_cover_any_rectangle(image, patch):
    masks = random_masks(3, image, 8, patch, 0.5, torch.device("cpu"))
    rows, columns = math.ceil(image[0] / 8), math.ceil(image[1] / 8)
    assert masks.shape == (3, math.ceil(image[0] / patch[0]), math.ceil(image[1] / patch[1]))
    hidden = masks[:, :: 8 // patch[0], :: 8 // patch[1]].sum((1, 2))
    assert hidden.tolist() == [math.ceil(rows * columns * 0.5)] * 3


def test_loss_is_the_mean_distance_over_hidden_pixels():
    module = make().eval()
    module.log = lambda *args, **kwargs: None
    images = torch.randn(4, 3, 16, 32)
    with torch.no_grad():
        outputs = module.validation_step({"pixel_values": images}, 0)
    mask = outputs["mask"][:, None].expand_as(images).bool()
    by_hand = (images - outputs["reconstruction"]).abs()[mask].mean()
    assert float(module.val_loss.compute()) == pytest.approx(float(by_hand), rel=1e-4)
    assert 0.6 <= mask.float().mean() < 0.7  # 5 of 8 cells


def test_validation_hides_the_same_cells_each_time_and_training_other_ones():
    module = make().eval()
    module.log = lambda *args, **kwargs: None
    images = torch.randn(2, 3, 16, 32)
    first, second = (module.validation_step({"pixel_values": images}, n)["mask"] for n in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(module.draw_masks(images), module.draw_masks(images))


def test_training_learns_to_fill_in():
    module = make(image_size=16).train()
    module.log = lambda *args, **kwargs: None
    torch.manual_seed(0)
    images = torch.ones(8, 3, 16, 16) * torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = module.training_step({"pixel_values": images}, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_pretraining_goes_on_from_its_own_result(tmp_path):
    first = make()
    first.exportable().save_pretrained(tmp_path)
    second = make(weights=str(tmp_path), overrides=None, norm_targets=3)
    assert second.model.config.norm_targets == 3 and second.origin.path == tmp_path
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_start_that_is_not_there_or_not_whole_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'some/where/model' does not exist; give the folder of a model"):
        make(weights="some/where/model")
    make().exportable().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"embed_dim": config["embed_dim"] * 2}))
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json"):
        make(weights=str(tmp_path), overrides=None)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=f"masking.ratio is {ratio}"):
        make(mask_ratio=ratio)


def test_cells_that_cut_patches_are_refused():
    with pytest.raises(ValueError, match=r"masking.cell is 6 pixels; it must be a multiple of the patch, \(4, 4\)"):
        make(mask_cell=6)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_pictures_without_labels_are_told_how_they_are_read(kind, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    source = {"dataset": str(tmp_path)}
    if kind == "table":
        (tmp_path / "table.csv").write_text("image,note\none.png,a note\n")
        source = {"dataset": "csv", "data_files": str(tmp_path / "table.csv")}
    with pytest.raises(ValueError, match=r"or pre-train without labels: data\.reading\.labelled false"):
        ImageDataModule(**source).load()
    splits = Splits(validation_fraction=0.0)
    assert ImageDataModule(**source, reading=Reading(labelled=False), splits=splits).split_sizes == {"train": 1}
