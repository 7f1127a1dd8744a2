"""Whether a process shrinks when tensors are freed."""

import platform
import subprocess
import sys

import pytest

# Tensors of 8 MiB are freed between tensors of 1 MiB that stay; prints the mebibytes that are left of the former.
PROGRAM = """
from pathlib import Path
import torch
from sana_sprint.memory.allocator import give_back_what_is_freed

def mebibytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

give_back_what_is_freed()
torch.ones(2**22)  # left to itself, malloc keeps from now on what is smaller than this
before = mebibytes()
pairs = [[torch.ones(2**21), torch.ones(2**18)] for _ in range(20)]
for pair in pairs:
    del pair[0]
print(mebibytes() - before - 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc alone")
def test_what_is_freed_between_tensors_that_stay_is_given_back():
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 10  # else 160
