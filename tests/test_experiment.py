"""Whole runs: stopped, killed, resumed, on any number of devices, and gone wrong."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ctx_jax.checkpoint import load_weights
from ctx_jax.data.plan import RowsConfig
from ctx_jax.errors import InputError
from ctx_jax.experiment import Evaluation, Experiment, pretrain
from ctx_jax.models.bert import BertConfig
from ctx_jax.nn.parameters import flat_paths
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.log import Log
from ctx_jax.train.loop import LoopConfig, NonFiniteLoss
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

TIMES = (
    "seconds_per_step", "tokens_per_s", "share_of_peak", "data_wait_seconds", "data_wait_share", "checkpoint_seconds",
)  # fmt: skip


def tiny_experiment(topics_corpus):
    """40 steps of next-sentence and masked-LM training with dropout."""
    return Experiment(
        data=str(topics_corpus),
        model=BertConfig(
            vocab_size=600,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        rows=RowsConfig(length=64, kind="pairs"),
        objective=MaskedLM(next_sentence=True),
        optimizer=Optimizer(kind="bert_adamw", schedule=Schedule("linear", 1e-3, warmup_steps=5, total_steps=40)),
        steps=40,
        batch_size=8,
        loop=LoopConfig(log_every=1, evaluate_every=20, checkpoint_every=10),
        evaluation=Evaluation(rows=32, batch_size=16),
    )


@pytest.fixture(scope="module")
def tiny(topics_corpus):
    return tiny_experiment(topics_corpus)


def train(experiment, workdir, devices=None):
    return pretrain(experiment, workdir, devices=devices or jax.devices()[:1], show_progress=False)


def log_of(workdir):
    """Records without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def losses(workdir):
    return [record["loss"] for record in log_of(workdir) if record["kind"] == "train"]


def weights_of(workdir):
    return {path: np.asarray(leaf) for path, leaf in flat_paths(load_weights(workdir / "weights")[0]).items()}


def assert_same_run(one, other):
    assert log_of(one) == log_of(other)
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for path, leaf in mine.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf.view(np.uint8), theirs[path].view(np.uint8), err_msg=path)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    outcome = train(tiny, workdir)
    assert outcome.finished
    assert outcome.step == 40
    return workdir, outcome


def test_a_run_directory_is_complete(whole, tiny):
    workdir, outcome = whole
    assert {path.name for path in workdir.iterdir()} >= {
        "config.json", "tokenizer", "checkpoints", "weights", "log.jsonl", "cost.json",
    }  # fmt: skip
    records = log_of(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 41))
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [20, 40]
    cost = json.loads((workdir / "cost.json").read_text())
    assert cost["steps"] == 40
    assert cost["rows"] == 320
    assert 0 < cost["tokens"] <= 320 * 64
    assert cost["matrix_flops"] == 40 * cost["matrix_flops_per_step"] > 0
    assert cost["evaluation"] == outcome.evaluation
    assert losses(workdir)[-1] < losses(workdir)[0]


def test_a_finished_run_started_again_stays_as_it_is(tiny, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "again")
    outcome = train(tiny, tmp_path / "again")
    assert outcome.finished
    assert outcome.evaluation == whole[1].evaluation
    mine, theirs = weights_of(tmp_path / "again"), weights_of(whole[0])
    assert all(np.array_equal(mine[path], theirs[path]) for path in theirs)


def test_stopped_at_17_and_resumed_equals_the_whole(tiny, whole, tmp_path, monkeypatch):
    write = Log.__call__

    def stopping(self, step, kind, values):
        write(self, step, kind, values)
        if step == 17 and kind == "train":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "__call__", stopping)
    outcome = train(tiny, tmp_path)
    assert (outcome.step, outcome.finished) == (17, False)
    assert not (tmp_path / "weights").exists()
    monkeypatch.setattr(Log, "__call__", write)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(tiny, tmp_path).finished
    assert_same_run(tmp_path, whole[0])


CONFIG = """
from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Evaluation, Experiment
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.sharding import MeshShape
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

config = {experiment!r}
"""


def start(config, workdir, cache, *overrides):
    """`ctx-jax pretrain` in a process of its own, on one device."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "ctx_jax.cli", "pretrain", str(config), "--workdir", str(workdir), *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, workdir, step):
    while process.poll() is None:
        path = workdir / "log.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"ended before step {step}:\n{process.communicate()[0]}")


@pytest.fixture(scope="module")
def config_file(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiny.py").write_text(CONFIG.format(experiment=tiny))
    return folder / "tiny.py", folder / "cache"


def kill_and_resume(config_file, workdir, steps):
    config, cache = config_file
    for step in steps:
        process = start(config, workdir, cache)
        wait_for_step(process, workdir, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(config, workdir, cache)
    output, _ = last.communicate()
    assert last.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole_command(config_file, whole, tmp_path_factory):
    """The run that nothing interrupted, in a process that has one device only: threads share the sums differently."""
    workdir = tmp_path_factory.mktemp("whole_command")
    kill_and_resume(config_file, workdir, [])
    np.testing.assert_allclose(losses(workdir), losses(whole[0]), rtol=1e-5)
    return workdir


def test_killed_and_resumed_equals_the_whole(config_file, whole_command, tmp_path):
    output = kill_and_resume(config_file, tmp_path, [23])
    # Checkpoints are written in the background: that of step 20 may not have been whole yet.
    assert "resuming from step 20" in output or "resuming from step 10" in output
    assert "held-out masked-LM loss" in output
    assert_same_run(tmp_path, whole_command)


@pytest.mark.slow
def test_killed_again_and_again_equals_the_whole(config_file, whole_command, tmp_path):
    rng = np.random.default_rng()
    kill_and_resume(config_file, tmp_path, sorted(rng.integers(1, 40, 8).tolist()))
    assert_same_run(tmp_path, whole_command)


@pytest.mark.slow
def test_sigterm_of_the_command_saves_and_exits_0(config_file, whole_command, tmp_path):
    config, cache = config_file
    process = start(config, tmp_path, cache)
    wait_for_step(process, tmp_path, 13)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert "SIGTERM: saved step" in output
    kill_and_resume(config_file, tmp_path, [])
    assert_same_run(tmp_path, whole_command)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_loss_curve_is_the_same_on_any_number_of_devices(tiny, whole, tmp_path, count):
    short = dataclasses.replace(tiny, steps=20)
    train(short, tmp_path, jax.devices()[:count])
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0])[:20], rtol=1e-5)


# Orbax, when one array cannot be read, ends its event loop over the other reads.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. (<coroutine object|None):pytest.PytestUnraisableExceptionWarning"
)
def test_a_corrupt_checkpoint_is_skipped_for_the_one_before(tiny, whole, tmp_path, caplog):
    short = dataclasses.replace(tiny, steps=20)
    train(short, tmp_path)
    newest = tmp_path / "checkpoints" / "20"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING, "ctx_jax"):
        assert train(tiny, tmp_path).finished
    assert any("20" in message and "damaged" in message for message in caplog.messages)
    assert_same_run(tmp_path, whole[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    from ctx_jax.objectives.mlm import MaskedLMObjective

    wild = dataclasses.replace(tiny, optimizer=Optimizer("adamw", Schedule("constant", 1e-3), clip_norm=float("inf")))
    loss = MaskedLMObjective.loss

    def poisoned(self, model, prepared, totals, carry, keys=None):
        value, sums = loss(self, model, prepared, totals, carry, keys)
        # Row 13 · 8 of the run, that is step 14, has a poisoned loss.
        bad = (prepared.batch.example_ids == poison).any()
        return value * jax.numpy.where(bad, jax.numpy.nan, 1.0), sums

    from ctx_jax.data.corpus import Corpus
    from ctx_jax.data.loader import Loader

    batches = Loader(Corpus(tiny.data), tiny.rows).batches(8, prefetch=False)
    poison = [next(batches) for _ in range(14)][13].example_ids[0, 0]
    monkeypatch.setattr(MaskedLMObjective, "loss", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 14: gradient_norm is nan; the last good checkpoint is step 10"):
        train(wild, tmp_path)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [10]


def test_accumulation_does_not_change_the_run(tiny, whole, tmp_path):
    train(dataclasses.replace(tiny, steps=10, accumulate=4), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0])[:10], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"rows": RowsConfig(length=48, kind="pairs")}, "rows.length = 64, not 48"),
    ],
)
def test_a_run_directory_takes_no_other_run(tiny, whole, change, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(tiny, **change), whole[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "nowhere"),
        ({"model": BertConfig(vocab_size=601, max_position_embeddings=64)}, "vocab_size is 601"),
        ({"batch_size": 6}, "multiple"),
    ],
)
def test_what_does_not_fit_is_an_input_error(tiny, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(tiny, **change), tmp_path / "run", jax.devices()[:4])


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 10, "accumulate": 3},
        {"rows": RowsConfig(length=128, kind="pairs")},
        {"rows": RowsConfig(length=64)},
    ],
)
def test_an_experiment_that_cannot_be_is_refused(tiny, change):
    with pytest.raises(InputError, match="Experiment"):
        dataclasses.replace(tiny, **change)


def test_every_config_is_an_experiment_and_its_docstring_says_how():
    from ctx_jax.cli import load_config

    configs = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
    assert configs
    for path in configs:
        assert isinstance(load_config(path), Experiment)
        assert f"ctx-jax pretrain configs/{path.name}" in path.read_text()
