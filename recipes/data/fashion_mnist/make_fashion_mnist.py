"""Turn the Fashion-MNIST files of Debian's ``dataset-fashion-mnist`` into ``train.parquet`` and ``test.parquet``.

For machines without the Hub; elsewhere, ``--data.dataset zalando-datasets/fashion_mnist`` gives the same pictures::

    apt install dataset-fashion-mnist        # or any folder with the four files train-images-idx3-ubyte.gz ...
    python recipes/data/fashion_mnist/make_fashion_mnist.py --output fashion
    swin-hf train --config fashion_mnist \
        --data.dataset parquet --data.data_dir fashion

70,000 grey pictures of 28x28 pixels, 10 classes, by Zalando SE, MIT licence: <https://github.com/zalandoresearch/fashion-mnist>.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

CLASSES = [  # names and order of zalando-datasets/fashion_mnist
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zero bytes, the type (8), the number of axes, their lengths, the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex(' ')}")
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", count=axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def main() -> None:
    """Write both splits and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the parquet files")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = read_idx(options.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(options.source / f"{prefix}-labels-idx1-ubyte.gz")
        pictures = [PILImage.fromarray(picture) for picture in pixels]
        path = options.output / f"{split}.parquet"
        Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features=features).to_parquet(path)
        print(f"{path}: {len(pictures)} pictures, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
