"""NumPy's .npz: a zip of .npy members, each a magic number, a header in Python's own spelling, and the values.

Source: numpy/lib/format.py. The header is taken apart field by field, for NumPy's reader hands it to Python's parser.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.mapping import mapped
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.files.tensors import NUMPY_DTYPES, StoredTensor, Tensors, check_shape, short
from ctx_jax.interop.files.zip_file import DEFLATED, STORED, Member, members

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 2**12  # NumPy writes some 118 bytes, and 1400 for 64 axes
_SPELLINGS = {
    dtype.newbyteorder(order).str: dtype.newbyteorder(order) for order in "<>" for dtype in NUMPY_DTYPES.values()
}
_FIELD = re.compile(
    rb"""\s*+(['"])(descr|fortran_order|shape)\1\s*+:\s*+"""
    rb"""(?:(['"])([^'"\\]*+)\3|(True|False)|\(([0-9,\s]*+)\))\s*+(?:,\s*+|(?=\}))"""
)
_FORM = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


def read_npz(path: str | os.PathLike[str]) -> Tensors:
    """The arrays of a file, in its order, by their names without .npy.

    Only the headers are read, in less than half a megabyte and 32 times the size of a file of nothing else. Values that
    are not compressed are mapped, and `read` gives read-only views of the map, some not aligned; compressed ones are
    unpacked by every `read`. Types keep the order of bytes that they have in the file.

    Raises:
      InputError: there is no such file; it is no zip of .npy members; an array's header, type, shape or size is none;
        an array holds objects, strings or records, which are never unpickled. `read` raises it where compressed values
        are broken.
    """
    path = pathlib.Path(path)
    file = mapped(path, "a file of numpy.savez")
    tensors: dict[str, StoredTensor] = {}
    for name, member in members(file, path).items():
        where = f"{path}: array {short.repr(name)}"
        if not name.endswith(".npy"):
            raise InputError(f"{where}: found a member of another kind, expected names that end with .npy")
        if member.method not in (STORED, DEFLATED):
            raise InputError(f"{where}: found compression {member.method}, expected 0 (none) or 8 (deflate)")
        if member.method == STORED and member.stored != member.size:
            raise InputError(f"{where}: found {member.stored} bytes for {member.size}, expected as many")
        start, dtype, order, shape = _header(_beginning(file, member, where), where)
        size = math.prod(shape) * dtype.itemsize
        if member.size - start != size:
            found = f"{member.size - start} bytes of values"
            raise InputError(f"{where}: found {found}, expected {size} for {dtype} {short.repr(list(shape))}")
        if member.method == STORED:
            read = functools.partial(np.ndarray, shape, dtype, file, member.begin + start, None, order)
        else:
            read = functools.partial(_unpacked, file, member, start, shape, dtype, order, where)
        tensors[name.removesuffix(".npy")] = StoredTensor(shape, dtype, read)
    return tensors


def write_npz(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes what `numpy.savez` writes, not compressed; the name is given to the whole file only.

    Raises:
      InputError: a name that is no text or that would not come back, an array of a type that NumPy's files do not know
        (bfloat16 and the floats of eight bits: cast them first), or a path that cannot be written. What was at the
        path stays.
    """
    path = pathlib.Path(path)
    for name, array in tensors.items():
        where = f"{path}: array {short.repr(name)}"
        if not isinstance(name, str) or "\0" in name or name.encode("utf-8", "ignore").decode() != name:
            raise InputError(f"{where}: expected a name of UTF-8 without zeros")
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("<") not in NUMPY_DTYPES.values():
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            advice = "; cast it, to float32 say" if str(found).startswith(("bfloat", "float")) else ""
            raise InputError(f"{where}: found {found}, expected an array of {', '.join(NUMPY_DTYPES)}{advice}")
    with replacing(path) as (file,), zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _beginning(file: mmap.mmap, member: Member, where: str) -> bytes:
    """Of a member, unpacked: what a header may take."""
    size = _MAX_HEADER + 12
    packed = file[member.begin : member.begin + min(member.stored, size)]
    if member.method == STORED:
        return packed
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size)
    except zlib.error as error:
        raise InputError(f"{where}: cannot be unpacked ({error}), expected deflated bytes") from error


def _header(data: bytes, where: str) -> tuple[int, np.dtype, str, tuple[int, ...]]:
    """Where the values begin, their type, order and shape."""
    if data[:6] != _MAGIC or data[6:7] not in (b"\1", b"\2", b"\3"):
        raise InputError(f"{where}: found {data[:8]!r} at its beginning, expected {_MAGIC!r} and a version from 1 to 3")
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    if end - start > _MAX_HEADER or end > len(data):
        raise InputError(f"{where}: found a header of {end - start} bytes, expected it there and {_MAX_HEADER} at most")
    text, at, fields = data[start:end].strip(), 1, {}
    while match := _FIELD.match(text, at):
        fields[match[2].decode()] = match
        at = match.end()
    whole = text[:1] == b"{" and text[at:].strip() == b"}" and len(fields) == 3
    if not whole or fields["descr"][4] is None or fields["fortran_order"][5] is None or fields["shape"][6] is None:
        raise InputError(f"{where}: found header {short.repr(text)}, expected one like {_FORM}")
    code = fields["descr"][4]
    dtype = _SPELLINGS.get(code.decode("latin-1"))
    if dtype is None:
        raise InputError(f"{where}: descr: found {short.repr(code)}, expected one of {', '.join(_SPELLINGS)}")
    sizes = [size.strip() for size in fields["shape"][6].split(b",")]
    if sizes[-1] == b"":  # a tuple may end with a comma
        sizes.pop()
    if not all(size.isdigit() and len(size) < 20 for size in sizes):
        raise InputError(f"{where}: shape: found {short.repr(fields['shape'][6])}, expected integers from 0")
    shape = tuple(map(int, sizes))
    check_shape(shape, dtype, where)
    return end, dtype, "F" if fields["fortran_order"][5] == b"True" else "C", shape


def _unpacked(
    file: mmap.mmap,
    member: Member,
    start: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    order: str,
    where: str,
) -> np.ndarray:
    packed = memoryview(file)[member.begin : member.begin + member.stored]
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.size + 1)
    except zlib.error as error:
        raise InputError(f"{where}: cannot be unpacked ({error}), expected deflated bytes") from error
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        found = f"{len(data)} bytes or more with checksum {zlib.crc32(data):#010x}"
        raise InputError(f"{where}: unpacked to {found}, expected {member.size} with {member.crc:#010x}")
    return np.ndarray(shape, dtype, data, start, None, order)
