"""Random bits for dropout: a function of (seed, place), the same on any device, mesh, batch and kernel.

JAX's threefry spends over a hundred operations a value, which on a TPU is more than a layer's products take. Dropout
asks for less than a cipher's quality: each place's number goes through the finaliser "lowbias32" (Ellis 2018,
"Prospecting for hash functions", nullprogram.com), eight operations, after one half of the seed was mixed in by xor and
the other half added, so that streams are no shifts of each other. The seeds themselves come of threefry.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt


def scramble(place: UInt[Array, "*shape"], first: Array, second: Array) -> UInt[Array, "*shape"]:
    """32 random bits of each place, for a seed of two halves; all uint32."""
    x = (place ^ second) + first
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def threshold(rate: float) -> np.uint32:
    """Bits at or above it are dropped: the share of the numbers below it is 1 - rate, to 2⁻³²."""
    return np.uint32(min(round((1.0 - rate) * 2**32), 2**32 - 1))


def places(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> UInt[Array, "*shape"]:
    """The number of each place of a row, counted along the last axis first; or with strides of one's own."""
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    found = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        found = found + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
    return found


def keep(seeds: UInt[Array, "B 2"], shape: tuple[int, ...], rate: float) -> Bool[Array, "B ..."]:
    """Where rows of a shape are not dropped; each row draws from a seed of its own."""
    one = lambda seed: scramble(places(shape), seed[0], seed[1]) < threshold(rate)
    return jax.vmap(one)(seeds)
