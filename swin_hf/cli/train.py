"""Train a Swin Transformer to classify images, from scratch or from any Swin checkpoint.

    swin-hf train                                       # handwritten digits, offline, a minute
    swin-hf train --config finetune_imagefolder --data.data_dir photos
    swin-hf train test --ckpt_path runs/digits/checkpoints/best.ckpt    # or validate
    swin-hf train fit --help                            # every option
    swin-hf train --print_schema                        # the same for editors (JSON schema)

A configuration is a name of those below or a YAML file. Configurations are merged from left to right, and options win
over those before them:

    swin-hf train -c imagenet1k_swin_tiny -c ddp --trainer.devices 8 --ckpt_path last

``--ckpt_path last`` starts, goes on after a crash and resumes after SIGTERM (exit code 143). The run leaves
``runs/<name>/``: config.yaml, checkpoints/, metrics.csv, tensorboard/, figures, and model/ with the best weights.
"""

import argparse
import textwrap
from collections.abc import Sequence

from swin_hf.training.bundled import CONFIGS  # takes seconds: the room brings Lightning along


def main(words: Sequence[str]) -> int:
    """Run ``swin-hf train WORDS`` and return the exit code of :func:`swin_hf.training.run_recipe`."""
    from swin_hf.training import SwinClassifier, run_recipe

    if list(words) in (["--help"], ["-h"]):
        describe("train", __doc__)
    return run_recipe(SwinClassifier, "digits", words, ["swin-hf", "train"])


def describe(verb: str, text: str | None) -> None:
    """Print the help of a verb that trains; Lightning's own, behind ``fit --help``, takes pages."""
    names = textwrap.fill(", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))), 100)
    argparse.ArgumentParser(
        prog=f"swin-hf {verb}",
        usage=f"swin-hf {verb} [fit | validate | test] [options]",
        description=f"{text}\nConfigurations:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(["--help"])  # prints and leaves
