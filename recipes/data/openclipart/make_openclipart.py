"""Turn Debian's ``openclipart-png`` into an ``imagefolder``: real clip-art of many sizes and modes, unevenly spread.

    apt install openclipart-png
    python recipes/data/openclipart/make_openclipart.py --output openclipart
    swin-hf train --config openclipart

A class is a top folder of the collection. ``unsorted``, ``special`` and classes of fewer than 40 pictures are left
out. Files with equal content count once; those of two classes are left out, so that no test picture has been
trained on under any name. (Drawings of a series still resemble each other across the splits.) One fifth of each class
is the test split, chosen by the hash of the content, so that running the script again chooses the same.

Licence: public domain dedication of every author, https://openclipart.org; see the package's ``copyright`` file.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections import Counter, defaultdict
from pathlib import Path

LEFT_OUT = {"unsorted", "special"}
SMALLEST_CLASS = 40
TEST_SHARE = 5  # one in so many


def main() -> None:
    """Copy the pictures to train/CLASS and test/CLASS and print the number in each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of train/ and test/")
    options = parser.parse_args()
    if not options.source.is_dir():
        raise SystemExit(f"{options.source} is not a folder; apt install openclipart-png, or say where it is: --source")

    places: dict[str, list[Path]] = defaultdict(list)  # hash of the content -> where it is found
    for path in sorted(options.source.rglob("*.png")):
        if not path.is_symlink():
            places[hashlib.sha256(path.read_bytes()).hexdigest()].append(path)
    chosen: dict[str, list[tuple[str, Path]]] = defaultdict(list)  # class -> pictures
    for digest, paths in places.items():
        classes = {path.relative_to(options.source).parts[0] for path in paths}
        if len(classes) == 1 and not classes & LEFT_OUT:
            chosen[classes.pop()].append((digest, paths[0]))

    counts: Counter[str] = Counter()
    for name, pictures in sorted(chosen.items()):
        if len(pictures) < SMALLEST_CLASS:
            continue
        for rank, (digest, path) in enumerate(sorted(pictures)):
            split = "test" if rank % TEST_SHARE == 0 else "train"
            folder = options.output / split / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{path.stem}-{digest[:8]}.png")
            counts[split] += 1
        print(f"{name:<20}{len(pictures):>6}")
    print(f"{counts['train']} training and {counts['test']} test pictures in {options.output}")


if __name__ == "__main__":
    main()
