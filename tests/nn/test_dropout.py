"""Dropout: how much, how scaled, and whose noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.compiling import quick_jit
from scipy import stats

from ctx_jax.nn.dropout import dropout, fold

apply = quick_jit(dropout, static_argnums=1)
split = quick_jit(lambda seed: jax.random.split(jax.random.key(seed), 8))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drops_at_its_rate_and_scales_the_rest(rate):
    x = np.random.default_rng(0).uniform(1, 2, (8, 100, 50)).astype(np.float32)
    y = np.asarray(apply(x, rate, split(1)))
    dropped = y == 0
    for part in (dropped, *dropped):
        assert stats.binomtest(int(part.sum()), part.size, rate).pvalue > 1e-4
    np.testing.assert_allclose(y[~dropped], x[~dropped] / (1 - rate), rtol=3e-7)
    # Neighbours do not go together.
    left, right = dropped[..., :-1], dropped[..., 1:]
    table = [[(left & right).sum(), (left & ~right).sum()], [(~left & right).sum(), (~left & ~right).sum()]]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_off_without_keys_or_rate():
    x = np.ones((8, 4), np.float32)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, split(0)) is x
    assert fold(None, 3) is None


def test_noise_belongs_to_the_rows_key():
    x, keys = np.ones((8, 1000), np.float32), split(2)
    order = np.array([3, 1, 4, 1, 5, 0, 2, 6])
    y, moved = np.asarray(apply(x, 0.3, keys)), np.asarray(apply(x, 0.3, keys[order]))
    np.testing.assert_array_equal(moved, y[order])
    np.testing.assert_array_equal(np.asarray(apply(x[:3], 0.3, keys[:3])), y[:3])
    agree = (y[:, None] == y[None]).mean(-1)[~np.eye(8, dtype=bool)]
    # Two rows of independent noise agree in 0.7² + 0.3² of the places.
    assert np.abs(agree - 0.58).max() < 0.08


def test_folded_streams_differ_from_each_other_and_from_row_to_row():
    keys = split(3)
    data = [np.asarray(jax.random.key_data(fold(keys, number))) for number in range(5)]
    assert len({tuple(row) for rows in (np.asarray(jax.random.key_data(keys)), *data) for row in rows}) == 6 * 8


def test_bfloat16_stays_bfloat16():
    x = jnp.ones((8, 50), jnp.bfloat16)
    y = apply(x, 0.1, split(4))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.unique(np.asarray(y, np.float64)), [0, 1 / 0.9], rtol=2.0**-8)
