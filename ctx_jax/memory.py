"""Whether the C library keeps what is freed, and when it gives it back."""

from __future__ import annotations

import ctypes


def keep_memory() -> None:
    """Tells glibc to keep freed memory: it gives large buffers back after every step and faults them in anew, which
    costs a training step on the processor a quarter of its time.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 << 20)
    except (OSError, AttributeError):
        return  # another C library


def give_back_memory() -> None:
    """Gives what is free back at once; for between two works of different shapes, of which the second cannot use the
    holes that the first one left.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library
