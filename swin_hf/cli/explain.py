"""Draw what a classifier looks at: attention and Grad-CAM maps over an image, as one PNG.

Columns are Grad-CAM, the attention that each token receives, and the attention of one pixel; rows are the stages of the
model, or the blocks of one stage. The picture is drawn as the model sees it, after resizing.
"""

import argparse
from pathlib import Path

from swin_hf.cli import add_device, pictures_of
from swin_hf.explain import as_seen, draw_explanation, explain, save_figure
from swin_hf.predict import (
    PictureError,
    check_drawable,
    class_names,
    class_number,
    load_classifier,
    prepare,
    read_picture,
)
from swin_hf.ranges import COUNT, Number
from swin_hf.segment import class_at
from swin_hf.text import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf explain``."""
    parser.add_argument("model", metavar="MODEL", help="model, see swin-hf --help")
    parser.add_argument("image", metavar="IMAGE", help="file, http(s) address, or - for standard input")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="file to write (default: IMAGE-explained.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--target", metavar="CLASS", help="name or number for Grad-CAM (default: the predicted class)")
    parser.add_argument("--stage", type=Number(int, COUNT), metavar="N", help="show every block of one stage, from 1")
    parser.add_argument(
        "--pixel",
        type=Number(int, "[0, inf)"),
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="pixel of the resized picture whose attention is drawn (default: where Grad-CAM is highest)",
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the maps and return the exit code."""
    source, *others = pictures_of([args.image])
    if others:
        raise PictureError(f"{args.image} matches {1 + len(others)} images; explain them one by one")
    stem = Path(source.partition("?")[0]).stem
    output = args.output or Path(f"{stem if stem.strip('-.') else 'picture'}-explained.png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} does not end in .png, and a PNG is written; choose another --output")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or give --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} does not exist; make it first, or choose another --output")

    model, processor = load_classifier(args.model, device=args.device, dtype=args.dtype)
    check_drawable(model)
    picture = read_picture(source, model.config.num_channels, processor)
    stages = model.config.num_layers
    if (args.stage or 1) > stages:
        raise ValueError(f"--stage {args.stage} does not exist; the model has stages 1 to {stages}")
    (pixels,) = prepare(model, processor, [picture])
    pixel = None if args.pixel is None else (args.pixel[0], args.pixel[1])
    best = class_at(model, pixels, pixel)
    target = best.index if args.target is None else class_number(args.target, class_names(model))
    stage = None if args.stage is None else args.stage - 1
    explanation = explain(model, pixels[None], target, stage=stage, pixel=pixel)
    shown, title = one_line(class_names(model)[target]), f"{one_line(best.label, 60)}\n{best.score:.1%}"
    save_figure(draw_explanation(explanation, as_seen(pixels, processor), title, shown), output)
    row, column = explanation.pixel
    print(
        f"{output}: {source} is {one_line(best.label)} ({best.score:.1%}); Grad-CAM for {shown}, attention from "
        f"pixel {row} {column} of the {pixels.shape[-2]}x{pixels.shape[-1]} picture that the model sees"
    )
    return 0
