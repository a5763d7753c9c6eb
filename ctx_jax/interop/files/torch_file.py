"""PyTorch's weights without PyTorch: a zip since 1.6, and the pickles with raw storages behind them of before.

Source: torch/serialization.py.
"""

from __future__ import annotations

import functools
import mmap
import os
import pathlib
import pickle

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.mapping import mapped
from ctx_jax.interop.files.tensors import MAX_AXES, StoredTensor, Tensors, check_shape, short
from ctx_jax.interop.files.torch_pickle import Machine, Tensor, is_natural, kind_of
from ctx_jax.interop.files.zip_file import STORED, members

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# A tensor of a pickle takes some 50 bytes and more; in a bad one many names have the same.
_ENTRY_BYTES, _FREE_ENTRIES = 8, 2**10

_Spans = dict[str, tuple[int, int]]
"""Where the bytes of a storage begin in the file, and how many there are."""


def read_torch(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a file that torch.save wrote: a dict of them, or one under "state_dict" or "model" of a dict.

    Numbers, strings and None beside the tensors are left out. The values are mapped, and `read` gives read-only views,
    also where tensors share a storage or have strides; they are valid as long as nobody shortens the file. Beside them
    reading takes less than a megabyte and 64 times the bytes of the pickle and of the zip's directory.

    Raises:
      InputError: there is no such file; it is neither of the two formats, compressed or big-endian; the pickle asks for
        something that no dict of tensors needs, or is broken; a tensor reaches beyond its storage, or that beyond the
        file.
    """
    path = pathlib.Path(path)
    file = mapped(path, "a file of torch.save")
    if file[:4] == b"PK\3\4":
        found, spans, size = _read_zip(path, file)
    elif file[:1] == pickle.PROTO:
        found, spans, size = _read_pickles(path, file)
    else:
        raise InputError(f"{path}: found {file[:4]!r} at its beginning, expected a zip or a pickle of torch.save")
    state = _state_dict(found, path)
    if len(state) > _FREE_ENTRIES + size // _ENTRY_BYTES:
        raise InputError(
            f"{path}: found {len(state)} entries in {size} bytes, expected {_ENTRY_BYTES} bytes or more each"
        )
    tensors = {}
    for name, value in state.items():
        if type(value) is Tensor and type(name) is str:
            tensors[name] = _stored(value, f"{path}: tensor {short.repr(name)}", file, spans)
        elif type(value) not in (int, float, str, bytes, bool, type(None)):
            kind = f"{kind_of(value)} under {short.repr(name)}"
            raise InputError(f"{path}: found {kind}, expected tensors under strings, numbers and strings")
    return tensors


def _read_zip(path: pathlib.Path, file: mmap.mmap) -> tuple[object, _Spans, int]:
    """The object of archive/data.pkl, and where the storages archive/data/0, 1 … lie; and the pickle's size."""
    entries = members(file, path)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path}: found {len(pickles)} entries data.pkl, expected one in a zip of torch.save")
    root = pickles[0].removesuffix("data.pkl")

    def span(name: str) -> tuple[int, int]:
        entry = entries[name]
        if entry.method != STORED or entry.stored != entry.size:
            raise InputError(f"{path}: entry {short.repr(name)}: found it compressed, expected it as torch.save does")
        return entry.begin, entry.size

    spans = {name.removeprefix(f"{root}data/"): span(name) for name in entries if name.startswith(f"{root}data/")}
    begin, size = span(f"{root}byteorder") if f"{root}byteorder" in entries else (0, 0)
    order = file[begin : begin + min(size, 20)]
    if order not in (b"little", b""):
        raise InputError(f"{path}: byteorder: found {order!r}, expected b'little'")
    begin, size = span(pickles[0])
    return Machine(file, begin, begin + size, path).run(), spans, size


def _read_pickles(path: pathlib.Path, file: mmap.mmap) -> tuple[object, _Spans, int]:
    """Five pickles: magic number, version, machine, the object, keys of storages; then each storage behind its size."""
    machine = Machine(file, 0, len(file), path)
    for what, expected in (("magic number", _MAGIC), ("version", _PROTOCOL)):
        number = machine.run()
        if type(number) is not int or number != expected:
            raise InputError(f"{path}: {what}: found {short.repr(number)}, expected {expected}")
    system = machine.run()
    little = system.get("little_endian") if type(system) is dict else None
    if little is not True:
        raise InputError(f"{path}: little_endian: found {kind_of(little) if little else little}, expected True")
    found, keys = machine.run(), machine.run()
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(keys) != len(machine.storages):
        raise InputError(
            f"{path}: found no list of the {len(machine.storages)} storages, expected one behind the object"
        )
    at = size_of_pickles = machine.at
    spans = {}
    for key in keys:
        where = f"{path}: storage {short.repr(key)}"
        storage = machine.storages.get(key)
        if storage is None or key in spans:
            raise InputError(
                f"{where}: found it {'twice' if storage else 'without a use'}, expected every storage once"
            )
        size = storage.total * storage.dtype.itemsize
        if at + 8 + size > len(file):
            raise InputError(f"{where}: found {max(len(file) - at - 8, 0)} more bytes, expected {size}")
        count = int.from_bytes(file[at : at + 8], "little")
        if count != storage.total:
            raise InputError(f"{where}: found {count} elements, expected {storage.total}")
        spans[key] = at + 8, size
        at += 8 + size
    if at != len(file):
        raise InputError(f"{path}: found {len(file) - at} bytes behind the last storage, expected none")
    return found, spans, size_of_pickles


def _state_dict(found: object, path: pathlib.Path) -> dict:
    if type(found) is not dict:
        raise InputError(f"{path}: found {kind_of(found)}, expected a dict of tensors")
    if not found or any(type(value) is Tensor for value in found.values()):
        return found
    for key in ("state_dict", "model"):
        if type(found.get(key)) is dict:
            return found[key]
    raise InputError(
        f"{path}: found a dict without tensors, expected some, or a dict of them under state_dict or model"
    )


def _stored(tensor: Tensor, where: str, file: mmap.mmap, spans: _Spans) -> StoredTensor:
    storage, dtype, shape, strides = tensor.storage, tensor.dtype, tensor.shape, tensor.strides
    for what, numbers in (("shape", shape), ("strides", strides)):
        if type(numbers) not in (tuple, list) or len(numbers) > MAX_AXES or not all(map(is_natural, numbers)):
            raise InputError(f"{where}: {what}: found {kind_of(numbers)}, expected at most {MAX_AXES} integers from 0")
    if len(shape) != len(strides) or not is_natural(tensor.offset):
        raise InputError(f"{where}: found {len(strides)} strides, expected {len(shape)}, and an offset from 0")
    check_shape(shape, dtype, where)
    begin, size = spans.get(storage.key, (0, -1))
    expected = storage.total * storage.dtype.itemsize
    if size != expected:
        found = "no storage" if size < 0 else f"{size} bytes"
        raise InputError(f"{where}: found {found} under {short.repr(storage.key)}, expected {expected} bytes")
    empty = 0 in shape
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    reach, own = 0 if empty else (last + 1) * dtype.itemsize, storage.numel * storage.dtype.itemsize
    if reach > own:
        layout = f"{dtype} {short.repr(list(shape))} by strides {short.repr(list(strides))} from {tensor.offset}"
        raise InputError(f"{where}: found a storage of {own} bytes, expected {reach} for {layout}")
    begin += 0 if empty else storage.begin * storage.dtype.itemsize + tensor.offset * dtype.itemsize
    # A step along an axis of one entry is never taken, and may be any number.
    steps = tuple(0 if empty or n == 1 else step * dtype.itemsize for n, step in zip(shape, strides, strict=True))
    return StoredTensor(tuple(shape), dtype, functools.partial(np.ndarray, tuple(shape), dtype, file, begin, steps))
