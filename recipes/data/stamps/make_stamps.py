r"""Make pictures with exact masks: photographs of six kinds of things on wallpapers. Composites, not photographs.

    apt install tuxpaint-stamps-default ukui-wallpapers mate-backgrounds lomiri-wallpapers-16.04 \
        lomiri-wallpapers-20.04 plasma-workspace-wallpapers
    python recipes/data/stamps/make_stamps.py --output stamps
    swin-hf train --task semantic-segmentation --config segment_stamps

The stamps of Tux Paint are cut out by hand, so that their transparency is the mask; drawings are left out, but for some
of the road signs. A composite has one to three stamps of any class at a random place, size, turn and mirroring, the
later over the earlier.
Training, validation and test have stamps and wallpapers of their own, chosen by the hash of the picture, so that
running the script again makes the same files. Three stamps are there mirrored, too: all six are in the training split.

Licences: the packages' ``copyright`` files (the stamps are GPL or in the public domain, the wallpapers GPL and
CC-BY-SA).
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageOps

CLASSES = {  # the kinds with the most stamps
    "animal": ["animals"],
    "food": ["food"],
    "flower": ["plants/flowers"],
    "coin": ["symbols/money"],
    "sign": ["town/roadsigns"],
    "vehicle": ["vehicles", "military/vehicles"],
}
DRAWN = {"cartoon", "toys", "plastic", "00_symbols"}  # folders that are not photographs
# Wallpapers that show a flower, an animal, a fruit or a boat: the mask would call it background.
SHOW_A_CLASS = (
    *("FreshFlower", "Garden", "LadyBird", "TwoWings", "YellowFlower", "the-mouse", "Kleiber", "Picture_0B", "free_by"),
    *("friends", "seeding", "Dragonfl", "EveningGlow", "SafeLanding"),
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
    parser.add_argument(
        "--wallpapers", type=Path, nargs="+", default=[Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers")]
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    for folder in (options.stamps, *options.wallpapers):
        if not folder.is_dir():
            raise SystemExit(f"{folder} is not a folder; apt install the packages, or say where it is")

    stamps: dict[str, list[tuple[str, Path]]] = defaultdict(list)  # split -> class and file
    for name, places in CLASSES.items():
        pictures = [path for place in places for path in (options.stamps / place).rglob("*.png")]
        pictures = [path for path in pictures if not DRAWN.intersection(path.parts)]
        for split, paths in divide(pictures).items():
            stamps[split] += [(name, path) for path in paths]
            print(f"{name:<10} {split:<10} {len(paths):>3} stamps")
    photographs = {}  # the largest file of each wallpaper, within reason
    for path in sorted((path for folder in options.wallpapers for path in folder.rglob("*.jpg")), key=size_of):
        name = path.parts[-4] if path.parent.name == "images" else path.name  # plasma's: NAME/contents/images/SIZE.jpg
        if size_of(path) < 8e6 and path.parent.name != "images_dark" and not name.startswith(SHOW_A_CLASS):
            photographs[name] = path
    wallpapers = divide(list(photographs.values()))

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


def size_of(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size


def divide(paths: list[Path]) -> dict[str, list[Path]]:
    """Share pictures out to the splits, in the order of their hashes; of equal ones, one."""
    ordered = sorted({hash_of(path): path for path in sorted(paths)}.items())
    return {
        split: [path for rank, (_, path) in enumerate(ordered) if low <= 10 * rank / len(ordered) < high]
        for split, (low, high, _) in SPLITS.items()
    }


def hash_of(path: Path) -> str:
    """The same for a picture and for its mirror image."""
    picture = Image.open(path).convert("RGBA")
    return min(hashlib.sha256(either.tobytes()).hexdigest() for either in (picture, ImageOps.mirror(picture)))


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
