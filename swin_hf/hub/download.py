"""Pull: one revision, only what loading needs, every byte compared with the Hub's hashes.

Weights are safetensors; a pickle is brought only where it is asked for, and nothing here opens it.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile

from swin_hf.checkpoints.detect import refuse_strangers
from swin_hf.checkpoints.read import IN_FOLDER
from swin_hf.files import replacing
from swin_hf.model.configuration_swin_hf import SwinHFConfig

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
        path: A folder for ``from_pretrained``; the file of weights where it has a name of its own.
        commit: Commit id of ``revision`` when it was looked up.
        license: What the card names as the licence of the weights; None where it is not known.
    """

    path: Path
    commit: str
    license: str | None = field(default=None, compare=False)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    verify: bool = True,
    endpoint: str | None = None,
    file: str | None = None,
    pickles: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> PullResult:
    """Download a model, and make sure that it is what the Hub says.

    The revision is looked up once, and everything comes from that commit: configuration, image processor, safetensors
    weights, facts of the training, and the travelling core files (they are never run by this package, but keep the
    folder loadable elsewhere). Files that are in the cache are not downloaded again; if the Hub cannot be reached, the
    cached model is used.

    Args:
        repo_id: ``user/name``, of a model of this package or of anyone's Swin.
        revision: Branch, tag or commit id; ``main`` by default.
        local_dir: A folder for the files, instead of the shared cache. Files of another version that a pull left there
            are removed, because loading would prefer them; files of these names that pull did not write are refused.
        verify: Whether every file is hashed and compared.
        endpoint: Address of the Hub; HF_ENDPOINT or huggingface.co by default.
        file: Name of the file of weights, for a repository with several or with a pickle.
        pickles: Whether a pickle may be brought where there is nothing else; loading runs no code of it.
        cache_dir: Another cache.
        token: Access token; by default that of the environment or the keyring.
        local_files_only: Whether to ask the cache alone.

    Raises:
        ValueError: When the repository id is malformed, or the model is not one that can be loaded: only pickles, no
            Swin, a configuration out of range, weights that do not fit it; or ``local_dir`` holds other files of a
            model.
        HubError: When the Hub refuses, cannot be reached while neither the cache nor ``local_dir`` has the model, or
            sent other bytes than its hashes say.
    """
    repo_id = checked_repo_id(repo_id)
    api = client(endpoint)
    api.token = token
    here = Path(local_dir).expanduser() if local_dir is not None else None
    fetch = _fetcher(api, repo_id, here, cache_dir)
    if constants.is_offline_mode() or local_files_only:
        why = "only local files were asked for" if local_files_only else "offline mode is on (HF_HUB_OFFLINE)"
        return _offline(repo_id, revision, here, verify, why, (file, pickles), cache_dir)
    try:
        about = attempt(lambda: api.model_info(repo_id, revision=revision), repo_id)
        commit = str(about.sha)
        tree = attempt(lambda: list(api.list_repo_tree(repo_id, revision=commit, recursive=True)), repo_id)
    except HubError as error:
        if not error.transient:
            raise
        return _offline(repo_id, revision, here, verify, str(error), (file, pickles), cache_dir)
    present = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    weights = _weights(repo_id, list(present), file, pickles)
    stale = _stale_files(here, present, repo_id) if here is not None else []

    small = [name for name in (CONFIG, PROCESSOR, FACTS_NAME, *CODE) if name in present]
    small += [weights] if weights.endswith(".json") else []
    # Compare a file before it is read: a damaged download must not look like a damaged model, nor stay in the cache.

    def bring(names: list[str]) -> Path:
        return _bring(repo_id, commit, {name: present[name] for name in names}, fetch, verify)

    folder = bring(small) if small else Path()
    values, config = _config(folder, repo_id) if CONFIG in present else ({}, None)
    names = shard_names(folder / weights, present) if weights.endswith(".json") else [weights]
    folder = bring(names)
    if config is not None:
        check_weights([folder / name for name in names], values, config)
    if here is None:
        _write_ref(folder.parent.parent, revision or "main", commit)
    else:
        _settle(here, repo_id, revision, commit, stale)
    said = about.card_data.get("license") if about.card_data else None
    return PullResult(_path(folder, weights), commit, said if isinstance(said, str) else None)


def _path(folder: Path, weights: str) -> Path:
    """What is loaded: the folder, where the weights have a name that is looked for in it."""
    return folder if weights in IN_FOLDER else folder / weights


def _weights(repo_id: str, present: list[str], file: str | None, pickles: bool) -> str:
    """Name of the file, or of the index of the files, that holds the weights of a repository."""
    if file is not None:
        if file not in present:
            some = sorted(name for name in present if name.endswith((".safetensors", *PICKLES)))
            raise ValueError(f"{repo_id} holds no {file}; its files of weights are {', '.join(some[:10]) or 'none'}")
        return file
    at_the_top = sorted(name for name in present if "/" not in name)
    for suffixes in ((".safetensors",), PICKLES):
        usual = [name for name in IN_FOLDER if name in present and name.removesuffix(".index.json").endswith(suffixes)]
        found = usual or [name for name in at_the_top if name.endswith(suffixes)]
        if not found:
            continue
        if suffixes == PICKLES and not pickles:
            raise ValueError(
                f"{repo_id} holds pickled weights only ({', '.join(found[:3])}), which can run code when they are "
                f"opened, so nothing was downloaded; ask its owner for safetensors, or name the file to have it read "
                f"without running anything: hf://{repo_id}/{found[0]}"
            )
        if len(found) > 1 and not usual:
            raise ValueError(
                f"{repo_id} holds {len(found)} files of weights ({', '.join(found[:5])}); name one of them: "
                f"hf://{repo_id}/{found[0]}"
            )
        return found[0]
    lacking = " and no ".join(name for name in (CONFIG, WEIGHTS) if name not in present)
    raise ValueError(f"{repo_id} holds no {lacking}; ask its owner to push the model again")


Fetch = Callable[[str, list[str], bool], Path]


def _fetcher(api: HfApi, repo_id: str, local_dir: Path | None, cache_dir: str | Path | None) -> Fetch:
    """A function that downloads files of a commit and returns their folder."""

    def fetch(commit: str, names: list[str], again: bool) -> Path:
        return Path(
            attempt(
                lambda: snapshot_download(
                    repo_id,
                    revision=commit,
                    allow_patterns=[glob.escape(name) for name in names],
                    local_dir=local_dir,
                    cache_dir=cache_dir,
                    token=api.token,
                    force_download=again,
                    endpoint=api.endpoint,
                    library_name="swin_hf",
                ),
                repo_id,
            )
        )

    return fetch


def _config(folder: Path, repo_id: str) -> tuple[dict[str, Any], SwinHFConfig | None]:
    """The configuration, checked before the weights are downloaded; None for a Swin of another package."""
    try:
        return read_config(folder / CONFIG)
    except OtherFamilyError:
        refuse_strangers(json.loads((folder / CONFIG).read_text(encoding="utf-8")), repo_id)
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


def _offline(
    repo_id: str,
    revision: str | None,
    here: Path | None,
    verify: bool,
    why: str,
    asked: tuple[str | None, bool],
    cache_dir: str | Path | None,
) -> PullResult:
    """The files of an earlier pull: those in ``local_dir``, or a copy of those in the cache."""
    if here is not None and (commit := _pulled_commit(here, repo_id, revision)):
        hashes = {name: note[1] for name in _owned_files(here) if (note := _note(here, name))}
        return _checked(repo_id, here, str(here), commit, hashes if verify else {})
    file, pickles = asked
    weights = [file] if file else ["*.safetensors", INDEX, *(f"*{suffix}" for suffix in PICKLES if pickles)]
    try:
        # Without patterns, the client would ask for files that a pull does not download.
        needed = [CONFIG, PROCESSOR, FACTS_NAME, *CODE, *weights]
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=needed, local_files_only=True, cache_dir=cache_dir
            )
        )
    except Exception:
        raise HubError(
            f"{why}, and the cache does not hold {repo_id}{f' at {revision}' if revision else ''}; pull it once while "
            "the Hub can be reached"
        ) from None
    names = [path.name for path in sorted(folder.iterdir())]
    found = _weights(repo_id, [*names, *(name for name in weights if (folder / name).is_file())], *asked)
    # The names of the cache's blobs are their hashes.
    hashes = {name: (folder / name).resolve().name for name in [*names, found] if (folder / name).is_file()}
    pulled = _checked(repo_id, folder, CACHE, folder.name, hashes if verify else {}, found)
    return pulled if here is None else _copy(pulled, here, repo_id, revision)


def _checked(
    repo_id: str, folder: Path, where: str, commit: str, hashes: dict[str, str], weights: str = WEIGHTS
) -> PullResult:
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
    values, config = _config(folder, repo_id) if (folder / CONFIG).is_file() else ({}, None)
    if config is not None:
        check_weights(weight_files(folder), values, config)
    return PullResult(_path(folder, weights), commit)


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
