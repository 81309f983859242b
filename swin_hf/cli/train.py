"""Train a Swin Transformer to classify images, from scratch or from any Swin checkpoint.

    swin-hf train                                       # handwritten digits, offline, a minute
    swin-hf train --config finetune_imagefolder --data.data_dir photos
    swin-hf train test --ckpt_path runs/digits/checkpoints/best.ckpt    # or validate
    swin-hf train fit --help                            # every option
    swin-hf train --print_schema                        # the same for editors (JSON schema)
    swin-hf train --task masked-image-modeling          # another task; swin-hf pretrain is short for it

A configuration is one of the names below or a YAML file. Several are merged from left to right; options replace their
values:

    swin-hf train -c imagenet1k_swin_tiny -c ddp --trainer.devices 8 --ckpt_path last

With ``--ckpt_path last``, one command starts a run and resumes it after a crash or SIGTERM (exit code 143). It writes
``runs/<name>/``: config.yaml, checkpoints/, metrics.csv, tensorboard/, figures, and model/ with the best weights.
"""

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
    if words in (["--help"], ["-h"]):  # Lightning's own help takes pages
        names = textwrap.fill(", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))), 100)
        usage = f"usage: swin-hf {program[1]} [fit | validate | test] [options]"
        print(f"{usage}\n\n{text}\nConfigurations:\n{names}")
        sys.exit(0)
    return run_recipe(MODULES[task], MODULES[task].default_config, words, program)
