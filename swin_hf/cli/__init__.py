"""The command line ``swin-hf``: one module of this folder for each verb.

A verb's module has ``add_arguments(parser)`` and ``run(args) -> int``; it is imported only when the verb is used,
so that ``swin-hf --help`` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from swin_hf.files import full_disk
from swin_hf.memory import memory_sentence

VERBS = {
    "predict": "classify images with a folder, a Hub id or a foreign checkpoint",
    "explain": "draw attention and Grad-CAM maps over an image",
    "convert": "rewrite a checkpoint in another layout",
    "info": "describe a checkpoint: layout, sizes, parameters, FLOPs, attention backend",
    "export": "write ONNX, OpenVINO or torch.export files, checked after they are written",
    "push": "publish a model or a run folder on the Hub",
    "pull": "download a model and verify it",
    "card": "render the model card of a folder or a preset",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; {self.prog} --help lists what there is\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``swin-hf VERB ...`` and return the exit code: 0 done, 1 partly failed, 2 refused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in VERBS:
        return _top_level(argv)
    verb = argv[0]
    import_module("swin_hf").register_config()
    command = import_module(f"swin_hf.cli.{verb}")
    parser = OneLineParser(prog=f"swin-hf {verb}", description=command.__doc__)
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
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
        epilog=f"verbs:\n{verbs}\n\nswin-hf VERB --help describes one of them.",
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
