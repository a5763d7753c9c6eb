"""Runs that are left alone: what goes wrong by itself, what they wait for, what they keep."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.events import compiled, durations
from test_experiment import assert_same_run, log_of, losses, tiny_experiment, train

from ctx_jax.checkpoint import Checkpoints
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import Loader
from ctx_jax.encoder import Encoder
from ctx_jax.errors import InputError
from ctx_jax.experiment import run as running
from ctx_jax.interop.load import load
from ctx_jax.nn.parameters import flat_paths
from ctx_jax.objectives.mlm import MaskedLMObjective
from ctx_jax.train.loop import LoopConfig, NonFiniteLoss
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule


@pytest.fixture(scope="module")
def tiny(topics_corpus):
    """12 steps whose learning rate falls in each."""
    schedule = Schedule("linear", 1e-3, warmup_steps=2, total_steps=40)
    return dataclasses.replace(
        tiny_experiment(topics_corpus),
        optimizer=Optimizer("bert_adamw", schedule),
        steps=12,
        loop=LoopConfig(log_every=1, evaluate_every=4, checkpoint_every=5),
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run, and the names of the programs that were compiled for it."""
    workdir = tmp_path_factory.mktemp("whole")
    with durations() as events:
        assert train(tiny, workdir).finished
    return workdir, compiled(events)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def cost_of(workdir):
    return json.loads((workdir / "cost.json").read_text())


def test_a_run_compiles_its_steps_once(whole):
    """Twelve steps in three stretches with evaluations and checkpoints between them."""
    assert [name for name in whole[1] if name.endswith("_step)")] == ["jit(train_step)", "jit(eval_step)"]


def test_waiting_is_in_the_log_and_on_the_card(tiny, whole, tmp_path, monkeypatch):
    cost, found = cost_of(whole[0]), records(whole[0])
    assert cost["data_wait_share"] < 0.3
    assert cost["data_wait_seconds"] == pytest.approx(sum(record["data_wait_seconds"] for record in found))
    assert [record["step"] for record in found if record["checkpoint_seconds"] > 0] == [6, 11]
    saves = cost["checkpoint_seconds"] / cost["checkpoint_seconds_per_save"]
    assert saves == pytest.approx(3)  # steps 5, 10 and 12
    assert (cost["skipped_steps"], cost["spikes"]) == (0, 0)

    batches = Loader.batches

    def slow(self, *args, **kwargs):
        for batch in batches(self, *args, **kwargs):
            time.sleep(2)
            yield batch

    monkeypatch.setattr(Loader, "batches", slow)
    train(dataclasses.replace(tiny, steps=4), tmp_path)
    # The first batch is there before the steps begin.
    found = records(tmp_path)
    assert all(record["data_wait_share"] > 0.6 for record in found[1:])
    # How much of the run that is depends on how long the first step took, which is the machine's affair.
    tokens = np.diff([record["tokens"] for record in found], prepend=0)
    seconds = sum(tokens / [record["tokens_per_s"] for record in found])
    waits = sum(record["data_wait_seconds"] for record in found)
    assert waits > 3
    assert cost_of(tmp_path)["data_wait_share"] == pytest.approx(waits / seconds)
    np.testing.assert_array_equal(losses(tmp_path), losses(whole[0])[:4])


def test_the_best_is_kept_and_can_be_read(tiny, tmp_path, monkeypatch):
    """Evaluations at 3, 6, 9 and 10, of which the second is the best."""
    figures = {3: 4.0, 6: 2.0, 9: 3.0, 10: 5.0}
    evaluator = running._evaluator
    params_at = {}

    def known(*args):
        evaluate = evaluator(*args)

        def figure(params):
            step = sorted(figures)[len(params_at)]
            params_at[step] = jax.tree.map(np.array, params)
            return evaluate(params) | {"loss": figures[step]}

        return figure

    monkeypatch.setattr(running, "_evaluator", known)
    loop = LoopConfig(log_every=1, evaluate_every=3, checkpoint_every=100)
    frugal = dataclasses.replace(tiny, steps=10, loop=loop, keep_checkpoints=1, keep_best=1)
    train(frugal, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [6, 10]
    assert checkpoints.best() == 6
    for weights, step in (("best", 6), ("final", 10)):
        found = flat_paths(load(tmp_path, weights=weights).params)
        for path, leaf in flat_paths(params_at[step]).items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    encode = lambda **which: Encoder.from_pretrained(tmp_path, **which).encode(["A text."]).last
    assert np.array_equal(encode(), encode(weights="final"))
    assert not np.array_equal(encode(), encode(weights="best"))
    with pytest.raises(InputError, match="weights: found 'worst', expected one of final, best"):
        load(tmp_path, weights="worst")


def test_a_run_that_kept_no_best_has_none(whole, tmp_path):
    """A score belongs to the very state that was evaluated: step 4 was evaluated and not saved, 5 saved and not so."""
    with pytest.raises(InputError, match="no checkpoint has a held-out loss, expected a run with keep_best above 0"):
        load(whole[0], weights="best")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="weights 'best' are those of a run directory, which this is not"):
        load(tmp_path, weights="best")


@pytest.fixture(scope="module")
def patient(tiny):
    return dataclasses.replace(tiny, loop=dataclasses.replace(tiny.loop, skip_non_finite=2))


@pytest.fixture(scope="module")
def poisoned(tiny):
    """The losses of two batches, those of steps 7 and 8, have no number."""
    batches = Loader(Corpus(tiny.data), tiny.rows).batches(8, prefetch=False)
    poison = jnp.array([next(batches).example_ids[0, 0] for _ in range(8)][6:])
    loss = MaskedLMObjective.loss

    def poisoned(self, model, prepared, totals, carry, keys=None):
        value, (sums, carry) = loss(self, model, prepared, totals, carry, keys)
        bad = jnp.isin(prepared.batch.example_ids[0, 0], poison)
        return value * jnp.where(bad, jnp.nan, 1.0), (sums, carry)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MaskedLMObjective, "loss", poisoned)
        yield


@pytest.fixture(scope="module")
def skipping(patient, whole, poisoned, tmp_path_factory):
    """The run that skips both. `whole` is named so that it is made before the poison."""
    workdir = tmp_path_factory.mktemp("skipping")
    assert train(patient, workdir).finished
    return workdir


def test_steps_that_are_not_finite_are_skipped(whole, skipping):
    found = records(skipping)
    assert [record["step"] for record in found if record["skipped"]] == [7, 8]
    assert [record["step"] for record in found if "loss" not in record] == [7, 8]
    # The learning rate is that of the updates made; the rows read are those of all steps.
    rates = [record["learning_rate"] for record in records(whole[0])]
    assert [record["learning_rate"] for record in found] == [*rates[:6], rates[5], rates[5], *rates[6:10]]
    assert [record["tokens"] for record in found] == [record["tokens"] for record in records(whole[0])]
    np.testing.assert_allclose([r["loss"] for r in found[:6]], losses(whole[0])[:6], rtol=1e-5)
    cost = cost_of(skipping)
    assert (cost["skipped_steps"], cost["steps"], cost["rows"]) == (2, 12, 96)


@pytest.mark.slow
def test_stopped_between_two_skipped_steps_and_resumed_equals_the_whole(patient, skipping, tmp_path):
    """How many in a row were skipped goes on, and so does everything else."""
    train(dataclasses.replace(patient, steps=7), tmp_path)
    strict = dataclasses.replace(patient, loop=dataclasses.replace(patient.loop, skip_non_finite=1))
    with pytest.raises(NonFiniteLoss, match=r"step 8: gradient_norm is nan after 1 skipped in a row; .* is step 7$"):
        train(strict, tmp_path)
    assert train(patient, tmp_path).finished
    kept = [r for r in log_of(tmp_path) if (r["kind"], r["step"]) != ("evaluation", 7)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert_same_run(tmp_path, skipping)
