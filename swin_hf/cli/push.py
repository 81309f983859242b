"""Publish a model or a training run on the Hub: one commit, checked before it is sent and compared afterwards.

The access token comes from HF_TOKEN or from the keyring of `hf auth login`; there is no option for it, because a
command line can be read by other users and stays in the history of the shell.
"""

import argparse

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from swin_hf.hub import Card, push
from swin_hf.hub.space import push_space, space_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``swin-hf push``."""
    parser.add_argument("folder", help="a folder written by save_pretrained, or that of a training run")
    parser.add_argument("repo_id", help="user/name; created if it does not exist")
    parser.add_argument("--tag", help="a new tag for the commit, such as v1.0")
    parser.add_argument("--revision", help="branch to commit to, created if it does not exist (default: main)")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="private", action="store_true", default=None, help="only for you")
    visibility.add_argument("--public", dest="private", action="store_false", help="for everybody")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0, for the card")
    parser.add_argument("--card", help="a Markdown file to use instead of the rendered card")
    parser.add_argument("--replace-card", action="store_true", help="overwrite a card that was edited on the Hub")
    parser.add_argument("--samples", action="store_true", help="also send test pictures of the run, with predictions")
    parser.add_argument(
        "--no-code", action="store_true", help="do not send the model's code; loading then needs swin_hf"
    )
    parser.add_argument("--space", metavar="USER/NAME", help="also create a Space with the page of swin-hf demo")
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent; the network is not touched")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Push, and print what was sent and its address."""
    if args.space:
        space_files(args.space, args.repo_id, None)  # raises for a wrong name, before the model is sent
    if args.quiet:
        disable_progress_bars()
    result = push(
        args.folder,
        args.repo_id,
        tag=args.tag,
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
        include_code=not args.no_code,
        card=Card(args.card, replace=args.replace_card, samples=args.samples),
        license=args.license,
        message=args.message,
    )
    if args.dry_run:
        print(result.card)
    for file in result.files:
        print(f"{file.size:>13,}  {file.name}")
    for note in result.notes:
        print(f"note: {note}")
    if result.commit is None:
        print(f"dry run: nothing was sent to {result.url}")
    else:
        print(f"{'pushed' if result.created else 'already there'}: {result.url}")
        print(f"commit {result.commit}" + (f", tag {result.tag}" if result.tag else ""))
    if args.space:
        space = push_space(args.space, args.repo_id, result.commit, dry_run=args.dry_run)
        for name, text in space.files.items() if args.dry_run else ():
            print(f"--- {name} of the Space\n{text}")
        print(f"{'dry run, not sent' if args.dry_run else 'Space'}: {space.url}")
        if space.private:
            print("note: the model is private; give the Space a secret HF_TOKEN that may read it")
    return 0
