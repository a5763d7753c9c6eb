"""The process of one peer, and what it answers."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ctx_jax
from ctx_jax.benchmark.peers import OURS, WORKER, Peer
from ctx_jax.errors import InputError

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(256 << 20)}
"""Tells glibc to keep freed memory, as `ctx_jax.memory.keep_memory` does, for everybody alike."""
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
SHARE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""On a GPU we take no more memory than we need, unless told otherwise: peers are on it at the same time."""
TAIL_LINES = 6
"""Of what a process that ended said."""


class Died(Exception):
    """A peer's process ended, with the last lines that it said."""


class Worker:
    """A peer in a process of its own; it waits while others run.

    Attributes:
      about: what it said of itself when it had loaded.
      started: when its process began, by `time.perf_counter`.
    """

    def __init__(self, peer: Peer, python: str, cores: Sequence[int]):
        environment = {**SHARE, **os.environ, **KEEP_MEMORY, **QUIET}
        if cores:
            environment["OMP_NUM_THREADS"] = str(len(cores))
        if peer == OURS:
            # This very ctx_jax. Others need none, and could not use what else may lie beside it.
            source = os.fspath(pathlib.Path(ctx_jax.__file__).resolve().parent.parent)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
        self.about: dict[str, Any] = {}
        # A file and not a pipe: nobody reads it while the peer runs.
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `close`)
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [python, os.fspath(WORKER), os.fspath(peer.file), json.dumps(list(cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )

    def load(
        self, folder: pathlib.Path, options: Mapping[str, Any], inputs: pathlib.Path, pool: str | None = None
    ) -> None:
        """Reads model and inputs; `pool` is "mean" where rows of ids are to give one vector each."""
        self.about = self._ask(do="load", folder=str(folder), options=dict(options), inputs=str(inputs), pool=pool)

    def run(self, out: pathlib.Path | None = None) -> float:
        """Seconds of one run; its result goes to a file if there is one."""
        return self._ask(do="run", out=None if out is None else str(out))["seconds"]

    def peak_bytes(self) -> int:
        """The most memory that its process has had."""
        return self._ask(do="memory")["peak_bytes"]

    def device_peak(self) -> dict[str, Any] | None:
        """Fields of `flops.devices.Peak`; None where nobody knows."""
        return self._ask(do="peak")

    def _ask(self, **request: Any) -> Any:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> Died:
        code = self._process.wait()
        self._said.seek(0)
        lines = [line.rstrip() for line in self._said if line.strip()]
        return Died("\n".join([f"ended with exit code {code}", *lines[-TAIL_LINES:]]))

    def close(self) -> None:
        """Ends the process; a second time it does nothing."""
        if self._said.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def importable(python: str, modules: Iterable[str]) -> set[str]:
    """Those of the modules that a Python has.

    Raises:
      InputError: there is no such Python.
    """
    code = "import sys, json, importlib.util as u; print(json.dumps([m for m in sys.argv[1:] if u.find_spec(m)]))"
    try:
        done = subprocess.run([python, "-c", code, *sorted(modules)], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"--peer-python {python}: {error}, expected a Python") from error
    return set(json.loads(done.stdout))
