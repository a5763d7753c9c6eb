"""Which texts go to the device together: in rows that they share, so many tokens at once, in few compiled shapes."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ctx_jax.packing import pack

BATCH_TOKENS = 32768
"""Tokens at once on a device, padding counted, unless one text has more; of half as many an H100 computes a token 2 %
slower.
"""
CPU_BATCH_TOKENS = 1024
"""On a processor: products are as fast as with more, and what lies between them stays in its caches."""
SHARED_LENGTH = 64
"""Of the shortest rows that texts share: attention to so few costs next to nothing, and longer ones waste less."""
TOKENS_PER_SLOT = 4
"""A row of T holds T / 4 texts at most, so that pooled vectors have a fixed place."""


ATTENTION_LENGTH = 8 / 3
"""Of rows in which attention costs as much as all the rest, in widths of the model: measured on a CPU for widths of 384
and 768. FLOPs alone say 6."""


class Batch(NamedTuple):
    """Members of one call of the device, row by row.

    Attributes:
      texts: indices of the texts.
      rows: the row of each.
      slots: which of its row's texts each one is, from 0.
      starts: its first place in the row.
      shape: (B, T), what is compiled.
    """

    texts: Int[np.ndarray, "E"]
    rows: Int[np.ndarray, "E"]
    slots: Int[np.ndarray, "E"]
    starts: Int[np.ndarray, "E"]
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


def slots_per_row(length: int) -> int:
    """Texts that share a row of this length, at most."""
    return max(length // TOKENS_PER_SLOT, 1)


def compiled_rows(length: int, max_length: int, batch_tokens: int = BATCH_TOKENS, devices: int = 1) -> list[int]:
    """B of the shapes of one length: for each device as many as there is room for, half of that, … down to one.

    Rows shorter than the shared ones hold texts that are few: one row on each device is enough.
    """
    shared = length >= min(SHARED_LENGTH, max_length)
    rows = [max(batch_tokens // length, 1) if shared else 1]
    while rows[-1] > 1:
        rows.append(rows[-1] // 2)
    return [devices * count for count in rows[::-1]]


def compiled_shapes(max_length: int, batch_tokens: int = BATCH_TOKENS, devices: int = 1) -> list[tuple[int, int]]:
    """All the shapes that may ever be compiled."""
    lengths = compiled_lengths(max_length)
    return [(rows, length) for length in lengths for rows in compiled_rows(length, max_length, batch_tokens, devices)]


def plan_batches(
    lengths: Sequence[int], max_length: int, batch_tokens: int = BATCH_TOKENS, devices: int = 1, width: int = 768
) -> Iterator[Batch]:
    """Batches of all texts, the longest first.

    A batch takes the longest texts that are left, and fills what they leave free in their rows with shorter ones. Rows
    may be up to twice as long as the longest text, whatever makes a token cheapest: longer ones are fuller, but
    attention costs more in them. Only the last batches may have rows that are not full, or fewer.

    Args:
      lengths: tokens of each text, special ones counted; none above `max_length`.
      max_length: what the model takes.
      batch_tokens: see BATCH_TOKENS.
      devices: among which the rows of a batch are divided.
      width: D of the model, which says what attention costs beside the rest.
    """
    attention_length = ATTENTION_LENGTH * width
    lengths = np.maximum(np.asarray(lengths), 1)
    left = np.argsort(-lengths, kind="stable")
    while len(left):
        counts = {
            length: compiled_rows(length, max_length, batch_tokens, devices)
            for length in _possible(lengths[left], max_length)
        }
        rows, length = min(
            (_fill(left, lengths, length, counts[length][-1]) for length in counts),
            key=lambda found: _cost(*found, lengths, attention_length),
        )
        done = 0
        for count in _split(len(rows), counts[length]):
            yield _batch(rows[done : done + count], lengths, (count, length))
            done += count
        left = left[np.isin(left, np.concatenate(rows), invert=True)]


def _possible(lengths: Int[np.ndarray, "E"], max_length: int) -> list[int]:
    """T of rows for these texts: from what the longest needs to twice that; few texts get a row of their own length."""
    few = int(lengths.sum())
    if few <= SHARED_LENGTH:
        return [padded_length(min(few, max_length), max_length)]
    least = padded_length(max(int(lengths[0]), min(SHARED_LENGTH, max_length)), max_length)
    most = max(2 * int(lengths[0]), least)
    return [length for length in compiled_lengths(max_length) if least <= length <= most]


def _fill(
    left: Int[np.ndarray, "E"], lengths: Int[np.ndarray, "N"], length: int, most: int
) -> tuple[list[Int[np.ndarray, "_"]], int]:
    """The rows of a batch of this length, the longest texts first, and the length."""
    starts, order = pack(lengths[left], length, slots_per_row(length))
    rows = [left[order[begin:end]] for begin, end in pairwise(starts[: most + 1])]
    # What is left at the end, an eighth free or more, is better off in shorter rows.
    while (
        len(rows) > 1
        and length > SHARED_LENGTH
        and 2 * lengths[rows[-1][0]] < length
        and 8 * lengths[rows[-1]].sum() < 7 * length
    ):
        del rows[-1]
    return rows, length


def _cost(
    rows: Sequence[Int[np.ndarray, "_"]], length: int, lengths: Int[np.ndarray, "N"], attention_length: float
) -> float:
    """Of a batch, beside what its texts would cost in rows of their own length."""
    sizes = lengths[np.concatenate(rows)]
    alone = sizes * (1 + sizes / attention_length)
    return len(rows) * length * (1 + length / attention_length) / alone.sum()


def _split(rows: int, counts: list[int]) -> Iterator[int]:
    """Sizes of batches for so many rows, all of them compiled ones, with an eighth of them empty at most, or one."""
    while rows > 0:
        above = counts[min(bisect.bisect_left(counts, rows), len(counts) - 1)]
        fits = above == counts[0] or 8 * rows >= 7 * above
        count = above if fits else counts[bisect.bisect_right(counts, rows) - 1]
        yield count
        rows -= count


def _batch(rows: Sequence[np.ndarray], lengths: np.ndarray, shape: tuple[int, int]) -> Batch:
    sizes = [len(row) for row in rows]
    texts = np.concatenate(rows)
    starts = [np.cumsum(lengths[row]) - lengths[row] for row in rows]
    slots = np.concatenate([np.arange(size) for size in sizes])
    return Batch(texts, np.repeat(np.arange(len(rows)), sizes), slots, np.concatenate(starts), shape)
