"""How numbers are written, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ctx_jax.atlas.results import Score

MISSING = "–"
Number = float | Score | None


def number(found: Number) -> float:
    """A float; NaN where there is none, the mean of a score."""
    if isinstance(found, Score):
        found = found.mean
    return float("nan") if found is None or not math.isfinite(found) else float(found)


def points(found: Number) -> float:
    """A fraction in hundredths, the unit of accuracies in papers."""
    return 100 * number(found)


def shown(found: Number, digits: int = 1) -> str:
    """With so many digits after the point, "–" where there is none."""
    value = number(found)
    return MISSING if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def count(found: Number) -> str:
    """To three digits: 22.7 M."""
    value = number(found)
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return MISSING if math.isnan(value) else f"{value:.3g}"


def best(values: Sequence[Number]) -> int | None:
    """Where the highest is, the first of equals; None where all are missing."""
    there = [(number(value), -place) for place, value in enumerate(values) if not math.isnan(number(value))]
    return -max(there)[1] if there else None
