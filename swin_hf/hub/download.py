"""Pull: one revision, only what loading needs, safetensors only, every byte compared with the Hub's hashes."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile

from swin_hf.files import replacing
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFBackbone

from .facts import FACTS_NAME
from .remote import HubError, attempt, checked_repo_id, client
from .staging import CODE, is_ours
from .weights import (
    CONFIG,
    INDEX,
    PICKLES,
    PROCESSOR,
    WEIGHTS,
    OtherFamilyError,
    check_folder,
    check_weights,
    read_config,
    shard_names,
    weight_files,
)

COMMIT = re.compile(r"[0-9a-f]{40}")
CACHE = "the cache"
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Where the client notes commit and hash of each file of a local_dir, and where we note which files a pull wrote there.
NOTES, SOURCE = Path(".cache/huggingface/download"), Path(".cache/huggingface/swin_hf.json")


@dataclass(frozen=True)
class PullResult:
    """Where a model is, and which commit it is.

    Attributes:
        path: A folder for ``from_pretrained``.
        commit: Commit id of ``revision`` when it was looked up.
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
    folder loadable elsewhere). Files that are in the cache are not downloaded again; if the Hub cannot be reached, the
    cached model is used.

    Args:
        repo_id: ``user/name``.
        revision: Branch, tag or commit id; ``main`` by default.
        local_dir: A folder for the files, instead of the shared cache. Files of another version that a pull left there
            are removed, because loading would prefer them; files of these names that pull did not write are refused.
        verify: Whether every file is hashed and compared.
        endpoint: Address of the Hub; HF_ENDPOINT or huggingface.co by default.

    Raises:
        ValueError: When the repository id is malformed, or the model is not one that can be loaded: only pickles, a
            configuration out of range, weights that do not fit it; or ``local_dir`` holds other files of a model.
        HubError: When the Hub refuses, cannot be reached while neither the cache nor ``local_dir`` has the model, or
            sent other bytes than its hashes say.
    """
    repo_id = checked_repo_id(repo_id)
    api = client(endpoint)
    here = Path(local_dir).expanduser() if local_dir is not None else None
    fetch = _fetcher(api, repo_id, here)
    if constants.is_offline_mode():
        return _offline(repo_id, revision, here, verify, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        commit = str(attempt(lambda: api.model_info(repo_id, revision=revision), repo_id).sha)
        tree = attempt(lambda: list(api.list_repo_tree(repo_id, revision=commit, recursive=True)), repo_id)
    except HubError as error:
        if not error.transient:
            raise
        return _offline(repo_id, revision, here, verify, str(error))
    present = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    _refuse_pickles(repo_id, present)
    stale = _stale_files(here, present, repo_id) if here is not None else []

    small = [name for name in (CONFIG, PROCESSOR, FACTS_NAME, INDEX, *CODE) if name in present]
    # Compare a file before it is read: a damaged download must not look like a damaged model, nor stay in the cache.

    def bring(names: list[str]) -> Path:
        return _bring(repo_id, commit, {name: present[name] for name in names}, fetch, verify)

    folder = bring(small)
    values, config = _config(folder)
    names = [WEIGHTS] if WEIGHTS in present else shard_names(folder / INDEX, present)
    bring(names)
    if config is not None:
        check_weights([folder / name for name in names], values, config)
    if here is None:
        _write_ref(folder.parent.parent, revision or "main", commit)
    else:
        _settle(here, repo_id, revision, commit, stale)
    return PullResult(folder, commit)


def load_backbone(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    **overrides: Any,
) -> SwinHFBackbone:
    """Load a checkpoint of this family as a backbone, from a folder or from the Hub, offline too.

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
    check_folder(folder)
    backbone: SwinHFBackbone = SwinHFBackbone.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, **overrides
    )
    return backbone


Fetch = Callable[[str, list[str], bool], Path]


def _fetcher(api: HfApi, repo_id: str, local_dir: Path | None) -> Fetch:
    """A function that downloads files of a commit and returns their folder."""

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


def _bring(repo_id: str, commit: str, expected: dict[str, RepoFile], fetch: Fetch, verify: bool) -> Path:
    """Download files and compare them with the hashes of the Hub; one that differs is downloaded once more."""
    folder = fetch(commit, list(expected), False)
    if not verify:
        return folder
    wrong = [name for name, entry in expected.items() if not _intact(folder / name, entry)]
    if wrong:
        fetch(commit, wrong, True)
        wrong = [name for name in wrong if not _intact(folder / name, expected[name])]
    if wrong:
        for name in wrong:
            _drop(folder / name)
        raise HubError(
            f"{', '.join(wrong)} of {repo_id} did not arrive as the Hub has it, twice, and was removed; "
            "check the network, a proxy or the mirror in HF_ENDPOINT, and pull again"
        )
    return folder


def _drop(path: Path) -> None:
    """Remove a file that is known to be wrong, and the blob it links to, so that no other program uses it."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


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


def _write_ref(cache: Path, revision: str, commit: str) -> None:
    """Point the cached branch or tag at a commit, as the last step: an interrupted pull still leads to the old model.

    The client does so when it looks a revision up, before the files are there; ``from_pretrained`` would then find half
    a model offline.
    """
    path = cache / "refs" / revision
    if COMMIT.fullmatch(revision) or (cache / "refs").resolve() not in path.resolve().parents:
        return
    with replacing(path) as partial:
        partial.write_text(commit, encoding="utf-8")


# -- local_dir --------------------------------------------------------------------------------------------------------


def _owned_files(folder: Path) -> list[str]:
    """The files of a folder that a pull may have brought, by their names; loading looks at each of them."""
    names = (path.name for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(name for name in names if is_ours(name) or name in (CONFIG, PROCESSOR))


def _note(folder: Path, name: str) -> tuple[str, str] | None:
    """Commit and hash of a file of a ``local_dir`` as the client noted them; None if it did not bring the file."""
    path = folder / NOTES / f"{name}.metadata"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return (lines[0], lines[1]) if len(lines) >= 2 else None


def _stale_files(folder: Path, present: Collection[str], repo_id: str) -> list[str]:
    """Files that a pull of another version wrote into a folder, and that this version does not have.

    Raises:
        ValueError: When such a file was not written by pull, or was changed since.
    """
    stale = [name for name in _owned_files(folder) if name not in present]
    notes = {name: _note(folder, name) for name in stale}
    foreign = [name for name, note in notes.items() if note is None or not _has_digest(folder / name, note[1])]
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:5])}, which {repo_id} does not have and which no pull left in this "
            "state; loading would mix them with the model, so nothing was downloaded: give another folder, or move them"
        )
    return stale


def _settle(folder: Path, repo_id: str, revision: str | None, commit: str, stale: list[str]) -> None:
    """Remove the files of another version, and note what is here now, for a pull without the Hub."""
    for name in stale:
        (folder / name).unlink(missing_ok=True)
        (folder / NOTES / f"{name}.metadata").unlink(missing_ok=True)
    source = {"repo_id": repo_id, "revision": revision or "main", "commit": commit}
    with replacing(folder / SOURCE) as partial:
        partial.write_text(json.dumps(source) + "\n", encoding="utf-8")


def _pulled_commit(folder: Path, repo_id: str, revision: str | None) -> str | None:
    """The commit that an earlier pull wrote into a folder, if it is the requested one and every file belongs to it."""
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        commit = str(source["commit"])
        asked_for = source["repo_id"] == repo_id and revision in (None, source["revision"], commit)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    noted = [path.name.removesuffix(".metadata") for path in (folder / NOTES).glob("*.metadata")]
    brought = {name for name in noted if (note := _note(folder, name)) and note[0] == commit}
    whole = brought.issuperset(_owned_files(folder)) and all((folder / name).is_file() for name in brought)
    return commit if asked_for and whole else None


# -- without the Hub --------------------------------------------------------------------------------------------------


def _offline(repo_id: str, revision: str | None, here: Path | None, verify: bool, why: str) -> PullResult:
    """The files of an earlier pull: those in ``local_dir``, or a copy of those in the cache."""
    if here is not None and (commit := _pulled_commit(here, repo_id, revision)):
        hashes = {name: note[1] for name in _owned_files(here) if (note := _note(here, name))}
        return _checked(repo_id, here, str(here), commit, hashes if verify else {})
    try:
        # Without patterns, the client would ask for files that a pull does not download.
        needed = [CONFIG, PROCESSOR, WEIGHTS, INDEX, FACTS_NAME, *CODE, "model-?????-of-?????.safetensors"]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=needed, local_files_only=True))
    except Exception:
        raise HubError(
            f"{why}, and the cache does not hold {repo_id}{f' at {revision}' if revision else ''}; pull it once while "
            "the Hub can be reached"
        ) from None
    # The names of the cache's blobs are their hashes.
    hashes = {path.name: path.resolve().name for path in sorted(folder.iterdir())}
    pulled = _checked(repo_id, folder, CACHE, folder.name, hashes if verify else {})
    return pulled if here is None else _copy(pulled, here, repo_id, revision)


def _checked(repo_id: str, folder: Path, where: str, commit: str, hashes: dict[str, str]) -> PullResult:
    """Check a downloaded model against the hashes that were noted with it, and against its configuration."""
    known = {name: digest for name, digest in hashes.items() if DIGEST.fullmatch(digest)}
    wrong = [name for name, digest in known.items() if not _has_digest(folder / name, digest)]
    if wrong and where == CACHE:
        for name in wrong:
            _drop(folder / name)
        raise HubError(
            f"{', '.join(wrong)} of {repo_id} is damaged in {where}, and was removed; pull again where the Hub can be "
            "reached"
        )
    if wrong:  # a folder of the user's: it may have been changed on purpose
        raise HubError(f"{', '.join(wrong)} of {repo_id} is damaged in {where}; delete it and pull again")
    values, config = _config(folder)
    weights = weight_files(folder)
    if config is not None:
        check_weights(weights, values, config)
    return PullResult(folder, commit)


def _copy(pulled: PullResult, here: Path, repo_id: str, revision: str | None) -> PullResult:
    """Copy a model out of the cache, with the notes that the client writes into a ``local_dir``."""
    names = _owned_files(pulled.path)
    stale = _stale_files(here, names, repo_id)
    (here / NOTES).mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(pulled.path / name, here / name)
        digest = (pulled.path / name).resolve().name
        note = f"{pulled.commit}\n{digest}\n{time.time()}\n"
        (here / NOTES / f"{name}.metadata").write_text(note, encoding="utf-8")
    _settle(here, repo_id, revision, pulled.commit, stale)
    return PullResult(here, pulled.commit)
