"""Files as memory: mapped to be read, their pages given back when they have been."""

from __future__ import annotations

import mmap
import os
import pathlib

import numpy as np

from ctx_jax.errors import InputError


def mapped(path: pathlib.Path, expected: str) -> mmap.mmap | bytes:
    """The bytes of a file, read-only; an empty file cannot be mapped and is b"".

    They are valid as long as nobody shortens the file.

    Raises:
      InputError: there is no such file, or it cannot be read; the message ends with what was expected.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it, which no file has
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}), expected {expected}") from error


# Linux reads pages around the one that is asked for, 64 KiB of them, and so brings back some that went before.
_AROUND = max(2**17, mmap.PAGESIZE)


def let_go(array: np.ndarray) -> None:
    """Tells the system that the array's pages of a mapped file are not needed; for other arrays nothing happens.

    Pages go that the array shares with its neighbours, and some before it: nobody writes to the map, and who reads
    them again finds them again.
    """
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not array.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = np.frombuffer(base, np.uint8).ctypes.data
    first, last = (place - start for place in np.lib.array_utils.byte_bounds(array))
    first -= first % _AROUND
    base.madvise(mmap.MADV_DONTNEED, first, last - first)
