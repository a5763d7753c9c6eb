"""Safetensors against the bytes that the format's page asks for, the package, and ten thousand broken headers."""

import json
import math
import os
import pathlib
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files import safetensors_file
from ctx_jax.interop.files.safetensors_file import read_safetensors, write_safetensors
from ctx_jax.interop.files.shards import read_shards

CODES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


def by_hand(header, data=b""):
    """The bytes of a file; a header that is bytes or text goes in as it is."""
    text = header if isinstance(header, bytes) else header if isinstance(header, str) else json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def random_array(rng, dtype, shape):
    """Every pattern of bits, NaNs of all kinds too."""
    dtype = np.dtype(dtype)
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def random_tensors(rng):
    names = ["w", "a.b", "z", "layer.10.kernel", "layer.9.kernel", "é", 'q"\\\n', ""]
    shapes = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3), (4, 1, 3), (1, 2, 1, 2, 1)]
    codes = rng.permutation(list(CODES))[: rng.integers(0, len(names) + 1)]
    return {
        str(name): random_array(rng, CODES[code], shapes[rng.integers(len(shapes))])
        for name, code in zip(rng.permutation(names), codes, strict=False)
    }


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def same_tensors(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        same(found[name].read(), array)


# Reading.


@pytest.mark.parametrize("pad", range(8))
def test_reads_what_the_page_describes(tmp_path, pad):
    """Offsets out of the header's order, and values that lie at addresses of all kinds."""
    rng = np.random.default_rng(pad)
    arrays = {code: random_array(rng, dtype, (2, 3)) for code, dtype in CODES.items()}
    arrays |= {"scalar": np.float32(-2.5).reshape(()), "empty": np.zeros((0, 7), np.int16), "metadata": np.arange(3)}
    names = {dtype: code for code, dtype in CODES.items()}
    header, data = {"__metadata__": {"format": "pt", "": "ü"}}, b""
    for name in rng.permutation(list(arrays)):
        array = arrays[name]
        end = len(data) + array.nbytes
        header[str(name)] = entry(names[array.dtype.type], list(array.shape), len(data), end)
        data += array.tobytes()
    header = dict(reversed(header.items()))
    path = tmp_path / "x.safetensors"
    path.write_bytes(by_hand(json.dumps(header) + " " * pad, data))
    found = read_safetensors(str(path))
    assert list(found) == [name for name in header if name != "__metadata__"]
    same_tensors(found, arrays)


def test_values_are_views_of_the_file(tmp_path):
    """No copy, and nothing to write to; they outlive the mapping and the file's name."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(by_hand({"a": entry("I32", [2], 0, 8)}, struct.pack("<2i", 1, 2)))
    tensors = read_safetensors(path)
    first, second = tensors["a"].read(), tensors["a"].read()
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 3
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<2i", 5, 6))
    assert first.tolist() == [5, 6]
    path.unlink()
    del tensors, second
    assert first.tolist() == [5, 6]


def test_a_file_without_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(by_hand({}))
    assert dict(read_safetensors(path)) == {}


FLOAT = entry("F32", [2, 2], 0, 16)
ZERO = entry("F32", [0], 0, 0)
LONG = "n" * 500
EXPECTED = "expected the type, shape and offsets of tensor 'a' between braces"
BAD = {
    "no length": (b"1234567", "found 7 bytes, expected at least 8"),
    "empty": (b"", "found 0 bytes, expected at least 8"),
    "length behind the end": (struct.pack("<Q", 3) + b"{}", "found a header of 3 bytes, expected at most 2"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "found a header of 18446744073709551615 bytes, expected at most 2"),
    "no object": (by_hand([]), "header: found b'[]' at byte 0, expected {"),
    "nothing": (by_hand(b""), "header: found b'' at byte 0, expected {"),
    "space first": (by_hand(b" {}"), "header: found b' {}' at byte 0, expected {"),
    "not JSON": (by_hand(b"{'a': 1}"), "header: found b\"'a': 1}\" at byte 1, expected a name and a colon"),
    "no colon": (by_hand(b'{"a" 1}'), "at byte 1, expected a name and a colon"),
    "comma last": (by_hand({"a": ZERO}).replace(b"]}}", b"]},}")[:-1], "found b'' at byte"),
    "no end": (by_hand(json.dumps({"a": ZERO})[:-1]), "found b'' at byte 60, expected a comma or }"),
    "more than JSON": (by_hand(b"{} x"), "header: found more behind byte 3, expected its end"),
    "other spaces": (by_hand(b"{\v}"), r"header: found b'\x0b}' at byte 1, expected a name and a colon"),
    "NaN": (by_hand(b'{"a": NaN}'), f"header: found b'NaN}}' at byte 6, {EXPECTED}"),
    "NaN inside": (by_hand(b'{"a": {"shape": NaN}}'), "tensor 'a': cannot be read (NaN is no number), expected JSON"),
    "not UTF-8": (by_hand(b'{"\xff": 1}'), "header, before byte 6: cannot be read ('utf-8' codec"),
    "nested": (by_hand(b'{"a":' * 200_000), f"at byte 5, {EXPECTED}"),
    "nested lists": (by_hand(b'{"a":{"shape":' + b"[" * 200_000), f"at byte 5, {EXPECTED}"),
    "two deep": (by_hand(b'{"a":{"shape":[[1]]}}'), f"at byte 5, {EXPECTED}"),
    "lists without end": (by_hand(b'{"a":{"shape":[' + b"1," * 9999), f"at byte 5, {EXPECTED}"),
    "a long list": (by_hand({"a": {"shape": [1] * 9999}}), "tensor 'a': found 30008 bytes, expected at most 4096"),
    "digits": (by_hand({"a": {"shape": 0}}).replace(b"0}", b"9" * 4500 + b"}"), f"at byte 6, {EXPECTED}"),
    "name twice": (by_hand(f'{{"a": {json.dumps(ZERO)}, "\\u0061": 1}}'), "header: found 'a' twice, expected names"),
    "metadata twice": (
        by_hand('{"__metadata__": {}, "__metadata__": {}}'),
        "found '__metadata__' twice, expected names",
    ),
    "field twice": (by_hand('{"a": {"shape": [], "shape": []}}'), "cannot be read ('shape' stands there twice)"),
    "surrogate": (
        by_hand('{"\\ud800": 1}'),
        "header, before byte 11: found a lone surrogate in '\\ud800', expected UTF-8",
    ),
    "escape": (by_hand(rb'{"\q": 1}'), "header, before byte 7: cannot be read (Invalid \\escape"),
    "metadata list": (by_hand({"__metadata__": []}), "at byte 17, expected an object of strings for __metadata__"),
    "metadata number": (by_hand({"__metadata__": {"a": 1}}), "at byte 23, expected a string for __metadata__'s 'a'"),
    "entry list": (by_hand({"a": [1]}), f"header: found b'[1]}}' at byte 6, {EXPECTED}"),
    "long name": (by_hand({LONG: 1}), f"of tensor '{'n' * 77}...{'n' * 78}' between braces"),
    "line break": (by_hand({"a\n\u2028": 1}), r"of tensor 'a\n\u2028' between braces"),
    "no dtype": (by_hand({"a": {"shape": [], "data_offsets": [0, 0]}}), "tensor 'a': found no dtype, expected dtype,"),
    "no shape": (by_hand({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "tensor 'a': found no shape, expected"),
    "no offsets": (by_hand({"a": {"dtype": "F32", "shape": []}}), "tensor 'a': found no data_offsets, expected dtype"),
    "dtype": (by_hand({"a": entry("F4", [], 0, 4)}, b"1234"), "tensor 'a': dtype: found 'F4', expected one of U64,"),
    "dtype list": (by_hand({"a": entry(["F32"], [], 0, 4)}, b"1234"), "tensor 'a': dtype: found ['F32'], expected one"),
    "shape number": (by_hand({"a": entry("F32", 1, 0, 4)}, b"1234"), "'a': shape: found 1, expected integers from 0"),
    "shape float": (by_hand({"a": entry("F32", [1.0], 0, 4)}, b"1234"), "shape: found [1.0], expected integers from"),
    "shape true": (by_hand({"a": entry("F32", [True], 0, 4)}, b"1234"), "shape: found [True], expected integers from"),
    "shape negative": (by_hand({"a": entry("F32", [-1, -1], 0, 4)}, b"1234"), "shape: found [-1, -1], expected integ"),
    "axes": (by_hand({"a": entry("F32", [1] * 65, 0, 4)}, b"1234"), "shape: found 65 axes, expected at most 64"),
    "overflow": (by_hand({"a": entry("U8", [2**32, 2**32], 0, 0)}), "found [4294967296, 4294967296], expected sizes"),
    "overflow at 0": (by_hand({"a": entry("U8", [2**62, 0, 2], 0, 0)}), "and less than 2**63 bytes"),
    "one offset": (by_hand({"a": {**FLOAT, "data_offsets": [0]}}), "data_offsets: found [0], expected 2 integers from"),
    "offset null": (by_hand({"a": entry("F32", [], 0, None)}), "data_offsets: found [0, None], expected 2 integers"),
    "descending": (by_hand({"a": entry("F32", [1], 4, 0)}, b"1234"), "found [4, 0], expected them to ascend"),
    "past the end": (
        by_hand({"a": FLOAT}, b"1" * 15),
        "data_offsets: found [0, 16], expected them to ascend and to end",
    ),
    "size": (
        by_hand({"a.b": entry("F32", [2, 2], 0, 12)}, b"1" * 12),
        "x.safetensors: tensor 'a.b': found 12 bytes, expected 16 for float32 [2, 2]",
    ),
    "size over": (by_hand({"a": entry("I8", [2], 0, 3)}, b"123"), "'a': found 3 bytes, expected 2 for int8 [2]"),
    "hole": (
        by_hand({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, b"12345"),
        "tensor 'b': found its beginning at byte 3, expected 2 (hole)",
    ),
    "hole first": (by_hand({"a": entry("U8", [2], 1, 3)}, b"123"), "'a': found its beginning at byte 1, expected 0"),
    "overlap": (
        by_hand({"a": entry("U8", [3], 0, 3), "b": entry("U8", [3], 2, 5)}, b"12345"),
        "tensor 'b': found its beginning at byte 2, expected 3 (overlap)",
    ),
    "same place": (
        by_hand({"a": entry("U8", [3], 0, 3), "b": entry("U8", [3], 0, 3)}, b"123"),
        "tensor 'b': found its beginning at byte 0, expected 3 (overlap)",
    ),
    "bytes left": (by_hand({"a": FLOAT}, b"1" * 17), "found 17 bytes of data, expected 16 by the header"),
    "bytes without tensors": (by_hand({}, b"1"), "found 1 bytes of data, expected 0 by the header"),
}


def refused(call, *messages):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    for message in messages:
        assert message in text
    return text


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused(tmp_path, what):
    content, message = BAD[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert refused(lambda: read_safetensors(path), message).startswith(f"{path}: ")


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)
    refused(lambda: read_safetensors(path), "found a header of 100000001 bytes, expected at most 100000000")


def test_paths_that_are_no_files(tmp_path):
    refused(lambda: read_safetensors(tmp_path / "no"), f"{tmp_path / 'no'}: cannot be read (No such file or directory)")
    refused(lambda: read_safetensors(tmp_path), f"{tmp_path}: cannot be read (Is a directory)")


# Shards.


def read_index(folder):
    return read_shards(folder / "model.safetensors.index.json", read_safetensors)


def sharded(folder, shards, weight_map=None):
    """A folder of shards of one byte a tensor, its value counted on."""
    value = 0
    for shard, names in shards.items():
        header = {name: entry("U8", [], place, place + 1) for place, name in enumerate(names)}
        (folder / shard).write_bytes(by_hand(header, bytes(range(value, value + len(names)))))
        value += len(names)
    weight_map = weight_map or {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_as_one(tmp_path):
    sharded(
        tmp_path,
        {"1.safetensors": ["a", "c"], "2.safetensors": ["b"]},
        {"b": "2.safetensors", "a": "1.safetensors", "c": "1.safetensors"},
    )
    found = read_index(tmp_path)
    assert {name: int(tensor.read()) for name, tensor in found.items()} == {"b": 2, "a": 0, "c": 1}
    assert list(found) == ["b", "a", "c"]


def test_shards_may_be_links(tmp_path):
    """As in the cache of huggingface_hub."""
    (tmp_path / "blobs").mkdir()
    sharded(tmp_path, {"1.safetensors": ["a"]})
    (tmp_path / "1.safetensors").rename(tmp_path / "blobs" / "0af3")
    (tmp_path / "1.safetensors").symlink_to(tmp_path / "blobs" / "0af3")
    assert list(read_index(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "shard", ["../1.s", "x/1.s", "/1.s", "..", "a..b", "x\\1.s", "", "1\0.s", "1\n.s", "\ud800", 1, None, ["1.s"]]
)
def test_shards_are_files_of_the_folder(tmp_path, shard):
    sharded(tmp_path, {"1.s": ["a"]}, {"a": shard})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.s").write_bytes((tmp_path / "1.s").read_bytes())
    refused(lambda: read_index(tmp_path), "tensor 'a': found shard", "expected the name of a file in the")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "1.s", "b": "1.s", "c": "2.s", "d": "2.s"},
            "2.s: no tensor 'd', expected it by model.safetensors.index",
        ),
        ({"a": "1.s", "b": "1.s"}, None),
        ({"a": "1.s", "c": "2.s"}, "1.s: found tensor 'b', nowhere by model.safetensors.index.json"),
        ({"a": "1.s", "b": "3.s", "c": "2.s"}, "3.s: cannot be read (No such file or directory)"),
        ({"a": "1.s", "b": "2.s", "c": "2.s"}, "2.s: no tensor 'b', expected it by model.safetensors.index.json"),
        ({"a": "1.s", "b": "1.s", "c": "n" * 300}, "cannot be read (File name too long)"),
    ],
)
def test_index_and_shards_agree(tmp_path, weight_map, message):
    """A shard that the index does not know is another matter's."""
    sharded(tmp_path, {"1.s": ["a", "b"], "2.s": ["c"]}, weight_map)
    if message is None:
        assert set(read_index(tmp_path)) == set(weight_map)
    else:
        refused(lambda: read_index(tmp_path), message)


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path, {"1.s": ["a", "b"], "2.s": ["b", "c"]}, {"a": "1.s", "b": "1.s", "c": "2.s"})
    refused(lambda: read_index(tmp_path), "2.s: found tensor 'b', in 1.s by model.safetensors.index.json")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "index.json: cannot be read (Expecting property name"),
        (b"[]", "index.json: weight_map: found None, expected an object of names to files"),
        (b"{}", "index.json: weight_map: found None, expected an object of names to files"),
        (b'{"weight_map": ["a"]}', "index.json: weight_map: found ['a'], expected an object of names to files"),
        (b'{"weight_map": {"a": "1", "a": "1"}}', "index.json: cannot be read ('a' stands there twice)"),
        (b"\xff", "index.json: cannot be read ('utf-8' codec"),
    ],
)
def test_bad_indices(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    refused(lambda: read_index(tmp_path), message)


def test_a_huge_index_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(2**24 + 1)
    refused(lambda: read_index(tmp_path), "found 16777217 bytes, expected at most 16777216")


# Writing.


@pytest.mark.parametrize("seed", range(60))
def test_what_is_written_is_read(tmp_path, seed):
    """To the last bit; names in the order of types, then their own."""
    arrays = random_tensors(np.random.default_rng(seed))
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays, {"b": "1", "a": "é"} if seed % 2 else None)
    found = read_safetensors(path)
    same_tensors(found, arrays)
    alignments = [tensor.dtype.itemsize for tensor in found.values()]
    assert alignments == sorted(alignments, reverse=True)
    content = path.read_bytes()
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0


@pytest.mark.parametrize("seed", range(60))
def test_writes_the_packages_bytes(tmp_path, seed):
    package = pytest.importorskip("safetensors.numpy")
    arrays = random_tensors(np.random.default_rng(seed))
    metadata = {"b\n": "1\x7f\x01é\u2028/"} if seed % 2 else None
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays, metadata)
    assert path.read_bytes() == package.save(arrays, metadata)


@pytest.mark.parametrize("seed", range(20))
def test_the_package_reads_what_is_written(tmp_path, seed):
    """Its reader for NumPy knows no types of ml_dtypes. The order of its metadata is chance, ours the alphabet's."""
    package = pytest.importorskip("safetensors")
    arrays = random_tensors(np.random.default_rng(seed))
    arrays = {name: array for name, array in arrays.items() if array.dtype.isbuiltin == 1}
    metadata = {name: name for name in "dbca"}
    write_safetensors(tmp_path / "x", arrays, metadata)
    with package.safe_open(tmp_path / "x", framework="np") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            same(np.asarray(file.get_tensor(name)), array)
    content = (tmp_path / "x").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == list("abcd")


@pytest.mark.parametrize("seed", range(20))
def test_what_the_package_writes_is_read(tmp_path, seed):
    package = pytest.importorskip("safetensors.numpy")
    arrays = random_tensors(np.random.default_rng(seed))
    package.save_file(arrays, tmp_path / "x", {"format": "np"})
    same_tensors(read_safetensors(tmp_path / "x"), arrays)


def test_all_types_at_once_in_the_packages_order(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {f"{name}{code}": np.zeros(3, dtype) for code, dtype in CODES.items() for name in "b\U0001f600\uffeaa"}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays)
    assert path.read_bytes() == package.save(arrays)


def test_the_bytes_by_hand(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"b": np.array([1], np.uint8), "a": np.array([[1.0]], np.float32), "c": np.array(True)}
    arrays["aa"] = np.array([2], np.uint8)
    write_safetensors(path, arrays, {"k": "v"})
    header = (
        '{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
        '"aa":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"b":{"dtype":"U8","shape":[1],"data_offsets":[5,6]},'
        '"c":{"dtype":"BOOL","shape":[],"data_offsets":[6,7]}}'
    )
    header += " " * (-len(header) % 8)
    assert path.read_bytes() == by_hand(header, b"\0\0\x80\x3f\2\1\1")


def test_arrays_of_any_layout(tmp_path):
    """Turned, strided, reversed, big-endian, read-only; values are written, not memory."""
    base = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    frozen = base.copy()
    frozen.flags.writeable = False
    arrays = {
        "turned": base.transpose(2, 0, 1),
        "strided": base[:, ::2, 1:],
        "reversed": base[::-1],
        "one to many": np.broadcast_to(np.float32(2), (3, 2)),
        "frozen": frozen,
        "no axes": np.array(7, ">i4"),
        "big": base.astype(">f8"),
        "bfloat16": base.astype(ml_dtypes.bfloat16).T,
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays)
    expected = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    same_tensors(read_safetensors(path), expected)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            {"a": np.zeros(2, np.complex64)},
            None,
            "tensor 'a': found complex64, expected one of uint64, int64, float64,",
        ),
        ({"a": np.array(["x"])}, None, "tensor 'a': found <U1, expected one of"),
        ({"a": np.zeros(2, object)}, None, "tensor 'a': found object, expected one of"),
        ({"a": [1.0]}, None, "tensor 'a': found list, expected an array of NumPy"),
        ({1: np.zeros(2)}, None, "a tensor's name: found 1, expected a string"),
        ({"\ud800": np.zeros(2)}, None, "a tensor's name: found a lone surrogate in '\\ud800', expected UTF-8"),
        ({"__metadata__": np.zeros(2)}, None, "found a tensor of the name __metadata__"),
        ({}, {"a": 1}, "__metadata__: 'a': found 1, expected a string"),
        ({}, {1: "a", "b": "c"}, "__metadata__: a key: found 1, expected a string"),
        ({}, {"a": "\udfff"}, "__metadata__: 'a': found a lone surrogate in"),
    ],
)
def test_what_the_format_cannot_say(tmp_path, tensors, metadata, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    assert refused(lambda: write_safetensors(path, tensors, metadata), message).startswith(f"{path}: ")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_header_too_long_to_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_MAX_HEADER", 63)
    write_safetensors(tmp_path / "a", {"abc": np.zeros(1, np.int8)})
    refused(
        lambda: write_safetensors(tmp_path / "b", {"abcdefghijkl": np.zeros(1, np.int8)}),
        "the header takes 64 bytes, expected at most 63",
    )
    assert os.listdir(tmp_path) == ["a"]


class Failing(dict):
    """Breaks off in the middle of the values."""

    def __init__(self, error, **arrays):
        super().__init__(arrays)
        self.error, self.reads = error, 0

    def __getitem__(self, name):
        self.reads += 1
        if self.reads > 3 * len(self) - 1:
            raise self.error
        return super().__getitem__(name)


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_write_that_broke_off(tmp_path, error):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"old": np.ones(3)})
    before = path.read_bytes()
    tensors = Failing(error, a=np.ones(1 << 16), b=np.ones(1 << 16))
    seen = []
    original = tensors.__class__.__getitem__

    def watching(self, name):
        seen.append(sorted(os.listdir(tmp_path)))
        return original(self, name)

    tensors.__class__ = type("Watching", (Failing,), {"__getitem__": watching})
    with pytest.raises(type(error)):
        write_safetensors(path, tensors)
    assert len(seen[-1]) == 2  # it had begun, under a name of its own
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == before


def test_the_name_is_given_when_all_is_on_the_disk(tmp_path, monkeypatch):
    """The file is synced before it is renamed, the folder afterwards."""
    events = []
    sync, replace = os.fsync, os.replace
    kind = lambda descriptor: "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"

    def rename(old, new):
        assert read_safetensors(old)["a"].shape == (3,)
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", lambda d: (events.append(kind(d)), sync(d)))
    monkeypatch.setattr(os, "replace", rename)
    write_safetensors(tmp_path / "x", {"a": np.ones(3)})
    assert events == ["file", "rename", "folder"]


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(3)})
    before = read_safetensors(path)["a"]
    write_safetensors(path, {"a": np.zeros(5)})
    assert before.read().tolist() == [1, 1, 1]
    assert read_safetensors(path)["a"].shape == (5,)


def test_paths_that_cannot_be_written(tmp_path):
    write = lambda path: lambda: write_safetensors(path, {"a": np.ones(3)})
    refused(write(tmp_path / "no" / "x"), f"{tmp_path / 'no' / 'x'}: cannot be written (No such file or directory)")
    refused(write(tmp_path), f"{tmp_path}: cannot be written (Is a directory)")
    assert os.listdir(tmp_path) == []
    assert not [name for name in os.listdir(tmp_path.parent) if name.endswith(".tmp")]


def test_a_written_file_has_the_usual_rights(tmp_path):
    write_safetensors(tmp_path / "x", {})
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_arrays_are_not_copied_to_be_written(tmp_path):
    arrays = {name: np.ones(1 << 20, np.float32) for name in "abcd"} | {"turned": np.ones((1 << 10, 1 << 10)).T}
    tracemalloc.start()
    write_safetensors(tmp_path / "x", arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * arrays["turned"].nbytes


# Broken headers.


def mutated(rng, text, words):
    """One or two changes: bytes turned, put in, taken out, doubled, and numbers and words in the place of others."""
    text = bytearray(text)
    for _ in range(rng.integers(1, 3)):
        place = int(rng.integers(len(text) + 1))
        span = slice(place, place + int(rng.integers(1, 20)))
        match rng.integers(6):
            case 0:
                text[place : place + 1] = bytes([rng.integers(256)])
            case 1:
                text[place:place] = rng.bytes(rng.integers(1, 5))
            case 2:
                del text[span]
            case 3:
                text[place:place] = text[span]
            case 4:
                text[span] = words[rng.integers(len(words))]
            case 5:
                places = [i for i, byte in enumerate(text) if byte in b"0123456789"]
                if places:
                    at = places[rng.integers(len(places))]
                    text[at : at + 1] = words[rng.integers(len(words))]
    return bytes(text)


WORDS = [
    b"0",
    b"1",
    b"4",
    b"-1",
    b"1e9",
    b"18446744073709551616",
    b"9223372036854775807",
    b"null",
    b"[",
    b"{}",
    b'"',
    b",",
    b":",
]
WORDS += [
    b'"F64"',
    b'"BOOL"',
    b'"a"',
    b"[0,8]",
    b"[[",
    b'{"a":',
    b"true",
    b"NaN",
    b"\\ud800",
    b"99999999999",
    b'"__metadata__":',
]


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_headers(tmp_path, watch, count):
    """End in tensors that lie within the file, or in InputError. What the package refuses is refused."""
    package = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.zeros((0, 4), np.int8), "d": np.arange(5, dtype=np.int16)}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {**arrays, "s": np.array(2.0), "t": np.array([True])}, {"format": "np"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    rng = np.random.default_rng(count)
    for number in range(count):
        broken = mutated(rng, text, WORDS)
        size = len(broken) if number % 10 else int(rng.integers(0, 2**63)) >> int(rng.integers(0, 63))
        whole = struct.pack("<Q", size) + broken + data[: rng.integers(len(data)) if number % 7 == 0 else None]
        found = watch(read_safetensors, path, whole)
        if found is not None:
            for tensor, values in found.values():
                assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
            assert sum(len(values.tobytes()) for _, values in found.values()) <= len(data)
            assert set(package.load(whole)) == set(found)
    assert 0.005 < watch.fine / count < 0.5


# Memory and imports.


def test_the_readers_load_neither_torch_nor_jax():
    names = ("safetensors_file", "torch_file", "tensorflow_file", "flax_file", "npz_file", "hdf5_file")
    code = "import sys\n" + "".join(f"import ctx_jax.interop.files.{name}\n" for name in names)
    code += "print(sorted({'torch', 'jax', 'jaxlib', 'flax', 'safetensors', 'h5py', 'msgpack'} & set(sys.modules)))"
    root = str(pathlib.Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_large_file_is_not_read_before_its_values(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {f"layer.{i}": np.full(1 << 18, i, np.float32) for i in range(200)})
    assert path.stat().st_size > 200_000_000
    tracemalloc.start()
    found = read_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    values = [tensor.read() for tensor in found.values()]
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert [float(value[-1]) for value in values] == [float(name.split(".")[1]) for name in found]


@pytest.mark.alone
@pytest.mark.slow
def test_reads_as_fast_as_the_package(tmp_path):
    """400 MB, of which every byte is touched: the medians of seven turns, ours and theirs one after the other.

    Theirs is `safe_open`, which maps the file as ours does, and is eight times as fast as their `load_file`.
    """
    package = pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {f"layer.{i}": np.full(1 << 20, i, np.float32) for i in range(100)})
    # As int64, which NumPy adds up at the speed of memory.
    touched = lambda arrays: sum(int(array.view(np.int64).sum()) for array in arrays)
    ours = lambda: touched(tensor.read() for tensor in read_safetensors(path).values())

    def theirs():
        with package.safe_open(path, framework="np") as file:
            return touched(file.get_tensor(name) for name in file.keys())  # noqa: SIM118 (it is no dict)

    assert ours() == theirs()
    seconds = {ours: [], theirs: []}
    for _ in range(7):
        for read in (ours, theirs):
            began = time.perf_counter()
            read()
            seconds[read].append(time.perf_counter() - began)
    ratio = statistics.median(seconds[ours]) / statistics.median(seconds[theirs])
    print(
        f"{statistics.median(seconds[ours]):.3f} s, the package {statistics.median(seconds[theirs]):.3f} s: {ratio:.2f}"
    )
    assert ratio < 1.5
