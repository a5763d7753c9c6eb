"""Layer normalisation (Ba et al. 2016, equation 4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

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


def _kernels() -> tuple[ModuleType, ModuleType]:
    """For TPUs and GPUs; imported by who trains: Pallas takes its time."""
    from ctx_jax.kernels import gpu_norm, tpu_norm

    return tpu_norm, gpu_norm


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

    For a gradient the sum is kept. On TPUs and GPUs it and its forward pass are kernels, with the same noise.
    """
    return layer_norm(eps, x + drop(rate, branch, seeds), scale, bias)


def _residual_norm_forward(eps, rate, x, branch, scale, bias, seeds):
    def plain(x, branch, scale, bias, seeds):
        total = x + drop(rate, branch, seeds)
        return layer_norm(eps, total, scale, bias), total

    on_tpu, on_gpu = (partial(kernels.forward, eps=eps, rate=rate) for kernels in _kernels())
    y, total = _on_device(x, branch, scale, bias, seeds, tpu=on_tpu, cuda=on_gpu, default=plain)
    return y, (total, scale, seeds)


def _residual_norm_backward(eps, rate, residuals, cotangent):
    def plain(total, scale, seeds, cotangent):
        values = total.astype(jnp.float32)
        mean = values.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(values - mean).mean(-1, keepdims=True) + eps)
        dx, dscale, dbias = _layer_norm_backward(eps, (total, scale, mean, inverse), cotangent)
        return dx, drop(rate, dx, seeds), dscale, dbias

    with jax.named_scope("norms"):
        on_tpu, on_gpu = (partial(kernels.backward, eps=eps, rate=rate) for kernels in _kernels())
        gradients = _on_device(*residuals, cotangent, tpu=on_tpu, cuda=on_gpu, default=plain)
    return *gradients, None


def _on_device(vectors: Float[Array, "B T D"], *others: Array, default: Callable, **kernels: Callable) -> Any:
    """The program for the device that it is compiled for, of those whose kernels take such vectors."""
    tpu, gpu = _kernels()
    fitting = {}
    if tpu.fits(vectors.shape):
        fitting["tpu"] = kernels["tpu"]
    if gpu.fits(vectors.shape, vectors.dtype):
        fitting["cuda"] = kernels["cuda"]
    if not fitting:
        return default(vectors, *others)
    return jax.lax.platform_dependent(vectors, *others, **fitting, default=default)


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
