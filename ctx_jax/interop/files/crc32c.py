"""CRC-32C, the checksum of TensorFlow's files, by NumPy at some 1 GB/s."""

from __future__ import annotations

import functools

import numpy as np

_LANES = 2**13  # they fit a cache


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """CRC-32C (Castagnoli; RFC 3720, B.4) of bytes.

    The register after a word is a linear map of register ^ word. So the words stand in rows of lanes, all lanes of a
    row move at once, and at the end the lanes fold in half until one is left.
    """
    data = memoryview(data)
    count, register = len(data) // 4, 0xFFFFFFFF
    if count >= 64:
        words, size = np.frombuffer(data, "<u4", count), min(_LANES, 1 << (count - 1).bit_length())
        first = count % size or size
        lanes = np.zeros(size, np.uint32)
        lanes[size - first :] = words[:first]
        lanes[size - first] ^= register
        for row in words[first:].reshape(-1, size):
            lanes = _moved(lanes, size.bit_length() - 1) ^ row
        while size > 1:
            size //= 2
            lanes = _moved(lanes[:size], size.bit_length() - 1) ^ lanes[size:]
        register = int(_moved(lanes, 0)[0])
        data = data[4 * count :]
    for byte in data:
        register = register >> 8 ^ _BYTES[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _TABLE = _TABLE >> 1 ^ (_TABLE & 1) * np.uint32(0x82F63B78)
_BYTES = _TABLE.tolist()


@functools.cache
def _maps(power: int) -> tuple[np.ndarray, np.ndarray]:
    """What the lower and the upper half of a register become over 2**power words of zeros."""
    bits = np.array([1 << bit for bit in range(32)], np.uint32)
    if power:
        images = _moved(_moved(bits, power - 1), power - 1)
    else:
        images = functools.reduce(lambda images, _: images >> 8 ^ _TABLE[images & 255], range(4), bits)
    halves = [np.zeros(1, np.uint32)] * 2
    for bit, image in enumerate(images):
        halves[bit // 16] = np.concatenate([halves[bit // 16], halves[bit // 16] ^ image])
    return halves[0], halves[1]


def _moved(lanes: np.ndarray, power: int) -> np.ndarray:
    lower, upper = _maps(power)
    halves = np.ascontiguousarray(lanes, "<u4").view("<u2")
    return lower.take(halves[::2]) ^ upper.take(halves[1::2])


def masked(crc: int) -> int:
    """As it is stored: a checksum of data that hold their own checksum would be no good one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
