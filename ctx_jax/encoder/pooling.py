"""Vectors of texts out of those of tokens, on the device, for rows that several texts share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ctx_jax.encoder.base import Pool
from ctx_jax.encoder.repair import Affine, apply_to_layers


def read_out(
    layers: Float[Array, "K B T D"], segments: Int[Array, "B T"], slots: int, pool: Pool | None, repair: Affine | None
) -> Float[Array, "K B ... M"]:
    """[K, B, T, M] with zeros at padding, or [K, B, slots, M], a vector for each text of a row; of none, anything.

    Args:
      layers: float32.
      segments: the text of its row that a token belongs to, from 1; 0 is padding.
      slots: texts of a row, at most.
      pool: as in `Encoder.encode`.
      repair: of the vectors that come out.
    """
    vectors = layers if pool is None else _pooled(layers, segments, slots, pool)
    if repair is not None:
        vectors = apply_to_layers(repair, vectors)
    return vectors if pool else jnp.where(segments[None, :, :, None] > 0, vectors, 0.0)


@jax.named_scope("pooling")
def _pooled(
    layers: Float[Array, "K B T D"], segments: Int[Array, "B T"], slots: int, pool: Pool
) -> Float[Array, "K B S D"]:
    member = segments[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]
    if pool == "cls":
        return jnp.take_along_axis(layers, member.argmax(2)[None, :, :, None], axis=2)
    if pool == "mean":
        member = member.astype(jnp.float32)
        share = member / jnp.maximum(member.sum(2, keepdims=True), 1.0)
        return jnp.einsum("bst,kbtd->kbsd", share, layers, precision="highest")
    # One text of each row after the other: all at once would be slots times as much memory.
    largest = jax.lax.map(
        lambda of_text: jnp.where(of_text[None, :, :, None], layers, -jnp.inf).max(2), jnp.moveaxis(member, 1, 0)
    )
    return jnp.moveaxis(largest, 0, 2)
