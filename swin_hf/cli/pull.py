"""Download a model from the Hub and verify it; prints the folder and the commit.

Only the configuration, the image processor and safetensors weights are downloaded, from one commit, and every file is
compared with the Hub's hash. Files in the cache are not downloaded again.
"""

import argparse

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from swin_hf.hub import pull


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``swin-hf pull``."""
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--revision", help="branch, tag or commit id (default: main)")
    parser.add_argument("--local-dir", help="a folder for the files, instead of the shared cache")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with the Hub's hashes")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Pull, and print where the model is."""
    if args.quiet:
        disable_progress_bars()
    result = pull(args.repo_id, revision=args.revision, local_dir=args.local_dir, verify=not args.no_verify)
    print(result.path)
    print(f"commit {result.commit}")
    return 0
