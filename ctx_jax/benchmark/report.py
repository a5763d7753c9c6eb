"""Races as a table for people and as one JSON object for programs."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ctx_jax
from ctx_jax.benchmark.race import BOUND, Race, Row, Setting
from ctx_jax.flops.architectures import describe, unit

WIDTH, INDENT = 120, " " * 24


def title(race: Race) -> str:
    """What races of one table have in common."""
    shape = race.work.shape
    what = f"{race.work.sentences:,} texts" if shape is None else f"{shape.batch} × {shape.length}"
    fetched = (
        "all vectors" if race.work.pool is None else f"{race.work.pool} of each {'text' if shape is None else 'row'}"
    )
    return f"{what}, {race.dtype}, {fetched}"


def head(race: Race) -> list[str]:
    """The beginning of a table."""
    return [title(race), *(_line([column[place] for column in _COLUMNS]) for place in (0, 2))]


def lines(race: Race) -> Iterator[str]:
    """One model's part of a table: the least time first, then a line for everybody."""
    subject, work = race.subject, race.work
    about = f"{subject}; {work.tokens:,} {unit(subject.config)}, {work.matrix_flops / 1e9:,.2f} GFLOP in products"
    yield from textwrap.wrap(about, WIDTH, subsequent_indent="  ")
    if race.floor is not None:
        rate = race.peak.flops_per_s(race.dtype) / 1e9
        floor = (
            f"  roofline {_ms(race.floor.seconds)} ms, bound by {race.floor.bound}: {rate:,.0f} GFLOP/s,"
            f" {race.peak.bytes_per_s / 1e9:,.1f} GB/s ({race.peak.source})"
        )
        yield from textwrap.wrap(floor, WIDTH, subsequent_indent="  ")
    for row in race.rows:
        yield from _row_lines(row, race)


def machine(setting: Setting) -> dict[str, Any]:
    """Where it was measured, and when."""
    return {
        "processor": _processor(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "threads": setting.threads,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "ctx_jax": ctx_jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def as_json(races: Iterable[Race], setting: Setting, command: Sequence[str]) -> dict[str, Any]:
    """Everything, in seconds, bytes and FLOP."""
    return {
        "command": list(command),
        "machine": machine(setting),
        "repeats": setting.repeats,
        "peer_batch": setting.peer_batch,
        "bound": BOUND,
        "races": [_race_json(race) for race in races],
    }


def failed(races: Iterable[Race]) -> bool:
    """Whether somebody ended early or computed something else."""
    return any(row.status in ("failed", "differs") for race in races for row in race.rows)


_COLUMNS = (
    ("", -24, ""),
    ("median", 8, "ms"),
    ("spread", 8, "ms"),
    ("p95", 8, "ms"),
    ("p99", 8, "ms"),
    ("rows/s", 9, ""),
    ("tokens/s", 11, ""),
    ("GFLOP/s", 8, ""),
    ("of peak", 8, ""),
    ("start", 7, "s"),
    ("compile", 8, "s"),
    ("memory", 7, "GB"),
    ("ratio", 6, ""),
)
"""Names, widths (negative: to the left) and units."""


def _line(cells: Sequence[str]) -> str:
    padded = [
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for cell, (_, width, _) in zip(cells, _COLUMNS, strict=True)
    ]
    return "".join(padded).rstrip()


def _row_lines(row: Row, race: Race) -> Iterator[str]:
    if row.figures is None:
        first, *more = row.note.splitlines() or [""]
        yield from textwrap.wrap(f"  {row.who:<22}{row.status}: {first}", WIDTH, subsequent_indent=INDENT)
        for line in more:
            yield from textwrap.wrap(line, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        return
    figures, rates = row.figures, _rates(row, race)
    share = rates["share_of_peak"]
    yield _line(
        [
            f"  {row.who}",
            *map(_ms, (figures.median_s, figures.spread_s, figures.p95_s, figures.p99_s)),
            _count(rates["sentences_per_s"]),
            _count(rates["tokens_per_s"]),
            _count(rates["flops_per_s"] / 1e9),
            "" if share is None else f"{share:.1%}",
            f"{row.start_s:.1f}",
            f"{row.compile_s:.1f}",
            f"{row.peak_bytes / 1e9:.2f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
        ]
    )
    if row.note:
        yield INDENT + row.note


def _rates(row: Row, race: Race) -> dict[str, float | None]:
    """At the median."""
    seconds, work = row.figures.median_s, race.work
    flops_per_s = work.matrix_flops / seconds
    return {
        "sentences_per_s": work.sentences / seconds,
        "tokens_per_s": work.tokens / seconds,
        "flops_per_s": flops_per_s,
        "share_of_peak": race.floor and flops_per_s / race.peak.flops_per_s(race.dtype),
    }


def _race_json(race: Race) -> dict[str, Any]:
    subject, work = race.subject, race.work
    rows = []
    for row in race.rows:
        measured = {} if row.figures is None else row.figures._asdict() | _rates(row, race)
        rows.append({**row._asdict(), "about": dict(row.about), "figures": measured or None})
    return {
        "model": subject.name,
        "sizes": describe(subject.config),
        "static": subject.static,
        "dtype": race.dtype,
        "shape": work.shape and work.shape._asdict(),
        "pool": work.pool,
        "sentences": work.sentences,
        "tokens": work.tokens,
        "unit": unit(subject.config),
        "matrix_flops": work.matrix_flops,
        "bytes_moved": work.bytes_moved,
        "peak": race.peak and race.peak._asdict(),
        "floor": race.floor and race.floor._asdict(),
        "rows": rows,
    }


def _ms(seconds: float) -> str:
    """Three figures, or all before the point."""
    ms = 1000 * seconds
    return f"{ms:,.{2 if ms < 10 else 1 if ms < 100 else 0}f}"


def _count(value: float) -> str:
    return f"{value:,.{1 if value < 100 else 0}f}"


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
