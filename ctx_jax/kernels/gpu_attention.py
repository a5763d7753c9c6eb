"""Attention on NVIDIA's GPUs, as two Pallas kernels for Triton: scores never reach the GPU's memory.

What XLA makes of the plain formulas writes scores, weights and noise, T · T for each head, and reads them again;
cuDNN's attention keeps them on the chip but has a dropout of its own, of which no mesh could draw the same. So these:
the forward pass as FlashAttention has it (Dao et al. 2022, algorithm 1), with an online softmax over blocks of keys,
and one kernel for the gradients, which computes the weights again from the sum of exponentials of each query (appendix
B.4): first what a block is as keys and values, then what it is as queries. One program for a head that did both at once
would compute them once, and took longer: its sums for the queries go through memory.

Query, key and value come packed, see `kernels.packed`; heads are read where they lie and written side by side, so that
nothing is transposed. Rows are divided over the mesh's data axes and heads over its tensor axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int, UInt

from ctx_jax.kernels.division import divided, divides
from ctx_jax.kernels.noise import begins, kept, place
from ctx_jax.kernels.packed import Heads

_LOW, _LOWEST_YET = -1e30, -1e20
"""A score that is not allowed, and what the largest begins with: far above it, so that 2^(score - largest) is 0 for
what is not allowed, however the difference is rounded.
"""


class Blocks(NamedTuple):
    """How a kernel cuts the scores of a head.

    Attributes:
      own: tokens that one program works for.
      other: tokens it looks at in a step.
      warps: of a program, 32 threads each.
      stages: blocks that are on their way from memory.
    """

    own: int
    other: int
    warps: int
    stages: int


FORWARD = Blocks(128, 64, 4, 3)
BACKWARD = Blocks(64, 64, 4, 3)
"""The fastest of a few, on an H100 with 64 rows of 512 tokens."""


def fits(rows: Any, length: Any, heads: Heads, dtype: Any) -> bool:
    """Whether the kernels take rows of this shape and type, on the mesh in context."""
    if dtype != jnp.bfloat16 or not isinstance(length, int) or length % 16 or heads.width not in (16, 32, 64, 128):
        return False
    return divides(rows, heads.count // heads.together)


def forward(
    packed: Float[Array, "B T G3C"],
    segment_ids: Int[Array, "B T"],
    seeds: UInt[Array, "B 2"],
    *,
    heads: Heads,
    rate: float,
    interpret: bool = False,
    blocks: Blocks = FORWARD,
) -> tuple[Float[Array, "B T D"], Float[Array, "B H T"]]:
    """softmax(q kᵀ / √K) v among the tokens of a segment, each weight dropped at `rate`; heads side by side.

    Returns:
      The context, and for each query the binary logarithm of its sum of 2^score, which `backward` takes.
    """
    call = functools.partial(_forward, heads=heads, rate=rate, interpret=interpret, blocks=blocks)
    run = divided(call, ["bhx", "bt", "bth"], ["bth", "bht"])
    return run(_seeds(seeds, packed.shape[1], heads), segment_ids, packed)


def backward(
    packed: Float[Array, "B T G3C"],
    segment_ids: Int[Array, "B T"],
    seeds: UInt[Array, "B 2"],
    context: Float[Array, "B T D"],
    sums: Float[Array, "B H T"],
    cotangent: Float[Array, "B T D"],
    *,
    heads: Heads,
    rate: float,
    interpret: bool = False,
    blocks: Blocks = BACKWARD,
) -> Float[Array, "B T G3C"]:
    """The packed array's gradient; `context` and `sums` are what `forward` gave.

    A query without any key, padding, has a context that nobody reads: its cotangent counts as 0.
    """
    call = functools.partial(_backward, heads=heads, rate=rate, interpret=interpret, blocks=blocks)
    run = divided(call, ["bhx", "bt", "bth", "bth", "bht", "bth"], ["bth"])
    return run(_seeds(seeds, packed.shape[1], heads), segment_ids, packed, context, sums, cotangent)


def _seeds(seeds: UInt[Array, "B 2"], length: int, heads: Heads) -> UInt[Array, "B H 4"]:
    """Of each head: its row's seed, and where its noise begins; Triton counts in powers of 2."""
    of = lambda x: jnp.broadcast_to(x, (seeds.shape[0], heads.count))
    own = of(begins(heads.count, length, length)[None, :])
    return jnp.stack([of(seeds[:, :1]), of(seeds[:, 1:]), own, own], axis=-1)


class _Head:
    """What the program for a block of one head's tokens reads.

    Attributes:
      scale: of scores, which are exponents of 2 here.
    """

    def __init__(self, heads: Heads, rate: float, length: int, seeds: Any, segments: Any, packed: Any):
        self.heads, self.rate, self.length = heads, rate, length
        self.scale = heads.width**-0.5 * math.log2(math.e)
        self._number, self._seeds, self._segments, self._packed = pl.program_id(1), seeds, segments, packed

    def columns(self, part: int, parts: int = 3) -> Any:
        """Where a part (0 query, 1 key, 2 value) of the head lies, of so many."""
        group, place = self._number // self.heads.together, self._number % self.heads.together
        return pl.ds((group * parts + part) * self.heads.columns + place * self.heads.width, self.heads.width)

    def vectors(self, rows: Any, part: int) -> Array:
        return self._packed[rows, self.columns(part)]

    def segments(self, rows: Any) -> Array:
        return self._segments[rows]

    def keys(self, rows: Any) -> Array:
        """Segments of keys: padding is in none that a query could be in."""
        found = self._segments[rows]
        return jnp.where(found > 0, found, -1)

    def kept(self, queries: Any, keys: Any, *, turned: bool) -> Array:
        """Where the weights of some queries and keys are kept: the bits of `noise.keep` for the whole row."""
        shape = (keys.size, queries.size) if turned else (queries.size, keys.size)
        of = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        rows, columns = (of(1), of(0)) if turned else (of(0), of(1))
        begin = place(queries.start.astype(jnp.uint32), keys.start.astype(jnp.uint32), self.length) + self._seeds[2]
        return kept(rows, columns, self.length, begin, (self._seeds[0], self._seeds[1]), self.rate)


def _dot(a: Array, b: Array) -> Float[Array, "N M"]:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _block(at_most: int, length: int) -> int:
    """The largest power of 2 that divides the length."""
    return math.gcd(at_most, length)


def _steps(length: int, size: int, body: Any, start: Any) -> Any:
    """Folds `body(rows, state)` over the blocks of a row."""
    return jax.lax.fori_loop(0, length // size, lambda i, state: body(pl.ds(i * size, size), state), start)


def _whole(width: int) -> Callable[[int], pl.BlockSpec]:
    """A row of [B, T, width]."""
    return lambda length: pl.BlockSpec((None, length, width), lambda i, h, b: (b, 0, 0))


def _of_head(width: int | None = None) -> Callable[[int], pl.BlockSpec]:
    """What a head has of [B, H, width], or of [B, H, T]."""
    return lambda length: pl.BlockSpec((None, None, width or length), lambda i, h, b: (b, h, 0))


def _of_row(length: int) -> pl.BlockSpec:
    """A row of [B, T]."""
    return pl.BlockSpec((None, length), lambda i, h, b: (b, 0))


_Operand = tuple[Any, Callable[[int], pl.BlockSpec]]
"""An array, and what a program sees of it when rows have so many tokens."""


def _call(
    kernel: Any,
    name: str,
    grid: tuple[int, int, int],
    inputs: Sequence[_Operand],
    outputs: Sequence[_Operand],
    *,
    flops: int,
    blocks: Blocks,
    interpret: bool,
) -> Any:
    """The kernel on a grid of blocks, heads and rows; `flops` are those of one score."""
    inputs, in_specs = zip(*inputs, strict=True)
    outputs, out_specs = zip(*outputs, strict=True)
    rows, length = inputs[1].shape
    scores = rows * grid[1] * length**2
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec(length) for spec in in_specs],
        out_specs=[spec(length) for spec in out_specs],
        out_shape=list(outputs),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=pl.CostEstimate(
            flops=flops * scores,
            transcendentals=scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)),
        ),
        interpret=interpret,
        name=name,
    )
    return call(*inputs)


def _forward(
    seeds: Array, segment_ids: Array, packed: Array, *, heads: Heads, rate: float, interpret: bool, blocks: Blocks
) -> tuple[Float[Array, "B T D"], Float[Array, "B H T"]]:
    rows, length, columns = packed.shape
    own, other = _block(blocks.own, length), _block(blocks.other, length)

    def kernel(seeds, segments, packed, out, sums):
        head = _Head(heads, rate, length, seeds, segments, packed)
        queries = pl.ds(pl.program_id(0) * own, own)
        query, segment = head.vectors(queries, 0), head.segments(queries)[:, None]
        # A query without any key looks at all alike.
        low = jnp.where(segment == 0, 0.0, _LOW)

        def look(keys: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            context, most, total = state
            scores = jnp.where(segment == head.keys(keys)[None, :], _dot(query, head.vectors(keys, 1).T), low)
            now = jnp.maximum(most, scores.max(1) * head.scale)
            weights, shrink = jnp.exp2(scores * head.scale - now[:, None]), jnp.exp2(most - now)
            total = total * shrink + weights.sum(1)
            if rate:
                weights = jnp.where(head.kept(queries, keys, turned=False), weights, 0.0)
            context = context * shrink[:, None] + _dot(weights.astype(packed.dtype), head.vectors(keys, 2))
            return context, now, total

        start = jnp.zeros((own, heads.width)), jnp.full(own, _LOWEST_YET), jnp.zeros(own)
        context, most, total = _steps(length, other, look, start)
        out[queries, head.columns(0, 1)] = (context * (1.0 / (total * (1.0 - rate)))[:, None]).astype(out.dtype)
        sums[queries] = most + jnp.log2(total)

    count = columns // (3 * heads.width)
    inputs = [(seeds, _of_head(4)), (segment_ids, _of_row), (packed, _whole(columns))]
    outputs = [
        (jax.ShapeDtypeStruct((rows, length, columns // 3), packed.dtype), _whole(columns // 3)),
        (jax.ShapeDtypeStruct((rows, count, length), jnp.float32), _of_head()),
    ]
    grid = length // own, count, rows
    options = {"flops": 4 * heads.width, "blocks": blocks, "interpret": interpret}
    return tuple(_call(kernel, "attention_forward", grid, inputs, outputs, **options))


def _backward(
    seeds: Array,
    segment_ids: Array,
    packed: Array,
    context: Array,
    sums: Array,
    cotangent: Array,
    *,
    heads: Heads,
    rate: float,
    interpret: bool,
    blocks: Blocks,
) -> Float[Array, "B T G3C"]:
    rows, length, columns = packed.shape
    dtype, count = packed.dtype, columns // (3 * heads.width)
    own, other = _block(blocks.own, length), _block(blocks.other, length)
    # Σ weight · dweight of each query, which the softmax's derivative takes off; but for constant factors.
    shares = (context.astype(jnp.float32) * cotangent.astype(jnp.float32)).reshape(rows, length, count, -1)
    shares = shares.sum(-1).swapaxes(1, 2) * (1.0 - rate)
    undropped = 1.0 / (1.0 - rate)
    factor = undropped * heads.width**-0.5

    def kernel(seeds, segments, packed, cotangents, sums, shares, out):
        head = _Head(heads, rate, length, seeds, segments, packed)
        here, own_columns = pl.ds(pl.program_id(0) * own, own), head.columns(0, 1)

        def gradients(scores, allowed, total, dweights, share, kept):
            """Of a block: the weights that were kept, and what the scores get, but for constant factors."""
            weights = jnp.where(allowed, jnp.exp2(scores * head.scale - total), 0.0)
            dropped = weights
            if kept is not None:
                dropped, dweights = jnp.where(kept, weights, 0.0), jnp.where(kept, dweights, 0.0)
            return dropped.astype(dtype), (weights * (dweights - share)).astype(dtype)

        key, value, segment = head.vectors(here, 1), head.vectors(here, 2), head.keys(here)[:, None]

        def as_keys(queries: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            query, dcontext = head.vectors(queries, 0), cotangents[queries, own_columns]
            dropped, dscores = gradients(
                _dot(key, query.T),
                segment == head.segments(queries)[None, :],
                sums[queries][None, :],
                _dot(value, dcontext.T),
                shares[queries][None, :],
                head.kept(queries, here, turned=True) if rate else None,
            )
            return state[0] + _dot(dscores, query), state[1] + _dot(dropped, dcontext)

        zeros = jnp.zeros((own, heads.width))
        dkey, dvalue = _steps(length, other, as_keys, (zeros, zeros))
        out[here, head.columns(1)] = (dkey * factor).astype(dtype)
        out[here, head.columns(2)] = (dvalue * undropped).astype(dtype)

        query, dcontext, segment = head.vectors(here, 0), cotangents[here, own_columns], head.segments(here)[:, None]
        total, share = sums[here][:, None], shares[here][:, None]

        def as_queries(keys: Any, dquery: Array) -> Array:
            key = head.vectors(keys, 1)
            allowed, dweights = segment == head.keys(keys)[None, :], _dot(dcontext, head.vectors(keys, 2).T)
            kept = head.kept(here, keys, turned=False) if rate else None
            return dquery + _dot(gradients(_dot(query, key.T), allowed, total, dweights, share, kept)[1], key)

        out[here, head.columns(0)] = (_steps(length, other, as_queries, zeros) * factor).astype(dtype)

    inputs = [
        (seeds, _of_head(4)),
        (segment_ids, _of_row),
        (packed, _whole(columns)),
        (cotangent, _whole(columns // 3)),
        (sums, _of_head()),
        (shares, _of_head()),
    ]
    outputs = [(jax.ShapeDtypeStruct(packed.shape, dtype), _whole(columns))]
    grid = length // own, count, rows
    options = {"flops": 14 * heads.width, "blocks": blocks, "interpret": interpret}
    return _call(kernel, "attention_backward", grid, inputs, outputs, **options)[0]
