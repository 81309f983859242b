"""Render the model card of a saved model or of a training run.

`swin-hf card FOLDER` prints the card that a push would send; `--write` writes it into the folder, unless a card there
was edited by hand.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from swin_hf.files import replacing
from swin_hf.hub import CARD_NAME, Card, is_edited
from swin_hf.hub.model_card import read_card
from swin_hf.hub.remote import checked_ref, checked_repo_id
from swin_hf.hub.staging import model_folder, stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``swin-hf card``."""
    parser.add_argument("folder", help="a folder written by save_pretrained, or that of a training run")
    parser.add_argument("--repo-id", help="where the model will be published, for the usage snippets")
    parser.add_argument("--tag", help="tag to use in the usage snippets")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0")
    parser.add_argument(
        "--samples", action="store_true", help="include test pictures of the run, as push --samples does"
    )
    parser.add_argument("--write", action="store_true", help="write README.md into the folder instead of printing it")
    parser.add_argument("--replace-card", action="store_true", help="overwrite a README.md that was edited by hand")


def run(args: argparse.Namespace) -> int:
    """Render, then print or write."""
    if args.repo_id:
        checked_repo_id(args.repo_id)
    if args.tag:
        checked_ref(args.tag, "tag")
    folder = model_folder(Path(args.folder).expanduser())
    name = folder.parent.name if folder.name == "model" else folder.name
    options = {"repo_id": args.repo_id or f"user/{name}", "tag": args.tag, "license": args.license}
    with TemporaryDirectory(prefix="swin-hf-card-") as room:
        card = stage(folder, Path(room), **options, card=Card(samples=args.samples), keep_card=False).card
    if not args.write:
        print(card, end="")
        return 0
    path = folder / CARD_NAME
    if path.is_file() and is_edited(read_card(path)) and not args.replace_card:
        raise ValueError(f"{path} was edited by hand and is kept; --replace-card overwrites it")
    with replacing(path) as partial:
        partial.write_text(card, encoding="utf-8")
    print(path)
    return 0
