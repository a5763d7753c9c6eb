"""Safetensors: 8 bytes with the length of a header, the header in JSON, and the tensors' bytes end to end.

The header maps names to {dtype, shape, data_offsets}; numbers are little-endian, values lie row by row
(github.com/huggingface/safetensors, README: Format). Offsets count from the end of the header.
"""

from __future__ import annotations

import contextlib
import functools
import json
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

# In the order in which the safetensors package lays tensors down.
_DTYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PLACES = {code: place for place, code in enumerate(_DTYPES)}
_METADATA = "__metadata__"
_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
_MAX_AXES = 64  # NumPy's

# Names and values of a bad file are as long as they like; a message is one line.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of one file, in the header's order.

    Only the header is read, into objects of some twenty times its size at worst; the values are mapped, and `read`
    gives read-only views of the map. They are valid as long as nobody shortens the file.

    Raises:
      InputError: there is no such file; the header is too long, not JSON or says a thing twice; a tensor's type, shape
        or size is none; the tensors do not cover the data from end to end.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise InputError(f"{path}: found {size} bytes, expected at least 8: the length of the header")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a safetensors file") from error
    length = int.from_bytes(mapped[:8], "little")
    limit = min(size - 8, _MAX_HEADER)
    if length > limit:
        raise InputError(f"{path}: found a header of {length} bytes, expected at most {limit}")
    text = mapped[8 : 8 + length]
    if text[:1] != b"{":
        raise InputError(f"{path}: header: found {text[:1]!r} at its beginning, expected b'{{'")
    header = _json(text, f"{path}: header")
    _check_metadata(header.pop(_METADATA, {}), path)
    return _stored(path, header, mapped, 8 + length)


def read_safetensors_folder(folder: str | os.PathLike[str]) -> Tensors:
    """The tensors of a folder: of model.safetensors, else of the shards of model.safetensors.index.json.

    Raises:
      InputError: there is neither; the index has no weight_map of names to files beside it; the index and a shard do
        not hold the same names; or as `read_safetensors`.
    """
    folder = pathlib.Path(folder)
    if (folder / _MODEL).exists():
        return read_safetensors(folder / _MODEL)
    path = folder / _INDEX
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _MAX_HEADER else b""
    except FileNotFoundError as error:
        raise InputError(f"{folder}: found no {_MODEL} and no {_INDEX}, expected one of them") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected an index in JSON") from error
    if size > _MAX_HEADER:
        raise InputError(f"{path}: found {size} bytes, expected at most {_MAX_HEADER}")
    weight_map = _json(text, str(path)).get("weight_map")
    if type(weight_map) is not dict:
        raise InputError(f"{path}: weight_map: found {_short.repr(weight_map)}, expected an object of names to files")
    shards: dict[str, Tensors] = {}
    for name, shard in weight_map.items():
        where = f"{path}: tensor {_short.repr(name)}"
        # The name comes from a file that somebody downloaded: it may not lead out of the folder.
        if type(shard) is not str or not shard.isprintable() or set(shard) & set("/\\") or ".." in shard or not shard:
            raise InputError(f"{where}: found shard {_short.repr(shard)}, expected the name of a file in the folder")
        if shard not in shards:
            shards[shard] = read_safetensors(folder / shard)
        if name not in shards[shard]:
            raise InputError(f"{folder / shard}: no tensor {_short.repr(name)}, expected it by {_INDEX}")
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                there = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise InputError(f"{folder / shard}: found tensor {_short.repr(name)}, {there} by {_INDEX}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the file that the safetensors package writes, to the byte; the name is given to the whole file only.

    Arrays go to the disk one by one; one that is not contiguous or big-endian is copied for its turn. Metadata come in
    alphabetical order, where the package leaves theirs to chance, and are left out when there are none.

    Raises:
      InputError: a name or metadata that is no text, an array of a type that the format has not, or a path that
        cannot be written. What was at the path stays.
    """
    path = pathlib.Path(path)
    metadata = dict(metadata or {})
    _check_metadata(metadata, path)
    for name in tensors:
        _check_text(name, f"{path}: a tensor's name")
    if _METADATA in tensors:
        raise InputError(f"{path}: found a tensor of the name {_METADATA}, which the format keeps for itself")
    codes = {name: _code(array, f"{path}: tensor {_short.repr(name)}") for name, array in tensors.items()}
    order = sorted(codes, key=lambda name: (_PLACES[codes[name]], name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": codes[name], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise InputError(f"{path}: the header takes {len(text)} bytes, expected at most {_MAX_HEADER}")
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name], _DTYPES[codes[name]])
            file.write(array.reshape(-1).view(np.uint8))


def _json(text: bytes, where: str) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = set()
            again = next(name for name, _ in pairs if name in names or names.add(name))
            raise ValueError(f"{_short.repr(again)} stands there twice")
        return found

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        found = json.loads(text.decode(), object_pairs_hook=without_repeats, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be read ({error}), expected JSON") from error
    if type(found) is not dict:
        raise InputError(f"{where}: found {_short.repr(found)}, expected an object")
    return found


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"{where}: found {_short.repr(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found a lone surrogate in {_short.repr(text)}, expected UTF-8") from error


def _check_metadata(metadata: object, path: pathlib.Path) -> None:
    if type(metadata) is not dict:
        raise InputError(f"{path}: {_METADATA}: found {_short.repr(metadata)}, expected an object of strings")
    for key, value in metadata.items():
        _check_text(key, f"{path}: {_METADATA}: a key")
        _check_text(value, f"{path}: {_METADATA}: {_short.repr(key)}")


def _code(array: object, where: str) -> str:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{where}: found {type(array).__name__}, expected an array of NumPy")
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise InputError(f"{where}: found {array.dtype}, expected one of {', '.join(map(str, _CODES))}")
    return code


def _naturals(value: object, where: str, count: int | None = None) -> tuple[int, ...]:
    if type(value) is list and all(type(n) is int and n >= 0 for n in value) and count in (None, len(value)):
        return tuple(value)
    expected = "integers from 0" if count is None else f"{count} integers from 0"
    raise InputError(f"{where}: found {_short.repr(value)}, expected {expected}")


def _stored(path: pathlib.Path, header: dict[str, Any], mapped: mmap.mmap, start: int) -> Tensors:
    tensors, spans = {}, []
    for name, entry in header.items():
        _check_text(name, f"{path}: a tensor's name")
        where = f"{path}: tensor {_short.repr(name)}"
        if type(entry) is not dict:
            raise InputError(f"{where}: found {_short.repr(entry)}, expected an object")
        for field in ("dtype", "shape", "data_offsets"):
            if field not in entry:
                raise InputError(f"{where}: found no {field}, expected dtype, shape and data_offsets")
        dtype = _DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        if dtype is None:
            found = _short.repr(entry["dtype"])
            raise InputError(f"{where}: dtype: found {found}, expected one of {', '.join(_DTYPES)}")
        shape = _naturals(entry["shape"], f"{where}: shape")
        if len(shape) > _MAX_AXES:
            raise InputError(f"{where}: shape: found {len(shape)} axes, expected at most {_MAX_AXES}")
        if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
            raise InputError(f"{where}: shape: found {_short.repr(list(shape))}, expected less than 2**63 bytes")
        begin, end = _naturals(entry["data_offsets"], f"{where}: data_offsets", 2)
        if not begin <= end <= len(mapped) - start:
            raise InputError(
                f"{where}: data_offsets: found {_short.repr([begin, end])}, expected them to ascend and to end by "
                f"{len(mapped) - start}"
            )
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size:
            raise InputError(
                f"{where}: found {end - begin} bytes, expected {size} for {dtype} {_short.repr(list(shape))}"
            )
        tensors[name] = StoredTensor(shape, dtype, functools.partial(np.ndarray, shape, dtype, mapped, start + begin))
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            kind = "hole" if begin > at else "overlap"
            raise InputError(
                f"{path}: tensor {_short.repr(name)}: found its beginning at byte {begin}, expected {at} ({kind})"
            )
        at = end
    if at != len(mapped) - start:
        raise InputError(f"{path}: found {len(mapped) - start} bytes of data, expected {at} by the header")
    return tensors


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A new file that takes the path's name once it is on the disk; on any error it goes and the old one stays."""
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}), expected a writable path") from error
    finally:
        temporary.unlink(missing_ok=True)
