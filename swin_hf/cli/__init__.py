"""The verbs of the command line ``swin-hf``: one module of this folder for each.

A verb's module has ``add_arguments(parser)`` and ``run(args) -> int``; those that train have ``main(words) -> int``.
It is imported only when the verb is used: :mod:`swin_hf_cli` does that.
"""

from swin_hf_cli import VERBS, main

__all__ = ["VERBS", "main"]
