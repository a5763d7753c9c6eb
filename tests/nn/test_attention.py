"""Attention by hand: the mask, the softmax, and what dropout takes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from oracles.bert import softmax
from oracles.compiling import quick_jit

from ctx_jax.nn.attention import attention_mask, dot_product_attention, segment_mask

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 1, 1, 0, 1, 2, 0]], np.int32)
heads_in_front = quick_jit(dot_product_attention, static_argnames=("rate", "scale"))


def attend(query, key, value, mask, **options):
    """[B, T, H, K] in and out."""
    out = heads_in_front(*(jnp.swapaxes(x, 1, 2) for x in (query, key, value)), mask, **options)
    return jnp.swapaxes(out, 1, 2)


def by_hand(query, key, value, segments, window=np.inf):
    """Query by query, over the keys of its segment within the window alone; NaN at padding."""
    out = np.full(query.shape, np.nan)
    for b, t, h in np.ndindex(query.shape[:3]):
        if segments[b, t]:
            seen = (segments[b] == segments[b, t]) & (np.abs(np.arange(segments.shape[1]) - t) <= window)
            weights = softmax(key[b, seen, h] @ query[b, t, h] / np.sqrt(query.shape[-1]))
            out[b, t, h] = weights @ value[b, seen, h]
    return out


def vectors(scale=1.0):
    return [np.random.default_rng(i).normal(size=(2, 7, 3, 5)).astype(np.float32) * np.float32(scale) for i in range(3)]


def test_mask_lets_a_token_see_its_segment_and_nobody_see_padding():
    mask = np.asarray(quick_jit(segment_mask)(SEGMENTS))
    assert mask.shape == (2, 1, 7, 7)
    for b, i, j in np.ndindex(2, 7, 7):
        assert mask[b, 0, i, j] == (SEGMENTS[b, i] == SEGMENTS[b, j] != 0), (b, i, j)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_the_sum_by_hand(scale):
    """At a scale of 100 scores reach 1e4 and their last digit 1e-3, which the softmax passes on."""
    query, key, value = vectors(scale)
    out = np.asarray(attend(query, key, value, attention_mask(SEGMENTS)))
    assert np.isfinite(out).all()
    expected = by_hand(*(x.astype(np.float64) for x in (query, key, value)), SEGMENTS)
    tokens = SEGMENTS > 0
    np.testing.assert_allclose(out[tokens] / scale, expected[tokens] / scale, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("window", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("length", [1, 7, 12, 19])
def test_local_attention_equals_the_sum_by_hand(window, length):
    """Blocked where three windows are less than the row, whole blocks or not; a plain mask where not."""
    rng = np.random.default_rng(length)
    query, key, value = rng.normal(size=(3, 2, length, 3, 5)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    segments[0, length - length // 4 :] = 0
    mask = quick_jit(attention_mask, static_argnums=1)(segments, window)
    assert mask.allowed.ndim == (5 if 3 * window < length else 4)
    out = np.asarray(attend(query, key, value, mask))
    assert out.shape == query.shape
    expected = by_hand(*(x.astype(np.float64) for x in (query, key, value)), segments, window)
    np.testing.assert_allclose(out[segments > 0], expected[segments > 0], rtol=0, atol=2e-6)


def test_bfloat16_rounds_weights_and_result():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in vectors())
    out = attend(query, key, value, attention_mask(SEGMENTS))
    assert out.dtype == jnp.bfloat16
    expected = by_hand(*(np.asarray(x, np.float64) for x in (query, key, value)), SEGMENTS)
    tokens = SEGMENTS > 0
    # Weights sum to one and are each 2⁻⁸ of themselves off at most, and so is the result.
    bound = 2 * 2.0**-8 * np.abs(np.asarray(value, np.float64)).max()
    np.testing.assert_allclose(np.asarray(out, np.float64)[tokens], expected[tokens], rtol=0, atol=bound)


def test_bfloat16_does_not_round_the_scores():
    """Scores of 64 and 64.25, which are one number in bfloat16."""
    query = jnp.asarray([[8, 1, 0, 0], [0, 0, 0, 0]], jnp.bfloat16)[None, :, None]
    key = jnp.asarray([[16, 0, 0, 0], [16, 0.5, 0, 0]], jnp.bfloat16)[None, :, None]
    value = jnp.asarray([[0, 0, 0, 0], [1, 1, 1, 1]], jnp.bfloat16)[None, :, None]
    out = attend(query, key, value, attention_mask(np.ones((1, 2), np.int32)))
    np.testing.assert_allclose(np.asarray(out[0, 0, 0], np.float64), 1 / (1 + np.exp(-0.25)), rtol=2.0**-8)


def test_dropout_takes_weights():
    """With the identity for values the context is the weights."""
    query, key, _ = vectors()
    value = np.tile(np.eye(7, dtype=np.float32)[None, :, None, :], (2, 1, 3, 1))
    query, key = (np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))) for x in (query, key))
    mask = attention_mask(np.ones((2, 7), np.int32))
    seeds = np.random.default_rng(0).integers(0, 2**32, (2, 2), np.uint32)
    whole = np.asarray(attend(query, key, value, mask))
    some = np.asarray(attend(query, key, value, mask, rate=0.25, seeds=seeds))
    kept = some != 0
    assert 0.6 < kept.mean() < 0.9
    np.testing.assert_allclose(some[kept], whole[kept] / 0.75, rtol=1e-6)
    for axis in (0, 1, 2, 3):
        assert not (kept == kept.take([0], axis)).all(), f"axis {axis} shares its noise"


def test_each_layer_has_a_low_of_its_own():
    mask = attention_mask(SEGMENTS)
    lows = [np.asarray(quick_jit(lambda i: mask.of_layer(i).low)(i)) for i in range(48)]
    assert lows[0] == mask.low == np.finfo(np.float32).min
    assert all(a < b < -3.4e38 for a, b in itertools.pairwise(lows))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_scaled_before_gives_what_scores_scaled_after_give(dtype):
    query, key, value = (jnp.asarray(x, dtype) for x in vectors())
    mask = attention_mask(SEGMENTS)
    scaled = attend(query * jnp.asarray(0.25, dtype), key, value, mask, scale=1.0)
    np.testing.assert_array_equal(scaled, attend(query, key, value, mask, scale=0.25))
