"""LayerNorm(x + dropout(branch)) in training on NVIDIA's GPUs, as two Pallas kernels for Triton.

What XLA makes of it writes the noise and float32 vectors between its passes, and took two to four times the time of
reading and writing each value once on an H100. Here that is all, as in `kernels.tpu_norm`, with the same noise, drawn
again in the backward pass; statistics are float32 and computed again. Gradients of scale and bias are added up over a
program's tokens in registers, and over the programs by XLA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt

from ctx_jax.kernels.division import divided, divides
from ctx_jax.kernels.noise import kept

WIDEST = 8192
"""Of the vectors that a program's threads can hold."""


class Blocks(NamedTuple):
    """How a kernel cuts a row.

    Attributes:
      values: of an array that a thread holds at a time, at most; a power of 2.
      warps: of a program, 32 threads each; more where not even one vector fits.
      tokens: that a program takes, one step after the other.
    """

    values: int
    warps: int
    tokens: int


FORWARD = Blocks(32, 4, 1)
BACKWARD = Blocks(32, 4, 32)


def fits(shape: tuple[Any, ...], dtype: Any) -> bool:
    """Whether the kernels take vectors of this shape, [B, T, D], and type, on the mesh in context."""
    rows, length, width = shape
    if dtype not in (jnp.bfloat16, jnp.float32) or not isinstance(length, int):
        return False
    return width % 32 == 0 and width <= WIDEST and divides(rows)


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
    blocks: Blocks = FORWARD,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The norm, and the sum that it is of."""
    call = functools.partial(_forward, eps=eps, rate=rate, interpret=interpret, blocks=blocks)
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
    blocks: Blocks = BACKWARD,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Float[Array, "D"], Float[Array, "D"]]:
    """Gradients of x, branch, scale and bias; `total` is the sum that `forward` gave."""
    call = functools.partial(_backward, eps=eps, rate=rate, interpret=interpret, blocks=blocks)
    run = divided(call, ["bx", "btd", "d", "btd"], ["btd", "btd", "bxd", "bxd"])
    dx, dbranch, dscale, dbias = run(seeds, total, scale, cotangent)
    return dx, dbranch, dscale.sum((0, 1)), dbias.sum((0, 1))


class _Cut:
    """Grid and blocks of both kernels, for what one device has.

    Triton's arrays have powers of 2 for sizes, so a vector is a list of pieces. Of each a thread has 16 bytes: for 768
    values of bfloat16 a warp takes three pieces of 256, and adds them up without the other warps.

    Attributes:
      step: tokens that a program holds at a time.
      parts: programs of a row.
      pieces: where each begins, and its size.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, blocks: Blocks):
        self.rows, self.length, self.width = shape
        threads = max(32 * blocks.warps, pl.next_power_of_2(self.width) // blocks.values)
        self.warps = threads // 32
        self.step = math.gcd(threads * blocks.values // pl.next_power_of_2(self.width), self.length)
        sizes = range(self.step, max(self.step, blocks.tokens) + 1, self.step)
        self._tokens = max(size for size in sizes if self.length % size == 0)
        self.parts = self.length // self._tokens
        most = threads // self.step * 16 // dtype.itemsize
        whole, rest = divmod(self.width, most)
        sizes = [most] * whole + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
        self.pieces = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
        self.row = pl.BlockSpec((None, self.length, self.width), lambda i, b: (b, 0, 0))
        self.parameter = pl.BlockSpec((self.width,), lambda i, b: (0,))
        self.of_part = pl.BlockSpec((None, None, self.width), lambda i, b: (b, i, 0))
        self.seed = pl.BlockSpec((None, 2), lambda i, b: (b, 0))

    def call(self, kernel: Any, name: str, interpret: bool, inputs: list, outputs: list) -> Any:
        arrays, in_specs = zip(*inputs, strict=True)
        out_shape, out_specs = zip(*outputs, strict=True)
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *out_shape))
        call = pl.pallas_call(
            kernel,
            grid=(self.parts, self.rows),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=1),
            # No matrix products: what counting calls FLOPs of a kernel are those.
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
            interpret=interpret,
            name=name,
        )
        return tuple(call(*arrays))

    def steps(self, body: Any, start: Any) -> Any:
        """Folds `body(tokens, state)` over the tokens of a program."""
        begin = pl.program_id(0) * self._tokens
        count = self._tokens // self.step
        if count == 1:
            return body(pl.ds(begin, self.step), start)
        return jax.lax.fori_loop(0, count, lambda i, state: body(pl.ds(begin + i * self.step, self.step), state), start)

    def vectors(self, array: Any, tokens: Any) -> list[Array]:
        """Some tokens of a row [T, D]."""
        return [array[tokens, columns].astype(jnp.float32) for columns in self.columns()]

    def columns(self) -> Iterator[Any]:
        return (pl.ds(begin, size) for begin, size in self.pieces)

    def write(self, array: Any, tokens: Any, vectors: list[Array]) -> None:
        for columns, piece in zip(self.columns(), vectors, strict=True):
            array[tokens, columns] = piece.astype(array.dtype)

    def along(self, parameter: Any) -> list[Array]:
        """A parameter [D], for each token: read anew, as vectors are, where spreading it would take shared memory."""
        place = lambda size: jax.lax.broadcasted_iota(jnp.int32, (self.step, size), 1)
        return [parameter[place(size) + begin] for begin, size in self.pieces]

    def dropped(self, seed: Any, tokens: Any, vectors: list[Array], rate: float) -> list[Array]:
        """By the bits of `noise.keep` for a row [T, D]."""
        if not rate:
            return vectors

        def one(first: int, values: Array) -> Array:
            of = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
            rows, columns = of(0) + tokens.start.astype(jnp.uint32), of(1) + jnp.uint32(first)
            there = kept(rows, columns, self.width, jnp.uint32(0), (seed[0], seed[1]), rate)
            return jnp.where(there, values * jnp.float32(1.0 / (1.0 - rate)), 0.0)

        return [one(first, values) for (first, _), values in zip(self.pieces, vectors, strict=True)]

    def mean(self, vectors: list[Array]) -> Array:
        alike = {size: [piece for piece in vectors if piece.shape[1] == size] for _, size in self.pieces}
        return sum(sum(pieces).sum(1, keepdims=True) for pieces in alike.values()) * (1.0 / self.width)

    def normal(self, total: list[Array], eps: float) -> tuple[list[Array], Array]:
        """The vectors without scale and bias, and 1 / √(variance + eps)."""
        mean = self.mean(total)
        centred = [piece - mean for piece in total]
        inverse = jax.lax.rsqrt(self.mean([piece * piece for piece in centred]) + eps)
        return [piece * inverse for piece in centred], inverse


def _each(function: Any, *vectors: list[Array]) -> list[Array]:
    """The function of each piece."""
    return [function(*pieces) for pieces in zip(*vectors, strict=True)]


def _forward(
    seeds: Array,
    x: Array,
    branch: Array,
    scale: Array,
    bias: Array,
    *,
    eps: float,
    rate: float,
    interpret: bool,
    blocks: Blocks,
) -> tuple[Array, Array]:
    cut, dtype = _Cut(x.shape, x.dtype, blocks), x.dtype

    def kernel(seed, x, branch, scale, bias, out, total):
        def step(tokens: Any, state: None) -> None:
            given, added = cut.vectors(x, tokens), cut.vectors(branch, tokens)
            added = cut.dropped(seed, tokens, added, rate)
            sums = _each(lambda x, branch: (x + branch).astype(dtype), given, added)
            cut.write(total, tokens, sums)
            normal, _ = cut.normal([piece.astype(jnp.float32) for piece in sums], eps)
            found = _each(lambda normal, scale, bias: normal * scale + bias, normal, cut.along(scale), cut.along(bias))
            cut.write(out, tokens, found)

        cut.steps(step, None)

    like = (jax.ShapeDtypeStruct(x.shape, dtype), cut.row)
    inputs = [(seeds, cut.seed), (x, cut.row), (branch, cut.row), (scale, cut.parameter), (bias, cut.parameter)]
    return cut.call(kernel, "norm_forward", interpret, inputs, [like, like])


def _backward(
    seeds: Array,
    total: Array,
    scale: Array,
    cotangent: Array,
    *,
    eps: float,
    rate: float,
    interpret: bool,
    blocks: Blocks,
) -> tuple[Array, Array, Array, Array]:
    cut, dtype = _Cut(total.shape, total.dtype, blocks), total.dtype

    def kernel(seed, total, scale, cotangent, dx, dbranch, dscale, dbias):
        def step(tokens: Any, state: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
            values, given = cut.vectors(total, tokens), cut.vectors(cotangent, tokens)
            normal, inverse = cut.normal(values, eps)
            dnormal = _each(jnp.multiply, given, cut.along(scale))
            along, across = cut.mean(dnormal), cut.mean(_each(jnp.multiply, dnormal, normal))
            gradient = lambda dnormal, normal: (inverse * (dnormal - along - normal * across)).astype(dtype)
            found = _each(gradient, dnormal, normal)
            cut.write(dx, tokens, found)
            dropped = cut.dropped(seed, tokens, [piece.astype(jnp.float32) for piece in found], rate)
            cut.write(dbranch, tokens, dropped)
            dscale = _each(lambda sum_, given, normal: sum_ + given * normal, state[0], given, normal)
            return dscale, _each(jnp.add, state[1], given)

        zeros = [jnp.zeros((cut.step, size)) for _, size in cut.pieces]
        for array, sums in zip((dscale, dbias), cut.steps(step, (zeros, zeros)), strict=True):
            for columns, piece in zip(cut.columns(), sums, strict=True):
                array[columns] = piece.sum(0)

    like = (jax.ShapeDtypeStruct(total.shape, dtype), cut.row)
    sums = (jax.ShapeDtypeStruct((cut.rows, cut.parts, cut.width), jnp.float32), cut.of_part)
    inputs = [(seeds, cut.seed), (total, cut.row), (scale, cut.parameter), (cotangent, cut.row)]
    return cut.call(kernel, "norm_backward", interpret, inputs, [like, like, sums, sums])
