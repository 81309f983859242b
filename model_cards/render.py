"""Write the cards of the released architectures: what each is, what its authors measured, how to get its weights.

    python model_cards/render.py            # rewrite the cards that differ
    python model_cards/render.py --check    # only name them; the exit code is 1 if there are any

Sizes come from the preset table, parameters are counted on a model without storage, and everything measured is quoted
with its source: the table of https://github.com/microsoft/Swin-Transformer (commit f82860bf) and timm's
``results-imagenet.csv``. This project measured none of it.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from swin_hf.counting import count_macs, count_parameters
from swin_hf.families import Architecture, config_of_preset, family_of, list_presets
from swin_hf.files import replacing
from swin_hf.hub.model_card import WIDGET, amount
from swin_hf.processing import Preprocessing

HERE = Path(__file__).parent
RELEASES = "https://github.com/SwinTransformer/storage/releases/download"


@dataclass(frozen=True)
class Published:
    """What the authors of a checkpoint say of it.

    Attributes:
        file: Path of the checkpoint below :data:`RELEASES`; None where the authors link another place.
        trained_on: Data and resolution.
        top1: ImageNet-1k validation accuracy in percent; None where the classes are others.
        top5: The same within five guesses.
        gflops: Multiply-accumulates of one image in 1e9, as they count them.
        fps: Images per second on a V100, as they measured.
        timm: Top-1 that timm measured with the same weights (short side resized, also at 384 pixels).
        note: A sentence more.
    """

    file: str | None
    trained_on: str
    top1: float | None = None
    top5: float | None = None
    gflops: float | None = None
    fps: int | None = None
    timm: float | None = None
    note: str | None = None


IN1K, IN22K, BOTH = "ImageNet-1k", "ImageNet-22k", "ImageNet-22k, then fine-tuned on ImageNet-1k"

PUBLISHED: dict[str, Published] = {
    "swin_tiny_patch4_window7_224": Published(
        "v1.0.0/swin_tiny_patch4_window7_224.pth", IN1K, 81.2, 95.5, 4.5, 755, 81.388
    ),
    "swin_tiny_patch4_window7_224_22k": Published("v1.0.8/swin_tiny_patch4_window7_224_22k.pth", IN22K, gflops=4.5),
    "swin_tiny_patch4_window7_224_22kto1k": Published(
        "v1.0.8/swin_tiny_patch4_window7_224_22kto1k_finetune.pth", BOTH, 80.9, 96.0, 4.5, 755
    ),
    "swin_tiny_c24_patch4_window8_256": Published(
        "v1.0.5/swin_tiny_c24_patch4_window8_256.pth", IN1K, 81.6, 95.7, 5.9, 563, note="Heads of 24 channels."
    ),
    "swin_small_patch4_window7_224": Published(
        "v1.0.0/swin_small_patch4_window7_224.pth", IN1K, 83.2, 96.2, 8.7, 437, 83.228
    ),
    "swin_small_patch4_window7_224_22k": Published("v1.0.8/swin_small_patch4_window7_224_22k.pth", IN22K, gflops=8.7),
    "swin_small_patch4_window7_224_22kto1k": Published(
        "v1.0.8/swin_small_patch4_window7_224_22kto1k_finetune.pth", BOTH, 83.2, 97.0, 8.7, 437
    ),
    "swin_base_patch4_window7_224": Published(
        "v1.0.0/swin_base_patch4_window7_224.pth", IN1K, 83.5, 96.5, 15.4, 278, 83.604
    ),
    "swin_base_patch4_window12_384": Published(
        "v1.0.0/swin_base_patch4_window12_384.pth", IN1K, 84.5, 97.0, 47.1, 85, 84.478
    ),
    "swin_base_patch4_window7_224_22k": Published("v1.0.0/swin_base_patch4_window7_224_22k.pth", IN22K, gflops=15.4),
    "swin_base_patch4_window12_384_22k": Published("v1.0.0/swin_base_patch4_window12_384_22k.pth", IN22K, gflops=47.1),
    "swin_base_patch4_window7_224_22kto1k": Published(
        "v1.0.0/swin_base_patch4_window7_224_22kto1k.pth", BOTH, 85.2, 97.5, 15.4, 278, 85.276
    ),
    "swin_base_patch4_window12_384_22kto1k": Published(
        "v1.0.0/swin_base_patch4_window12_384_22kto1k.pth", BOTH, 86.4, 98.0, 47.1, 85, 86.442
    ),
    "swin_large_patch4_window7_224_22k": Published("v1.0.0/swin_large_patch4_window7_224_22k.pth", IN22K, gflops=34.5),
    "swin_large_patch4_window12_384_22k": Published(
        "v1.0.0/swin_large_patch4_window12_384_22k.pth", IN22K, gflops=103.9
    ),
    "swin_large_patch4_window7_224_22kto1k": Published(
        "v1.0.0/swin_large_patch4_window7_224_22kto1k.pth", BOTH, 86.3, 97.9, 34.5, 141, 86.320
    ),
    "swin_large_patch4_window12_384_22kto1k": Published(
        "v1.0.0/swin_large_patch4_window12_384_22kto1k.pth", BOTH, 87.3, 98.2, 103.9, 42, 87.142
    ),
    "swin_base_patch4_window6_192_simmim": Published(
        None,
        "ImageNet-1k, without labels: SimMIM, 800 epochs",
        note="A classifier fine-tuned from it at 224 pixels reaches 84.0 % top-1 (SimMIM's table).",
    ),
    "swinv2_tiny_patch4_window8_256": Published(
        "v2.0.0/swinv2_tiny_patch4_window8_256.pth", IN1K, 81.8, 95.9, 5.9, 572, 81.824
    ),
    "swinv2_tiny_patch4_window16_256": Published(
        "v2.0.0/swinv2_tiny_patch4_window16_256.pth", IN1K, 82.8, 96.2, 6.6, 437, 82.828
    ),
    "swinv2_small_patch4_window8_256": Published(
        "v2.0.0/swinv2_small_patch4_window8_256.pth", IN1K, 83.7, 96.6, 11.5, 327, 83.844
    ),
    "swinv2_small_patch4_window16_256": Published(
        "v2.0.0/swinv2_small_patch4_window16_256.pth", IN1K, 84.1, 96.8, 12.6, 257, 84.216
    ),
    "swinv2_base_patch4_window8_256": Published(
        "v2.0.0/swinv2_base_patch4_window8_256.pth", IN1K, 84.2, 96.9, 20.3, 217, 84.246
    ),
    "swinv2_base_patch4_window16_256": Published(
        "v2.0.0/swinv2_base_patch4_window16_256.pth", IN1K, 84.6, 97.0, 21.8, 174, 84.608
    ),
    "swinv2_base_patch4_window12_192_22k": Published("v2.0.0/swinv2_base_patch4_window12_192_22k.pth", IN22K),
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": Published(
        "v2.0.0/swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", BOTH, 86.2, 97.9, 21.8, 174, 86.270
    ),
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": Published(
        "v2.0.0/swinv2_base_patch4_window12to24_192to384_22kto1k_ft.pth", BOTH, 87.1, 98.2, 54.7, 57, 87.142
    ),
    "swinv2_large_patch4_window12_192_22k": Published("v2.0.0/swinv2_large_patch4_window12_192_22k.pth", IN22K),
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft": Published(
        "v2.0.0/swinv2_large_patch4_window12to16_192to256_22kto1k_ft.pth", BOTH, 86.9, 98.0, 47.5, 95, 86.934
    ),
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": Published(
        "v2.0.0/swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth", BOTH, 87.6, 98.3, 115.4, 33, 87.474
    ),
}


def render(name: str) -> str:
    """Render the card of an architecture.

    Args:
        name: One of :func:`swin_hf.list_presets`.

    Raises:
        ValueError: For an unknown name; the message gives the nearest.
    """
    config = config_of_preset(name)
    published = PUBLISHED.get(name)
    task = "masked-image-modeling" if name.endswith("simmim") else "image-classification"
    architecture = Architecture(family_of(config), task)
    model_class = architecture.model_class
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["amount"] = amount
    text: str = environment.get_template("card.md.jinja").render(
        name=name,
        widget=WIDGET,
        config=config,
        published=published,
        url=f"{RELEASES}/{published.file}" if published and published.file else None,
        file=published.file.split("/")[-1] if published and published.file else None,
        family=architecture.family,
        architecture=architecture,
        config_class=type(config).__name__,
        model_class=model_class.__name__,
        parameters=count_parameters(config, model_class),
        macs=count_macs(config, model_class),
        evaluation=Preprocessing.of_release(config.image_hw).words() if published else None,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def write_cards(folder: Path = HERE, names: Sequence[str] | None = None, check: bool = False) -> list[str]:
    """Write the card of every preset into a folder, and remove those of presets that are gone.

    Args:
        folder: Where the cards are, one ``NAME.md`` for each preset.
        names: The presets; all of them if not given.
        check: Only compare; nothing is written.

    Returns:
        Names of the files that were not as they should be.
    """
    cards = {f"{name}.md": render(name) for name in (list_presets() if names is None else names)}
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    outdated = sorted(name for name in cards.keys() | present.keys() if cards.get(name) != present.get(name))
    for name in [] if check else outdated:
        if name not in cards:
            (folder / name).unlink()
            continue
        with replacing(folder / name) as partial:
            partial.write_text(cards[name], encoding="utf-8")
    return outdated


def main(argv: Sequence[str] | None = None) -> int:
    """Write the cards, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a card is out of date")
    check = parser.parse_args(argv).check
    outdated = write_cards(check=check)
    for name in outdated:
        print(f"{name} is out of date; run `make cards`" if check else f"{name} written")
    if not outdated:
        print("the cards are up to date")
    return int(check and bool(outdated))


if __name__ == "__main__":
    raise SystemExit(main())
