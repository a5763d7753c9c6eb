"""Batches hold every text once, in rows that texts share and leave little free, in shapes of which there are few."""

import itertools

import numpy as np
import pytest

from ctx_jax.encoder.batches import compiled_lengths, compiled_rows, compiled_shapes, plan_batches, slots_per_row


@pytest.mark.parametrize("max_length", [1, 2, 15, 16, 17, 48, 128, 500, 512, 4096])
def test_lengths_go_up_to_the_models_in_small_steps(max_length):
    lengths = compiled_lengths(max_length)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_length
    for shorter, longer in itertools.pairwise(lengths):
        assert longer - shorter <= max(8, shorter / 4 + 1)
    assert len(lengths) <= 8 + 4 * max(np.log2(max_length / 64), 0) + 1


@pytest.mark.parametrize("seed", range(20))
def test_every_text_once_where_no_other_is_in_a_shape_that_is_known(seed):
    rng = np.random.default_rng(seed)
    max_length, tokens, devices = int(rng.integers(1, 600)), int(rng.integers(1, 9000)), int(rng.integers(1, 5))
    lengths = rng.integers(0, max_length + 1, rng.integers(1, 900))
    shapes = set(compiled_shapes(max_length, tokens, devices))
    seen = []
    for batch in plan_batches(lengths, max_length, tokens, devices):
        assert batch.shape in shapes
        assert np.prod(batch.shape) <= devices * max(tokens, batch.shape[1])
        free = np.ones(batch.shape, bool)
        taken = set()
        for text, row, slot, start in zip(batch.texts, batch.rows, batch.slots, batch.starts, strict=True):
            assert 0 <= start <= start + lengths[text] <= batch.shape[1]
            assert 0 <= slot < slots_per_row(batch.shape[1])
            taken.add((row, slot))
            place = free[row, start : start + lengths[text]]
            assert place.all()
            place[:] = False
        assert len(taken) == len(batch.texts) > 0
        seen += batch.texts.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_there_are_few_shapes():
    shapes = compiled_shapes(512, 8192)
    assert len(shapes) == len(set(shapes)) <= 90
    assert len(shapes) == sum(len(compiled_rows(length, 512, 8192)) for length in compiled_lengths(512))
    assert len(compiled_shapes(512)) == 113


@pytest.mark.parametrize(
    ("low", "high", "share"), [(5, 60, 0.98), (20, 500, 0.98), (100, 128, 0.97), (400, 512, 0.9)], ids=str
)
def test_little_is_padding(low, high, share):
    lengths = np.random.default_rng(0).integers(low, high + 1, 3000)
    places = sum(np.prod(batch.shape) for batch in plan_batches(lengths, 512))
    assert lengths.sum() / places > share


@pytest.mark.parametrize("count", range(1, 40))
def test_few_texts_do_not_fill_a_large_batch(count):
    """At most an eighth of the rows is empty, or less than one row; rows of one long text each."""
    batches = list(plan_batches([500] * count, 512))
    rows = sum(batch.shape[0] for batch in batches)
    assert rows <= max(count + 1, 8 / 7 * count)
    assert len(batches) <= 5


@pytest.mark.parametrize(("lengths", "shape"), [([3], (1, 8)), ([12], (1, 16)), ([12, 20], (1, 32)), ([65], (1, 80))])
def test_a_query_has_a_row_of_its_own_length(lengths, shape):
    (batch,) = plan_batches(lengths, 512)
    assert batch.shape == shape


def test_a_model_of_short_rows_has_batches_too():
    assert [batch.shape for batch in plan_batches([16] * 512, 16)] == [(512, 16)]


def test_one_long_text_does_not_lengthen_the_rows_of_the_short_ones():
    batches = list(plan_batches([512] + [10] * 30, 512))
    assert batches[0].shape == (1, 512)
    assert batches[0].texts.tolist() == [0]
    assert {batch.shape[1] for batch in batches[1:]} <= {16, 24, 32, 40, 48, 56, 64}
