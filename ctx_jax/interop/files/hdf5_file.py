"""HDF5, the format of bilm-tf's and of Keras' weights, by h5py: groups of groups down to datasets.

HDF5's own library takes the file apart; it was not made against files that mean harm, and no bound on its memory is
promised here.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.mapping import mapped
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.files.tensors import NUMPY_DTYPES, StoredTensor, Tensors, check_shape, short

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_DEPTH = 64
# All that h5py may raise over a broken file.
_BROKEN = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError)


def read_hdf5(path: str | os.PathLike[str]) -> Tensors:
    """The datasets of a file by their paths without the first "/", sorted; attributes and empty groups are left out.

    Values that lie in one piece in a type of NumPy's are mapped, and `read` gives read-only views of the map; others
    (chunked, compressed) are read anew by every `read`, and the file stays open for them. These may be of any size that
    the file claims, for what nobody wrote is zero.

    Raises:
      InputError: there is no h5py or no such file; it is no HDF5 or cut off; a link leads elsewhere, in the file or out
        of it; a dataset lies in other files, or holds anything but numbers. `read` raises it where values are broken.
    """
    h5py, path = _h5py(path), pathlib.Path(path)
    file = mapped(path, "a file of HDF5")
    if file[:8] != _SIGNATURE:
        raise InputError(f"{path}: found no signature of HDF5 at its beginning, expected {_SIGNATURE!r}")
    tensors: dict[str, StoredTensor] = {}
    try:
        root = h5py.File(path, "r")
        _collect(root, (), tensors, _Place(h5py, path, file, {h5py.h5o.get_info(root.id).addr}))
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"{path}: cannot be read ({_line(error)}), expected a whole file of HDF5") from error
    return tensors


def write_hdf5(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes every array as a dataset that is not compressed, in groups by the parts of its name between "/".

    Raises:
      InputError: there is no h5py; a name that HDF5 cannot hold or that another name goes on from, an array of a type
        that it has not (bfloat16 and the floats of eight bits: cast them first), or a path that cannot be written. What
        was at the path stays.
    """
    h5py, path = _h5py(path), pathlib.Path(path)
    groups: set[str] = set()
    for name, array in tensors.items():
        where = f"{path}: dataset {short.repr(name)}"
        groups.update(_groups(name, where))
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("<") not in NUMPY_DTYPES.values():
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            advice = "; cast it, to float32 say" if str(found).startswith(("bfloat", "float")) else ""
            raise InputError(f"{where}: found {found}, expected an array of {', '.join(NUMPY_DTYPES)}{advice}")
    for name in groups & tensors.keys():
        found = "a dataset and a group of datasets under one name"
        raise InputError(f"{path}: dataset {short.repr(name)}: found {found}, expected one of them")
    with replacing(path) as (file,), h5py.File(file, "w") as root:
        for name, array in tensors.items():
            root.create_dataset(name, data=array)


def _h5py(path: str | os.PathLike[str]) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: HDF5 needs h5py, which is not there: pip install 'ctx-jax[hdf5]'") from error
    return h5py


def _line(error: Exception) -> str:
    return short.repr(str(error).splitlines()[0] if str(error) else type(error).__name__)[1:-1]


class _Place(NamedTuple):
    """The file that is walked, and the addresses of the groups that have been."""

    h5py: Any
    path: pathlib.Path
    file: mmap.mmap
    groups: set[int]


def _collect(group: Any, parts: tuple[str, ...], tensors: dict[str, StoredTensor], place: _Place) -> None:
    h5py = place.h5py
    for key in group:
        name = "/".join((*parts, key))
        where = f"{place.path}: {short.repr(name)}"
        if key.encode("utf-8", "ignore").decode() != key:
            raise InputError(f"{where}: found a name that is not UTF-8, expected one that is")
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
            raise InputError(f"{where}: found {kind}, expected groups and datasets that lie there themselves")
        item = group[key]
        if isinstance(item, h5py.Dataset):
            tensors[name] = _stored(item, where, place)
            continue
        if not isinstance(item, h5py.Group):
            raise InputError(f"{where}: found {type(item).__name__}, expected groups and datasets")
        address = h5py.h5o.get_info(item.id).addr
        if address in place.groups or len(parts) == _MAX_DEPTH:
            raise InputError(f"{where}: found a group that is elsewhere too, or {_MAX_DEPTH} of them in each other")
        place.groups.add(address)
        _collect(item, (*parts, key), tensors, place)


def _stored(dataset: Any, where: str, place: _Place) -> StoredTensor:
    if dataset.is_virtual or dataset.external:
        kind = "a virtual dataset" if dataset.is_virtual else "a dataset in another file"
        raise InputError(f"{where}: found {kind}, expected its values in this file")
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None or dtype.newbyteorder("<") not in NUMPY_DTYPES.values():
        found = "no values" if shape is None else dtype
        raise InputError(f"{where}: found {found}, expected an array of {', '.join(NUMPY_DTYPES)}")
    check_shape(shape, dtype, where)
    offset = dataset.id.get_offset() if dataset.chunks is None else None
    # Numbers of other sizes than NumPy's look like NumPy's until they are read.
    if offset is not None and dataset.id.get_type() == place.h5py.h5t.py_create(dtype, logical=True):
        end = offset + math.prod(shape) * dtype.itemsize
        if end > len(place.file):
            raise InputError(f"{where}: found a file of {len(place.file)} bytes, expected {end}")
        return StoredTensor(shape, dtype, functools.partial(np.ndarray, shape, dtype, place.file, offset))
    return StoredTensor(shape, dtype, functools.partial(_read, dataset, where))


def _read(dataset: Any, where: str) -> np.ndarray:
    try:
        values = np.asarray(dataset[()])
    except _BROKEN as error:
        raise InputError(f"{where}: cannot be read ({_line(error)}), expected whole values") from error
    values.flags.writeable = False
    return values


def _groups(name: object, where: str) -> list[str]:
    """The groups that a dataset lies in."""
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or "\0" in name or name.encode("utf-8", "ignore").decode() != name or {"", "."} & set(parts):
        raise InputError(f"{where}: expected a name of UTF-8 without zeros, and of parts that are not empty or a dot")
    if len(parts) > _MAX_DEPTH:
        raise InputError(f"{where}: found {len(parts)} parts, expected at most {_MAX_DEPTH}")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]
