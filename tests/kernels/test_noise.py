"""Random bits: uniform, and streams that have nothing to do with each other."""

import jax
import jax.numpy as jnp
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


def matrix(seed):
    """16 bits for each place."""
    rows, columns = (np.arange(size, dtype=np.uint32) for size in (256, COUNT // 256))
    bits = noise.scramble(noise.place(rows[:, None], columns[None, :], len(columns)), *map(np.uint32, seed))
    return np.asarray(noise.share(bits, rows[:, None])) >> 16


def stream(seed):
    return matrix(seed).ravel()


@pytest.mark.parametrize("number", range(6))
def test_bits_are_uniform(number):
    bits = stream(seeds()[number])
    assert stats.chisquare(np.bincount(bits >> 8, minlength=256)).pvalue > 1e-4
    assert stats.chisquare(np.bincount(bits & 255, minlength=256)).pvalue > 1e-4
    for bit in range(16):
        assert stats.binomtest(int((bits >> bit & 1).sum()), COUNT).pvalue > 1e-5
    # One after the other, too.
    table = np.histogram2d(bits[:-1] >> 12, bits[1:] >> 12, bins=16)[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-4


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("down", [0, 1, 2, 7, 8, 9, 16, 64])
def test_places_near_each_other_are_independent(number, down):
    """Those that share a draw, 8 rows apart, like the others; and at the distances at which multiples of the golden
    ratio come near each other, Fibonacci's numbers.
    """
    bits = matrix(seeds()[number])
    for along in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144):
        if not down and not along:
            continue
        one, other = bits[down:, along:], bits[: 256 - down, : 256 - along]
        table = np.histogram2d((one >> 12).ravel(), (other >> 12).ravel(), bins=16)[0]
        assert stats.chisquare(table.ravel()).pvalue > 1e-6, along


@pytest.mark.parametrize("one", range(6))
def test_streams_are_independent_and_no_shifts_of_each_other(one):
    ours = stream(seeds()[one]) < 2**13
    for seed in seeds()[:one]:
        theirs = stream(seed) < 2**13
        for shift in (0, 1, 2, 5, 64, 1000):
            both = int((ours[shift:] & theirs[: COUNT - shift]).sum())
            assert stats.binomtest(both, COUNT - shift, 1 / 64).pvalue > 1e-5


def by_hand(seed, shape, rate):
    """Place by place, in Python's integers."""
    first, second = (int(half) for half in seed)
    found = np.zeros(shape, bool)
    *front, height, width = shape
    per_matrix = (height + 15) // 16 * 8 * width
    for place in np.ndindex(shape):
        *lead, row, column = place
        index = int(np.ravel_multi_index(lead, front)) if front else 0
        draw = index * per_matrix + (row // 16 * 8 + row % 8) * width + column
        x = (draw * 0x9E3779B9 + first) % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15 ^ second) * 0x846CA68B % 2**32
        found[place] = (x >> 16 if row // 8 % 2 == 0 else x % 2**16 ^ x >> 16) < round((1 - rate) * 2**16)
    return found


@pytest.mark.parametrize("shape", [(4, 5, 6), (33, 3), (2, 2, 16, 5)])
def test_what_is_kept(shape):
    given = np.array([[3, 4], [2**32 - 5, 2**31 + 6]], np.uint32)
    whole = np.asarray(noise.keep(given, shape, 0.3))
    np.testing.assert_array_equal(whole, [by_hand(seed, shape, 0.3) for seed in given])


def test_a_vector_is_a_matrix_of_one_row():
    given = np.array([[3, 4]], np.uint32)
    np.testing.assert_array_equal(noise.keep(given, (50,), 0.3)[0], noise.keep(given, (1, 50), 0.3)[0, 0])


def test_rows_may_be_counted_from_within():
    """From a multiple of 16, as kernels do that see a part of the matrix."""
    rows, columns = np.arange(48, dtype=np.uint32)[:, None], np.arange(20, dtype=np.uint32)[None, :]
    whole = np.asarray(noise.kept(rows, columns, 20, np.uint32(7), (np.uint32(3), np.uint32(4)), 0.5))
    begin = noise.place(jnp.uint32(32), jnp.uint32(4), 20) + np.uint32(7)
    part = noise.kept(rows[:16], columns[:, :16], 20, begin, (np.uint32(3), np.uint32(4)), 0.5)
    np.testing.assert_array_equal(part, whole[32:, 4:])


def test_the_threshold_is_the_rate():
    assert noise.threshold(0.0) == (2**16 - 1) << 16
    for rate in (0.1, 0.5, 0.9):
        assert noise.threshold(rate) / 2**32 == pytest.approx(1 - rate, abs=2.0**-17)
