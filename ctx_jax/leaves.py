"""Trees of arrays as leaves with names, each with its shape, type and a checksum taken where the array is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from ctx_jax.errors import InputError

_DTYPES = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_DTYPES |= {"bfloat16", "float16", "float32", "float64"}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, `params/layers/kernel`: the names that they have on disk.

    Raises:
      InputError: two leaves of one path, or one that is no array that can be saved.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise InputError(f"leaf {name}: found two of this path, expected one")
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise InputError(f"leaf {name}: found {type(leaf).__name__}, expected a jax.Array")
        if leaf.dtype.name not in _DTYPES:
            expected = f"one of {', '.join(sorted(_DTYPES))} (PRNG keys: their jax.random.key_data)"
            raise InputError(f"leaf {name}: found {leaf.dtype}, expected {expected}")
        if 0 in leaf.shape:
            raise InputError(f"leaf {name}: found shape {leaf.shape}, expected at least one value")
        leaves[name] = leaf
    return leaves


def kind_of(leaf: Any) -> dict[str, Any]:
    """Shape and type, as JSON holds them."""
    return {"shape": list(leaf.shape), "dtype": leaf.dtype.name}


def describe_leaves(leaves: dict[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """Shape, type and checksum of each leaf."""
    found = checksums(leaves)
    return {name: {**kind_of(leaf), "checksum": found[name]} for name, leaf in leaves.items()}


def checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """The checksum of each leaf: one program for all those that lie on the same devices.

    With a program a leaf, a state of 33 leaves can wait for ever on the host's devices: XLA's threads are as many as
    the devices, 32 programs may be in flight on each, and the launch of another holds a thread until there is room —
    the thread that the training step before it needs, for an all-reduce in which the other devices already wait.
    """
    groups: dict[frozenset[jax.Device], dict[str, jax.Array]] = {}
    for name, leaf in leaves.items():
        groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
    found = [jax.device_get(_checksums(group)) for group in groups.values()]
    return {name: int(value) for values in found for name, value in values.items()}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: checksum(leaf) for name, leaf in leaves.items()}


def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """A uint32 of the array's bits that does not depend on how the array is sharded.

    Each axis in turn is summed modulo 2³², which each device can do for its part, after every word was multiplied by
    an odd number of its position and mixed (the finalizer of MurmurHash3). Both can be undone, so a change within one
    word never goes unnoticed; others do once in some 2³² cases. Without the mixing two flipped signs would cancel.
    """
    if x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    for axis in reversed(range(words.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + words.shape[-1:], axis) + np.uint32(axis + 1)
        words *= (position * np.uint32(0x9E3779B1)) | np.uint32(1)
        words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        words = jnp.sum(words ^ (words >> np.uint32(16)), axis=-1, dtype=jnp.uint32)
    return words
