"""Mixes of layers by hand: the formula, its gradients, the norm over a batch, layer dropout, the penalty."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.compiling import quick_jit
from scipy import stats

from ctx_jax.errors import InputError
from ctx_jax.nn.parameters import Bound
from ctx_jax.nn.scalar_mix import ScalarMix

LAYERS, ROWS, STEPS, WIDTH = 3, 2, 4, 5
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


def softmax(s):
    e = np.exp(np.asarray(s, np.float64))
    return e / e.sum()


def layers(seed=0, offset=0.0):
    """Each layer at a place and a size of its own; what is not a token is far off."""
    x = np.random.default_rng(seed).normal(size=(LAYERS, ROWS, STEPS, WIDTH)) * [[[[0.5]]], [[[1]]], [[[3]]]] + offset
    x[:, ~MASK] = 100 * np.random.default_rng(seed + 1).normal(size=(LAYERS, (~MASK).sum(), WIDTH))
    return x.astype(np.float32)


def bound(**options):
    return Bound(lambda rngs: ScalarMix(LAYERS, **options))


def params(s, gamma):
    return {"weights": np.asarray(s, np.float32), "gamma": np.asarray(gamma, np.float32)}


def normalised(x):
    """One mean and one variance a layer, over every value at a token."""
    x = np.asarray(x, np.float64)
    found = np.empty_like(x)
    for layer, values in enumerate(x):
        tokens = np.array([values[b, t] for b, t in np.argwhere(MASK)])
        found[layer] = (values - tokens.mean()) / np.sqrt(((tokens - tokens.mean()) ** 2).mean() + 1e-12)
    return found


def by_hand(x, s, gamma):
    return gamma * sum(weight * layer for weight, layer in zip(softmax(s), np.asarray(x, np.float64), strict=True))


def test_begins_as_the_mean():
    mix = bound()
    first = mix.init(quick_jit(jax.random.key)(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), first) == {
        "weights": ((LAYERS,), "float32"),
        "gamma": ((), "float32"),
    }
    found = quick_jit(lambda p, x: mix(p)(x))(first, layers())
    np.testing.assert_allclose(found, layers().astype(np.float64).mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_equals_the_formula(layer_norm):
    mix = quick_jit(lambda p, x, mask: bound(layer_norm=layer_norm)(p)(x, mask))
    # Of few binary digits, so that 5 more of each is exact.
    s, gamma = [0.25, -1.25, 2.0], -1.7
    x = layers(offset=1.5)
    expected = by_hand(normalised(x) if layer_norm else x, s, gamma)
    found = np.asarray(mix(params(s, gamma), x, MASK))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=0, atol=5e-6)
    # What is no token is a hundred times as large, and mixed all the same.
    np.testing.assert_allclose(found[~MASK], expected[~MASK], rtol=0, atol=1e-4)
    # By the softmax a number added to all is nothing.
    shifted = np.asarray(mix(params(np.add(s, 5), gamma), x, MASK))
    np.testing.assert_allclose(shifted[MASK], found[MASK], rtol=0, atol=5e-6)


def test_the_norm_looks_at_tokens_alone():
    mix = quick_jit(lambda p, x, mask: bound(layer_norm=True)(p)(x, mask))
    p = params([0.3, -1.2, 2.0], 1.3)
    x, other = layers(offset=1.5), layers(offset=1.5)
    other[:, ~MASK] = 7.0
    np.testing.assert_array_equal(np.asarray(mix(p, x, MASK))[MASK], np.asarray(mix(p, other, MASK))[MASK])
    assert np.abs(np.asarray(mix(p, x, np.ones_like(MASK))) - np.asarray(mix(p, x, MASK)))[MASK].max() > 0.1
    # After it each layer has mean 0 and variance 1 over the tokens.
    one = quick_jit(lambda p, x, mask: bound(layer_norm=True)(p)(x, mask))(params([-200.0, 0.0, -200.0], 1.0), x, MASK)
    assert abs(np.asarray(one)[MASK].mean()) < 1e-6
    assert np.asarray(one)[MASK].std() == pytest.approx(1, abs=1e-6)


def test_the_norm_needs_a_mask():
    with pytest.raises(InputError, match="mask: found None"):
        bound(layer_norm=True)(params([0.0] * LAYERS, 1.0))(jnp.asarray(layers()))


def test_published(reference):
    """allennlp's test: scalars 0.1, 0.2, 0.3 and a γ of 0.5."""
    case = json.loads((reference / "elmo_allennlp" / "published_cases.json").read_text())["scalar_mix"]
    e = np.exp(case["scalars"])
    x = layers()
    expected = case["gamma"] * (e[0] * x[0] + e[1] * x[1] + e[2] * x[2]) / e.sum()
    found = quick_jit(lambda p, x: bound()(p)(x))(params(case["scalars"], case["gamma"]), x)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradients_by_finite_differences_of_the_formula(layer_norm):
    x, towards = layers(offset=0.5), np.random.default_rng(3).normal(size=(ROWS, STEPS, WIDTH))
    towards = (towards * MASK[..., None]).astype(np.float32)
    s, gamma, h = np.array([0.3, -1.2, 2.0]), -1.7, 1e-6

    @quick_jit
    @jax.grad
    def gradient(p):
        return (bound(layer_norm=layer_norm)(p)(x, MASK) * towards).sum()

    found = gradient(params(s, gamma))
    base = normalised(x) if layer_norm else x
    loss = lambda s, gamma: (by_hand(base, s, gamma) * towards).sum()
    for layer, unit in enumerate(np.eye(LAYERS)):
        expected = (loss(s + h * unit, gamma) - loss(s - h * unit, gamma)) / (2 * h)
        assert float(found["weights"][layer]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert abs(expected) > 1e-3
    expected = (loss(s, gamma + h) - loss(s, gamma - h)) / (2 * h)
    assert float(found["gamma"]) == pytest.approx(expected, rel=1e-5)


def test_gradient_to_the_layers():
    s, gamma = [0.3, -1.2, 2.0], -1.7
    gradient = quick_jit(jax.grad(lambda x: bound()(params(s, gamma))(x).sum()))(layers())
    expected = gamma * softmax(s)[:, None, None, None]
    np.testing.assert_allclose(gradient, np.broadcast_to(expected, gradient.shape), rtol=1e-6)


def test_bfloat16_layers_are_summed_in_float32():
    """256 and one half, which bfloat16 cannot say in one number."""
    x = jnp.asarray(np.array([256.0, 1.0]).reshape(2, 1, 1, 1), jnp.bfloat16)
    found = quick_jit(lambda x: ScalarMix(2)(x))(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[[128.5]]], rtol=1e-6)


# With unit vectors for layers the mix is the weights.
UNITS = np.eye(LAYERS, dtype=np.float32).reshape(LAYERS, 1, 1, LAYERS)


def weights(rate, keys, s=(0.3, -1.2, 2.0)):
    one = lambda key: bound(dropout_rate=rate)(params(s, 1.0))(jnp.asarray(UNITS), key=key)[0, 0]
    return np.asarray(quick_jit(jax.vmap(one))(keys))


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_layer_dropout_leaves_layers_out_of_the_softmax(rate):
    keys = quick_jit(lambda: jax.random.split(jax.random.key(1), 4000))()
    s = np.array([0.3, -1.2, 2.0])
    found = weights(rate, keys)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    kept = found > 0
    # Of those dropped altogether the weights are even, and so they are all kept.
    even = np.abs(found - 1 / LAYERS).max(1) < 1e-6
    for row, alive, all_dropped in zip(found, kept, even, strict=True):
        if not all_dropped:
            expected = np.where(alive, np.exp(s), 0)
            np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-5)
    dropped = ~kept | even[:, None]
    for layer in range(LAYERS):
        assert stats.binomtest(int(dropped[:, layer].sum()), len(keys), rate).pvalue > 1e-4
    assert stats.binomtest(int(even.sum()), len(keys), rate**LAYERS).pvalue > 1e-4


def test_layer_dropout_is_off_without_a_key_or_rate():
    key = quick_jit(lambda: jax.random.split(jax.random.key(2), 50))()
    expected = softmax([0.3, -1.2, 2.0])
    np.testing.assert_allclose(weights(0.0, key), np.tile(expected, (50, 1)), rtol=1e-6)
    off = quick_jit(lambda x: bound(dropout_rate=0.9)(params([0.3, -1.2, 2.0], 1.0))(x))(UNITS)
    np.testing.assert_allclose(off[0, 0], expected, rtol=1e-6)


def test_penalty_is_bilm_tfs():
    """elmo.py: l2_coef · Σ s², without a half."""
    value = lambda p: bound()(p).penalty(0.25)
    found, gradient = quick_jit(jax.value_and_grad(value))(params([1.0, -2.0, 3.0], 5.0))
    assert float(found) == pytest.approx(0.25 * 14)
    np.testing.assert_allclose(gradient["weights"], [0.5, -1.0, 1.5], rtol=1e-6)
    assert float(gradient["gamma"]) == 0
