"""Make pictures with exact masks: photographs of animals and plants pasted on wallpapers. Composites, not photographs.

    apt install tuxpaint-stamps-default ukui-wallpapers mate-backgrounds
    python recipes/data/stamps/make_stamps.py --output stamps
    swin-hf train --task semantic-segmentation --config segment_stamps

The stamps of Tux Paint are cut out by hand, so that their transparency is the mask; drawings (``cartoon``) are left
out. A composite has one to three stamps of any class at a random place, size and mirroring, the later over the earlier.
Training, validation and test have stamps and wallpapers of their own, chosen by the hash of the file, so that running
the script again makes the same files.

Licences: the packages' ``copyright`` files (the stamps are GPL or in the public domain, the wallpapers GPL and
CC-BY-SA).
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections import defaultdict
from pathlib import Path

from PIL import Image

CLASSES = {
    "bird": "animals/birds",
    "fish": "animals/fish",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "vegetable": "food/vegetables",
}
SPLITS = {"train": (0, 7, 1600), "validation": (7, 8, 200), "test": (8, 10, 300)}  # tenths of the stamps; composites
SIDE = 128  # pixels
STAMP_SHARE = (0.35, 0.75)  # longer side of a stamp over that of the composite
LEAST_ALPHA = 128


def main() -> None:
    """Write SPLIT/images, SPLIT/masks and classes.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--wallpapers", type=Path, default=Path("/usr/share/backgrounds"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    for folder, package in (
        (options.stamps, "tuxpaint-stamps-default"),
        (options.wallpapers, "ukui-wallpapers mate-backgrounds"),
    ):
        if not folder.is_dir():
            raise SystemExit(f"{folder} is not a folder; apt install {package}, or say where it is")

    stamps: dict[str, list[tuple[str, Path]]] = defaultdict(list)  # split -> class and file
    for name, place in CLASSES.items():
        pictures = [path for path in (options.stamps / place).rglob("*.png") if "cartoon" not in path.parts]
        for split, paths in divide(pictures).items():
            stamps[split] += [(name, path) for path in paths]
            print(f"{name:<10} {split:<10} {len(paths):>3} stamps")
    wallpapers = divide([path for path in options.wallpapers.rglob("*.jpg") if path.stat().st_size < 8e6])

    for split, (_, _, count) in SPLITS.items():
        for kind in ("images", "masks"):
            (options.output / split / kind).mkdir(parents=True, exist_ok=True)
        pictures = {path: Image.open(path).convert("RGBA") for _, path in stamps[split]}
        papers = [Image.open(path).convert("RGB") for path in wallpapers[split]]
        for number in range(count):
            picture, mask = composite(random.Random(f"{split} {number}"), papers, stamps[split], pictures)
            picture.save(options.output / split / "images" / f"{number:04}.jpg", quality=92)
            mask.save(options.output / split / "masks" / f"{number:04}.png")
        print(
            f"{count} composites of {len(stamps[split])} stamps on {len(papers)} wallpapers in {options.output / split}"
        )
    (options.output / "classes.txt").write_text("\n".join(["background", *CLASSES]) + "\n")


def divide(paths: list[Path]) -> dict[str, list[Path]]:
    """Share files out to the splits, in the order of their hashes."""
    ordered = sorted({hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(paths)}.items())
    return {
        split: [path for rank, (_, path) in enumerate(ordered) if low <= 10 * rank / len(ordered) < high]
        for split, (low, high, _) in SPLITS.items()
    }


def composite(
    draw: random.Random, papers: list[Image.Image], stamps: list[tuple[str, Path]], pictures: dict[Path, Image.Image]
) -> tuple[Image.Image, Image.Image]:
    """One picture and its mask of class numbers, 0 for the background."""
    paper = draw.choice(papers)
    side = round(min(paper.size) * draw.uniform(0.3, 1.0))
    left, top = draw.randint(0, paper.width - side), draw.randint(0, paper.height - side)
    picture = paper.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    mask = Image.new("L", (SIDE, SIDE))
    names = ["background", *CLASSES]
    for _ in range(draw.randint(1, 3)):
        wanted = draw.choice(list(CLASSES))  # the classes evenly, however many stamps they have
        _, path = draw.choice([stamp for stamp in stamps if stamp[0] == wanted])
        stamp = pictures[path]
        stamp = stamp.crop(stamp.getchannel("A").getbbox())
        share = draw.uniform(*STAMP_SHARE) * SIDE / max(stamp.size)
        stamp = stamp.resize((max(1, round(stamp.width * share)), max(1, round(stamp.height * share))))
        if draw.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        place = (draw.randint(-stamp.width // 4, SIDE - stamp.width * 3 // 4),
                 draw.randint(-stamp.height // 4, SIDE - stamp.height * 3 // 4))  # fmt: skip
        alpha = stamp.getchannel("A")
        picture.paste(stamp, place, alpha)
        mask.paste(names.index(wanted), place, alpha.point(lambda value: 255 * (value >= LEAST_ALPHA)))
    return picture, mask


if __name__ == "__main__":
    main()
