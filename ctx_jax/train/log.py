"""What a run tells: JSON lines always, TensorBoard where it is installed, a progress bar where someone looks."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import sys
from typing import Any

from tqdm import tqdm

SHOWN = {"loss": "loss", "tokens_per_s": "tokens/s", "share_of_peak": "peak"}


class Log:
    """`log.jsonl` of a run directory: one record a line, each with its step. Only process 0 writes.

    Args:
      path: of the file.
      resume_step: records after this step are dropped: the steps are taken again, and each stands once in the log.
      write: False on all processes but the first.
    """

    def __init__(self, path: pathlib.Path, *, resume_step: int = 0, write: bool = True):
        self.path = path
        self._file = None
        self._board = None
        if not write:
            return
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step] if resume_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resume_step + 1)

    def __call__(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Writes a record of a kind: `train`, `evaluation`, …"""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Log:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flushes and closes."""
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def _whole_lines(path: pathlib.Path) -> list[str]:
    """Lines that are JSON; a line that a killed process wrote half is none."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            json.loads(line)
        except ValueError:
            continue
        lines.append(line)
    return lines


class Bar:
    """Steps done and left, rate, time left, loss."""

    def __init__(self, steps: int, start: int, show: bool):
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not show,
            file=sys.stderr,
            mininterval=0.5,
        )

    def update(self, step: int, record: dict[str, float] | None = None) -> None:
        """Moves to a step and shows a record's values."""
        if record:
            shown = {
                label: f"{record[name]:.1%}" if name == "share_of_peak" else _short(record[name])
                for name, label in SHOWN.items()
                if record.get(name) is not None
            }
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._bar.close()


def _short(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.3f}"
