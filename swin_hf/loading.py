"""Where a model is: a folder, the folder of a training run, a checkpoint file, or a repository on the Hub."""

import os
import re
from pathlib import Path

from swin_hf.files import WEIGHT_SUFFIXES

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def local_path(source: str | os.PathLike[str]) -> Path | None:
    """The file or folder that a source means, ``model/`` for the folder of a training run.

    Args:
        source: A path, or ``user/name`` or ``user/name@revision`` on the Hub.

    Returns:
        The path; None for a repository of the Hub.

    Raises:
        ValueError: If it is a path that does not exist, or a folder without a model. The network is not asked.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        has_weights = any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir())
        return path if has_weights or (path / "config.json").is_file() else _run_model(path)
    if path.exists():
        return path
    is_path = isinstance(source, os.PathLike) or path.suffix.lower() in WEIGHT_SUFFIXES or path.parent.is_dir()
    if is_path or not _HUB_ID.fullmatch(str(source)):
        raise ValueError(
            f"{str(source)!r} does not exist; give the folder of a model or of a training run, a checkpoint file, or "
            "user/name of a model on the Hub"
        )
    return None


def split_hub_id(source: str) -> tuple[str, str | None]:
    """Repository and revision of ``user/name@revision``."""
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r} is not user/name or user/name@revision")
    return match["id"], match["revision"]


def find_model(source: str | os.PathLike[str]) -> Path:
    """The file or folder of a model; one on the Hub is pulled, or taken from the cache.

    Raises:
        ValueError: As :func:`local_path` does, and for a repository that holds no model of ours.
        HubError: If the Hub refuses, or cannot be reached while the cache does not have the model.
    """
    path = local_path(source)
    if path is not None:
        return path
    from swin_hf.hub import HubError, pull  # and with it torch, which a path that does not exist need not wait for

    repo_id, revision = split_hub_id(str(source))
    try:
        return pull(repo_id, revision=revision).path
    except HubError as error:
        raise HubError(f"there is no folder {source} here, and {error}", error.transient) from None


def _run_model(folder: Path) -> Path:
    from swin_hf.hub.staging import model_folder

    return model_folder(folder)
