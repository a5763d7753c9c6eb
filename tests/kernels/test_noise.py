"""Random bits: uniform, and streams that have nothing to do with each other."""

import jax
import numpy as np
import pytest
from scipy import stats

from ctx_jax.kernels import noise

COUNT = 1 << 16


def seeds():
    """Of neighbouring rows, layers and places, as dropout makes them, and two that share a half."""
    keys = [jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), number) for number in range(3)]
    keys.append(jax.random.fold_in(keys[0], 1))
    found = [np.asarray(jax.random.key_data(key)) for key in keys]
    return [*found, np.array([found[0][0], found[1][1]]), np.array([found[1][0], found[0][1]])]


def stream(seed):
    return np.asarray(noise.scramble(noise.places((COUNT,)), *map(np.uint32, seed)))


@pytest.mark.parametrize("number", range(6))
def test_bits_are_uniform(number):
    bits = stream(seeds()[number])
    assert stats.chisquare(np.bincount(bits >> 24, minlength=256)).pvalue > 1e-4
    assert stats.chisquare(np.bincount(bits & 255, minlength=256)).pvalue > 1e-4
    for bit in range(32):
        assert stats.binomtest(int((bits >> np.uint32(bit) & np.uint32(1)).sum()), COUNT).pvalue > 1e-5
    # One after the other, too.
    table = np.histogram2d(bits[:-1] >> 28, bits[1:] >> 28, bins=16)[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-4


@pytest.mark.parametrize("one", range(6))
def test_streams_are_independent_and_no_shifts_of_each_other(one):
    ours = stream(seeds()[one]) < 2**29
    for seed in seeds()[:one]:
        theirs = stream(seed) < 2**29
        for shift in (0, 1, 2, 5, 64, 1000):
            both = int((ours[shift:] & theirs[: COUNT - shift]).sum())
            assert stats.binomtest(both, COUNT - shift, 1 / 64).pvalue > 1e-5


def test_a_row_counts_its_places_along_the_last_axis_first():
    whole = np.asarray(noise.keep(np.array([[3, 4], [5, 6]], np.uint32), (4, 5, 6), 0.3))
    bits = np.asarray(noise.scramble(noise.places((120,)), np.uint32(5), np.uint32(6))).reshape(4, 5, 6)
    np.testing.assert_array_equal(whole[1], bits < noise.threshold(0.3))
    np.testing.assert_array_equal(noise.places((5, 6), (24, 1)), 24 * np.arange(5)[:, None] + np.arange(6))


def test_the_threshold_is_the_rate():
    assert noise.threshold(0.0) == 2**32 - 1
    for rate in (0.1, 0.5, 0.9):
        assert noise.threshold(rate) / 2**32 == pytest.approx(1 - rate, abs=2.0**-32)
