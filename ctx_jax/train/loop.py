"""Steps one after the other: log, evaluate, save, stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import jax

from ctx_jax.checkpoint import Checkpoints
from ctx_jax.nn.parameters import Params
from ctx_jax.train.log import Bar, Log
from ctx_jax.train.step import TrainState

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
      seconds: time spent in steps, compilation and evaluation not counted.
    """

    step: int = 0
    position: int = 0
    tokens: float = 0.0
    seconds: float = 0.0


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
    """When to log, evaluate and save."""

    log_every: int = 10
    """Steps a log record covers."""
    evaluate_every: int = 500
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also saved at the end and when the run is stopped."""


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
) -> TrainState:
    """Takes steps until `steps` are done or a signal came. `progress` is brought up to date; the last state is saved.

    Args:
      step: compiled; takes the state and a batch on the devices.
      state: where to begin.
      batches: on the devices, from `progress.position` on.
      progress: of this state.
      steps: at which to end.
      batch_size: rows of a step.
      config: when to do what.
      means: sums of steps → what the log shows.
      extras: (step, seconds, number of steps) of a log record → more to show: learning rate, share of peak.
      evaluate: parameters → what the log shows.
      checkpoints: where to save.
      metadata: stored with every checkpoint, beside `progress`.
      log: where to write.
      show_progress: draw a bar.
      stop: steps taken → whether the run is to end there; asked before every step, and the same on all processes.

    Raises:
      NonFiniteLoss: after the steps up to it are looked at; nothing from it on was saved.
    """
    bar = Bar(steps, progress.step, show_progress)
    pending: list[dict[str, jax.Array]] = []
    saved = progress.step if checkpoints.steps() else -1
    begin = time.perf_counter()

    def settle() -> None:
        """Waits for the steps taken since the last record, checks and logs them."""
        nonlocal begin
        if not pending:
            return
        records = jax.device_get(pending)
        seconds = time.perf_counter() - begin
        first = progress.step - len(records) + 1
        for number, record in enumerate(records, first):
            for name, value in record.items():
                if not math.isfinite(value):
                    kept = f"the last good checkpoint is step {saved}" if saved >= 0 else "no checkpoint was saved yet"
                    raise NonFiniteLoss(f"step {number}: {name} is {value}; {kept}")
        sums = {name: float(sum(record[name] for record in records)) for name in records[0]}
        progress.tokens += sums["tokens"]
        progress.seconds += seconds
        values = means(sums) | {
            "gradient_norm": sums["gradient_norm"] / len(records),
            "tokens": progress.tokens,
            "tokens_per_s": sums["tokens"] / seconds,
            **extras(progress.step, seconds, len(records)),
        }
        log(progress.step, "train", values)
        bar.update(progress.step, values)
        pending.clear()
        begin = time.perf_counter()

    def save(wait: bool) -> None:
        nonlocal saved, begin
        if saved != progress.step:
            settle()  # a state is saved only after its step was seen to be finite
            checkpoints.save(progress.step, state, metadata | {"progress": asdict(progress)}, wait=wait)
            saved = progress.step
        elif wait:
            checkpoints.wait()
        begin = time.perf_counter()

    try:
        while progress.step < steps and not stop(progress.step):
            state, sums = step(state, next(batches))
            pending.append(sums)
            progress.step += 1
            progress.position += batch_size
            if len(pending) > STEPS_AHEAD:
                jax.block_until_ready(pending[-1 - STEPS_AHEAD])
            if progress.step % config.log_every == 0 or progress.step == steps:
                settle()
            else:
                bar.update(progress.step)
            if config.evaluate_every and progress.step % config.evaluate_every == 0 and progress.step < steps:
                settle()
                log(progress.step, "evaluation", evaluate(state.params))
                begin = time.perf_counter()
            if progress.step % config.checkpoint_every == 0 and progress.step < steps:
                save(wait=False)
        save(wait=True)
    finally:
        bar.close()
    return state
