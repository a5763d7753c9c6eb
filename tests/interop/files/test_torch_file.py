"""PyTorch's files: pickles put together opcode by opcode here, torch.save's own where there is torch, broken ones."""

import collections
import math
import pickle
import struct
import time
import tracemalloc
import zlib
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files import torch_pickle
from ctx_jax.interop.files.torch_file import read_torch

STORAGES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
UNTYPED = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "bfloat16": ml_dtypes.bfloat16,
}


# A writer of pickles that knows nothing of pickle but its opcodes.


@dataclass(frozen=True)
class Named:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    function: Named
    arguments: object
    state: object = None


@dataclass(frozen=True)
class Outside:
    name: tuple


@dataclass(frozen=True)
class Raw:
    code: bytes


class Assembler:
    """Protocol 2 or 4; what occurs again is taken from the memo, as picklers do."""

    def __init__(self, protocol=2):
        self.protocol, self.memo = protocol, {}

    def program(self, value):
        return b"\x80" + bytes([self.protocol]) + self.code(value) + b"."

    def remember(self, key, code):
        if key in self.memo:
            place = self.memo[key]
            return b"h" + bytes([place]) if place < 256 else b"j" + struct.pack("<I", place)
        self.memo[key] = place = len(self.memo)
        if self.protocol == 4:
            return code + b"\x94"
        return code + (b"q" + bytes([place]) if place < 256 else b"r" + struct.pack("<I", place))

    def text(self, value):
        raw = value.encode()
        if self.protocol == 4:
            return b"\x8c" + bytes([len(raw)]) + raw
        return b"X" + struct.pack("<I", len(raw)) + raw

    def code(self, value):
        match value:
            case Raw(code):
                return code
            case None | True | False:
                return {None: b"N", True: b"\x88", False: b"\x89"}[value]
            case str():
                return self.remember(value, self.text(value))
            case int():
                for opcode, format, low, high in (
                    (b"K", "<B", 0, 256),
                    (b"M", "<H", 0, 65536),
                    (b"J", "<i", -(2**31), 2**31),
                ):
                    if low <= value < high:
                        return opcode + struct.pack(format, value)
                raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(raw)]) + raw
            case float():
                return b"G" + struct.pack(">d", value)
            case bytes():
                return b"C" + bytes([len(value)]) + value
            case tuple() if len(value) < 4:
                return b"".join(map(self.code, value)) + (b")", b"\x85", b"\x86", b"\x87")[len(value)]
            case tuple():
                return b"(" + b"".join(map(self.code, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.code, value)) + b"e"
            case dict() if len(value) == 1:
                ((key, item),) = value.items()
                return b"}" + self.code(key) + self.code(item) + b"s"
            case dict():
                return b"}(" + b"".join(self.code(item) for pair in value.items() for item in pair) + b"u"
            case Named(module, name) if self.protocol == 4:
                return self.remember(value, self.code(module) + self.code(name) + b"\x93")
            case Named(module, name):
                return self.remember(value, b"c" + f"{module}\n{name}\n".encode())
            case Outside(name):
                return self.code(name) + b"Q"
            case Call(function, arguments, state):
                called = self.code(function) + self.code(arguments) + b"R"
                return called if state is None else called + self.code(state) + b"b"
        raise TypeError(value)


def ordered(items=None):
    """An OrderedDict as torch writes a state dict: with the versions of modules for an attribute."""
    empty = Call(Named("collections", "OrderedDict"), ())
    if items is None:
        return empty
    pairs = Raw(b"(") if items else None
    return empty if pairs is None else (empty, items)


def outside(storage, key, numel, *more, module="torch"):
    return Outside(("storage", Named(module, storage), key, "cpu", numel, *more))


def tensor(storage, offset, shape, strides, *flags):
    arguments = (storage, offset, shape, strides, False, ordered(), *flags)
    return Call(Named("torch._utils", "_rebuild_tensor_v2"), arguments)


def entry(name, data, *, alignment=64, method=0, stated=None, magic=b"PK\3\4", flags=0x800):
    """What comes before an entry's bytes and the directory's line, of an entry that is padded as torch pads."""
    name = name.encode()
    size = len(data) if stated is None else stated
    fields = (20, flags, method, 0, 0, zlib.crc32(data), size, size)

    def local(at):
        padding = 4 + -(at + 34 + len(name)) % alignment
        extra = b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4)
        return magic + struct.pack("<HHHHHIIIHH", *fields, len(name), len(extra)) + name + extra

    def central(at):
        return b"PK\1\2\0\0" + struct.pack("<HHHHHIIIHHHHHII", *fields, len(name), 0, 0, 0, 0, 0, at) + name

    return local, central, data


def zip_bytes(*entries):
    whole, directory = b"", b""
    for local, central, data in entries:
        at = len(whole)
        whole += local(at) + data
        directory += central(at)
    count = len(entries)
    return whole + directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(whole), 0)


def as_zip(program, storages, root="archive", byteorder=b"little"):
    entries = [entry(f"{root}/data.pkl", program)]
    if byteorder is not None:
        entries.append(entry(f"{root}/byteorder", byteorder))
    entries += [entry(f"{root}/data/{key}", array.tobytes()) for key, array in storages.items()]
    return zip_bytes(*entries, entry(f"{root}/version", b"3\n"))


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def as_pickles(program, storages, magic=0x1950A86A20F9469CFC6C, version=1001, system=SYSTEM, keys=None):
    start = b"".join(Assembler().program(value) for value in (magic, version, system))
    keys = list(storages) if keys is None else keys
    raw = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())
    return start + program + Assembler().program(keys) + raw


FORMATS = {"zip": as_zip, "pickles": as_pickles}
each_format = pytest.mark.parametrize("form", FORMATS)


def written(tmp_path, form, value, storages, protocol=2, **options):
    path = tmp_path / "x.bin"
    path.write_bytes(FORMATS[form](Assembler(protocol).program(value), storages, **options))
    return path


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        same(found[name].read(), array)
        assert not found[name].read().flags.writeable


def random_array(rng, dtype, size):
    dtype = np.dtype(dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else 256, size * dtype.itemsize, np.uint8).view(dtype)


def random_view(rng, size):
    """Offset, shape and strides of a tensor within `size` elements; axes turned, left out, of one entry or of none."""
    axes = int(rng.integers(0, 5))
    shape = [int(n) for n in rng.integers(0 if rng.random() < 0.2 else 1, 4, axes)]
    strides, step = [0] * axes, 1
    for axis in rng.permutation(axes):
        strides[axis] = step * int(rng.integers(0, 3))
        step = max(step, strides[axis] * max(shape[axis], 1))
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
    if reach >= size:
        return random_view(rng, size)
    return int(rng.integers(0, size - reach)), tuple(shape), tuple(strides)


def taken_one_by_one(storage, offset, shape, strides):
    places = np.full(shape, offset)
    for axis, (count, step) in enumerate(zip(shape, strides, strict=True)):
        places += step * np.arange(count).reshape(-1, *[1] * (len(shape) - axis - 1))
    return storage[places]


# Reading.


@each_format
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("seed", range(25))
def test_random_views_of_random_storages(tmp_path, form, protocol, seed):
    """Every type and pattern of bits; several tensors to a storage, one to many entries, none, scalars."""
    rng = np.random.default_rng(seed)
    value, storages, expected = {}, {}, {}
    for number, kind in enumerate(rng.permutation([*STORAGES, *UNTYPED])[:5]):
        key, size = str(number + 9), int(rng.integers(1, 40))
        storages[key] = array = random_array(rng, (STORAGES | UNTYPED)[str(kind)], size)
        for view in range(rng.integers(1, 4)):
            name = f"{kind}.{view}"
            layout = random_view(rng, size)
            if kind in STORAGES:
                value[name] = tensor(
                    outside(f"{kind}Storage", key, size, *([None] if form == "pickles" else [])), *layout
                )
                if rng.random() < 0.3:
                    value[name] = Call(Named("torch._utils", "_rebuild_parameter"), (value[name], True, ordered()))
            else:
                storages[key] = array.view(np.uint8)
                bytes_of = outside("UntypedStorage", key, array.nbytes, module="torch.storage")
                arguments = (bytes_of, *layout, False, ordered(), Named("torch", str(kind)))
                value[name] = Call(Named("torch._utils", "_rebuild_tensor_v3"), arguments)
            expected[name] = taken_one_by_one(array, *layout)
    same_tensors(read_torch(str(written(tmp_path, form, value, storages, protocol))), expected)


def test_values_are_views_of_the_file(tmp_path):
    storage = outside("FloatStorage", "0", 4)
    value = {"a": tensor(storage, 0, (2, 2), (2, 1)), "b": tensor(storage, 1, (3,), (1,))}
    found = read_torch(written(tmp_path, "zip", value, {"0": np.arange(4, dtype=np.float32)}))
    assert np.shares_memory(found["a"].read(), found["b"].read())
    (tmp_path / "x.bin").unlink()
    assert found["b"].read().tolist() == [1, 2, 3]


ONE = {"0": np.array([3, 4], np.int32)}
TWO = tensor(outside("IntStorage", "0", 2), 0, (2,), (1,))


@each_format
def test_a_state_dict_with_its_versions(tmp_path, form):
    """An OrderedDict filled by SETITEMS, then BUILD with `_metadata`: as torch.save writes a module's."""
    code = Assembler()
    program = b"\x80\x02" + code.code(ordered()) + b"(" + code.code("w") + code.code(TWO) + b"u"
    program += code.code({"_metadata": ordered()}) + b"b."
    path = tmp_path / "x.bin"
    path.write_bytes(FORMATS[form](program, ONE))
    same_tensors(read_torch(path), {"w": ONE["0"]})


@each_format
def test_other_entries_are_left_out(tmp_path, form):
    value = {"n": 3, "x": 0.5, "s": "text", "none": None, "yes": True, "b": b"raw", "big": 2**80, "w": TWO, "neg": -5}
    same_tensors(read_torch(written(tmp_path, form, value, ONE)), {"w": ONE["0"]})


@each_format
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_one_level_down(tmp_path, form, key):
    value = {"epoch": 3, "names": ["a"], key: {"w": TWO, "steps": 7}, "optimizer": {"state": {0: {"m": TWO}}}}
    same_tensors(read_torch(written(tmp_path, form, value, ONE)), {"w": ONE["0"]})


def test_state_dict_goes_before_model_and_tensors_before_both(tmp_path):
    value = {"model": {"m": TWO}, "state_dict": {"s": TWO}}
    assert list(read_torch(written(tmp_path, "zip", value, ONE))) == ["s"]
    value = {"model": 4, "state_dict": {"s": TWO}}
    assert list(read_torch(written(tmp_path, "zip", value, ONE))) == ["s"]
    assert list(read_torch(written(tmp_path, "zip", {"model": TWO, "state_dict": "x"}, ONE))) == ["model"]


@each_format
def test_no_tensors_in_an_empty_dict(tmp_path, form):
    assert dict(read_torch(written(tmp_path, form, {}, {}))) == {}


def test_zips_of_older_and_other_names(tmp_path):
    """No byte order, another root, storages under long keys."""
    value = {"w": tensor(outside("cuda.IntStorage", "94318", 2, module="torch"), 0, (2,), (1,))}
    path = written(tmp_path, "zip", value, {"94318": ONE["0"]}, root="pytorch_model", byteorder=None)
    same_tensors(read_torch(path), {"w": ONE["0"]})


def test_pickles_of_python_2_and_before_0_4(tmp_path):
    """Strings of bytes, a rebuilding without gradient and hooks, a storage that is a part of another."""
    whole = np.arange(8, dtype=np.int16)
    part = outside("ShortStorage", "1", 8, ("2", 3, 4), module="torch.cuda")
    rebuilt = Call(Named("torch._utils", "_rebuild_tensor"), (part, 1, (2,), (2,)))
    value = {"w": rebuilt, "v": tensor(outside("ShortStorage", "1", 8, None), 7, (), ())}
    code = Assembler()
    code.text = lambda text: b"U" + bytes([len(text)]) + text.encode()
    path = tmp_path / "x.bin"
    path.write_bytes(as_pickles(code.program(value), {"1": whole}))
    same_tensors(read_torch(path), {"w": np.array([4, 6], np.int16), "v": np.array(7, np.int16)})


@pytest.mark.parametrize("flags", [(None,), ({},)])
def test_flags_that_say_nothing(tmp_path, flags):
    value = {"w": tensor(outside("IntStorage", "0", 2), 0, (2,), (1,), *flags)}
    same_tensors(read_torch(written(tmp_path, "zip", value, ONE)), {"w": ONE["0"]})


# Refusals.


def refused(path, *messages):
    with pytest.raises(InputError) as caught:
        read_torch(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    for message in messages:
        assert message in text


def call(name, *arguments, module="torch._utils"):
    return Call(Named(module, name), arguments)


INT = outside("IntStorage", "0", 2)
DEEP = Raw(b")" + b"\x85" * 5000)  # as deep as nothing but objects may be
BAD_OBJECTS = {
    "os.system": ({"w": call("system", "touch x", module="os")}, "asks for os.system, expected what a dict of"),
    "builtins": ({"w": call("eval", "1", module="builtins")}, "asks for builtins.eval"),
    "part of torch": ({"w": call("load", "x", module="torch")}, "asks for torch.load"),
    "other storage": ({"w": tensor(outside("QInt8Storage", "0", 8), 0, (2,), (1,))}, "asks for torch.QInt8Storage"),
    "long name": ({"w": Named("a" * 100, "b" * 150)}, "asks for aaa", "..."),
    "name without end": (
        {"w": Raw(b"c" + b"a" * 300 + b"\nb\n")},
        "found no end to a name, expected one of at most 256 bytes",
    ),
    "name not text": (Raw(b"K\1K\2\x93"), "found int and int, expected the name of a global"),
    "name not UTF-8": (Raw(b"cos\xff\nx\n"), "found a string that is not UTF-8 (invalid start byte)"),
    "no function": ({"w": Raw(b"K\1)R")}, "found a call of int with tuple, expected torch.save's"),
    "a call of a type": (call("FloatStorage", 5, module="torch"), "found a call of torch.FloatStorage with tuple"),
    "no arguments": ({"w": Raw(b"ccollections\nOrderedDict\nK\1R")}, "a call of collections.OrderedDict with int"),
    "pairs": (call("OrderedDict", [("a", 1)], module="collections"), "call of collections.OrderedDict with tuple"),
    "few arguments": ({"w": call("_rebuild_tensor_v2", INT, 0, (2,), (1,))}, "call of torch._utils._rebuild_tensor_v2"),
    "no storage": (
        {"w": tensor("storage", 0, (2,), (1,))},
        "found a call of torch._utils._rebuild_tensor_v2 with tuple",
    ),
    "parameter": ({"w": call("_rebuild_parameter", 1, True, {})}, "found a call of torch._utils._rebuild_parameter"),
    "conjugate": ({"w": tensor(INT, 0, (2,), (1,), {"conj": True})}, "found a tensor that is conjugate, negative or"),
    "many": ({"w": tensor(INT, 0, (2,), (1,), None, None)}, "found a tensor that is conjugate, negative or of no type"),
    "no type": ({"w": call("_rebuild_tensor_v3", INT, 0, (2,), (1,), False, {}, "float")}, "or of no type, expected"),
    "a type of storage": (
        {"w": call("_rebuild_tensor_v3", INT, 0, (2,), (1,), False, {}, Named("torch", "IntStorage"))},
        "or of no type, expected a plain one",
    ),
    "state of a tensor": ({"w": Call(TWO.function, TWO.arguments, {"a": 1})}, "found a tensor, expected a dict"),
    "outside": ({"w": Outside("key")}, "found an object that lies outside the pickle, expected storages only"),
    "module": ({"w": Outside(("module", "a", "b", "c", "d"))}, "found an object that lies outside the pickle"),
    "deep outside": ({"w": Outside((DEEP, 1, 2, 3, 4))}, "found an object that lies outside the pickle"),
    "typeless": ({"w": Outside(("storage", "Float", "0", "cpu", 2))}, "found a storage without type, key or size"),
    "typed": ({"w": Outside(("storage", Named("torch", "int32"), "0", "cpu", 2))}, "found a storage without type, key"),
    "key": ({"w": outside("IntStorage", 0, 2)}, "found a storage without type, key or size"),
    "numel": ({"w": outside("IntStorage", "0", -2)}, "found a storage without type, key or size"),
    "huge": ({"w": outside("IntStorage", "0", 2**63)}, "found a storage without type, key or size"),
    "two types": ([INT, outside("FloatStorage", "0", 2)], "found storage '0' with two types or sizes, expected one"),
    "two sizes": ([INT, outside("IntStorage", "0", 3)], "found storage '0' with two types or sizes, expected one"),
    "view": ({"w": outside("IntStorage", "0", 2, ("1", 0))}, "found a view of storage '0' without offset or size"),
    "view numbers": (
        {"w": outside("IntStorage", "0", 2, ("1", 0, -1))},
        "a view of storage '0' without offset or size",
    ),
    "view behind": (
        {"w": outside("IntStorage", "0", 2, ("1", 1, 2))},
        "found elements 1 to 3 of storage '0', expected",
    ),
    "list": ([TWO], "found list, expected a dict of tensors"),
    "tensor": (TWO, "found a tensor, expected a dict of tensors"),
    "no tensors": (
        {"epoch": 3, "list": [TWO]},
        "found a dict without tensors, expected some, or a dict of them under state_dict or",
    ),
    "nested": (
        {"w": TWO, "x": {"y": TWO}},
        "found dict under 'x', expected tensors under strings, numbers and strings",
    ),
    "number": ({"w": TWO, 5: TWO}, "found a tensor under 5, expected tensors under strings"),
    "key tuple": ({(1, 2): 3, "a": 1}, "found tuple for a key, expected a string or a small integer"),
    "key deep": ({DEEP: 3, "a": 1}, "found tuple for a key"),
    "key large": ({2**61: 3}, "found int for a key, expected a string or a small integer"),
    "key float": ({1.5: 3}, "found float for a key"),
    "key alone": (Raw(b"}(K\1u"), "found a key without a value, expected pairs"),
    "set on list": (Raw(b"]K\1K\2s"), "found list, expected a dict"),
    "append to dict": (Raw(b"}K\1a"), "found dict, expected a list"),
    "appends to dict": (Raw(b"}(K\1e"), "found dict, expected a list"),
    "set": (Raw(b"\x8f"), "found opcode b'\\x8f', expected those of a dict of tensors"),
    "inst": (Raw(b"(ios\nsystem\n"), "found opcode b'i', expected those of a dict of tensors"),
    "new": (Raw(b"ccollections\nOrderedDict\n)\x81"), "found opcode b'\\x81', expected those of"),
    "extension": (Raw(b"\x82\1"), "found opcode b'\\x82', expected those of a dict of tensors"),
    "dup": (Raw(b"K\x012"), "found opcode b'2', expected those of a dict of tensors"),
    "long": (Raw(b"\x8b\xff\xff\xff\x7f"), "found opcode b'\\x8b', expected those of a dict of tensors"),
    "end": (Raw(b"X\xff\xff\xff\xffabc"), "more bytes, expected 4294967295"),
    "end of 8": (Raw(b"\x8d" + b"\xff" * 8), "more bytes, expected 18446744073709551615"),
    "stack": (Raw(b"\x85"), "opcode b'\\x85' takes what nothing put there"),
    "tuple": (Raw(b"t"), "opcode b't' takes what nothing put there"),
    "mark": (Raw(b"(R"), "opcode b'R' takes what nothing put there"),
    "put": (Raw(b"q\0"), "opcode b'q' takes what nothing put there"),
    "get": (Raw(b"h\0"), "opcode b'h' takes what nothing put there"),
    "nothing": (Raw(b""), "found nothing on the stack, expected an object"),
}


@each_format
@pytest.mark.parametrize("what", BAD_OBJECTS)
def test_bad_pickles_are_refused(tmp_path, form, what):
    value, *messages = BAD_OBJECTS[what]
    refused(written(tmp_path, form, value, ONE), *messages)


def test_nothing_is_run(tmp_path):
    """What Python's own reader would run without a question."""
    mark = tmp_path / "mark"
    program = b"\x80\x02cos\nmkdir\n" + Assembler().code((str(mark),)) + b"R."
    for form in FORMATS:
        path = tmp_path / "x.bin"
        path.write_bytes(FORMATS[form](program, {}))
        refused(path, "asks for os.mkdir, expected what a dict of tensors needs; nothing was run")
        assert not mark.exists()
    pickle.loads(program)
    assert mark.exists()


BIG = 2**61
FOUR = "FloatStorage", "0", 4
BAD_TENSORS = {
    "shape": ((0, 2, (1,)), "shape: found int, expected at most 64 integers from 0"),
    "negative": ((0, (-2,), (1,)), "shape: found tuple, expected at most 64 integers from 0"),
    "truth": ((0, (True,), (1,)), "shape: found tuple, expected at most 64 integers from 0"),
    "axes": ((0, (1,) * 65, (1,) * 65), "shape: found tuple, expected at most 64 integers"),
    "strides": ((0, (2,), None), "strides: found NoneType, expected at most 64 integers from 0"),
    "backwards": ((1, (2,), (-1,)), "strides: found tuple, expected at most 64 integers from 0"),
    "lengths": ((0, (2, 1), (1,)), "found 1 strides, expected 2, and an offset from 0"),
    "offset": ((-1, (2,), (1,)), "found 1 strides, expected 1, and an offset from 0"),
    "offset float": ((0.0, (2,), (1,)), "found 1 strides, expected 1, and an offset from 0"),
    "overflow": ((0, (BIG, 2), (0, 0)), f"shape: found [{BIG}, 2], expected sizes from 0 and less"),
    "overflow at 0": ((0, (BIG, 0), (0, 0)), f"shape: found [{BIG}, 0], expected sizes from 0 and less"),
    "too many": ((0, (5,), (1,)), "found a storage of 16 bytes, expected 20 for float32 [5] by strides [1] from 0"),
    "too far": ((1, (4,), (1,)), "found a storage of 16 bytes, expected 20 for float32 [4] by strides [1] from 1"),
    "too wide": ((0, (2, 2), (3, 2)), "found a storage of 16 bytes, expected 24 for float32 [2, 2] by strides [3, 2]"),
    "too wide for 64 bits": (
        (0, (2,), (BIG,)),
        f"found a storage of 16 bytes, expected {4 * BIG + 4} for float32 [2] by",
    ),
    "scalar": ((4, (), ()), "found a storage of 16 bytes, expected 20 for float32 [] by strides [] from 4"),
}


@each_format
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_lie_within_their_storage(tmp_path, form, what):
    layout, message = BAD_TENSORS[what]
    value = {"fine": tensor(outside(*FOUR), 3, (), ()), "a.b": tensor(outside(*FOUR), *layout)}
    refused(written(tmp_path, form, value, {"0": np.zeros(4, np.float32)}), f"tensor 'a.b': {message}")


def test_tensors_lie_within_their_part_of_a_storage(tmp_path):
    value = {"w": tensor(outside(*FOUR, ("1", 1, 2)), 0, (3,), (1,))}
    path = written(tmp_path, "pickles", value, {"0": np.zeros(4, np.float32)})
    refused(path, "tensor 'w': found a storage of 8 bytes, expected 12 for float32 [3] by strides [1] from 0")


@each_format
@pytest.mark.parametrize("layout", [(9, (0,), (1,)), (0, (3, 0), (BIG, 5)), (2, (1, 1), (BIG, 7)), (3, (1,), (9,))])
def test_steps_that_are_not_taken_do_not_matter(tmp_path, form, layout):
    value = {"w": tensor(outside(*FOUR), *layout)}
    found = read_torch(written(tmp_path, form, value, {"0": np.arange(4, dtype=np.float32)}))["w"].read()
    assert found.shape == layout[1]
    assert found.tolist() == np.full(layout[1], layout[0]).tolist()


def test_storages_of_a_zip(tmp_path):
    path = written(tmp_path, "zip", {"w": TWO}, {"1": ONE["0"]})
    refused(path, "tensor 'w': found no storage under '0', expected 8 bytes")
    path = written(tmp_path, "zip", {"w": TWO}, {"0": np.zeros(3, np.int32)})
    refused(path, "tensor 'w': found 12 bytes under '0', expected 8 bytes")


PROGRAM = Assembler().program({"w": TWO})
PICKLE, NUMBERS = entry("a/data.pkl", PROGRAM), b"\0" * 8
BAD_ZIPS = {
    "compressed": (
        [PICKLE, entry("a/data/0", NUMBERS, method=8)],
        "entry 'a/data/0': found it compressed, expected it as",
    ),
    "compressed pickle": ([entry("a/data.pkl", PROGRAM, method=8)], "entry 'a/data.pkl': found it compressed"),
    "encrypted": ([PICKLE, entry("a/data/0", NUMBERS, flags=1)], "entry 'a/data/0': found it encrypted, expected"),
    "no header": ([PICKLE, entry("a/data/0", NUMBERS, magic=b"PK\7\7")], "entry 'a/data/0': found no header at byte"),
    "behind the end": ([PICKLE, entry("a/data/0", NUMBERS, stated=10_000)], "entry 'a/data/0': found a file of"),
    "no pickle": (
        [entry("a/data/0", NUMBERS)],
        "found 0 entries data.pkl, expected one in a zip of torch.save",
    ),
    "two pickles": ([PICKLE, entry("b/data.pkl", PROGRAM)], "found 2 entries data.pkl, expected one"),
    "twice": (
        [PICKLE, entry("a/data/0", NUMBERS), entry("a/data/0", NUMBERS)],
        "entry 'a/data/0': found it twice, expected names",
    ),
    "big": (
        [PICKLE, entry("a/data/0", NUMBERS), entry("a/byteorder", b"big")],
        "byteorder: found b'big', expected b'l",
    ),
    "long order": ([PICKLE, entry("a/data/0", NUMBERS), entry("a/byteorder", b"x" * 99)], "byteorder: found b'xxxx"),
}


@pytest.mark.parametrize("what", BAD_ZIPS)
def test_bad_zips_are_refused(tmp_path, what):
    entries, message = BAD_ZIPS[what]
    path = tmp_path / "x.bin"
    path.write_bytes(zip_bytes(*entries))
    refused(path, message)


def test_a_pickle_ends_with_its_entry(tmp_path):
    """Not with the file: what comes behind it belongs to others."""
    path = tmp_path / "x.bin"
    path.write_bytes(zip_bytes(entry("a/data.pkl", PROGRAM[:-1]), entry("a/data/0", NUMBERS)))
    refused(path, "found 0 more bytes, expected 1")


def test_a_zip_without_a_directory(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(as_zip(PROGRAM, ONE)[:-30])
    refused(path, "found no end of a zip directory, expected a whole zip file")


BAD_STREAMS = {
    "magic": ({"magic": 7}, "magic number: found 7, expected 119547037146038801333356"),
    "no magic": ({"magic": {"w": 1}}, "magic number: found {'w': 1}, expected 119547037146038801333356"),
    "version": ({"version": 1000}, "version: found 1000, expected 1001"),
    "big-endian": ({"system": SYSTEM | {"little_endian": False}}, "little_endian: found False, expected True"),
    "no system": ({"system": 3}, "little_endian: found None, expected True"),
    "truth of another kind": ({"system": SYSTEM | {"little_endian": [1]}}, "little_endian: found list, expected True"),
    "keys": ({"keys": "0"}, "found no list of the 1 storages, expected one behind the object"),
    "few keys": ({"keys": []}, "found no list of the 1 storages, expected one behind the object"),
    "number": ({"keys": [0]}, "found no list of the 1 storages, expected one behind the object"),
    "unknown": ({"keys": ["1"]}, "storage '1': found it without a use, expected every storage once"),
}


@pytest.mark.parametrize("what", BAD_STREAMS)
def test_bad_streams_are_refused(tmp_path, what):
    options, message = BAD_STREAMS[what]
    refused(written(tmp_path, "pickles", {"w": TWO}, ONE, **options), message)


def test_a_key_that_is_there_twice(tmp_path):
    other = tensor(outside("IntStorage", "1", 2), 0, (2,), (1,))
    path = written(tmp_path, "pickles", {"w": TWO, "v": other}, {**ONE, "1": ONE["0"]}, keys=["0", "0"])
    refused(path, "storage '0': found it twice, expected every storage once")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw + b"1", "found 1 bytes behind the last storage, expected none"),
        (lambda raw: raw[:-1], "storage '0': found 7 more bytes, expected 8"),
        (lambda raw: raw[:-12], "storage '0': found 0 more bytes, expected 8"),
        (lambda raw: raw[:-16] + struct.pack("<q", 3) + raw[-8:], "storage '0': found 3 elements, expected 2"),
    ],
)
def test_storages_of_a_stream(tmp_path, change, message):
    path = tmp_path / "x.bin"
    path.write_bytes(change(as_pickles(PROGRAM, ONE)))
    refused(path, message)


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK", b"PK\3\4", b"storages\0ustar", b"L1195L\n.", b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    refused(path, "expected")


def test_paths_that_are_no_files(tmp_path):
    refused(tmp_path / "no", f"{tmp_path / 'no'}: cannot be read (No such file or directory)")
    refused(tmp_path, f"{tmp_path}: cannot be read (Is a directory)")


# Pickles that are made to eat memory or time.


def peak_of(path):
    """Bytes of Python's memory that reading took, and whether it ended in InputError."""
    tracemalloc.start()
    try:
        read_torch(path)
        failed = False
    except InputError:
        failed = True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, failed


BOMBS = {
    "tuples in tuples": b")" + b"\x85" * 200_000,
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    "dicts in dicts": b"}" + b"K\1}" * 100_000 + b"s" * 100_000,
    "dicts": b"}" * 200_000,
    "marks": b"(" * 200_000,
    "doubled": b")q\0" + b"h\0h\0\x86q\0" * 30_000,
    "far memo": b")" + b"r\xff\xff\xff\xff" * 100 + b"j\xff\xff\xff\xff",
    "copies": b"](" + b"K\1" * 30_000 + b"eq\0" + b"(h\0h\0t" * 30_000,
    "calls": b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * 50_000,
    "wide characters": b"X" + struct.pack("<I", 200_004) + "\U0001f600".encode() + b"a" * 200_000,
    "integers": (b"\x8a\xff" + b"\x7f" * 255) * 1000,
    "keys of one hash": b"}(" + b"".join(b"\x8a\x09" + struct.pack("<Q", 0) + b"\1K\1" for _ in range(9)) + b"u",
}


@each_format
@pytest.mark.parametrize("what", BOMBS)
def test_small_files_stay_small(tmp_path, form, what):
    """In memory and in time: objects are counted against the bytes of the pickle."""
    program = b"\x80\x02" + BOMBS[what] + b"N."
    path = tmp_path / "x.bin"
    path.write_bytes(FORMATS[form](program, {}))
    began = time.process_time()
    peak, failed = peak_of(path)
    assert failed
    assert peak < 2**20 + 64 * len(program)
    assert time.process_time() - began < 10


@each_format
@pytest.mark.parametrize("protocol", [2, 4])
def test_many_small_tensors_are_fine(tmp_path, form, protocol):
    """They are no attack: views of one storage, each of one element, under the shortest names."""
    places = {str(n): tensor(outside("FloatStorage", "0", 5000), n, (1,), (1,)) for n in range(5000)}
    path = written(tmp_path, form, places, {"0": np.zeros(5000, np.float32)}, protocol)
    peak, failed = peak_of(path)
    assert not failed
    assert peak < 2**20 + 64 * path.stat().st_size


@each_format
def test_many_names_of_one_tensor(tmp_path, form):
    """Nine bytes make a tensor; some thousand are enough."""
    code = Assembler()
    first = code.code("a") + code.code(TWO)
    place = bytes([len(code.memo)])
    same = b"".join(b"\x8c\x04%04xh" % n + place for n in range(50_000))
    program = b"\x80\x02}(" + first + b"q" + place + same + b"u."
    path = tmp_path / "x.bin"
    path.write_bytes(FORMATS[form](program, ONE))
    peak, failed = peak_of(path)
    assert not failed
    assert peak < 2**20 + 64 * len(program)


def test_opcodes_are_counted(tmp_path, monkeypatch):
    """Five million; a small number here."""
    monkeypatch.setattr(torch_pickle, "_MAX_OPCODES", 1000)
    path = written(tmp_path, "zip", {"a": [1] * 990, "w": TWO}, ONE)
    refused(path, "found more than 1000 opcodes, expected a dict of tensors")
    assert list(read_torch(written(tmp_path, "zip", {"a": 1, "w": TWO}, ONE))) == ["w"]


def mutated(rng, program, words):
    """One or two changes: bytes turned, put in, taken out, doubled; opcodes in the place of others."""
    program = bytearray(program)
    for _ in range(rng.integers(1, 3)):
        place = int(rng.integers(len(program)))
        span = slice(place, place + int(rng.integers(1, 20)))
        match rng.integers(6):
            case 0:
                program[place] = rng.integers(256)
            case 1:
                program[place:place] = rng.bytes(rng.integers(1, 5))
            case 2:
                del program[span]
            case 3:
                program[place:place] = program[span]
            case 4:
                program[place : place + 1] = words[rng.integers(len(words))]
            case 5:
                program[place] ^= 1 << int(rng.integers(8))
    return bytes(program)


OPCODES = [bytes([code]) for code in range(256) if bytes([code]) in b"(.0123FIJKMLNPQRSTUVX]abcdeghijloprstu)}GBC"]
OPCODES += [bytes([code]) for code in range(0x80, 0x99)] + [
    b"\xff\xff\xff\xff",
    b"h\0",
    b"q\0",
    b"\x8a\xff",
    b"cos\nsystem\n)R",
]


def fuzz_subject():
    rng = np.random.default_rng(3)
    storages = {"0": random_array(rng, np.float32, 12), "1": random_array(rng, np.int64, 3), "2": np.zeros(8, np.uint8)}
    bytes_of = outside("UntypedStorage", "2", 8, module="torch.storage")
    value = {
        "a.weight": tensor(outside("FloatStorage", "0", 12), 0, (3, 4), (4, 1)),
        "a.turned": tensor(outside("FloatStorage", "0", 12), 1, (2, 3), (1, 4)),
        "ids": tensor(outside("LongStorage", "1", 3), 0, (1, 3), (3, 1)),
        "steps": 7,
        "half": call("_rebuild_tensor_v3", bytes_of, 0, (4,), (1,), False, ordered(), Named("torch", "bfloat16")),
    }
    return value, storages


def read_all(watch, path, contents, data):
    for content in contents:
        for tensor, values in (watch(read_torch, path, content) or {}).values():
            assert math.prod(tensor.shape) < 1000
            assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
            assert set(values.tobytes()) <= data


@each_format
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_pickles(tmp_path, watch, form, protocol, count):
    """They end in tensors of bytes that the storages hold, or in InputError."""
    value, storages = fuzz_subject()
    program = Assembler(protocol).program(value)
    rng = np.random.default_rng([protocol, count])
    contents = (FORMATS[form](mutated(rng, program, OPCODES), storages) for _ in range(count))
    read_all(watch, tmp_path / "x.bin", contents, set(b"".join(a.tobytes() for a in storages.values())))
    assert 0.01 < watch.fine / count < 0.8


@each_format
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, watch, form, count):
    """Broken anywhere: in the directory of the zip, between the pickles, in the sizes of storages."""
    value, storages = fuzz_subject()
    whole = FORMATS[form](Assembler().program(value), storages)
    rng = np.random.default_rng([9, count])
    contents = (mutated(rng, whole, OPCODES) for _ in range(count))
    read_all(watch, tmp_path / "x.bin", contents, set(range(256)))
    assert 0.01 < watch.fine / count < 0.97


# PyTorch's own files.


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def from_torch(torch, tensor):
    """The bits of a tensor, through bytes: NumPy has not all of its types."""
    dtype = {name.lower(): kind for name, kind in (UNTYPED | {"bool": np.bool_}).items()}
    name = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
    return raw.view(np.dtype(dtype.get(name, name))).reshape(tuple(tensor.shape))


def torch_state(torch, types):
    torch.manual_seed(0)
    state = collections.OrderedDict()
    for name in types:
        state[f"all.{name}"] = torch.randint(0, 2, (3, 4)).to(getattr(torch, name))
    base = torch.randn(5, 6, 7)
    state |= {
        "base": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1:4, ::2, 3],
        "row": base[2],
        "scalar": base[0, 0, 0],
        "expanded": base[0, :, :1].expand(6, 9),
        "empty": base[:0],
        "none": torch.zeros(0, 3),
        "half": torch.randn(4, 4).half().t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "steps": 5,
    }
    return state


@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickles"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(torch, tmp_path, new, protocol):
    types = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = torch_state(torch, [*types, *UNTYPED] if new else types)
    path = tmp_path / "x.bin"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    loaded = torch.load(path, weights_only=False)  # it warns of later protocols otherwise
    found = read_torch(path)
    expected = {name: from_torch(torch, loaded[name]) for name in state if name != "steps"}
    same_tensors(found, expected)
    assert np.shares_memory(found["base"].read(), found["turned"].read())


@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickles"])
def test_reads_a_modules_state(torch, tmp_path, new):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[1].weight = module[0].bias
    path = tmp_path / "x.bin"
    expected = {name: from_torch(torch, value) for name, value in module.state_dict().items()}
    for state in (
        module.state_dict(),
        {"model": module.state_dict(), "optimizer": torch.optim.Adam(module.parameters()).state_dict()},
    ):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        same_tensors(read_torch(path), expected)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickles"])
def test_whole_modules_of_torch_are_refused(torch, tmp_path, new):
    path = tmp_path / "x.bin"
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=new)
    refused(path, "asks for torch.nn.modules.linear.Linear")


def test_conjugate_tensors_of_torch_are_refused(torch, tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, path)
    refused(path, "asks for torch.ComplexFloatStorage")
    torch.save({"a": torch._neg_view(torch.ones(2))}, path)
    refused(path, "found a tensor that is conjugate, negative or of no type")


def test_the_files_written_here_are_torchs(torch, tmp_path):
    """The writer of these tests, read by torch, which cannot read its own newer types in the older format."""
    value, storages = fuzz_subject()
    del value["half"], storages["2"]
    for form in FORMATS:
        path = written(tmp_path, form, value, storages)
        if form == "pickles":
            path.write_bytes(as_pickles(Assembler().program(with_views(value)), storages))
        loaded = torch.load(path, weights_only=True)
        found = read_torch(path)
        assert set(found) == set(loaded) - {"steps"}
        for name in found:
            same(found[name].read(), from_torch(torch, loaded[name]))


def with_views(value):
    """The same with the sixth field of a storage, which torch's reader of the older format insists on."""
    match value:
        case dict():
            return {name: with_views(item) for name, item in value.items()}
        case Call(function, arguments, state):
            return Call(function, tuple(map(with_views, arguments)), state)
        case Outside(name) if len(name) == 5:
            return Outside((*name, None))
    return value


# Memory.


@pytest.mark.slow
@each_format
def test_a_large_file_is_not_read_before_its_values(tmp_path, form):
    numel = 1 << 18
    storages = {str(i): np.full(numel, i, np.float32) for i in range(200)}
    value = {f"layer.{key}": tensor(outside("FloatStorage", key, numel), 0, (512, 512), (512, 1)) for key in storages}
    path = written(tmp_path, form, value, storages)
    del storages
    assert path.stat().st_size > 200_000_000
    tracemalloc.start()
    found = read_torch(path)
    values = [stored.read() for stored in found.values()]
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert [float(value[-1, -1]) for value in values] == [float(name.split(".")[1]) for name in found]
