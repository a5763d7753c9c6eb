"""PyTorch's weights without PyTorch: a zip since 1.6, and the pickles with raw storages behind them of before.

A pickle is a program that may call anything and build without end, and Python's own reader obeys it. Nothing of that
reader is used here: a machine of the few opcodes that a dict of tensors is made of runs the program. What it calls are
names to the machine, each of them on a list; every opcode makes at most one object, no larger than what the file spells
out; and opcodes are counted.

Sources: torch/serialization.py and torch/_utils.py for the layout, pickletools for the opcodes.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import pathlib
import pickle
import reprlib
import struct
import zipfile
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.tensors import StoredTensor, Tensors

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_OPCODES = 5_000_000  # a tensor takes some 25
_MAX_AXES = 64  # NumPy's
_STORAGES = {
    "Double": np.dtype("<f8"),
    "Float": np.dtype("<f4"),
    "Half": np.dtype("<f2"),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Long": np.dtype("<i8"),
    "Int": np.dtype("<i4"),
    "Short": np.dtype("<i2"),
    "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"),
    "Bool": np.dtype("?"),
}
# What tensors of newer types are saved as: bytes, and the type beside them.
_TYPES = {
    "torch.float64": np.dtype("<f8"),
    "torch.float32": np.dtype("<f4"),
    "torch.float16": np.dtype("<f2"),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"torch.{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "torch.bool": np.dtype("?"),
}
_STORAGE_TYPES = {f"torch.{place}{name}Storage": t for name, t in _STORAGES.items() for place in ("", "cuda.")}
_STORAGE_TYPES |= dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), np.dtype("u1"))
_DICT, _PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_parameter"
# Number of arguments: storage, offset, shape, strides; gradient, hooks; type. One more may say that values are to be
# conjugated or negated.
_REBUILD = {f"torch._utils._rebuild_tensor{version}": count for version, count in (("", 4), ("_v2", 6), ("_v3", 7))}
_GLOBALS = {_DICT, _PARAMETER, *_REBUILD, *_TYPES, *_STORAGE_TYPES}

_NUMBERS = {pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BININT: "<i", pickle.BINFLOAT: ">d"}
_TEXTS = {pickle.BINUNICODE: "<I", pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE8: "<Q"}
_TEXTS |= {pickle.BINSTRING: "<I", pickle.SHORT_BINSTRING: "<B"}
_BYTES = {pickle.BINBYTES: "<I", pickle.SHORT_BINBYTES: "<B"}
_PUTS, _GETS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}, {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}

# Names of a bad file are as long as they like; a message is one line.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160

# All that zipfile may say of a directory that is broken.
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, LookupError, ArithmeticError, OSError, RuntimeError)

_Spans = dict[str, tuple[int, int]]
"""Where the bytes of a storage begin in the file, and how many there are."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """`numel` elements from `begin` of the storage `key`, which has `total` of them."""

    key: str
    dtype: np.dtype
    total: int
    begin: int
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """As the pickle has it: nothing but the storage and the type is checked."""

    storage: _Storage
    dtype: np.dtype
    offset: object
    shape: object
    strides: object


def read_torch(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a file that torch.save wrote: a dict of them, or one under "state_dict" or "model" of a dict.

    Numbers, strings and None beside the tensors are left out. The values are mapped, and `read` gives read-only views,
    also where tensors share a storage or have strides; they are valid as long as nobody shortens the file.

    Raises:
      InputError: there is no such file; it is neither of the two formats, compressed or big-endian; the pickle asks for
        something that no dict of tensors needs, or is broken; a tensor reaches beyond its storage, or that beyond the
        file.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a file of torch.save") from error
    if mapped[:4] == b"PK\3\4":
        found, spans = _read_zip(path, mapped)
    elif mapped[:1] == pickle.PROTO:
        found, spans = _read_pickles(path, mapped)
    else:
        raise InputError(f"{path}: found {mapped[:4]!r} at its beginning, expected a zip or a pickle of torch.save")
    tensors = {}
    for name, value in _state_dict(found, path).items():
        if type(value) is _Tensor and type(name) is str:
            tensors[name] = _stored(value, f"{path}: tensor {_short.repr(name)}", mapped, spans)
        elif type(value) not in (int, float, str, bytes, bool, type(None)):
            kind = f"{_kind(value)} under {_short.repr(name)}"
            raise InputError(f"{path}: found {kind}, expected tensors under strings, numbers and strings")
    return tensors


class _Machine:
    """Runs the pickles of `data[at:end]`, one a call.

    Attributes:
      at: the byte behind the last opcode that has run.
      storages: those that the pickles have named, by key, as a whole.
    """

    def __init__(self, data: mmap.mmap, at: int, end: int, path: pathlib.Path):
        self.at, self.storages = at, {}
        self._data, self._end, self._path = data, end, path
        self._left = _MAX_OPCODES

    def run(self) -> object:
        """The object of the next pickle."""
        self._stack, self._marks, self._memo = [], [], {}
        while (opcode := self._take(1)) != pickle.STOP:
            self._left -= 1
            if self._left < 0:
                raise self._error(f"found more than {_MAX_OPCODES} opcodes, expected a dict of tensors")
            try:
                self._step(opcode)
            except (IndexError, KeyError) as error:
                raise self._error(f"opcode {opcode!r} takes what nothing put there") from error
        if not self._stack:
            raise self._error("found nothing on the stack, expected an object")
        return self._stack[-1]

    def _error(self, what: str) -> InputError:
        return InputError(f"{self._path}: pickle, before byte {self.at}: {what}")

    def _take(self, count: int) -> bytes:
        if count > self._end - self.at:
            raise self._error(f"found {self._end - self.at} more bytes, expected {count}")
        self.at += count
        return self._data[self.at - count : self.at]

    def _number(self, format: str) -> int | float:
        return struct.unpack(format, self._take(struct.calcsize(format)))[0]

    def _text(self, count: int) -> str:
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"found a string that is not UTF-8 ({error.reason}), expected one that is") from error

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, min(self._end, self.at + 256))
        if end < 0:
            raise self._error("found no end to a name, expected one of at most 256 bytes")
        return self._text(end + 1 - self.at)[:-1]

    def _pop_mark(self) -> list:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _step(self, opcode: bytes) -> None:
        stack = self._stack
        if opcode in _PUTS:
            self._memo[self._number(_PUTS[opcode])] = stack[-1]
        elif opcode in _GETS:
            stack.append(self._memo[self._number(_GETS[opcode])])
        elif opcode in _NUMBERS:
            stack.append(self._number(_NUMBERS[opcode]))
        elif opcode in _TEXTS:
            stack.append(self._text(self._number(_TEXTS[opcode])))
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            items = tuple(stack.pop() for _ in range(_TUPLES[opcode]))
            stack.append(items[::-1])
        elif opcode in _BYTES:
            stack.append(self._take(self._number(_BYTES[opcode])))
        else:
            self._rarer_step(opcode, stack)

    def _rarer_step(self, opcode: bytes, stack: list) -> None:
        match opcode:
            case pickle.MARK:
                self._marks.append(stack)
                self._stack = []
            case pickle.TUPLE:
                items = tuple(self._pop_mark())
                self._stack.append(items)
            case pickle.REDUCE:
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            case pickle.BINPERSID:
                stack.append(self._storage(stack.pop()))
            case pickle.GLOBAL:
                stack.append(self._global(self._line(), self._line()))
            case pickle.STACK_GLOBAL:
                name = stack.pop()
                stack.append(self._global(stack.pop(), name))
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.SETITEM:
                self._set_items([stack.pop(), stack.pop()][::-1])
            case pickle.SETITEMS:
                self._set_items(self._pop_mark())
            case pickle.APPEND | pickle.APPENDS:
                items = [stack.pop()] if opcode == pickle.APPEND else self._pop_mark()
                self._last(list).extend(items)
            case pickle.BUILD:
                # A state dict's own attributes: versions of modules.
                stack.pop()
                self._last(dict)
            case pickle.MEMOIZE:
                self._memo[len(self._memo)] = stack[-1]
            case pickle.LONG1:
                stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
            case pickle.PROTO:
                self._take(1)
            case pickle.FRAME:
                self._take(8)
            case _:
                raise self._error(f"found opcode {opcode!r}, expected those of a dict of tensors")

    def _last(self, kind: type) -> list | dict:
        if type(self._stack[-1]) is not kind:
            raise self._error(f"found {_kind(self._stack[-1])}, expected a {kind.__name__}")
        return self._stack[-1]

    def _set_items(self, items: list) -> None:
        keys = items[::2]
        for key in keys:
            # Keys that nest can exhaust the stack, and larger integers can be made to share a hash.
            if not (type(key) is str or (type(key) is int and abs(key) < 2**60)):
                raise self._error(f"found {_kind(key)} for a key, expected a string or a small integer")
        if len(items) % 2:
            raise self._error("found a key without a value, expected pairs")
        self._last(dict).update(zip(keys, items[1::2], strict=True))

    def _global(self, module: object, name: object) -> _Global:
        if type(module) is not str or type(name) is not str:
            raise self._error(f"found {_kind(module)} and {_kind(name)}, expected the name of a global")
        if f"{module}.{name}" not in _GLOBALS:
            asked = _short.repr(f"{module}.{name}")
            raise self._error(f"asks for {asked[1:-1]}, expected what a dict of tensors needs; nothing was run")
        return _Global(f"{module}.{name}")

    def _call(self, function: object, arguments: object) -> object:
        name = function.name if type(function) is _Global else ""
        count = len(arguments) if type(arguments) is tuple else -1
        if name == _DICT and count == 0:
            return {}
        if name == _PARAMETER and count == 3 and type(arguments[0]) is _Tensor:
            return arguments[0]
        place = _REBUILD.get(name, count + 1)
        if count >= place and type(arguments[0]) is _Storage:
            dtype, flags = arguments[0].dtype, arguments[place:]
            if name.endswith("v3"):
                dtype = _TYPES.get(arguments[6].name) if type(arguments[6]) is _Global else None
            if dtype is None or len(flags) > 1 or any(flags):
                raise self._error("found a tensor that is conjugate, negative or of no type, expected a plain one")
            return _Tensor(arguments[0], dtype, *arguments[1:4])
        raise self._error(f"found a call of {name or _kind(function)} with {_kind(arguments)}, expected torch.save's")

    def _storage(self, name: object) -> _Storage:
        """What stands for a storage: ("storage", type, key, device, number of elements[, view])."""
        if type(name) is not tuple or len(name) not in (5, 6) or type(name[0]) is not str or name[0] != "storage":
            raise self._error("found an object that lies outside the pickle, expected storages only")
        dtype = _STORAGE_TYPES.get(name[1].name) if type(name[1]) is _Global else None
        key, numel = name[2], name[4]
        if dtype is None or type(key) is not str or not _natural(numel):
            raise self._error("found a storage without type, key or size, expected all three")
        whole = _Storage(key, dtype, numel, 0, numel)
        if self.storages.setdefault(key, whole) != whole:
            raise self._error(f"found storage {_short.repr(key)} with two types or sizes, expected one")
        view = name[5] if len(name) == 6 else None
        if view is None:
            return whole
        if type(view) is not tuple or len(view) != 3 or not (_natural(view[1]) and _natural(view[2])):
            raise self._error(f"found a view of storage {_short.repr(key)} without offset or size, expected both")
        if view[1] + view[2] > numel:
            found = f"elements {view[1]} to {view[1] + view[2]} of storage {_short.repr(key)}"
            raise self._error(f"found {found}, expected at most its {numel}")
        return _Storage(key, dtype, numel, view[1], view[2])


def _kind(value: object) -> str:
    return {_Global: "a global", _Tensor: "a tensor", _Storage: "a storage"}.get(type(value), type(value).__name__)


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _read_zip(path: pathlib.Path, mapped: mmap.mmap) -> tuple[object, _Spans]:
    """The object of archive/data.pkl, and where the storages archive/data/0, 1 … lie: in the open, not compressed."""
    try:
        with zipfile.ZipFile(mapped) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            repeated = len(entries) < len(archive.infolist())
    except _ZIP_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({error}), expected a zip of torch.save") from error
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or repeated:
        what = "entries of the same name" if repeated else f"{len(pickles)} entries data.pkl"
        raise InputError(f"{path}: found {what}, expected one data.pkl in a zip of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    spans = {}
    for name, entry in entries.items():
        if name.startswith((f"{root}data/", f"{root}byteorder", f"{root}data.pkl")):
            spans[name.removeprefix(root)] = _span(entry, mapped, f"{path}: entry {_short.repr(name)}")
    begin, size = spans.get("byteorder", (0, 0))
    order = mapped[begin : begin + min(size, 20)]
    if order not in (b"little", b""):
        raise InputError(f"{path}: byteorder: found {order!r}, expected b'little'")
    begin, size = spans["data.pkl"]
    machine = _Machine(mapped, begin, begin + size, path)
    found = machine.run()
    spans = {name.removeprefix("data/"): span for name, span in spans.items() if name.startswith("data/")}
    return found, spans


def _span(entry: zipfile.ZipInfo, mapped: mmap.mmap, where: str) -> tuple[int, int]:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise InputError(f"{where}: found it compressed or encrypted, expected it stored, as torch.save does")
    # The directory at the end does not say how long an entry's own header is: 30 bytes, a name, and padding.
    header = mapped[max(entry.header_offset, 0) : max(entry.header_offset, 0) + 30]
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise InputError(f"{where}: found no header at byte {entry.header_offset}, expected the entry there")
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if begin + entry.file_size > len(mapped):
        raise InputError(f"{where}: found a file of {len(mapped)} bytes, expected {begin + entry.file_size}")
    return begin, entry.file_size


def _read_pickles(path: pathlib.Path, mapped: mmap.mmap) -> tuple[object, _Spans]:
    """Five pickles: magic number, version, machine, the object, keys of storages; then each storage behind its size."""
    machine = _Machine(mapped, 0, len(mapped), path)
    for what, expected in (("magic number", _MAGIC), ("version", _PROTOCOL)):
        number = machine.run()
        if type(number) is not int or number != expected:
            raise InputError(f"{path}: {what}: found {_short.repr(number)}, expected {expected}")
    system = machine.run()
    little = system.get("little_endian") if type(system) is dict else None
    if little is not True:
        raise InputError(f"{path}: little_endian: found {_kind(little) if little else little}, expected True")
    found, keys = machine.run(), machine.run()
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(keys) != len(machine.storages):
        raise InputError(
            f"{path}: found no list of the {len(machine.storages)} storages, expected one behind the object"
        )
    at, spans = machine.at, {}
    for key in keys:
        where = f"{path}: storage {_short.repr(key)}"
        storage = machine.storages.get(key)
        if storage is None or key in spans:
            raise InputError(
                f"{where}: found it {'twice' if storage else 'without a use'}, expected every storage once"
            )
        size = storage.total * storage.dtype.itemsize
        if at + 8 + size > len(mapped):
            raise InputError(f"{where}: found {max(len(mapped) - at - 8, 0)} more bytes, expected {size}")
        count = int.from_bytes(mapped[at : at + 8], "little")
        if count != storage.total:
            raise InputError(f"{where}: found {count} elements, expected {storage.total}")
        spans[key] = at + 8, size
        at += 8 + size
    if at != len(mapped):
        raise InputError(f"{path}: found {len(mapped) - at} bytes behind the last storage, expected none")
    return found, spans


def _state_dict(found: object, path: pathlib.Path) -> dict:
    if type(found) is not dict:
        raise InputError(f"{path}: found {_kind(found)}, expected a dict of tensors")
    if not found or any(type(value) is _Tensor for value in found.values()):
        return found
    for key in ("state_dict", "model"):
        if type(found.get(key)) is dict:
            return found[key]
    raise InputError(
        f"{path}: found a dict without tensors, expected some, or a dict of them under state_dict or model"
    )


def _stored(tensor: _Tensor, where: str, mapped: mmap.mmap, spans: _Spans) -> StoredTensor:
    storage, dtype, shape, strides = tensor.storage, tensor.dtype, tensor.shape, tensor.strides
    for what, numbers in (("shape", shape), ("strides", strides)):
        if type(numbers) not in (tuple, list) or len(numbers) > _MAX_AXES or not all(map(_natural, numbers)):
            raise InputError(f"{where}: {what}: found {_kind(numbers)}, expected at most {_MAX_AXES} integers from 0")
    if len(shape) != len(strides) or not _natural(tensor.offset):
        raise InputError(f"{where}: found {len(strides)} strides, expected {len(shape)}, and an offset from 0")
    if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        raise InputError(f"{where}: shape: found {_short.repr(list(shape))}, expected less than 2**63 bytes")
    begin, size = spans.get(storage.key, (0, -1))
    expected = storage.total * storage.dtype.itemsize
    if size != expected:
        found = "no storage" if size < 0 else f"{size} bytes"
        raise InputError(f"{where}: found {found} under {_short.repr(storage.key)}, expected {expected} bytes")
    empty = 0 in shape
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    reach, own = 0 if empty else (last + 1) * dtype.itemsize, storage.numel * storage.dtype.itemsize
    if reach > own:
        layout = f"{dtype} {_short.repr(list(shape))} by strides {_short.repr(list(strides))} from {tensor.offset}"
        raise InputError(f"{where}: found a storage of {own} bytes, expected {reach} for {layout}")
    begin += 0 if empty else storage.begin * storage.dtype.itemsize + tensor.offset * dtype.itemsize
    # A step along an axis of one entry is never taken, and may be any number.
    steps = tuple(0 if empty or n == 1 else step * dtype.itemsize for n, step in zip(shape, strides, strict=True))
    return StoredTensor(tuple(shape), dtype, functools.partial(np.ndarray, tuple(shape), dtype, mapped, begin, steps))
