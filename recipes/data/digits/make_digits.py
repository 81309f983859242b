"""Write the UCI handwritten digits as ``train.parquet`` and ``test.parquet`` of the package.

The 1,797 scans come from scikit-learn's bundled copy, so nothing is downloaded::

    pip install scikit-learn
    python recipes/data/digits/make_digits.py

Every picture stays as it was scanned, 8x8 pixels with 17 grey levels, stretched from 0..16 to 0..255 (black paper,
white ink) and stored as a lossless PNG. One fifth is the test split, drawn per class with a fixed seed; running the
script again writes the same pictures in the same order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FOLDER = Path(__file__).parents[3] / "swin_hf" / "training" / "configs" / "digits"
SEED = 0
TEST_FRACTION = 0.2


def main() -> None:
    """Write both splits and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the parquet files")
    output = parser.parse_args().output

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    everything = np.arange(len(pixels))
    train, test = train_test_split(everything, test_size=TEST_FRACTION, stratify=digits.target, random_state=SEED)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", np.sort(train)), ("test", np.sort(test))):
        pictures = [PILImage.fromarray(pixels[row]) for row in rows]
        labels = [int(digits.target[row]) for row in rows]
        path = output / f"{split}.parquet"
        Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(path)
        print(f"{path}: {len(rows)} pictures, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
