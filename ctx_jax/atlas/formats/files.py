"""Files as they lie on the disk, plain or compressed, line by line; and the one way to say what is wrong with one."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from ctx_jax.errors import InputError

COMPRESSED = (".bz2", ".gz", ".xz")
_OPENERS = {
    re.compile(rb"\x1f\x8b"): gzip.open,
    re.compile(rb"\xfd7zXZ\x00"): lzma.open,
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.open,  # of a stream that holds something, or nothing
}
_SHOWN = 80


def without_compression(name: str) -> str:
    """The name of a file less the suffix of its compression."""
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """The bytes of a file; gzip, xz and bzip2 are seen by its first bytes and undone.

    Raises:
      InputError: a file that cannot be read, or a compressed one that is broken; also when that shows while it is read.
    """
    try:
        with open(path, "rb") as file:
            begin = file.peek(10)[:10]
            opener = next((opener for magic, opener in _OPENERS.items() if magic.match(begin)), None)
            if opener is None:
                yield file
            else:
                with opener(file) as stream:
                    yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{os.fspath(path)}: {error}; expected a whole file that can be read") from error


def lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line, without its end.

    Raises:
      InputError: see `opened`; a line that is not UTF-8.
    """
    with opened(path) as stream:
        yield from decoded(path, stream)


def decoded(path: str | os.PathLike, stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line of bytes; `path` is what an error names."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise wrong(path, number, f"byte {error.start} is 0x{line[error.start]:02x}", "UTF-8") from error
        yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def wrong(path: str | os.PathLike, number: int, found: str, expected: str) -> InputError:
    """The error to raise for a line."""
    return InputError(f"{os.fspath(path)}, line {number}: {found}; expected {expected}")


def shown(text: str) -> str:
    """A text as an error quotes it."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
