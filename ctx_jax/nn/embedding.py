"""Tables of learnt vectors."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ctx_jax.nn.linear import truncated_normal


class Embedding(nnx.Module):
    """A vector for each id; an id outside the table gives NaN, so that it cannot pass unseen.

    Attributes:
      table: float32 [count, D].
    """

    def __init__(self, count: int, width: int, *, stddev: float, rngs: nnx.Rngs):
        self.table = nnx.Param(truncated_normal(rngs, (count, width), stddev))

    def __call__(self, ids: Int[Array, ...]) -> Float[Array, "... D"]:
        """Looks the ids up."""
        rows = self.table[...].at[ids]
        # Not jnp.take: there -1 is the last row.
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
