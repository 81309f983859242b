"""A second family and a new task, added as a stranger would: one row of each table, and files of their own.

As a program (``python toy.py FOLDER``, with HF_ENDPOINT of the loopback Hub) it trains the task on the digits,
publishes the result, pulls it and loads it by its Auto class.
"""

import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForDepthEstimation

import swin_hf
import swin_hf.model
from swin_hf.families import FAMILIES, TASKS, Family, Task, register

CONFIGURATION = """
from .configuration_swin_hf import SwinHFConfig


class ToyConfig(SwinHFConfig):
    model_type = "toy"
    presets = {}
"""

MODEL = """
from torch import nn
from transformers.modeling_outputs import DepthEstimatorOutput

from .configuration_toy import ToyConfig
from .modeling_swin_hf import SwinHFModel, SwinHFPreTrainedModel


class ToyForDepthEstimation(SwinHFPreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.swin = SwinHFModel(config)
        self.toy_head = nn.Linear(config.hidden_size, 1)
        self.logit_scale = nn.Parameter(self.toy_head.weight.new_ones(1, 1))
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        depth = self.logit_scale * self.toy_head(self.swin(pixel_values).pooler_output)
        return DepthEstimatorOutput(predicted_depth=depth)
"""


def add_family(folder: Path) -> None:
    """Write the files of the family and register it; its neighbours in ``model/`` are linked beside them."""
    for path in Path(swin_hf.model.__path__[0]).glob("*.py"):
        (folder / path.name).symlink_to(path)
    (folder / "configuration_toy.py").write_text(CONFIGURATION)
    (folder / "modeling_toy.py").write_text(MODEL)
    swin_hf.model.__path__.append(str(folder))
    TASKS["depth-estimation"] = Task("AutoModelForDepthEstimation", "depth-estimation", ("toy_head.",))
    FAMILIES["toy"] = Family(
        model_type="toy",
        title="Toy",
        citation="",
        config="configuration_toy.ToyConfig",
        models={"depth-estimation": "modeling_toy.ToyForDepthEstimation"},
        processors=FAMILIES["swin_hf"].processors,
        presets={"toy_tiny": dict(embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=16)},
        paper="https://example.org",
    )
    register(FAMILIES["toy"])


def main(folder: Path) -> None:
    """Train, save, push, pull and load."""
    (folder / "model").mkdir()
    add_family(folder / "model")
    import torch.nn.functional as F

    from swin_hf import pull, push
    from swin_hf.training import MODULES, Network, Optimization, SwinModule, TestReport, train
    from swin_hf.training.network import new_network

    class Depths(SwinModule):
        """Predicts the mean of an image."""

        task = "depth-estimation"

        def __init__(
            self,
            preset: str = "toy_tiny",
            image_size: int | tuple[int, int] | None = None,
            num_channels: int | None = None,
            network: Network = Network(),  # noqa: B008 - frozen
            optimization: Optimization = Optimization(),  # noqa: B008 - frozen
        ) -> None:
            super().__init__(optimization)
            self.save_hyperparameters(logger=False)
            fields = network.fields(image_size=image_size, num_channels=num_channels)
            self.model = new_network(self.task, preset, fields, network.backend)

        def loss(self, batch):
            images = batch["pixel_values"]
            return F.mse_loss(self.model(images).predicted_depth[:, 0], images.mean((1, 2, 3)))

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log_training(loss, len(batch["pixel_values"]))
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch), on_step=False, on_epoch=True)

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch), on_step=False, on_epoch=True)

        def test_report(self):
            return TestReport(table="a table of its own", metrics={"toys": 3.0})

    MODULES[Depths.task] = Depths
    run = train(
        "swin_hf:digits",
        Depths.task,
        runs=folder / "runs",
        name="toy",
        image_size=16,
        num_workers=0,
        splits={"limit_train": 64},
        optimization={"lr_scaling": False, "learning_rate": 1e-2, "warmup_epochs": 0},
        trainer={"max_epochs": 1, "accelerator": "cpu", "limit_test_batches": 2},
    )
    assert {"val_loss", "test_loss", "test_toys"} <= run.metrics.keys()
    trained = run.model
    assert type(trained).__name__ == "ToyForDepthEstimation"
    pushed = push(run.folder, "user/toy")
    names = {file.name for file in pushed.files}
    assert {"modeling_toy.py", "configuration_toy.py", "modeling_swin_hf.py"} <= names, names
    path = pull("user/toy").path
    assert AutoConfig.from_pretrained(path).model_type == "toy"
    pulled = AutoModelForDepthEstimation.from_pretrained(path).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(pulled(images).predicted_depth, trained(images).predicted_depth)
    card = Path(hf_hub_download("user/toy", "README.md")).read_text()
    assert "pipeline_tag: depth-estimation" in card
    print("the toy works")  # noqa: T201 - for the test


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
