"""Load anyone's Swin from any source: its model, its image processor, and its origin.

Every function and verb that takes a model takes the same sources: the folder of a model or of a training run, a
checkpoint file of any layout, or a repository ``user/name`` on the Hub, of this package, of transformers (``swin``,
``maskformer-swin``), of timm, or with a single file of weights. ``user/name@revision`` and ``hf-hub:user/name`` are
accepted; ``hf://user/name/FILE`` names one file of a repository.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor

from swin_hf.checkpoints import Checkpoint, open_checkpoint
from swin_hf.checkpoints.convert import check_destination, write_checkpoint
from swin_hf.checkpoints.detect import MODEL_TYPES, is_v2
from swin_hf.checkpoints.load import Size, build_model, class_for, logger, state_for
from swin_hf.checkpoints.preprocessing import image_processor, processor_values
from swin_hf.checkpoints.read import Source, Weights, read_source
from swin_hf.families import FAMILIES
from swin_hf.files import WEIGHT_SUFFIXES
from swin_hf.hub import HubError, pull
from swin_hf.hub.staging import model_folder
from swin_hf.hub.weights import CONFIG, OtherFamilyError, check_folder, read_config
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFBackbone
from swin_hf.processing import Preprocessing

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<id>{_NAME}/{_NAME})(@(?P<revision>[\w./-]+))?")
_HUB_ADDRESS = re.compile(rf"(hf-hub:|hf_hub:|hf://)(?P<id>{_NAME}/{_NAME})(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")


Anything = str | os.PathLike[str] | Mapping[str, Any]


class NoModelError(FileNotFoundError, ValueError):
    """A path that does not exist."""


@dataclass(frozen=True)
class Origin:
    """Where a model is, and where it came from."""

    path: Path  # its folder or file on this machine
    repo_id: str | None = None  # its repository on the Hub; None for what was on this machine
    commit: str | None = None  # of the repository
    license: str | None = None  # of the weights, as the card names it


def local_path(source: str | os.PathLike[str]) -> Path | None:
    """The file or folder of a source, ``model/`` for a training run; None for a repository on the Hub.

    Raises:
        NoModelError: If it is a path that does not exist; the network is not used.
        ValueError: If it is a folder without a model.
    """
    path = Path(source).expanduser()
    has_model = path.is_dir() and any(f.name == "config.json" or f.suffix in WEIGHT_SUFFIXES for f in path.iterdir())
    if path.is_dir() and not has_model:
        return model_folder(path)
    if path.exists():
        return path
    if isinstance(source, str) and _HUB_ADDRESS.fullmatch(source):
        return None
    is_path = isinstance(source, os.PathLike) or path.suffix.lower() in WEIGHT_SUFFIXES or path.parent.is_dir()
    if is_path or not _HUB_ID.fullmatch(str(source)):
        raise NoModelError(
            f"{str(source)!r} does not exist; give the folder of a model or of a training run, a checkpoint file, or "
            "user/name of a model on the Hub"
        )
    return None


def split_hub_id(source: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and file of an id or address."""
    match = _HUB_ADDRESS.fullmatch(source) or _HUB_ID.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r} is not user/name or user/name@revision")
    return match["id"], match["revision"], match.groupdict().get("file")


def find_model(source: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Origin:
    """The file or folder of a model; one on the Hub is pulled with options of :func:`swin_hf.pull`, or cached.

    Raises:
        ValueError: As :func:`local_path` and :func:`swin_hf.pull` do; for a path with a revision.
        HubError: If the Hub refuses, or cannot be reached while the cache does not have the model.
    """
    path = local_path(source)
    if path is not None:
        if revision is not None:
            raise ValueError(f"{source} is a path, which has no revision {revision!r}; leave it out or give user/name")
        return Origin(path)
    repo_id, named, file = split_hub_id(str(source))
    if named and revision not in (None, named):
        raise ValueError(f"{source} names the revision {named!r}, and {revision!r} was given too; give one of them")
    try:
        pulled = pull(repo_id, revision=named or revision, file=file, **options)
    except HubError as error:
        raise HubError(f"there is no folder {source} here, and {error}", error.transient) from None
    return Origin(pulled.path, repo_id, pulled.commit, pulled.license)


def open_source(
    source: Anything | Source | Checkpoint, layout: str | None = None, *, revision: str | None = None, **options: Any
) -> Checkpoint:
    """Find, read and recognise a checkpoint, without building a model; see :func:`load_checkpoint`."""
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | os.PathLike):
        source = find_model(source, revision).path
    return open_checkpoint(source, layout, **options)


def load_checkpoint(
    source: Anything,
    layout: str | None = None,
    preset: str | None = None,
    config: SwinHFConfig | None = None,
    *,
    model_class: type[Any] | None = None,
    revision: str | None = None,
    weights: Weights | None = None,
    image_size: Size | None = None,
    window_size: Size | None = None,
) -> Any:
    """Load a Swin checkpoint of any layout, from this machine or from the Hub.

    The layout is detected, the sizes are derived from the shapes of the weights, and one line is logged with both.
    Image size and class names come from ``config.json`` next to the file where there is one, else from the preset of
    these sizes. ``shift_per_axis`` is set as the program of the layout computes.

    Args:
        source: A file (``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.ckpt``), a folder, a run folder, a repository
            on the Hub (see :mod:`swin_hf.loading`), or a state dict.
        layout: ``swin_hf``, ``microsoft``, ``timm``, ``torchvision``, ``transformers`` (any of its namings, on disk or
            in memory) or ``openmmlab``, or a finer name out of ``swin_hf.checkpoints.LAYOUTS``; None detects it.
        preset: Name of the released model that it is; other windows and another image size are resampled to those.
        config: The same as a configuration; its ``shift_per_axis`` is replaced by the layout's.
        model_class: Class to build; by default a segmenter if the file has its head, else a classifier, whose head is
            new if the file has none. Give ``SwinHFForMaskedImageModeling`` to keep the decoder of a SimMIM file and
            ``SwinHFBackbone`` for the file of a detector.
        revision: Branch, tag or commit id on the Hub.
        weights: ``"ema"`` or ``"raw"`` where the file holds both; by default the ones that its own program loads.
        image_size: Resample for this image size, in pixels.
        window_size: Resample the bias tables for these windows.

    Returns:
        A model in evaluation mode, in the dtype of the file.

    Raises:
        ValueError: If the file cannot be read safely, is of another architecture, has unknown or missing keys, or
            contradicts the preset or config.
        OSError: If it may not be read.
        HubError: If the Hub refuses, or cannot be reached.
    """
    sizes = {"image_size": image_size, "window_size": window_size}
    checkpoint = open_source(source, layout, preset=preset, config=config, revision=revision, weights=weights, **sizes)
    logger.info("%s", checkpoint)
    return build_model(checkpoint, model_class)


def convert_checkpoint(
    source: Anything | Checkpoint,
    destination: str | os.PathLike[str],
    *,
    to: str,
    layout: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Rewrite a checkpoint in another layout, with its head, decoder or stage norms.

    ``config.json`` and ``preprocessor_config.json`` are written too. After a failure, no incomplete file is left.

    Args:
        source: See :func:`load_checkpoint`.
        destination: A file, if it has the suffix of one (``.safetensors``, ``.pth``, ``.pt``, ``.bin``), else a
            folder. Folders of ``swin_hf`` and ``transformers`` are ready for ``from_pretrained``, those of ``timm``
            for ``timm.create_model("local-dir:...")``. The destination is returned.
        to: Layout to write.
        layout: Layout of the source; None detects it.
        overwrite: Whether files of these names may be replaced. Other files of a folder are never touched, and
            neither is a configuration in a folder with other weights.
        options: ``preset``, ``config``, ``revision``, ``weights``, ``image_size`` and ``window_size``, see
            :func:`load_checkpoint`.

    Raises:
        FileExistsError: If the destination exists and ``overwrite`` is off, or its folder holds the configuration of
            other weights.
        ValueError: If the source cannot be read (see :func:`load_checkpoint`) or the layout cannot hold it.
        OSError: If it cannot be written.
    """
    check_destination(Path(destination), to, overwrite)  # before anything is downloaded or read
    write_checkpoint(open_source(source, layout, **options), Path(destination), to, overwrite)
    return Path(destination)


def load_model(
    source: str | os.PathLike[str],
    model_class: type[Any] | str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    **options: Any,
) -> tuple[Any, Origin]:
    """Load a model, checked: configuration, names and shapes of its files agree before anything is built.

    Args:
        source: See :mod:`swin_hf.loading`.
        model_class: One of our model classes, or a task of ``swin_hf.families.TASKS`` for that of its family.
        revision: Branch, tag or commit id on the Hub.
        endpoint: Address of the Hub, see :func:`swin_hf.pull`.
        options: Keywords of ``from_pretrained``.

    Returns:
        The model in evaluation mode, and its origin.

    Raises:
        ValueError: If the model cannot be loaded.
        HubError: If the Hub refuses, or cannot be reached while the cache does not have the model.
    """
    origin = find_model(source, revision, endpoint=endpoint)
    if is_ours(origin.path):
        check_folder(origin.path)
    chosen = class_at(origin.path, model_class) if isinstance(model_class, str) else model_class
    return chosen.from_pretrained(origin.path, local_files_only=True, **options), origin


def load_backbone(
    source: str | os.PathLike[str], *, revision: str | None = None, endpoint: str | None = None, **overrides: Any
) -> SwinHFBackbone:
    """Load anyone's Swin as a backbone, from this machine or from the Hub, also offline.

    ``AutoBackbone.from_pretrained`` of transformers 5 asks the Hub whether a local folder exists there, and fails.
    Arguments and errors are those of :func:`load_model`; ``overrides`` are fields of the configuration, such as
    ``out_features=["stage2", "stage3"]``.
    """
    return load_model(source, "backbone", revision=revision, endpoint=endpoint, **overrides)[0]


def class_at(path: Path, task: str) -> Any:
    """Our class for a task, of the family of the model at a path."""
    config = path / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    kind = values.get("model_type") if values.get("model_type") in MODEL_TYPES else values.get("architecture")
    v2 = kind.startswith("swinv2") if isinstance(kind, str) else is_v2(read_source(path).state)
    return FAMILIES["swinv2_hf" if v2 else "swin_hf"].model_class(task)


def is_ours(path: Path) -> bool:
    """Whether this is a folder that ``save_pretrained`` wrote for a model of this package."""
    try:
        return (path / CONFIG).is_file() and bool(read_config(path / CONFIG))
    except OtherFamilyError:
        return False


def processor_of(model: Any, path: Path) -> BaseImageProcessor:
    """The image processor of a model that was loaded from a path: its own, else that of released models of its size.

    ValueError if its ``preprocessor_config.json`` names a class that transformers does not have.
    """
    _, values = getattr(model, "_processor", None) or (None, None)
    if values is None and is_ours(path) and (path / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    released = Preprocessing.of_release(model.config.image_hw, model.config.num_channels)
    return image_processor(released.values() if values is None else values)


def read_foreign(
    model_class: type[Any], source: str | os.PathLike[str], **where: Any
) -> tuple[Path | None, Any, dict[str, Any] | None, Any]:
    """Read, for ``from_pretrained`` of our classes, what is not a folder or a repository of this package.

    transformers' own conversion on load (``WeightConverter``) is not used: its rules belong to a class or a model type,
    so that a model that was built here would be saved under the other names too, and no rule can drop a tensor.

    Returns:
        The folder of a model of ours, if the source turns out to be one; else None, and the configuration, the weights
        under the keys of the class, and the values of ``preprocessor_config.json`` where they are known.

    Raises:
        OSError: If there is no such model, or the Hub refuses.
        ValueError: As :func:`load_checkpoint` does.
    """
    path, checkpoint = _open_foreign(source, **where)
    if checkpoint is None:
        return path, None, None, None
    state = state_for(checkpoint, model_class)
    return None, checkpoint.config, state, processor_values(checkpoint, checkpoint.config)


def read_foreign_config(source: str | os.PathLike[str], **where: Any) -> Any:
    """As :func:`read_foreign`, for our configurations; the sizes are derived from the weights."""
    path, checkpoint = _open_foreign(source, **where)
    return read_config(path / CONFIG) if checkpoint is None else checkpoint.config


def _open_foreign(
    source: str | os.PathLike[str], *, subfolder: str = "", force_download: bool = False, **where: Any
) -> tuple[Path, Checkpoint | None]:
    """The file or folder of a source, and its checkpoint if it is not of this package."""
    try:
        path = local_path(source) or find_model(source, **where).path
    except HubError as error:
        raise OSError(str(error)) from None  # as transformers does
    path = path / subfolder if subfolder else path
    if is_ours(path):
        return path, None
    checkpoint = open_checkpoint(path)
    checkpoint.config.dtype = checkpoint.dtype
    checkpoint.config.architectures = [class_for(checkpoint.place).__name__]
    return path, checkpoint
