"""Ends a process whose steps no longer come: a device call that does not return cannot be interrupted from Python."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator

TICKS = 20
"""In so many parts is the time counted. Parts that the thread was awake for, not a clock: a process that was stopped
(ctrl-Z, a debugger, a laptop's lid) did not hang."""


class Watchdog:
    """Ends the process with exit code 1 and the stacks of all threads when nothing was heard for too long.

    It listens from the first `heard` on: what comes before, such as a first step, may take any time. So may what is
    done while it is `paused`. A call that never lets go of Python's lock stops it too.
    """

    def __init__(self, seconds: float | None, describe: Callable[[], str]):
        """Nothing is watched yet.

        Args:
          seconds: without a sign of life; None watches nothing.
          describe: one line for whoever finds the process dead.
        """
        self._seconds = seconds
        self._describe = describe
        self._signs = 0
        self._paused = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heard(self) -> None:
        """A sign of life."""
        self._signs += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing needs to be heard meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._signs += self._signs > 0  # what was listened to is listened to afresh
            self._paused = False

    def __enter__(self) -> Watchdog:
        """Starts to listen."""
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops to."""
        self._done.set()
        if self._seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        last, ticks = 0, 0
        while not self._done.wait(self._seconds / TICKS):
            if self._paused or self._signs != last or not last:
                last, ticks = self._signs, 0
                continue
            ticks += 1
            if ticks == TICKS:
                self._end()

    def _end(self) -> None:
        try:
            print(self._describe(), "Stacks of all threads:", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        finally:
            os._exit(1)
