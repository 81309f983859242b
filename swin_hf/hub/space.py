"""A Space that shows the page of ``swin-hf demo`` for a model on the Hub: three small files in one commit."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from swin_hf import __version__

from .remote import HubError, ask, attempt, checked_repo_id, client, require_token

# What decides about the numbers that the page shows, and what reads the model; gradio is pinned by the header.
PINNED = ("torch", "torchvision", "transformers", "huggingface-hub", "safetensors", "numpy", "pillow")
APP = "app.py"
APP_CODE = '''"""The page of `swin-hf demo` for {model}."""

from swin_hf.demo import serve

serve("{model}", host=None).block_thread()
'''


@dataclass(frozen=True)
class SpaceResult:
    """What :func:`push_space` did."""

    url: str
    files: dict[str, str]  # the text of each, by name
    commit: str | None = None  # that holds them; None for a dry run
    created: bool = False  # whether a commit was made; not when everything was there already
    private: bool = False  # whether the model is private, and the Space with it


def space_files(repo_id: str, model_id: str, commit: str | None) -> dict[str, str]:
    """The files of a Space by name: header, requirements pinned to what is installed here, and the program.

    It shows a commit of the model, or its newest. ImportError without gradio; ValueError if an id is malformed.
    """
    checked_repo_id(repo_id)
    if find_spec("gradio") is None:
        raise ImportError("gradio is not installed, and the Space pins it; run: pip install 'swin-hf[demo]'")
    model = checked_repo_id(model_id) + (f"@{commit}" if commit else "")
    header = {
        "title": repo_id.split("/")[1],
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": ".".join(python_version().split(".")[:2]),
        "app_file": APP,
        "models": [model_id],
    }
    pins = [f"swin-hf[demo]=={__version__}", *(f"{name}=={version(name).partition('+')[0]}" for name in PINNED)]
    metadata = yaml.safe_dump(header, sort_keys=False)
    return {
        "README.md": f"---\n{metadata}---\n\nThe page of `swin-hf demo` for {model_id}.\n",
        "requirements.txt": "\n".join(pins) + "\n",
        APP: APP_CODE.format(model=model),
    }


def push_space(
    repo_id: str, model_id: str, commit: str | None, *, dry_run: bool = False, endpoint: str | None = None
) -> SpaceResult:
    """Publish a Space that shows a model of the Hub, in one commit; a Space is private if its model is.

    Pushing the same again makes no commit. With ``dry_run``, the network is not touched.

    Raises:
        ImportError, ValueError: As :func:`space_files` does.
        HubError: When the Hub refuses or cannot be reached, or the Space has a program that is not ours.
    """
    api, files = client(endpoint), space_files(repo_id, model_id, commit)
    url = f"{api.endpoint}/spaces/{repo_id}"
    if dry_run:
        return SpaceResult(url, files)
    require_token()
    private = bool(ask(api.model_info, model_id).private)
    ask(api.create_repo, repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    pushed, created = attempt(lambda: _send(api, repo_id, files), repo_id)
    return SpaceResult(url, files, pushed, created, private)


def _send(api: HfApi, repo_id: str, files: Mapping[str, str]) -> tuple[str, bool]:
    """Commit what differs; say which commit has it. Repeated after a lost answer, it finds nothing that differs."""
    head = str(api.space_info(repo_id).sha)
    entries = api.list_repo_tree(repo_id, revision=head, repo_type="space")
    there = {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    changed = {name: text.encode() for name, text in files.items() if git_hash(text.encode()) != there.get(name)}
    if not changed:
        return head, False
    if APP in changed and APP in there:
        with tempfile.TemporaryDirectory(prefix="swin-hf-space-") as folder:
            app = api.hf_hub_download(repo_id, APP, revision=head, repo_type="space", local_dir=folder)
            if "from swin_hf.demo import serve" not in Path(app).read_text(encoding="utf-8", errors="replace"):
                raise HubError(f"the Space {repo_id} has an {APP} of another kind; choose another name, or delete it")
    operations = [CommitOperationAdd(name, content) for name, content in changed.items()]
    title = "The page of swin-hf demo"
    commit = api.create_commit(repo_id, operations, commit_message=title, repo_type="space", parent_commit=head)
    return commit.oid, True
