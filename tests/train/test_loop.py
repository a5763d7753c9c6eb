"""The loop with steps whose losses and times are known: what it counts, when it gives up, what it refuses to do."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctx_jax.checkpoint import Checkpoints
from ctx_jax.errors import InputError
from ctx_jax.train.log import Log
from ctx_jax.train.loop import LoopConfig, NonFiniteLoss, Progress, run
from ctx_jax.train.spikes import DEVIATIONS, FEWEST, WINDOW, is_spike
from ctx_jax.train.step import TrainState

NAN = float("nan")


@jax.jit
def step(state, batch):
    """The batch is the loss; what is not finite is skipped."""
    sums = {"loss": batch, "words": jnp.float32(2), "gradient_norm": jnp.float32(1), "tokens": jnp.float32(10)}
    sums |= {"skipped": 1 - jnp.isfinite(batch).astype(jnp.float32)}
    return TrainState(state.step + 1, {"w": state.params["w"] + 1}, {"m": state.params["w"]}), sums


def start():
    return TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(3)}, {"m": jnp.zeros(3)})


def loop(folder, losses, config, *, step=step, batches=None, progress=None, evaluate=None, keep_best=0):
    """Runs the loop over the losses and returns its log's records, and the progress."""
    progress = progress or Progress()
    with Checkpoints(folder / "checkpoints", keep_best=keep_best) as checkpoints, Log(folder / "log.jsonl") as log:
        run(
            step,
            start(),
            batches or iter([jnp.float32(loss) for loss in losses]),
            progress,
            steps=len(losses),
            batch_size=4,
            config=config,
            means=lambda sums: {"loss": sums["loss"] / sums["words"]},
            extras=lambda updates, seconds, steps: {"updates": updates},
            evaluate=evaluate or (lambda params: {"loss": float(params["w"][0])}),
            checkpoints=checkpoints,
            metadata={},
            log=log,
            show_progress=False,
            stop=lambda step: False,
        )
    return records(folder), progress


def records(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_skipped_steps_are_counted_and_are_in_no_mean(tmp_path):
    losses = [2, NAN, 4, 8, NAN, NAN, NAN, NAN, NAN, 6, 2, 2]
    config = LoopConfig(log_every=3, skip_non_finite=5, checkpoint_every=100)
    found, progress = loop(tmp_path, losses, config)
    assert [record["skipped"] for record in found] == [1, 2, 3, 0]
    assert [record.get("loss") for record in found] == [1.5, 4.0, None, 10 / 6]
    assert [record.get("gradient_norm") for record in found] == [1.0, 1.0, None, 1.0]
    assert [record["updates"] for record in found] == [2, 3, 3, 6]
    assert [record["tokens"] for record in found] == [30, 60, 90, 120]
    assert (progress.step, progress.position, progress.skipped, progress.skipped_in_a_row) == (12, 48, 6, 0)


@pytest.mark.parametrize("log_every", [1, 2, 5, 20])
def test_more_in_a_row_than_allowed_end_the_run(tmp_path, log_every):
    losses = [1, NAN, NAN, 1, NAN, NAN, NAN, 1, 1]
    config = LoopConfig(log_every=log_every, skip_non_finite=2, checkpoint_every=100)
    with pytest.raises(NonFiniteLoss, match=r"^step 7: loss is nan after 2 skipped in a row; no checkpoint was saved"):
        loop(tmp_path, losses, config)
    assert not (tmp_path / "checkpoints").exists()


def test_how_many_in_a_row_survives_a_stop(tmp_path):
    config = LoopConfig(log_every=1, skip_non_finite=2, checkpoint_every=100)
    (tmp_path / "a").mkdir()
    _, progress = loop(tmp_path / "a", [1, NAN, NAN], config)
    assert progress.skipped_in_a_row == 2
    with Checkpoints(tmp_path / "a" / "checkpoints") as checkpoints:
        again = Progress(**checkpoints.metadata(3)["progress"])
    assert (again.skipped, again.skipped_in_a_row, again.step, again.recent_losses) == (2, 2, 3, [0.5])
    (tmp_path / "b").mkdir()
    with pytest.raises(NonFiniteLoss, match="step 4: loss is nan after 2 skipped"):
        loop(tmp_path / "b", [1, NAN, NAN, 1], config, progress=again, batches=iter([jnp.float32(NAN)]))


def test_where_none_may_be_skipped_the_first_ends_the_run(tmp_path):
    config = LoopConfig(log_every=1, checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match=r"^step 4: loss is inf; the last good checkpoint is step 2$"):
        loop(tmp_path, [1, 1, 1, float("inf"), 1], config)


def test_a_step_that_is_not_finite_and_was_not_skipped_ends_the_run_whatever_is_allowed(tmp_path):
    """A step function that changed the parameters all the same."""
    none = jnp.float32(0)

    def unaware(state, batch):
        state, sums = step(state, batch)
        return state, sums | {"skipped": none}

    with pytest.raises(NonFiniteLoss, match="step 2: loss is nan"):
        loop(tmp_path, [1, NAN, 1], LoopConfig(log_every=1, skip_non_finite=3), step=unaware)


def noisy(count, rng, level=3.0):
    return (level + 0.1 * rng.normal(size=count)).tolist()


def test_spikes_of_a_synthetic_sequence(tmp_path):
    """A falling, noisy loss with five spikes at known places, one of them before there is enough to compare with."""
    rng = np.random.default_rng(0)
    losses = np.array(noisy(600, rng)) + 4 * np.exp(-np.arange(600) / 100)
    spikes = [FEWEST - 10, 100, 101, 350, 599]
    losses[spikes] += 8
    found, progress = loop(tmp_path, 2 * losses, LoopConfig(log_every=50, checkpoint_every=1000))
    assert [record["spikes"] for record in found] == [0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert progress.spikes == 4
    np.testing.assert_allclose(progress.recent_losses, losses[-WINDOW:], rtol=1e-6)


def test_what_is_a_spike():
    before = noisy(WINDOW, np.random.default_rng(1))
    median = np.median(before)
    edge = DEVIATIONS * 1.4826 * np.median(np.abs(np.array(before) - median))
    assert is_spike(median + 1.001 * edge, before)
    assert not is_spike(median + 0.999 * edge, before)
    assert not is_spike(median - 10 * edge, before)  # a loss that falls is welcome
    assert not is_spike(median + 10 * edge, before[: FEWEST - 1])
    # A new level counts for half of the window.
    history, counted = list(before), 0
    for loss in noisy(2 * WINDOW, np.random.default_rng(2), level=9.0):
        counted += is_spike(loss, history)
        history.append(loss)
    assert WINDOW // 2 - 2 <= counted <= WINDOW // 2 + 2


class Clock:
    """Time passes only where somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def busy(self, state, batch):
        """A step of 20 ms."""
        self.sleep(0.02)
        return step(state, batch)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("ctx_jax.train.loop.time", clock)
    return clock


def test_waiting_for_data_is_told(tmp_path, clock):
    def slow():
        for i in range(12):
            clock.sleep(0.1 * (1 + i // 4))
            yield jnp.float32(1)

    config = LoopConfig(log_every=4, checkpoint_every=100)
    found, progress = loop(tmp_path, [1] * 12, config, step=clock.busy, batches=slow())
    waits = np.array([0.4, 0.8, 1.2])
    np.testing.assert_allclose([record["data_wait_seconds"] for record in found], waits)
    np.testing.assert_allclose([record["data_wait_share"] for record in found], waits / (waits + 0.08))
    assert progress.data_wait_seconds == pytest.approx(2.4)
    assert progress.seconds == pytest.approx(2.64)


def test_what_checkpoints_take_is_told_and_is_no_part_of_the_steps(tmp_path, monkeypatch, clock):
    save = Checkpoints.save

    def slow(self, *args, **kwargs):
        save(self, *args, **kwargs)
        clock.sleep(0.5)

    monkeypatch.setattr(Checkpoints, "save", slow)
    found, progress = loop(tmp_path, [1] * 6, LoopConfig(log_every=1, checkpoint_every=2), step=clock.busy)
    assert [record["checkpoint_seconds"] for record in found] == pytest.approx([0, 0, 0.5, 0, 0.5, 0])
    assert progress.saves == 3  # steps 2, 4 and 6
    assert progress.checkpoint_seconds == pytest.approx(1.5)
    assert progress.seconds == pytest.approx(0.12)
    assert progress.data_wait_seconds == 0


def test_a_step_that_would_fetch_something_from_the_host_is_refused(tmp_path):
    """Such a transfer would be made in every step; what the log reads is fetched outside of it."""
    careless = lambda state, batch: step(state, np.float32(1))
    with pytest.raises(Exception, match=r"(?i)disallowed host-to-device transfer"):
        loop(tmp_path, [1, 1, 1], LoopConfig(), step=careless)


def test_evaluated_states_are_saved_with_their_figures_and_the_best_stay(tmp_path):
    figures = {3: 5.0, 6: 2.0, 9: 2.5, 12: 3.0, 15: 4.0, 18: 2.25, 20: 6.0}
    evaluate = lambda params: {"loss": figures[int(params["w"][0])]}  # as many steps as it was taught
    config = LoopConfig(log_every=5, evaluate_every=3, checkpoint_every=10)
    (tmp_path / "best").mkdir()
    (tmp_path / "newest").mkdir()
    loop(tmp_path / "best", [1] * 20, config, evaluate=evaluate, keep_best=2)
    checkpoints = Checkpoints(tmp_path / "best" / "checkpoints")
    # The newest three, of which 10 was saved without an evaluation; and the best two, of which 18 is among the newest.
    assert checkpoints.steps() == [6, 15, 18, 20]
    assert checkpoints.best() == 6
    like = start()
    assert checkpoints.restore(like, 6).state.params["w"].tolist() == [6.0] * 3
    loop(tmp_path / "newest", [1] * 20, config, evaluate=evaluate)
    checkpoints = Checkpoints(tmp_path / "newest" / "checkpoints")
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.best() is None  # those that were evaluated are not those that were saved


HANGING = """
import sys, threading, time
import jax, jax.numpy as jnp
sys.path.insert(0, {tests!r})
from test_loop import loop, step
from ctx_jax.train.loop import LoopConfig
import pathlib

taken = 0

def blocks(host):
    threading.Event().wait()
    return host

def hangs(state, batch):
    global taken
    taken += 1
    if taken == 1:
        time.sleep(3)  # a first step may take its time
    if taken == {hang}:
        state = jax.jit(lambda s: s._replace(params=jax.pure_callback(blocks, s.params, s.params)))(state)
    return step(state, batch)

def evaluate(params):
    time.sleep(3)
    return {{"loss": 1.0}}

config = LoopConfig(log_every=2, evaluate_every=4, checkpoint_every=2, hang_seconds={seconds})
loop(pathlib.Path(sys.argv[1]), [1] * 10, config, step=hangs, evaluate=evaluate)
print("done")
"""


def child(folder, **values):
    code = HANGING.format(tests=os.path.dirname(__file__), **values)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)


def test_a_step_that_hangs_ends_the_process_with_the_stacks(tmp_path):
    done = child(tmp_path, hang=7, seconds=2.0)
    assert done.returncode == 1
    # Whether the call of the step returns before the step ends is the device's affair.
    line = (
        r"no step ended for 2 s \(loop.hang_seconds\). The last to end was step 6; step [678] was given to the devices,"
        r" with the rows up to (24|28|32); the last good checkpoint is step 6. Stacks of all threads:"
    )
    assert re.search(f"^{line}$", done.stderr, re.MULTILINE), done.stderr
    assert "in blocks" in done.stderr
    assert 'loop.py", line' in done.stderr
    assert "done" not in done.stdout
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] in (4, 6)


def test_a_slow_first_step_and_evaluation_are_no_hang(tmp_path):
    done = child(tmp_path, hang=-1, seconds=2.0)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_every": 0}, "log_every is 0, expected at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0, expected at least 1"),
        ({"evaluate_every": -1}, "evaluate_every is -1, expected at least 0"),
        ({"skip_non_finite": -1}, "skip_non_finite is -1, expected at least 0"),
        ({"hang_seconds": 0.0}, "hang_seconds is 0.0, expected more than 0, or None"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        LoopConfig(**change)
