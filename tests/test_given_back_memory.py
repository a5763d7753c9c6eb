"""What is freed is kept when asked for, and given back when asked for."""

import subprocess
import sys

import pytest

HOLES = """
import numpy as np
from ctx_jax.memory import give_back_memory, keep_memory

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) // 1024

keep_memory()
before = resident()
arrays = [np.ones(1 << 18, np.float32) for _ in range(300)]  # a megabyte each
full = resident()
arrays = arrays[::10]
kept = resident()
give_back_memory()
print(full - before, kept - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_holes_between_what_is_held_are_given_back():
    ran = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    full, kept, left = map(int, ran.stdout.split())
    assert full > 290
    assert kept > 290, "kept, for the next step of the same shapes"
    assert 30 <= left < 60, "the 30 that are held"
