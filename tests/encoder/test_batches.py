"""Batches hold every text once, of like length, in shapes of which there are few."""

import itertools

import numpy as np
import pytest

from ctx_jax.encoder.batches import compiled_lengths, compiled_rows, compiled_shapes, plan_batches


@pytest.mark.parametrize("max_length", [1, 2, 15, 16, 17, 48, 128, 500, 512, 4096])
def test_lengths_go_up_to_the_models_in_small_steps(max_length):
    lengths = compiled_lengths(max_length)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_length
    for shorter, longer in itertools.pairwise(lengths):
        assert longer - shorter <= max(8, shorter / 4 + 1)
    assert len(lengths) <= 8 + 4 * max(np.log2(max_length / 64), 0) + 1


@pytest.mark.parametrize("seed", range(20))
def test_every_text_once_in_a_shape_that_is_known(seed):
    rng = np.random.default_rng(seed)
    max_length, tokens = int(rng.integers(1, 600)), int(rng.integers(1, 9000))
    lengths = rng.integers(0, max_length + 1, rng.integers(1, 900))
    shapes = set(compiled_shapes(max_length, tokens))
    seen = []
    for batch in plan_batches(lengths, max_length, tokens):
        assert batch.shape in shapes
        assert 1 <= len(batch.rows) <= batch.shape[0]
        assert lengths[batch.rows].max() <= batch.shape[1]
        assert np.prod(batch.shape) <= max(tokens, batch.shape[1])
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_there_are_few_shapes():
    assert len(compiled_shapes(512, 8192)) == sum(len(compiled_rows(n, 8192)) for n in compiled_lengths(512)) <= 100


@pytest.mark.parametrize(("low", "high", "share"), [(5, 60, 0.85), (20, 500, 0.88), (100, 128, 0.85)])
def test_little_is_padding(low, high, share):
    lengths = np.random.default_rng(0).integers(low, high + 1, 3000)
    places = sum(np.prod(batch.shape) for batch in plan_batches(lengths, 512))
    assert lengths.sum() / places > share


def test_one_long_text_does_not_pad_the_short_ones():
    batches = list(plan_batches([512] + [10] * 30, 512))
    assert [batch.shape[1] for batch in batches] == [512, 16]
    assert len(batches[0].rows) == 1
