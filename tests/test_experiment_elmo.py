"""ELMo goes the way of every run: the same loop, checkpoints, resume, mesh, log and cost card."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_experiment import assert_same_run, log_of, losses, train

from ctx_jax import cli
from ctx_jax.data.plan import RowsConfig
from ctx_jax.errors import InputError
from ctx_jax.experiment import Evaluation, Experiment
from ctx_jax.experiment.assembly import abstract_step
from ctx_jax.experiment.cost import step_cost
from ctx_jax.flops.jaxpr import count
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.objectives.bilm import BiLM
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.sharding import MeshShape
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

MODEL = ElmoConfig(
    filters=((1, 8), (2, 16), (3, 16)),
    character_dim=6,
    max_characters=16,
    num_highway=1,
    lstm_dim=32,
    projection_dim=16,
    vocab_size=500,
)


def tiny_experiment(words_corpus):
    return Experiment(
        data=str(words_corpus),
        model=MODEL,
        rows=RowsConfig(length=10, kind="stream"),
        objective=BiLM(num_samples=64),
        optimizer=Optimizer("adagrad", Schedule("constant", 0.2)),
        steps=12,
        batch_size=8,
        loop=LoopConfig(log_every=1, evaluate_every=6, checkpoint_every=4),
        evaluation=Evaluation(rows=64, batch_size=8),
    )


@pytest.fixture(scope="module")
def tiny(words_corpus):
    return tiny_experiment(words_corpus)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    outcome = train(tiny, workdir)
    assert outcome.finished
    return workdir, outcome


def test_it_learns_and_the_run_directory_is_complete(whole, tiny):
    workdir, outcome = whole
    # A model that knows nothing has the logarithm of the vocabulary's size.
    held_out = [record["loss"] for record in log_of(workdir) if record["kind"] == "evaluation"]
    assert np.log(MODEL.vocab_size) > held_out[0] > held_out[1] == outcome.evaluation["loss"]
    assert {"config.json", "tokenizer", "checkpoints", "weights", "log.jsonl", "cost.json"} <= {
        path.name for path in workdir.iterdir()
    }
    cost = json.loads((workdir / "cost.json").read_text())
    assert cost["tokens"] == 12 * 8 * 10
    assert cost["matrix_flops"] == 12 * step_cost(tiny).training_matrix_flops
    evaluation = outcome.evaluation
    assert evaluation["perplexity"] == pytest.approx(np.exp(evaluation["loss"]), rel=1e-6)
    assert evaluation["loss"] == pytest.approx((evaluation["forward_loss"] + evaluation["backward_loss"]) / 2, rel=1e-6)
    assert evaluation["predictions"] == 64 * 10
    assert [r["step"] for r in log_of(workdir) if r["kind"] == "evaluation"] == [6, 12]


@pytest.mark.parametrize("stop", [3, 7])
def test_stopped_and_resumed_equals_the_whole(tiny, whole, tmp_path, stop):
    """The recurrent state is part of the checkpoint: without it the losses after the stop would be others."""
    optimizer = dataclasses.replace(
        tiny.optimizer, schedule=dataclasses.replace(tiny.optimizer.schedule, total_steps=12)
    )
    train(dataclasses.replace(tiny, steps=stop, optimizer=optimizer), tmp_path)
    before = losses(tmp_path)
    assert len(before) == stop
    assert train(tiny, tmp_path).finished
    kept = [r for r in log_of(tmp_path) if not (r["kind"] == "evaluation" and r["step"] == stop)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize(
    ("mesh", "count"), [(MeshShape(), 2), (MeshShape(data=2, fsdp=2, tensor=2), 8)], ids=["data 2", "2 × 2 × 2"]
)
def test_the_mesh_changes_nothing(tiny, whole, tmp_path, mesh, count):
    train(dataclasses.replace(tiny, mesh=mesh, steps=6), tmp_path, jax.devices()[:count])
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0])[:6], rtol=1e-5)


def test_micro_batches_change_nothing(tiny, whole, tmp_path):
    train(dataclasses.replace(tiny, accumulate=2, steps=6), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0])[:6], rtol=1e-5)


def test_another_batch_size_is_another_run(tiny, whole, tmp_path):
    import shutil

    shutil.copytree(whole[0], tmp_path / "again")
    with pytest.raises(InputError, match="batch_size = 8, not 16"):
        train(dataclasses.replace(tiny, batch_size=16, steps=20), tmp_path / "again")


def test_the_step_costs_what_the_formula_says(tiny):
    for accumulate, samples in ((1, 64), (2, 64), (1, 500)):
        experiment = dataclasses.replace(tiny, accumulate=accumulate, objective=BiLM(num_samples=samples))
        step, args = abstract_step(experiment)
        assert count(step, *args).matrix == step_cost(experiment).training_matrix_flops


def test_what_does_not_go_together(tiny, topics_corpus, words_corpus, tmp_path):
    bert = BertConfig(vocab_size=600, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    for given in (
        {"model": bert},
        {"objective": MaskedLM()},
        {"rows": RowsConfig(length=10)},
    ):
        with pytest.raises(InputError, match="do not go together"):
            dataclasses.replace(tiny, **given)
    with pytest.raises(InputError, match="repeats is for masks"):
        dataclasses.replace(tiny, evaluation=Evaluation(repeats=2))
    with pytest.raises(InputError, match="ELMo takes whole words"):
        train(dataclasses.replace(tiny, data=str(topics_corpus)), tmp_path / "a")
    size = json.loads((words_corpus / "counts.json").read_text())["files"]
    assert "tokenizer/words.txt" in size
    with pytest.raises(InputError, match="vocab_size is 10000000, expected 4 to"):
        train(dataclasses.replace(tiny, model=dataclasses.replace(MODEL, vocab_size=10**7)), tmp_path / "b")
    number = (words_corpus / "tokenizer" / "words.txt").read_text().count("\n")
    plain = Experiment(data=str(words_corpus), model=dataclasses.replace(bert, vocab_size=number))
    with pytest.raises(InputError, match="BERT takes sub-words"):
        train(plain, tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_the_command_line_overrides_fields_of_either_kind(tiny, words_corpus, tmp_path, capsys):
    import pathlib

    config = pathlib.Path(__file__).parent.parent / "configs" / "elmo_small.py"
    words = ["pretrain", str(config), "--workdir", str(tmp_path / "run"), "--data", str(words_corpus), "--steps", "2"]
    words += ["--model.lstm-dim", "24", "--model.projection-dim", "8", "--model.vocab-size", "300"]
    words += ["--model.filters", "1", "4", "2", "4", "--objective.num-samples", "20", "--batch-size", "8"]
    words += ["--evaluation.rows", "16", "--evaluation.batch-size", "8", "--optimizer.schedule.warmup-steps", "1"]
    assert cli.main(words) == 0
    assert "held-out perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_overfits_a_small_text(tmp_path):
    """bilm-tf's own test: a perplexity under 20 in 50 epochs."""
    text = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    nouns, verbs = ("river", "bank", "money", "boat", "tree"), ("saw", "left", "liked", "crossed")
    lines = [
        f"The {rng.choice(nouns)} near the {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)} ."
        for _ in range(400)
    ]
    text.write_text("\n\n".join(lines))
    words = ["data", "build", str(text), "--out", str(tmp_path / "corpus"), "--train-words", "1000", "--holdout", "20"]
    assert cli.main([*words, "--processes", "1"]) == 0
    steps = 50 * 380 * 10 // (8 * 20)
    experiment = Experiment(
        data=str(tmp_path / "corpus"),
        model=dataclasses.replace(MODEL, vocab_size=17, dropout=0.1),
        rows=RowsConfig(length=20, kind="stream"),
        objective=BiLM(num_samples=8),
        optimizer=Optimizer("adagrad", Schedule("constant", 0.2)),
        steps=steps,
        batch_size=8,
        loop=LoopConfig(log_every=100, evaluate_every=0, checkpoint_every=10**6),
        evaluation=Evaluation(rows=64, batch_size=8),
    )
    outcome = train(experiment, tmp_path / "run")
    assert outcome.evaluation["forward_perplexity"] < 20
    assert outcome.evaluation["backward_perplexity"] < 20
