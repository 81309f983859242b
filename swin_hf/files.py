"""Write files and folders whole or not at all, and remove secrets from what is published.

This package writes every file into a temporary folder next to its target and moves it when it is complete. If the
process is killed, the temporary folder stays: the next write of the same target removes it, and so does
:func:`remove_leftovers`.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_PARTIAL = re.compile(r"\..+\.\d+(?:\.partial)?|.+\.tmp")  # of temporary_folder, and of earlier releases
_RETIRED = re.compile(r"\.(?P<name>.+)\.\d+\.retired")  # the folder that replacing_folder is about to replace
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than the disk or a limit (ulimit -f) allows",
}
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


class WriteError(OSError):
    """A file that cannot be written; the message names it, the reason and the remedy."""

    def __str__(self) -> str:
        """The message alone, without the number of the system's error."""
        return str(self.args[-1]) if self.args else ""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces ``path`` when the block ends; the folder of ``path`` is made.

    A full disk or a missing permission is a :class:`WriteError`, and the old file does not change.
    """
    path = Path(path)
    with temporary_folder(path) as folder:
        partial = folder / path.name
        yield partial
        partial.replace(path)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As :func:`replacing`, for a folder; the old one is removed after the new one has its name."""
    path = Path(path)
    retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
    try:
        with temporary_folder(path) as partial:
            yield partial
            if path.exists():
                path.rename(retired)
            partial.rename(path)
    finally:
        if retired.exists() and not path.exists():
            retired.rename(path)
        shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``path`` to write in; it is removed when the block ends."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        remove_leftovers_of(path)
        yield partial
    except Exception as error:
        raise_write_error(error, path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files of a killed process from a folder that only this process writes to, with its sub-folders.

    A folder that was renamed to be replaced, and was not, gets its name back.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path, retired = Path(place, name), _RETIRED.fullmatch(name)
            if retired and not path.with_name(retired["name"]).exists():
                path.rename(path.with_name(retired["name"]))
            elif (retired or _PARTIAL.fullmatch(name)) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif retired or _PARTIAL.fullmatch(name):
                path.unlink(missing_ok=True)


def remove_leftovers_of(path: Path) -> None:
    """Remove the temporary folders of killed processes that were writing a file or folder."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.partial")
    for partial in (
        path.parent.iterdir() if os.name == "posix" else ()
    ):  # on other systems, os.kill would end the process
        if match := name.fullmatch(partial.name):
            try:
                os.kill(int(match[1]), 0)  # raises if the process has ended
            except ProcessLookupError:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
            except (PermissionError, OverflowError):  # another user's process; a number too large for a process
                continue


def raise_write_error(error: Exception, path: str | os.PathLike[str]) -> None:
    """Raise :class:`WriteError` for a full disk or a missing permission; return for other errors."""
    if isinstance(error, WriteError):
        return
    if full := full_disk(error, path=path):
        raise full from error
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        message = f"{path} cannot be written ({error.strerror}); choose a folder that you may write to"
        raise WriteError(error.errno, message) from error


def full_disk(
    error: BaseException | None, *folders: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> "WriteError | None":
    """The error for a full disk, whatever a library raised for it; None for other errors.

    Its message names ``path`` or the file of the error; if neither is known, the fullest of ``folders``, the home and
    the folder of temporary files.
    """
    while error is not None:
        if isinstance(error, WriteError):
            return error if error.errno in _NO_ROOM else None
        number = error.errno if isinstance(error, OSError) else None
        if number is None:  # safetensors and other libraries only quote the system's error
            said = str(error)
            number = next((n for n in _NO_ROOM if f"(os error {n})" in said or f"[Errno {n}]" in said), None)
            number = errno.ENOSPC if os.strerror(errno.ENOSPC) in said else number
            if "iostream error" in said and path is not None and _free_bytes(path) < 2**20:
                number = errno.ENOSPC  # OpenVINO, written in C++, says no more when the disk is full
        if number in _NO_ROOM:
            named = path or getattr(error, "filename", None)
            named = named or min((*folders, tempfile.gettempdir(), Path.home()), key=_free_bytes)
            free = _free_bytes(named)
            size = f"{free / 2**30:.1f} GiB" if free >= 2**30 else f"{free / 2**20:.1f} MiB"
            return WriteError(
                number,
                f"{named} cannot be written: {_NO_ROOM[number]} ({size} free there); make room and run the same command"
                " again",
            )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _free_bytes(path: str | os.PathLike[str]) -> int:
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


# Patterns of private values: keys, signatures, passwords, home folders; names of options where a value has no pattern.
_KEY = re.compile(
    r"(?<![\w-])(?:hf_|api_org_|sk-|pk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|npm_|pypi-|AIza|ya29\.)[\w.-]{8,}"
    r"|(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"
    r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"  # a JSON web token
    r"|(?i:bearer|basic)\s+[\w.~+/-]{8,}=*"
)
_HEX_KEY = re.compile(
    r"(?<![0-9a-zA-Z])[0-9a-f]{40}(?![0-9a-zA-Z])"
)  # keys of Weights & Biases; commit ids look the same
_COMMIT = re.compile(r"(?:revision|commit|sha1?|tree|blob|resolve|fingerprint|@)\W*$", re.IGNORECASE)
_NAME = r"token(?!iz)|secret|passw(?:or)?d|passphrase|credential|(?:api|access|account|private|auth)[-_]?key"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_NAMED = re.compile(
    rf"""(?P<name>["']?[\w.-]*(?:{_NAME})[\w.-]*["']?\s*[:=]\s*)(?:(?P<quote>["']).*?(?P=quote)|[^\s"',;&}}]+)""",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(?P<scheme>\w[\w+.-]*://)(?:[^/\s@\"']*@)?(?P<path>[^\s?#\"']*)(?P<query>[^\s\"']*)")
_SIGNED = re.compile(r"[?&#](?:[\w-]*signature|sig|[\w-]*token|[\w-]*credential|se|sp|key|apikey)=", re.IGNORECASE)
_ROOT = r"(?:file:/{2,3}(?:[A-Za-z]:)?|[A-Za-z]:[\\/]|\\\\|~[\w.-]*[\\/]|/)"
_WHOLE_PATH = re.compile(rf"(?:{_ROOT}).*|~[\w.-]*", re.DOTALL)
_QUOTED_PATH = re.compile(rf"""(?P<quote>["'])(?P<path>{_ROOT}[^"']*)(?P=quote)""")
_PATH = re.compile(rf"""(?<![\w.:/\\~-])(?P<path>{_ROOT}[^\s"',;{{}}\[\]()]*)(?=$|[\s"',;{{}}\[\]()])""")


def redact(value: Any) -> Any:
    """A copy of a JSON value that may be published.

    Keys, passwords and the signatures of addresses become ``***``; of an absolute path, only the last part is kept.
    """
    if isinstance(value, dict):
        return {str(name): _redact_named(str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, int | float | bool | type(None)):
        return value
    text = str(value)
    if _WHOLE_PATH.fullmatch(text):  # it may have blanks
        return _KEY.sub("***", _last_part(text))
    for folder in (str(Path.home()), str(Path.cwd())):  # these may have blanks anywhere in a text
        if folder != "/":
            text = re.sub(re.escape(folder) + r"(?=[\\/])", "/_", text)
    text = _ADDRESS.sub(_without_signature, text)
    text = _NAMED.sub(lambda match: f"{match['name']}{match['quote'] or ''}***{match['quote'] or ''}", text)
    text = _KEY.sub("***", text)
    text = _HEX_KEY.sub(lambda match: match[0] if _COMMIT.search(text[: match.start()]) else "***", text)
    text = _QUOTED_PATH.sub(lambda match: f"{match['quote']}{_last_part(match['path'])}{match['quote']}", text)
    return _PATH.sub(lambda match: _last_part(match["path"]), text)


def redact_command(words: Sequence[str]) -> list[str]:
    """A copy of the words of a command line that may be published; see :func:`redact`."""
    shown, option = [], ""  # the option whose value comes next
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            shown.append(str(_redact_named(option, word)))
        else:
            shown.append(f"{name}={_redact_named(name, value)}" if equals else str(redact(word)))
        option = name if word.startswith("-") and not equals else ""
    return shown


def _redact_named(name: str, value: Any) -> Any:
    if isinstance(value, str) and _SECRET_NAME.search(name):
        return "***"
    is_commit = isinstance(value, str) and _HEX_KEY.fullmatch(value) and _COMMIT.search(name)
    return value if is_commit else redact(value)


def _without_signature(match: re.Match[str]) -> str:
    if match["scheme"].lower() == "file://":
        return match[0]
    return f"{match['scheme']}{match['path']}{'?***' if _SIGNED.search(match['query']) else match['query']}"


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
