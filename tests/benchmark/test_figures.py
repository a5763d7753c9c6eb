"""Statistics of runs against SciPy and by hand."""

import numpy as np
import pytest
from scipy import stats

from ctx_jax.benchmark.figures import relative_difference, summarise
from ctx_jax.errors import InputError


@pytest.mark.parametrize("count", [1, 2, 15, 101])
def test_percentiles(count):
    seconds = np.random.default_rng(count).exponential(size=count)
    found = summarise(seconds.tolist())
    assert found.runs == count
    np.testing.assert_allclose(found.median_s, np.sort(seconds)[[(count - 1) // 2, count // 2]].mean())
    np.testing.assert_allclose(found.spread_s, stats.iqr(seconds))
    for share, value in ((0.95, found.p95_s), (0.99, found.p99_s)):
        np.testing.assert_allclose(value, stats.mstats.mquantiles(seconds, share, alphap=1, betap=1)[0])


def test_no_runs_are_an_error():
    with pytest.raises(InputError, match="found none, expected at least one run"):
        summarise([])


def test_relative_difference():
    expected = np.array([[[1.0, -4.0], [100.0, 0.0]]], np.float32)
    found = expected + np.array([[[0.5, 0.0], [50.0, 0.0]]], np.float32)
    assert relative_difference(found, expected) == 0.5
    # Padding does not count.
    assert relative_difference(found, expected, np.array([[1, 0]])) == 0.125
    assert relative_difference(found[:, :1], expected) == float("inf")
    found[0, 0, 0] = np.nan
    assert relative_difference(found, expected) == float("inf")
