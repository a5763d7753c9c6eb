"""Random bits for dropout: a function of (seed, place), the same on any device, mesh, batch and kernel.

JAX's threefry spends over a hundred operations a value, which on a TPU is more than a layer's products take; on a GPU
attention's noise is as dear as its products at a tenth of that. Dropout asks for less than a cipher's quality. A
place's number is multiplied by the golden ratio, which is an addition where places are counted (Knuth 1998, section
6.4), half of the seed is added, and two rounds of shift, xor and multiplication follow, those of the finaliser
"lowbias32" (Ellis 2018, "Prospecting for hash functions", nullprogram.com); the other half goes in between, so that
streams are no shifts of each other. The seeds themselves come of threefry.

Of the 32 bits two places make 16 each: those of a matrix whose rows differ by 8. GPUs' matrix units lay a result out so
that one thread has both, and the compiler computes their bits once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt

GOLDEN = np.uint32(0x9E3779B9)
"""2³² over the golden ratio, odd."""


def _times(number: int) -> np.uint32:
    return np.uint32(number * int(GOLDEN) % 2**32)


def draws(rows: int, columns: int) -> int:
    """How many a matrix takes: one for two places."""
    return -(-rows // 16) * 8 * columns


def begins(count: int, rows: int, columns: int) -> UInt[Array, "N"]:
    """Where each of so many matrices begins, one after the other."""
    return jax.lax.iota(jnp.uint32, count) * _times(draws(rows, columns))


def place(rows: Array, columns: Array, width: int) -> UInt[Array, "*shape"]:
    """Where the draw of each place lies from the matrix' beginning; `width` is the matrix'."""
    pairs = (rows >> np.uint32(4)) * np.uint32(8) + (rows & np.uint32(7))
    return pairs * _times(width) + columns * GOLDEN


def scramble(draw: UInt[Array, "*shape"], first: Array, second: Array) -> UInt[Array, "*shape"]:
    """32 bits of a draw, for a seed of two halves; all uint32."""
    x = draw + first
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    return (x ^ (x >> np.uint32(15)) ^ second) * np.uint32(0x846CA68B)


def share(bits: UInt[Array, "*shape"], rows: Array) -> UInt[Array, "*shape"]:
    """What a place in such a row has of its draw's bits: 16, in front."""
    # The lower half of a product has not seen the upper bits of its factors.
    lower = (bits << np.uint32(16)) ^ (bits & np.uint32(0xFFFF0000))
    return jnp.where((rows & np.uint32(8)) == 0, bits, lower)


def threshold(rate: float) -> np.uint32:
    """Bits at or above it are dropped: the share of the numbers below it is 1 - rate, to 2⁻¹⁶."""
    return np.uint32(min(round((1.0 - rate) * 2**16), 2**16 - 1) << 16)


def kept(
    rows: UInt[Array, "*shape"],
    columns: UInt[Array, "*shape"],
    width: int,
    begin: Array,
    seed: tuple[Array, Array],
    rate: float,
) -> Bool[Array, "*shape"]:
    """Where places of a matrix are not dropped.

    Args:
      rows: of each place; may be counted from a row that is a multiple of 16, if `begin` is its.
      columns: of each place.
      width: columns of the whole matrix.
      begin: of what rows and columns are counted from.
      seed: two halves.
      rate: the share that is dropped.
    """
    return share(scramble(place(rows, columns, width) + begin, *seed), rows) < threshold(rate)


def keep(seeds: UInt[Array, "B 2"], shape: tuple[int, ...], rate: float) -> Bool[Array, "B ..."]:
    """Where rows of a shape, matrices one after the other, are not dropped; each row draws from a seed of its own."""
    *front, height, width = (1, *shape) if len(shape) == 1 else shape
    count = math.prod(front)
    of = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, (count, height, width), axis)
    begin = begins(count, height, width)[:, None, None]
    one = lambda seed: kept(of(1), of(2), width, begin, (seed[0], seed[1]), rate).reshape(shape)
    return jax.vmap(one)(seeds)
