"""Files that get their names when they are whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from ctx_jax.errors import InputError


@contextlib.contextmanager
def replacing(*paths: pathlib.Path) -> Iterator[list[BinaryIO]]:
    """New files, to be written and read, that take the paths' names in turn once all of them are on the disk.

    On any error they go and the old ones stay. Of several files the last is the one that speaks of the others: the
    old one goes before they come, and whoever looks finds the old files, some without the last, or the new ones.

    Raises:
      InputError: the paths cannot be written.
    """
    temporaries = [path.parent / f".{secrets.token_hex(8)}.tmp" for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(temporary, "x+b")) for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        for folder in {path.parent for path in paths}:
            _sync(folder)
    except OSError as error:
        raise InputError(f"{paths[-1]}: cannot be written ({error.strerror}), expected a writable path") from error
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):  # it has its name by now, or never came to be
                temporary.unlink()


def _sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
