"""Sorted tables of keys and values, as LevelDB writes them (doc/table_format.md), with TensorFlow's magic number.

A footer leads to a block of blocks; a block holds keys that leave out what they share with the key before, and its
CRC-32C follows it. A block may be packed with Snappy.
"""

from __future__ import annotations

import mmap
import pathlib
from collections.abc import Iterator

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.crc32c import crc32c, masked
from ctx_jax.interop.files.tensors import short

MAX_KEY = 2**12
_FOOTER, _TRAILER, _MAGIC = 48, 5, 0xDB4775248B80FB57
_BLOCK_ENTRIES, _RESTART_INTERVAL = 64, 16
_MAX_TABLE, _MAX_BLOCK = 2**24, 2**24


def read_table(file: mmap.mmap | bytes, path: pathlib.Path) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values in ascending order, block by block; of a block at most 22 times its bytes in memory."""
    if len(file) > _MAX_TABLE:
        raise InputError(f"{path}: found {len(file)} bytes, expected an index of at most {_MAX_TABLE}")
    if len(file) < _FOOTER or int.from_bytes(file[-8:], "little") != _MAGIC:
        raise InputError(f"{path}: found {file[-8:].hex()} at its end, expected {_MAGIC.to_bytes(8, 'little').hex()}")
    footer, where, at = file[-_FOOTER:-8], f"{path}: footer", 0
    for _ in range(3):  # two numbers of a block that nobody uses, and the index's offset
        begin, at = varint(footer, at, where)
    size, _ = varint(footer, at, where)
    index = _block(file, begin, size, path)
    end, last = 0, None
    for limit, handle in _entries(index, f"{path}: index block"):
        where = f"{path}: block under {short.repr(limit)}"
        begin, at = varint(handle, 0, where)
        size, at = varint(handle, at, where)
        if at != len(handle) or begin < end:
            raise InputError(f"{where}: found the place {short.repr(handle)}, expected two numbers from byte {end}")
        end = begin + size + _TRAILER
        first = last
        for key, value in _entries(_block(file, begin, size, path), where):
            if last is not None and key <= last:
                raise InputError(f"{where}: found {short.repr(key)} after {short.repr(last)}, expected keys sorted")
            last = key
            yield key, value
        if last is first or last > limit:
            raise InputError(f"{where}: found {short.repr(last)} as its last key, expected one up to the block's own")


def _block(file: mmap.mmap | bytes, begin: int, size: int, path: pathlib.Path) -> bytes | bytearray:
    where = f"{path}: block at byte {begin}"
    end = len(file) - _FOOTER - _TRAILER
    if size > _MAX_BLOCK or begin + size > end:
        raise InputError(f"{where}: found {size} bytes, expected at most {_MAX_BLOCK} and their end by {end}")
    kind = file[begin + size]
    stored = int.from_bytes(file[begin + size + 1 : begin + size + _TRAILER], "little")
    check_crc(memoryview(file)[begin : begin + size + 1], stored, where)
    if kind > 1:
        raise InputError(f"{where}: found compression {kind}, expected 0 (none) or 1 (Snappy)")
    return _unsnapped(file[begin : begin + size], where) if kind else file[begin : begin + size]


def _entries(block: bytes | bytearray, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys, whole again, and values; behind them a list, for who seeks, of the entries whose keys are whole."""
    count = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * count
    if count < 1 or end < 0:
        raise InputError(f"{where}: found {count} restarts in {len(block)} bytes, expected at least one, and room")
    body, at, key = memoryview(block)[:end], 0, b""
    while at < end:
        shared, at = varint(body, at, where)
        unshared, at = varint(body, at, where)
        length, at = varint(body, at, where)
        if shared > len(key) or unshared + length > end - at or shared + unshared > MAX_KEY:
            found = f"{shared} shared bytes of {len(key)}, {unshared} more and {length} of {end - at} left"
            raise InputError(f"{where}: found an entry of {found}, expected them there and a key up to {MAX_KEY}")
        key, at = key[:shared] + bytes(body[at : at + unshared]), at + unshared + length
        yield key, bytes(body[at - length : at])


def _unsnapped(data: bytes, where: str) -> bytearray:
    """The bytes of a Snappy block (github.com/google/snappy, format_description.txt)."""
    length, at = varint(data, 0, where)
    if length > min(_MAX_BLOCK, 22 * len(data)):  # nothing packs tighter than 64 bytes in three
        raise InputError(f"{where}: found {length} bytes packed into {len(data)}, which Snappy cannot")
    broken, out = InputError(f"{where}: found Snappy data that lead astray, expected {length} bytes"), bytearray()
    while at < len(data):
        tag, kind = data[at] >> 2, data[at] & 3
        extra = (max(tag - 59, 0), 1, 2, 4)[kind]
        number = int.from_bytes(data[at + 1 : at + 1 + extra], "little")
        at += 1 + extra
        size = number + 1 if kind == 0 and extra else 4 + tag % 8 if kind == 1 else tag + 1
        back = tag // 8 * 256 + number if kind == 1 else number
        there = at + size <= len(data) if kind == 0 else at <= len(data) and 1 <= back <= len(out)
        if not there or size > length - len(out):
            raise broken
        if kind == 0:
            out += data[at : at + size]
            at += size
            continue
        start = len(out) - back
        while size:  # a copy may run into what it has just written
            piece = out[start : start + size]
            out += piece
            size -= len(piece)
    if len(out) != length:
        raise broken
    return out


def table_bytes(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Blocks, an empty block that the format wants, the block of blocks, the footer."""
    file = bytearray()

    def add(entries: list[tuple[bytes, bytes]]) -> bytes:
        body, restarts, last = bytearray(), [] if entries else [0], b""
        for number, (key, value) in enumerate(entries):
            shared = 0
            if number % _RESTART_INTERVAL == 0:
                restarts.append(len(body))
            else:
                pairs = enumerate(zip(key, last, strict=False))
                shared = next((place for place, (a, b) in pairs if a != b), min(len(key), len(last)))
            body += b"".join(map(varint_bytes, (shared, len(key) - shared, len(value)))) + key[shared:] + value
            last = key
        body += np.array([*restarts, len(restarts)], "<u4").tobytes()
        handle = varint_bytes(len(file)) + varint_bytes(len(body))
        body += b"\0"  # not compressed
        file.extend(body + masked(crc32c(body)).to_bytes(4, "little"))
        return handle

    blocks = [entries[start : start + _BLOCK_ENTRIES] for start in range(0, len(entries), _BLOCK_ENTRIES)]
    handles = [(block[-1][0], add(block)) for block in blocks]
    footer = add([]) + add(handles)
    return bytes(file) + footer.ljust(_FOOTER - 8, b"\0") + _MAGIC.to_bytes(8, "little")


def varint(data: bytes | memoryview, at: int, where: str) -> tuple[int, int]:
    """A number of up to 64 bits, seven to a byte, lowest first; and where it ends."""
    value = 0
    for number, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * number
        if byte < 128:
            if value >= 2**64 or (byte == 0 and number):
                break
            return value, at + number + 1
    raise InputError(f"{where}: found {bytes(data[at : at + 10]).hex() or 'nothing'}, expected a number of 64 bits")


def varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def check_crc(data: memoryview | np.ndarray, stored: int, where: str) -> None:
    expected = masked(crc32c(data))
    if stored != expected:
        raise InputError(f"{where}: found checksum {stored:#010x}, expected {expected:#010x}")
