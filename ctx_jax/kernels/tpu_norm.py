"""LayerNorm(x + dropout(branch)) in training on TPUs, as two Pallas kernels: each value is read and written once.

XLA makes six to eight passes over the vectors of it, each waiting for a sum over the last axis. For BERT-base at 512
tokens, by the TPU compiler's estimates for v5e, these passes took a fifth of a training step.
The noise is that of `kernels.noise`, drawn again in the backward pass; statistics are float32 and computed again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt

from ctx_jax.kernels.division import divided, divides
from ctx_jax.kernels.noise import kept, place
from ctx_jax.kernels.packed import LANES

VALUES = 1 << 18
"""Of a block: a megabyte of float32."""


def fits(shape: tuple[Any, ...]) -> bool:
    """Whether the kernels take vectors of this shape, [B, T, D], on the mesh in context."""
    rows, length, width = shape
    return isinstance(length, int) and length % LANES == 0 and width % LANES == 0 and divides(rows)


def forward(
    x: Float[Array, "B T D"],
    branch: Float[Array, "B T D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    seeds: UInt[Array, "B 2"],
    *,
    eps: float,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The norm, and the sum that it is of."""
    call = functools.partial(_forward, eps=eps, rate=rate, interpret=interpret)
    return divided(call, ["bx", "btd", "btd", "d", "d"], ["btd", "btd"])(seeds, x, branch, scale, bias)


def backward(
    total: Float[Array, "B T D"],
    scale: Float[Array, "D"],
    seeds: UInt[Array, "B 2"],
    cotangent: Float[Array, "B T D"],
    *,
    eps: float,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Float[Array, "D"], Float[Array, "D"]]:
    """Gradients of x, branch, scale and bias; `total` is the sum that `forward` gave."""
    call = functools.partial(_backward, eps=eps, rate=rate, interpret=interpret)
    run = divided(call, ["bx", "btd", "d", "btd"], ["btd", "btd", "bxd", "bxd"])
    dx, dbranch, dscale, dbias = run(seeds, total, scale, cotangent)
    return dx, dbranch, dscale.sum((0, 1)), dbias.sum((0, 1))


class _Blocks:
    """Grid and blocks of both kernels, for what one device has."""

    def __init__(self, shape: tuple[int, ...]):
        rows, length, width = shape
        sizes = [size for size in range(LANES, length + 1, LANES) if length % size == 0]
        self.tokens = max(size for size in sizes if size * width <= VALUES or size == LANES)
        self.grid = (rows, length // self.tokens)
        self.width = width
        self.vectors = pl.BlockSpec((1, self.tokens, width), lambda b, i, *_: (b, i, 0))
        self.parameter = pl.BlockSpec((1, width), lambda b, i, *_: (0, 0))
        self.of_row = pl.BlockSpec((1, 1, width), lambda b, i, *_: (b, 0, 0))

    def call(self, kernel: Any, name: str, inputs: list, outputs: list, interpret: bool) -> Any:
        steps = self.grid[0] * self.grid[1]
        moved = steps * self.tokens * self.width
        return pl.pallas_call(
            kernel,
            out_shape=[out for out, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=self.grid, in_specs=inputs, out_specs=[spec for _, spec in outputs]
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            # No matrix products: what counting calls FLOPs of a kernel are those.
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=8 * moved),
            interpret=interpret,
            name=name,
            metadata={"grid_steps": str(steps)},
        )

    def kept(self, seeds: Any, rate: float) -> Array:
        """The bits of `noise.keep` for a row [T, D]."""
        row, begin = pl.program_id(0), place((pl.program_id(1) * self.tokens).astype(jnp.uint32), 0, self.width)
        of = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, (self.tokens, self.width), axis)
        return kept(of(0), of(1), self.width, begin, (seeds[row, 0], seeds[row, 1]), rate)

    def dropped(self, seeds: Any, values: Array, rate: float) -> Array:
        if not rate:
            return values
        return jnp.where(self.kept(seeds, rate), values * jnp.float32(1.0 / (1.0 - rate)), 0.0)

    def normal(self, total: Array, eps: float) -> tuple[Array, Array]:
        """The vectors without scale and bias, and 1 / √(variance + eps)."""
        centred = total - total.mean(1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + eps)
        return centred * inverse, inverse


def _forward(
    seeds: Array, x: Array, branch: Array, scale: Array, bias: Array, *, eps: float, rate: float, interpret: bool
) -> tuple[Array, Array]:
    blocks, dtype = _Blocks(x.shape), x.dtype

    def kernel(seeds, x, branch, scale, bias, out, total):
        sum_ = x[0].astype(jnp.float32) + blocks.dropped(seeds, branch[0].astype(jnp.float32), rate)
        total[0] = sum_.astype(dtype)
        normal, _ = blocks.normal(sum_.astype(dtype).astype(jnp.float32), eps)
        out[0] = (normal * scale[...] + bias[...]).astype(dtype)

    like = (jax.ShapeDtypeStruct(x.shape, dtype), blocks.vectors)
    inputs = [blocks.vectors, blocks.vectors, blocks.parameter, blocks.parameter]
    call = blocks.call(kernel, "norm_forward", inputs, [like, like], interpret)
    return tuple(call(seeds, x, branch, scale[None, :], bias[None, :]))


def _backward(
    seeds: Array, total: Array, scale: Array, cotangent: Array, *, eps: float, rate: float, interpret: bool
) -> tuple[Array, Array, Array, Array]:
    blocks, dtype = _Blocks(total.shape), total.dtype

    def kernel(seeds, total, scale, cotangent, dx, dbranch, dscale, dbias):
        normal, inverse = blocks.normal(total[0].astype(jnp.float32), eps)
        given = cotangent[0].astype(jnp.float32)
        dnormal = given * scale[...]
        along, across = dnormal.mean(1, keepdims=True), (dnormal * normal).mean(1, keepdims=True)
        found = (inverse * (dnormal - along - normal * across)).astype(dtype)
        dx[0] = found
        dbranch[0] = blocks.dropped(seeds, found.astype(jnp.float32), rate).astype(dtype)

        @pl.when(pl.program_id(1) == 0)
        def _():
            dscale[...], dbias[...] = jnp.zeros_like(dscale), jnp.zeros_like(dbias)

        dscale[0] += (given * normal).sum(0, keepdims=True)
        dbias[0] += given.sum(0, keepdims=True)

    like = (jax.ShapeDtypeStruct(total.shape, dtype), blocks.vectors)
    sums = (jax.ShapeDtypeStruct((total.shape[0], 1, total.shape[2]), jnp.float32), blocks.of_row)
    inputs = [blocks.vectors, blocks.parameter, blocks.vectors]
    call = blocks.call(kernel, "norm_backward", inputs, [like, like, sums, sums], interpret)
    return tuple(call(seeds, total, scale[None, :], cotangent))
