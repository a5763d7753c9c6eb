"""Safetensors: 8 bytes with the length of a header, the header in JSON, and the tensors' bytes end to end.

The header maps names to {dtype, shape, data_offsets}; numbers are little-endian, values lie row by row
(github.com/huggingface/safetensors, README: Format). Offsets count from the end of the header.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.json_text import parse_json
from ctx_jax.interop.files.mapping import mapped
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.files.tensors import StoredTensor, Tensors, check_shape, short

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
_MAX_HEADER = 100_000_000  # the package's
_MAX_ENTRY = 4096  # bytes of what is said of one tensor; three fields of 64 axes take some 1400

# The header is taken apart entry by entry, for JSON's own reader makes objects of some thirty times its size before
# anybody can look at them. Nothing in an entry nests but two lists of numbers; what a match spans is then read as JSON.
_STRING, _SPACE = rb'"(?:[^"\\]++|\\.)*+"', rb"[ \t\n\r]*+"
_OPEN = re.compile(rb"\{" + _SPACE + rb"(\}?)")
_NAME = re.compile(_SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE, re.DOTALL)
_ENTRY = re.compile(rb'(\{(?:[^"\[\]{}]++|' + _STRING + rb"|\[[^\[\]{}]*+\])*+\})", re.DOTALL)
_TEXT = re.compile(rb"(" + _STRING + rb")", re.DOTALL)
_NEXT, _END = re.compile(_SPACE + rb"([,}])"), re.compile(_SPACE)


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of one file, in the header's order.

    Only the header is read, and takes no more memory than twelve times its size, for a file of next to no values; the
    values are mapped, and `read` gives read-only views of the map. They are valid as long as nobody shortens the file.

    Raises:
      InputError: there is no such file; the header is too long, not JSON, nests deeper than the format or says a thing
        twice; a tensor's type, shape or size is none; the tensors do not cover the data from end to end.
    """
    path = pathlib.Path(path)
    file = mapped(path, "a safetensors file")
    if len(file) < 8:
        raise InputError(f"{path}: found {len(file)} bytes, expected at least 8: the length of the header")
    length = int.from_bytes(file[:8], "little")
    limit = min(len(file) - 8, _MAX_HEADER)
    if length > limit:
        raise InputError(f"{path}: found a header of {length} bytes, expected at most {limit}")
    return _Header(file, 8, 8 + length, path).tensors()


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
    codes = {name: _code(array, f"{path}: tensor {short.repr(name)}") for name, array in tensors.items()}
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
    with replacing(path) as (file,):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name], _DTYPES[codes[name]])
            file.write(array.reshape(-1).view(np.uint8))


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"{where}: found {short.repr(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found a lone surrogate in {short.repr(text)}, expected UTF-8") from error


def _check_metadata(metadata: object, path: pathlib.Path) -> None:
    if type(metadata) is not dict:
        raise InputError(f"{path}: {_METADATA}: found {short.repr(metadata)}, expected an object of strings")
    for key, value in metadata.items():
        _check_text(key, f"{path}: {_METADATA}: a key")
        _check_text(value, f"{path}: {_METADATA}: {short.repr(key)}")


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
    raise InputError(f"{where}: found {short.repr(value)}, expected {expected}")


class _Header:
    """The header that lies at `file[at:end]`; offsets count from its end."""

    def __init__(self, file: mmap.mmap, at: int, end: int, path: pathlib.Path):
        self.file, self.at, self.end, self.path = file, at, end, path

    def take(self, pattern: re.Pattern[bytes], expected: str) -> re.Match[bytes]:
        match = pattern.match(self.file, self.at, self.end)
        if match is None:
            found = self.file[self.at : min(self.at + 40, self.end)]
            raise InputError(f"{self.path}: header: found {found!r} at byte {self.at - 8}, expected {expected}")
        self.at = match.end()
        return match

    def text(self, match: re.Match[bytes]) -> str:
        text = parse_json(match[1], f"{self.path}: header, before byte {self.at - 8}")
        _check_text(text, f"{self.path}: header, before byte {self.at - 8}")
        return text

    def more(self) -> bool:
        return self.take(_NEXT, "a comma or }")[1] == b","

    def tensors(self) -> Tensors:
        tensors: dict[str, StoredTensor] = {}
        spans, metadata = [], False
        more = not self.take(_OPEN, "{")[1]
        while more:
            name = self.text(self.take(_NAME, "a name and a colon"))
            if name in tensors or (name == _METADATA and metadata):
                raise InputError(f"{self.path}: header: found {short.repr(name)} twice, expected names")
            if name == _METADATA:
                metadata = True
                self.skip_metadata()
            else:
                match = self.take(_ENTRY, f"the type, shape and offsets of tensor {short.repr(name)} between braces")
                begin, end, tensors[name] = self.stored(match, f"{self.path}: tensor {short.repr(name)}")
                spans.append((begin, end, name))
            more = self.more()
        self.take(_END, "its end")
        if self.at != self.end:
            raise InputError(f"{self.path}: header: found more behind byte {self.at - 8}, expected its end")
        self.check_cover(spans)
        return tensors

    def skip_metadata(self) -> None:
        """Strings under strings, which are checked and left out."""
        more = not self.take(_OPEN, f"an object of strings for {_METADATA}")[1]
        while more:
            key = self.text(self.take(_NAME, f"a key of {_METADATA} and a colon"))
            self.text(self.take(_TEXT, f"a string for {_METADATA}'s {short.repr(key)}"))
            more = self.more()

    def stored(self, match: re.Match[bytes], where: str) -> tuple[int, int, StoredTensor]:
        if match.end(1) - match.start(1) > _MAX_ENTRY:
            raise InputError(f"{where}: found {match.end(1) - match.start(1)} bytes, expected at most {_MAX_ENTRY}")
        entry = parse_json(match[1], where)
        for field in ("dtype", "shape", "data_offsets"):
            if field not in entry:
                raise InputError(f"{where}: found no {field}, expected dtype, shape and data_offsets")
        dtype = _DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        if dtype is None:
            found = short.repr(entry["dtype"])
            raise InputError(f"{where}: dtype: found {found}, expected one of {', '.join(_DTYPES)}")
        shape = _naturals(entry["shape"], f"{where}: shape")
        check_shape(shape, dtype, where)
        begin, end = _naturals(entry["data_offsets"], f"{where}: data_offsets", 2)
        limit = len(self.file) - self.end
        if not begin <= end <= limit:
            found = short.repr([begin, end])
            raise InputError(f"{where}: data_offsets: found {found}, expected them to ascend and to end by {limit}")
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size:
            raise InputError(
                f"{where}: found {end - begin} bytes, expected {size} for {dtype} {short.repr(list(shape))}"
            )
        read = functools.partial(np.ndarray, shape, dtype, self.file, self.end + begin)
        return begin, end, StoredTensor(shape, dtype, read)

    def check_cover(self, spans: list[tuple[int, int, str]]) -> None:
        spans.sort()
        at = 0
        for begin, end, name in spans:
            if begin != at:
                kind = "hole" if begin > at else "overlap"
                where = f"{self.path}: tensor {short.repr(name)}"
                raise InputError(f"{where}: found its beginning at byte {begin}, expected {at} ({kind})")
            at = end
        if at != len(self.file) - self.end:
            raise InputError(
                f"{self.path}: found {len(self.file) - self.end} bytes of data, expected {at} by the header"
            )
