"""Layer normalisation (Ba et al. 2016, equation 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class LayerNorm(nnx.Module):
    """(x - mean) / √(variance + eps) · scale + bias over the last axis; statistics in float32, result in x's type.

    The variance is the mean square of the centred values: E[x²] - E[x]² loses half the digits where the mean is large.
    """

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    @jax.named_scope("norms")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        values = x.astype(jnp.float32)
        centred = values - values.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        ones = (1,) * (x.ndim - 1)
        scale, bias = self.scale[...].reshape(*ones, -1), self.bias[...].reshape(*ones, -1)
        return (centred * inverse * scale + bias).astype(x.dtype)
