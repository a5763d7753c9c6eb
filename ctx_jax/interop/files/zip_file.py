"""The directory of a zip file, as PyTorch and NumPy write it: where the bytes of each member lie.

By PKWARE's APPNOTE.TXT: the end record (4.3.16) leads to the directory, whose lines (4.3.12) lead to the members'
headers (4.3.7); sizes that need more than 32 bits stand in an extra field (4.5.3) and in an end record of their own
(4.3.14). Python's zipfile makes objects of twenty times the directory's size; here a member is three numbers.
"""

from __future__ import annotations

import mmap
import pathlib
import struct
from typing import NamedTuple

from ctx_jax.errors import InputError
from ctx_jax.interop.files.tensors import short

STORED, DEFLATED = 0, 8
_END, _END_64, _LOCATOR, _LINE, _HEADER = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_ENCRYPTED, _UTF8 = 1, 0x800


class Member(NamedTuple):
    """`stored` bytes from `begin` of the file, which unpack to `size` of the given CRC-32 by a method, 0 for none."""

    begin: int
    stored: int
    size: int
    method: int
    crc: int


def members(file: mmap.mmap | bytes, path: pathlib.Path) -> dict[str, Member]:
    """The members by name; at most twelve times the directory's size in memory.

    Raises:
      InputError: there is no directory, or it is broken; a name comes twice; a member is encrypted or does not lie in
        the file.
    """
    at, end, count = _directory(file, path)
    found: dict[str, Member] = {}
    for number in range(count):
        where = f"{path}: zip directory, line {number}"
        if at + 46 > end or file[at : at + 4] != _LINE:
            raise InputError(f"{where}: found {file[at : min(at + 4, end)]!r} at byte {at}, expected {_LINE!r}")
        _, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, _, _, _, begin = (
            struct.unpack("<IHHHHHHIIIHHHHHII", file[at : at + 46])
        )
        extra = at + 46 + name_size
        at = extra + extra_size + comment_size
        if at > end:
            raise InputError(f"{where}: found its end at byte {at}, expected it by {end}")
        raw = file[extra - name_size : extra]
        try:
            name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: found the name {short.repr(raw)}, expected UTF-8") from error
        where = f"{path}: entry {short.repr(name)}"
        if name in found:
            raise InputError(f"{where}: found it twice, expected names")
        if flags & _ENCRYPTED:
            raise InputError(f"{where}: found it encrypted, expected it in the open")
        size, packed, begin = _large(file[extra : extra + extra_size], [size, packed, begin], where)
        # The line does not say how long the member's own header is: 30 bytes, the name, and padding.
        header = file[begin : begin + 30]
        if len(header) < 30 or header[:4] != _HEADER:
            raise InputError(f"{where}: found no header at byte {begin}, expected the entry there")
        begin += 30 + sum(struct.unpack("<HH", header[26:]))
        if begin + packed > len(file):
            raise InputError(f"{where}: found a file of {len(file)} bytes, expected {begin + packed}")
        found[name] = Member(begin, packed, size, method, crc)
    if at != end:
        raise InputError(f"{path}: zip directory: found {end - at} bytes behind its {count} lines, expected none")
    return found


def _directory(file: mmap.mmap | bytes, path: pathlib.Path) -> tuple[int, int, int]:
    """Where the lines begin and end, and how many there are."""
    place = file.rfind(_END, max(0, len(file) - 22 - 0xFFFF))
    if place < 0 or place + 22 > len(file):
        raise InputError(f"{path}: found no end of a zip directory, expected a whole zip file")
    _, _, _, _, count, size, begin, comment = struct.unpack("<IHHHHIIH", file[place : place + 22])
    if place + 22 + comment != len(file):
        raise InputError(f"{path}: zip directory: found {len(file) - place - 22} bytes behind it, expected {comment}")
    end = place
    if file[max(place - 20, 0) : place][:4] == _LOCATOR:
        (end,) = struct.unpack("<Q", file[place - 12 : place - 4])
        if end + 56 > place - 20 or file[end : end + 4] != _END_64:
            raise InputError(f"{path}: zip directory: found no record at byte {end}, expected {_END_64!r}")
        count, size, begin = struct.unpack("<QQQ", file[end + 32 : end + 56])
    if begin + size != end:
        raise InputError(f"{path}: zip directory: found it from {begin} to {begin + size}, expected its end at {end}")
    return begin, end, count


def _large(extra: bytes, numbers: list[int], where: str) -> list[int]:
    """The numbers, those that are all ones from the extra field of zip64, where they stand in the same order."""
    missing = [place for place, number in enumerate(numbers) if number == 0xFFFFFFFF]
    while missing and len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        if kind == 1 and size >= 8 * len(missing) and len(extra) >= 4 + size:
            for place, number in zip(missing, struct.unpack_from(f"<{len(missing)}Q", extra, 4), strict=True):
                numbers[place] = number
            return numbers
        extra = extra[4 + size :]
    if missing:
        raise InputError(f"{where}: found no sizes of 64 bits in its line, expected them by its sizes of 32")
    return numbers
