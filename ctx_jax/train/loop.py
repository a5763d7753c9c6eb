"""Steps one after the other: log, evaluate, save, stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import jax

from ctx_jax.checkpoint import Checkpoints
from ctx_jax.errors import InputError
from ctx_jax.nn.parameters import Params
from ctx_jax.train.log import Bar, Log
from ctx_jax.train.spikes import WINDOW, is_spike
from ctx_jax.train.step import TrainState
from ctx_jax.train.watchdog import Watchdog

STEPS_AHEAD = 2
"""How many steps the host may be ahead of the device: enough to keep it busy, few enough to bound the memory."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is not finite. The message names the step and the last good checkpoint."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
      step: steps taken.
      position: rows read, which is the loader's position.
      tokens: tokens that were not padding.
      seconds: time spent in steps; compilation, evaluation and checkpoints not counted.
      data_wait_seconds: of them, those in which the loop waited for a batch.
      checkpoint_seconds: that saving took from the loop; the rest of it goes on beside the steps.
      saves: checkpoints that these seconds are of.
      skipped: steps that changed nothing because they were not finite.
      skipped_in_a_row: those since the last that was.
      spikes: steps whose loss stuck out, see `train.spikes`.
      recent_losses: of the last steps, which the next ones are measured against.
    """

    step: int = 0
    position: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    saves: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    recent_losses: list[float] = field(default_factory=list)

    def look(
        self,
        records: list[dict[str, float]],
        means: Callable[[dict[str, float]], dict[str, float]],
        allowed: int,
        kept: str,
    ) -> tuple[list[dict[str, float]], dict[str, int]]:
        """Looks at the records of the last steps, up to `step`.

        Args:
          records: sums of each step.
          means: sums → what the log shows.
          allowed: steps in a row that may be skipped.
          kept: where to go back to, for the error.

        Returns:
          The records of the steps that were not skipped, and what to count of them all.

        Raises:
          NonFiniteLoss: a step is not finite, and none may be skipped any more.
        """
        good, spikes = [], 0
        for number, record in enumerate(records, self.step - len(records) + 1):
            record = dict(record)
            skipped = record.pop("skipped", 0.0)
            wrong = next((name for name, value in record.items() if not math.isfinite(value)), None)
            if wrong is None:
                self.skipped_in_a_row = 0
                loss = means(record)["loss"]
                spikes += is_spike(loss, self.recent_losses)
                self.recent_losses = [*self.recent_losses[1 - WINDOW :], loss]
                good.append(record)
            elif skipped and self.skipped_in_a_row < allowed:
                self.skipped_in_a_row += 1
            else:
                before = f" after {self.skipped_in_a_row} skipped in a row" if self.skipped_in_a_row else ""
                raise NonFiniteLoss(f"step {number}: {wrong} is {record[wrong]}{before}; {kept}")
        counts = {"skipped": len(records) - len(good), "spikes": spikes}
        self.skipped += counts["skipped"]
        self.spikes += spikes
        return good, counts


class StopSignal:
    """Has a name once SIGTERM or SIGINT came; the loop then ends after a step. A second one ends the process."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class LoopConfig:
    """When to log, evaluate and save, and when to give up."""

    log_every: int = 10
    """Steps a log record covers."""
    evaluate_every: int = 500
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also saved at the end and when the run is stopped."""
    skip_non_finite: int = 0
    """So many steps in a row whose loss or gradient is not finite are skipped: they change no parameter. One more ends
    the run; 0 ends it at the first."""
    hang_seconds: float | None = 1800.0
    """When no step ended for so long, the process ends with exit code 1 and the stacks of all threads; None waits for
    ever. Half an hour is longer than steps take and than file systems have bad moments, and short beside a night."""

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("evaluate_every", 0), ("checkpoint_every", 1), ("skip_non_finite", 0)):
            if getattr(self, name) < least:
                raise InputError(f"LoopConfig.{name} is {getattr(self, name)}, expected at least {least}")
        if self.hang_seconds is not None and not self.hang_seconds > 0:
            raise InputError(f"LoopConfig.hang_seconds is {self.hang_seconds}, expected more than 0, or None")


def run(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Iterator[Any],
    progress: Progress,
    *,
    steps: int,
    batch_size: int,
    config: LoopConfig,
    means: Callable[[dict[str, float]], dict[str, float]],
    extras: Callable[[int, float, int], dict[str, float]],
    evaluate: Callable[[Params], dict[str, float]],
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    log: Log,
    show_progress: bool,
    stop: Callable[[int], bool],
) -> tuple[TrainState, dict[str, float]]:
    """Takes steps until `steps` are done or a signal came. `progress` is brought up to date; the last state is saved.

    Args:
      step: compiled; takes the state and a batch on the devices. Nothing may have to be brought there for it: that
        would happen in every step.
      state: where to begin.
      batches: on the devices, from `progress.position` on.
      progress: of this state.
      steps: at which to end.
      batch_size: rows of a step.
      config: when to do what.
      means: sums of steps → what the log shows.
      extras: (updates of the parameters so far, seconds, number of steps) of a log record → more to show: learning
        rate, share of peak.
      evaluate: parameters → what the log shows.
      checkpoints: where to save. Where the best are kept, every evaluated state is saved, with its loss.
      metadata: stored with every checkpoint, beside `progress`.
      log: where to write.
      show_progress: draw a bar.
      stop: steps taken → whether the run is to end there; asked before every step, and the same on all processes.

    Returns:
      The last state, and its held-out figures; none when a signal ended the run before the last step.

    Raises:
      NonFiniteLoss: after the steps up to it are looked at; nothing from it on was saved.
    """
    bar = Bar(steps, progress.step, show_progress)
    pending: list[dict[str, jax.Array]] = []
    saved = progress.step if checkpoints.steps() else -1
    finished = progress.step
    begin = time.perf_counter()
    waited, told = 0.0, progress.checkpoint_seconds

    def describe_hang() -> str:
        return (
            f"no step ended for {config.hang_seconds:g} s (loop.hang_seconds). The last to end was step {finished};"
            f" step {progress.step} was given to the devices, with the rows up to {progress.position:,};"
            f" {_kept(saved)}."
        )

    watchdog = Watchdog(config.hang_seconds, describe_hang)

    def ended(number: int) -> None:
        nonlocal finished
        finished = number
        watchdog.heard()

    def settle() -> None:
        """Waits for the steps taken since the last record, checks and logs them."""
        nonlocal begin, waited, told
        if not pending:
            return
        records = [{name: float(value) for name, value in sums.items()} for sums in jax.device_get(pending)]
        seconds = time.perf_counter() - begin
        ended(progress.step)
        good, counts = progress.look(records, means, config.skip_non_finite, _kept(saved))
        tokens = sum(record["tokens"] for record in records)
        progress.tokens += tokens
        progress.seconds += seconds
        progress.data_wait_seconds += waited
        values = {}
        if good:
            sums = {name: sum(record[name] for record in good) for name in good[0]}
            values = means(sums) | {"gradient_norm": sums["gradient_norm"] / len(good)}
        values |= {
            "tokens": progress.tokens,
            "tokens_per_s": tokens / seconds,
            **extras(progress.step - progress.skipped, seconds, len(records)),
            **counts,
            "data_wait_seconds": waited,
            "data_wait_share": waited / seconds,
            "checkpoint_seconds": progress.checkpoint_seconds - told,
        }
        log(progress.step, "train", values)
        bar.update(progress.step, values)
        pending.clear()
        waited, told = 0.0, progress.checkpoint_seconds
        begin = time.perf_counter()

    def held_out() -> dict[str, float]:
        nonlocal begin
        settle()
        with watchdog.paused():
            figures = evaluate(state.params)
        log(progress.step, "evaluation", figures)
        begin = time.perf_counter()
        return figures

    def save(figures: dict[str, float], *, wait: bool) -> None:
        """Saves the state; `figures` are its own, where it was evaluated."""
        nonlocal saved, begin
        settle()  # a state is saved only after its step was seen to be finite
        start = time.perf_counter()
        with watchdog.paused():
            if saved != progress.step:
                about = metadata | {"progress": asdict(progress)}
                checkpoints.save(progress.step, state, about, score=figures.get("loss"), wait=wait)
                saved = progress.step
                progress.saves += 1
            elif wait:
                checkpoints.wait()
        begin = time.perf_counter()
        progress.checkpoint_seconds += begin - start

    try:
        with watchdog:
            while progress.step < steps and not stop(progress.step):
                start = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - start
                with jax.transfer_guard("disallow"):
                    state, sums = step(state, batch)
                pending.append(sums)
                progress.step += 1
                progress.position += batch_size
                if len(pending) > STEPS_AHEAD:
                    jax.block_until_ready(pending[-1 - STEPS_AHEAD])
                    ended(progress.step - STEPS_AHEAD)
                if progress.step % config.log_every == 0 or progress.step == steps:
                    settle()
                else:
                    bar.update(progress.step)
                if progress.step == steps:
                    break
                evaluated = bool(config.evaluate_every) and progress.step % config.evaluate_every == 0
                figures = held_out() if evaluated else {}
                if progress.step % config.checkpoint_every == 0 or (evaluated and checkpoints.keep_best):
                    save(figures, wait=False)
            if not checkpoints.keep_best:
                save({}, wait=True)  # first what could be lost, unless its figures belong to it
            figures = held_out() if progress.step >= steps else {}
            save(figures, wait=True)
    finally:
        bar.close()
    return state, figures


def _kept(saved: int) -> str:
    return f"the last good checkpoint is step {saved}" if saved >= 0 else "no checkpoint was saved yet"
