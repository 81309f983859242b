"""Files and folders that are written whole or not at all.

Everything that this package leaves on a disk is written under a temporary name in the folder of its target and renamed
when it is complete. What a kill leaves behind is found by its name and removed by :func:`remove_leftovers`.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<name>.+)\.\d+\.partial")  # written by replacing and replacing_folder
_RETIRED = re.compile(r"\.(?P<name>.+)\.\d+\.retired")  # the folder that replacing_folder is about to replace
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class WriteError(OSError):
    """A file that cannot be written; the message names it, the reason and the remedy."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name in the folder of ``path``; what is written there takes its place when the block ends.

    Args:
        path: File to write; its folder is made where it is missing.

    Yields:
        The name to write to.

    Raises:
        WriteError: If the disk is full or the folder cannot be written to; the old file is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise_write_error(error, path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty temporary folder that takes the place of ``path`` when the block ends.

    The old folder goes only when the new one is in its place.

    Args:
        path: Folder to write.

    Yields:
        The empty folder.

    Raises:
        WriteError: If the disk is full or the folder cannot be written to; the old folder is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(retired)
        partial.rename(path)
    except OSError as error:
        raise_write_error(error, path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not path.exists():
            retired.rename(path)
        shutil.rmtree(retired, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half written below a folder that only this process writes to.

    A folder that was moved aside and not yet replaced is put back.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if retired := _RETIRED.fullmatch(name):
                original = path.with_name(retired["name"])
                if not original.exists():
                    path.rename(original)
                    continue
            elif not _PARTIAL.fullmatch(name):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def raise_write_error(error: OSError, path: str | os.PathLike[str]) -> None:
    """Raise :class:`WriteError` for a disk without room or a place without permission; return for other errors."""
    if isinstance(error, WriteError):
        return
    path = Path(path)
    if error.errno in _NO_ROOM:
        raise WriteError(
            error.errno,
            f"{path} cannot be written: the disk is full ({free_space(path)} free there); make room and run the same"
            " command again",
        ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not isinstance(error, FileNotFoundError):
        raise WriteError(
            error.errno, f"{path} cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error


def free_space(path: str | os.PathLike[str]) -> str:
    """Room on the disk of a file that may not exist yet, such as ``12.3 GiB``."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    size = float(shutil.disk_usage(place).free)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
