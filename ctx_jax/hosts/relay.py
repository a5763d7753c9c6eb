"""Between this process's client and process 0: what does not break on this side when it breaks on the other."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Relay:
    """Carries bytes between this process's client and process 0, and keeps the client's side open whatever happens.

    Attributes:
      address: where the client connects.
      broken: when process 0 closed a connection, or would not take one; None as long as it did not.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._near = socket.create_server(("127.0.0.1", 0))
        self._kept: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._near.getsockname()[1]}"
        self.broken: float | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._near.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._near.accept()
            except OSError:
                return  # closed
            self._kept.append(near)
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                self._break()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        hung_up = threading.Event()

        def outwards() -> None:
            _pump(near, far)
            hung_up.set()
            far.close()

        threading.Thread(target=outwards, daemon=True).start()
        _pump(far, near)
        if not hung_up.is_set():
            self._break()

    def _break(self) -> None:
        self.broken = self.broken or time.monotonic()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
