"""The bidirectional language model: losses by an oracle, the sample's expectation, states over windows, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import bilm as oracle
from oracles.compiling import quick_jit
from scipy import stats

from ctx_jax.arrays import Windows
from ctx_jax.errors import InputError
from ctx_jax.flops.elmo import bilm_cost
from ctx_jax.flops.jaxpr import count
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining, zero_state
from ctx_jax.nn.parameters import Bound, flat_paths
from ctx_jax.objectives.bilm import (
    BiLM,
    BiLMObjective,
    Lexicon,
    draw_sample,
    log_uniform,
    sampled_losses,
    whole_losses,
)

CONFIG = ElmoConfig(
    filters=((1, 4), (2, 6)),
    character_dim=3,
    max_characters=8,
    num_highway=1,
    lstm_dim=9,
    projection_dim=5,
    vocab_size=40,
    dropout=0.0,
)
WORDS = 60
ROWS, LENGTH = 4, 6
WEIGHT, LOSSES = ROWS * LENGTH, ("forward_loss", "backward_loss")


def lexicon(config=CONFIG):
    return Lexicon(np.random.default_rng(0).integers(1, 262, (WORDS, config.max_characters)).astype(np.int16), 2)


@functools.cache
def bound(config=CONFIG):
    return Bound(lambda rngs: ElmoForPreTraining(config, rngs=rngs))


@functools.cache
def params(config=CONFIG):
    """Larger than at birth, so that logits differ and clips are met."""
    return jax.tree.map(lambda leaf: leaf * 3 + 0.01, bound(config).init(jax.random.key(1)))


def windows(seed, rows=ROWS, length=LENGTH, lengths=None, number=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WORDS, (4, rows, length)).astype(np.int32)
    lengths = np.full(rows, length, np.int32) if lengths is None else np.array(lengths, np.int32)
    return Windows(*ids, lengths, np.full(rows, number, np.uint32))


def objective(num_samples=10**9, config=CONFIG):
    return BiLMObjective(BiLM(num_samples), config, lexicon(config))


@functools.cache
def stepper(num_samples, config=CONFIG):
    """(params, windows, carry, keys) → loss, sums, carry, gradients."""
    bilm = objective(num_samples, config)

    @quick_jit
    def run(params, batch, carry, keys):
        prepared, totals = bilm.prepare(batch, jnp.int32(3), bilm.arguments)
        loss = lambda params: bilm.loss(bound(config)(params), prepared, totals, carry, keys)
        (value, (sums, after)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, sums, after, gradients

    return run


def start(rows=ROWS, config=CONFIG):
    return zero_state(config, rows)


@quick_jit
def hidden_of(params, batch, carry):
    """What the softmax sees, by direction, and the targets that the model's vocabulary knows."""
    bilm = objective()
    prepared, _ = bilm.prepare(batch, jnp.int32(3), bilm.arguments)
    return bilm._outputs(bound()(params).encoder, prepared, carry, None)[0]


def test_log_uniform_is_tensorflows():
    for size in (4, 1000, 793471):
        found = log_uniform(size)
        assert found.sum() == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(found, oracle.log_uniform(size), rtol=1e-6)
        assert (np.diff(found) < 0).all()


def test_sampled_losses_on_a_given_sample():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(30, 7)).astype(np.float32), rng.normal(size=(50, 7)).astype(np.float32)
    bias, targets = rng.normal(size=50).astype(np.float32), rng.integers(0, 50, 30)
    sample = quick_jit(draw_sample, static_argnums=(1, 2))(jax.random.key(5), 50, 12)
    ids, time = np.asarray(sample.ids), float(sample.time)
    assert np.isin(targets, ids).any()
    assert not np.isin(targets, ids).all()
    np.testing.assert_allclose(sample.log_expected, np.log(oracle.expected_count(ids, time, 50)), rtol=1e-5)
    found = quick_jit(sampled_losses)(hidden, targets, table, bias, sample)
    args = [x.astype(np.float64) for x in (hidden, table, bias)]
    expected = [oracle.sampled_loss(args[0][n], targets[n], args[1], args[2], ids, time) for n in range(len(targets))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [5, 40, 64, 200])
def test_the_whole_softmax_in_chunks(vocab_size, monkeypatch):
    import ctx_jax.objectives.bilm as module

    rng = np.random.default_rng(1)
    hidden, table = rng.normal(size=(20, 7)).astype(np.float32), rng.normal(size=(vocab_size, 7)).astype(np.float32)
    bias, targets = rng.normal(size=vocab_size).astype(np.float32), rng.integers(0, vocab_size, 20)
    expected = [
        oracle.whole_loss(*(x.astype(np.float64) for x in (hidden[n],)), targets[n], table, bias) for n in range(20)
    ]
    for chunk in (8192, 64, 7):
        monkeypatch.setattr(module, "CHUNK", chunk)
        found = quick_jit(lambda *args: whole_losses(*args))(hidden, targets, table, bias)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_sample_is_of_different_words_each_as_frequent_as_expected():
    """1 / (its expected count) where a word is in the sample and 0 where not: one on average, for every word."""
    size, vocab_size, draws = 6, 25, 8000
    draw = quick_jit(jax.vmap(lambda key: draw_sample(key, vocab_size, size)))
    sample = draw(jax.random.split(jax.random.key(0), draws))
    ids = np.asarray(sample.ids)
    assert all(len(set(row)) == size for row in ids.tolist())
    weights = np.zeros((draws, vocab_size))
    times = np.asarray(sample.time, np.float64)[:, None]
    np.put_along_axis(weights, ids, 1 / oracle.expected_count(ids, times, vocab_size), axis=1)
    errors = (weights.mean(0) - 1) / (weights.std(0) / np.sqrt(draws))
    assert (np.abs(errors) < stats.norm.ppf(1 - 1e-4 / vocab_size)).all()
    # Had the sampler forgotten the rates, frequent words would come too seldom.
    assert (ids == 0).any(1).mean() > 2 * (ids == vocab_size - 1).any(1).mean()


def test_the_expectation_of_the_sampled_sum_is_the_whole_sum():
    """The sum over the sample, each term over its expected count, is an unbiased estimate of the softmax's sum."""
    rng = np.random.default_rng(2)
    vocab_size, size, draws = 30, 8, 6000
    weights = np.exp(rng.normal(size=vocab_size))
    sample = quick_jit(jax.vmap(lambda key: draw_sample(key, vocab_size, size)))(
        jax.random.split(jax.random.key(7), draws)
    )
    sums = (weights[np.asarray(sample.ids)] / np.exp(np.asarray(sample.log_expected, np.float64))).sum(1)
    error = sums.std() / np.sqrt(draws)
    assert abs(sums.mean() - weights.sum()) < 4 * error
    assert error < 0.02 * weights.sum()
    raw = weights[np.asarray(sample.ids)].sum(1).mean()
    assert abs(raw - weights.sum()) > 20 * error


@pytest.mark.parametrize("num_samples", [12, 10**9])
def test_the_loss_is_the_mean_over_words_and_directions(num_samples):
    batch = windows(0, lengths=[6, 0, 3, 6])
    value, sums, _, _ = stepper(num_samples)(params(), batch, start(), None)
    outputs = hidden_of(params(), batch, start())
    table = np.asarray(params()["softmax"]["table"], np.float64)
    bias = np.asarray(params()["softmax"]["bias"], np.float64)
    inside = (np.arange(LENGTH) < batch.lengths[:, None]).ravel()
    step_key = jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), 0)
    by_direction = []
    for number, (hidden, targets) in enumerate(outputs):
        hidden, targets = np.asarray(hidden, np.float64), np.asarray(targets)
        given = (batch.forward_targets, batch.backward_targets)[number].ravel()
        np.testing.assert_array_equal(targets, np.where(given < 40, given, 2))
        if num_samples < 40:
            sample = draw_sample(jax.random.fold_in(step_key, number), 40, num_samples)
            loss = lambda n, h=hidden, t=targets, s=sample: oracle.sampled_loss(
                h[n], t[n], table, bias, np.asarray(s.ids), float(s.time)
            )
        else:
            loss = lambda n, h=hidden, t=targets: oracle.whole_loss(h[n], t[n], table, bias)
        by_direction.append(sum(loss(n) for n in np.flatnonzero(inside)))
    assert float(sums["words"]) == inside.sum() == 15
    assert float(sums["forward_loss"]) == pytest.approx(by_direction[0], rel=1e-5)
    assert float(sums["backward_loss"]) == pytest.approx(by_direction[1], rel=1e-5)
    assert float(value) == pytest.approx(sum(by_direction) / 2 / 15, rel=1e-5)


def test_windows_carry_the_state_on():
    """Three windows of six are one of eighteen: losses, and the state at the end."""
    whole = windows(3, length=18)
    parts = [
        whole._replace(**{name: getattr(whole, name)[:, 6 * k : 6 * k + 6] for name in Windows._fields[:4]})._replace(
            lengths=np.full(ROWS, 6, np.int32)
        )
        for k in range(3)
    ]
    run = stepper(10**9)
    # As at birth: larger weights make the recurrence chaotic, and rounding grows from step to step.
    born = bound().init(jax.random.key(1))
    _, expected, end, _ = run(born, whole, start(), None)
    carry, sums = start(), []
    for part in parts:
        _, found, carry, _ = run(born, part, carry, None)
        sums.append(found)
    for name in ("forward_loss", "backward_loss", "words"):
        assert float(sum(s[name] for s in sums)) == pytest.approx(float(expected[name]), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(carry), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    # Without the state the losses are others.
    forgotten = sum(float(run(born, part, start(), None)[1]["forward_loss"]) for part in parts)
    assert abs(forgotten / float(expected["forward_loss"]) - 1) > 1e-4


@pytest.mark.parametrize("num_samples", [12, 10**9])
def test_gradients_are_differences_of_the_loss(num_samples):
    """Along three random directions of all the parameters at once."""
    batch, run = windows(5), stepper(num_samples)
    _, _, carry, _ = run(params(), windows(4), start(), None)
    _, _, _, gradients = run(params(), batch, carry, None)
    rng = np.random.default_rng(6)
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params())
        # A short step: maxima, relus and clips have kinks. The sum over all words keeps it above the rounding.
        eps = 1e-4
        moved = lambda step, d=direction: jax.tree.map(lambda p, part: p + np.float32(step) * part, params(), d)
        total = lambda step, m=moved: sum(float(run(m(step), batch, carry, None)[1][n]) for n in LOSSES) / 2 / WEIGHT
        along = sum(
            float((g * v).sum()) for g, v in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
        )
        first, second = ((total(k * eps) - total(-k * eps)) / (2 * k * eps) for k in (1, 2))
        # Richardson: the error of a difference over 2ε is four times that over ε.
        assert (4 * first - second) / 3 == pytest.approx(along, rel=0.02, abs=0.02)


def test_every_parameter_learns():
    _, _, _, gradients = stepper(12)(params(), windows(8), start(), None)
    for path, gradient in flat_paths(gradients).items():
        assert np.abs(gradient).max() > 0, path


def test_dropout_is_of_the_row():
    config = dataclasses.replace(CONFIG, dropout=0.4)
    one = windows(9, rows=1)
    both = Windows(*(np.concatenate([x, x]) for x in one))
    keys = quick_jit(lambda: jax.random.split(jax.random.key(1), 2))()
    run = stepper(10**9, config)
    plain = run(params(config), both, start(2, config), None)[1]
    loss = lambda keys: float(run(params(config), both, start(2, config), keys)[1]["forward_loss"])
    mixed, first, second = loss(keys), loss(keys[np.array([0, 0])]), loss(keys[np.array([1, 1])])
    assert 2 * mixed == pytest.approx(first + second, rel=1e-5)
    assert len({round(x, 3) for x in (first, second, float(plain["forward_loss"]))}) == 3


def test_evaluation_has_the_whole_softmax_and_no_dropout():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    bilm, batch = objective(12, config), windows(10)

    @quick_jit
    def evaluate(params, carry):
        prepared, totals = bilm.prepare(batch, jnp.int32(3), bilm.arguments)
        return bilm.evaluate(bound(config)(params), prepared, totals, carry), bilm.target_counts(prepared)

    (sums, carry), counts = evaluate(params(config), start(config=config))
    expected, after = stepper(10**9)(params(), batch, start(), None)[1:3]
    for name in expected:
        assert float(sums[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(carry), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    known = np.where(batch.forward_targets < 40, batch.forward_targets, 2)
    np.testing.assert_array_equal(counts, np.bincount(known.ravel(), minlength=40))


def test_negatives_change_from_window_to_window_and_not_with_the_batch():
    run = stepper(12)
    here, same, there = (
        float(run(params(), windows(11, number=n), start(), None)[1]["forward_loss"]) for n in (0, 0, 1)
    )
    assert here == same != there
    alone = windows(11, rows=2)
    twice = Windows(*(np.concatenate([x, x]) for x in alone))
    one = float(run(params(), alone, start(2), None)[1]["forward_loss"])
    assert float(run(params(), twice, start(4), None)[1]["forward_loss"]) == pytest.approx(2 * one, rel=1e-5)


def test_means():
    means = BiLMObjective.means({"forward_loss": 20.0, "backward_loss": 10.0, "words": 5.0})
    assert means["forward_perplexity"] == pytest.approx(np.exp(4))
    assert means["backward_perplexity"] == pytest.approx(np.exp(2))
    assert means["loss"] == 3.0
    assert means["perplexity"] == pytest.approx(np.exp(3))


@pytest.mark.parametrize("num_samples", [12, 10**9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_of_a_window_equals_the_walk(num_samples, dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype, num_layers=3)
    bilm = objective(num_samples, config)

    def step(params, batch, carry):
        prepared, totals = bilm.prepare(batch, jnp.int32(3), bilm.arguments)
        loss = lambda params: bilm.loss(bound(config)(params), prepared, totals, carry)[0]
        return jax.value_and_grad(loss)(params)

    walk = count(step, bound(config).shapes, windows(0), start(config=config))
    cost = bilm_cost(config, rows=ROWS, length=LENGTH, num_samples=num_samples)
    assert walk.matrix == cost.training_matrix_flops
    assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(bound(config).shapes))


def test_bad_settings():
    with pytest.raises(InputError, match="num_samples is 0"):
        BiLM(0)
