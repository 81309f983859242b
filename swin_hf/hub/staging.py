"""Everything that a push sends, put together and checked before the network is touched.

Only files with the names of a model's files are sent: no pickles, optimiser states or logs, whatever else is in the
folder.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from swin_hf.checkpoints.preprocessing import class_of_processor
from swin_hf.checkpoints.read import read_object
from swin_hf.families import architectures, family_of
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.processing import Preprocessing

from .facts import FACTS_NAME, TrainingFacts
from .model_card import CARD_NAME, CardSource, check_metadata, is_edited, read_card, render_card
from .pictures import CURVES, MATRIX, SAMPLES, draw_pictures
from .remote import redact, sha256_of
from .weights import CONFIG, INDEX, PROCESSOR, SAVE_AGAIN, SHARD, WEIGHTS, check_weights, read_config, weight_files

# File names of the code that is sent with models of all families.
CODE = tuple(
    sorted({path.name for built in architectures().values() for path in built.family.travelling_files(built.task)})
)
PICTURES = (f"assets/{MATRIX}", f"assets/{CURVES}", f"assets/{SAMPLES}")
ASSET = re.compile(r"assets/[A-Za-z0-9][A-Za-z0-9._-]*\.png")
# Keys that say where a model was loaded from on this machine, or which code loads it; they are not published.
PRIVATE_KEYS = ("auto_map", "_name_or_path", "_attn_implementation", "_attn_implementation_internal")


@dataclass(frozen=True)
class Card:
    """What a push does about the model card."""

    text: str | os.PathLike[str] | None = None  # written by hand, or its path, instead of the rendered one
    facts: TrainingFacts | None = None  # of the training, for a model or a folder without facts
    replace: bool = False  # whether a card that was edited by hand on the Hub may be overwritten
    samples: bool = False  # whether pictures of the run's test split, with predictions, are shown, and so sent


@dataclass(frozen=True)
class PushedFile:
    """A file of a push."""

    name: str  # in the repository
    size: int  # in bytes
    sha256: str
    path: Path = field(repr=False, compare=False)  # that is sent; a temporary one is gone after the push

    @classmethod
    def of(cls, name: str, path: Path) -> "PushedFile":
        """Hash a file."""
        return cls(name, path.stat().st_size, sha256_of(path), path)


@dataclass(frozen=True)
class Stage:
    """Files by name; the text of the card, which is one of them; what it was rendered from, unless written by hand."""

    files: Mapping[str, PushedFile]
    card: str
    rendered_from: CardSource | None = None

    def card_for(self, tag: str) -> PushedFile | None:
        """The card as a push with another tag renders it; None for one written by hand."""
        if self.rendered_from is None:
            return None
        path = self.files[CARD_NAME].path.with_name("tagged.md")
        path.write_text(render_card(replace(self.rendered_from, tag=tag)), encoding="utf-8")
        return PushedFile.of(CARD_NAME, path)


def is_ours(name: str) -> bool:
    """Whether a push owns a file name of a repository: it writes it, and removes it when it has become stale."""
    return name in (WEIGHTS, INDEX, FACTS_NAME, *PICTURES, *CODE) or bool(SHARD.fullmatch(name))


def model_folder(folder: Path) -> Path:
    """The folder with ``config.json``: the one given, or ``model/`` in it, as a run leaves it; else ValueError."""
    for candidate in (folder, folder / "model"):
        if (candidate / CONFIG).is_file():
            return candidate
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder of a saved model or of a training run")
    runs = sorted(folder.glob(f"**/model/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    hint = f"did you mean {runs[-1].parent.parent}?" if runs else "save a model into it with save_pretrained first"
    raise ValueError(f"{folder} holds no {CONFIG}; {hint}")


def stage(
    source: PreTrainedModel | str | os.PathLike[str],
    folder: Path,
    *,
    repo_id: str,
    tag: str | None = None,
    include_code: bool = True,
    card: Card,
    processor: Any = None,
    license: str | None = None,
    keep_card: bool = True,
) -> Stage:
    """Put together what a push sends, with the arguments of :func:`swin_hf.push`; ValueError if it is not fit.

    What has to be written is written into ``folder``, which is empty; weights of a ``source`` folder stay where they
    are. With ``keep_card``, a card in it that was written or edited by hand is sent instead of a rendered one.
    """
    saved = _saved(source, folder)
    config, weights = read_config(saved / CONFIG), weight_files(saved)
    architecture = check_weights(weights, config)
    paths = {path.name: path for path in weights}
    if weights[0].name != WEIGHTS:
        paths[INDEX] = saved / INDEX
    built = architectures()[architecture]
    values = read_object(saved / CONFIG, f"{CONFIG} cannot be read", SAVE_AGAIN)
    published = {key: value for key, value in values.items() if key not in PRIVATE_KEYS}
    if include_code:
        published["auto_map"] = built.family.auto_map(built.task)
    paths[CONFIG] = _write_json(folder / CONFIG, published)
    paths[PROCESSOR] = _write_processor(saved, folder, processor, config, include_code)
    if include_code:  # copied: an upgrade during the push must not mix two versions
        paths |= {path.name: Path(shutil.copy(path, folder)) for path in built.family.travelling_files(built.task)}
    facts, recorded = _recorded(saved, folder, card.facts)
    paths |= recorded
    if card.samples:
        paths[f"assets/{SAMPLES}"] = _find_samples(saved)
    staged = {name: PushedFile.of(name, path) for name, path in sorted(paths.items())}
    text, rendered_from = _card_text(card.text), None
    if text is None and keep_card and (saved / CARD_NAME).is_file():
        written = read_card(saved / CARD_NAME)
        text = written if written and is_edited(written) else None  # by a person
    if text is None:
        rendered_from = CardSource(
            config,
            architecture,
            json.loads(paths[PROCESSOR].read_text(encoding="utf-8")),
            facts or TrainingFacts(),
            repo_id,
            tag,
            license,
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
            files=tuple((file.name, file.size, file.sha256) for file in staged.values()),
            has_code=include_code,
        )
        text = render_card(rendered_from)
    check_metadata(text)
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    staged[CARD_NAME] = PushedFile.of(CARD_NAME, folder / CARD_NAME)
    _refuse_tokens(staged.values())
    return Stage(dict(sorted(staged.items())), text, rendered_from)


def _saved(source: PreTrainedModel | str | os.PathLike[str], folder: Path) -> Path:
    """The folder of a model; one that is in memory is saved into ``folder``."""
    if isinstance(source, str | os.PathLike):
        return model_folder(Path(source).expanduser())
    if not isinstance(source, PreTrainedModel):
        raise ValueError(
            f"{type(source).__name__} cannot be pushed; give a model of swin_hf, or the folder of one or of a run"
        )
    source.save_pretrained(folder / "saved")
    return folder / "saved"


def _write_json(path: Path, values: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _write_processor(saved: Path, folder: Path, given: Any, config: SwinHFConfig, include_code: bool) -> Path:
    """Write the values of the image processor, without keys that load foreign code or name local paths."""
    path = folder / PROCESSOR
    remedy = "save the image processor again, or remove the file for the one of the published models"
    if given is None and (saved / PROCESSOR).is_file():
        path.write_bytes((saved / PROCESSOR).read_bytes())
    else:
        default = Preprocessing.of_release(config.image_hw, config.num_channels)
        (given if given is not None else default.processor()).save_pretrained(folder)
    values = {
        key: value
        for key, value in read_object(path, f"{PROCESSOR} cannot be read", remedy).items()
        if key != "auto_map" and not key.startswith("_")
    }
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if name is None and "grey_maximum" in values:  # ours, which is found by the model's configuration
        if include_code:
            values["auto_map"] = {"AutoImageProcessor": [*family_of(config).processors.values()]}
    elif not (isinstance(name, str) and class_of_processor(name)):
        raise ValueError(
            f"{PROCESSOR} names the image processor {name!r}; it must be a class of transformers, because no code "
            f"but this package's travels with it: {remedy}"
        )
    return _write_json(path, values)


def _recorded(saved: Path, folder: Path, facts: TrainingFacts | None) -> tuple[TrainingFacts | None, dict[str, Path]]:
    """The facts of the run without secrets; as files by name, these, the pictures of the folder, and those drawn."""
    run = (saved, saved.parent) if saved.name == "model" else (saved,)
    kept = next((place for place in run if (place / FACTS_NAME).is_file()), None)
    if facts is None and kept is not None:
        facts = TrainingFacts.load(kept)
    paths = {f"assets/{path.name}": path for path in sorted((saved / "assets").glob("*.png"))}
    paths = {name: path for name, path in paths.items() if ASSET.fullmatch(name)}
    if facts is not None:
        (folder / FACTS_NAME).write_text(redact(facts.to_json()), encoding="utf-8")
        facts = TrainingFacts.load(folder)
        drawn = draw_pictures(facts, folder / "assets")
        paths |= {FACTS_NAME: folder / FACTS_NAME, **{f"assets/{path.name}": path for path in drawn}}
    return facts, paths


def _card_text(card: str | os.PathLike[str] | None) -> str | None:
    if card is None or (isinstance(card, str) and "\n" in card):
        return card
    path = Path(card).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no card {path}; give the path or the text of a Markdown file")
    return read_card(path)


def _find_samples(saved: Path) -> Path:
    path = saved.parent / SAMPLES
    if saved.name != "model" or not path.is_file():
        raise ValueError(
            f"there is no {SAMPLES} of a run with the model {saved}; the test of a run draws it, or leave "
            "--samples (Card(samples=True)) out"
        )
    return path


def _refuse_tokens(staged: Iterable[PushedFile]) -> None:
    for file in staged:
        if not file.name.endswith((".safetensors", ".png")):
            text = file.path.read_text(encoding="utf-8")
            if redact(text) != text:
                raise ValueError(
                    f"{file.name} holds something that looks like an access token; remove it, and revoke the token"
                )
