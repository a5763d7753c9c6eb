"""A function of one shape gives what the encoder gives, and never compiles again."""

import jax
import numpy as np
import pytest
from oracles.events import compiled, durations

from ctx_jax import InputError
from ctx_jax.encoder import BertEncoder
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig

CONFIG = BertConfig(
    vocab_size=90, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=24
)


@pytest.fixture(scope="module")
def encoder():
    grow = lambda path, x: x * 8 if path[-1].key in ("kernel", "table") else x
    return BertEncoder(CONFIG, jax.tree_util.tree_map_with_path(grow, bound_model(CONFIG).init(jax.random.key(0))))


def rows(seed, count, length):
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(1, length + 1, (count, 1))).astype(np.int64)
    return rng.integers(0, 90, (count, length)), mask, rng.integers(0, 2, (count, length))


@pytest.mark.parametrize("layers", ["all", "last", [2, 0]], ids=str)
@pytest.mark.parametrize("pool", [None, "mean", "max", "cls"])
def test_it_gives_what_the_encoder_gives(encoder, layers, pool):
    run = encoder.compiled(3, 13, layers=layers, pool=pool)
    for seed in range(3):
        ids, mask, types = rows(seed, 3, 13)
        every = encoder.encode_ids(ids, mask, types)
        numbers = {"all": [0, 1, 2], "last": [2]}.get(str(layers), layers)
        expected = np.stack([every.sentences(pool, layer=layer) if pool else every.layer(layer) for layer in numbers])
        found = run(ids, mask, types)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[0] if layers == "last" else expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(run(ids), run(ids, np.ones_like(mask), np.zeros_like(types)), rtol=0, atol=0)


def test_a_call_traces_and_compiles_nothing(encoder):
    run = encoder.compiled(1, 8, pool="mean")
    run(*rows(9, 1, 8))
    with durations() as events:
        for seed in range(5):
            run(*rows(seed, 1, 8))
        assert not events
        encoder.compiled(1, 9)
    assert compiled(events)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 9), int),), r"input_ids: found int64 \[1, 9\], expected integers \[1, 8\]"),
        (([2, 3],), r"input_ids: found int64 \[2\]"),
        ((np.zeros((1, 8)),), "input_ids: found float64"),
        ((np.zeros((1, 8), int), np.zeros((2, 8), int)), "attention_mask: found"),
        ((np.zeros((1, 8), int), None, np.zeros((1, 7), int)), "token_type_ids: found"),
    ],
)
def test_other_shapes_are_named(encoder, arguments, message):
    run = encoder.compiled(1, 8)
    with pytest.raises(InputError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((0, 8), {}, "rows, length: found 0, 8"),
        ((1, 25), {}, "1 row of 1 to 24 tokens"),
        ((1, 8), {"layers": [3]}, "layers: found 3"),
        ((1, 8), {"pool": "median"}, "pool: found 'median'"),
    ],
)
def test_shapes_that_there_are_not_are_named(encoder, shape, options, message):
    with pytest.raises(InputError, match=message):
        encoder.compiled(*shape, **options)
