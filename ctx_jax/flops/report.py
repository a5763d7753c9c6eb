"""Costs as tables of at most 100 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ctx_jax.flops.architectures import ThreeCounts
from ctx_jax.flops.devices import Peak, roofline
from ctx_jax.flops.jaxpr import Count
from ctx_jax.flops.parts import Cost
from ctx_jax.flops.search import Candidate

NAME, PARAMETERS = 24, 13
LENGTHS_ABREAST = 2
UNIT = "1 multiply-add = 2 FLOP"


def forward_lines(counts: Sequence[ThreeCounts], peak: Peak | None, dtype: str, unit: str) -> Iterator[str]:
    """The encoder's forward pass at each length, by part and counted three ways."""
    for at in range(0, len(counts), LENGTHS_ABREAST):
        if at:
            yield ""
        yield from _block([c.formula for c in counts[at : at + LENGTHS_ABREAST]], unit)
    for found in counts:
        yield ""
        yield from _three_ways(found, unit)
        if peak is not None:
            yield _at_best(found.formula.matrix_flops, found.formula.bytes_moved, peak, dtype)


def _block(costs: Sequence[Cost], unit: str) -> Iterator[str]:
    what = lambda cost: f"{cost.rows} × {cost.length} {unit}" if cost.rows > 1 else f"{cost.length} {unit}"
    yield f"{'forward, GFLOP':<{NAME}}{'parameters':>{PARAMETERS}}" + "".join(f"{what(c):>29}" for c in costs)
    yield " " * (NAME + PARAMETERS) + "".join(f"{'products':>12}{'share':>8}{'other':>9}" for _ in costs)
    for number, part in enumerate(costs[0].parts):
        same = [cost.parts[number] for cost in costs]
        yield f"  {part.name:<{NAME - 2}}{part.parameters:>{PARAMETERS},}" + "".join(
            f"{_giga(p.matrix_flops):>12}{p.matrix_flops / cost.matrix_flops:>8.1%}{_giga(p.other_flops):>9}"
            for p, cost in zip(same, costs, strict=True)
        )
    yield f"  {'all':<{NAME - 2}}{costs[0].parameters:>{PARAMETERS},}" + "".join(
        f"{_giga(cost.matrix_flops):>12}{'':>8}{_giga(cost.other_flops):>9}" for cost in costs
    )
    yield f"  {f'a {unit[:-1]}, MFLOP':<{NAME - 2}}{'':>{PARAMETERS}}" + "".join(
        f"{cost.matrix_flops / cost.tokens / 1e6:>12.2f}{'':>8}{cost.other_flops / cost.tokens / 1e6:>9.2f}"
        for cost in costs
    )
    yield (
        f"  {'moved at least, MB':<{NAME - 2}}{'':>{PARAMETERS}}"
        + "".join(f"{cost.bytes_moved / 1e6:>12,.1f}{'':>17}" for cost in costs).rstrip()
    )


def _three_ways(counts: ThreeCounts, unit: str) -> Iterator[str]:
    formula, walk = counts.formula, counts.walk
    whole = formula.matrix_flops + formula.other_flops
    head = f"{formula.length} {unit}: "
    same = _versus(walk.matrix, formula.matrix_flops)
    yield f"  {head}products by formula {formula.matrix_flops:,}, by the jaxpr {same}"
    yield f"  {'':<{len(head)}}all FLOPs by formula {whole:,}, by the jaxpr {_versus(walk.flops, whole)},"
    off = (counts.xla - counts.xla_erf) / walk.flops - 1
    erf = f"; {off:+.2%} but for erf, a polynomial there" if counts.xla_erf else ""
    yield f"  {'':<{len(head)}}by XLA on a twin {counts.xla:,} ({counts.xla / walk.flops - 1:+.2%}{erf})"


def _versus(found: int, expected: int) -> str:
    return "equal" if found == expected else f"{found:,} ({found - expected:+,})"


def _at_best(matrix_flops: int, bytes_moved: int, peak: Peak, dtype: str) -> str:
    best = roofline(matrix_flops, bytes_moved, peak, dtype)
    balance = peak.flops_per_s(dtype) / peak.bytes_per_s
    return (
        f"  at best {_seconds(best.seconds)}, {best.bound}-bound in {dtype}: {bytes_moved / 1e6:,.0f} MB moved,"
        f" {best.flops_per_byte:,.0f} FLOP a byte (device {balance:,.0f})"
    )


def training_lines(cost: Cost, walk: Count, steps: int, peak: Peak | None, dtype: str) -> Iterator[str]:
    """One training step by part, beside the walk of the very step."""
    yield f"{'training step, GFLOP in':<{NAME}}{'forward':>12}{'backward':>12}{'again':>12}{'step':>12}{'share':>8}"
    yield f"products, {cost.rows} × {cost.length} tokens"
    total = cost.training_matrix_flops
    for part in cost.parts:
        forward, step = part.matrix_flops, part.training_matrix_flops
        yield (
            f"  {part.name:<{NAME - 2}}{_giga(forward):>12}{_giga(2 * forward):>12}{_giga(part.again_flops):>12}"
            f"{_giga(step):>12}{step / total:>8.1%}"
        )
    again = sum(part.again_flops for part in cost.parts)
    yield (
        f"  {'all':<{NAME - 2}}{_giga(cost.matrix_flops):>12}{_giga(2 * cost.matrix_flops):>12}{_giga(again):>12}"
        f"{_giga(total):>12}"
    )
    yield ""
    yield f"  products by formula {total:,}, by the jaxpr of the step {_versus(walk.matrix, total)}"
    yield f"  everything else in the step, by its jaxpr: {_giga(walk.flops - walk.matrix)} GFLOP"
    run = f"{steps:,} steps {total * steps:.3g} FLOP, {cost.tokens * steps:.3g} tokens"
    yield f"  a token {total / cost.tokens / 1e6:,.1f} MFLOP; {run}"
    if peak is not None:
        yield _at_best(total, cost.training_bytes, peak, dtype)


def cost_json(cost: Cost) -> dict[str, Any]:
    """A cost for JSON; every figure in FLOP, values or bytes."""
    return {
        "rows": cost.rows,
        "length": cost.length,
        "matrix_flops": cost.matrix_flops,
        "other_flops": cost.other_flops,
        "training_matrix_flops": cost.training_matrix_flops,
        "parameters": cost.parameters,
        "bytes_moved": cost.bytes_moved,
        "parts": [part._asdict() for part in cost.parts],
    }


def counts_json(counts: ThreeCounts) -> dict[str, Any]:
    """Three counts for JSON."""
    walk = counts.walk
    return {
        "formula": cost_json(counts.formula),
        "walk": {"matrix_flops": walk.matrix, "flops": walk.flops, "integer_operations": walk.integer},
        "xla": {"flops": counts.xla, "erf_flops": counts.xla_erf},
    }


def search_lines(candidates: Sequence[Candidate], peak: Peak, *, rows: int, length: int) -> Iterator[str]:
    """The candidates, numbered from 1."""
    yield (
        f"{'':>3}  {'layers':>6} {'width':>6} {'heads':>8} {'feed-forward':>14} {'window':>7} {'GFLOP':>7}"
        f" {'M params':>9} {'in layers':>9} {'at best':>9} {'memory':>8}"
    )
    for number, candidate in enumerate(candidates, 1):
        config = candidate.config
        best = candidate.time_at_best(peak, rows=rows, length=length)
        heads = f"{config.num_heads}×{config.hidden_size // config.num_heads}"
        gated, window = "gated" if config.gated else "", config.attention_window or "all"
        yield (
            f"{number:>3}  {config.num_layers:>6} {config.hidden_size:>6} {heads:>8}"
            f" {config.intermediate_size:>8,} {gated:>5} {window:>7}"
            f" {candidate.forward_flops / 1e9:>7.2f} {candidate.parameters / 1e6:>9.2f}"
            f" {candidate.layer_parameters / 1e6:>9.2f} {_seconds(best.seconds):>9}"
            f" {candidate.training_bytes(rows=rows, length=length) / 1e9:>5.1f} GB"
        )


def candidate_json(candidate: Candidate, peak: Peak, *, rows: int, length: int) -> dict[str, Any]:
    """A candidate for JSON; FLOP, seconds, bytes."""
    config = candidate.config
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "gated": config.gated,
        "attention_window": config.attention_window,
        "forward_flops": candidate.forward_flops,
        "parameters": candidate.parameters,
        "layer_parameters": candidate.layer_parameters,
        "seconds_at_best": candidate.time_at_best(peak, rows=rows, length=length).seconds,
        "training_bytes": candidate.training_bytes(rows=rows, length=length),
    }


def _giga(flops: int) -> str:
    return "·" if not flops else f"{flops / 1e9:,.3f}" if flops >= 1e8 else f"{flops / 1e9:.5f}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
