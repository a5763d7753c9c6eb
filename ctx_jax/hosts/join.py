"""How processes come together: by an address, or by what the surroundings say."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from ctx_jax.errors import InputError
from ctx_jax.hosts import service
from ctx_jax.hosts.relay import Relay
from ctx_jax.hosts.team import Members, Team

_QUIET = 5.0
"""Seconds to wait for others before saying so."""


@dataclass(frozen=True)
class Hosts:
    """The processes of one run, and which of them this is; where nothing is given the process is alone."""

    coordinator: str | None = None
    """`host:port` at which process 0 waits for the others: an address of its machine that all of them reach."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this is, from 0 on."""
    auto: bool = False
    """Ask the surroundings for these three: Cloud TPU, Slurm, Open MPI, Kubernetes. Slurm and Open MPI also say which
    of its machine's GPUs is this process's; else it takes all that it sees."""
    heartbeat_seconds: float = 30.0
    """A process that shows no sign of life for so long is gone, and the others end."""
    connect_seconds: float = 120.0
    """How long to wait at the start until all of them are there."""

    def __post_init__(self) -> None:
        given = {
            "coordinator": self.coordinator, "num-processes": self.num_processes, "process-id": self.process_id
        }  # fmt: skip
        missing = [f"--hosts.{name}" for name, value in given.items() if value is None]
        if self.auto and len(missing) < len(given):
            raise InputError("--hosts.auto finds coordinator, num-processes and process-id itself: give it, or these")
        if 0 < len(missing) < len(given):
            raise InputError(
                f"{' and '.join(missing)}: not given; the processes of a run need all three, or --hosts.auto"
            )
        for name, least in (("heartbeat_seconds", 2), ("connect_seconds", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"Hosts.{name} is {getattr(self, name)}, expected at least {least}")
        if not missing:
            _address(self.coordinator)
            if self.num_processes < 1:
                raise InputError(f"Hosts.num_processes is {self.num_processes}, expected at least 1")
            if not 0 <= self.process_id < self.num_processes:
                raise InputError(f"Hosts.process_id is {self.process_id}, expected 0 to {self.num_processes - 1}")


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[Team]:
    """Joins the processes of `hosts` for as long as the block lasts; nothing may have touched a device before.

    A process that leaves the block by an error tells the others, who end with exit code 1 and its words. When one is
    gone without a word, each of the others says so in one line and ends with exit code 1, wherever it stands.

    Raises:
      InputError: nobody answers at the coordinator's address, its port is taken, or some processes did not come.
    """
    team = _join(hosts) if hosts.auto or hosts.coordinator is not None else Team()
    try:
        yield team
        team.leave()
    except BaseException as error:
        team.fail(error)
        raise


def _join(hosts: Hosts) -> Team:
    until = time.monotonic() + hosts.connect_seconds
    coordinator, count, process, devices = hosts.coordinator, hosts.num_processes, hosts.process_id, None
    if hosts.auto:
        coordinator, count, process, devices = service.detect(hosts.connect_seconds)
    if count == 1:
        return Team()
    host, port = _address(coordinator)
    if process == 0:
        _require_free(port)
        relay = Relay("127.0.0.1", port)  # by whatever name the others know it
    else:
        _await_answer(host, port, hosts)
        relay = Relay(host, port)
    # It would take SIGTERM for itself; when to stop is agreed on here.
    jax.config.update("jax_enable_preemption_service", False)
    errors: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                relay.address,
                count,
                process,
                devices,
                "deactivate",  # what there is to detect, `detect` has
                coordinator_bind_address=f"[::]:{port}",
                # Its own limits end the process with a page of C++: they come long after ours.
                initialization_timeout=int(2 * hosts.connect_seconds) + 60,
                heartbeat_timeout_seconds=int(10 * hosts.heartbeat_seconds) + 300,
                shutdown_timeout_seconds=60,
            )
        except Exception as error:
            errors.append(error)

    waiting = threading.Thread(target=initialize, daemon=True)
    waiting.start()
    waiting.join(min(_QUIET, hosts.connect_seconds))
    if waiting.is_alive():
        _say(f"process {process} of {count}: waiting for the others, {hosts.connect_seconds:g} s in all")
        waiting.join(max(until - time.monotonic(), 0))
    if waiting.is_alive():
        service.forget()
        raise InputError(
            f"process {process} of {count}: not all of the {count} processes came to {coordinator} within"
            f" {hosts.connect_seconds:g} s (hosts.connect_seconds), or something else than process 0 listens there"
        )
    if errors:
        raise errors[0]
    try:
        return Members(process, count, hosts.heartbeat_seconds, relay)
    except jax.errors.JaxRuntimeError as error:
        service.forget()
        raise InputError(f"process {process} of {count}: another one left as soon as it came: {error}") from error


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"Hosts.coordinator is {coordinator!r}, expected host:port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)


def _require_free(port: int) -> None:
    """JAX takes the port on all addresses, and ends the process where it is taken."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise InputError(f"--hosts.coordinator: port {port} of this machine cannot be had: {error.strerror}") from error


def _await_answer(host: str, port: int, hosts: Hosts) -> None:
    begin, told = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((host, port), timeout=min(5, hosts.connect_seconds)).close()
        except OSError as error:
            reason, waited = error, time.monotonic() - begin
        if waited > hosts.connect_seconds:
            raise InputError(
                f"--hosts.coordinator: nobody answers at {host}:{port} within {hosts.connect_seconds:g} s"
                f" (hosts.connect_seconds): {reason}"
            )
        if waited > _QUIET and not told:
            _say(f"waiting for process 0 at {host}:{port}, {hosts.connect_seconds:g} s in all")
            told = True
        time.sleep(0.2)


def _say(text: str) -> None:
    print(f"ctx-jax: {text}", file=sys.stderr, flush=True)
