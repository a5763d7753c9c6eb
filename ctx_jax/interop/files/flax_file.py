"""Flax's msgpack, as in flax_model.msgpack: maps of names down to arrays (flax/serialization.py; msgpack's spec.md).

An array is an extension of type 1 that holds msgpack again: (shape, name of NumPy's type, bytes); type 3 holds the same
for a scalar and type 2 a complex number of Python's. An array of more than 2**30 bytes is a map of pieces. Values are
little-endian and lie row by row. Names join the keys with "/".
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.mapping import mapped
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.files.tensors import MAX_AXES, NUMPY_DTYPES, StoredTensor, Tensors, check_shape, short

_SMALL_FLOATS = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
_DTYPES = NUMPY_DTYPES | {np.dtype(code).name: np.dtype(code) for code in _SMALL_FLOATS}
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 2**30
# A few bytes of a bad file name and make an object each, and every level of maps repeats its name for those below. An
# array takes 22 bytes at least.
_MAX_DEPTH = 64
_KEY_BYTES, _FREE_KEYS = 16, 2**10
_NAMES_PER_BYTE, _FREE_NAMES = 8, 2**16


def read_flax(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a file, in its order.

    Only keys and shapes are read, in less than a megabyte and 48 times the size of a file of nothing else; the values
    are mapped, and `read` gives read-only views of the map, mostly not aligned. An array in pieces is put together by
    every `read`. Numbers of Python's are tensors of shape (): bool, int64 (uint64 where it must be), float64 or
    complex128. Lists and tuples are maps with keys 0, 1, … as Flax stores them; empty maps leave no trace.

    Raises:
      InputError: there is no such file; it is not msgpack from end to end, or not maps down to arrays and numbers; a
        key has a "/" or comes twice; a tensor's type, shape or size is none.
    """
    path = pathlib.Path(path)
    file = mapped(path, "a file of Flax's msgpack")
    if not file:
        raise InputError(f"{path}: found 0 bytes, expected a map of msgpack")
    cursor = _Cursor(file, 0, len(file), str(path))
    tree = _tree(cursor, ())
    if cursor.at != cursor.end:
        raise InputError(f"{path}: found {cursor.end - cursor.at} bytes behind the map, expected none")
    if type(tree) is not dict or _CHUNKED in tree:
        raise InputError(f"{path}: found an array or a number without a name, expected a map")
    tensors: dict[str, StoredTensor] = {}
    _flatten(tree, (), tensors, cursor)
    return tensors


def write_flax(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the bytes of `flax.serialization.msgpack_serialize`; the name is given to the whole file only.

    Names are cut at "/" into maps of maps, keys sorted as JAX sorts them. Arrays go to the disk one by one; one that
    is not contiguous or big-endian is copied for its turn.

    Raises:
      InputError: a name that is no text, or that another name goes on from; an array of a type that has no place here;
        or a path that cannot be written. What was at the path stays.
    """
    path = pathlib.Path(path)
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        where = f"{path}: tensor {short.repr(name)}"
        keys = _keys(name, where)
        if not isinstance(array, np.ndarray) or array.dtype.name not in _DTYPES:
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"{where}: found {found}, expected an array of {', '.join(_DTYPES)}")
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if type(node) is not dict:
                break
        if type(node) is not dict or keys[-1] in node:
            raise InputError(f"{where}: found a tensor and a map of tensors under one name, expected one of them")
        node[keys[-1]] = array
    with replacing(path) as (file,):
        for piece in _packed(tree):
            file.write(piece)


# --- Reading.


class _Item(NamedTuple):
    kind: str
    value: Any = None  # a number, the count of an array or a map, or an extension's type
    begin: int = 0
    size: int = 0


class _Cursor:
    """A place in mapped msgpack, which gives one item after the other up to an end."""

    def __init__(self, data: mmap.mmap, at: int, end: int, where: str):
        self.data, self.at, self.end, self.where = data, at, end, where
        self.keys = 0

    def within(self, item: _Item, where: str) -> _Cursor:
        return _Cursor(self.data, item.begin, item.begin + item.size, where)

    def take(self, size: int) -> int:
        begin = self.at
        if size > self.end - begin:
            raise InputError(f"{self.where}: found {self.end - begin} bytes from byte {begin}, expected {size}")
        self.at += size
        return begin

    def number(self, width: int, signed: bool = False) -> int:
        begin = self.take(width)
        return int.from_bytes(self.data[begin : begin + width], "big", signed=signed)

    def bytes(self, kind: str, size: int, value: Any = None) -> _Item:
        return _Item(kind, value, self.take(size), size)

    def item(self) -> _Item:
        """The next item; of an array or a map only its count."""
        tag = self.number(1)
        if tag < 0x80:
            return _Item("integer", tag)
        if tag < 0x90:
            return _Item("map", tag & 15)
        if tag < 0xA0:
            return _Item("array", tag & 15)
        if tag < 0xC0:
            return self.bytes("string", tag & 31)
        if tag >= 0xE0:
            return _Item("integer", tag - 256)
        match tag:
            case 0xC0:
                return _Item("nil")
            case 0xC2 | 0xC3:
                return _Item("bool", tag == 0xC3)
            case 0xC4 | 0xC5 | 0xC6:
                return self.bytes("binary", self.number(1 << tag - 0xC4))
            case 0xC7 | 0xC8 | 0xC9:
                size = self.number(1 << tag - 0xC7)
                return self.bytes("extension", size, value=self.number(1, signed=True))
            case 0xCA | 0xCB:
                width, form = (4, ">f") if tag == 0xCA else (8, ">d")
                return _Item("float", struct.unpack_from(form, self.data, self.take(width))[0])
            case 0xCC | 0xCD | 0xCE | 0xCF:
                return _Item("integer", self.number(1 << tag - 0xCC))
            case 0xD0 | 0xD1 | 0xD2 | 0xD3:
                return _Item("integer", self.number(1 << tag - 0xD0, signed=True))
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self.bytes("extension", 1 << tag - 0xD4, value=self.number(1, signed=True))
            case 0xD9 | 0xDA | 0xDB:
                return self.bytes("string", self.number(1 << tag - 0xD9))
            case 0xDC | 0xDD:
                return _Item("array", self.number(2 << tag - 0xDC))
            case 0xDE | 0xDF:
                return _Item("map", self.number(2 << tag - 0xDE))
        raise InputError(f"{self.where}: found byte {tag:#04x} at {self.at - 1}, which is no msgpack")

    def expect(self, kind: str, what: str, count: int | None = None) -> _Item:
        item = self.item()
        if item.kind != kind or count not in (None, item.value):
            found = item.kind if item.kind != kind else f"{item.value} items"
            raise InputError(f"{self.where}: {what}: found {found}, expected {kind if count is None else count}")
        return item

    def text(self, what: str) -> str:
        item = self.expect("string", what)
        try:
            return self.data[item.begin : item.begin + item.size].decode()
        except UnicodeDecodeError as error:
            found = short.repr(self.data[item.begin : item.begin + item.size])
            raise InputError(f"{self.where}: {what}: found {found}, expected UTF-8") from error


def _where(cursor: _Cursor, keys: tuple[str, ...]) -> str:
    return f"{cursor.where}: tensor {short.repr('/'.join(keys))}"


def _tree(cursor: _Cursor, keys: tuple[str, ...]) -> dict[str, Any] | StoredTensor | complex:
    item = cursor.item()
    if item.kind in ("bool", "integer", "float"):
        return item.value
    if item.kind == "extension" and item.value in (_ARRAY, _SCALAR):
        return _array(cursor.within(item, _where(cursor, keys)))
    if item.kind == "extension" and item.value == _COMPLEX:
        inner = cursor.within(item, _where(cursor, keys))
        inner.expect("array", "complex", 2)
        parts = [inner.expect("float", "complex").value for _ in range(2)]
        _check_end(inner)
        return complex(*parts)
    if item.kind != "map":
        found = f"extension {item.value}" if item.kind == "extension" else item.kind
        raise InputError(f"{_where(cursor, keys)}: found {found}, expected a map, an array of NumPy's or a number")
    if len(keys) == _MAX_DEPTH:
        raise InputError(f"{_where(cursor, keys)}: found a map, expected at most {_MAX_DEPTH} of them in each other")
    tree: dict[str, Any] = {}
    for _ in range(item.value):
        begin = cursor.at
        cursor.keys += 1
        if cursor.keys > _FREE_KEYS + len(cursor.data) // _KEY_BYTES:
            found = f"more than {cursor.keys - 1} names in {len(cursor.data)} bytes"
            raise InputError(f"{cursor.where}: found {found}, expected {_KEY_BYTES} bytes or more each")
        key = cursor.text(f"key at byte {begin}")
        if "/" in key or key in tree:
            again = "a second time" if key in tree else "with a '/'"
            raise InputError(f"{cursor.where}: key at byte {begin}: found {short.repr(key)} {again}, expected names")
        tree[key] = _tree(cursor, (*keys, key))
    return tree


def _check_end(cursor: _Cursor) -> None:
    if cursor.at != cursor.end:
        raise InputError(f"{cursor.where}: found {cursor.end - cursor.at} bytes behind its values, expected none")


def _array(cursor: _Cursor) -> StoredTensor:
    cursor.expect("array", "extension", 3)
    count = cursor.expect("array", "shape").value
    if count > MAX_AXES:
        raise InputError(f"{cursor.where}: shape: found {count} axes, expected at most {MAX_AXES}")
    shape = tuple(cursor.expect("integer", "shape").value for _ in range(count))
    name = cursor.text("dtype")
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise InputError(f"{cursor.where}: dtype: found {short.repr(name)}, expected one of {', '.join(_DTYPES)}")
    check_shape(shape, dtype, cursor.where)
    values = cursor.expect("binary", "values")
    _check_end(cursor)
    size = math.prod(shape) * dtype.itemsize
    if values.size != size:
        raise InputError(
            f"{cursor.where}: found {values.size} bytes, expected {size} for {dtype} {short.repr(list(shape))}"
        )
    return StoredTensor(shape, dtype, functools.partial(np.ndarray, shape, dtype, cursor.data, values.begin))


def _flatten(tree: dict[str, Any], keys: tuple[str, ...], tensors: dict[str, StoredTensor], cursor: _Cursor) -> int:
    """Fills the tensors in; the length of their names in all."""
    length = 0
    for key, node in tree.items():
        path = (*keys, key)
        if type(node) is dict and _CHUNKED not in node:
            length += _flatten(node, path, tensors, cursor)
        else:
            name = "/".join(path)
            length += len(name) if name.isascii() else 4 * len(name)
            tensors[name] = _leaf(node, _where(cursor, path))
        limit = _FREE_NAMES + _NAMES_PER_BYTE * len(cursor.data)
        if length > limit:
            raise InputError(f"{cursor.where}: found names of more than {limit} bytes in all, expected no more")
    return length


def _leaf(node: dict[str, Any] | StoredTensor | complex, where: str) -> StoredTensor:
    if isinstance(node, StoredTensor):
        return node
    if type(node) is dict:
        return _joined(node, where)
    return StoredTensor((), np.array(node).dtype, functools.partial(_number, node))


def _number(number: complex) -> np.ndarray:
    value = np.array(number)
    value.flags.writeable = False
    return value


def _joined(node: dict[str, Any], where: str) -> StoredTensor:
    lists = [node.get("shape"), node.get("chunks")]
    whole = node.keys() == {_CHUNKED, "shape", "chunks"} and node[_CHUNKED] is True
    if not whole or any(type(n) is not dict or n.keys() != set(map(str, range(len(n)))) for n in lists):
        raise InputError(f"{where}: found an array in pieces with {short.repr(list(node))}, expected shape and chunks")
    shape, chunks = (tuple(n[str(place)] for place in range(len(n))) for n in lists)
    if not chunks or any(not isinstance(c, StoredTensor) or c.dtype != chunks[0].dtype for c in chunks):
        raise InputError(f"{where}: chunks: found {len(chunks)}, not arrays of one type, expected at least one")
    if any(type(n) is not int for n in shape) or len(shape) > MAX_AXES:
        raise InputError(f"{where}: shape: found {short.repr(shape)}, expected at most {MAX_AXES} integers")
    dtype = chunks[0].dtype
    check_shape(shape, dtype, where)
    found = sum(math.prod(chunk.shape) for chunk in chunks)
    if any(len(chunk.shape) != 1 for chunk in chunks) or found != math.prod(shape):
        raise InputError(f"{where}: chunks: found {found} values, expected {math.prod(shape)} in rows")

    def read() -> np.ndarray:
        values = np.concatenate([chunk.read() for chunk in chunks]).reshape(shape)
        values.flags.writeable = False
        return values

    return StoredTensor(shape, dtype, read)


# --- Writing.

# First byte and limit of the counts that share the byte, and first bytes by the width of longer counts.
_MAP_HEAD = (0x80, 16, {2: 0xDE, 4: 0xDF})
_ARRAY_HEAD = (0x90, 16, {2: 0xDC, 4: 0xDD})
_STRING_HEAD = (0xA0, 32, {1: 0xD9, 2: 0xDA, 4: 0xDB})
_BINARY_HEAD = (0, 0, {1: 0xC4, 2: 0xC5, 4: 0xC6})
_EXTENSION_HEAD = (0, 0, {1: 0xC7, 2: 0xC8, 4: 0xC9})
_INTEGER = (0, 128, {1: 0xCC, 2: 0xCD, 4: 0xCE, 8: 0xCF})
_FIXED_EXTENSIONS = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}


def _head(form: tuple[int, int, dict[int, int]], count: int) -> bytes:
    first, limit, longer = form
    if count < limit:
        return bytes([first + count])
    width = next(width for width in longer if count < 256**width)
    return bytes([longer[width]]) + count.to_bytes(width, "big")


def _string(text: str) -> bytes:
    encoded = text.encode()
    return _head(_STRING_HEAD, len(encoded)) + encoded


def _packed(tree: dict[str, Any] | np.ndarray) -> Iterator[bytes | np.ndarray]:
    if isinstance(tree, dict):
        yield _head(_MAP_HEAD, len(tree))
        for key in sorted(tree):
            yield _string(key)
            yield from _packed(tree[key])
    elif tree.nbytes <= _CHUNK:
        yield from _packed_array(tree)
    else:
        yield _head(_MAP_HEAD, 3) + _string(_CHUNKED) + b"\xc3" + _string("shape") + _head(_MAP_HEAD, tree.ndim)
        for axis, size in enumerate(tree.shape):
            yield _string(str(axis)) + _head(_INTEGER, size)
        values, step = tree.reshape(-1), max(1, _CHUNK // tree.itemsize)
        starts = range(0, values.size, step)
        yield _string("chunks") + _head(_MAP_HEAD, len(starts))
        for place, start in enumerate(starts):
            yield _string(str(place))
            yield from _packed_array(values[start : start + step])


def _packed_array(array: np.ndarray) -> Iterator[bytes | np.ndarray]:
    dtype = _DTYPES[array.dtype.name]
    shape = _head(_ARRAY_HEAD, array.ndim) + b"".join(_head(_INTEGER, n) for n in array.shape)
    inner = _head(_ARRAY_HEAD, 3) + shape + _string(dtype.name) + _head(_BINARY_HEAD, array.nbytes)
    size = len(inner) + array.nbytes
    fixed = _FIXED_EXTENSIONS.get(size)
    yield (bytes([fixed]) if fixed else _head(_EXTENSION_HEAD, size)) + bytes([_ARRAY]) + inner
    yield np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)


def _keys(name: object, where: str) -> list[str]:
    if not isinstance(name, str):
        raise InputError(f"{where}: found {type(name).__name__} as its name, expected a string")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found a lone surrogate in the name, expected UTF-8") from error
    keys = name.split("/")
    if len(keys) > _MAX_DEPTH or _CHUNKED in keys:
        raise InputError(f"{where}: expected at most {_MAX_DEPTH} parts, none of them {_CHUNKED}")
    return keys
