"""Attention in training on TPUs, as two Pallas kernels: the scores of a row never leave the chip's own memory.

What XLA makes of the same formulas writes scores, weights and noise to memory and reads them again: for BERT-base at
512 tokens the TPU compiler's own estimate of a layer's forward and backward pass is 7.1 million cycles for v5e, and 1.3
million for these. One step of the grid takes a block of queries of one or several heads against all keys of the row, so
that the softmax is the plain one, over whole lines; the backward pass computes it again from query and key, and nothing
but the inputs is kept for it. Rows are divided over the mesh's data axes and heads over its tensor axis.

Query, key and value come packed, see `kernels.packed`. A group's columns fill the lanes of a register, so that no head
has to be moved: products run over all of them, with the other heads' columns zero, which costs nothing, for a matrix
unit is no narrower.

The kernels are compiled for TPUs in the tests and run there by Pallas' interpreter; no TPU was at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt

from ctx_jax.kernels.division import divided, divides
from ctx_jax.kernels.noise import begins, kept, place
from ctx_jax.kernels.packed import LANES, Heads

LONGEST = 2048
"""Tokens of the longest row whose scores with a block of queries fit the memory on the chip."""
SCORES = 1 << 18
"""Scores of one head that a step of the grid holds, or of several heads together: a megabyte of float32."""

_LOW = float(np.finfo(np.float32).min)


def fits(rows: Any, length: Any, heads: Heads) -> bool:
    """Whether the kernels take rows of this shape, on the mesh in context."""
    if not isinstance(length, int) or length % LANES or length > LONGEST or heads.columns % LANES:
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
) -> Float[Array, "B T D"]:
    """softmax(q kᵀ / √K) v among the tokens of a segment, each weight dropped at `rate`; heads side by side."""
    call = functools.partial(_forward, heads=heads, rate=rate, interpret=interpret)
    run = divided(call, ["bhx", "bt", "bth"], ["bth"])
    return run(_seeds(seeds, packed.shape[1], heads), segment_ids, packed)


def backward(
    packed: Float[Array, "B T G3C"],
    segment_ids: Int[Array, "B T"],
    seeds: UInt[Array, "B 2"],
    cotangent: Float[Array, "B T D"],
    *,
    heads: Heads,
    rate: float,
    interpret: bool = False,
) -> Float[Array, "B T G3C"]:
    """The packed array's gradient."""
    call = functools.partial(_backward, heads=heads, rate=rate, interpret=interpret)
    run = divided(call, ["bhx", "bt", "bth", "bth"], ["bth"])
    return run(_seeds(seeds, packed.shape[1], heads), segment_ids, packed, cotangent)


def _seeds(seeds: UInt[Array, "B 2"], length: int, heads: Heads) -> UInt[Array, "B H 3"]:
    """Of each head: its row's seed, and where its noise begins."""
    of = lambda x: jnp.broadcast_to(x, (seeds.shape[0], heads.count))
    own = begins(heads.count, length, length)[None, :]
    return jnp.stack([of(seeds[:, :1]), of(seeds[:, 1:]), of(own)], axis=-1)


class _Plan:
    """Grid and blocks of both kernels, for what one device has of a packed array.

    Attributes:
      groups: of heads, in a step.
      queries: in a step.
      whole: whether these are all of the row.
    """

    def __init__(self, shape: tuple[int, ...], heads: Heads):
        self.rows, self.length, columns = shape
        self.heads, self.all_groups = heads, columns // (3 * heads.columns)
        sizes = [size for size in range(LANES, self.length + 1, LANES) if self.length % size == 0]
        self.queries = max(size for size in sizes if size * self.length <= SCORES or size == LANES)
        self.whole = self.queries == self.length
        room = max(SCORES // (self.length**2 * heads.together), 1) if self.whole else 1
        self.groups = max(n for n in range(1, self.all_groups + 1) if self.all_groups % n == 0 and n <= room)
        self.grid = (self.rows, self.all_groups // self.groups, self.length // self.queries)

    def of_queries(self, parts: int) -> pl.BlockSpec:
        """A step's rows of an array with so many parts (query, key, value) a group."""
        shape = (1, self.queries, self.groups * parts * self.heads.columns)
        return pl.BlockSpec(shape, lambda b, g, i, *_: (b, i, g))

    def of_keys(self, parts: int) -> pl.BlockSpec:
        """All rows of the same."""
        shape = (1, self.length, self.groups * parts * self.heads.columns)
        return pl.BlockSpec(shape, lambda b, g, i, *_: (b, 0, g))

    def call(self, kernel: Any, name: str, products: int, inputs: list, outputs: list, interpret: bool) -> Callable:
        """The kernel over the grid; `products` are those of T · T · K that each head takes."""
        segments = [
            pl.BlockSpec((1, self.queries, 1), lambda b, g, i, *_: (b, i, 0)),
            pl.BlockSpec((1, 1, self.length), lambda b, g, i, *_: (b, 0, 0)),
        ]
        scores = self.rows * self.all_groups * self.heads.together * self.length**2
        return pl.pallas_call(
            kernel,
            out_shape=[out for out, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.grid,
                in_specs=[*segments, *inputs],
                out_specs=[spec for _, spec in outputs],
            ),
            # Gradients of keys and values add up over the blocks of queries.
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * scores * self.heads.width,
                transcendentals=scores,
                bytes_accessed=2 * sum(out.size * out.dtype.itemsize for out, _ in outputs),
            ),
            interpret=interpret,
            name=name,
            metadata={"grid_steps": str(int(np.prod(self.grid)))},
        )

    def columns(self, group: int, part: int, parts: int) -> slice:
        """Of a part (0 query, 1 key, 2 value) of a step's group."""
        begin = (group * parts + part) * self.heads.columns
        return slice(begin, begin + self.heads.columns)

    def own(self, vectors: Array, head: int) -> Array:
        """Vectors of a group with the columns of its other heads zero."""
        if self.heads.together == 1:
            return vectors
        lane = jax.lax.broadcasted_iota(jnp.int32, vectors.shape, 1) // self.heads.width
        return jnp.where(lane == head, vectors, jnp.zeros_like(vectors))

    def kept(self, seeds: Any, group: int, head: int, rate: float) -> Array:
        """Where the weights of a head are kept: the bits of `noise.keep` for the whole row."""
        row = pl.program_id(0)
        number = (pl.program_id(1) * self.groups + group) * self.heads.together + head
        begin = seeds[row, number, 2] + place((pl.program_id(2) * self.queries).astype(jnp.uint32), 0, self.length)
        of = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, (self.queries, self.length), axis)
        return kept(of(0), of(1), self.length, begin, (seeds[row, number, 0], seeds[row, number, 1]), rate)

    def exponentials(self, query: Array, key: Array, allowed: Array) -> tuple[Array, Array]:
        """exp(score - the line's largest) and the line's sum, float32; a line without any key is uniform."""
        scores = _dot(query, key, (1, 1)) * jnp.float32(self.heads.width**-0.5)
        scores = jnp.where(allowed, scores, _LOW)
        values = jnp.exp(scores - scores.max(1, keepdims=True))
        return values, values.sum(1, keepdims=True)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _allowed(q_segments: Any, k_segments: Any) -> Array:
    return (q_segments[0] == k_segments[0]) & (k_segments[0] > 0)


def _forward(
    seeds: Array, segment_ids: Array, packed: Array, *, heads: Heads, rate: float, interpret: bool
) -> Float[Array, "B T D"]:
    plan = _Plan(packed.shape, heads)

    def kernel(seeds, q_segments, k_segments, queries, keys, out):
        allowed = _allowed(q_segments, k_segments)
        for group in range(plan.groups):
            query, key, value = (ref[0, :, plan.columns(group, n, 3)] for n, ref in enumerate((queries, keys, keys)))
            context = 0.0
            for head in range(heads.together):
                weights, total = plan.exponentials(query, plan.own(key, head), allowed)
                if rate:
                    weights = jnp.where(plan.kept(seeds, group, head, rate), weights, 0.0)
                    total = total * jnp.float32(1.0 - rate)
                context += _dot(weights.astype(value.dtype), plan.own(value, head), (1, 0)) / total
            out[0, :, plan.columns(group, 0, 1)] = context.astype(out.dtype)

    shape = jax.ShapeDtypeStruct((*packed.shape[:2], packed.shape[2] // 3), packed.dtype)
    inputs, outputs = [plan.of_queries(3), plan.of_keys(3)], [(shape, plan.of_queries(1))]
    call = plan.call(kernel, "attention_forward", 2, inputs, outputs, interpret)
    return call(seeds, segment_ids[:, :, None], segment_ids[:, None, :], packed, packed)[0]


def _backward(
    seeds: Array, segment_ids: Array, packed: Array, cotangent: Array, *, heads: Heads, rate: float, interpret: bool
) -> Float[Array, "B T G3C"]:
    plan, dtype = _Plan(packed.shape, heads), packed.dtype

    def kernel(seeds, q_segments, k_segments, queries, keys, cotangent, *outs):
        allowed = _allowed(q_segments, k_segments)
        if not plan.whole:

            @pl.when(pl.program_id(2) == 0)
            def _():
                for out in outs[1:]:
                    out[...] = jnp.zeros_like(out)

        for group in range(plan.groups):
            query, key, value = (ref[0, :, plan.columns(group, n, 3)] for n, ref in enumerate((queries, keys, keys)))
            here = plan.columns(group, 0, 1)
            dcontext = cotangent[0, :, here]
            found = [0.0, 0.0, 0.0]
            for head in range(heads.together):
                own_key = plan.own(key, head)
                weights, total = plan.exponentials(query, own_key, allowed)
                weights = weights * (1.0 / total)
                dropped = weights
                if rate:
                    kept = plan.kept(seeds, group, head, rate)
                    dropped = jnp.where(kept, weights * jnp.float32(1.0 / (1.0 - rate)), 0.0)
                # Σ dropped · dcontext vᵀ is the softmax's own term: what FlashAttention takes from the output.
                share = dropped * _dot(dcontext, plan.own(value, head), (1, 1))
                dscores = (share - weights * share.sum(1, keepdims=True)) * jnp.float32(heads.width**-0.5)
                dscores = jnp.where(allowed, dscores, 0.0).astype(dtype)
                found[0] += _dot(dscores, own_key, (1, 0))
                found[1] += _dot(dscores, plan.own(query, head), (0, 0))
                found[2] += _dot(dropped.astype(dtype), plan.own(dcontext, head), (0, 0))
            if plan.whole:
                for part, gradient in enumerate(found):
                    outs[0][0, :, plan.columns(group, part, 3)] = gradient.astype(dtype)
            else:
                outs[0][0, :, here] = found[0].astype(dtype)
                for out, gradient in zip(outs[1:], found[1:], strict=True):
                    out[0, :, here] += gradient

    if plan.whole:
        outputs = [(jax.ShapeDtypeStruct(packed.shape, dtype), plan.of_queries(3))]
    else:
        of_keys = (jax.ShapeDtypeStruct(cotangent.shape, jnp.float32), plan.of_keys(1))
        outputs = [(jax.ShapeDtypeStruct(cotangent.shape, dtype), plan.of_queries(1)), of_keys, of_keys]
    inputs = [plan.of_queries(3), plan.of_keys(3), plan.of_queries(1)]
    call = plan.call(kernel, "attention_backward", 5, inputs, outputs, interpret)
    parts = call(seeds, segment_ids[:, :, None], segment_ids[:, None, :], packed, packed, cotangent)
    if plan.whole:
        return parts[0]
    grouped = [part.astype(dtype).reshape(*part.shape[:2], -1, 1, heads.columns) for part in parts]
    return jnp.concatenate(grouped, axis=3).reshape(packed.shape)
