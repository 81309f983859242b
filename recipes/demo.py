"""Classify a real test picture with the weights that `swin-hf train` has just left, the way any user would.

python recipes/demo.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

import swin_hf  # teaches the Auto classes the model type swin_hf

TEST_FILE = Path(swin_hf.__file__).parent / "training" / "configs" / "digits" / "test.parquet"


def newest_run(runs: Path = Path("runs")) -> Path:
    """The model folder that was written last."""
    folders = sorted(runs.glob("digits*/model"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        raise SystemExit(f"there is no {runs}/digits*/model yet; train one with: swin-hf train")
    return folders[-1]


def main(folder: Path) -> None:
    """Load the folder, classify one picture, and print what it is and what the model says."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = load_dataset("parquet", data_files=str(TEST_FILE), split="train")
    row = test[0]
    with torch.no_grad():
        logits = model(**processor(images=row["image"].convert("RGB"), return_tensors="pt")).logits
    score, index = logits.softmax(-1)[0].max(-1)
    print(f"loaded {folder} with {type(model).__name__}")
    print(f"first test picture: it shows {test.features['label'].int2str(row['label'])}, ", end="")
    print(f"the model says {model.config.id2label[index.item()]} with probability {score.item():.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else newest_run())
