"""Train with weights, gradients and optimizer sharded over all processes: FSDP2, for models larger than a device.

torchrun --nproc-per-node 2 docs/fsdp2.py --processes 2          # two CPU processes, the digits of the package
torchrun --nproc-per-node 8 docs/fsdp2.py --processes 8 --accelerator cuda --data imagenet --preset \
    swin_large_patch4_window12_384_22k --image-size 384 --batch-size 512 --steps 100000
"""

import argparse

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

from swin_hf.training import Augmentation, ImageDataModule, Mixing, Network, Optimization, SwinClassifier


class ShardedClassifier(SwinClassifier):
    """A classifier whose blocks are sharded one by one, so that a device gathers one block at a time."""

    def configure_model(self) -> None:
        """Shard the network; Lightning calls this once for each stage of a run."""
        mesh = self.device_mesh["data_parallel"]
        if not isinstance(self.model, FSDPModule):
            for stage in self.model.base_model.stages:
                for block in stage.blocks:
                    fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def main() -> None:
    """Train, and print the metrics."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--data", default="swin_hf:digits")
    parser.add_argument("--preset", default="swin_digits_patch4_window4_32")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--drop-path", type=float)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    seed_everything(0, verbose=False)  # each process makes all weights before it keeps its share: the same ones
    data = ImageDataModule(
        args.data,
        image_size=args.image_size,
        batch_size=args.batch_size // args.processes,
        augmentation=Augmentation(erasing=0),
    )
    data.setup("fit")
    model = ShardedClassifier(
        args.preset,
        image_size=args.image_size,
        id2label=data.id2label,
        network=Network(drop_path_rate=args.drop_path),
        mixing=Mixing(mixup_alpha=0, cutmix_alpha=0),
        optimization=Optimization(learning_rate=args.learning_rate, lr_scaling=False, warmup_epochs=0),
    )
    trainer = Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=args.processes, tensor_parallel_size=1),
        accelerator=args.accelerator,
        devices=args.processes,
        max_steps=args.steps,
        use_distributed_sampler=False,  # the data module deals the samples out
        default_root_dir="runs/fsdp2",
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    trainer.print({name: round(float(value), 5) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
