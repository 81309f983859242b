"""Freed memory, in a process of its own: the change is one of the whole process."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from pathlib import Path
from swin_hf.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def given_back():
    x = torch.ones(64 * 2**20, dtype=torch.uint8)
    most = resident()
    del x
    return most - resident()

given_back()
before = given_back()
keep_freed_memory()
given_back()
print(before, given_back())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc has no mallopt")
def test_the_memory_of_a_large_tensor_stays_with_the_process():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before > 60
    assert after < 1
