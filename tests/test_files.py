"""Files and folders appear whole or not at all, and what a kill leaves behind goes."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from swin_hf.files import WriteError, remove_leftovers, replacing, replacing_folder


def test_a_file_is_replaced_when_its_successor_is_complete(tmp_path):
    path = tmp_path / "new" / "facts.json"
    with replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["facts.json"]


def test_a_folder_is_replaced_when_its_successor_is_complete(tmp_path):
    path = tmp_path / "model"
    with replacing_folder(path) as partial:
        (partial / "weights").write_text("first")
    with pytest.raises(RuntimeError), replacing_folder(path) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert (path / "weights").read_text() == "first"
    with replacing_folder(path) as partial:
        (partial / "other").write_text("second")
    assert [file.name for file in path.iterdir()] == ["other"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device of Linux without room")
def test_a_full_disk_is_one_sentence_with_the_path_and_the_room(tmp_path):
    with (
        pytest.raises(WriteError, match=r"facts.json cannot be written: the disk is full \(.* free there\); make room"),
        replacing(tmp_path / "facts.json"),
        open("/dev/full", "w") as device,
    ):
        device.write("no room")
        device.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_one_sentence(tmp_path):
    said = r"cannot be written \(Read-only file system\); choose a folder"
    with pytest.raises(WriteError, match=said), replacing(tmp_path / "a"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_other_errors_keep_their_type(tmp_path):
    with pytest.raises(ConnectionError), replacing(tmp_path / "a"):
        raise ConnectionError("lost")


def test_what_a_kill_leaves_behind_is_removed(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from swin_hf.files import replacing, replacing_folder
folder = Path(sys.argv[1])
with replacing(folder / "figure.png") as figure, replacing_folder(folder / "model") as model:
    figure.write_text("half")
    (model / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "kept.txt").write_text("mine")
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_folder_that_was_moved_aside_by_a_killed_process_is_put_back(tmp_path):
    (tmp_path / ".model.12.retired").mkdir()
    (tmp_path / ".model.12.retired" / "weights").write_text("whole")
    remove_leftovers(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "whole"
