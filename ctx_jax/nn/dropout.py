"""Dropout whose noise belongs to the row, not to the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def fold(keys: Key[Array, "B"] | None, number: int | Array) -> Key[Array, "B"] | None:
    """Another stream for each row's key: one a layer, one a place in the layer. None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def dropout(x: Float[Array, "B ..."], rate: float, keys: Key[Array, "B"] | None) -> Float[Array, "B ..."]:
    """Zeroes each value with probability `rate` and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    Every row draws from a key of its own, so that a row meets the same noise in any batch, micro-batch or mesh.
    Without keys nothing is dropped.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
