"""Push: one commit that is there as a whole or not at all, compared byte for byte with the local files.

``upload_folder`` splits a push into several commits, ``push_to_hub`` makes one commit for each part, and neither checks
what arrived. Here everything is staged and checked first; one commit follows, on top of the head that was seen; if its
answer is lost, the Hub is asked what the head is; and the tag is put on the commit's id, not on a branch.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from transformers import PreTrainedModel

from swin_hf.files import full_disk

from .model_card import CARD_NAME, is_edited
from .remote import HubError, ask, attempt, checked_ref, checked_repo_id, client, has_digest, require_token, understand
from .staging import Card, PushedFile, Stage, is_ours, stage


@dataclass(frozen=True)
class PushResult:
    """What a push did, or with ``dry_run`` would do."""

    commit: str | None  # that holds the files; None for a dry run
    url: str  # of that commit's tree
    tag: str | None  # on the commit, if one was asked for
    files: tuple[PushedFile, ...]  # of the model, sent or already there; not the card when that on the Hub was kept
    card: str  # text of this push's; the Hub has another one if an edited card was kept there
    created: bool = False  # whether a commit was made; not when everything was there already
    notes: tuple[str, ...] = ()  # what the user should know, for example that an edited card was kept


def push(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    include_code: bool = True,
    card: Card | str | os.PathLike[str] | None = None,
    processor: Any = None,
    license: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> PushResult:
    """Publish a model on the Hub in one commit.

    Pushing the same thing twice makes no second commit, and repeating a push that broke off completes it. The access
    token is taken from HF_TOKEN or from the keyring of ``hf auth login``.

    Args:
        model_or_folder: A model of this package; the folder of a saved one; or the folder of a training run.
        repo_id: ``user/name``; the repository is made if it does not exist.
        tag: A new tag for the commit, such as ``v1.0``.
        private: Visibility of a new repository. One that exists must have it already; None takes any.
        revision: The branch to commit to, made if there is none; ``main`` by default.
        dry_run: Only return what would be sent; the network is not touched.
        include_code: Whether to send the code of the model, so that ``trust_remote_code=True`` works without swin_hf.
        card: A card written by hand, its text or its path, instead of the rendered one; or a :class:`Card`.
        processor: Image processor, for a model or a folder without one.
        license: Identifier of the licence of the weights, such as ``apache-2.0``.
        message: Title of the commit.
        endpoint: Address of the Hub; HF_ENDPOINT or huggingface.co by default.

    Raises:
        ValueError: When an argument, the folder or the card is not fit to be sent; nothing was sent.
        HubError: When the Hub refused or could not be reached. The commit is then there as a whole or not at all.
    """
    branch = checked_ref(revision or "main", "branch")
    job = _Push(client(endpoint), checked_repo_id(repo_id), branch, tag, private)
    if tag is not None:
        checked_ref(tag, "tag")
    card = card if isinstance(card, Card) else Card(card)
    with tempfile.TemporaryDirectory(prefix="swin-hf-push-") as folder:
        try:
            staged = stage(
                model_or_folder,
                Path(folder),
                repo_id=repo_id,
                tag=tag,
                include_code=include_code,
                card=card,
                processor=processor,
                license=license,
            )
        except Exception as error:
            if not isinstance(error, OSError) and full_disk(error) is None:  # safetensors only quotes the system
                raise
            raise OSError(f"{understand(error, repo_id)} (while preparing the push; nothing was sent)") from None
        return job.result(staged) if dry_run else job.run(staged, card.replace, message)


def check_access(repo_id: str) -> None:
    """Ask the Hub whether it would accept a push to a repository, or to make it, before a long run that ends in one.

    Raises:
        ValueError: When the id is malformed.
        HubError: When there is no token, it may not write there, or the Hub cannot be reached.
    """
    checked_repo_id(repo_id)
    require_token()
    api = client()
    if attempt(lambda: _info(api, repo_id), repo_id):
        ask(api.auth_check, repo_id, write=True)
        return
    account, owner = attempt(api.whoami, repo_id), repo_id.split("/")[0]
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read")]
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read" or owner not in owners:
        reason = "the token may only read" if role == "read" else f"the token belongs to {account['name']}"
        raise HubError(
            f"{repo_id} does not exist and cannot be made ({reason}); use a token that may write to {owner}, or push "
            f"to one of {', '.join(owners)}"
        )


def _info(api: HfApi, repo_id: str) -> ModelInfo | None:
    """What the Hub knows of a repository; None if it does not exist."""
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 401:
            api.whoami()  # raises if the token is not accepted, which has the same answer
        return None


@dataclass(frozen=True)
class _Push:
    """The requests of one push to the Hub, in order."""

    api: HfApi
    repo_id: str
    branch: str
    tag: str | None
    private: bool | None

    def run(self, staged: Stage, replace_card: bool, message: str | None) -> PushResult:
        """Look, commit, compare, tag."""
        require_token()
        self._repository()
        parent, tags = self._refs()
        tag_target = tags.get(self.tag or "")
        base = tag_target or parent  # a tag is never moved: what it holds is what has to be sent
        present = self._tree(base)
        notes = []
        files = dict(staged.files)
        if self.tag is None:  # the card there pins a tag of this commit, and ours would not
            for tag in sorted(name for name, commit in tags.items() if commit == parent):
                card = staged.card_for(tag)
                if card is not None and _same(card, present.get(CARD_NAME)):
                    files[CARD_NAME] = card
        if CARD_NAME in present and not replace_card and self._keeps_card(base, present[CARD_NAME], files[CARD_NAME]):
            del files[CARD_NAME]
            notes.append(
                "the card on the Hub was edited by hand and is kept; --replace-card (Card(replace=True)) overwrites it"
            )
        stale = sorted(name for name in present if is_ours(name) and name not in files)
        changed = [file for file in files.values() if not _same(file, present.get(file.name))]
        if tag_target is not None and (changed or stale):
            raise HubError(
                f"tag {self.tag} of {self.repo_id} exists, on commit {tag_target[:12]}, and is never moved; choose "
                "another tag, or delete that one on the Hub first"
            )
        if base != parent:
            notes.append(f"tag {self.tag} holds this model already; {self.branch} has moved on to {parent[:12]}")
        commit, created = base, bool(changed or stale)
        if created:
            message = message or f"Upload {self.repo_id.split('/')[1]} with swin_hf"
            commit = self._commit(parent, changed, stale, message)
            arrived = self._tree(commit)
            if wrong := sorted(name for name, file in files.items() if not _same(file, arrived.get(name))):
                raise HubError(
                    f"commit {commit[:12]} of {self.repo_id} does not hold what was sent ({', '.join(wrong)}), and was "
                    "not tagged; run the command again to repair it"
                )
        if self.tag is not None and tag_target is None:
            self._put_tag(commit)
        return self.result(Stage(files, staged.card), commit, created, tuple(notes))

    def result(
        self, staged: Stage, commit: str | None = None, created: bool = False, notes: tuple[str, ...] = ()
    ) -> PushResult:
        """What was pushed, or would be."""
        url = f"{self.api.endpoint}/{self.repo_id}" + (f"/tree/{commit}" if commit else "")
        return PushResult(commit, url, self.tag, tuple(staged.files.values()), staged.card, created, notes)

    def _repository(self) -> None:
        """Find the repository, or make it; its visibility must be what was asked for."""
        info = attempt(lambda: _info(self.api, self.repo_id), self.repo_id)
        if info is None:
            ask(self.api.create_repo, self.repo_id, private=bool(self.private), exist_ok=True)
            info = ask(self.api.model_info, self.repo_id)
        if self.private is not None and bool(info.private) != self.private:
            now, wanted = ("private", "public") if info.private else ("public", "private")
            raise HubError(
                f"{self.repo_id} exists and is {now}, but a {wanted} push was asked for; change its visibility in the "
                "settings on the Hub, or choose another name"
            )

    def _refs(self) -> tuple[str, dict[str, str]]:
        """The head of the branch, made if need be, and the commits of the tags."""
        refs = ask(self.api.list_repo_refs, self.repo_id)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if self.branch in tags:
            raise HubError(
                f"{self.branch} is a tag of {self.repo_id}; a branch of that name would hide it; choose another name"
            )
        if self.tag in branches:
            raise HubError(f"{self.tag} is a branch of {self.repo_id}, which would hide the tag; choose another tag")
        if self.branch not in branches:
            if self.tag in tags:
                raise HubError(f"tag {self.tag} of {self.repo_id} exists and is never moved; choose another tag")
            ask(self.api.create_branch, self.repo_id, branch=self.branch, exist_ok=True)
            branches[self.branch] = self._head()
        return branches[self.branch], tags

    def _head(self) -> str:
        return str(ask(self.api.model_info, self.repo_id, revision=self.branch).sha)

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        """Files of a commit by name."""
        entries = attempt(
            lambda: list(self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True)), self.repo_id
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _keeps_card(self, parent: str, remote_card: RepoFile, ours: PushedFile) -> bool:
        """Whether the card on the Hub differs from ours and was edited by hand."""
        if _same(ours, remote_card):
            return False
        with tempfile.TemporaryDirectory(prefix="swin-hf-card-") as folder:
            path = ask(self.api.hf_hub_download, self.repo_id, CARD_NAME, revision=parent, local_dir=folder)
            return is_edited(Path(path).read_text(encoding="utf-8", errors="replace"))

    def _commit(self, parent: str, changed: list[PushedFile], stale: list[str], message: str) -> str:
        """Make the one commit, and return its id once it is known to be there."""

        def send() -> str:
            operations: list[CommitOperationAdd | CommitOperationDelete] = [_add(file) for file in changed]
            operations += [CommitOperationDelete(name) for name in stale]
            try:
                return self.api.create_commit(
                    self.repo_id, operations, commit_message=message, revision=self.branch, parent_commit=parent
                ).oid
            except Exception as error:
                failure = understand(error, self.repo_id)
            # The answer may be lost although the commit was made: look at the Hub.
            try:
                head = self._head()
            except HubError:
                raise HubError(str(failure)) from None  # not to be repeated: it may be there
            if head == parent:
                raise failure
            present = self._tree(head)
            if not any(name in present for name in stale) and all(_same(f, present.get(f.name)) for f in changed):
                return head
            raise HubError(
                f"somebody else committed to {self.repo_id} in the meantime ({head[:12]}); look at their commit and "
                "run the command again"
            )

        return attempt(send, self.repo_id)

    def _put_tag(self, commit: str) -> None:
        """Tag the commit's id; a tag that points to it already is left as it is."""
        try:
            ask(self.api.create_tag, self.repo_id, tag=self.tag or "", revision=commit, exist_ok=True)
            refs = ask(self.api.list_repo_refs, self.repo_id)
        except HubError as error:
            raise HubError(
                f"commit {commit[:12]} of {self.repo_id} is there, but its tag {self.tag} may not be: {error}"
            ) from None
        target = next((ref.target_commit for ref in refs.tags if ref.name == self.tag), None)
        if target != commit:
            raise HubError(
                f"commit {commit[:12]} of {self.repo_id} is there, but somebody else has just put tag {self.tag} on "
                "another; choose another tag and run the command again"
            )


def _add(file: PushedFile) -> CommitOperationAdd:
    """The upload of a file, with its hash, so that the client need not read the file again for it."""
    if file.path.stat().st_size != file.size:
        raise HubError(f"{file.path} changed while it was being pushed; run the command again")
    operation = CommitOperationAdd(file.name, str(file.path))
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _same(file: PushedFile, entry: RepoFile | None) -> bool:
    """Whether a file of the Hub has the content of a staged one."""
    if entry is None or entry.size != file.size:
        return False
    return entry.lfs.sha256 == file.sha256 if entry.lfs else has_digest(file.path, entry.blob_id)
