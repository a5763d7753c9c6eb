"""What many runs of the same work come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ctx_jax.errors import InputError


class Figures(NamedTuple):
    """Of the seconds that each run took.

    Attributes:
      runs: how many.
      median_s: p50.
      spread_s: between the first quartile and the third.
      p95_s: of 100 runs 95 took less; with few runs it lies between the longest two.
      p99_s: likewise.
    """

    runs: int
    median_s: float
    spread_s: float
    p95_s: float
    p99_s: float


def summarise(seconds: Sequence[float]) -> Figures:
    """Percentiles, interpolated between the two nearest runs.

    Raises:
      InputError: there is no run.
    """
    if not len(seconds):
        raise InputError("seconds: found none, expected at least one run")
    first, median, third, p95, p99 = map(float, np.percentile(seconds, [25, 50, 75, 95, 99]))
    return Figures(len(seconds), median, third - first, p95, p99)


def relative_difference(found: np.ndarray, expected: np.ndarray, mask: np.ndarray | None = None) -> float:
    """The largest difference beside the largest value, where the mask is 1; infinite where shapes differ or a value is
    not finite.

    Args:
      found: [B, T, D], or [N, D] without a mask.
      expected: likewise.
      mask: [B, T].
    """
    if found.shape != expected.shape:
        return float("inf")
    if mask is not None:
        found, expected = found[mask > 0], expected[mask > 0]
    difference = np.abs(found.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")
