"""Losses that stick out: counted, so that they are seen; nothing is done about them.

A step's loss is a spike when it is more than DEVIATIONS robust deviations above the median of the losses before it. The
robust deviation is 1.4826 times the median absolute deviation from that median: a Gaussian's standard deviation, which
single outliers do not move (Hampel 1974). Spikes join the losses that later ones are measured against; so a level that
the loss does not come down from counts until half of the window is new, and no longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 128
"""Losses that the median is of."""
FEWEST = 32
"""With fewer losses before it no step counts as a spike."""
DEVIATIONS = 6.0
"""A Gaussian goes beyond once in 10⁹ steps."""


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss sticks out above those of the steps before it, of which the last WINDOW count."""
    recent = np.asarray(before[-WINDOW:])
    if len(recent) < FEWEST:
        return False
    median = np.median(recent)
    deviation = 1.4826 * np.median(np.abs(recent - median))
    return bool(loss > median + DEVIATIONS * deviation)
