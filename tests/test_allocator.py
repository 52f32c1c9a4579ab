"""A training command's process takes its memory from the kernel once."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from tinybert_fast.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
def step():
    return [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(4)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        # Commands that ran in this process have set it here.
        env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        return int(done.stdout)

    assert 10 * faults("keep") < faults("leave")  # the kernel may reclaim a page meanwhile
