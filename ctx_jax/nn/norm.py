"""Layer normalisation (Ba et al. 2016, equation 4)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def _along(parameter: Float[Array, "D"], x: Float[Array, "*batch D"]) -> Float[Array, "*ones D"]:
    return parameter.reshape(*(1,) * (x.ndim - 1), -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(
    eps: float, x: Float[Array, "*batch D"], scale: Float[Array, "D"], bias: Float[Array, "D"]
) -> Float[Array, "*batch D"]:
    """(x - mean) / √(variance + eps) · scale + bias over the last axis; in float32, the result in x's type.

    For a gradient x is kept, and two numbers a vector; JAX would keep every step, in float32.
    """
    return _layer_norm_forward(eps, x, scale, bias)[0]


def _layer_norm_forward(eps, x, scale, bias):
    values = x.astype(jnp.float32)
    mean = values.mean(-1, keepdims=True)
    centred = values - mean
    # Not E[x²] - E[x]², which loses half the digits where the mean is large.
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (centred * inverse * _along(scale, x) + _along(bias, x)).astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(eps, residuals, cotangent):
    with jax.named_scope("norms"):
        x, scale, mean, inverse = residuals
        normal, cotangent = (x.astype(jnp.float32) - mean) * inverse, cotangent.astype(jnp.float32)
        batch = tuple(range(x.ndim - 1))
        dnormal = cotangent * _along(scale, x)
        along, across = dnormal.mean(-1, keepdims=True), (dnormal * normal).mean(-1, keepdims=True)
        dx = (inverse * (dnormal - along - normal * across)).astype(x.dtype)
        return dx, (cotangent * normal).sum(batch), cotangent.sum(batch)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """`layer_norm` with a scale and a bias of its own."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    @jax.named_scope("norms")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        return layer_norm(self.eps, x, self.scale[...], self.bias[...])
