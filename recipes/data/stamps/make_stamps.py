"""Make pictures with exact masks: photographs of six kinds of things pasted on wallpapers. Composites, not photographs.

    apt install tuxpaint-stamps-default ukui-wallpapers mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    python recipes/data/stamps/make_stamps.py --output stamps
    swin-hf train --task semantic-segmentation --config segment_stamps

The stamps of Tux Paint are cut out by hand, so that their transparency is the mask; drawings are left out, but for some
of the road signs. A composite has one to three stamps of any class at a random place, size, turn and mirroring, the
later over the earlier.
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

CLASSES = {  # kinds with twenty stamps or more: a few of them do not show what another one looks like
    "bird": ["animals/birds"],
    "mammal": ["animals/mammals"],
    "flower": ["plants/flowers"],
    "fruit": ["food/fruit", "food/vegetables"],
    "coin": ["symbols/money"],
    "sign": ["town/roadsigns"],
}
DRAWN = {"cartoon", "toys", "plastic", "00_symbols"}  # folders that are not photographs
# Wallpapers that show a flower, a bird, a mammal or a fruit: the mask would call it background.
SHOW_A_CLASS = (
    *("FreshFlower", "Garden", "LadyBird", "TwoWings", "YellowFlower", "the-mouse", "Kleiber", "Picture_0B", "free_by"),
    *("friends", "seeding"),
)
SPLITS = {"train": (0, 7, 4000), "validation": (7, 8, 200), "test": (8, 10, 300)}  # tenths of the stamps; composites
SIDE = 128  # pixels
STAMP_SHARE = (0.35, 0.75)  # longer side of a stamp over that of the composite
TURN = 20  # degrees, either way
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
        (options.wallpapers, "ukui-wallpapers mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04"),
    ):
        if not folder.is_dir():
            raise SystemExit(f"{folder} is not a folder; apt install {package}, or say where it is")

    stamps: dict[str, list[tuple[str, Path]]] = defaultdict(list)  # split -> class and file
    for name, places in CLASSES.items():
        pictures = [path for place in places for path in (options.stamps / place).rglob("*.png")]
        pictures = [path for path in pictures if not DRAWN.intersection(path.parts)]
        for split, paths in divide(pictures).items():
            stamps[split] += [(name, path) for path in paths]
            print(f"{name:<10} {split:<10} {len(paths):>3} stamps")
    photographs = [path for path in options.wallpapers.rglob("*.jpg") if not path.name.startswith(SHOW_A_CLASS)]
    wallpapers = divide([path for path in photographs if path.stat().st_size < 8e6])

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
        stamp = stamp.rotate(draw.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
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
