"""Layer normalisation (Ba et al. 2016, equation 4)."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt

from ctx_jax.nn.dropout import drop, seeds_of


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


def _kernels() -> ModuleType:
    """Imported by who trains: Pallas takes its time."""
    from ctx_jax.kernels import tpu_norm

    return tpu_norm


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def residual_norm(
    eps: float,
    rate: float,
    x: Float[Array, "B T D"],
    branch: Float[Array, "B T D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    seeds: UInt[Array, "B 2"],
) -> Float[Array, "B T D"]:
    """`layer_norm` of x + dropout(branch), the end of a transformer's sublayer in training.

    For a gradient the sum is kept. On TPUs the gradient and its forward pass are kernels, with the same noise.
    """
    return layer_norm(eps, x + drop(rate, branch, seeds), scale, bias)


def _residual_norm_forward(eps, rate, x, branch, scale, bias, seeds):
    def plain(x, branch, scale, bias, seeds):
        total = x + drop(rate, branch, seeds)
        return layer_norm(eps, total, scale, bias), total

    inputs = (x, branch, scale, bias, seeds)
    if _kernels().fits(x.shape):
        kernel = partial(_kernels().forward, eps=eps, rate=rate)
        y, total = jax.lax.platform_dependent(*inputs, tpu=kernel, default=plain)
    else:
        y, total = plain(*inputs)
    return y, (total, scale, seeds)


def _residual_norm_backward(eps, rate, residuals, cotangent):
    def plain(total, scale, seeds, cotangent):
        values = total.astype(jnp.float32)
        mean = values.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(values - mean).mean(-1, keepdims=True) + eps)
        dx, dscale, dbias = _layer_norm_backward(eps, (total, scale, mean, inverse), cotangent)
        return dx, drop(rate, dx, seeds), dscale, dbias

    with jax.named_scope("norms"):
        if _kernels().fits(cotangent.shape):
            kernel = partial(_kernels().backward, eps=eps, rate=rate)
            gradients = jax.lax.platform_dependent(*residuals, cotangent, tpu=kernel, default=plain)
        else:
            gradients = plain(*residuals, cotangent)
    return *gradients, None


residual_norm.defvjp(_residual_norm_forward, _residual_norm_backward)


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

    @jax.named_scope("norms")
    def after(
        self, x: Float[Array, "B T D"], branch: Float[Array, "B T D"], rate: float, keys: Key[Array, "B"] | None
    ) -> Float[Array, "B T D"]:
        """Normalises x + dropout(branch); `keys` are the rows' dropout keys, None outside training."""
        if keys is None:
            return self(x + branch)
        return residual_norm(self.eps, rate, x, branch, self.scale[...], self.bias[...], seeds_of(keys))
