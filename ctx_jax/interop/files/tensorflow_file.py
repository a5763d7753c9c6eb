"""TensorFlow's checkpoints without TensorFlow: format V2, `<prefix>.index` beside `<prefix>.data-0000i-of-0000n`.

The index is a sorted table (sstable.py). Under the empty key stands a BundleHeaderProto, under a tensor's name a
BundleEntryProto, which says where in which data file the values lie (tensorflow/core/protobuf/tensor_bundle.proto).
Everything is little-endian.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.crc32c import crc32c, masked
from ctx_jax.interop.files.mapping import mapped
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.files.sstable import MAX_KEY, check_crc, read_table, table_bytes, varint, varint_bytes
from ctx_jax.interop.files.tensors import StoredTensor, Tensors, check_shape, short

# By the numbers of tensorflow/core/framework/types.proto.
_CODES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 14: ml_dtypes.bfloat16}
_CODES |= {17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8"}
_DTYPES = {number: np.dtype(code) for number, code in _CODES.items()}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_NO_NUMBERS = (7, 20, 21)  # string, resource, variant
# What the index may cost: an entry takes 15 bytes at least, and names, which leave out what they share, are seldom
# three times as long as all of it.
_ENTRY_BYTES, _FREE_ENTRIES = 16, 2**10
_NAMES_PER_BYTE, _FREE_NAMES = 16, 2**16


def read_tensorflow(path: str | os.PathLike[str], check: bool = False) -> Tensors:
    """The tensors of a checkpoint, sorted by name; strings, variants and resources are left out.

    The index's checksums are checked; reading it takes less than a megabyte and 64 times its size. The values are
    mapped; `read` gives read-only views of the map, some not aligned.

    Args:
      path: the prefix, or the prefix with `.index`.
      check: `read` also computes the tensor's checksum, at some 1 GB/s, and raises InputError where it is another.

    Raises:
      InputError: there is no index, or it is of format V1; a checksum, a block or a message in it is wrong; a tensor's
        type, shape, size or place is none; a variable is in slices; a data file is missing or too short.
    """
    prefix, index = _paths(path)
    if prefix.is_file() and not index.exists():
        raise InputError(
            f"{prefix}: found one file, perhaps of format V1, expected format V2 and {index.name} beside it"
        )
    file = mapped(index, "the index of a checkpoint")
    table = read_table(file, index)
    key, value = next(table, (None, b""))
    if key != b"":
        raise InputError(f"{index}: found no header under the empty key, expected a checkpoint of format V2")
    num_shards = _num_shards(value, f"{index}: header")
    shards: dict[int, mmap.mmap | bytes] = {}
    tensors, total = {}, 0
    max_names, max_tensors = _FREE_NAMES + _NAMES_PER_BYTE * len(file), _FREE_ENTRIES + len(file) // _ENTRY_BYTES
    for key, value in table:
        if key.startswith(b"\0"):  # a slice, before all names; the variable's own entry says so once more
            continue
        total += len(key) if key.isascii() else 4 * len(key)  # as a string
        if total > max_names or len(tensors) > max_tensors:
            found = f"more than {max_tensors} tensors, or names of more than {max_names} bytes"
            raise InputError(f"{index}: found {found}, expected no more of an index of {len(file)} bytes")
        try:
            name = key.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{index}: found the name {short.repr(key)}, expected UTF-8") from error
        where = f"{index}: tensor {short.repr(name)}"
        entry = _message(value, _ENTRY, where)
        if entry["slices"]:
            raise InputError(f"{where}: found {len(entry['slices'])} slices, expected a variable in one piece")
        if entry["dtype"] in _NO_NUMBERS:
            continue
        dtype, shape = _dtype_and_shape(entry, where)
        shard, offset, size = entry["shard_id"], entry["offset"], entry["size"]
        if not 0 <= shard < num_shards:
            raise InputError(f"{where}: shard_id: found {shard}, expected 0 to {num_shards - 1}")
        if shard not in shards:
            shards[shard] = mapped(_data(prefix, shard, num_shards), f"the values of tensor {short.repr(name)}")
        data = shards[shard]
        needed = math.prod(shape) * dtype.itemsize
        if size != needed or not 0 <= offset <= len(data) - size:
            found = f"{size} bytes from {offset} of the {len(data)} of shard {shard}"
            raise InputError(f"{where}: found {found}, expected {needed} for {dtype} {short.repr(list(shape))}")
        crc = entry["crc32c"] if check else None
        tensors[name] = StoredTensor(
            shape, dtype, functools.partial(_read, shape, dtype, data, offset, crc, index, name)
        )
    return tensors


def write_tensorflow(prefix: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a checkpoint of one data file that TensorFlow reads, values in the order of the sorted names.

    Both files are complete before the first has its name, and an old index goes before the new values come: whoever
    looks finds the old checkpoint, none, or the new one. Arrays go to the disk one by one; one that is not contiguous
    or big-endian is copied for its turn.

    Raises:
      InputError: a name that the format cannot hold, an array of a type it has not, or a path that cannot be written.
    """
    prefix, index = _paths(prefix)
    keys: dict[bytes, np.ndarray] = {}
    for name, array in tensors.items():
        where = f"{index}: tensor {short.repr(name)}"
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("<") not in _NUMBERS:
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"{where}: found {found}, expected an array of {', '.join(map(str, _NUMBERS))}")
        keys[_key(name, where)] = array
    entries, offset = [(b"", _field(1, 1) + _field(3, _field(1, 1)))], 0  # one data file, written by version 1
    with replacing(_data(prefix, 0, 1), index) as (data_file, index_file):
        for key, array in sorted(keys.items()):
            dtype = array.dtype.newbyteorder("<")
            values = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            data_file.write(values)
            shape = b"".join(_field(2, _field(1, n)) for n in array.shape)
            entry = _field(1, _NUMBERS[dtype]) + _field(2, shape) + _field(4, offset) + _field(5, values.size)
            entries.append((key, entry + b"\x35" + masked(crc32c(values)).to_bytes(4, "little")))
            offset += values.size
        index_file.write(table_bytes(entries))


def _paths(path: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    prefix = pathlib.Path(os.fspath(path).removesuffix(".index"))
    return prefix, prefix.parent / f"{prefix.name}.index"


def _data(prefix: pathlib.Path, shard: int, num_shards: int) -> pathlib.Path:
    return prefix.parent / f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}"


def _read(
    shape: tuple[int, ...],
    dtype: np.dtype,
    data: mmap.mmap | bytes,
    offset: int,
    crc: int | None,
    index: pathlib.Path,
    name: str,
) -> np.ndarray:
    values = np.ndarray(shape, dtype, data, offset)
    if crc is not None:
        check_crc(values.reshape(-1).view(np.uint8), crc, f"{index}: tensor {short.repr(name)}")
    return values


# Name and wire type of a field by its number. Type 0 is a number, 2 bytes and 5 four bytes.
_HEADER = {1: ("num_shards", 0), 2: ("endianness", 0), 3: ("version", 2)}
_VERSION = {1: ("producer", 0), 2: ("min_consumer", 0), 3: ("bad_consumers", 2)}
_SHAPE = {2: ("dim", 2), 3: ("unknown_rank", 0)}
_DIM = {1: ("size", 0), 2: ("name", 2)}
_ENTRY = {1: ("dtype", 0), 2: ("shape", 2), 3: ("shard_id", 0), 4: ("offset", 0), 5: ("size", 0), 6: ("crc32c", 5)}
_ENTRY |= {7: ("slices", 2)}
_REPEATED = {"dim", "slices"}


def _message(data: bytes, fields: dict[int, tuple[str, int]], where: str) -> dict[str, Any]:
    """The fields by name, repeated ones as lists; 0, b"" or [] where there is none."""
    found = {name: [] if name in _REPEATED else b"" if wire == 2 else 0 for name, wire in fields.values()}
    at = 0
    while at < len(data):
        tag, at = varint(data, at, where)
        name, wire = fields.get(tag >> 3, ("", -1))
        if tag & 7 != wire:
            expected = ", ".join(f"{number} ({name}) of {wire}" for number, (name, wire) in fields.items())
            raise InputError(f"{where}: found field {tag >> 3} of wire type {tag & 7}, expected {expected}")
        value, at = (4, at) if wire == 5 else varint(data, at, f"{where}: {name}")
        if wire == 0:
            found[name] = value - 2**64 if value >= 2**63 else value
            continue
        if value > len(data) - at:
            raise InputError(f"{where}: {name}: found {len(data) - at} bytes, expected {value}")
        piece = data[at : at + value]
        at += value
        if name in _REPEATED:
            found[name].append(piece)
        else:
            found[name] = piece if wire == 2 else int.from_bytes(piece, "little")
    return found


def _num_shards(header: bytes, where: str) -> int:
    fields = _message(header, _HEADER, where)
    if fields["endianness"]:
        raise InputError(f"{where}: endianness: found {fields['endianness']}, expected 0, little-endian")
    consumer = _message(fields["version"], _VERSION, f"{where}: version")["min_consumer"]
    if consumer > 1:
        raise InputError(f"{where}: version: found one for readers from {consumer}, expected 0 or 1")
    if fields["num_shards"] < 1:
        raise InputError(f"{where}: num_shards: found {fields['num_shards']}, expected at least 1")
    return fields["num_shards"]


def _dtype_and_shape(entry: dict[str, Any], where: str) -> tuple[np.dtype, tuple[int, ...]]:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        known = ", ".join(f"{number} ({dtype})" for number, dtype in _DTYPES.items())
        raise InputError(f"{where}: dtype: found {entry['dtype']}, expected one of {known}")
    shape = _message(entry["shape"], _SHAPE, f"{where}: shape")
    sizes = tuple(_message(dim, _DIM, f"{where}: shape")["size"] for dim in shape["dim"])
    if shape["unknown_rank"]:
        raise InputError(f"{where}: shape: found no rank, expected one")
    check_shape(sizes, dtype, where)
    return dtype, sizes


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return bytes([number << 3 | 2]) + varint_bytes(len(value)) + value
    return bytes([number << 3]) + varint_bytes(value) if value else b""


def _key(name: object, where: str) -> bytes:
    key = name.encode("utf-8", "ignore") if isinstance(name, str) else b""
    if not 1 <= len(key) <= MAX_KEY or key[0] == 0 or key.decode() != name:
        raise InputError(f"{where}: expected a name of 1 to {MAX_KEY} bytes of UTF-8 that does not begin with a zero")
    return key
