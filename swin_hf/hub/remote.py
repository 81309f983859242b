"""Hub client: transient errors are retried, all others become messages with a remedy.

Tokens come from the environment or the keyring of ``huggingface_hub``; only :func:`~swin_hf.pull` takes one, for
programs that have their own. No token may appear in a traceback, a log or a command line: an error of the client, whose
request holds the token in a header, is never chained to ours.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its stubs export nothing
from huggingface_hub.utils.sha import git_hash

from swin_hf import __version__
from swin_hf.files import full_disk

# Base of all errors of the library that the client speaks HTTP with: httpx, and httpx2 from huggingface_hub 2 on.
HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second, third, ... try
LONGEST_WAIT = 300.0  # seconds; the longest that a Hub may ask us to wait
TRANSIENT = {408, 429, 500, 502, 503, 504}
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
REF = re.compile(r"(?!.*(\.\.|//|@\{|\.lock(/|$)))[A-Za-z0-9][A-Za-z0-9._/-]*(?<![./])")
COMMIT_ID = re.compile(r"[0-9a-f]{7,40}")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"

Result = TypeVar("Result")


class HubError(RuntimeError):
    """What went wrong with the Hub, and the remedy, in a sentence; nothing of the request, which holds the token.

    ``transient`` says that the Hub was out of reach or failed, so that another try may help; after ``wait`` seconds, if
    the Hub asked for that.
    """

    def __init__(self, sentence: str, transient: bool = False, wait: float = 0.0) -> None:
        super().__init__(sentence)
        self.transient, self.wait = transient, wait


def client(endpoint: str | None = None) -> HfApi:
    """The client that introduces itself as ``swin_hf``."""
    return HfApi(endpoint=endpoint, library_name="swin_hf", library_version=__version__)


def checked_repo_id(repo_id: str) -> str:
    """Return a valid ``user/name``; ValueError if it is malformed."""
    try:
        validate_repo_id(repo_id)
        valid = isinstance(repo_id, str) and repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"{repo_id!r} is not a repository id; write user/name or organisation/name, with letters, digits, "
            "'-', '_' and '.', at most 96 characters"
        )
    return repo_id


def checked_ref(name: str, what: str) -> str:
    """Return the name of a tag or branch, ``what`` it is; ValueError if it cannot be, or looks like a commit's id."""
    if not isinstance(name, str) or not REF.fullmatch(name) or COMMIT_ID.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a {what}; use letters, digits, '.', '-', '_' and '/', such as v1.0")
    return name


def require_token() -> None:
    """Raise HubError without a token."""
    if not get_token():
        raise HubError(f"there is no access token, and the Hub takes nothing without one that may write; {LOG_IN}")


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has a sha256 (64 digits) or the id that git gives to its content (40 digits)."""
    return digest == (sha256_of(path) if len(digest) == 64 else git_hash(path.read_bytes()))


def sha256_of(path: Path) -> str:
    """The sha256 of a file, which is not read into memory at once."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def redact(text: str) -> str:
    """Replace access tokens by ``<token>``."""
    if token := get_token():
        text = text.replace(token, "<token>")
    return TOKEN.sub("<token>", text)


def attempt(call: Callable[[], Result], repo_id: str) -> Result:
    """Call the client until it answers; doing it twice must do no harm. HubError if it fails for good, or too often."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            failure = understand(error, repo_id)
        if not failure.transient or wait is None:
            break
        time.sleep(max(wait, failure.wait))
    raise failure


def ask(call: Callable[..., Result], repo_id: str, *args: Any, **options: Any) -> Result:
    """Call a method of the client for a repository, see :func:`attempt`."""
    return attempt(lambda: call(repo_id, *args, **options), repo_id)


def understand(error: BaseException, repo_id: str) -> HubError:
    """Reduce an error of the client to a sentence with a remedy; a HubError is one."""
    if isinstance(error, HubError):
        return error
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        problems = "; ".join(line.lstrip("- ") for line in str(error).splitlines()[1:])
        return HubError(f"the Hub refuses the card's metadata ({problems}); correct the block at the top of README.md")
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return HubError("offline mode is on (HF_HUB_OFFLINE); unset it to talk to the Hub")
        if isinstance(cause, GatedRepoError):
            return HubError(f"access to {repo_id} is restricted; ask for it on the model's page, then {LOG_IN}")
        if isinstance(cause, RepositoryNotFoundError):
            return HubError(
                f"there is no repository {repo_id} that can be seen from here; check the name, and if it is private "
                f"{LOG_IN}"
            )
        if isinstance(cause, RevisionNotFoundError):
            return HubError(f"{repo_id} has no such revision; its branches and tags are on its page")
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause, repo_id)
        if full := full_disk(cause):
            return HubError(f"{full}, or move the cache with HF_HOME and temporary files with TMPDIR")
        if isinstance(cause, HTTPError | ConnectionError | json.JSONDecodeError):
            return HubError(
                f"the Hub cannot be reached or broke off ({type(cause).__name__}); check the network and HF_ENDPOINT, "
                "then run the command again",
                transient=not isinstance(cause, ConnectionError),  # those come from hf_xet, which retries by itself
            )
    first_line = next(iter(redact(str(error)).strip().splitlines()), "")
    return HubError(f"{type(error).__name__}: {first_line}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answered(error: HfHubHTTPError, repo_id: str) -> HubError:
    """An error answer of the Hub; addresses are left out, because those of the storage are signed."""
    status = error.response.status_code if error.response is not None else None
    said = redact(error.server_message or "").strip()[:200] or "no reason given"
    owner = repo_id.split("/")[0]
    sentences = {
        401: f"the Hub does not accept the token; it is wrong or has expired: {LOG_IN}",
        403: f"the token does not give access to {repo_id} ({said}); to read it ask {owner} for access, to push use a "
        f"token that may write to {owner}",
        404: f"the Hub did not find what was asked of {repo_id} ({said}); check the repository id and the revision",
        412: f"somebody else committed to {repo_id} in the meantime; look at their commit and run the command again",
        429: f"the Hub's rate limit is reached ({said}); wait some minutes and run the command again",
        **dict.fromkeys((402, 413, 507), f"the Hub has no room for {repo_id} ({said}); see {owner}'s storage page"),
    }
    unwell = f"the Hub is not well (HTTP {status}); run the command again later"
    refused = f"the Hub refused (HTTP {status}): {said}"
    sentence = sentences.get(status or 0, unwell if status in TRANSIENT else refused)
    return HubError(sentence, status in TRANSIENT, _asked_to_wait(error) if status else 0.0)


def _asked_to_wait(error: HfHubHTTPError) -> float:
    """Seconds of a ``Retry-After: 5`` or ``ratelimit: "api";r=0;t=5`` header."""
    headers = error.response.headers
    match = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", "")) or re.search(
        r";\s*t=(\d+)", headers.get("ratelimit", "")
    )
    return min(float(match[1]), LONGEST_WAIT) if match else 0.0
