"""Which texts go to the device together: of like length, so many tokens at once, in few compiled shapes."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BATCH_TOKENS = 8192
"""Tokens at once, padding counted, unless one text has more."""


class Batch(NamedTuple):
    """Members of one call of the device.

    Attributes:
      rows: indices of the members, the longest first; at most B.
      shape: (B, T), what is compiled.
    """

    rows: np.ndarray
    shape: tuple[int, int]


def compiled_lengths(max_length: int) -> list[int]:
    """T of all shapes: multiples of 8, four to eight an octave, so that little of a row is padding."""
    lengths, length = [], 8
    while length < max_length:
        lengths.append(length)
        # The step is an eighth to a quarter of the length.
        length += max(8, 1 << (length.bit_length() - 3))
    return [*lengths, max_length]


def padded_length(length: int, max_length: int) -> int:
    """T of the shape for a text of this length."""
    possible = compiled_lengths(max_length)
    return possible[bisect.bisect_left(possible, length)]


def compiled_rows(length: int, batch_tokens: int) -> list[int]:
    """B of the shapes of one length: as many as there is room for, and a quarter of that, and so on down to one."""
    most = max(batch_tokens // length, 1)
    rows = [most]
    while rows[-1] > 1:
        rows.append(max(rows[-1] // 4, 1))
    return rows[::-1]


def compiled_shapes(max_length: int, batch_tokens: int = BATCH_TOKENS) -> list[tuple[int, int]]:
    """All the shapes that may ever be compiled."""
    return [(rows, length) for length in compiled_lengths(max_length) for rows in compiled_rows(length, batch_tokens)]


def plan_batches(lengths: Sequence[int], max_length: int, batch_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Batches of all texts, the longest first.

    Args:
      lengths: tokens of each text, special ones counted; none above `max_length`.
      max_length: what the model takes.
      batch_tokens: see BATCH_TOKENS.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        length = padded_length(int(lengths[order[at]]), max_length)
        counts = compiled_rows(length, batch_tokens)
        # Texts of less than half the length are better off with their like.
        alike = int((lengths[order[at : at + counts[-1]]] > length // 2).sum())
        rows = next(count for count in counts if count >= max(alike, 1))
        yield Batch(order[at : at + rows], (rows, length))
        at += rows
