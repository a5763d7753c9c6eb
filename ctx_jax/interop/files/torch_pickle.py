"""The pickles that torch.save writes, run without Python's own reader, which obeys whatever a pickle says.

A pickle is a program that may call anything and build without end. A machine of the few opcodes that a dict of tensors
is made of runs it here. What it calls are names to the machine, each of them on a list; every opcode makes at most one
object, no larger than what the file spells out; and what the objects take is counted against the pickle's own size.

Sources: torch/_utils.py for what is called, pickletools for the opcodes.
"""

from __future__ import annotations

import mmap
import pathlib
import pickle
import struct
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.tensors import short

_MAX_OPCODES = 5_000_000  # a tensor takes some 25
# What the objects of a pickle may take: so many times the bytes that have been read, beside a first part that is free.
# By this count, which leaves out that most of them go again, those of a dict of small tensors take 13 to 33 times.
_MEMORY_PER_BYTE, _FREE_MEMORY = 48, 2**19
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

# Bytes that an opcode takes at most: of its object, and of the object's place in a list that grows.
_PLACE = 16
_MEMORY = dict.fromkeys((pickle.BININT2, pickle.BININT, pickle.BINFLOAT, pickle.LONG1), _PLACE + 32)
_MEMORY |= dict.fromkeys((*_TEXTS, *_BYTES, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.MARK), _PLACE + 64)
_MEMORY |= dict.fromkeys((*_TUPLES, pickle.TUPLE), _PLACE + 72)
_MEMORY |= dict.fromkeys((pickle.REDUCE, pickle.BUILD), _PLACE + 80)
_MEMORY |= {pickle.BINPERSID: _PLACE + 240, pickle.GLOBAL: _PLACE + 160, pickle.STACK_GLOBAL: _PLACE + 160}
_ITEM_MEMORY = 120  # of a dict, which grows too
_NOTHING = object()


@dataclass(frozen=True, slots=True)
class Global:
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`numel` elements from `begin` of the storage `key`, which has `total` of them."""

    key: str
    dtype: np.dtype
    total: int
    begin: int
    numel: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """As the pickle has it: nothing but the storage and the type is checked."""

    storage: Storage
    dtype: np.dtype
    offset: object
    shape: object
    strides: object


class Machine:
    """Runs the pickles of `data[at:end]`, one a call.

    Attributes:
      at: the byte behind the last opcode that has run.
      storages: those that the pickles have named, by key, as a whole.

    The objects of all pickles together take at most half a megabyte and 48 times the bytes that have been read.
    """

    def __init__(self, data: mmap.mmap, at: int, end: int, path: pathlib.Path):
        self.at, self.storages = at, {}
        self._data, self._end, self._path = data, end, path
        self._begin, self._left, self._taken = at, _MAX_OPCODES, 0

    def run(self) -> object:
        """The object of the next pickle."""
        self._stack, self._marks, self._memo = [], [], []
        while (opcode := self._take(1)) != pickle.STOP:
            self._left -= 1
            if self._left < 0:
                raise self._error(f"found more than {_MAX_OPCODES} opcodes, expected a dict of tensors")
            self._taken += _MEMORY.get(opcode, _PLACE)
            if self._taken > _FREE_MEMORY + _MEMORY_PER_BYTE * (self.at - self._begin):
                raise self._error(f"found objects of more than {_MEMORY_PER_BYTE} times its size, expected tensors")
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
            text = self._take(count).decode()
            self._taken += count if text.isascii() else 4 * count
            return text
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
            self._put(self._number(_PUTS[opcode]))
        elif opcode in _GETS:
            stack.append(self._memo[self._number(_GETS[opcode])])
            if stack[-1] is _NOTHING:
                raise IndexError
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
            count = self._number(_BYTES[opcode])
            self._taken += count
            stack.append(self._take(count))
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
                self._put(len(self._memo))
            case pickle.LONG1:
                stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
            case pickle.PROTO:
                self._take(1)
            case pickle.FRAME:
                self._take(8)
            case _:
                raise self._error(f"found opcode {opcode!r}, expected those of a dict of tensors")

    def _put(self, place: int) -> None:
        memo, item = self._memo, self._stack[-1]
        if place > len(memo) + 1:
            raise self._error(f"found memo place {place}, expected one up to {len(memo) + 1}: picklers count")
        if place > len(memo):
            memo.append(_NOTHING)  # Python 2 counted from 1
        memo[place : place + 1] = [item]

    def _last(self, kind: type) -> list | dict:
        if type(self._stack[-1]) is not kind:
            raise self._error(f"found {kind_of(self._stack[-1])}, expected a {kind.__name__}")
        return self._stack[-1]

    def _set_items(self, items: list) -> None:
        keys = items[::2]
        for key in keys:
            # Keys that nest can exhaust the stack, and larger integers can be made to share a hash.
            if not (type(key) is str or (type(key) is int and abs(key) < 2**60)):
                raise self._error(f"found {kind_of(key)} for a key, expected a string or a small integer")
        if len(items) % 2:
            raise self._error("found a key without a value, expected pairs")
        self._taken += _ITEM_MEMORY * len(keys)
        self._last(dict).update(zip(keys, items[1::2], strict=True))

    def _global(self, module: object, name: object) -> Global:
        if type(module) is not str or type(name) is not str:
            raise self._error(f"found {kind_of(module)} and {kind_of(name)}, expected the name of a global")
        if f"{module}.{name}" not in _GLOBALS:
            asked = short.repr(f"{module}.{name}")
            raise self._error(f"asks for {asked[1:-1]}, expected what a dict of tensors needs; nothing was run")
        return Global(f"{module}.{name}")

    def _call(self, function: object, arguments: object) -> object:
        name = function.name if type(function) is Global else ""
        count = len(arguments) if type(arguments) is tuple else -1
        if name == _DICT and count == 0:
            return {}
        if name == _PARAMETER and count == 3 and type(arguments[0]) is Tensor:
            return arguments[0]
        place = _REBUILD.get(name, count + 1)
        if count >= place and type(arguments[0]) is Storage:
            dtype, flags = arguments[0].dtype, arguments[place:]
            if name.endswith("v3"):
                dtype = _TYPES.get(arguments[6].name) if type(arguments[6]) is Global else None
            if dtype is None or len(flags) > 1 or any(flags):
                raise self._error("found a tensor that is conjugate, negative or of no type, expected a plain one")
            return Tensor(arguments[0], dtype, *arguments[1:4])
        raise self._error(
            f"found a call of {name or kind_of(function)} with {kind_of(arguments)}, expected torch.save's"
        )

    def _storage(self, name: object) -> Storage:
        """What stands for a storage: ("storage", type, key, device, number of elements[, view])."""
        if type(name) is not tuple or len(name) not in (5, 6) or type(name[0]) is not str or name[0] != "storage":
            raise self._error("found an object that lies outside the pickle, expected storages only")
        dtype = _STORAGE_TYPES.get(name[1].name) if type(name[1]) is Global else None
        key, numel = name[2], name[4]
        if dtype is None or type(key) is not str or not is_natural(numel):
            raise self._error("found a storage without type, key or size, expected all three")
        whole = Storage(key, dtype, numel, 0, numel)
        if self.storages.setdefault(key, whole) != whole:
            raise self._error(f"found storage {short.repr(key)} with two types or sizes, expected one")
        view = name[5] if len(name) == 6 else None
        if view is None:
            return whole
        if type(view) is not tuple or len(view) != 3 or not (is_natural(view[1]) and is_natural(view[2])):
            raise self._error(f"found a view of storage {short.repr(key)} without offset or size, expected both")
        if view[1] + view[2] > numel:
            found = f"elements {view[1]} to {view[1] + view[2]} of storage {short.repr(key)}"
            raise self._error(f"found {found}, expected at most its {numel}")
        return Storage(key, dtype, numel, view[1], view[2])


def kind_of(value: object) -> str:
    return {Global: "a global", Tensor: "a tensor", Storage: "a storage"}.get(type(value), type(value).__name__)


def is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
