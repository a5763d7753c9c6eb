"""Multi-head self-attention over rows that may hold several examples (Vaswani et al. 2017, section 3.2).

Attention is to the whole example, or local: to the tokens at most `window` away (Beltagy et al. 2020, section 3.1).
Local attention cuts a row into blocks of `window` queries, and each block looks at three blocks of keys, its own and
its neighbours: 3 · window scores a token instead of T.
"""

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


def is_blocked(length: int, window: int | None) -> bool:
    """Whether blocks of three windows save anything over whole rows; of a symbolic length, they may."""
    return window is not None and (not isinstance(length, int) or 3 * window < length)


def attention_mask(segment_ids: Int[Array, "B T"], window: int | None = None) -> Bool[Array, "..."]:
    """What `dot_product_attention` takes: [B, 1, T, T], or for local attention in N blocks [B, 1, N, W, 3 W]."""
    if window is None:
        return segment_mask(segment_ids)
    length = segment_ids.shape[1]
    if not is_blocked(length, window):
        place = jax.lax.broadcasted_iota(jnp.int32, (1, 1, length, length), 2)
        near = jnp.abs(place - jax.lax.broadcasted_iota(jnp.int32, (1, 1, length, length), 3)) <= window
        return segment_mask(segment_ids) & near
    blocks = _blocks(segment_ids[:, None, :, None], window)
    queries, keys = blocks, jnp.swapaxes(_with_neighbours(blocks), -1, -2)
    shape = (1, 1, 1, window, 3 * window)
    distance = jax.lax.broadcasted_iota(jnp.int32, shape, 4) - window - jax.lax.broadcasted_iota(jnp.int32, shape, 3)
    return (queries == keys) & (keys > 0) & (jnp.abs(distance) <= window)


def _blocks(x: Array, window: int) -> Array:
    """[…, T, K] → […, N, W, K], filled up with zeros."""
    *front, length, width = x.shape
    count = (length + window - 1) // window  # named, not -1: the length may be symbolic
    x = jnp.pad(x, [(0, 0)] * len(front) + [(0, count * window - length), (0, 0)])
    return x.reshape(*front, count, window, width)


def _with_neighbours(blocks: Array) -> Array:
    """[…, N, W, K] → […, N, 3 W, K]: each block between the one before and the one after it; zeros beyond the ends."""
    padded = jnp.pad(blocks, [(0, 0)] * (blocks.ndim - 3) + [(1, 1), (0, 0), (0, 0)])
    return jnp.concatenate([padded[..., :-2, :, :], blocks, padded[..., 2:, :, :]], axis=-2)


def dot_product_attention(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    mask: Bool[Array, "..."],
    *,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B H T K"]:
    """softmax(q kᵀ / √K) v; products summed and softmax taken in float32, whatever the type of the operands.

    Args:
      query: of each head and token.
      key: likewise.
      value: likewise.
      mask: as `attention_mask` makes it; a blocked one makes the computation blocked.
      dropout_rate: share of the weights that is dropped.
      dropout_keys: of the rows; None drops nothing.
    """
    shape = query.shape
    if mask.ndim == 5:
        window = mask.shape[3]
        query = _blocks(query, window)
        key, value = (_with_neighbours(_blocks(x, window)) for x in (key, value))
    with jax.named_scope("scores"):
        scores = jnp.einsum("...qk,...tk->...qt", query, key, preferred_element_type=jnp.float32)
        scores = scores * jnp.float32(query.shape[-1] ** -0.5)
    with jax.named_scope("softmax"):
        # A query without any key (padding) gets a uniform row, not NaN; nobody reads it.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_keys)
    with jax.named_scope("context"):
        context = jnp.einsum("...qt,...tk->...qk", weights, value, preferred_element_type=jnp.float32)
    return context.astype(value.dtype).reshape(*shape[:2], -1, shape[-1])[:, :, : shape[2]]


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
        self, x: Float[Array, "B T D"], mask: Bool[Array, "..."], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attends as `attention_mask` says; `keys` are the rows' dropout keys, None outside training."""
        batch, length, width = x.shape
        with jax.named_scope("projections"):
            qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        with jax.named_scope("transposes"):
            # Heads in front, all three at once: cut out one by one, attention in bfloat16 takes up to 1.6 times as long
            # on the CPU; and einsums without transposes take 5 to 10 % more in float32.
            query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        context = dot_product_attention(query, key, value, mask, dropout_rate=self.dropout_rate, dropout_keys=keys)
        with jax.named_scope("transposes"):
            context = context.transpose(0, 2, 1, 3).reshape(batch, length, width)
        with jax.named_scope("projections"):
            return self.out(context)
