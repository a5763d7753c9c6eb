"""One piece of work, by us and by every peer: outputs compared first, then runs in turn."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from ctx_jax.benchmark.figures import Figures, relative_difference, summarise
from ctx_jax.benchmark.peers import OURS, Peer
from ctx_jax.benchmark.process import Died, Worker
from ctx_jax.benchmark.subjects import Subject
from ctx_jax.benchmark.work import Work
from ctx_jax.flops.devices import Peak, Roofline, roofline

BOUND = {"float32": 1e-4, "bfloat16": 0.1}
"""Of the largest difference beside the largest value, by type: beyond it a peer computes something else."""
WARM_UP = 2
"""Runs after the first that do not count."""
CORES_TO_START = 4
"""For each peer: where there are so many, all start at once, which on a GPU is most of the time that a race takes."""
REST_S = 0.02
"""Before each run: the threads of the process that ran before may look out for more work a while."""

Status = Literal["measured", "differs", "failed", "left out"]


@dataclass(frozen=True)
class Setting:
    """What holds for every run.

    Attributes:
      python: of our own process.
      peer_python: of the peers'.
      cores: that every process may use, by number; as many threads. Empty where they cannot be chosen.
      threads: how many.
      repeats: runs that count.
      peer_batch: texts that peers take at once.
      ours: who the others are measured beside.
    """

    python: str
    peer_python: str
    cores: tuple[int, ...]
    threads: int
    repeats: int = 15
    peer_batch: int = 32
    ours: Peer = OURS


class Row(NamedTuple):
    """One peer's part of a race.

    Attributes:
      who: the peer.
      status: what became of it.
      note: why it is not measured, or has no ratio.
      figures: of its runs.
      start_s: from the start of its process to its first result.
      compile_s: by how much the first run was longer than the median.
      peak_bytes: the most memory that its process had.
      difference: of its output from ours, relative.
      ratio: its median over ours; above 1 we are faster.
      about: device and versions.
    """

    who: str
    status: Status
    note: str = ""
    figures: Figures | None = None
    start_s: float | None = None
    compile_s: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    ratio: float | None = None
    about: Mapping[str, Any] = MappingProxyType({})


class Race(NamedTuple):
    """One piece of work of one model in one type.

    Attributes:
      subject: the model.
      work: what was computed.
      dtype: of the computation.
      peak: of the device, measured in the same process and on the same threads as our runs; None where nobody knows.
      floor: the least time by the roofline; None without a peak.
      rows: of everybody, ours first.
    """

    subject: Subject
    work: Work
    dtype: str
    peak: Peak | None
    floor: Roofline | None
    rows: tuple[Row, ...]


@dataclass
class _Runner:
    """A peer that runs."""

    worker: Worker
    start_s: float
    first_s: float
    output: np.ndarray
    seconds: list[float] = field(default_factory=list)
    difference: float | None = None


def cores_for(threads: int | None) -> tuple[int, ...]:
    """Cores for so many threads, all that this process may use where it is None; none where the system cannot say."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return tuple(sorted(os.sched_getaffinity(0))[-threads if threads else 0 :])


def race(
    subject: Subject,
    work: Work,
    dtype: str,
    peers: Sequence[Peer],
    setting: Setting,
    folder: pathlib.Path,
    *,
    left_out: Sequence[Row] = (),
    done: Callable[[int], object] = lambda count: None,
    say: Callable[[str], object] = lambda line: None,
) -> Race:
    """Measures one piece of work.

    Args:
      subject: the model.
      work: of it.
      dtype: of the computation.
      peers: who runs beside us.
      setting: of all runs.
      folder: for outputs.
      left_out: rows of those who do not run.
      done: is told 1 after every round, of which there are `setting.repeats`.
      say: is told who has started, in words.
    """
    rows: dict[str, Row] = {}
    runners: dict[str, _Runner] = {}
    peak, ours = None, None
    with contextlib.ExitStack() as stack:

        def start(peer: Peer) -> _Runner | Died:
            try:
                runner = _start(peer, subject, work, dtype, setting, folder, ours, stack)
            except Died as error:
                say(f"{subject.name}: {peer.name} ended")
                return error
            say(f"{subject.name}: {peer.name} had its first result after {runner.start_s:.1f} s")
            return runner

        first = start(setting.ours)
        ours = first if isinstance(first, _Runner) else None
        at_once = len(peers) if setting.threads >= CORES_TO_START * len(peers) else 1
        with concurrent.futures.ThreadPoolExecutor(max(at_once, 1)) as pool:
            others = list(pool.map(start, peers))
        for name, runner in zip((peer.name for peer in (setting.ours, *peers)), (first, *others), strict=True):
            if isinstance(runner, Died):
                rows[name] = Row(name, "failed", str(runner))
                continue
            if ours is not None and runner is not ours:
                runner.difference = relative_difference(runner.output, ours.output, work.mask)
                if not runner.difference <= BOUND[dtype]:
                    note = f"outputs differ by {runner.difference:.1e}, expected {BOUND[dtype]:g} at most"
                    about, difference = runner.worker.about, runner.difference
                    rows[name] = Row(name, "differs", note, difference=difference, about=about)
                    runner.worker.close()
                    continue
            runners[name] = runner
        for _ in range(WARM_UP):
            _turn(runners, rows)
        for _ in range(setting.repeats):
            for name, seconds in _turn(runners, rows).items():
                runners[name].seconds.append(seconds)
            done(1)
        ours = runners.get(setting.ours.name)
        for name, runner in list(runners.items()):
            with _noting_death(name, runners, rows):
                rows[name] = _measured(name, runner, ours)
        if setting.ours.name in runners:
            # Last of all: what it takes in memory is not to count.
            with _noting_death(setting.ours.name, runners, rows):
                peak = ours.worker.device_peak()
    peak = None if peak is None else Peak(**peak)
    floor = roofline(work.matrix_flops, work.bytes_moved, peak, dtype) if peak and work.matrix_flops else None
    in_order = [rows[peer.name] for peer in (setting.ours, *peers)]
    return Race(subject, work, dtype, peak, floor, (*in_order, *left_out))


def _start(
    peer: Peer,
    subject: Subject,
    work: Work,
    dtype: str,
    setting: Setting,
    folder: pathlib.Path,
    ours: _Runner | None,
    stack: contextlib.ExitStack,
) -> _Runner:
    """Starts a process and has it run twice: once for the clock, once for the output."""
    options = {
        "dtype": dtype,
        "threads": setting.threads,
        "device": None if ours is None else ours.worker.about["device"],
        "batch": setting.peer_batch,
        "max_length": subject.longest,
        "texts": work.shape is None,
        "static": subject.static,
    }
    worker = Worker(peer, setting.python if peer == setting.ours else setting.peer_python, setting.cores)
    stack.callback(worker.close)
    worker.load(subject.folder, options, work.inputs, work.pool)
    first = worker.run()
    start = time.perf_counter() - worker.started
    out = folder / f"{peer.name}.npy"
    worker.run(out)
    return _Runner(worker, start, first, np.load(out))


def _turn(runners: dict[str, _Runner], rows: dict[str, Row]) -> dict[str, float]:
    """One run of each, one after the other, in the same order every time."""
    found = {}
    for name in list(runners):
        time.sleep(REST_S)
        with _noting_death(name, runners, rows):
            found[name] = runners[name].worker.run()
    return found


@contextlib.contextmanager
def _noting_death(name: str, runners: dict[str, _Runner], rows: dict[str, Row]) -> Iterator[None]:
    """Who ends is out of the race, and the others go on."""
    try:
        yield
    except Died as error:
        rows[name] = Row(name, "failed", str(error), about=runners[name].worker.about)
        del runners[name]


def _measured(name: str, runner: _Runner, ours: _Runner | None) -> Row:
    figures = summarise(runner.seconds)
    note, ratio, about = "", None, runner.worker.about
    if ours is not None and runner is not ours:
        device = ours.worker.about["device"]
        if about["device"] == device:
            ratio = figures.median_s / summarise(ours.seconds).median_s
        else:
            note = f"ran on the {about['device']}, ours on the {device}"
    compile_s = max(runner.first_s - figures.median_s, 0.0)
    memory = runner.worker.peak_bytes()
    return Row(name, "measured", note, figures, runner.start_s, compile_s, memory, runner.difference, ratio, about)
