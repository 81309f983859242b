"""Pull: one revision, only what loading needs, safetensors only, every byte compared with the Hub's hashes."""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile

from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFBackbone

from .facts import FACTS_NAME
from .remote import HubError, attempt, checked_repo_id, client
from .staging import CORE
from .weights import (
    CONFIG,
    INDEX,
    PICKLES,
    PROCESSOR,
    WEIGHTS,
    OtherFamilyError,
    check_weights,
    read_config,
    shard_names,
    weight_files,
)

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PullResult:
    """Where a model lies, and which commit it is.

    Attributes:
        path: A folder for ``from_pretrained``.
        commit: The commit id that ``revision`` stood for.
    """

    path: Path
    commit: str


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    verify: bool = True,
    endpoint: str | None = None,
) -> PullResult:
    """Download a model, and make sure that it is what the Hub says.

    The revision is looked up once, and everything comes from that commit: configuration, image processor, safetensors
    weights, facts of the training, and the travelling core files (they are never run by this package, but keep the
    folder loadable elsewhere). What is in the cache already is not downloaded again, and when the Hub cannot be reached
    the cache answers.

    Args:
        repo_id: ``user/name``.
        revision: Branch, tag or commit id; ``main`` by default.
        local_dir: A folder for the files, instead of the shared cache.
        verify: Whether every file is hashed and compared.
        endpoint: Address of the Hub; HF_ENDPOINT or huggingface.co by default.

    Raises:
        ValueError: When the repository id is malformed, or the model is not one that can be loaded: only pickles, a
            configuration out of range, weights that do not fit it.
        HubError: When the Hub refuses, cannot be reached while the cache has nothing, or sent something else than it
            has.
    """
    repo_id = checked_repo_id(repo_id)
    api = client(endpoint)
    fetch = _fetcher(api, repo_id, Path(local_dir).expanduser() if local_dir is not None else None)
    if constants.is_offline_mode():
        return _from_cache(repo_id, revision, fetch, verify, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        commit = str(attempt(lambda: api.model_info(repo_id, revision=revision), repo_id).sha)
        tree = attempt(lambda: list(api.list_repo_tree(repo_id, revision=commit, recursive=True)), repo_id)
    except HubError as error:
        if not error.transient:
            raise
        return _from_cache(repo_id, revision, fetch, verify, str(error))
    if local_dir is None:
        with suppress(Exception):  # only so that the name of the revision is known offline too
            api.resolve_revision(repo_id, revision=revision)
    present = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    _refuse_pickles(repo_id, present)

    small = [name for name in (CONFIG, PROCESSOR, FACTS_NAME, INDEX, *CORE) if name in present]
    folder = fetch(commit, small, False)
    values, config = _config(folder)
    if WEIGHTS in present:
        names = [WEIGHTS]
    else:
        names = shard_names(folder / INDEX, present)
    folder = fetch(commit, names, False)
    if verify:
        _verify(repo_id, commit, folder, {name: present[name] for name in (*small, *names)}, fetch)
    if config is not None:
        check_weights([folder / name for name in names], values, config)
    return PullResult(folder, commit)


def load_backbone(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    **overrides: Any,
) -> SwinHFBackbone:
    """Load a checkpoint of this family as a backbone, from a folder or from the Hub, also offline.

    ``AutoBackbone.from_pretrained`` of transformers 5 asks the Hub whether a local folder exists there, and fails.

    Args:
        source: A folder, or the id of a repository.
        revision: Branch, tag or commit id on the Hub.
        endpoint: Address of the Hub, see :func:`pull`.
        overrides: Fields of the configuration, such as ``out_features=["stage2", "stage3"]``.

    Raises:
        ValueError: As :func:`pull` does, and for a folder likewise.
        HubError: As :func:`pull` does.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if isinstance(source, os.PathLike) or folder.is_absolute() or str(source).startswith((".", "~")):
            raise ValueError(f"there is no folder {source}; give the folder of a saved model or user/name on the Hub")
        folder = pull(str(source), revision=revision, endpoint=endpoint).path
    elif revision is not None:
        raise ValueError(f"{source} is a folder, which has no revision {revision!r}; leave it out or give user/name")
    values, config = read_config(folder / CONFIG)
    check_weights(weight_files(folder), values, config)
    backbone: SwinHFBackbone = SwinHFBackbone.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, **overrides
    )
    return backbone


Fetch = Callable[[str, list[str], bool], Path]


def _fetcher(api: HfApi, repo_id: str, local_dir: Path | None) -> Fetch:
    """A function that brings files of a commit here and returns their folder."""

    def fetch(commit: str, names: list[str], again: bool) -> Path:
        # The names are ours or fit SHARD: none of them holds a character that a pattern treats as special.
        return Path(
            attempt(
                lambda: snapshot_download(
                    repo_id,
                    revision=commit,
                    allow_patterns=names,
                    local_dir=local_dir,
                    force_download=again,
                    endpoint=api.endpoint,
                    library_name="swin_hf",
                ),
                repo_id,
            )
        )

    return fetch


def _refuse_pickles(repo_id: str, present: dict[str, RepoFile]) -> None:
    if CONFIG not in present:
        raise ValueError(f"{repo_id} holds no {CONFIG}; it is not a model that from_pretrained could load")
    if WEIGHTS in present or INDEX in present:
        return
    pickles = sorted(name for name in present if name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{repo_id} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when they are "
            "opened, so nothing was downloaded; ask its owner for safetensors, or rewrite a file that you trust: "
            "swin-hf convert FILE FOLDER --to swin_hf"
        )
    raise ValueError(f"{repo_id} holds no {WEIGHTS}; ask its owner to push the model again")


def _config(folder: Path) -> tuple[dict[str, Any], SwinHFConfig | None]:
    """The configuration, checked before the weights are downloaded; None for a model of another family."""
    try:
        return read_config(folder / CONFIG)
    except OtherFamilyError:
        return {}, None


def _verify(repo_id: str, commit: str, folder: Path, expected: dict[str, RepoFile], fetch: Fetch) -> None:
    """Compare files with the hashes of the Hub; one that differs is downloaded once more."""

    def differing(names: list[str]) -> list[str]:
        return [name for name in names if not _intact(folder / name, expected[name])]

    wrong = differing(list(expected))
    if wrong:
        fetch(commit, wrong, True)
        wrong = differing(wrong)
    if wrong:
        for name in wrong:  # what is known to be wrong must not be found in the cache by the next program
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        raise HubError(
            f"{', '.join(wrong)} of {repo_id} did not arrive as the Hub has it, twice, and was removed; "
            "check the network, a proxy or the mirror in HF_ENDPOINT, and pull again"
        )


def _intact(path: Path, entry: RepoFile) -> bool:
    digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
    return path.is_file() and path.stat().st_size == entry.size and _has_digest(path, digest)


def _has_digest(path: Path, digest: str) -> bool:
    """Whether a file has a sha256 (64 digits) or the id that git gives to its content (40 digits)."""
    with path.open("rb") as stream:
        if len(digest) == 64:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest
        content = stream.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == digest


def _from_cache(repo_id: str, revision: str | None, fetch: Fetch, verify: bool, why: str) -> PullResult:
    """What an earlier pull left in the cache; the names of the cache's blobs are their hashes."""
    try:
        # Without patterns the client would miss the files that a pull leaves on the Hub.
        needed = [CONFIG, PROCESSOR, WEIGHTS, INDEX, FACTS_NAME, *CORE, "model-?????-of-?????.safetensors"]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=needed, local_files_only=True))
    except Exception:
        raise HubError(
            f"{why}, and the cache does not hold {repo_id}{f' at {revision}' if revision else ''}; pull it once while "
            "the Hub can be reached"
        ) from None
    values, config = _config(folder)
    weights = weight_files(folder)
    if verify:
        for path in sorted(folder.iterdir()):
            name = path.resolve().name
            if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) and not _has_digest(path, name):
                raise HubError(
                    f"{path.name} of {repo_id} is damaged in the cache; delete {path.resolve()} and pull again"
                )
    if config is not None:
        check_weights(weights, values, config)
    return PullResult(folder, folder.name)
