"""Train a Swin Transformer to classify images, from scratch or from any Swin checkpoint.

    swin-hf train                                       # handwritten digits, offline, a minute
    swin-hf train --config finetune_imagefolder --data.data_dir photos
    swin-hf train test --ckpt_path runs/digits/checkpoints/best.ckpt    # or validate
    swin-hf train fit --help                            # every option
    swin-hf train --print_schema                        # the same for editors (JSON schema)
    swin-hf train --task masked-image-modeling          # another task; swin-hf pretrain is short for it

A configuration is a name of those below or a YAML file. Configurations are merged from left to right, and options win
over those before them:

    swin-hf train -c imagenet1k_swin_tiny -c ddp --trainer.devices 8 --ckpt_path last

``--ckpt_path last`` starts, goes on after a crash and resumes after SIGTERM (exit code 143). The run leaves
``runs/<name>/``: config.yaml, checkpoints/, metrics.csv, tensorboard/, figures, and model/ with the best weights.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence

from swin_hf.training import MODULES, run_recipe  # takes seconds: it imports Lightning
from swin_hf.training.bundled import CONFIGS


def main(words: Sequence[str], task: str = "image-classification", text: str | None = __doc__) -> int:
    """Run ``swin-hf train WORDS`` and return the exit code of :func:`swin_hf.training.run_recipe`."""
    program = ["swin-hf", "train" if text == __doc__ else "pretrain"]
    words = list(words)
    if words[:1] == ["--task"] and len(words) > 1:
        task, program, words = words[1], [*program, *words[:2]], words[2:]
    if task not in MODULES:
        print(f"error: --task is {task}; it must be one of {', '.join(MODULES)}", file=sys.stderr)
        return 2
    if words in (["--help"], ["-h"]):
        describe(program[1], text)
    return run_recipe(MODULES[task], MODULES[task].default_config, words, program)


def describe(verb: str, text: str | None) -> None:
    """Print the help of a verb that trains; Lightning's own, behind ``fit --help``, takes pages."""
    names = textwrap.fill(", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))), 100)
    argparse.ArgumentParser(
        prog=f"swin-hf {verb}",
        usage=f"swin-hf {verb} [fit | validate | test] [options]",
        description=f"{text}\nConfigurations:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(["--help"])  # prints and leaves
