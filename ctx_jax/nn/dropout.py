"""Dropout whose noise belongs to the row, not to the batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt

from ctx_jax.kernels.noise import keep


def fold(keys: Key[Array, "B"] | None, number: int | Array) -> Key[Array, "B"] | None:
    """Another stream for each row's key: one a layer, one a place in the layer. None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def seeds_of(keys: Key[Array, "B"]) -> UInt[Array, "B 2"]:
    """Each row's seed of `kernels.noise`, from its key."""
    return jax.random.key_data(keys)[:, -2:]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def drop(rate: float, x: Float[Array, "B ..."], seeds: UInt[Array, "B 2"]) -> Float[Array, "B ..."]:
    """`dropout` with a seed a row, see `kernels.noise`."""
    if not rate:
        return x
    kept = keep(seeds, x.shape[1:], rate)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


# The noise is drawn again in the backward pass: a seed a row is all that is kept.
drop.defvjp(
    lambda rate, x, seeds: (drop(rate, x, seeds), seeds),
    lambda rate, seeds, cotangent: (drop(rate, cotangent, seeds), None),
)


def dropout(x: Float[Array, "B ..."], rate: float, keys: Key[Array, "B"] | None) -> Float[Array, "B ..."]:
    """Zeroes each value with probability `rate` and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    Every row draws from a key of its own, so that a row meets the same noise in any batch, micro-batch or mesh.
    Without keys nothing is dropped.
    """
    return x if keys is None or rate == 0.0 else drop(rate, x, seeds_of(keys))
