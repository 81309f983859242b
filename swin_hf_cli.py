"""The command line ``swin-hf``.

This module is outside the package because importing the package loads torch and transformers, which ``swin-hf --help``
and the message for another library's option do not need.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

VERBS = {
    "prepare": "make the pictures of a data set smaller, once, so that training reads less",
    "train": "train a classifier, from scratch or from any Swin checkpoint",
    "pretrain": "pre-train without labels (SimMIM)",
    "predict": "classify or segment images with any model",
    "demo": "serve a web page to try a model and see what its windows attend to",
    "explain": "draw attention and Grad-CAM maps over an image",
    "convert": "rewrite a checkpoint in another layout",
    "info": "describe a checkpoint: layout, sizes, parameters, FLOPs, attention backend",
    "export": "write ONNX, OpenVINO or torch.export files, checked after they are written",
    "push": "publish a model or a run folder on the Hub",
    "pull": "download a model and verify it",
    "card": "print or write the model card of a folder",
}
SOURCES = """A model is the same everywhere: a folder, a run folder, a checkpoint file of any layout, or a repository of
anyone's Swin on the Hub (user/name, user/name@revision; hf://user/name/FILE names one file of it)."""
TRAINING = ("train", "pretrain")  # Lightning reads the options of these

# Our option, with a hint where the name alone would mislead: the names that other libraries have for it, which mean
# the same behind a group, as in --trainer.epochs.
NAMES = {
    "--model.optimization.learning_rate": "lr learning_rate base_lr blr lr_base max_lr peak_lr",
    "--model.optimization.weight_decay": "wd weight_decay",
    "--model.optimization.betas": "betas opt_betas adam_beta1 adam_beta2 model.beta1 model.beta2",
    "--model.optimization.betas or --model.optimization.weight_decay (the optimiser is AdamW)": "opt optim optimizer "
    "momentum opt_eps",
    "--model.optimization.layer_decay": "layer_decay llrd layer_wise_lr_decay",
    "--model.optimization.schedule": "sched lr_scheduler lr_scheduler_type scheduler",
    "--model.optimization.warmup_epochs or --model.optimization.warmup_steps": "warmup warmup_epochs warmup_steps "
    "warmup_ratio num_warmup_steps",
    "--model.optimization.warmup_lr": "warmup_lr warmup_start_lr",
    "--model.optimization.min_lr": "min_lr eta_min",
    "--model.mixing.label_smoothing": "smoothing label_smoothing label_smoothing_factor",
    "--model.mixing.mixup_alpha": "mixup mixup_alpha",
    "--model.mixing.cutmix_alpha": "cutmix cutmix_alpha",
    "--model.mixing.mix_probability": "mixup_prob mix_probability",
    "--model.mixing.class_weights": "class_weights class_weight loss_weights",
    "--model.network.drop_path_rate": "drop_path drop_path_rate drop_connect drop dropout",
    "--model.preset NAME for a size or --model.weights PATH for a checkpoint": "arch a model_name model_name_or_path "
    "backbone model_type config_name model.name",
    "--model.weights FOLDER, a file or a Hub id": "pretrained initial_checkpoint finetune finetune_from "
    "checkpoint_path pretrained_path weights model.checkpoint init_from",
    "--model.network.gradient_checkpointing true": "gradient_checkpointing grad_checkpointing use_checkpoint",
    "--model.network.compile true": "torchcompile torch_compile compile",
    "--model.freezing.stages": "freeze freeze_backbone freeze_layers",
    "--trainer.max_epochs": "epochs num_epochs max_epochs num_train_epochs n_epochs nb_epochs",
    "--trainer.max_steps": "max_steps num_steps iterations max_iters",
    "--trainer.accumulate_grad_batches": "grad_accum_steps gradient_accumulation_steps accumulate_grad_batches "
    "accumulation_steps",
    "--trainer.gradient_clip_val": "clip_grad max_grad_norm gradient_clip_val grad_clip",
    "--trainer.precision bf16-mixed": "amp fp16 bf16 amp_dtype precision mixed_precision use_amp half dtype",
    "--trainer.accelerator and --trainer.devices": "device gpus num_gpus devices accelerator n_gpu use_cpu no_cuda",
    "--trainer.strategy": "strategy ddp fsdp deepspeed",
    "--trainer.log_every_n_steps": "log_interval logging_steps log_every_n_steps print_freq",
    "--trainer.callbacks+=swin_hf.training.EMA (or -c ema)": "model_ema model_ema_decay ema ema_decay",
    "--trainer.callbacks+=EarlyStopping (or -c early_stopping)": "patience early_stopping",
    "--trainer.logger+=WandbLogger (or -c wandb)": "log_wandb report_to wandb wandb_project project use_wandb",
    "--data.batch_size": "batch_size b bs train_batch_size per_device_train_batch_size batch per_gpu_train_batch_size",
    "--data.eval_batch_size": "validation_batch_size per_device_eval_batch_size eval_batch_size val_batch_size "
    "test_batch_size",
    "--data.image_size": "img_size image_size input_size imgsz resolution size train_crop_size",
    "--data.num_channels": "in_chans num_channels",
    "--data.num_workers": "workers j num_workers dataloader_num_workers preprocessing_num_workers",
    "--data.dataset and --data.data_dir": "dataset data_path dataset_name train_dir train_data data_root root "
    "dataset_path data.path data.name train_file data_set",
    "--data.data_dir": "data_dir data.dir data.folder",
    "--data.data_files": "val_dir validation_dir test_dir val_data validation_file test_file",
    "nothing: the number of classes comes from the data (--data.reading.class_names names them)": "num_classes "
    "num_labels nb_classes n_classes",
    "--data.reading.label_column": "label_column label_column_name labels_key target_key data.label_key",
    "--data.reading.image_column": "image_column image_column_name input_key data.image_key",
    "--data.splits.validation_fraction": "train_val_split val_split validation_split val_fraction",
    "--data.splits.balanced_sampling true": "balanced_sampling class_balanced weighted_sampler",
    "--data.splits.limit_train": "max_train_samples",
    "--data.augmentation.auto_augment": "aa auto_augment autoaugment augment",
    "--data.augmentation.erasing": "reprob random_erase random_erasing",
    "--data.augmentation.hflip": "hflip flip",
    "--data.augmentation.crop_scale": "scale crop_scale",
    "--data.pixels.crop_pct": "crop_pct data.crop_ratio_eval",
    "--data.pixels.interpolation": "interpolation train_interpolation",
    "--data.pixels.mean and --data.pixels.std": "mean std image_mean image_std",
    "--data.reading.streaming true": "streaming",
    "--ckpt_path FILE (or last)": "resume resume_from_checkpoint resume_from resume_from_ckpt ckpt checkpoint "
    "auto_resume trainer.ckpt_path model.ckpt_path load_checkpoint resume_path",
    "--runs FOLDER and --name NAME": "output_dir output out out_dir o save_dir experiment exp_name experiment_name "
    "run_name log_dir logging_dir work_dir",
    "--push USER/NAME": "push_to_hub hub_model_id hub_id repo_id",
    "--seed_everything": "seed random_seed",
    "the word fit in front": "do_train train",
    "the word validate or test in front": "do_eval do_predict evaluate eval validate test",
    "torchrun, or --trainer.devices": "local_rank nproc_per_node world_size dist_url",
}
OURS = {name: ours for ours, names in NAMES.items() for name in names.split()}
GROUPS = {
    "model": "--model.preset NAME for a size or --model.weights PATH for a checkpoint",
    "data": "--data.dataset and --data.data_dir",
}


def refuse_foreign_options(words: Sequence[str]) -> None:
    """Exit with code 2 and one line that gives our names, if an option has the name that another library gives it."""
    found = {}
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if not option.startswith("-") or not name:
            continue
        following = value if equals else next(iter(words[position + 1 : position + 2]), "")
        if name in GROUPS and option.startswith("--"):  # of ours, it takes a file or {...}
            if not following.startswith("{") and not Path(following).is_file():
                found[option] = GROUPS[name]
            continue
        group, _, end = name.partition(".")
        ours = OURS.get(name) or (OURS.get(end) if group in ("model", "data", "trainer", "optimizer") else None)
        if ours and f"--{name}" not in ours.split() and (len(name) > 1 or not option.startswith("--")):
            found[option] = ours
    if found:
        told = "; ".join(f"{option} has another name here, use {ours}" for option, ours in found.items())
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``swin-hf VERB ...`` and return the exit code: 0 done, 1 partly failed, 2 refused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in VERBS:
        return _top_level(argv)
    verb = argv[0]
    if verb in TRAINING:
        refuse_foreign_options(argv[1:])
    command = import_module(f"swin_hf.cli.{verb}")
    if verb in TRAINING:
        return int(command.main(argv[1:]))
    parser = OneLineParser(prog=f"swin-hf {verb}", description=command.__doc__)
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    from swin_hf.files import full_disk
    from swin_hf.memory import memory_sentence

    try:
        try:
            return int(command.run(args) or 0)
        except Exception as error:
            if full := full_disk(error, Path.cwd()):
                raise full from error
            raise
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        print(f"swin-hf {verb}: {memory_sentence(error) or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _top_level(argv: list[str]) -> int:
    """``swin-hf``, ``swin-hf --help``, ``swin-hf --version`` and unknown verbs."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    parser = OneLineParser(
        prog="swin-hf",
        usage="swin-hf VERB [options]",
        description="Swin Transformer for the Hugging Face and Lightning world.",
        epilog=f"verbs:\n{verbs}\n\n{SOURCES}\n\nswin-hf VERB --help describes one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("verb", nargs="?", choices=list(VERBS), metavar="VERB", help="what to do, see below")
    args = parser.parse_args(argv)
    if args.version:
        from swin_hf import __version__

        print(__version__)
        return 0
    parser.print_help()
    return 0
