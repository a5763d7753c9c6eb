"""LayerNorm against float64, where its mean is large too."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles.bert import layer_norm
from oracles.compiling import quick_jit

from ctx_jax.nn.norm import LayerNorm
from ctx_jax.nn.parameters import Bound

WIDTH = 96
BOUND = Bound(lambda rngs: LayerNorm(WIDTH, eps=1e-12))
apply = quick_jit(lambda params, x: BOUND(params)(x))


def params_and_oracle(seed=0):
    rng = np.random.default_rng(seed)
    scale, bias = rng.normal(1, 0.3, WIDTH), rng.normal(0, 0.3, WIDTH)
    params = {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}
    w = {"n/gamma": params["scale"].astype(np.float64), "n/beta": params["bias"].astype(np.float64)}
    return params, lambda x: layer_norm(w, "n", np.asarray(x, np.float64), 1e-12)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_equals_float64(spread):
    params, oracle = params_and_oracle()
    x = (np.random.default_rng(1).normal(0.5, 1, (5, 7, WIDTH)) * spread).astype(np.float32)
    np.testing.assert_allclose(apply(params, x), oracle(x), rtol=0, atol=2e-6)


def test_a_large_mean_costs_no_more_than_its_last_digits():
    """A float32 near 1e4 has a last digit of 2⁻¹⁰, and a sum of 96 of them rounds the mean a few times by half of it.

    With E[x²] - E[x]² the variance itself is lost: 1e8 has a last digit of 8.
    """
    params = {"scale": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}
    x = np.random.default_rng(2).normal(1e4, 1, (64, WIDTH)).astype(np.float32)
    exact = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(-1, keepdims=True, dtype=np.float64)
    error = np.asarray(apply(params, x), np.float64) - exact
    assert np.abs(error).max() < 4 * 2.0**-10
    # The whole row is shifted by the mean's error, and nothing else is lost.
    assert np.abs(error - error.mean(-1, keepdims=True)).max() < 1e-5
    naive = np.square(x).mean(-1) - np.square(x.mean(-1))
    assert np.abs(naive / x.var(-1, dtype=np.float64) - 1).max() > 0.5


def test_bfloat16_goes_in_and_out_and_is_nothing_between():
    params, oracle = params_and_oracle()
    x = jnp.asarray(np.random.default_rng(3).normal(3, 1, (64, WIDTH)), jnp.bfloat16)
    y = apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), oracle(x), rtol=1.01 * 2.0**-8, atol=2e-6)


def test_eps_is_under_the_root():
    bound = Bound(lambda rngs: LayerNorm(4, eps=1.0))
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    x = np.array([[1, -1, 1, -1]], np.float32)
    np.testing.assert_allclose(quick_jit(lambda p, x: bound(p)(x))(params, x), x / np.sqrt(2), rtol=1e-6)
