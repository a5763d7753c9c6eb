"""A step that is not finite: nothing of it stays but that it was taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.compiling import quick_jit
from oracles.parameters import random_params
from oracles.rows import make_examples, rows_of, vocabulary

from ctx_jax.arrays import Windows
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining, ElmoState
from ctx_jax.nn.lstm import LSTMState
from ctx_jax.nn.parameters import Bound
from ctx_jax.objectives.bilm import BiLM, BiLMObjective, Lexicon
from ctx_jax.objectives.mlm import MaskedLM, MaskedLMObjective
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule
from ctx_jax.train.step import TrainState, make_train_step

LENGTH, ROWS = 24, 4
BERT = BertConfig(
    vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_position_embeddings=LENGTH
)
BOUND = Bound(lambda rngs: BertWithHeads(BERT, rngs=rngs))
ADAM = Optimizer("adamw", Schedule("linear", 1e-2, warmup_steps=2, total_steps=20)).build()


class Poisoned(MaskedLMObjective):
    """In epoch 1 the loss has no number, in epoch 2 the sum that the log shows of it is endless."""

    def loss(self, model, prepared, totals, carry, keys=None):
        value, (sums, carry) = super().loss(model, prepared, totals, carry, keys)
        epoch = prepared.batch.epochs.max()
        sums = sums | {"mlm_loss": jnp.where(epoch == 2, jnp.inf, sums["mlm_loss"])}
        return value * jnp.where(epoch == 1, jnp.nan, 1.0), (sums, carry)


OBJECTIVE = Poisoned(MaskedLM(rate=0.3, next_sentence=True), vocabulary(64), length=LENGTH, examples_per_row=2)


def batch(epoch):
    return rows_of(make_examples(np.random.default_rng(0), 2 * ROWS, 8, 11, 64), LENGTH, 2, epoch=epoch, rows=ROWS)


@functools.cache
def stepper(accumulate, skip):
    step = make_train_step(
        BOUND, OBJECTIVE, ADAM, mask_seed=1, dropout_seed=2, accumulate=accumulate, skip_non_finite=skip
    )
    return quick_jit(step)


@functools.cache
def good(accumulate):
    """After two steps that went well: moments and counts are not those of the start."""
    params = jax.tree.map(jnp.asarray, random_params(BOUND.shapes, 3))
    state = TrainState(jnp.zeros((), jnp.int32), params, ADAM.init(params))
    for _ in range(2):
        state, sums = stepper(accumulate, True)(state, batch(0), OBJECTIVE.arguments)
        assert sums["skipped"] == 0
    return state


def same_bits(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    ("epoch", "accumulate", "name"),
    [(1, 1, "gradient_norm"), (2, 1, "mlm_loss"), (1, 2, "gradient_norm")],
    ids=["gradient", "loss", "micro-batches"],
)
def test_nothing_changes_but_the_steps_number(epoch, accumulate, name):
    before = good(accumulate)
    after, sums = stepper(accumulate, True)(before, batch(epoch), OBJECTIVE.arguments)
    assert not np.isfinite(float(sums[name]))
    assert sums["skipped"] == 1
    assert after.step == before.step + 1 == 3
    same_bits((after.params, after.optimizer), (before.params, before.optimizer))
    # The same rows, were they well, would have changed everything.
    changed, _ = stepper(accumulate, True)(before, batch(0), OBJECTIVE.arguments)
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(changed.params), strict=True):
        assert not np.array_equal(old, new)
    # And the run goes on from where it was.
    going_on, sums = stepper(accumulate, True)(after, batch(0), OBJECTIVE.arguments)
    expected, _ = stepper(accumulate, True)(before._replace(step=jnp.int32(3)), batch(0), OBJECTIVE.arguments)
    assert sums["skipped"] == 0
    same_bits(going_on, expected)


def test_where_none_is_skipped_the_program_does_not_look():
    argument = good(1), batch(0), OBJECTIVE.arguments
    looks = lambda skip: stepper(1, skip).lower(*argument).as_text().count("is_finite")
    sums = stepper(1, False)(*argument)[1]
    assert looks(True) - looks(False) == len(sums)
    assert "skipped" not in sums
    after, _ = stepper(1, False)(good(1), batch(1), OBJECTIVE.arguments)
    assert not np.isfinite(jax.tree.leaves(after.params)[0]).all()


ELMO = ElmoConfig(
    filters=((1, 4), (2, 4)), character_dim=4, max_characters=8, num_highway=1, lstm_dim=8, projection_dim=4,
    vocab_size=30, cell_clip=None, projection_clip=None, dropout=0.0,
)  # fmt: skip
WORDS = 5
ELMO_BOUND = Bound(lambda rngs: ElmoForPreTraining(ELMO, rngs=rngs))
ADAGRAD = Optimizer("adagrad", Schedule("constant", 0.2)).build()


class Marked(BiLMObjective):
    """Windows of number 1 have a gradient without a number."""

    def loss(self, model, prepared, totals, carry, keys=None):
        value, rest = super().loss(model, prepared, totals, carry, keys)
        return value * jnp.where(prepared.windows.numbers[0] == 1, jnp.nan, 1.0), rest


LEXICON = Lexicon(np.random.default_rng(1).integers(1, 100, (30, 8)).astype(np.int16), 2)
LANGUAGE = Marked(BiLM(num_samples=30), ELMO, LEXICON)


def windows(number):
    ids = np.random.default_rng(number).integers(3, 30, (4, ROWS, WORDS)).astype(np.int32)
    return Windows(*ids, np.full(ROWS, WORDS, np.int32), np.full(ROWS, number, np.uint32))


@functools.cache
def language_step():
    step = make_train_step(ELMO_BOUND, LANGUAGE, ADAGRAD, mask_seed=1, dropout_seed=2, skip_non_finite=True)
    return quick_jit(step)


@functools.cache
def read():
    """A state that has read a window."""
    params = jax.tree.map(jnp.asarray, random_params(ELMO_BOUND.shapes, 3))
    state = TrainState(jnp.zeros((), jnp.int32), params, ADAGRAD.init(params), LANGUAGE.start(ROWS))
    state, sums = language_step()(state, windows(0), LANGUAGE.arguments)
    assert sums["skipped"] == 0
    assert all(np.abs(leaf).min(axis=1).min() > 0 for leaf in jax.tree.leaves(state.carry))
    return state


def carry_after(state, number):
    """What the windows leave behind, by the objective alone."""
    prepared, totals = LANGUAGE.prepare(windows(number), jnp.int32(1), LANGUAGE.arguments)
    return quick_jit(lambda params, carry: LANGUAGE.loss(ELMO_BOUND(params), prepared, totals, carry)[1][1])(
        state.params, state.carry
    )


def test_elmo_reads_on_when_only_the_gradient_failed():
    """The words were read and the parameters stay: the state behind them is the one to go on with."""
    before = read()
    after, sums = language_step()(before, windows(1), LANGUAGE.arguments)
    assert sums["skipped"] == 1
    same_bits((after.params, after.optimizer), (before.params, before.optimizer))
    for ours, expected in zip(jax.tree.leaves(after.carry), jax.tree.leaves(carry_after(before, 1)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    assert not np.array_equal(after.carry.forward[0].cell, before.carry.forward[0].cell)


def test_elmo_begins_a_row_anew_whose_state_is_lost_and_no_other():
    before = read()
    first = before.carry.forward[0]
    broken = LSTMState(first.cell.at[2].set(jnp.inf), first.hidden.at[2].set(jnp.nan))
    sick = before._replace(carry=ElmoState((broken, *before.carry.forward[1:]), before.carry.backward))
    after, sums = language_step()(sick, windows(2), LANGUAGE.arguments)
    assert sums["skipped"] == 1
    same_bits((after.params, after.optimizer), (before.params, before.optimizer))
    others = np.arange(ROWS) != 2
    for ours, expected in zip(jax.tree.leaves(after.carry), jax.tree.leaves(carry_after(before, 2)), strict=True):
        np.testing.assert_array_equal(ours[2], np.zeros_like(ours[2]))
        np.testing.assert_allclose(ours[others], expected[others], rtol=1e-6, atol=1e-7)
    # Were the state handed on as it is, every step from here on would be lost.
    _, sums = language_step()(after, windows(3), LANGUAGE.arguments)
    assert sums["skipped"] == 0
    assert np.isfinite(float(sums["gradient_norm"]))
