"""Pull: one revision, only what loading needs, every byte compared with the Hub's hashes.

Weights are safetensors; a pickle is downloaded only where it is asked for, and nothing here opens it.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants

from swin_hf.checkpoints.detect import refuse_strangers
from swin_hf.checkpoints.read import IN_FOLDER
from swin_hf.files import replacing
from swin_hf.model.configuration_swin_hf import SwinHFConfig

from .facts import FACTS_NAME
from .remote import HubError, ask, checked_repo_id, client, has_digest
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
    shards_present,
)

DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SMALL = (CONFIG, PROCESSOR, FACTS_NAME, *CODE)
# Our note in a local_dir: which model is there, and the hashes of its files. The client ignores what is in this folder.
NOTE = Path(".cache/huggingface/swin_hf.json")


@dataclass(frozen=True)
class PullResult:
    """Where a model is, and which commit it is."""

    path: Path  # a folder for ``from_pretrained``; the file of weights where it has a name of its own
    commit: str  # of ``revision`` when it was looked up
    license: str | None = field(default=None, compare=False)  # of the weights, as the card names it, if it is known


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
        pickles: Whether a pickle may be downloaded where there is nothing else; loading runs no code of it.
        cache_dir: Another cache than that of huggingface_hub.
        token: By default that of the environment or the keyring.
        local_files_only: Whether to ask the cache alone.

    Raises:
        ValueError: When the repository id is malformed, or the model is not one that can be loaded: only pickles, no
            Swin, a configuration out of range, weights that do not fit it; or ``local_dir`` holds other files of a
            model.
        HubError: When the Hub refuses, cannot be reached while neither the cache nor ``local_dir`` has the model, or
            sent other bytes than its hashes say.
    """
    api = client(endpoint)
    api.token = token
    here = Path(local_dir).expanduser() if local_dir is not None else None
    job = _Pull(api, checked_repo_id(repo_id), revision, here, cache_dir, verify, file, pickles)
    if local_files_only:
        return job.offline("only local files were asked for")
    if constants.is_offline_mode():
        return job.offline("offline mode is on (HF_HUB_OFFLINE)")
    try:
        about = ask(api.model_info, repo_id, revision=revision, files_metadata=True)
    except HubError as error:
        if not error.transient:
            raise
        return job.offline(str(error))
    return job.online(about)


@dataclass(frozen=True)
class _Pull:
    """The steps of one pull, with the Hub or without it; the fields are arguments of :func:`pull`."""

    api: HfApi
    repo_id: str
    revision: str | None
    here: Path | None
    cache_dir: str | Path | None
    verify: bool
    file: str | None
    pickles: bool

    def online(self, about: ModelInfo) -> PullResult:
        """Download and compare; the configuration is checked before the weights are downloaded."""
        commit = str(about.sha)
        hashes = {entry.rfilename: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in about.siblings or ()}
        weights = self._weights(hashes)
        is_index = weights.endswith(".json")
        small = [name for name in (*SMALL, *([weights] if is_index else [])) if name in hashes]
        stale = self._prepare(hashes)
        folder = self._bring(commit, small) if small else Path()
        config = self._config(folder) if CONFIG in hashes else None
        large = shards_present(folder / weights, hashes) if is_index else [weights]
        folder = self._bring(commit, large)
        if config is not None:
            check_weights([folder / name for name in large], config)
        if self.here is not None:
            self._settle(self.here, commit, {name: hashes[name] for name in [*small, *large]}, stale)
        else:
            # The client points its cached branch or tag at a commit when it is asked by that name. It is asked last, so
            # that an interrupted pull still leads to the model before it.
            first, name = [*small, *large][0], self.revision or "main"
            ask(self.api.hf_hub_download, self.repo_id, first, revision=name, cache_dir=self.cache_dir)
        said = about.card_data.get("license") if about.card_data else None
        return PullResult(_path(folder, weights), commit, said if isinstance(said, str) else None)

    def offline(self, why: str) -> PullResult:
        """The files of an earlier pull: those in ``local_dir``, or those in the cache, copied where one is given."""
        if self.here is not None and (pulled := self._noted(self.here)):
            return pulled
        usual = ["*.safetensors", INDEX, *(f"*{suffix}" for suffix in PICKLES if self.pickles)]
        try:
            # Without patterns, the client would ask for files that a pull does not download.
            path = self.api.snapshot_download(
                self.repo_id,
                revision=self.revision,
                allow_patterns=[*SMALL, *([self.file] if self.file else usual)],
                local_files_only=True,
                cache_dir=self.cache_dir,
            )
        except Exception:
            raise HubError(
                f"{why}, and the cache does not hold {self.repo_id}{f' at {self.revision}' if self.revision else ''}; "
                "pull it once while the Hub can be reached"
            ) from None
        folder = Path(path)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        weights = self._weights(names)
        # A file of the cache is a link to one whose name is its hash, where the system has links.
        hashes = {name: (folder / name).resolve().name for name in [*_model_files(folder), weights]}
        if wrong := self._damaged_offline(folder, hashes):
            _drop(folder, wrong)
            raise HubError(
                f"{', '.join(wrong)} of {self.repo_id} is damaged in the cache, and was removed; pull again where the "
                "Hub can be reached"
            )
        self._check(folder)
        if self.here is None:
            return PullResult(_path(folder, weights), folder.name)
        stale = self._prepare(hashes)
        for name in hashes:
            (self.here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, self.here / name)
        self._settle(self.here, folder.name, hashes, stale)
        return PullResult(_path(self.here, weights), folder.name)

    def _weights(self, present: Collection[str]) -> str:
        """Name of the file, or of the index of the files, that holds the weights of the repository."""
        if self.file is not None:
            if self.file not in present:
                some = sorted(name for name in present if name.endswith((".safetensors", *PICKLES)))
                raise ValueError(
                    f"{self.repo_id} holds no {self.file}; its files of weights are {', '.join(some[:10]) or 'none'}"
                )
            return self.file
        at_the_top = sorted(name for name in present if "/" not in name)
        for suffixes in ((".safetensors",), PICKLES):
            usual = [
                name for name in IN_FOLDER if name in present and name.removesuffix(".index.json").endswith(suffixes)
            ]
            found = usual or [name for name in at_the_top if name.endswith(suffixes)]
            if not found:
                continue
            if suffixes == PICKLES and not self.pickles:
                raise ValueError(
                    f"{self.repo_id} holds pickled weights only ({', '.join(found[:3])}), which can run code when they "
                    "are opened, so nothing was downloaded; ask its owner for safetensors, or name the file to have it "
                    f"read without running anything: hf://{self.repo_id}/{found[0]}"
                )
            if len(found) > 1 and not usual:
                raise ValueError(
                    f"{self.repo_id} holds {len(found)} files of weights ({', '.join(found[:5])}); name one of them: "
                    f"hf://{self.repo_id}/{found[0]}"
                )
            return found[0]
        lacking = " and no ".join(name for name in (CONFIG, WEIGHTS) if name not in present)
        raise ValueError(f"{self.repo_id} holds no {lacking}; ask its owner to push the model again")

    def _config(self, folder: Path) -> SwinHFConfig | None:
        """The configuration, checked; None for a Swin of another package."""
        try:
            return read_config(folder / CONFIG)
        except OtherFamilyError:
            refuse_strangers(json.loads((folder / CONFIG).read_text(encoding="utf-8")), self.repo_id)
            return None

    def _check(self, folder: Path) -> None:
        if (folder / CONFIG).is_file() and self._config(folder) is not None:
            check_folder(folder)

    def _fetch(self, commit: str, names: list[str], again: bool = False) -> Path:
        options = {"local_dir": self.here, "cache_dir": self.cache_dir, "force_download": again}
        patterns = [glob.escape(name) for name in names]
        return Path(ask(self.api.snapshot_download, self.repo_id, revision=commit, allow_patterns=patterns, **options))

    def _bring(self, commit: str, names: list[str]) -> Path:
        """Download files and compare them with the hashes of the Hub; one that differs is downloaded once more."""
        folder = self._fetch(commit, names)
        if self.verify and (wrong := self._damaged(folder, commit, names)):
            self._fetch(commit, wrong, again=True)
            if wrong := self._damaged(folder, commit, wrong):
                _drop(folder, wrong)
                raise HubError(
                    f"{', '.join(wrong)} of {self.repo_id} did not arrive as the Hub has it, twice, and was removed; "
                    "check the network, a proxy or the mirror in HF_ENDPOINT, and pull again"
                )
        return folder

    def _damaged(self, folder: Path, commit: str, names: Collection[str]) -> list[str]:
        """Those of some files of a folder that differ from the Hub's, or are missing."""
        found = ask(self.api.verify_repo_checksums, self.repo_id, revision=commit, local_dir=folder)
        return sorted({*found.missing_paths, *(entry["path"] for entry in found.mismatches)}.intersection(names))

    def _damaged_offline(self, folder: Path, hashes: Mapping[str, str]) -> list[str]:
        """Those of some files that do not have the hash that was noted with them."""
        known = {name: digest for name, digest in hashes.items() if self.verify and DIGEST.fullmatch(digest)}
        return [name for name, digest in known.items() if not has_digest(folder / name, digest)]

    # -- local_dir ----------------------------------------------------------------------------------------------------

    def _prepare(self, hashes: Mapping[str, str | None]) -> list[str]:
        """Note in ``local_dir`` what may come, and return the files of another version, which are to be removed."""
        if self.here is None:
            return []
        noted = _read_note(self.here)["files"]
        stale = [name for name in _model_files(self.here) if name not in hashes]
        foreign = [name for name in stale if not any(has_digest(self.here / name, d) for d in noted.get(name, ()))]
        if foreign:
            raise ValueError(
                f"{self.here} holds {', '.join(foreign[:5])}, which {self.repo_id} does not have and which no pull left"
                " in this state; loading would mix them with the model, so nothing was downloaded: give another "
                "folder, or move them"
            )
        coming = {name: [digest] for name, digest in hashes.items() if digest}
        self._note(None, {name: [*noted.get(name, []), *coming.get(name, [])] for name in noted | coming})
        return stale

    def _settle(self, here: Path, commit: str, hashes: Mapping[str, str | None], stale: list[str]) -> None:
        """Remove the files of another version, and note what is here now, for a pull without the Hub."""
        for name in stale:
            (here / name).unlink(missing_ok=True)
        self._note(commit, {name: [digest or ""] for name, digest in hashes.items()})

    def _note(self, commit: str | None, files: Mapping[str, list[str]]) -> None:
        note = {"repo_id": self.repo_id, "revision": self.revision or "main", "commit": commit, "files": files}
        with replacing(Path(self.here or "", NOTE)) as partial:
            partial.write_text(json.dumps(note) + "\n", encoding="utf-8")

    def _noted(self, folder: Path) -> PullResult | None:
        """What an earlier pull wrote into a folder, if it is the requested commit, whole and nothing else."""
        note = _read_note(folder)
        commit, hashes = note["commit"], {name: digests[0] for name, digests in note["files"].items() if digests}
        asked_for = commit and note["repo_id"] == self.repo_id and self.revision in (None, note["revision"], commit)
        is_whole = all((folder / name).is_file() for name in hashes) and hashes.keys() >= {*_model_files(folder)}
        if not asked_for or not is_whole:
            return None
        if wrong := self._damaged_offline(folder, hashes):  # the user may have changed it on purpose
            raise HubError(f"{', '.join(wrong)} of {self.repo_id} is damaged in {folder}; delete it and pull again")
        self._check(folder)
        return PullResult(_path(folder, self._weights(hashes)), commit)


def _path(folder: Path, weights: str) -> Path:
    """What is loaded: the folder, where the weights have a name that is looked for in it."""
    return folder if weights in IN_FOLDER else folder / weights


def _model_files(folder: Path) -> list[str]:
    """The files of a folder that loading looks at, and that a pull may have written."""
    names = (path.name for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(name for name in names if is_ours(name) or name in (CONFIG, PROCESSOR))


def _drop(folder: Path, names: list[str]) -> None:
    """Remove files that are known to be wrong, and what they link to, so that no other program uses them."""
    for name in names:
        (folder / name).resolve().unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)


def _read_note(folder: Path) -> dict[str, Any]:
    """The note that pulls leave in a ``local_dir``: repository, revision, commit, and the hashes of each file."""
    empty: dict[str, Any] = {"repo_id": None, "revision": None, "commit": None, "files": {}}
    try:
        note = empty | json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return empty
    return note if isinstance(note["files"], dict) else empty
