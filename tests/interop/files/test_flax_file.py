"""Flax's msgpack against flax.serialization, to the byte in both directions, and ten thousand broken files."""

import math
import random
import struct
import tracemalloc

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files import flax_file
from ctx_jax.interop.files.flax_file import read_flax, write_flax

CODES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
DTYPES = [np.dtype(code) for code in (*CODES, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)]
SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (2, 3), (4, 1, 3), (1,) * 17, (130,), (70_000, 0)]
KEYS = [
    "kernel",
    "bias",
    "0",
    "1",
    "10",
    "é",
    "",
    "a" * 31,
    "b" * 32,
    "c" * 300,
    "Z",
    "layer_norm",
    "x\n",
    "𐀀",
    "\uffff",
]


def random_array(rng, dtype, shape):
    """Every pattern of bits, NaNs of all kinds too."""
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def random_tree(rng, depth=0):
    """Maps of up to four floors, keys in any order; no map is empty."""
    tree = {}
    for key in rng.permutation(KEYS)[: rng.integers(1, len(KEYS))]:
        deeper = depth < 3 and rng.random() < 0.25
        pick = lambda options: options[rng.integers(len(options))]
        tree[str(key)] = random_tree(rng, depth + 1) if deeper else random_array(rng, pick(DTYPES), pick(SHAPES))
    return tree


def flat(tree, keys=()):
    if not isinstance(tree, dict):
        return {"/".join(keys): tree}
    return {name: leaf for key, node in tree.items() for name, leaf in flat(node, (*keys, key)).items()}


def same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        values = found[name].read()
        assert (values.shape, values.dtype) == (array.shape, array.dtype)
        assert values.tobytes() == array.tobytes()
        assert not values.flags.writeable


def sorted_tree(tree):
    return {key: sorted_tree(tree[key]) for key in sorted(tree)} if isinstance(tree, dict) else tree


# Against Flax.


@pytest.mark.parametrize("seed", range(20))
def test_reads_what_flax_writes(tmp_path, seed):
    tree = random_tree(np.random.default_rng(seed))
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize(tree))
    same_tensors(read_flax(tmp_path / "x"), flat(sorted_tree(tree)))
    # In place nothing is sorted: the file's order is the tensors' order.
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize(tree, in_place=True))
    same_tensors(read_flax(str(tmp_path / "x")), flat(tree))


@pytest.mark.parametrize("seed", range(20))
def test_writes_what_flax_writes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng)
    tensors = flat(tree)
    shuffled = {str(name): tensors[str(name)] for name in rng.permutation(list(tensors))}
    write_flax(tmp_path / "x", shuffled)
    assert (tmp_path / "x").read_bytes() == flax.serialization.msgpack_serialize(tree)
    same_tensors(read_flax(tmp_path / "x"), flat(sorted_tree(tree)))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("limit", [1, 8, 24, 100, 1000])
def test_arrays_in_pieces(tmp_path, monkeypatch, limit):
    """Flax's limit and ours turned down, also below the size of one value."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
    monkeypatch.setattr(flax_file, "_CHUNK", limit)
    rng = np.random.default_rng(limit)
    shapes = [(), (0,), (3,), (4,), (5, 7), (2, 3, 4), (1, 200)]
    tree = {"a": {f"{dtype}{n}": random_array(rng, dtype, shape) for dtype in DTYPES for n, shape in enumerate(shapes)}}
    tree["a"]["zz"] = np.arange(12.0).reshape(3, 4).T
    packed = flax.serialization.msgpack_serialize(tree)
    assert (b"__msgpack_chunked_array__" in packed) == (limit < 3200)
    write_flax(tmp_path / "x", flat(tree))
    assert (tmp_path / "x").read_bytes() == packed
    same_tensors(read_flax(tmp_path / "x"), flat(sorted_tree(tree)))


def test_the_limit_is_flaxs():
    assert flax_file._CHUNK == flax.serialization.MAX_CHUNK_SIZE


def test_leaves_that_are_no_arrays(tmp_path):
    """Scalars of NumPy's and numbers of Python's; lists are maps by the time Flax stores them; empty maps are gone."""
    leaves = [True, False, 0, 127, 128, 2**16, 2**32, 2**63, 2**64 - 1, -1, -32, -33, -129, -(2**15) - 1, -(2**63)]
    leaves += [0.5, -math.inf, 1.5 - 2j, np.float32(3), np.int8(-3), np.bool_(True), np.complex64(1j)]
    leaves += [ml_dtypes.bfloat16(1.5), np.float64(math.pi)]
    state = flax.serialization.to_state_dict({"leaves": leaves, "pair": (1, {"w": 2.0}), "none": {}})
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize(state))
    found = read_flax(tmp_path / "x")
    expected = {f"leaves/{n}": np.asarray(leaf) for n, leaf in enumerate(leaves)}
    expected |= {"pair/0": np.array(1), "pair/1/w": np.array(2.0)}
    assert set(found) == set(expected)
    same_tensors({name: found[name] for name in expected}, expected)
    assert found["leaves/7"].dtype == np.uint64
    assert found["leaves/3"].dtype == np.int64


def test_floats_of_four_bytes(tmp_path):
    (tmp_path / "x").write_bytes(msgpack.packb({"w": 0.1}, use_single_float=True))
    assert read_flax(tmp_path / "x")["w"].read() == np.float64(np.float32(0.1))


def test_all_heads(tmp_path):
    """Maps of more than 15 and than 65535 keys; keys of more than 65535 bytes; sizes of axes of up to nine bytes."""
    big = {f"{n:05d}": np.zeros((), np.int8) for n in range(65_536)}
    axes = {str(n): np.zeros((n, 0), np.int8) for n in (127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**40)}
    long = {"k" * 65_535: np.zeros(1), "k" * 65_536: np.zeros(65_536 + 7)}
    tree = {"big": big, "axes": axes, "long": long}
    write_flax(tmp_path / "x", flat(tree))
    assert (tmp_path / "x").read_bytes() == flax.serialization.msgpack_serialize(tree)
    same_tensors(read_flax(tmp_path / "x"), flat(sorted_tree(tree)))


@pytest.mark.parametrize("spare", range(40))
def test_extensions_of_all_small_sizes(tmp_path, spare):
    """Bodies of 16 bytes have a head of their own."""
    tree = {"w": np.zeros(spare, np.int8), "v": np.zeros((), f"i{2 ** (spare % 4)}")}
    write_flax(tmp_path / "x", tree)
    assert (tmp_path / "x").read_bytes() == flax.serialization.msgpack_serialize(tree)


def test_arrays_of_any_layout(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {
        "turned": base.T,
        "strided": base[::2, 1::2],
        "fortran": np.asfortranarray(base),
        "big": base.astype(">f4"),
    }
    write_flax(tmp_path / "x", tensors)
    for name, tensor in read_flax(tmp_path / "x").items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), tensors[name])


def test_nothing_and_a_name_of_nothing(tmp_path):
    for tensors in ({}, {"": np.arange(2)}, {"//": np.arange(2), "/a": np.arange(1)}):
        write_flax(tmp_path / "x", tensors)
        same_tensors(read_flax(tmp_path / "x"), tensors)


def test_values_are_views_of_the_file(tmp_path):
    write_flax(tmp_path / "x", {"w": np.arange(2_000_000)})
    tracemalloc.start()
    values = read_flax(tmp_path / "x")["w"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert values[-1] == 1_999_999


# What is refused.


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.zeros(1), "a/b": np.zeros(1)}, "tensor 'a/b': found a tensor and a map of tensors under one name"),
        (
            {"a/b/c": np.zeros(1), "a/b": np.zeros(1)},
            "tensor 'a/b': found a tensor and a map of tensors under one name",
        ),
        (
            {"a": np.zeros(1), "a/b/c": np.zeros(1)},
            "tensor 'a/b/c': found a tensor and a map of tensors under one name",
        ),
        ({"a/__msgpack_chunked_array__": np.zeros(1)}, "none of them __msgpack_chunked_array__"),
        ({"/" * 64: np.zeros(1)}, "expected at most 64 parts"),
        ({3: np.zeros(1)}, "tensor 3: found int as its name, expected a string"),
        ({"\ud800": np.zeros(1)}, "found a lone surrogate in the name"),
        ({"w": [1.0]}, "tensor 'w': found list, expected an array of bool"),
        ({"w": np.float32(1)}, "tensor 'w': found float32, expected an array of bool"),
        ({"w": np.array(["a"])}, "tensor 'w': found <U1, expected an array of bool"),
        ({"w": np.array([None])}, "tensor 'w': found object, expected an array of bool"),
        ({"w": np.zeros(1, ml_dtypes.int4)}, "tensor 'w': found int4, expected an array of bool"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    with pytest.raises(InputError) as caught:
        write_flax(tmp_path / "x", tensors)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    write_flax(tmp_path / "x", {"w": np.arange(3)})
    before = (tmp_path / "x").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"x: cannot be written \(No space left on device\)"):
            write_flax(tmp_path / "x", {"w": np.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == before
    with pytest.raises(InputError, match=r"none/x: cannot be written \(No such file or directory\)"):
        write_flax(tmp_path / "none" / "x", {})


def body(shape=(2,), dtype="int8", values=b"ab", more=()):
    return msgpack.packb((shape, dtype, values, *more))


def leaf(*args, kind=1, tail=b"", **options):
    return msgpack.packb({"w": msgpack.ExtType(kind, body(*args, **options) + tail)})


def pieces(**changes):
    """An array of three values in two pieces, with changes; None takes a field out."""
    piece = lambda values: msgpack.ExtType(1, body((len(values),), "int8", values))
    tree = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 3, "1": 1},
        "chunks": {"0": piece(b"ab"), "1": piece(b"c")},
    }
    tree |= {key.replace("marker", "__msgpack_chunked_array__"): value for key, value in changes.items()}
    return msgpack.packb({"w": {key: value for key, value in tree.items() if value is not None}})


WORDS = msgpack.ExtType(1, body((1,), "int16", b"ab"))
SQUARE = msgpack.ExtType(1, body((1, 3), "int8", b"abc"))
DEEP = b"\x81\xa0" * 64

BROKEN = {
    "empty": (b"", "found 0 bytes, expected a map of msgpack"),
    "cut": (leaf()[:-1], "found 11 bytes from byte 6, expected 12"),
    "cut in a head": (b"\x81\xda\x00", "found 1 bytes from byte 2, expected 2"),
    "key cut": (b"\x81\xa5ab", "found 2 bytes from byte 2, expected 5"),
    "map cut": (b"\x82\xa1w\x01", "found 0 bytes from byte 4, expected 1"),
    "vast map": (b"\xdf\xff\xff\xff\xff\xa1w\x01", "found 0 bytes from byte 8, expected 1"),
    "vast string": (b"\x81\xdb\xff\xff\xff\xff", "found 0 bytes from byte 6, expected 4294967295"),
    "vast extension": (b"\x81\xa1w\xc9\xff\xff\xff\xff\x01", "found 0 bytes from byte 9, expected 4294967295"),
    "more behind it": (leaf() + b"\xc0", "found 1 bytes behind the map, expected none"),
    "no msgpack": (b"\x81\xa1w\xc1", "found byte 0xc1 at 3, which is no msgpack"),
    "array at the root": (msgpack.packb(msgpack.ExtType(1, body())), "found an array or a number without a name"),
    "number at the root": (b"\x01", "found an array or a number without a name, expected a map"),
    "pieces at the root": (pieces()[3:], "found an array or a number without a name, expected a map"),
    "list at the root": (b"\x91\x01", "tensor '': found array, expected a map, an array of NumPy's or a number"),
    "list": (msgpack.packb({"a": {"w": [1]}}), "tensor 'a/w': found array, expected a map"),
    "string": (msgpack.packb({"w": "x"}), "tensor 'w': found string, expected a map"),
    "bytes": (msgpack.packb({"w": b"x"}), "tensor 'w': found binary, expected a map"),
    "nil": (msgpack.packb({"w": None}), "tensor 'w': found nil, expected a map"),
    "extension": (msgpack.packb({"w": msgpack.ExtType(4, b"x")}), "tensor 'w': found extension 4, expected a map"),
    "timestamp": (b"\x81\xa1w\xd6\xff\0\0\0\0", "tensor 'w': found extension -1, expected a map"),
    "integer as key": (msgpack.packb({3: 1}), "key at byte 1: found integer, expected string"),
    "bytes as key": (msgpack.packb({b"w": 1}), "key at byte 1: found binary, expected string"),
    "key not UTF-8": (b"\x81\xa1\xff\x01", "key at byte 1: found b'\\xff', expected UTF-8"),
    "key with a slash": (msgpack.packb({"a/b": 1}), "key at byte 1: found 'a/b' with a '/', expected names"),
    "key twice": (b"\x82\xa1w\x01\xa1w\x01", "key at byte 4: found 'w' a second time, expected names"),
    "line feed": (msgpack.packb({"w\n\u2028": None}), "tensor 'w\\n\\u2028': found nil"),
    "too deep": (DEEP + b"\x80", "found a map, expected at most 64 of them in each other"),
    "much too deep": (b"\x81\xa0" * 100_000, "found a map, expected at most 64 of them in each other"),
    "no tuple": (msgpack.packb({"w": msgpack.ExtType(1, b"\x01")}), "tensor 'w': extension: found integer, expected 3"),
    "tuple of two": (msgpack.packb({"w": msgpack.ExtType(1, b"\x92\x90\x90")}), "extension: found 2 items, expected 3"),
    "tuple of four": (leaf(more=(1,)), "tensor 'w': extension: found 4 items, expected 3"),
    "more behind the tuple": (leaf(tail=b"\0"), "tensor 'w': found 1 bytes behind its values, expected none"),
    "body cut": (
        b"\x82\xa1w\xd7\x01" + body()[:8] + b"\xa1v\x01",
        "tensor 'w': found 0 bytes from byte 13, expected 1",
    ),
    "unknown dtype": (
        leaf((1,), "complex256", b"a" * 32),
        "tensor 'w': dtype: found 'complex256', expected one of bool",
    ),
    "dtype with an order": (leaf((1,), ">i2", b"ab"), "tensor 'w': dtype: found '>i2', expected one of bool"),
    "object": (leaf((1,), "object", b"ab" * 4), "tensor 'w': dtype: found 'object', expected one of bool"),
    "dtype is bytes": (leaf((2,), b"int8"), "tensor 'w': dtype: found binary, expected string"),
    "dtype not UTF-8": (leaf().replace(b"int8", b"in\xff8"), "tensor 'w': dtype: found b'in\\xff8', expected UTF-8"),
    "values are text": (leaf(values="ab"), "tensor 'w': values: found string, expected binary"),
    "too few values": (leaf((3,)), "tensor 'w': found 2 bytes, expected 3 for int8 [3]"),
    "too many values": (leaf((1,)), "tensor 'w': found 2 bytes, expected 1 for int8 [1]"),
    "half a value": (leaf((1,), "int32"), "tensor 'w': found 2 bytes, expected 4 for int32 [1]"),
    "shape is a number": (leaf(2), "tensor 'w': shape: found integer, expected array"),
    "shape of floats": (leaf((2.0,)), "tensor 'w': shape: found float, expected integer"),
    "shape of truths": (leaf((True,), values=b"a"), "tensor 'w': shape: found bool, expected integer"),
    "negative axis": (leaf((-2,)), "tensor 'w': shape: found [-2], expected sizes from 0 and less than 2**63 bytes"),
    "negative axes": (leaf((-2, -1)), "tensor 'w': shape: found [-2, -1], expected sizes from 0"),
    "vast": (leaf((0, 2**63), values=b""), "tensor 'w': shape: found [0, 9223372036854775808], expected sizes"),
    "65 axes": (leaf((1,) * 65, values=b"a"), "tensor 'w': shape: found 65 axes, expected at most 64"),
    "scalar": (leaf((3,), kind=3), "tensor 'w': found 2 bytes, expected 3 for int8 [3]"),
    "complex of one": (
        msgpack.packb({"w": msgpack.ExtType(2, b"\x91\xca\0\0\0\0")}),
        "complex: found 1 items, expected 2",
    ),
    "complex of integers": (
        msgpack.packb({"w": msgpack.ExtType(2, b"\x92\x01\x01")}),
        "complex: found integer, expected float",
    ),
    "complex and more": (
        msgpack.packb({"w": msgpack.ExtType(2, b"\x92" + b"\xca\0\0\0\0" * 3)}),
        "tensor 'w': found 5 bytes behind its values",
    ),
    "pieces without shape": (pieces(shape=None), "tensor 'w': found an array in pieces with"),
    "pieces without chunks": (pieces(chunks=None), "tensor 'w': found an array in pieces with"),
    "pieces with more": (pieces(more=1), "tensor 'w': found an array in pieces with"),
    "pieces that are none": (pieces(marker=False), "tensor 'w': found an array in pieces with"),
    "pieces, shape no map": (pieces(shape=3), "tensor 'w': found an array in pieces with"),
    "pieces, an axis missing": (pieces(shape={"0": 3, "2": 1}), "tensor 'w': found an array in pieces with"),
    "pieces, a chunk missing": (pieces(chunks={"1": WORDS}), "tensor 'w': found an array in pieces with"),
    "pieces, no chunks": (
        pieces(chunks={}),
        "tensor 'w': chunks: found 0, not arrays of one type, expected at least one",
    ),
    "pieces of numbers": (pieces(chunks={"0": 1}), "tensor 'w': chunks: found 1, not arrays of one type"),
    "pieces of two types": (
        pieces(chunks={"0": WORDS, "1": msgpack.ExtType(1, body())}),
        "tensor 'w': chunks: found 2, not arrays of one type",
    ),
    "pieces too few": (pieces(shape={"0": 4}), "tensor 'w': chunks: found 3 values, expected 4 in rows"),
    "pieces too many": (pieces(shape={"0": 2}), "tensor 'w': chunks: found 3 values, expected 2 in rows"),
    "pieces no rows": (pieces(chunks={"0": SQUARE}), "tensor 'w': chunks: found 3 values, expected 3 in rows"),
    "pieces, axes of floats": (
        pieces(shape={"0": 3.0}),
        "tensor 'w': shape: found (3.0,), expected at most 64 integers",
    ),
    "pieces, axes of truths": (
        pieces(shape={"0": 3, "1": True}),
        "tensor 'w': shape: found (3, True), expected at most",
    ),
    "pieces, negative axes": (
        pieces(shape={"0": -3, "1": -1}),
        "tensor 'w': shape: found [-3, -1], expected sizes from 0",
    ),
    "pieces, 65 axes": (pieces(shape={str(n): 1 for n in range(65)}), "expected at most 64 integers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(tmp_path, case):
    file, message = BROKEN[case]
    (tmp_path / "x").write_bytes(file)
    with pytest.raises(InputError) as caught:
        read_flax(tmp_path / "x")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_the_broken_files_are_one_step_from_good_ones(tmp_path):
    for file in (leaf(), leaf(kind=3), leaf((1,) * 64, values=b"a"), pieces(), b"\x81\xa0" * 63 + b"\x81\xa1w\x01"):
        (tmp_path / "x").write_bytes(file)
        assert len(read_flax(tmp_path / "x")) == 1
    (tmp_path / "x").write_bytes(pieces())
    np.testing.assert_array_equal(read_flax(tmp_path / "x")["w"].read(), [[97], [98], [99]])


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"x: cannot be read \(No such file or directory\), expected a file of Flax's"):
        read_flax(tmp_path / "x")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_flax(tmp_path)


def test_limits(tmp_path, monkeypatch):
    """A key stands in the names of all below it."""
    (tmp_path / "x").write_bytes(msgpack.packb({"k" * 10: {"a": {"a": 1, "b": 2}}, "l" * 12: {"a": 3}}))
    monkeypatch.setattr(flax_file, "_NAMES_PER_BYTE", 0)
    monkeypatch.setattr(flax_file, "_FREE_NAMES", 42)
    assert len(read_flax(tmp_path / "x")) == 3
    monkeypatch.setattr(flax_file, "_FREE_NAMES", 41)
    with pytest.raises(InputError, match="names of more than 41 bytes in all, expected no more"):
        read_flax(tmp_path / "x")
    monkeypatch.setattr(flax_file, "_FREE_NAMES", 42)
    size = (tmp_path / "x").stat().st_size
    monkeypatch.setattr(flax_file, "_FREE_KEYS", 6 - size // 16)
    assert len(read_flax(tmp_path / "x")) == 3
    monkeypatch.setattr(flax_file, "_FREE_KEYS", 5 - size // 16)
    with pytest.raises(InputError, match=f"found more than 5 names in {size} bytes, expected 16 bytes or more each"):
        read_flax(tmp_path / "x")


def mutated(rng, file):
    """One to three flips, insertions, deletions, doublings or cuts; heads of all kinds among what comes in."""
    file = bytearray(file)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(file) + 1)
        match rng.randrange(8):
            case 0 | 1:
                if place < len(file):
                    file[place] ^= 1 << rng.randrange(8)
            case 2 | 3:
                if place < len(file):
                    file[place] = rng.choice([0, 1, 127, rng.randrange(0x80, 0xE0)])
            case 4:
                file[place:place] = rng.randbytes(rng.randint(1, 4))
            case 5:
                del file[place : place + rng.randint(1, 9)]
            case 6:
                file[place:place] = file[place : place + rng.randint(1, 30)]
            case 7:
                start = rng.randrange(len(file) + 1)
                file[place : place + 5] = b"\xdf" + struct.pack(">I", start)
    return bytes(file)


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, monkeypatch, watch, count):
    """Tensors or InputError; what Flax refuses is refused."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 24)
    rng = random.Random(count)
    draw = np.random.default_rng(0)
    dtypes = [DTYPES[0], DTYPES[3], DTYPES[9], DTYPES[-3]]
    arrays = {f"{dtype}": random_array(draw, dtype, shape) for dtype, shape in zip(dtypes, SHAPES[1:], strict=False)}
    tree = {"layer": {"kernel": np.arange(10.0, dtype=np.float32), "bias": {}}, **arrays, "step": 3, "c": 1j}
    tree["scalar"] = np.float32(2)
    whole = flax.serialization.msgpack_serialize(tree)
    for _ in range(count):
        file = mutated(rng, whole)
        found = watch(read_flax, tmp_path / "x", file)
        if found:
            theirs = flat(flax.serialization.msgpack_restore(file))
            assert set(theirs) == set(found)
            for name, (tensor, values) in found.items():
                assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
                assert values.tobytes() == np.asarray(theirs[name]).tobytes()
    assert 0.05 < watch.fine / count < 0.6
