"""Values copied out of files, and what stays of the files in memory."""

import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from ctx_jax.interop.files.flax_file import read_flax, write_flax
from ctx_jax.interop.files.mapping import let_go
from ctx_jax.interop.files.npz_file import read_npz, write_npz
from ctx_jax.interop.files.safetensors_file import read_safetensors, write_safetensors
from ctx_jax.interop.files.tensorflow_file import read_tensorflow, write_tensorflow
from ctx_jax.interop.files.tensors import StoredTensor, copy_out

FORMATS = {
    "safetensors": (read_safetensors, write_safetensors),
    "tensorflow": (read_tensorflow, write_tensorflow),
    "flax": (read_flax, write_flax),
    "npz": (read_npz, write_npz),
}
CODES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
SMALL_FLOATS = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def stored(array):
    return StoredTensor(array.shape, array.dtype, lambda: array)


@pytest.mark.parametrize("form", FORMATS)
def test_values_of_every_type(tmp_path, form):
    """Into the same type and into float64, forwards and turned; and a second time, from pages that were let go."""
    read, write = FORMATS[form]
    dtypes = [*CODES, *SMALL_FLOATS]
    dtypes = dtypes[: {"npz": -3, "tensorflow": -2}.get(form)]
    arrays = {str(np.dtype(dtype)): (np.arange(15) % 7).astype(dtype).reshape(3, 5) for dtype in dtypes}
    arrays |= {"scalar": np.array(2.5), "none": np.zeros((2, 0))}
    write(tmp_path / "x", arrays)
    tensors = read(tmp_path / "x")
    for _ in range(2):
        for name, array in arrays.items():
            for dtype in (array.dtype, np.dtype(np.float64)):
                outs = [np.zeros(array.shape, dtype), np.zeros(array.shape[::-1], dtype).T]
                if array.ndim == 2:
                    outs.append(np.zeros((6, 10), dtype)[: 2 * array.shape[0] : 2, : 2 * array.shape[1] : 2])
                for out in outs:
                    copy_out(tensors[name], out)
                    np.testing.assert_array_equal(out, array.astype(dtype))


def test_large_tensors_go_in_pieces(monkeypatch):
    monkeypatch.setattr("ctx_jax.interop.files.tensors._PIECE", 100)
    for shape in [(7, 9), (200,), (1, 300), (40, 1, 2), (3, 4)]:
        array = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
        for source in (array, array.T):
            out = np.zeros(source.shape)
            copy_out(stored(source), out)
            np.testing.assert_array_equal(out, source)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"out: found shape \[3\], expected \[\]"):
        copy_out(stored(np.array(1.0)), np.zeros(3))
    for source, target in [("f4", "i8"), ("c8", "f8"), ("i1", "?"), (ml_dtypes.bfloat16, "i4")]:
        with pytest.raises(ValueError, match="which cannot hold the values of"):
            copy_out(stored(np.zeros(2, source)), np.zeros(2, target))
    for source, target in [("f8", ml_dtypes.bfloat16), ("i8", "i4"), ("?", "f4"), ("i4", ml_dtypes.bfloat16)]:
        out = np.zeros(2, target)
        copy_out(stored(np.ones(2, source)), out)
        assert out.tolist() == [1, 1]


def test_memory_that_is_no_files_stays():
    array = np.arange(10_000)
    let_go(array[5:])
    let_go(np.frombuffer(b"12345678", np.int32))
    assert array.sum() == 49_995_000


RESIDENT = r"""
import re, sys
import numpy as np
from ctx_jax.interop.files.safetensors_file import read_safetensors
from ctx_jax.interop.files.tensors import copy_out
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
tensors = read_safetensors(sys.argv[1])
out = np.empty(sum(tensor.shape[0] for tensor in tensors.values()), np.float32)
before, at = peak(), 0
for tensor in tensors.values():
    copy_out(tensor, out[at : at + tensor.shape[0]])
    at += tensor.shape[0]
print(peak() - before, out.sum(dtype=np.float64))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the most memory that a process had is Linux's")
@pytest.mark.parametrize("count", [1, 50, 5000])
def test_a_file_is_not_in_memory_twice(tmp_path, count):
    """200 MB in one tensor, in 50, and in 5000 that share pages."""
    size = 200_000_000 // 4 // count
    write_safetensors(tmp_path / "x", {str(n): np.ones(size, np.float32) for n in range(count)})
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[3])}
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, total = map(float, done.stdout.split())
    assert total == size * count
    assert 0.9 * 200_000 < grown * 1.024 < 1.3 * 200_000
    (tmp_path / "x").unlink()
