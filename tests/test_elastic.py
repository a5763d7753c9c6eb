"""Runs that go on with other devices: fewer or more, split by rows, by parameters or by products.

What a step computes depends on the mesh by rounding only: the rows, the masks and the dropout are those of the run that
was never interrupted.
"""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import test_experiment
import test_experiment_elmo
from test_experiment import log_of, losses, train, weights_of

from ctx_jax.checkpoint import Checkpoints
from ctx_jax.sharding import MeshShape
from ctx_jax.train import step as steps
from ctx_jax.train.log import Log
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

LENGTH = 3
"""Steps on each mesh."""
LAST = 4 * LENGTH

ONE = MeshShape(1, 1, 1)
ALL = MeshShape(2, 2, 2)


def data(count):
    return MeshShape(count, 1, 1)


def fsdp(count):
    return MeshShape(1, count, 1)


def tensor(count):
    return MeshShape(1, 1, count)


slow = lambda *chain: pytest.param(chain, marks=pytest.mark.slow)
CHAINS = [
    (ALL, fsdp(2), ONE),
    slow(data(8), data(4), data(2), ONE),
    slow(data(8), fsdp(4), tensor(2), ONE),
    slow(fsdp(8), data(4), fsdp(2), data(2)),
    slow(tensor(2), data(8), tensor(4), fsdp(8)),
    slow(ONE, tensor(2), ALL, MeshShape(4, 1, 2)),
    slow(MeshShape(1, 2, 4), MeshShape(2, 2, 1), tensor(2), ONE),
]


def name(chain):
    return " → ".join("×".join(map(str, dataclasses.astuple(mesh))) for mesh in chain)


def bert(folder):
    """Dropout and next sentences; the rate rises and falls."""
    return dataclasses.replace(
        test_experiment.tiny_experiment(folder),
        optimizer=Optimizer("bert_adamw", Schedule("linear", 1e-3, warmup_steps=3, total_steps=2 * LAST)),
    )


def elmo(folder):
    """Dropout, a sampled softmax, and a state that is handed from window to window."""
    return test_experiment_elmo.tiny_experiment(folder)


@pytest.fixture(scope="module", params=["bert", "elmo"])
def experiment(request):
    corpus, make = {"bert": ("topics_corpus", bert), "elmo": ("words_corpus", elmo)}[request.param]
    made = make(request.getfixturevalue(corpus))
    assert getattr(made.model, {"bert": "hidden_dropout", "elmo": "dropout"}[request.param]) > 0
    loop = LoopConfig(log_every=1, evaluate_every=0, checkpoint_every=1000)
    return dataclasses.replace(made, steps=LAST, batch_size=8, loop=loop)


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """The run that nothing interrupted, on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(dataclasses.replace(experiment, mesh=ONE), workdir).finished
    return workdir


def go_on(experiment, workdir, mesh, until, monkeypatch):
    """Runs on a mesh until a signal comes after a step; then everything is in the checkpoint."""
    write = Log.__call__

    def stopping(self, step, kind, values):
        write(self, step, kind, values)
        if step == until and kind == "train":
            os.kill(os.getpid(), signal.SIGTERM)

    size = mesh.data * mesh.fsdp * mesh.tensor
    with monkeypatch.context() as patched:
        if until < experiment.steps:
            patched.setattr(Log, "__call__", stopping)
        outcome = train(dataclasses.replace(experiment, mesh=mesh), workdir, jax.devices()[:size])
    assert (outcome.step, outcome.finished) == (until, until == experiment.steps)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: name(chain))
def test_the_run_goes_on_with_another_mesh(experiment, whole, chain, tmp_path, monkeypatch):
    for number, mesh in enumerate(chain, 1):
        until = LAST if number == len(chain) else number * LENGTH
        go_on(experiment, tmp_path, mesh, until, monkeypatch)
        progress = Checkpoints(tmp_path / "checkpoints").metadata(until)["progress"]
        assert progress["position"] == 8 * until
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)
    mine, theirs = ([record for record in log_of(folder) if record["kind"] == "train"] for folder in (tmp_path, whole))
    for ours, expected in zip(mine, theirs, strict=True):
        assert (ours["step"], ours["tokens"]) == (expected["step"], expected["tokens"])
        assert ours["learning_rate"] == expected["learning_rate"]
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    held_out = [json.loads((folder / "cost.json").read_text())["evaluation"]["loss"] for folder in (tmp_path, whole)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    expected = weights_of(whole)
    for path, leaf in weights_of(tmp_path).items():
        difference = np.linalg.norm(leaf.astype(np.float64) - expected[path])
        assert difference <= 1e-4 * np.linalg.norm(expected[path].astype(np.float64)), path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rows", "masks", "dropout", "carry"])
def test_it_would_show(experiment, whole, what, tmp_path, monkeypatch):
    """Rows, masks, dropout or a carry that are not those of the whole run are told by the losses, by far."""
    recurrent = type(experiment.model).__name__ == "ElmoConfig"
    if what == "carry" and not recurrent:
        pytest.skip("rows of a BERT have nothing to do with each other")
    go_on(experiment, tmp_path, data(2), LENGTH, monkeypatch)
    from ctx_jax.experiment import assembly, run

    make, batches = steps.make_train_step, run._device_batches
    if what in ("masks", "dropout"):
        seed = {"masks": "mask_seed", "dropout": "dropout_seed"}[what]
        other = lambda *args, **kwargs: make(*args, **kwargs | {seed: kwargs[seed] + 7})
        monkeypatch.setattr(assembly, "make_train_step", other)
    elif what == "rows":
        later = lambda loader, experiment, position, mesh: batches(loader, experiment, position + 8, mesh)
        monkeypatch.setattr(run, "_device_batches", later)
    else:
        restore = Checkpoints.restore

        def forgetful(self, like, *args, **kwargs):
            found = restore(self, like, *args, **kwargs)
            carry = jax.tree.map(
                lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), found.state.carry
            )
            return found._replace(state=found.state._replace(carry=carry))

        monkeypatch.setattr(Checkpoints, "restore", forgetful)
    go_on(experiment, tmp_path, ONE, LAST, monkeypatch)
    found, expected = (np.array(losses(folder)) for folder in (tmp_path, whole))
    np.testing.assert_allclose(found[:LENGTH], expected[:LENGTH], rtol=1e-5)
    assert np.abs(found[LENGTH] / expected[LENGTH] - 1) > 1e-4
