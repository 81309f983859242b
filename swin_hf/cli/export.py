"""Write a classifier for ONNX Runtime, OpenVINO or torch.export, and check the file.

The file is kept only if its outputs agree with the model's. --int8 quantises it. --calibration and --test take labelled
pictures (a folder with one sub-folder for each class, or parquet files): to calibrate int8, and to measure the accuracy
of the model and of the file.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Image, load_dataset
from torch import Tensor
from transformers import BaseImageProcessor

from swin_hf.classes import class_table, match_classes
from swin_hf.cli import pictures_of
from swin_hf.export import ExportReport, export_onnx, export_openvino, export_torch, load_engine
from swin_hf.folders import read_folder
from swin_hf.model.modeling_swin_hf import SwinHFForImageClassification
from swin_hf.predict import load_classifier, prepare, read_picture
from swin_hf.processing import decode_picture, decoding
from swin_hf.ranges import SIDES, Number, one_or_two
from swin_hf.segment import is_segmenter

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
CALIBRATION_PICTURES = 300  # NNCF's own default
BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf export``."""
    parser.add_argument("model", metavar="MODEL", help="model, see swin-hf --help")
    parser.add_argument("--to", required=True, choices=SUFFIXES, help="format")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: named after the model)")
    side: dict[str, Any] = {"type": Number(int, SIDES), "nargs": "+", "metavar": "PIXELS"}
    parser.add_argument("--image-size", **side, help="side, or height and width (default: the model's)")
    parser.add_argument("--images", nargs="+", metavar="IMAGE", help="8 or more pictures to compare on")
    parser.add_argument("--int8", action="store_true", help="quantise to int8; openvino needs --calibration")
    parser.add_argument("--calibration", metavar="DATA", help="labelled pictures to calibrate on: folder or parquet")
    parser.add_argument("--test", metavar="DATA", help="labelled pictures to measure the accuracy of model and file")
    tolerance = Number(float, "[0, inf)")
    parser.add_argument(
        "--tolerance", type=tolerance, help="accepted difference of a logit (1e-4; int8: half its range)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Export, compare, print, and return the exit code."""
    output = args.output or Path(Path(args.model).resolve().name or "model").with_suffix(SUFFIXES[args.to])
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists; choose another name with --output, or replace it with --overwrite")
    if args.int8 and args.to == "torch":
        raise ValueError("--int8 goes with --to onnx or --to openvino; torch.export keeps fp32")
    if args.int8 and args.to == "openvino" and not args.calibration:
        raise ValueError("--int8 --to openvino needs --calibration, some hundred labelled pictures of your data")
    model, processor = load_classifier(args.model, device="cpu", dtype="float32")
    if is_segmenter(model) and (args.test or args.calibration):
        raise ValueError(
            "--test and --calibration take the labelled pictures of a classifier, and the model is a segmenter; "
            "measure it with swin-hf train --task semantic-segmentation test"
        )
    options = {
        "image_size": one_or_two("--image-size", args.image_size),
        "tolerance": args.tolerance,
        "overwrite": args.overwrite,
    }
    if args.images:
        mode, sources = model.config.num_channels, pictures_of(args.images, "--images")
        pictures = [read_picture(source, mode, processor) for source in sources]
        options["images"] = torch.stack(prepare(model, processor, pictures))
    if args.test:  # before anything is written
        test = _read_labelled(args.test, "test")
        order = match_classes(test.features["label"].names, class_table(model.config.id2label), args.test)
    if args.to == "onnx":
        report = export_onnx(model, output, int8=args.int8, **options)
    elif args.to == "torch":
        report = export_torch(model, output, **options)
    else:
        rows = _read_labelled(args.calibration, "train", CALIBRATION_PICTURES) if args.int8 else None
        batches = None if rows is None else (images for images, _ in _batches(rows, model, processor))
        report = export_openvino(model, output, calibration=batches, **options)
    print(report)
    if args.test:
        _print_accuracy(test, torch.tensor(order), model, processor, report)
    return 0


def _batches(
    rows: Any, model: SwinHFForImageClassification, processor: BaseImageProcessor
) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of normalised images, and the class numbers of the data, of what :func:`_read_labelled` returned."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        pictures = [decode_picture(cell, model.config.num_channels, **decoding(processor)) for cell in batch["image"]]
        yield torch.stack(prepare(model, processor, pictures)), batch["label"]


def _read_labelled(data: str, split: str, limit: int | None = None) -> Any:
    """Rows of class folders or of a parquet file, shuffled with a fixed seed: ``image``, not decoded, and ``label``.

    Of a folder without ``split``, the first that it has of test, validation and train is taken.
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"{data}: no such folder or file; give labelled pictures")
    if path.is_dir():
        content = read_folder(data)
        for note in content.notes:
            print(note, file=sys.stderr)
        rows = next(content.splits[name] for name in (split, "test", "validation", "train") if name in content.splits)
    else:
        rows = load_dataset("parquet", data_files=data, split="train")
        columns = {type(feature): name for name, feature in rows.features.items()}
        if Image not in columns or ClassLabel not in columns:
            raise ValueError(f"{data} has columns {rows.column_names}; one of type Image and one ClassLabel are needed")
        rows = rows.select_columns([columns[Image], columns[ClassLabel]])
        rows = rows.rename_columns({columns[Image]: "image", columns[ClassLabel]: "label"})
        rows = rows.cast_column("image", Image(decode=False))
    if len(rows) == 0:
        raise ValueError(f"{data} holds no pictures; give a folder with a folder of pictures for each class")
    return rows.shuffle(seed=0).select(range(min(limit or len(rows), len(rows))))


@torch.no_grad()
def _print_accuracy(
    rows: Any, order: Tensor, model: SwinHFForImageClassification, processor: BaseImageProcessor, report: ExportReport
) -> None:
    engine = load_engine(report.path)
    total = before = after = 0
    for images, numbers in _batches(rows, model, processor):
        labels = order[numbers]  # the model's numbers of these classes
        total += len(labels)
        before += int((model(pixel_values=images).logits.argmax(1) == labels).sum())
        after += int((engine(images).argmax(1) == labels).sum())
    print(f"accuracy on {total} pictures: model {before / total:.4f}, {report.form} {after / total:.4f}")
