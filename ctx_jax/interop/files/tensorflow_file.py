"""TensorFlow's checkpoints without TensorFlow: format V2, `<prefix>.index` beside `<prefix>.data-0000i-of-0000n`.

The index is a sorted table (LevelDB, doc/table_format.md, with a magic number of TensorFlow's own): a footer leads to a
block of blocks, a block holds keys that leave out what they share with the key before, and its CRC-32C follows it.
Under the empty key stands a BundleHeaderProto, under a tensor's name a BundleEntryProto, which says where in which data
file the values lie (tensorflow/core/protobuf/tensor_bundle.proto). Everything is little-endian.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import pathlib
import reprlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.tensors import StoredTensor, Tensors

# By the numbers of tensorflow/core/framework/types.proto.
_CODES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 14: ml_dtypes.bfloat16}
_CODES |= {17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8"}
_DTYPES = {number: np.dtype(code) for number, code in _CODES.items()}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_NO_NUMBERS = (7, 20, 21)  # string, resource, variant
_FOOTER, _TRAILER, _MAGIC = 48, 5, 0xDB4775248B80FB57
_BLOCK_ENTRIES, _RESTART_INTERVAL = 64, 16
# What one byte of a bad index may cost: its blocks unpack and its names grow, but no further than this.
_MAX_INDEX, _MAX_BLOCK, _MAX_NAME, _MAX_NAMES = 2**24, 2**24, 2**12, 2**26
_MAX_AXES, _LANES = 64, 2**13  # of NumPy; of a cache

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160


def read_tensorflow(path: str | os.PathLike[str], check: bool = False) -> Tensors:
    """The tensors of a checkpoint, sorted by name; strings, variants and resources are left out.

    The index's checksums are checked. The values are mapped; `read` gives read-only views of the map, some not aligned.

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
    table = _table(_mapped(index, "the index of a checkpoint"), index)
    key, value = next(table, (None, b""))
    if key != b"":
        raise InputError(f"{index}: found no header under the empty key, expected a checkpoint of format V2")
    num_shards = _num_shards(value, f"{index}: header")
    shards: dict[int, mmap.mmap | bytes] = {}
    tensors, total = {}, 0
    for key, value in table:
        if key.startswith(b"\0"):  # a slice, before all names; the variable's own entry says so once more
            continue
        total += len(key)
        if total > _MAX_NAMES:
            raise InputError(f"{index}: found names of more than {_MAX_NAMES} bytes in all, expected no more")
        try:
            name = key.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{index}: found the name {_short.repr(key)}, expected UTF-8") from error
        where = f"{index}: tensor {_short.repr(name)}"
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
            shards[shard] = _mapped(_data(prefix, shard, num_shards), f"the values of tensor {_short.repr(name)}")
        mapped = shards[shard]
        needed = math.prod(shape) * dtype.itemsize
        if size != needed or not 0 <= offset <= len(mapped) - size:
            found = f"{size} bytes from {offset} of the {len(mapped)} of shard {shard}"
            raise InputError(f"{where}: found {found}, expected {needed} for {dtype} {_short.repr(list(shape))}")
        crc = entry["crc32c"] if check else None
        values = np.ndarray(shape, dtype, mapped, offset)
        tensors[name] = StoredTensor(shape, dtype, functools.partial(_read, values, crc, where))
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
        where = f"{index}: tensor {_short.repr(name)}"
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("<") not in _NUMBERS:
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"{where}: found {found}, expected an array of {', '.join(map(str, _NUMBERS))}")
        keys[_key(name, where)] = array
    entries, offset = [(b"", _field(1, 1) + _field(3, _field(1, 1)))], 0  # one data file, written by version 1
    with _replacing(_data(prefix, 0, 1), index) as (data_file, index_file):
        for key, array in sorted(keys.items()):
            dtype = array.dtype.newbyteorder("<")
            values = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            data_file.write(values)
            shape = b"".join(_field(2, _field(1, n)) for n in array.shape)
            entry = _field(1, _NUMBERS[dtype]) + _field(2, shape) + _field(4, offset) + _field(5, values.size)
            entries.append((key, entry + b"\x35" + _masked(crc32c(values)).to_bytes(4, "little")))
            offset += values.size
        index_file.write(_table_bytes(entries))


def _paths(path: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    prefix = pathlib.Path(os.fspath(path).removesuffix(".index"))
    return prefix, prefix.parent / f"{prefix.name}.index"


def _data(prefix: pathlib.Path, shard: int, num_shards: int) -> pathlib.Path:
    return prefix.parent / f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}"


def _mapped(path: pathlib.Path, expected: str) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected {expected}") from error


def _read(values: np.ndarray, crc: int | None, where: str) -> np.ndarray:
    if crc is not None:
        _check_crc(values.reshape(-1).view(np.uint8), crc, where)
    return values.view()


def _table(file: mmap.mmap | bytes, path: pathlib.Path) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values in ascending order, block by block."""
    if len(file) > _MAX_INDEX:
        raise InputError(f"{path}: found {len(file)} bytes, expected an index of at most {_MAX_INDEX}")
    if len(file) < _FOOTER or int.from_bytes(file[-8:], "little") != _MAGIC:
        raise InputError(f"{path}: found {file[-8:].hex()} at its end, expected {_MAGIC.to_bytes(8, 'little').hex()}")
    footer, where, at = file[-_FOOTER:-8], f"{path}: footer", 0
    for _ in range(3):  # two numbers of a block that nobody uses, and the index's offset
        begin, at = _varint(footer, at, where)
    size, _ = _varint(footer, at, where)
    index = _block(file, begin, size, path)
    end, last = 0, None
    for limit, handle in _entries(index, f"{path}: index block"):
        where = f"{path}: block under {_short.repr(limit)}"
        begin, at = _varint(handle, 0, where)
        size, at = _varint(handle, at, where)
        if at != len(handle) or begin < end:
            raise InputError(f"{where}: found the place {_short.repr(handle)}, expected two numbers from byte {end}")
        end = begin + size + _TRAILER
        first = last
        for key, value in _entries(_block(file, begin, size, path), where):
            if last is not None and key <= last:
                raise InputError(f"{where}: found {_short.repr(key)} after {_short.repr(last)}, expected keys sorted")
            last = key
            yield key, value
        if last is first or last > limit:
            raise InputError(f"{where}: found {_short.repr(last)} as its last key, expected one up to the block's own")


def _block(file: mmap.mmap | bytes, begin: int, size: int, path: pathlib.Path) -> bytes:
    where = f"{path}: block at byte {begin}"
    end = len(file) - _FOOTER - _TRAILER
    if size > _MAX_BLOCK or begin + size > end:
        raise InputError(f"{where}: found {size} bytes, expected at most {_MAX_BLOCK} and their end by {end}")
    kind = file[begin + size]
    stored = int.from_bytes(file[begin + size + 1 : begin + size + _TRAILER], "little")
    _check_crc(memoryview(file)[begin : begin + size + 1], stored, where)
    if kind > 1:
        raise InputError(f"{where}: found compression {kind}, expected 0 (none) or 1 (Snappy)")
    return _unsnapped(file[begin : begin + size], where) if kind else file[begin : begin + size]


def _entries(block: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys, whole again, and values; behind them a list, for who seeks, of the entries whose keys are whole."""
    count = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * count
    if count < 1 or end < 0:
        raise InputError(f"{where}: found {count} restarts in {len(block)} bytes, expected at least one, and room")
    body, at, key = memoryview(block)[:end], 0, b""
    while at < end:
        shared, at = _varint(body, at, where)
        unshared, at = _varint(body, at, where)
        length, at = _varint(body, at, where)
        if shared > len(key) or unshared + length > end - at or shared + unshared > _MAX_NAME:
            found = f"{shared} shared bytes of {len(key)}, {unshared} more and {length} of {end - at} left"
            raise InputError(f"{where}: found an entry of {found}, expected them there and a key up to {_MAX_NAME}")
        key, at = key[:shared] + bytes(body[at : at + unshared]), at + unshared + length
        yield key, bytes(body[at - length : at])


def _unsnapped(data: bytes, where: str) -> bytes:
    """The bytes of a Snappy block (github.com/google/snappy, format_description.txt)."""
    length, at = _varint(data, 0, where)
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
    return bytes(out)


def _table_bytes(entries: list[tuple[bytes, bytes]]) -> bytes:
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
            body += b"".join(map(_varint_bytes, (shared, len(key) - shared, len(value)))) + key[shared:] + value
            last = key
        body += np.array([*restarts, len(restarts)], "<u4").tobytes()
        handle = _varint_bytes(len(file)) + _varint_bytes(len(body))
        body += b"\0"  # not compressed
        file.extend(body + _masked(crc32c(body)).to_bytes(4, "little"))
        return handle

    blocks = [entries[start : start + _BLOCK_ENTRIES] for start in range(0, len(entries), _BLOCK_ENTRIES)]
    handles = [(block[-1][0], add(block)) for block in blocks]
    footer = add([]) + add(handles)
    return bytes(file) + footer.ljust(_FOOTER - 8, b"\0") + _MAGIC.to_bytes(8, "little")


# Name and wire type of a field by its number. Type 0 is a number, 2 bytes and 5 four bytes.
_HEADER = {1: ("num_shards", 0), 2: ("endianness", 0), 3: ("version", 2)}
_VERSION = {1: ("producer", 0), 2: ("min_consumer", 0), 3: ("bad_consumers", 2)}
_SHAPE = {2: ("dim", 2), 3: ("unknown_rank", 0)}
_DIM = {1: ("size", 0), 2: ("name", 2)}
_ENTRY = {1: ("dtype", 0), 2: ("shape", 2), 3: ("shard_id", 0), 4: ("offset", 0), 5: ("size", 0), 6: ("crc32c", 5)}
_ENTRY |= {7: ("slices", 2)}
_REPEATED = {"dim", "slices"}


def _varint(data: bytes | memoryview, at: int, where: str) -> tuple[int, int]:
    """A number of up to 64 bits, seven to a byte, lowest first; and where it ends."""
    value = 0
    for number, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * number
        if byte < 128:
            if value >= 2**64 or (byte == 0 and number):
                break
            return value, at + number + 1
    raise InputError(f"{where}: found {bytes(data[at : at + 10]).hex() or 'nothing'}, expected a number of 64 bits")


def _message(data: bytes, fields: dict[int, tuple[str, int]], where: str) -> dict[str, Any]:
    """The fields by name, repeated ones as lists; 0, b"" or [] where there is none."""
    found = {name: [] if name in _REPEATED else b"" if wire == 2 else 0 for name, wire in fields.values()}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, where)
        name, wire = fields.get(tag >> 3, ("", -1))
        if tag & 7 != wire:
            expected = ", ".join(f"{number} ({name}) of {wire}" for number, (name, wire) in fields.items())
            raise InputError(f"{where}: found field {tag >> 3} of wire type {tag & 7}, expected {expected}")
        value, at = (4, at) if wire == 5 else _varint(data, at, f"{where}: {name}")
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
    too_large = len(sizes) > _MAX_AXES or math.prod(n or 1 for n in sizes) * dtype.itemsize >= 2**63
    if shape["unknown_rank"] or min(sizes, default=0) < 0 or too_large:
        found = "no rank" if shape["unknown_rank"] else _short.repr(list(sizes))
        raise InputError(f"{where}: shape: found {found}, expected at most {_MAX_AXES} axes and less than 2**63 bytes")
    return dtype, sizes


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return bytes([number << 3 | 2]) + _varint_bytes(len(value)) + value
    return bytes([number << 3]) + _varint_bytes(value) if value else b""


def _key(name: object, where: str) -> bytes:
    key = name.encode("utf-8", "ignore") if isinstance(name, str) else b""
    if not 1 <= len(key) <= _MAX_NAME or key[0] == 0 or key.decode() != name:
        raise InputError(f"{where}: expected a name of 1 to {_MAX_NAME} bytes of UTF-8 that does not begin with a zero")
    return key


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """CRC-32C (Castagnoli; RFC 3720, B.4) of bytes.

    The register after a word is a linear map of register ^ word. So the words stand in rows of lanes, all lanes of a
    row move at once, and at the end the lanes fold in half until one is left.
    """
    data = memoryview(data)
    count, register = len(data) // 4, 0xFFFFFFFF
    if count >= 64:
        words, size = np.frombuffer(data, "<u4", count), min(_LANES, 1 << (count - 1).bit_length())
        first = count % size or size
        lanes = np.zeros(size, np.uint32)
        lanes[size - first :] = words[:first]
        lanes[size - first] ^= register
        for row in words[first:].reshape(-1, size):
            lanes = _moved(lanes, size.bit_length() - 1) ^ row
        while size > 1:
            size //= 2
            lanes = _moved(lanes[:size], size.bit_length() - 1) ^ lanes[size:]
        register = int(_moved(lanes, 0)[0])
        data = data[4 * count :]
    for byte in data:
        register = register >> 8 ^ _BYTES[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _TABLE = _TABLE >> 1 ^ (_TABLE & 1) * np.uint32(0x82F63B78)
_BYTES = _TABLE.tolist()


@functools.cache
def _maps(power: int) -> tuple[np.ndarray, np.ndarray]:
    """What the lower and the upper half of a register become over 2**power words of zeros."""
    bits = np.array([1 << bit for bit in range(32)], np.uint32)
    if power:
        images = _moved(_moved(bits, power - 1), power - 1)
    else:
        images = functools.reduce(lambda images, _: images >> 8 ^ _TABLE[images & 255], range(4), bits)
    halves = [np.zeros(1, np.uint32)] * 2
    for bit, image in enumerate(images):
        halves[bit // 16] = np.concatenate([halves[bit // 16], halves[bit // 16] ^ image])
    return halves[0], halves[1]


def _moved(lanes: np.ndarray, power: int) -> np.ndarray:
    lower, upper = _maps(power)
    halves = np.ascontiguousarray(lanes, "<u4").view("<u2")
    return lower.take(halves[::2]) ^ upper.take(halves[1::2])


def _masked(crc: int) -> int:
    """As it is stored: a checksum of data that hold their own checksum would be no good one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _check_crc(data: memoryview | np.ndarray, stored: int, where: str) -> None:
    expected = _masked(crc32c(data))
    if stored != expected:
        raise InputError(f"{where}: found checksum {stored:#010x}, expected {expected:#010x}")


@contextlib.contextmanager
def _replacing(*paths: pathlib.Path) -> Iterator[list[BinaryIO]]:
    """New files that take the paths' names, in turn, once all are on the disk; on any error the old ones stay."""
    temporaries = [path.parent / f".{secrets.token_hex(8)}.tmp" for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(temporary, "xb")) for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        paths[-1].unlink(missing_ok=True)  # it speaks of values that the next line replaces
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{paths[-1]}: cannot be written ({error.strerror}), expected a writable path") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
