"""Train on a Ray cluster: ``python docs/ray_train.py --workers 8 --gpu`` (``pip install 'ray[train]'``)."""

import argparse
from typing import Any

from lightning.pytorch import Trainer, seed_everything


def train_worker(options: dict[str, Any]) -> None:
    """What each worker runs: the data module and the module of the package in Lightning's own Trainer."""
    from ray.train import lightning as ray_lightning

    from swin_hf.training import ImageDataModule, SwinClassifier

    seed_everything(0)
    data = ImageDataModule(options["data"], image_size=32, batch_size=options["batch_size"])
    data.setup("fit")
    model = SwinClassifier("swin_digits_patch4_window4_32", image_size=32, id2label=data.id2label)
    trainer = Trainer(
        max_epochs=options["epochs"],
        accelerator="auto",
        devices="auto",
        strategy=ray_lightning.RayDDPStrategy(),
        plugins=[ray_lightning.RayLightningEnvironment()],
        callbacks=[ray_lightning.RayTrainReportCallback()],
        enable_checkpointing=False,
        use_distributed_sampler=False,  # the data module deals the samples out
    )
    ray_lightning.prepare_trainer(trainer).fit(model, data)


if __name__ == "__main__":
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--epochs", type=int, default=1)
    workers = parser.parse_args()
    options = {"data": "swin_hf:digits", "batch_size": 32, "epochs": workers.epochs}
    scaling = ScalingConfig(num_workers=workers.workers, use_gpu=workers.gpu)
    print(TorchTrainer(train_worker, train_loop_config=options, scaling_config=scaling).fit().metrics)
