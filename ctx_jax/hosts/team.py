"""The processes of a run: who lives, who failed, when to stop."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from ctx_jax.errors import InputError
from ctx_jax.hosts import service
from ctx_jax.hosts.relay import Relay

_PATIENCE = 20.0
"""Seconds that a process which ends gives itself to say so, and the others to hear of it."""
_TOGETHER = 3.0
"""Seconds between hearing that another failed and ending: one that fails for the same reason says so itself."""
_LEAVE_SECONDS = 3600.0
"""How long the first to be done waits for the last; one that dies meanwhile is noticed all the same."""
# What broke on the way to another process: the status that XLA, Gloo, NCCL or the coordination service gave it.
_STATUS = re.compile(r"\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):")


def on_first_process(change: Callable[[], object]) -> None:
    """Changes files from the first process, and lets none go on before it is done."""
    if jax.process_index() == 0:
        change()
    wait_for_all()


def wait_for_all() -> None:
    """Lets no process go on before all have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("ctx_jax.hosts")


class Team:
    """The processes of a run, seen from one of them; made without arguments, one that is alone.

    Attributes:
      process: which of them this is.
      count: how many there are.
      describe: what there is to say of the run when it ends unexpectedly, such as its last checkpoint.
      stopped: why the processes stop; "" while they do not.
    """

    def __init__(self, process: int = 0, count: int = 1) -> None:
        self.process = process
        self.count = count
        self.describe: Callable[[], str] = lambda: ""
        self.stopped = ""

    def stop_at(self, step: int, wanted: str) -> bool:
        """Whether all the processes stop at this step; each of them asks before every step that it takes.

        Asking takes a lock and sends nothing. Every process has a thread that looks into the store once a second or so.
        When one process wants to stop, these threads hold each process before its next step, tell the step that it
        stands at, and let it go on when all have told theirs: they stop one step after the largest, which none has
        passed. The devices are not waited for.

        Args:
          step: steps taken.
          wanted: why this process wants to stop, such as a signal's name; "" if it does not.
        """
        self.stopped = self.stopped or wanted
        return bool(wanted)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends, which it then does with exit code 2 for an InputError and else 1.

        Does not return where it is another's end that broke this one.
        """

    def leave(self) -> None:
        """Returns when all the processes are done."""


class Members(Team):
    """Several processes. Two threads each: one looks into the store, which may never answer, and one judges."""

    def __init__(self, process: int, count: int, heartbeat_seconds: float, relay: Relay) -> None:
        super().__init__(process, count)
        self._heartbeat = heartbeat_seconds
        # All read what all have written: with many processes less often, so that process 0 keeps up.
        self._period = min(max(1.0, count / 64), heartbeat_seconds / 10)
        self._relay = relay
        self._store = service.Store()
        self._store.set(f"name/{process}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._store.barrier("names", heartbeat_seconds)
        self._names = self._store.read()
        self._closing = threading.Event()
        self._answered = time.monotonic()  # when the store last did
        self._signs = dict.fromkeys(range(count), ("", self._answered))  # each one's sign of life, and since when
        self._failure: tuple[str, float] | None = None  # why one failed, and when this process heard of it
        self._last_word = threading.Lock()  # of this process: never given back by the thread that has it
        self._held, self._holding = threading.Lock(), False
        self._wanted, self._step, self._stop_step = "", -1, None  # -1: no step was taken or begun
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._look_on, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop_at(self, step: int, wanted: str) -> bool:
        self._wanted = wanted
        with self._held:
            self._step = step
            return self._stop_step is not None and step >= self._stop_step

    def fail(self, error: BaseException) -> None:
        if _came_from_outside(error):
            # If another is gone, the judge finds out meanwhile, says so and ends this process.
            time.sleep(self._heartbeat + 3 * self._period + _TOGETHER)
        if not self._last_word.acquire(blocking=False):
            threading.Event().wait()  # the judge has spoken, and ends this process
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        self._tell(f"{self._name(self.process)} failed: {kind}{' '.join(str(error).split())[:1000]}")
        self._close()
        service.forget()
        # The end of Python would wait for processes and devices that do not answer any more.
        atexit.register(_exit_now, 2 if isinstance(error, InputError) else 1)

    def leave(self) -> None:
        self._store.barrier("end", _LEAVE_SECONDS)
        self._close()
        jax.distributed.shutdown()
        self._relay.close()

    def _name(self, process: int) -> str:
        return f"process {process} of {self.count} ({self._names.get(f'name/{process}', 'unknown')})"

    def _close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(_TOGETHER)  # in vain where it waits for an answer that does not come

    def _look_on(self) -> None:
        """Shows that this process lives, and looks what the others show."""
        count = 0
        while not self._closing.wait(0.1 if self._holding else self._period):
            count += 1
            try:
                self._store.set(f"alive/{self.process}", str(count))
                found = self._store.read()
                self._agree_to_stop(found)
                if "failure" in found and self._failure is None:
                    self._store.set(f"told/{self.process}", "")
                    self._failure = found["failure"], time.monotonic()
            except Exception:
                continue  # the judge sees for how long there has been no answer
            now = time.monotonic()
            paused = now - self._answered > self._heartbeat / 2  # this process may itself have slept: count afresh
            for process, (before, _) in self._signs.items():
                sign = found.get(f"alive/{process}", "")
                if sign != before or paused:
                    self._signs[process] = sign, now
            self._answered = now

    def _agree_to_stop(self, found: dict[str, str]) -> None:
        if self._stop_step is not None:
            return
        if "stop" not in found:
            if self._wanted:
                self._store.set_first("stop", f"{self._wanted} of {self._name(self.process)}")
            return
        if not self._holding:
            self._held.acquire()
            self._holding = True
        self._store.set(f"step/{self.process}", str(self._step))
        steps = [int(value) for name, value in found.items() if name.startswith("step/")]
        if len(steps) == self.count:
            self.stopped, self._stop_step = found["stop"], max(steps) + 1
            self._holding = False
            self._held.release()

    def _judge(self) -> None:
        """Ends this process when another is gone or has failed."""
        before = time.monotonic()
        while not self._closing.wait(0.5):
            now = time.monotonic()
            if now - before > _TOGETHER:  # this process slept, and its other thread as well
                self._answered = now
            before = now
            verdict = self._verdict(now)
            if verdict and self._last_word.acquire(blocking=False):
                self._end(verdict)

    def _verdict(self, now: float) -> str:
        if self._failure is not None:
            words, heard = self._failure
            return words if now - heard > _TOGETHER else ""
        if lost := self._lost():
            return f"{self._name(0)} is gone: {lost}"
        for process, (_, since) in self._signs.items():
            silent = self._answered - since
            if process != self.process and silent > self._heartbeat:
                return f"{self._name(process)} is gone: no sign of life for {silent:.0f} s"
        return ""

    def _lost(self) -> str:
        """What says that process 0 is gone, which holds the store."""
        now = time.monotonic()
        if self._relay.broken is not None and now - self._relay.broken > _TOGETHER:
            return "it closed the connection"
        silent = now - self._answered
        return f"no answer for {silent:.0f} s" if silent > self._heartbeat else ""

    def _end(self, verdict: str) -> NoReturn:
        _exit_in(_PATIENCE)  # also when a folder does not answer, or a thread does not give Python's lock back
        described = ""
        with contextlib.suppress(Exception):
            described = self.describe()
        print(f"\nctx-jax: {'; '.join(filter(None, (verdict, described)))}", file=sys.stderr, flush=True)
        self._tell(verdict)
        os._exit(1)

    def _tell(self, words: str) -> None:
        """Has the others know why this process ends. Process 0 stays until they have heard, for it holds the store."""
        if self._lost():
            return
        with contextlib.suppress(Exception):
            self._store.set_first("failure", words)
            self._store.set(f"told/{self.process}", "")
            until = time.monotonic() + _PATIENCE / 2
            while self.process == 0 and time.monotonic() < until:
                now, found = time.monotonic(), self._store.read()
                living = [p for p, (_, since) in self._signs.items() if now - since <= self._heartbeat]
                if all(f"told/{process}" in found for process in living):
                    return
                time.sleep(0.1)


def _came_from_outside(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, bears a status of what broke between processes."""
    if error is None or isinstance(error, InputError):
        return False
    return bool(_STATUS.search(str(error))) or _came_from_outside(error.__cause__ or error.__context__)


def _exit_in(seconds: float) -> None:
    """Ends the process with exit code 1 then, from a thread that needs no lock of Python's."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_NOWHERE)


def _exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_NOWHERE = open(os.devnull, "w")  # noqa: SIM115 (written to when nothing else can be done any more)
