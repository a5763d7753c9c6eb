"""Files that are nothing but header: what each format's docstring says that they take at most, and no more."""

import io
import json
import struct
import time
import tracemalloc
from unittest import mock

import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files import sstable
from ctx_jax.interop.files.crc32c import crc32c
from ctx_jax.interop.files.flax_file import read_flax, write_flax
from ctx_jax.interop.files.npz_file import read_npz, write_npz
from ctx_jax.interop.files.safetensors_file import read_safetensors, write_safetensors
from ctx_jax.interop.files.sstable import table_bytes
from ctx_jax.interop.files.tensorflow_file import read_tensorflow, write_tensorflow

COUNT = 10_000


def with_length(header):
    return struct.pack("<Q", len(header)) + header


def names(count=COUNT):
    return [f"{n:x}" for n in range(count)]


def entries(body):
    return with_length(b"{" + b",".join(f'"{name}":{body}'.encode() for name in names()) + b"}")


EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
METADATA = json.dumps({"__metadata__": dict.fromkeys(names(), "")}, separators=(",", ":")).encode()
WIDE = json.dumps({"\U0001f600" + "a" * 10**6: 1}, ensure_ascii=False).encode()
TREE = b"\xdf" + struct.pack(">I", COUNT) + b"".join(b"\xa4%04x" % n + b"%s" for n in range(COUNT))
LONG = b"\x81\xda\x27\x10" + b"k" * 10_000 + b"\xde" + struct.pack(">H", 60_000)
LONG += b"".join(b"\xa4%04x\x01" % n for n in range(60_000))
SHARED = [(b"", bytes.fromhex("08011a020801"))]
SHARED += [(b"n" * 4000 + b"%06d" % n, bytes.fromhex("08062801")) for n in range(COUNT)]
WIDE_LONG = b"\x81\xda\x27\x14" + "\U0001f600".encode() + LONG[4:]
WIDE_SHARED = [SHARED[0], *(("\U0001f600".encode() + key, value) for key, value in SHARED[1:])]
PLAIN = [SHARED[0], *((b"%06d" % n, bytes.fromhex("08062801")) for n in range(COUNT))]


def lines_to_one_member():
    """A zip of one array, and a directory that names it over and over."""
    out = io.BytesIO()
    np.savez(out, a=np.zeros(0))
    whole = out.getvalue()
    begin = whole.index(b"PK\1\2")
    line = bytearray(whole[begin : whole.index(b"PK\5\6")])
    line[28:30] = struct.pack("<H", 8)
    directory = b"".join(bytes(line[:46]) + f"{n:04x}.npy".encode() for n in range(COUNT))
    end = struct.pack("<HHHHIIH", 0, 0, COUNT, COUNT, len(directory), begin, 0)
    return whole[:begin] + directory + b"PK\5\6" + end


def without_restarts(entries):
    """Keys leave out all that they can."""
    with mock.patch.object(sstable, "_RESTART_INTERVAL", COUNT), mock.patch.object(sstable, "_BLOCK_ENTRIES", COUNT):
        return table_bytes(entries)


HOSTILE = {
    "safetensors, tensors of nothing": (read_safetensors, 12, entries(EMPTY)),
    "safetensors, empty objects": (read_safetensors, 12, entries("{}")),
    "safetensors, lists": (read_safetensors, 12, with_length(b'{"a":{"shape":[' + b"[]," * 100_000)),
    "safetensors, numbers": (read_safetensors, 12, with_length(b'{"a":{"shape":[' + b"1," * 100_000 + b"1]}}")),
    "safetensors, nested": (read_safetensors, 12, with_length(b'{"a":' * 100_000)),
    "safetensors, metadata": (read_safetensors, 12, with_length(METADATA)),
    "safetensors, a wide name": (read_safetensors, 12, with_length(WIDE)),
    "flax, numbers": (read_flax, 48, TREE.replace(b"%s", b"\x01")),
    "flax, maps": (read_flax, 48, TREE.replace(b"%s", b"\x80")),
    "flax, arrays": (read_flax, 48, TREE.replace(b"%s", b"\xc7\x0a\x01\x93\x91\x00\xa4int8\xc4\x00")),
    "flax, a long key over many": (read_flax, 48, LONG),
    "flax, a wide key over many": (read_flax, 48, WIDE_LONG),
    "flax, a vast map": (read_flax, 48, b"\xdf\xff\xff\xff\xff" + b"\xa1a\x01" * 10),
    "npz, one member under many names": (read_npz, 32, lines_to_one_member()),
    "tensorflow, tensors": (read_tensorflow, 64, table_bytes(PLAIN)),
    "tensorflow, names that share": (read_tensorflow, 64, without_restarts(SHARED)),
    "tensorflow, wide names": (read_tensorflow, 64, without_restarts(WIDE_SHARED)),
}


def taken(read, path):
    tracemalloc.start()
    began = time.process_time()
    try:
        found = read(path)
    except InputError:
        found = None
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, seconds, found


@pytest.mark.parametrize("what", HOSTILE)
def test_files_of_nothing_but_header(tmp_path, what):
    read, times, content = HOSTILE[what]
    crc32c(bytes(40_000))  # builds its tables
    (tmp_path / "x.index").write_bytes(content)
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"1")
    peak, seconds, _ = taken(read, tmp_path / "x.index")
    print(f"{what}: {peak / len(content):.1f} times {len(content)} bytes")
    assert peak < 2**20 + times * len(content)
    assert seconds < 10


@pytest.mark.parametrize(
    ("read", "write", "times"),
    [
        (read_safetensors, write_safetensors, 12),
        (read_tensorflow, write_tensorflow, 64),
        (read_flax, write_flax, 48),
        (read_npz, write_npz, 32),
    ],
)
def test_many_small_tensors_are_fine(tmp_path, read, write, times):
    """They are no attack: ten thousand scalars under the names of a model are read."""
    arrays = {f"encoder/layer_{n}/kernel": np.array(n, np.int32) for n in range(10_000)}
    write(tmp_path / "x.index", arrays)
    peak, seconds, found = taken(read, tmp_path / "x.index")
    assert set(found) == set(arrays)
    size = (tmp_path / "x.index").stat().st_size
    print(f"{peak / size:.1f} times {size} bytes")
    assert peak < 2**20 + times * size
    assert seconds < 10


@pytest.mark.parametrize(
    ("read", "write"),
    [
        (read_safetensors, write_safetensors),
        (read_tensorflow, write_tensorflow),
        (read_flax, write_flax),
        (read_npz, write_npz),
    ],
)
def test_files_of_values_take_less_than_their_size(tmp_path, read, write):
    write(tmp_path / "x.index", {f"encoder/layer_{n}/kernel": np.zeros(4000, np.float32) for n in range(500)})
    peak, _, found = taken(read, tmp_path / "x.index")
    assert len(found) == 500
    assert peak < 2**20
