"""Rewrite a Swin checkpoint in another layout.

The source may be a file (.safetensors, .pth, .pt, .bin, .ckpt), a folder or a repository on the Hub, in any layout; it
is recognised by its keys. The destination is a file if it has the suffix of one, else a folder; config.json and
preprocessor_config.json (the evaluation transform that belongs to the weights) are written into the folder of the
weights.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from swin_hf.checkpoints.convert import check_destination, write_checkpoint
from swin_hf.checkpoints.load import build_model, class_for
from swin_hf.checkpoints.preprocessing import image_processor, processor_values
from swin_hf.checkpoints.tables import LAYOUTS, SAID
from swin_hf.checkpoints.verify import TOLERANCE, verify, verify_source
from swin_hf.loading import open_source
from swin_hf.predict import read_picture
from swin_hf.ranges import SIDES, Number, one_or_two

DIFFERS = 1  # exit code: written, but it computes something else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf convert``."""
    parser.epilog = "layouts: " + "; ".join(f"{layout.name}: {layout.about}" for layout in LAYOUTS.values())
    parser.add_argument("source", metavar="SOURCE", help="model to read, see swin-hf --help")
    parser.add_argument("destination", metavar="DESTINATION", help="file or folder to write")
    parser.add_argument("--to", required=True, choices=LAYOUTS, metavar="LAYOUT", help="layout to write, see below")
    said = ", ".join(SAID)
    parser.add_argument("--layout", metavar="LAYOUT", help=f"of the source: {said}, or one below (default: detected)")
    parser.add_argument("--preset", help="name of the released model that the source is (default: detected)")
    parser.add_argument("--weights", choices=["ema", "raw"], help="use averaged or raw weights, if the source has both")
    side: dict[str, Any] = {"type": Number(int, SIDES), "nargs": "+"}
    parser.add_argument("--image-size", **side, metavar="PIXELS", help="resample for another image size")
    parser.add_argument("--window-size", **side, metavar="TOKENS", help="resample for another window")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    compared = "classify this picture with source, destination and, where it is installed, the layout's own library"
    parser.add_argument("--verify", metavar="IMAGE", help=compared)


def run(args: argparse.Namespace) -> int:
    """Convert, and verify if asked: 0 done, 1 written but it computes something else."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    picture = read_picture(args.verify) if args.verify else None
    sizes: dict[str, Any] = {
        "image_size": one_or_two("--image-size", args.image_size),
        "window_size": one_or_two("--window-size", args.window_size),
    }
    destination = Path(args.destination)
    check_destination(destination, args.to, args.overwrite)
    checkpoint = open_source(args.source, args.layout, preset=args.preset, weights=args.weights, **sizes)
    print(checkpoint)
    if picture is not None:
        values = processor_values(checkpoint, checkpoint.target)
        if values is None:
            raise ValueError(
                f"--verify needs the normalisation of images of {checkpoint.target.num_channels} channels, which is "
                "not known; put a preprocessor_config.json next to the source"
            )
        pixel_values = image_processor(values)(picture, return_tensors="pt")["pixel_values"]
    files = write_checkpoint(checkpoint, destination, args.to, args.overwrite)
    print(f"written ({args.to}):", *files, sep="\n  ")
    if picture is None:
        return 0
    model = build_model(checkpoint, class_for(checkpoint.place))
    differences = verify(model, destination, args.to, pixel_values) | verify_source(checkpoint, model, pixel_values)
    height, width = pixel_values.shape[-2:]
    print(f"compared with the outputs of this package for the source, on one picture of {height}x{width} pixels:")
    for name, difference in differences.items():
        print(f"verified with {name}: largest difference {difference:.2e}")
    if max(differences.values()) <= TOLERANCE:
        return 0
    print(f"the outputs differ by more than {TOLERANCE:g}", file=sys.stderr)
    return DIFFERS
