"""ELMo's formulas against the walk of its jaxpr, against XLA, and against a sum written out by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from ctx_jax.flops.architectures import count_encoder, encoder_cost, encoder_function
from ctx_jax.flops.jaxpr import count
from ctx_jax.flops.xla import xla_flops
from ctx_jax.models.elmo import Elmo, ElmoConfig
from ctx_jax.nn.parameters import Bound, count_parameters

ORIGINAL = ElmoConfig()


def random_config(rng):
    widths = rng.choice(np.arange(1, 8), int(rng.integers(1, 4)), replace=False)
    return ElmoConfig(
        filters=tuple((int(w), int(rng.integers(1, 9))) for w in widths),
        character_dim=int(rng.integers(1, 6)),
        max_characters=int(rng.integers(8, 14)),
        num_highway=int(rng.integers(0, 3)),
        activation=str(rng.choice(["relu", "tanh"])),
        lstm_dim=int(rng.integers(1, 12)),
        projection_dim=int(rng.integers(1, 9)),
        num_layers=int(rng.integers(1, 4)),
        cell_clip=None if rng.integers(2) else 3.0,
        projection_clip=None if rng.integers(2) else 3.0,
        skip_connections=bool(rng.integers(2)),
        dtype=str(rng.choice(["float32", "bfloat16"])),
    )


@pytest.mark.parametrize("seed", range(10))
def test_formula_equals_the_walk_to_the_last_flop(seed):
    rng = np.random.default_rng(seed)
    config, rows, length = random_config(rng), int(rng.integers(1, 5)), int(rng.integers(1, 30))
    cost = encoder_cost(config, rows=rows, length=length)
    function, args = encoder_function(config, rows=rows, length=length)
    walk = count(function, *args)
    assert walk.matrix == cost.matrix_flops
    assert walk.flops - walk.matrix == cost.other_flops
    assert cost.parameters == count_parameters(Bound(lambda rngs: Elmo(config, rngs=rngs)).shapes)


def test_the_original_by_hand():
    a_word = 0
    for width, filters in ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)):
        for _place in range(50 - width + 1):
            a_word += 2 * width * 16 * filters
    for _layer in range(2):
        a_word += 2 * 2048 * 2 * 2048
    a_word += 2 * 2048 * 512
    for _direction in range(2):
        for _layer in range(2):
            a_word += 2 * (512 + 512) * 4 * 4096 + 2 * 4096 * 512
    assert encoder_cost(ORIGINAL, length=128).matrix_flops == 128 * a_word
    assert round(a_word / 1e6, 1) == 204.3
    # 26.1 when cut, 26.15 when rounded.
    assert int(128 * a_word / 1e8) / 10 == 26.1
    assert round(512 * a_word / 1e9, 1) == 104.6


def test_xla_agrees_on_a_twin_and_counts_the_steps_once():
    found = count_encoder(ORIGINAL, length=128)
    assert found.agree
    assert found.xla / found.walk.flops == pytest.approx(1, abs=0.02)
    scanned, args = encoder_function(ORIGINAL, rows=1, length=128)
    assert xla_flops(jax.jit(scanned).trace(*args)) < 0.7 * found.walk.flops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_few_words_add_stands_for_many(dtype):
    """XLA on 20 words written out is what 1 and 2 words make of it, casts of the weights, once a pass, included."""
    config = ElmoConfig(filters=((1, 4), (3, 8)), character_dim=4, lstm_dim=24, projection_dim=8, dtype=dtype)
    twin, args = encoder_function(dataclasses.replace(config, unroll=True), rows=2, length=20)
    whole = xla_flops(jax.jit(twin).trace(*args))
    assert count_encoder(config, rows=2, length=20).xla == pytest.approx(whole, rel=2e-3)
