"""Multi-head self-attention over rows that may hold several examples (Vaswani et al. 2017, section 3.2).

Attention is to the whole example, or local: to the tokens at most `window` away (Beltagy et al. 2020, section 3.1).
Local attention cuts a row into blocks of `window` queries, and each block looks at three blocks of keys, its own and
its neighbours: 3 · window scores a token instead of T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from ctx_jax.kernels.noise import keep
from ctx_jax.kernels.packed import Heads, heads_of
from ctx_jax.nn.dropout import seeds_of
from ctx_jax.nn.linear import PRODUCT, Linear, affine

_LOWS = (np.float32(np.finfo(np.float32).min).view(np.int32) - np.arange(256, dtype=np.int32)).view(np.float32)
"""The lowest float32 and those above it; layers beyond share the last one."""


class Mask(NamedTuple):
    """Who may look at whom.

    Attributes:
      segment_ids: the example of its row that a token belongs to, 0 at padding; None where a window narrows it.
      allowed: [B, 1, T, T], True where the query may look at the key; for local attention in N blocks
        [B, 1, N, W, 3 W], within the window.
      low: the score of what is not allowed, below all others.
    """

    segment_ids: Int[Array, "B T"] | None
    allowed: Bool[Array, "..."]
    low: float | Float[Array, ""] = float(np.finfo(np.float32).min)

    def of_layer(self, index: Int[Array, ""]) -> Mask:
        """The same with a `low` of the layer's own, the index-th float32 above the lowest.

        On a processor XLA makes one kernel of scores, softmax and context, the mask with them, but not where layers
        that are written out share it: that would be laid out for each head, as large as the scores.
        """
        # Looked up: ONNX, which models are exported to, has no word for a float made of its bits.
        return self._replace(low=jax.lax.dynamic_index_in_dim(jnp.asarray(_LOWS), index, keepdims=False))


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """True where query and key belong to the same example of their row; padding (0) is nobody's key."""
    queries, keys = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
    return (queries == keys) & (keys > 0)


def is_blocked(length: int, window: int | None) -> bool:
    """Whether blocks of three windows save anything over whole rows; of a symbolic length, they may."""
    return window is not None and (not isinstance(length, int) or 3 * window < length)


def attention_mask(segment_ids: Int[Array, "B T"], window: int | None = None) -> Mask:
    """What `dot_product_attention` takes, for whole examples or a window."""
    return Mask(None if window else segment_ids, _allowed(segment_ids, window))


def _allowed(segment_ids: Int[Array, "B T"], window: int | None) -> Bool[Array, "..."]:
    if window is None:
        return segment_mask(segment_ids)
    length = segment_ids.shape[1]
    if not is_blocked(length, window):
        place = jax.lax.broadcasted_iota(jnp.int32, (1, 1, length, length), 2)
        near = jnp.abs(place - jax.lax.broadcasted_iota(jnp.int32, (1, 1, length, length), 3)) <= window
        return segment_mask(segment_ids) & near
    blocks = _blocks(segment_ids[:, None, :, None], window)
    queries, keys = blocks, jnp.swapaxes(_with_neighbours(blocks), -1, -2)
    shape = (1, 1, 1, window, 3 * window)
    distance = jax.lax.broadcasted_iota(jnp.int32, shape, 4) - window - jax.lax.broadcasted_iota(jnp.int32, shape, 3)
    return (queries == keys) & (keys > 0) & (jnp.abs(distance) <= window)


class How(NamedTuple):
    """What is known of attention when it is compiled: the share of weights that is dropped, and the scores' factor."""

    rate: float
    scale: float


def _blocks(x: Array, window: int) -> Array:
    """[…, T, K] → […, N, W, K], filled up with zeros."""
    *front, length, width = x.shape
    count = (length + window - 1) // window  # named, not -1: the length may be symbolic
    x = jnp.pad(x, [(0, 0)] * len(front) + [(0, count * window - length), (0, 0)])
    return x.reshape(*front, count, window, width)


def _with_neighbours(blocks: Array) -> Array:
    """[…, N, W, K] → […, N, 3 W, K]: each block between the one before and the one after it; zeros beyond the ends."""
    padded = jnp.pad(blocks, [(0, 0)] * (blocks.ndim - 3) + [(1, 1), (0, 0), (0, 0)])
    return jnp.concatenate([padded[..., :-2, :, :], blocks, padded[..., 2:, :, :]], axis=-2)


def _weights(
    how: How, query: Array, key: Array, mask: Mask, seeds: UInt[Array, "B 2"] | None
) -> tuple[Float[Array, "..."], Float[Array, "..."], Bool[Array, "..."] | None]:
    """The softmax in float32; the weights in the operands' type, some dropped; where they were kept."""
    with jax.named_scope("scores"):
        scores = jnp.einsum("...qk,...tk->...qt", query, key, preferred_element_type=jnp.float32)
        if how.scale != 1.0:
            scores = scores * jnp.float32(how.scale)
    with jax.named_scope("softmax"):
        # A query without any key (padding) gets a uniform row, not NaN; nobody reads it. XLA's kernel takes a minimum,
        # and no choice between two numbers.
        scores = jnp.minimum(scores, jnp.where(mask.allowed, jnp.inf, mask.low))
        softmax = jax.nn.softmax(scores, axis=-1)
    weights = softmax.astype(query.dtype)
    if not how.rate:
        return softmax, weights, None
    kept = keep(seeds, weights.shape[1:], how.rate)
    dropped = jnp.where(kept, weights / jnp.asarray(1.0 - how.rate, weights.dtype), jnp.zeros((), weights.dtype))
    return softmax, dropped, kept


def _windowed(query: Array, key: Array, value: Array, mask: Mask) -> tuple[Array, Array, Array]:
    """In blocks where the mask is."""
    if mask.allowed.ndim == 4:
        return query, key, value
    window = mask.allowed.shape[3]
    return _blocks(query, window), *(_with_neighbours(_blocks(x, window)) for x in (key, value))


def dot_product_attention(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T K"],
    mask: Mask,
    *,
    rate: float = 0.0,
    seeds: UInt[Array, "B 2"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B H T K"]:
    """softmax(scale · q kᵀ) v; products summed and softmax taken in float32, whatever the type of the operands.

    For a gradient only the inputs are kept, and the weights are computed again (Dao et al. 2022, section 3.1).

    Args:
      query: of each head and token.
      key: likewise.
      value: likewise.
      mask: as `attention_mask` makes it; a blocked one makes the computation blocked.
      rate: share of the weights that is dropped.
      seeds: of the rows' noise, see `kernels.noise`; not read at a rate of 0.
      scale: None is 1 / √K.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend(How(rate, scale), query, key, value, mask, seeds)


def _attend_plainly(
    how: How, query: Array, key: Array, value: Array, mask: Mask, seeds: UInt[Array, "B 2"] | None
) -> Float[Array, "B H T K"]:
    shape = query.shape
    query, key, value = _windowed(query, key, value, mask)
    _, weights, _ = _weights(how, query, key, mask, seeds)
    with jax.named_scope("context"):
        context = jnp.einsum("...qt,...tk->...qk", weights, value, preferred_element_type=jnp.float32)
    return context.astype(value.dtype).reshape(*shape[:2], -1, shape[-1])[:, :, : shape[2]]


def _gradients(
    how: How, residuals: tuple[Array, Array, Array, Mask, Array | None], cotangent: Float[Array, "B H T K"]
) -> tuple[Array, Array, Array]:
    """Of query, key and value; the weights are computed again, and products have operands of the inputs' type."""
    query, key, value, mask, seeds = residuals
    dtype = query.dtype
    (query, key, value), cut = jax.vjp(lambda *qkv: _windowed(*qkv, mask), query, key, value)
    cotangent = cotangent if mask.allowed.ndim == 4 else _blocks(cotangent, mask.allowed.shape[3])
    dot = lambda how, a, b: jnp.einsum(how, a, b, preferred_element_type=jnp.float32)
    softmax, weights, kept = _weights(how, query, key, mask, seeds)
    with jax.named_scope("context"):
        dvalue = dot("...qt,...qk->...tk", weights, cotangent)
        dweights = dot("...qk,...tk->...qt", cotangent, value)
    with jax.named_scope("softmax"):
        dsoftmax = dweights if kept is None else jnp.where(kept, dweights / jnp.float32(1.0 - how.rate), 0.0)
        share = softmax * dsoftmax
        dscores = share - softmax * share.sum(-1, keepdims=True)
        dscores = jnp.where(mask.allowed, dscores, 0.0) * jnp.float32(how.scale)
        dscores = dscores.astype(dtype)
    with jax.named_scope("scores"):
        dquery, dkey = dot("...qt,...tk->...qk", dscores, key), dot("...qt,...qk->...tk", dscores, query)
    return cut(tuple(x.astype(dtype) for x in (dquery, dkey, dvalue)))


_attend = partial(jax.custom_vjp, nondiff_argnums=(0,))(_attend_plainly)
_attend.defvjp(
    lambda how, *inputs: (_attend_plainly(how, *inputs), inputs),
    lambda how, residuals, cotangent: (*_gradients(how, residuals, cotangent), None, None),
)


def _unpack(packed: Float[Array, "B T G3C"], heads: Heads) -> tuple[Array, Array, Array]:
    """Query, key and value, heads in front: [B, H, T, K] each."""
    rows, length, _ = packed.shape
    parts = packed.reshape(rows, length, -1, 3, heads.together, heads.width).transpose(3, 0, 2, 4, 1, 5)
    return tuple(parts.reshape(3, rows, heads.count, length, heads.width))


def _side_by_side(x: Float[Array, "B H T K"]) -> Float[Array, "B T D"]:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _packed_attention(
    heads: Heads, rate: float, packed: Float[Array, "B T G3C"], mask: Mask, seeds: UInt[Array, "B 2"]
) -> Float[Array, "B T D"]:
    """`dot_product_attention` of query, key and value packed as `kernels.tpu_attention` says, heads side by side.

    For a gradient the packed array is kept, and the context, which what follows keeps anyway. On TPUs and GPUs kernels
    compute it, with the same noise.
    """
    return _attended(heads, rate, packed, mask, seeds)[0]


def _plainly_packed(
    heads: Heads, rate: float, packed: Float[Array, "B T G3C"], mask: Mask, seeds: UInt[Array, "B 2"]
) -> Float[Array, "B T D"]:
    return _side_by_side(_attend_plainly(How(rate, heads.width**-0.5), *_unpack(packed, heads), mask, seeds))


packed_attention = partial(jax.custom_vjp, nondiff_argnums=(0, 1))(_packed_attention)


def _kernels() -> tuple[ModuleType, ModuleType]:
    """Imported by who has a use for them: Pallas takes its time."""
    from ctx_jax.kernels import gpu_attention, tpu_attention

    return tpu_attention, gpu_attention


def _attended(
    heads: Heads, rate: float, packed: Float[Array, "B T G3C"], mask: Mask, seeds: UInt[Array, "B 2"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B H T"]]:
    """The context, and what the GPU's gradient wants to know of each query; zeros elsewhere."""
    tpu, gpu = _kernels()
    unasked = lambda packed: jnp.zeros((packed.shape[0], heads.count, packed.shape[1]))

    def plain(packed, mask, seeds):
        return _plainly_packed(heads, rate, packed, mask, seeds), unasked(packed)

    def on_tpu(packed, mask, seeds):
        return tpu.forward(packed, mask.segment_ids, seeds, heads=heads, rate=rate), unasked(packed)

    def on_gpu(packed, mask, seeds):
        return gpu.forward(packed, mask.segment_ids, seeds, heads=heads, rate=rate)

    return _on_device(heads, packed, mask, seeds, tpu=on_tpu, cuda=on_gpu, default=plain)


def _packed_forward(heads, rate, packed, mask, seeds):
    context, sums = _attended(heads, rate, packed, mask, seeds)
    # Named here: outside, a copy of the context would be kept for the gradient of what follows.
    context, sums = checkpoint_name(context, PRODUCT), checkpoint_name(sums, PRODUCT)
    return context, (packed, mask, seeds, context, sums)


def _packed_backward(heads, rate, residuals, cotangent):
    tpu, gpu = _kernels()

    def plain(packed, mask, seeds, context, sums, cotangent):
        parts, pack = jax.vjp(lambda packed: _unpack(packed, heads), packed)
        cotangent = cotangent.reshape(*cotangent.shape[:2], heads.count, heads.width).transpose(0, 2, 1, 3)
        return pack(_gradients(How(rate, heads.width**-0.5), (*parts, mask, seeds), cotangent))[0]

    def on_tpu(packed, mask, seeds, context, sums, cotangent):
        return tpu.backward(packed, mask.segment_ids, seeds, cotangent, heads=heads, rate=rate)

    def on_gpu(packed, mask, seeds, context, sums, cotangent):
        return gpu.backward(packed, mask.segment_ids, seeds, context, sums, cotangent, heads=heads, rate=rate)

    return _on_device(heads, *residuals, cotangent, tpu=on_tpu, cuda=on_gpu, default=plain), None, None


def _on_device(heads: Heads, packed: Array, mask: Mask, *others: Array, default: Callable, **kernels: Callable) -> Any:
    """The program for the device that it is compiled for, of those whose kernels take such rows."""
    tpu, gpu = _kernels()
    fitting = {}
    if mask.segment_ids is not None and tpu.fits(*packed.shape[:2], heads):
        fitting["tpu"] = kernels["tpu"]
    if mask.segment_ids is not None and gpu.fits(*packed.shape[:2], heads, packed.dtype):
        fitting["cuda"] = kernels["cuda"]
    if not fitting:
        return default(packed, mask, *others)
    with jax.named_scope("attention"):
        return jax.lax.platform_dependent(packed, mask, *others, **fitting, default=default)


packed_attention.defvjp(_packed_forward, _packed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gpu_attention(heads: Heads, packed: Float[Array, "B T G3C"], mask: Mask) -> Float[Array, "B T D"]:
    """`packed_attention` without dropout by the GPU's kernels alone: where no other device asks, none is traced."""
    return _gpu_forward(heads, packed, mask)[0]


def _gpu_forward(heads, packed, mask):
    none = jnp.zeros((packed.shape[0], 2), jnp.uint32)
    context, sums = _kernels()[1].forward(packed, mask.segment_ids, none, heads=heads, rate=0.0)
    return context, (packed, mask, none, context, sums)


def _gpu_backward(heads, residuals, cotangent):
    packed, mask, *others = residuals
    return _kernels()[1].backward(packed, mask.segment_ids, *others, cotangent, heads=heads, rate=0.0), None


_gpu_attention.defvjp(_gpu_forward, _gpu_backward)


class SelfAttention(nnx.Module):
    """Query, key and value in one product, attention, and the output projection.

    Attributes:
      qkv: Linear D → [3, D]; of the last axis each head takes a run of D / H.
      out: Linear D → D.
    """

    def __init__(self, width: int, num_heads: int, *, dropout_rate: float, stddev: float, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.qkv = Linear(width, (3, width), stddev=stddev, rngs=rngs)
        self.out = Linear(width, width, stddev=stddev, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Mask, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attends as `attention_mask` says; `keys` are the rows' dropout keys, None outside training."""
        if keys is None:
            heads = Heads(self.num_heads, x.shape[-1] // self.num_heads, self.num_heads)
            fits = x.dtype == jnp.bfloat16 and mask.segment_ids is not None
            if fits and _kernels()[1].fits(*x.shape[:2], heads, x.dtype):
                by_kernel = partial(self._by_kernel, heads)
                context = jax.lax.platform_dependent(x, mask, cuda=by_kernel, default=self._plainly)
            else:
                context = self._plainly(x, mask)
        else:
            context = self._in_training(x, mask, keys)
        with jax.named_scope("projections"):
            return self.out(context)

    def _plainly(self, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        """The context."""
        batch, length, width = x.shape
        size = width // self.num_heads
        with jax.named_scope("projections"):
            # The scores' factor, before the query is rounded: by attention's kernel, which does it as it reads.
            factors = np.ones((3, width), np.float32) * np.array([[size**-0.5], [1.0], [1.0]], np.float32)
            qkv = self.qkv(x, factors=factors, dtype=np.float32).reshape(batch, length, 3, self.num_heads, size)
        with jax.named_scope("transposes"):
            # Heads in front, all three at once: cut out one by one, attention in bfloat16 takes up to 1.6 times as long
            # on the CPU; and einsums without transposes take 5 to 10 % more in float32.
            query, key, value = (part.astype(x.dtype) for part in qkv.transpose(2, 0, 3, 1, 4))
        context = dot_product_attention(query, key, value, mask, scale=1.0)
        with jax.named_scope("transposes"):
            return checkpoint_name(_side_by_side(context), PRODUCT)

    def _by_kernel(self, heads: Heads, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        """The context; query, key and value are one group as they lie."""
        with jax.named_scope("projections"):
            packed = self.qkv(x, written=True).reshape(*x.shape[:2], -1)
        with jax.named_scope("attention"):
            return _gpu_attention(heads, packed, mask)

    def _in_training(self, x: Float[Array, "B T D"], mask: Mask, keys: Key[Array, "B"]) -> Float[Array, "B T D"]:
        """The context; query, key and value are packed by moving the kernel's columns, not the vectors."""
        heads = heads_of(self.num_heads, x.shape[-1] // self.num_heads)

        def packed(parameter: Float[Array, "*K 3 D"]) -> Float[Array, "*K G3C"]:
            groups = parameter.reshape(*parameter.shape[:-1], -1, heads.columns)
            return jnp.swapaxes(groups, -3, -2).reshape(*parameter.shape[:-2], -1)

        with jax.named_scope("projections"):
            qkv = affine(x, packed(self.qkv.kernel[...]), packed(self.qkv.bias[...]))
        return packed_attention(heads, self.dropout_rate, qkv, mask, seeds_of(keys))
