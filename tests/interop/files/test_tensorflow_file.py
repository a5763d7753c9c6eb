"""Checkpoints of TensorFlow against TensorFlow where there is one, a second writer of the format, and broken files."""

import itertools
import math
import random
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.interop.files import crc32c as crc
from ctx_jax.interop.files import replacing, sstable, tensorflow_file
from ctx_jax.interop.files.crc32c import crc32c
from ctx_jax.interop.files.tensorflow_file import read_tensorflow, write_tensorflow

# Numbers of tensorflow/core/framework/types.proto.
NUMBERS = {
    np.float32: 1,
    np.float64: 2,
    np.int32: 3,
    np.uint8: 4,
    np.int16: 5,
    np.int8: 6,
    np.int64: 9,
    np.bool_: 10,
    ml_dtypes.bfloat16: 14,
    np.uint16: 17,
    np.float16: 19,
    np.uint32: 22,
    np.uint64: 23,
}
DTYPES = {np.dtype(dtype): number for dtype, number in NUMBERS.items()}
MAGIC = 0xDB4775248B80FB57


# The second writer: bit by bit, and with everything that ours leaves out.


def crc_byte(value):
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


CRC_BYTES = [crc_byte(value) for value in range(256)]


def slow_crc(data):
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ CRC_BYTES[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


def masked(crc):
    rotated = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
    return (rotated + 0xA282EAD8) % 2**32


def number(value):
    """A varint of a number of 64 bits, negative ones as two's complement."""
    value %= 2**64
    out = b""
    while True:
        value, low = divmod(value, 128)
        out += bytes([low + 128 * (value > 0)])
        if not value:
            return out


def field(place, value):
    return (
        number(place << 3 | 2) + number(len(value)) + value
        if isinstance(value, bytes)
        else number(place << 3) + number(value)
    )


def shape_proto(shape):
    return b"".join(field(2, field(1, n)) for n in shape)


def entry(dtype=1, shape=(), shard=0, offset=0, size=4, crc=0, more=b""):
    fields = [field(1, dtype), field(2, shape_proto(shape)), field(3, shard), field(4, offset), field(5, size)]
    return b"".join(fields) + b"\x35" + struct.pack("<I", crc) + more


def header(shards=1, endianness=0, min_consumer=0):
    version = field(1, 1) + (field(2, min_consumer) if min_consumer else b"")
    return field(1, shards) + (field(2, endianness) if endianness else b"") + field(3, version)


def block(entries, interval=3):
    out, restarts, last = b"", [], b""
    for place, (key, value) in enumerate(entries):
        shared = 0
        if place % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += number(shared) + number(len(key) - shared) + number(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def snappy(data, rng):
    """Literals of all lengths' forms, and copies of all three forms, overlapping ones too."""
    out, at = number(len(data)), 0
    while at < len(data):
        best, back = 0, 0
        for start in range(max(0, at - 300), at):
            size = 0
            while at + size < len(data) and size < 64 and data[start + size] == data[at + size]:
                size += 1
            if size > best:
                best, back = size, at - start
        if best >= 4:
            forms = [1] * (best <= 11) + [2, 3]
            form = rng.choice(forms)
            if form == 1:
                out += bytes([1 | (best - 4) << 2 | back >> 8 << 5, back & 255])
            else:
                out += bytes([form | (best - 1) << 2]) + back.to_bytes(2 if form == 2 else 4, "little")
            at += best
            continue
        size = min(rng.choice([1, 2, 7, 60, 61, 300]), len(data) - at)
        extra = rng.choice([n for n in range(5) if size <= (60 if n == 0 else 256**n)])
        out += bytes([(59 + extra) << 2]) + (size - 1).to_bytes(extra, "little") if extra else bytes([(size - 1) << 2])
        out += data[at : at + size]
        at += size
    return out


def sealed(body, kind=0):
    """A block with its trailer."""
    body += bytes([kind])
    return body + struct.pack("<I", masked(slow_crc(body)))


def table(blocks, *, pack=None, limits=None, magic=MAGIC):
    """An index of the given blocks of entries."""
    file, handles = b"", []

    def add(body):
        nonlocal file
        kind = 0
        if pack is not None:
            body, kind = pack(body), 1
        handle = number(len(file)) + number(len(body))
        file += sealed(body, kind)
        return handle

    for place, entries in enumerate(blocks):
        handles.append((limits[place] if limits else entries[-1][0], add(block(entries))))
    footer = add(block([])) + add(block(handles, 1))
    return file + footer.ljust(40, b"\0") + struct.pack("<Q", magic)


def random_array(rng, dtype, shape):
    """Every pattern of bits, NaNs of all kinds too."""
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def random_tensors(rng, count):
    layers = [
        f"bert/encoder/layer_{n}/attention/self/{w}/kernel/AdamWeightDecayOptimizer" for n in range(90) for w in "qkv"
    ]
    names = rng.permutation([*layers, "a", "Z", "é/ü", "bert", "b" * 300, "~", "cls/predictions/output_bias"])[:count]
    shapes = [(), (0,), (3, 0, 2), (1,), (5,), (2, 3), (4, 1, 3), (200,)]
    dtypes = list(DTYPES)
    pick = lambda options: options[rng.integers(len(options))]
    return {str(name): random_array(rng, pick(dtypes), pick(shapes)) for name in names}


def write_by_hand(prefix, tensors, rng, shards=1, per_block=7, packed=False):
    """The files of a checkpoint, tensors dealt out to shards with holes between them."""
    data = [bytearray(rng.randbytes(rng.randrange(9))) for _ in range(shards)]
    entries = [(b"", header(shards))]
    for name in sorted(tensors, key=str.encode):
        array, shard = tensors[name], rng.randrange(shards)
        raw = array.tobytes()
        crc = masked(slow_crc(raw))
        entries.append((name.encode(), entry(DTYPES[array.dtype], array.shape, shard, len(data[shard]), len(raw), crc)))
        data[shard] += raw + rng.randbytes(rng.randrange(3))
    blocks = [entries[at : at + per_block] for at in range(0, len(entries), per_block)]
    pack = (lambda body: snappy(body, rng)) if packed else None
    prefix.with_name(prefix.name + ".index").write_bytes(table(blocks, pack=pack))
    for shard, raw in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(raw)


def same_tensors(found, expected):
    assert list(found) == sorted(expected, key=str.encode)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        values = found[name].read()
        assert (values.shape, values.dtype) == (array.shape, array.dtype)
        assert values.tobytes() == array.tobytes()
        assert not values.flags.writeable


# Checksums.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (
            bytes.fromhex("01c00000000000000000000000000000140000000000040000000014000000182800000000000000")
            + bytes.fromhex("0200000000000000"),
            0xD9963A56,
        ),
    ],
)
def test_checksums_of_rfc_3720(data, expected):
    assert crc32c(data) == slow_crc(data) == expected


@pytest.mark.parametrize("size", [1, 255, 256, 259, 260, 1024, 1025, 4100, 32767, 32768, 32772, 65539, 100_001])
def test_checksums_of_all_lengths(size):
    data = random.Random(size).randbytes(size + 3)
    assert crc32c(data[:size]) == slow_crc(data[:size])
    assert crc32c(memoryview(data)[3:]) == slow_crc(data[3:])
    assert crc32c(bytes(size)) == slow_crc(bytes(size))


def test_the_mask():
    """The empty block that stands in every index of TensorFlow's, and what TensorFlow writes behind it."""
    body = bytes.fromhex("000000000100000000")
    assert crc.masked(crc32c(body)) == masked(slow_crc(body)) == 0xB0A1F2C0


# Reading and writing.


@pytest.mark.parametrize("seed", range(12))
def test_reads_what_another_hand_wrote(tmp_path, seed):
    """Many blocks or one, Snappy or not, shards with holes; by prefix and by index."""
    rng = random.Random(seed)
    tensors = random_tensors(np.random.default_rng(seed), rng.choice([0, 1, 40, 120]))
    per_block, shards = rng.choice([1, 5, 16, 1000]), rng.choice([1, 2, 11])
    write_by_hand(tmp_path / "model.ckpt", tensors, rng, shards, per_block, packed=bool(seed % 2))
    for path in (tmp_path / "model.ckpt", str(tmp_path / "model.ckpt.index")):
        same_tensors(read_tensorflow(path, check=True), tensors)
        same_tensors(read_tensorflow(path), tensors)


@pytest.mark.parametrize("seed", range(8))
def test_written_is_read(tmp_path, seed, monkeypatch):
    tensors = random_tensors(np.random.default_rng(seed), [0, 1, 63, 64, 277, 277, 277, 277][seed])
    write_tensorflow(tmp_path / "model.ckpt", tensors)
    same_tensors(read_tensorflow(tmp_path / "model.ckpt", check=True), tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt.index", "model.ckpt.data-00000-of-00001"}
    calls = []
    block = sstable._block
    monkeypatch.setattr(sstable, "_block", lambda *args: (calls.append(args), block(*args))[1])
    read_tensorflow(tmp_path / "model.ckpt")
    assert len(calls) == 1 + math.ceil((len(tensors) + 1) / 64)


def test_writes_the_bytes_on_paper(tmp_path):
    """One scalar of float32, by the format's page: no helper of the reader's or the writer's is asked."""
    write_tensorflow(tmp_path / "x", {"ab": np.float32([1.5]).reshape(())})
    assert (tmp_path / "x.data-00000-of-00001").read_bytes() == b"\x00\x00\xc0\x3f"
    crc = struct.pack("<I", masked(slow_crc(b"\x00\x00\xc0\x3f")))
    data = (
        b"\x00\x00\x06" + b"\x08\x01\x1a\x02\x08\x01" + b"\x00\x02\x0b" + b"ab" + b"\x08\x01\x12\x00\x28\x04\x35" + crc
    )
    data += struct.pack("<II", 0, 1)
    unused = struct.pack("<II", 0, 1)
    handles = b"\x00\x02\x02" + b"ab" + bytes([0, len(data)]) + struct.pack("<II", 0, 1)
    at = [len(data) + 5, len(data) + 5 + len(unused) + 5]
    footer = bytes([at[0], len(unused), at[1], len(handles)]).ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    expected = sealed(data) + sealed(unused) + sealed(handles) + footer
    assert (tmp_path / "x.index").read_bytes() == expected


def test_arrays_of_any_layout(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {
        "turned": base.T,
        "strided": base[::2, 1::2],
        "big": base.astype(">f4"),
        "fortran": np.asfortranarray(base),
    }
    write_tensorflow(tmp_path / "x.index", tensors)
    found = read_tensorflow(tmp_path / "x", check=True)
    for name, array in tensors.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].read(), array)


def test_an_old_checkpoint_goes_all_at_once(tmp_path, monkeypatch):
    """A write that fails leaves the old files alone, and nothing of its own."""
    old = {"w": np.arange(3)}
    write_tensorflow(tmp_path / "x", old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(replacing.os, "fsync", full)
        with pytest.raises(InputError, match=r"x\.index: cannot be written \(No space left on device\)"):
            write_tensorflow(tmp_path / "x", {"w": np.zeros(2)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    moves, index = [], tmp_path / "x.index"
    with monkeypatch.context() as patch:
        replace = replacing.os.replace
        patch.setattr(replacing.os, "replace", lambda a, b: (moves.append((b.name, index.exists())), replace(a, b)))
        write_tensorflow(tmp_path / "x", {"w": np.zeros(2)})
    assert moves == [("x.data-00000-of-00001", False), ("x.index", False)]
    same_tensors(read_tensorflow(tmp_path / "x"), {"w": np.zeros(2)})


def test_values_are_views_of_the_file(tmp_path):
    write_tensorflow(tmp_path / "x", {"w": np.arange(2_000_000)})
    tracemalloc.start()
    values = read_tensorflow(tmp_path / "x")["w"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert values[-1] == 1_999_999


def test_strings_are_left_out_and_slices_refused(tmp_path):
    skipped = [(name.encode(), entry(number, (2,), 0, 0, 99)) for name, number in [("r", 20), ("s", 7), ("v", 21)]]
    tensor = (b"w", entry(6, (2,), 0, 1, 2, masked(slow_crc(b"bc"))))
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"abcd")
    (tmp_path / "x.index").write_bytes(table([[(b"", header()), *skipped, tensor]]))
    same_tensors(read_tensorflow(tmp_path / "x", check=True), {"w": np.frombuffer(b"bc", np.int8)})
    part = (b"\0\1w\xff\0\1", entry(6, (1,), 0, 1, 1))
    whole = (b"w", entry(6, (2,), more=field(7, field(1, field(2, 1))) + field(7, b"")))
    (tmp_path / "x.index").write_bytes(table([[(b"", header()), part, whole]]))
    with pytest.raises(InputError, match=r"x\.index: tensor 'w': found 2 slices, expected a variable in one piece"):
        read_tensorflow(tmp_path / "x")


def test_checksums_of_values_are_checked_on_demand(tmp_path):
    tensors = {"a": np.arange(5), "w": np.arange(3000, dtype=np.float32), "z": np.arange(5)}
    write_tensorflow(tmp_path / "x", tensors)
    data = tmp_path / "x.data-00000-of-00001"
    raw = bytearray(data.read_bytes())
    raw[40 + 7001] ^= 16
    data.write_bytes(raw)
    read_tensorflow(tmp_path / "x")["w"].read()
    found = read_tensorflow(tmp_path / "x", check=True)
    np.testing.assert_array_equal(found["a"].read(), tensors["a"])
    np.testing.assert_array_equal(found["z"].read(), tensors["z"])
    with pytest.raises(InputError, match=r"tensor 'w': found checksum 0x[0-9a-f]{8}, expected 0x[0-9a-f]{8}$"):
        found["w"].read()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"": np.zeros(1)}, "tensor '': expected a name of 1 to 4096 bytes"),
        ({"\0w": np.zeros(1)}, "does not begin with a zero"),
        ({"w" * 4097: np.zeros(1)}, "expected a name of 1 to 4096 bytes"),
        ({"w\ud800": np.zeros(1)}, "of UTF-8"),
        ({3: np.zeros(1)}, "tensor 3: expected a name"),
        ({"w": [1.0]}, "tensor 'w': found list, expected an array of float32"),
        ({"w": np.zeros(1, np.complex64)}, "tensor 'w': found complex64, expected an array of float32"),
        ({"w": np.array(["a"])}, "tensor 'w': found <U1, expected an array of float32"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    with pytest.raises(InputError) as caught:
        write_tensorflow(tmp_path / "x", tensors)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_place_to_write(tmp_path):
    with pytest.raises(InputError, match=r"none/x\.index: cannot be written \(No such file or directory\)"):
        write_tensorflow(tmp_path / "none" / "x", {"w": np.zeros(1)})


# Broken files.

GOOD = [(b"", header()), (b"w", entry(1, (2,), 0, 4, 8, 7))]


def one(value, key=b"w"):
    return table([[(b"", header()), (key, value)]])


def with_block(body, kind=0):
    """An index whose only block of data is the given bytes."""
    file = sealed(body, kind)
    handles = sealed(block([(b"\xff", number(0) + number(len(body)))], 1))
    return (
        file
        + handles
        + (b"\0\0" + number(len(file)) + number(len(handles) - 5)).ljust(40, b"\0")
        + struct.pack("<Q", MAGIC)
    )


def with_handles(handles):
    """An index of one good block under the given places; the block itself is 0 to SIZE."""
    file, body = sealed(block(GOOD)), block(handles, 1)
    footer = b"\0\0" + number(len(file)) + number(len(body))
    return file + sealed(body) + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


SIZE = len(block(GOOD))
FLIPPED = bytearray(table([GOOD]))
FLIPPED[20] ^= 1
# A literal of four bytes, then a copy of four from five bytes back.
LEADS_OUT = number(8) + b"\x0cabcd" + b"\x01\x05"

BROKEN = {
    "empty": (b"", "found  at its end, expected 57fb808b247547db"),
    "cut before the footer": (table([GOOD])[:40], "at its end, expected 57fb808b247547db"),
    "cut in the footer": (table([GOOD])[:-1], "at its end, expected 57fb808b247547db"),
    "head cut off": (table([GOOD])[9:], "expected at most 16777216 and their end by"),
    "wrong magic": (table([GOOD], magic=MAGIC + 1), "found 58fb808b247547db at its end, expected 57fb808b247547db"),
    "wrong crc": (bytes(FLIPPED), "block at byte 0: found checksum 0x"),
    "compression": (
        with_block(block(GOOD), 2),
        "block at byte 0: found compression 2, expected 0 (none) or 1 (Snappy)",
    ),
    "block out of range": (
        with_handles([(b"w", number(0) + number(2**40))]),
        "found 1099511627776 bytes, expected at most 16777216",
    ),
    "block twice": (
        with_handles([(b"w", number(0) + number(SIZE)), (b"x", number(0) + number(SIZE))]),
        "block under b'x': found the place b'\\x00",
    ),
    "place with more": (with_handles([(b"w", number(0) + number(SIZE) + b"\0")]), "expected two numbers from byte 0"),
    "place cut": (with_handles([(b"w", number(0))]), "block under b'w': found nothing, expected a number of 64 bits"),
    "no blocks": (with_handles([]), "found no header under the empty key"),
    "key above its block": (
        table([GOOD], limits=[b"v"]),
        "found b'w' as its last key, expected one up to the block's own",
    ),
    "empty block": (with_block(block([])), "found None as its last key"),
    "no restarts": (with_block(struct.pack("<I", 0)), "found 0 restarts in 4 bytes, expected at least one"),
    "restarts out of range": (with_block(struct.pack("<II", 0, 2)), "found 2 restarts in 8 bytes"),
    "block of no bytes": (with_block(b""), "found 0 restarts in 0 bytes"),
    "shares too much": (
        with_block(number(1) + number(0) + number(0) + struct.pack("<II", 0, 1)),
        "found an entry of 1 shared bytes of 0, 0 more and 0 of 0 left",
    ),
    "value cut": (
        with_block(number(0) + number(1) + number(5) + b"wabc" + struct.pack("<II", 0, 1)),
        "found an entry of 0 shared bytes of 0, 1 more and 5 of 4 left",
    ),
    "entry cut": (with_block(b"\x00\x80" + struct.pack("<II", 0, 1)), "found 80, expected a number of 64 bits"),
    "number of 11 bytes": (with_block(b"\x80" * 10 + b"\x01" + struct.pack("<II", 0, 1)), "found " + "80" * 10),
    "number of 65 bits": (with_block(b"\xff" * 9 + b"\x02" + struct.pack("<II", 0, 1)), "found " + "ff" * 9 + "02"),
    "number that is too long": (with_block(b"\x80\x00" + struct.pack("<II", 0, 1)), "found 8000"),
    "long key": (one(entry(), b"w" * 4097), "expected them there and a key up to 4096"),
    "keys not sorted": (
        table([[(b"", header()), (b"x", entry()), (b"w", entry())]], limits=[b"x"]),
        "found b'w' after b'x', expected keys sorted",
    ),
    "key twice": (table([[*GOOD, GOOD[-1]]]), "found b'w' after b'w', expected keys sorted"),
    "blocks not sorted": (
        table([[(b"", header()), (b"x", entry())], [(b"w", entry())]], limits=[b"x", b"y"]),
        "block under b'y': found b'w' after b'x', expected keys sorted",
    ),
    "Snappy leads out": (with_block(LEADS_OUT, 1), "found Snappy data that lead astray, expected 8 bytes"),
    "Snappy back by nothing": (with_block(number(8) + b"\x0cabcd\x01\x00", 1), "found Snappy data"),
    "Snappy is cut": (with_block(number(8) + b"\x0cabc", 1), "found Snappy data"),
    "Snappy copy is cut": (with_block(number(8) + b"\x0cabcd\x0e\x04", 1), "found Snappy data"),
    "Snappy is short": (with_block(number(5) + b"\x0cabcd", 1), "found Snappy data"),
    "Snappy is long": (with_block(number(7) + b"\x0cabcd\x01\x04", 1), "found Snappy data"),
    "Snappy goes on": (
        with_block(number(4) + b"\x0cabcd\x01\x04", 1),
        "found Snappy data that lead astray, expected 4",
    ),
    "Snappy is a bomb": (
        with_block(number(2**24) + bytes(90), 1),
        "found 16777216 bytes packed into 94, which Snappy cannot",
    ),
    "no header": (table([GOOD[1:]]), "found no header under the empty key, expected a checkpoint of format V2"),
    "header of V1": (
        table([[(b"", field(1, field(1, b"w")))]]),
        "header: found field 1 of wire type 2, expected 1 (num_shards)",
    ),
    "big-endian": (table([[(b"", header(endianness=1))]]), "header: endianness: found 1, expected 0, little-endian"),
    "later version": (table([[(b"", header(min_consumer=2))]]), "header: version: found one for readers from 2"),
    "no shards": (table([[(b"", header(0))]]), "header: num_shards: found 0, expected at least 1"),
    "fewer than no shards": (table([[(b"", header(-1))]]), "header: num_shards: found -1, expected at least 1"),
    "unknown dtype": (one(entry(8)), "tensor 'w': dtype: found 8, expected one of 1 (float32), 2 (float64)"),
    "no dtype": (one(b""), "tensor 'w': dtype: found 0, expected one of"),
    "size of other shape": (
        one(entry(1, (2, 3), size=20)),
        "found 20 bytes from 0 of the 12 of shard 0, expected 24 for float32 [2, 3]",
    ),
    "offset behind the end": (one(entry(1, (2,), 0, 5, 8)), "found 8 bytes from 5 of the 12 of shard 0"),
    "offset far behind": (one(entry(1, (0,), 0, 2**62, 0)), "found 0 bytes from 4611686018427387904 of the 12"),
    "negative offset": (one(entry(1, (2,), 0, -4, 8)), "found 8 bytes from -4 of the 12 of shard 0"),
    "negative size": (one(entry(1, (2,), 0, 0, -8)), "found -8 bytes from 0 of the 12 of shard 0"),
    "negative axis": (one(entry(1, (-1,))), "tensor 'w': shape: found [-1], expected sizes from 0"),
    "two negative axes": (one(entry(1, (-1, -1))), "tensor 'w': shape: found [-1, -1]"),
    "vast": (one(entry(1, (0, 2**62))), "tensor 'w': shape: found [0, 4611686018427387904], expected"),
    "65 axes": (one(entry(1, (1,) * 65)), "tensor 'w': shape: found 65 axes, expected at most 64"),
    "no rank": (one(field(1, 1) + field(2, field(3, 1))), "tensor 'w': shape: found no rank"),
    "shard out of range": (one(entry(shard=1)), "tensor 'w': shard_id: found 1, expected 0 to 0"),
    "negative shard": (one(entry(shard=-1)), "tensor 'w': shard_id: found -1, expected 0 to 0"),
    "missing shard": (
        table([[(b"", header(3)), (b"w", entry(shard=2))]]),
        "x.data-00002-of-00003: cannot be read (No such file or directory), expected the values of tensor 'w'",
    ),
    "unknown field": (
        one(entry(more=field(9, 1))),
        "tensor 'w': found field 9 of wire type 0, expected 1 (dtype) of 0",
    ),
    "wire type": (one(field(1, b"\1")), "tensor 'w': found field 1 of wire type 2, expected 1 (dtype) of 0"),
    "field cut": (one(field(1, 1) + b"\x12\x05\x12"), "tensor 'w': shape: found 1 bytes, expected 5"),
    "crc cut": (one(field(1, 1) + b"\x35\0\0"), "tensor 'w': crc32c: found 2 bytes, expected 4"),
    "number cut": (one(b"\x08"), "tensor 'w': dtype: found nothing, expected a number of 64 bits"),
    "no UTF-8": (one(entry(), b"w\xff"), "found the name b'w\\xff', expected UTF-8"),
    "line feed in the name": (one(entry(8), b"w\n\xe2\x80\xa8"), "tensor 'w\\n\\u2028': dtype: found 8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(tmp_path, case):
    file, message = BROKEN[case]
    (tmp_path / "x.index").write_bytes(file)
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(12))
    with pytest.raises(InputError) as caught:
        read_tensorflow(tmp_path / "x")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'x.'}")
    assert len(str(caught.value).splitlines()) == 1


def test_the_broken_files_are_one_step_from_good_ones(tmp_path):
    """The helpers' own files are fine, so it is the step that is refused."""
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(12))
    fine = [one(entry()), with_block(block(GOOD)), with_handles([(b"w", number(0) + number(SIZE))]), table([GOOD])]
    fine += [one(entry(1, (1,) * 64)), one(entry(1, (0, 2**60), size=0)), one(entry(), b"w" * 4096)]
    fine.append(with_block(number(len(block(GOOD))) + bytes([60 << 2, len(block(GOOD)) - 1]) + block(GOOD), 1))
    for file in fine:
        (tmp_path / "x.index").write_bytes(file)
        assert len(read_tensorflow(tmp_path / "x")) == 1


def test_truncated_data(tmp_path):
    write_tensorflow(tmp_path / "x", {"a": np.zeros(2), "w": np.zeros(3)})
    data = tmp_path / "x.data-00000-of-00001"
    for size in (0, 16, 39):
        data.write_bytes(bytes(size))
        with pytest.raises(InputError, match=rf"tensor '[aw]': found \d+ bytes from \d+ of the {size} of shard 0"):
            read_tensorflow(tmp_path / "x")


def test_no_file_and_one_file(tmp_path):
    with pytest.raises(InputError, match=r"x\.index: cannot be read \(No such file or directory\), expected the index"):
        read_tensorflow(tmp_path / "x")
    with pytest.raises(InputError, match=r"\.index: cannot be read"):
        read_tensorflow(tmp_path)
    (tmp_path / "x.index").mkdir()
    with pytest.raises(InputError, match=r"x\.index: cannot be read \(Is a directory\)"):
        read_tensorflow(tmp_path / "x")
    (tmp_path / "v1").write_bytes(table([[(b"", field(1, b""))]]))
    with pytest.raises(InputError, match=r"v1: found one file, perhaps of format V1, expected format V2 and v1\.index"):
        read_tensorflow(tmp_path / "v1")


def test_limits(tmp_path, monkeypatch):
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(12))
    (tmp_path / "x.index").write_bytes(table([[(b"", header()), (b"v" * 40, entry()), (b"w" * 40, entry())]]))
    with monkeypatch.context() as patch:
        patch.setattr(tensorflow_file, "_NAMES_PER_BYTE", 0)
        patch.setattr(tensorflow_file, "_FREE_NAMES", 79)
        with pytest.raises(InputError, match="or names of more than 79 bytes, expected no more of an index of"):
            read_tensorflow(tmp_path / "x")
        patch.setattr(tensorflow_file, "_FREE_NAMES", 80)
        assert len(read_tensorflow(tmp_path / "x")) == 2
        patch.setattr(tensorflow_file, "_ENTRY_BYTES", 10**6)
        patch.setattr(tensorflow_file, "_FREE_ENTRIES", 0)
        with pytest.raises(InputError, match="found more than 0 tensors, or"):
            read_tensorflow(tmp_path / "x")
        patch.setattr(sstable, "_MAX_TABLE", 100)
        with pytest.raises(InputError, match=r"found \d+ bytes, expected an index of at most 100"):
            read_tensorflow(tmp_path / "x")


def mutated(rng, file):
    """One to three flips, insertions, deletions, doublings or cuts."""
    file = bytearray(file)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(file) + 1)
        match rng.randrange(8):
            case 0 | 1 | 2:
                if place < len(file):
                    file[place] ^= 1 << rng.randrange(8)
            case 3:
                if place < len(file):
                    file[place] = rng.choice([0, 1, 127, 128, 255])
            case 4:
                file[place:place] = rng.randbytes(rng.randint(1, 4))
            case 5:
                del file[place : place + rng.randint(1, 9)]
            case 6:
                file[place:place] = file[place : place + rng.randint(1, 30)]
            case 7:
                del file[place:]
    return bytes(file)


def resealed(rng, blocks):
    """An index of the blocks, one of them mutated, under checksums and places that are right."""
    hit = rng.randrange(len(blocks) + 1)
    file, handles = b"", []
    for place, (limit, body, kind) in enumerate(blocks):
        body = mutated(rng, body) if place == hit else body
        handles.append((limit, number(len(file)) + number(len(body))))
        file += sealed(body, kind)
    body = block(handles, 1)
    body = mutated(rng, body) if hit == len(blocks) else body
    return (
        file
        + sealed(body)
        + (b"\0\0" + number(len(file)) + number(len(body))).ljust(40, b"\0")
        + struct.pack("<Q", MAGIC)
    )


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_indices(tmp_path, watch, count):
    """Tensors of bytes that the data hold, or InputError; half are broken under checksums that are right."""
    rng = random.Random(count)
    names = ["bert/layer_0/kernel", "bert/layer_0/bias", "bert/layer_1/kernel", "step", "é", "s"]
    values = [(1, (2, 3), 24), (2, (3,), 24), (14, (2, 2), 8), (9, (), 8), (10, (5,), 5), (7, (1,), 9)]
    data = rng.randbytes(200)
    entries = [(b"", header())]
    for name, (dtype, shape, size) in zip(names, values, strict=True):
        offset = rng.randrange(200 - size)
        crc = masked(slow_crc(data[offset : offset + size]))
        entries.append((name.encode(), entry(dtype, shape, 0, offset, size, crc)))
    entries.sort()
    whole = table([entries[:3], entries[3:]])
    bodies = [block(entries[:3]), block(entries[3:])]
    blocks = [(entries[2][0], bodies[0], 0), (entries[-1][0], snappy(bodies[1], rng), 1)]
    index = tmp_path / "x.index"
    (tmp_path / "x.data-00000-of-00001").write_bytes(data)
    crc32c(bytes(40_000))  # builds its tables
    for turn in range(count):
        file = resealed(rng, blocks) if turn % 2 else mutated(rng, whole)
        found = watch(lambda path: read_tensorflow(path, check=True), index, file, values=False)
        for tensor in (found or {}).values():
            try:
                array = tensor.read()
            except InputError as error:
                assert "found checksum" in str(error)  # noqa: PT017 (one error or none, both are right)
                continue
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
            assert array.tobytes() in data
    assert 0.05 < watch.fine / count < 0.5
    assert sum("checksum" not in error for error in watch.errors) > 0.4 * count


# TensorFlow itself.


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


@pytest.mark.parametrize("seed", range(4))
def test_tensorflow_reads_what_we_write(tmp_path, tf, seed):
    tensors = random_tensors(np.random.default_rng(seed), [0, 1, 64, 277][seed])
    write_tensorflow(tmp_path / "x", tensors)
    if not tensors:
        same_tensors(read_tensorflow(tmp_path / "x"), {})
        return
    reader = tf.train.load_checkpoint(str(tmp_path / "x"))
    assert set(reader.get_variable_to_shape_map()) == set(tensors)
    for name, array in tensors.items():
        # RestoreV2 checks the values' checksum, the reader of load_checkpoint too.
        (found,) = tf.raw_ops.RestoreV2(
            prefix=str(tmp_path / "x"),
            tensor_names=[name],
            shape_and_slices=[""],
            dtypes=[tf.dtypes.as_dtype(DTYPES[array.dtype])],
        )
        for values in (found.numpy(), reader.get_tensor(name)):
            assert values.shape == array.shape
            assert np.asarray(values).tobytes() == array.tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_we_read_what_tensorflow_writes(tmp_path, tf, seed):
    tensors = random_tensors(np.random.default_rng(seed), [1, 64, 277][seed])
    save(tf, tmp_path / "x", {**tensors, "a string": tf.constant(["a", "bc"])})
    same_tensors(read_tensorflow(tmp_path / "x", check=True), tensors)
    ordered = sorted(tensors, key=str.encode)
    save(tf, tmp_path / "y", {name: tensors[name] for name in ordered})
    write_tensorflow(tmp_path / "z", tensors)
    suffix = ".data-00000-of-00001"
    assert (tmp_path / f"y{suffix}").read_bytes() == (tmp_path / f"z{suffix}").read_bytes()
    entries = [list(sstable.read_table((tmp_path / f"{n}.index").read_bytes(), tmp_path)) for n in "yz"]
    assert entries[0] == entries[1]


def test_tensorflow_merges_shards_and_we_read_them(tmp_path, tf):
    tensors = random_tensors(np.random.default_rng(5), 30)
    parts = {"p": dict(itertools.islice(tensors.items(), 12)), "q": dict(itertools.islice(tensors.items(), 12, None))}
    for name, part in parts.items():
        save(tf, tmp_path / name, part)
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(tmp_path / name) for name in parts], destination_prefix=str(tmp_path / "x")
    )
    assert (tmp_path / "x.data-00001-of-00002").exists()
    same_tensors(read_tensorflow(tmp_path / "x", check=True), tensors)


def test_tensorflow_reads_the_second_writer(tmp_path, tf):
    """So that the files by hand are what they are meant to be."""
    tensors = random_tensors(np.random.default_rng(6), 50)
    for packed in (False, True):
        write_by_hand(tmp_path / "x", tensors, random.Random(6), shards=3, packed=packed)
        reader = tf.train.load_checkpoint(str(tmp_path / "x"))
        for name, array in tensors.items():
            assert np.asarray(reader.get_tensor(name)).tobytes() == array.tobytes()


def test_slices_and_v1_of_tensorflow(tmp_path, tf):
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"),
        tensor_names=["p/q", "p/q"],
        shape_and_slices=["4 2 0,2:-", "4 2 2,2:-"],
        tensors=[tf.ones((2, 2)), tf.zeros((2, 2))],
    )
    with pytest.raises(InputError, match=r"tensor 'p/q': found 2 slices"):
        read_tensorflow(tmp_path / "x")
    tf.raw_ops.Save(filename=str(tmp_path / "v1"), tensor_names=["w"], data=[tf.ones(2)])
    with pytest.raises(InputError, match="perhaps of format V1"):
        read_tensorflow(tmp_path / "v1")


def save(tf, prefix, tensors):
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.convert_to_tensor(value) for value in tensors.values()],
    )
