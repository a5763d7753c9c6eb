"""Affine maps whose products reach the matrix units: two-dimensional, sums in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

PRODUCT = "product"
"""Name of what `remat="dots"` keeps for the backward pass: results of products, in the type of the computation."""


def _dot(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """Product over some axes of each, accumulated and returned in float32."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x: Float[Array, "*N K"], w: Float[Array, "K M"]) -> Float[Array, "*N M"]:
    """X @ w in x's type with a float32 sum; the result is float32.

    A product with a float32 result has float32 cotangents, which would pull its two backward products out of the
    bfloat16 units. Here the cotangent is cast to x's type first; the weight's gradient stays float32.
    """
    return _matmul_forward(x, w)[0]


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, w.astype(x.dtype), ((x.ndim - 1,), (0,))), (x, w)


def _matmul_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    dy, rows = dy.astype(x.dtype), tuple(range(x.ndim - 1))
    return _input_gradient(dy, w.astype(x.dtype)), _dot(x, dy, (rows, rows)).astype(w.dtype)


def _input_gradient(dy: Array, w: Array) -> Array:
    """Dy @ wᵀ in their type."""
    plain = lambda dy, w: _dot(dy, w, ((dy.ndim - 1,), (1,))).astype(dy.dtype)
    if dy.dtype != jnp.bfloat16:
        return plain(dy, w)
    return jax.lax.platform_dependent(dy, w, cuda=lambda dy, w: _rounded(dy, w, (1,)), default=plain)


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _affine(
    x: Float[Array, "N K"], w: Float[Array, "K M"], bias: Float[Array, "M"], written: bool
) -> Float[Array, "N M"]:
    """X @ w + bias in float32, on GPUs of a product in x's type: XLA would write it in float32 and read it again.

    There what reads the product adds the bias, or cuBLAS does before it is `written`: where it is kept for a gradient,
    or no fusion reads it. That makes the product slower, by less than a pass of its own would take.
    """
    plain = lambda x, w, bias: matmul(x, w) + bias.reshape(1, -1)

    def on_gpu(x, w, bias):
        y = _rounded(x, w.astype(x.dtype), (0,))
        if written:
            return (y + bias.astype(x.dtype).reshape(1, -1)).astype(jnp.float32)
        return y.astype(jnp.float32) + bias.reshape(1, -1)

    if x.dtype != jnp.bfloat16:
        return plain(x, w, bias)
    return jax.lax.platform_dependent(x, w, bias, cuda=on_gpu, default=plain)


def _rounded(x: Array, w: Array, axis: tuple[int]) -> Array:
    """Product over x's last and one of w's axes, in their type; the sum is float32 still."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), axis), ((), ())), preferred_element_type=x.dtype)


def _affine_backward(written, residuals, dy):
    del written
    return *_matmul_backward(residuals, dy), dy.sum(0)


_affine.defvjp(lambda x, w, bias, written: (_affine(x, w, bias, True), (x, w)), _affine_backward)


def truncated_normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> Array:
    """Normal values cut at two standard deviations, not rescaled: TensorFlow's `truncated_normal_initializer`."""
    return jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) * stddev


def affine(
    x: Float[Array, "*batch K"],
    kernel: Float[Array, "K M"],
    bias: Float[Array, "M"],
    *,
    factors: Float[Array, "M"] | None = None,
    dtype: DTypeLike | None = None,
    turned: bool = False,
    written: bool = False,
) -> Float[Array, "*batch M"]:
    """The affine map x @ kernel + bias over the last axis.

    Args:
      x: vectors.
      kernel: [M, K] if it is `turned`.
      bias: of the result.
      factors: of the result, before it is rounded.
      dtype: of the result; None is x's.
      turned: see `Linear`.
      written: the result goes to memory as it is, see `_affine`.
    """
    rows = x.reshape(-1, x.shape[-1])
    if turned:
        y = _dot(rows, kernel.astype(x.dtype), ((1,), (1,))) + bias.reshape(1, -1)
    else:
        y = _affine(rows, kernel, bias, written)
    if factors is not None:
        y = y * factors.reshape(1, -1)
    return checkpoint_name(y.astype(dtype or x.dtype).reshape(*x.shape[:-1], -1), PRODUCT)


class Linear(nnx.Module):
    """y = x @ kernel + bias.

    Attributes:
      kernel: float32 [inputs, *outputs]; several output axes make several maps in one product (query, key, value).
      bias: float32 [*outputs].
      turned: the kernel is [outputs, inputs], all outputs on one axis; has no gradient of its own (encoder/layout.py).
    """

    turned = False

    def __init__(self, inputs: int, outputs: int | tuple[int, ...], *, stddev: float, rngs: nnx.Rngs):
        shape = (outputs,) if isinstance(outputs, int) else outputs
        self.kernel = nnx.Param(truncated_normal(rngs, (inputs, *shape), stddev))
        self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(
        self,
        x: Float[Array, "*batch K"],
        *,
        factors: Float[Array, "*M"] | None = None,
        dtype: DTypeLike | None = None,
        written: bool = False,
    ) -> Float[Array, "*batch M"]:
        """Applies the map to the last axis; the others are `affine`'s."""
        kernel, bias = self.kernel[...], self.bias[...]
        kernel = kernel if self.turned else kernel.reshape(kernel.shape[0], -1)
        y = affine(x, kernel, bias.reshape(-1), factors=factors, dtype=dtype, turned=self.turned, written=written)
        return y.reshape(*x.shape[:-1], *bias.shape)
