"""HDF5 against h5py, and files that are cut or lead elsewhere."""

import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files.hdf5_file import read_hdf5, write_hdf5

h5py = pytest.importorskip("h5py")

CODES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
ARRAYS = {f"types/{code}": (np.arange(6) - 2).astype(code).reshape(2, 3) for code in CODES}
ARRAYS |= {"turned": BASE.T, "strided": BASE[::2, 1::2], "big": BASE.astype(">f4"), "none": np.zeros((3, 0, 2))}
ARRAYS |= {"scalar": np.array(2.5), "a/b/c": np.arange(3), "a/b/d": np.arange(2), "é/w": np.arange(2)}


def same_tensors(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        values = found[name].read()
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert (values.shape, values.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(values, array)
        assert not values.flags.writeable


def test_written_is_read_by_us_and_by_h5py(tmp_path):
    write_hdf5(tmp_path / "x", ARRAYS)
    same_tensors(read_hdf5(str(tmp_path / "x")), ARRAYS)
    with h5py.File(tmp_path / "x") as theirs:
        for name, array in ARRAYS.items():
            assert theirs[name].dtype == array.dtype
            np.testing.assert_array_equal(theirs[name][()], array)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("options", [{}, {"chunks": True}, {"chunks": True, "compression": "gzip", "shuffle": True}])
def test_reads_what_h5py_writes(tmp_path, libver, options):
    with h5py.File(tmp_path / "x", "w", libver=libver) as file:
        for name, array in ARRAYS.items():
            file.create_dataset(name, data=array, **options if array.ndim and array.size else {})
        file.create_group("empty/of/all")
        file.attrs["backend"] = "text"
        file["tied"] = file["scalar"]
    same_tensors(read_hdf5(tmp_path / "x"), ARRAYS | {"tied": ARRAYS["scalar"]})


def test_values_are_views_of_the_file(tmp_path):
    write_hdf5(tmp_path / "x", {"a/w": np.arange(2_000_000)})
    tracemalloc.start()
    values = read_hdf5(tmp_path / "x")["a/w"].read()
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert values[-1] == 1_999_999


def test_numbers_that_only_look_like_numpys(tmp_path):
    """Integers of 12 bits in 16, which h5py gives as int16 and reads bit by bit."""
    kind = h5py.h5t.STD_I16LE.copy()
    kind.set_precision(12)
    kind.set_offset(4)
    with h5py.File(tmp_path / "x", "w") as file:
        space = h5py.h5s.create_simple((3,))
        dataset = h5py.h5d.create(file.id, b"w", kind, space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([-5, 0, 7], np.int16))
    assert read_hdf5(tmp_path / "x")["w"].read().tolist() == [-5, 0, 7]


def raw_dataset(file):
    file.create_dataset("w", shape=(3,), dtype="f4", external=[("raw.bin", 0, 12)])


def virtual_dataset(file):
    layout = h5py.VirtualLayout((5,), "f4")
    layout[:] = h5py.VirtualSource("y", "w", shape=(5,))
    file.create_virtual_dataset("w", layout)


def put(name, value):
    return lambda file: file.__setitem__(name, value)


ELSEWHERE = {
    "soft": (put("a/w", h5py.SoftLink("/v")), "'a/w': found a soft link, expected groups and datasets that lie there"),
    "external": (put("w", h5py.ExternalLink("y", "/w")), "'w': found an external link, expected groups and datasets"),
    "raw": (raw_dataset, "'w': found a dataset in another file, expected its values in this file"),
    "virtual": (virtual_dataset, "'w': found a virtual dataset, expected its values in this file"),
    "circle": (
        lambda file: file.create_group("a").__setitem__("b", file["/"]),
        "'a/b': found a group that is elsewhere",
    ),
    "deep": (put("a/" * 65 + "w", 1), "or 64 of them in each other"),
    "text": (put("w", "text"), "'w': found object, expected an array of bool, int8"),
    "records": (put("w", np.zeros(1, [("a", "i4")])), "'w': found [('a', '<i4')], expected an array of bool, int8"),
    "bfloat16": (put("w", np.zeros(2, "V2")), "'w': found |V2, expected an array of bool, int8"),
    "no values": (put("w", h5py.Empty("f4")), "'w': found no values, expected an array of bool, int8"),
    "type": (put("w", np.dtype("f4")), "'w': found Datatype, expected groups and datasets"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_is_no_tensor_of_the_file(tmp_path, case):
    make, message = ELSEWHERE[case]
    with h5py.File(tmp_path / "x", "w") as file:
        make(file)
    with pytest.raises(InputError) as caught:
        read_hdf5(tmp_path / "x")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")


def test_files_that_are_cut(tmp_path):
    write_hdf5(tmp_path / "x", {"a/w": np.arange(3000)})
    content = (tmp_path / "x").read_bytes()
    for size in (0, 7, 8, 100, 600, 2000, len(content) - 1):
        (tmp_path / "x").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"x: (found no signature|cannot be read \(.*\), expected a whole file)"):
            read_hdf5(tmp_path / "x")


def test_chunks_that_are_broken(tmp_path):
    with h5py.File(tmp_path / "x", "w") as file:
        data = file.create_dataset("w", data=np.arange(3000), chunks=(3000,), compression="gzip", fletcher32=True)
        at = data.id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "x").read_bytes())
    content[at + 100] ^= 255
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=r"'w': cannot be read \(.*\), expected whole values"):
        read_hdf5(tmp_path / "x")["w"].read()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": np.zeros(2, ml_dtypes.bfloat16)}, "dataset 'w': found bfloat16, expected an array of bool, int8"),
        ({"w": np.zeros(2, ml_dtypes.bfloat16)}, "; cast it, to float32 say"),
        ({"w": np.array([None])}, "dataset 'w': found object, expected an array of bool"),
        ({"w": [1.0]}, "dataset 'w': found list, expected an array of bool"),
        ({3: np.zeros(1)}, "dataset 3: expected a name of UTF-8"),
        ({"": np.zeros(1)}, "dataset '': expected a name of UTF-8"),
        ({"/w": np.zeros(1)}, "and of parts that are not empty or a dot"),
        ({"a//w": np.zeros(1)}, "and of parts that are not empty or a dot"),
        ({"a/./w": np.zeros(1)}, "and of parts that are not empty or a dot"),
        ({"a\0": np.zeros(1)}, "expected a name of UTF-8 without zeros"),
        ({"\ud800": np.zeros(1)}, "expected a name of UTF-8 without zeros"),
        ({"a/" * 64 + "w": np.zeros(1)}, "found 65 parts, expected at most 64"),
        ({"a": np.zeros(1), "a/b": np.zeros(1)}, "dataset 'a': found a dataset and a group of datasets under one name"),
        ({"a/b/c": np.zeros(1), "a/b": np.zeros(1)}, "dataset 'a/b': found a dataset and a group"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(InputError) as caught:
        write_hdf5(tmp_path / "x", tensors)
    assert message in str(caught.value)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_place_no_file_and_no_h5py(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none/x: cannot be written \(No such file or directory\)"):
        write_hdf5(tmp_path / "none" / "x", {"w": np.zeros(1)})
    with pytest.raises(InputError, match=r"x: cannot be read \(No such file or directory\), expected a file of HDF5"):
        read_hdf5(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (lambda: read_hdf5(tmp_path / "x"), lambda: write_hdf5(tmp_path / "x", {})):
        with pytest.raises(InputError, match=r"x: HDF5 needs h5py, which is not there: pip install 'ctx-jax\[hdf5\]'"):
            call()
