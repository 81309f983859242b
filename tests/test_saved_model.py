"""A folder that version 0.1.0 saved: names of weights, fields of the configuration and outputs never change."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from swin_hf import SwinHFForImageClassification, SwinHFModel

FOLDER = Path(__file__).parent / "data" / "saved_by_0_1_0"
# Stored on one machine, computed on another: the order of summation in float32 may differ.
STORED = {"rtol": 1e-5, "atol": 1e-5}


def test_it_loads_and_computes_what_it_computed():
    stored = load_file(FOLDER / "outputs.safetensors")
    model = SwinHFForImageClassification.from_pretrained(FOLDER, strict=True).eval()
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "fox"}
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            torch.testing.assert_close(model(stored["pixel_values"]).logits, stored["logits"], **STORED)
            torch.testing.assert_close(model.swin(stored["pixel_values"]).pooler_output, stored["pooled"], **STORED)


def test_its_names_are_those_of_today(tmp_path):
    saved = load_file(FOLDER / "model.safetensors")
    model = AutoModelForImageClassification.from_pretrained(FOLDER)
    assert type(model) is SwinHFForImageClassification
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)
    base = SwinHFModel.from_pretrained(FOLDER).state_dict()
    assert {f"swin.{name}" for name in base} == {name for name in saved if name.startswith("swin.")}
