"""NumPy's .npz against numpy.savez and numpy.load, and broken files."""

import io
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files.npz_file import read_npz, write_npz

CODES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
ARRAYS = {code: (np.arange(6) - 2).astype(code).reshape(2, 3) for code in CODES}
ARRAYS |= {"turned": BASE.T, "strided": BASE[::2, 1::2], "big": BASE.astype(">f4"), "none": np.zeros((3, 0, 2))}
ARRAYS |= {"scalar": np.array(2.5), "file": np.arange(3), "a/b": np.arange(2), "é": np.arange(2), "": np.arange(1)}
ARRAYS |= {"axes": np.zeros((1,) * 64, np.int8), "w.npy": np.arange(4), "long": np.arange(100_000)}


def same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        values = found[name].read()
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert (values.shape, values.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(values, array)
        assert not values.flags.writeable


def test_written_is_read_by_us_and_by_numpy(tmp_path):
    write_npz(tmp_path / "x", ARRAYS)
    same_tensors(read_npz(str(tmp_path / "x")), ARRAYS)
    with np.load(tmp_path / "x", allow_pickle=False) as theirs:
        assert len(theirs.files) == len(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(theirs[name if name != "w.npy" else "w.npy.npy"], array)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    first = (tmp_path / "x").read_bytes()
    write_npz(tmp_path / "x", ARRAYS)
    assert (tmp_path / "x").read_bytes() == first


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    arrays = {name: array for name, array in ARRAYS.items() if name != "file"}
    save(tmp_path / "x.npz", **arrays)
    same_tensors(read_npz(tmp_path / "x.npz"), arrays)


def test_values_are_views_of_the_file(tmp_path):
    write_npz(tmp_path / "x", {"w": np.arange(2_000_000)})
    tracemalloc.start()
    values = read_npz(tmp_path / "x")["w"].read()
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert values[-1] == 1_999_999


def npy(descr="'<i4'", order="False", shape="(2,)", values=b"12345678", version=1, more="", length=None):
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}{more}, }}".encode()
    width = 2 if version == 1 else 4
    size = len(header) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(width, "little") + header + values


def file_of(content, name="w.npy", method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, content)
    return out.getvalue()


FLOATS = io.BytesIO()
np.save(FLOATS, np.zeros(2, ml_dtypes.bfloat16))
OBJECTS = io.BytesIO()
np.save(OBJECTS, np.array([None]), allow_pickle=True)
PACKED = file_of(npy(values=bytes(8)), method=zipfile.ZIP_DEFLATED)

BROKEN = {
    "empty": (b"", "found no end of a zip directory, expected a whole zip file"),
    "no zip": (npy(), "found no end of a zip directory"),
    "cut": (file_of(npy())[:-1], "found no end of a zip directory"),
    "cut before": (file_of(npy())[9:], "zip directory: found it from"),
    "more behind": (file_of(npy()) + b"1", "zip directory: found 1 bytes behind it, expected 0"),
    "other member": (file_of(npy(), "w.txt"), "array 'w.txt': found a member of another kind, expected names that end"),
    "compression": (file_of(npy(), method=zipfile.ZIP_BZIP2), "array 'w.npy': found compression 12, expected 0"),
    "no npy": (file_of(b"12345678"), "found b'12345678' at its beginning, expected b'\\x93NUMPY' and a version"),
    "version": (file_of(npy(version=4)), "and a version from 1 to 3"),
    "no header": (file_of(npy()[:8]), "expected it there and 4096 at most"),
    "header cut": (file_of(npy(length=5000)), "found a header of 5000 bytes, expected it there and 4096 at most"),
    "bomb": (file_of(npy(shape="(" * 3000)), "found header b\"{'descr': '<i4'"),
    "code": (file_of(npy(descr="print(1)")), "found header b\"{'descr': print(1)"),
    "more fields": (file_of(npy(more=", 'x': 1")), "expected one like {'descr': '<f4'"),
    "field twice": (file_of(npy(more=", 'descr': 1")), "expected one like {'descr': '<f4'"),
    "records": (file_of(npy(descr="[('a', '<i4')]")), "expected one like {'descr': '<f4'"),
    "object": (file_of(OBJECTS.getvalue()), "descr: found b'|O', expected one of |b1, |i1"),
    "bfloat16": (file_of(FLOATS.getvalue()), "descr: found b'<V2', expected one of |b1, |i1"),
    "text": (file_of(npy(descr="'<U1'")), "descr: found b'<U1', expected one of |b1, |i1"),
    "order": (file_of(npy(order="'C'")), "expected one like {'descr': '<f4'"),
    "shape of nothing": (file_of(npy(shape="(2,,)")), "shape: found b'2,,', expected integers from 0"),
    "negative": (file_of(npy(shape="(-2,)")), "expected one like {'descr': '<f4'"),
    "vast": (file_of(npy(shape="(4611686018427387904, 0)")), "expected sizes from 0 and less than 2**63 bytes"),
    "long": (file_of(npy(shape="(" + "9" * 99 + ",)")), "expected integers from 0"),
    "65 axes": (file_of(npy(shape="(" + "1," * 65 + ")")), "shape: found 65 axes, expected at most 64"),
    "few values": (file_of(npy(values=b"1234")), "found 4 bytes of values, expected 8 for int32 [2]"),
    "many values": (file_of(npy(values=b"1" * 9)), "found 9 bytes of values, expected 8 for int32 [2]"),
    "packed": (PACKED.replace(PACKED[35:45], b"\xff" * 10, 1), "array 'w.npy': cannot be unpacked (Error -3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(tmp_path, case):
    content, message = BROKEN[case]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_npz(tmp_path / "x")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_the_broken_files_are_one_step_from_good_ones(tmp_path):
    spaced = npy(shape="( 2 , )", more=" ")
    for content in (npy(), npy(version=2), npy(version=3), npy(shape="(2,1)"), npy(order="True"), spaced):
        (tmp_path / "x").write_bytes(file_of(content))
        assert read_npz(tmp_path / "x")["w"].read().tobytes() == b"12345678"


def test_compressed_values_that_are_broken(tmp_path):
    """Found when somebody wants them; a bomb unpacks to no more than the directory says."""
    values = np.random.default_rng(0).integers(0, 99, 10_000).tobytes()
    content = bytearray(file_of(npy(shape="(20000,)", values=values), method=zipfile.ZIP_DEFLATED))
    (tmp_path / "x").write_bytes(content)
    assert read_npz(tmp_path / "x")["w"].read().tobytes() == values
    content[8000] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=r"array 'w\.npy': (cannot be unpacked|unpacked to \d+ bytes or more with)"):
        read_npz(tmp_path / "x")["w"].read()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": np.zeros(2, ml_dtypes.bfloat16)}, "array 'w': found bfloat16, expected an array of bool, int8"),
        ({"w": np.zeros(2, ml_dtypes.bfloat16)}, "; cast it, to float32 say"),
        ({"w": np.zeros(2, ml_dtypes.float8_e5m2)}, "; cast it, to float32 say"),
        ({"w": np.array([None])}, "array 'w': found object, expected an array of bool"),
        ({"w": np.array(["a"])}, "array 'w': found <U1, expected an array of bool"),
        ({"w": np.zeros(1, [("a", "i4")])}, "array 'w': found [('a', '<i4')], expected an array of bool"),
        ({"w": [1.0]}, "array 'w': found list, expected an array of bool"),
        ({3: np.zeros(1)}, "array 3: expected a name of UTF-8 without zeros"),
        ({"a\0b": np.zeros(1)}, "array 'a\\x00b': expected a name of UTF-8 without zeros"),
        ({"\ud800": np.zeros(1)}, "array '\\ud800': expected a name of UTF-8 without zeros"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        write_npz(tmp_path / "x", tensors)
    assert message in str(caught.value)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_place_and_no_file(tmp_path):
    with pytest.raises(InputError, match=r"none/x: cannot be written \(No such file or directory\)"):
        write_npz(tmp_path / "none" / "x", {"w": np.zeros(1)})
    with pytest.raises(InputError, match=r"x: cannot be read \(No such file or directory\), expected a file of numpy"):
        read_npz(tmp_path / "x")


WORDS = [
    b"PK\1\2",
    b"PK\3\4",
    b"PK\5\6",
    b"PK\6\6",
    b"\xff" * 4,
    bytes(4),
    b"{'",
    b"',",
    b"(",
    b"),",
    b"<f8",
    b"9999999999",
]


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, watch, count):
    rng = np.random.default_rng(count)
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b/c": np.arange(5, dtype=np.int8), "d": np.ones((3, 2), np.float32).T}
    whole = {}
    for save in (np.savez, np.savez_compressed):
        out = io.BytesIO()
        save(out, **arrays)
        whole[save] = out.getvalue()
    for turn in range(count):
        content = bytearray(whole[np.savez if turn % 2 else np.savez_compressed])
        for _ in range(rng.integers(1, 3)):
            place = int(rng.integers(len(content)))
            match rng.integers(4):
                case 0:
                    content[place] = rng.integers(256)
                case 1:
                    del content[place : place + int(rng.integers(1, 9))]
                case 2:
                    content[place:place] = content[place : place + int(rng.integers(1, 20))]
                case 3:
                    word = WORDS[rng.integers(len(WORDS))]
                    content[place : place + len(word)] = word
        for tensor, values in (watch(read_npz, tmp_path / "x", bytes(content)) or {}).values():
            assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
            assert values.size < 1000
    assert 0.01 < watch.fine / count < 0.9
