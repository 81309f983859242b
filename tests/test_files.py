"""Files and folders appear whole or not at all, and what a kill leaves behind goes."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from swin_hf.files import WriteError, redact, redact_command, remove_leftovers, replacing, replacing_folder


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
from swin_hf.files import redact, redact_command, replacing, replacing_folder
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # keys, by their form
        ("a hf_abcdefghijk b", "a *** b"),
        ("sk-proj-abc_DEF-123456", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        (COMMIT, "***"),  # a key of Weights & Biases
        ("Authorization: Bearer abcdefgh123", "Authorization: ***"),
        # but not what only looks like one
        (f"user/model@{COMMIT}", f"user/model@{COMMIT}"),
        (f"revision: {COMMIT}", f"revision: {COMMIT}"),
        ("task-sk-learn", "task-sk-learn"),
        # by the name beside them, also within a dictionary that is written as text
        ('{"storage_options": {"aws_secret_access_key": "a b/c", "anon": false}}',
         '{"storage_options": {"aws_secret_access_key": "***", "anon": false}}'),
        ("{api-key: xyz, region: eu}", "{api-key: ***, region: eu}"),
        ("{tokenizer: bert}", "{tokenizer: bert}"),
        # addresses
        ("https://s3.eu/b/a.tar?X-Amz-Signature=ab&X-Amz-Date=1", "https://s3.eu/b/a.tar?***"),
        ("https://x.blob.core.windows.net/c/a?sv=1&se=2&sig=abc%3D", "https://x.blob.core.windows.net/c/a?***"),
        ("https://h.co/a?download=true", "https://h.co/a?download=true"),
        ("http://ann:pass@proxy:80/x", "http://proxy:80/x"),
        # homes
        ("/home/ann lee/My Photos", "My Photos"),
        ("file:///home/ann/a.csv", "a.csv"),
        (r"C:\Users\Ann Lee\set 1\train.csv", "train.csv"),
        ("~ann/x/y", "y"),
        ('{"train": "/home/ann lee/a b.parquet"}', '{"train": "a b.parquet"}'),
        ("no /home/ann/x.png, sorry", "no x.png, sorry"),
        ("photos/a.png 1/2", "photos/a.png 1/2"),
    ],
)  # fmt: skip
def test_what_is_shown_to_everybody_has_no_key_no_signature_and_no_home(text, shown):
    assert redact(text) == shown
    assert redact({"x": [text]}) == {"x": [shown]}


def test_a_home_with_a_blank_is_found_anywhere_in_a_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann lee")
    assert redact("cannot open /home/ann lee/data/a.png now") == "cannot open a.png now"


def test_a_command_line_keeps_what_is_needed_to_repeat_it_and_no_secret():
    words = [
        "fit",
        "--api-key",
        "plain",
        "--model.hub_token=plain",
        "--data.reading.revision",
        COMMIT,
        f"--a.revision={COMMIT}",
    ]
    words += ["--logger.init_args.kwargs", '{"api_key": "plain", "mode": "x"}', "--data.data_dir", "/home/ann lee/in"]
    words += [
        "--data.data_files",
        "https://h.co/a.parquet?Signature=plain",
        "--data.splits.limit_train=48",
        "--wandb",
        COMMIT,
    ]
    assert redact_command(words) == [
        "fit", "--api-key", "***", "--model.hub_token=***", "--data.reading.revision", COMMIT, f"--a.revision={COMMIT}",
        "--logger.init_args.kwargs", '{"api_key": "***", "mode": "x"}', "--data.data_dir", "in",
        "--data.data_files", "https://h.co/a.parquet?***", "--data.splits.limit_train=48", "--wandb", "***",
    ]  # fmt: skip


def test_a_full_disk_that_a_library_reports_in_its_own_way_is_the_same_sentence(tmp_path):
    message = r"model cannot be written: the disk is full \(.* free there\)"
    with pytest.raises(WriteError, match=message), replacing_folder(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), replacing(tmp_path / "model.safetensors"):
        raise SafetensorError("header too small")
    assert not list(tmp_path.iterdir())
