"""Multi-head self-attention over rows that may hold several examples (Vaswani et al. 2017, section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ctx_jax.nn.dropout import dropout
from ctx_jax.nn.linear import Linear


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """True where query and key belong to the same example of their row; padding (0) is nobody's key."""
    queries, keys = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
    return (queries == keys) & (keys > 0)


def dot_product_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H K"],
    mask: Bool[Array, "B 1 T T"],
    *,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q kᵀ / √K) v; products summed and softmax taken in float32, whatever the type of the operands."""
    # Heads in front, written out: XLA's CPU backend is 5 to 10 % slower on the einsum without the transposes.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = jnp.einsum("bhqk,bhtk->bhqt", query, key, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(query.shape[-1] ** -0.5)
    # A query without any key (padding) gets a uniform row, not NaN; nobody reads it.
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_keys)
    context = jnp.einsum("bhqt,bhtk->bhqk", weights, value, preferred_element_type=jnp.float32)
    return context.astype(value.dtype).transpose(0, 2, 1, 3)


class SelfAttention(nnx.Module):
    """Query, key and value in one product, attention, and the output projection.

    Attributes:
      qkv: Linear D → [3, D]; of the last axis each head takes a run of D / H.
      out: Linear D → D.
    """

    def __init__(self, width: int, num_heads: int, *, dropout_rate: float, stddev: float, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.qkv = Linear(width, (3, width), stddev=stddev, rngs=rngs)
        self.out = Linear(width, width, stddev=stddev, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 T T"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attends; `keys` are the rows' dropout keys, None outside training."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        context = dot_product_attention(query, key, value, mask, dropout_rate=self.dropout_rate, dropout_keys=keys)
        return self.out(context.reshape(batch, length, width))
