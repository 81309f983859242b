"""``train`` from Python is the command: the same options, the same run folder, the same errors."""

import json

import pytest
import torch
from conftest import TRAINING_WARNINGS
from PIL import Image

from swin_hf.training import Augmentation, ImageDataModule, Splits, train

pytestmark = TRAINING_WARNINGS
SMALL = {"overrides": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}}
TRAINER = {"max_epochs": 1, "accelerator": "cpu"}


@pytest.fixture
def photos(tmp_path):
    for number in range(24):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        colour = ((200, 0, 0), (0, 0, 200))[number % 2]
        Image.new("RGB", (20 + number, 20), colour).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_a_folder_and_then_its_weights(photos, tmp_path):
    options = {"network": SMALL, "image_size": 16, "batch_size": 4, "trainer": TRAINER, "runs": tmp_path / "runs"}
    options["splits"] = Splits(test_fraction=0.2)
    run = train(photos, config="digits", **options)
    assert run.folder == tmp_path / "runs" / "digits" and (run.folder / "curves.png").is_file()
    assert {"val_accuracy", "val_loss", "test_accuracy", "test_f1_macro"} <= run.metrics.keys()
    facts = json.loads((run.folder / "model" / "training_facts.json").read_text())
    assert (
        facts["command"].startswith("swin-hf train fit --config digits") and "--data.image_size=16" in facts["command"]
    )
    assert facts["hyper_parameters"]["warmup_epochs"] == 3  # of the configuration
    assert run.model.config.id2label == {0: "cat", 1: "dog"}
    second = train(photos, weights=run.folder, **(options | {"network": {}}))
    assert second.folder.name == "imagefolder"
    facts = json.loads((second.folder / "model" / "training_facts.json").read_text())
    assert facts["hyper_parameters"]["layer_decay"] == 0.8 and facts["base_model"] == "digits"
    with torch.no_grad():
        assert second.model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 2)


def test_a_data_module_and_another_task(photos, tmp_path):
    data = ImageDataModule(
        "imagefolder", data_dir=str(photos), image_size=16, batch_size=4, augmentation=Augmentation(hflip=0.0)
    )
    run = train(
        data,
        task="masked-image-modeling",
        preset="swin_digits_patch4_window4_32",
        network=SMALL,
        masking={"cell": 8},
        trainer=TRAINER,
        runs=tmp_path / "runs",
    )
    assert set(run.metrics) == {"val_loss"} and (run.folder / "reconstructions.png").is_file()
    assert type(run.model).__name__ == "SwinHFForMaskedImageModeling"
    facts = json.loads((run.folder / "model" / "training_facts.json").read_text())
    assert facts["hyper_parameters"]["hflip"] == 0.0 and facts["command"].startswith(
        "swin-hf train --task masked-image-modeling fit"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "poetry"}, "task is 'poetry'; it must be one of image-classification, masked-image-modeling"),
        ({"data": 3}, "data is a int; give a folder, a Hub id or a ImageDataModule"),
        ({"learning_rat": 1}, "there is no option --learning_rat, the nearest are --model.optimization.learning_rate"),
        ({"optimization": {"learning_rate": -1.0}}, r"optimization.learning_rate is -1.0; it must be in \[0, inf\)"),
        ({"mixing": {"beta": 1}}, "there is no option --model.mixing.beta"),
        ({"data": "swin_hf:digits", "weights": "nowhere/model.pth"}, "'nowhere/model.pth' does not exist"),
    ],
)
def test_what_is_wrong_is_a_value_error(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        train(**arguments)
    assert not (tmp_path / "runs").exists()
