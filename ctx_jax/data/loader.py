"""Rows of a corpus as batches: shuffled, sharded by host, ready at any position.

Row i of a run is row `permutation_e(i mod R)` of the plan, e = i div R the epoch: a pure function of (seed, i), made by
Grain's stateless shuffle (few rows are sorted instead). So a position is one number, resuming costs nothing, and any
number of hosts reads the same global batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from ctx_jax.arrays import Batch
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.plan import Plan, RowsConfig, make_plan
from ctx_jax.errors import InputError

T = TypeVar("T")

# Grain takes half a second to import, Orbax with it: functions that need it import it themselves.

# A batch is assembled under Python's lock, but for the reads: more threads hide a slow disk, and get into each other's
# way on a fast one (pairs of 128 tokens on 2 cores: 18,000 rows/s with 1, 10,000 with 2, 7,500 with 4).
READ_THREADS, READ_AHEAD = 2, 8
# Grain's shuffle permutes at least 2^16 numbers and steps on until it meets one below R: 70 µs a row at R = 1,000, but
# 0.5 ms at 100 and 7 ms at 5. Fewer rows are sorted by random numbers instead.
GRAIN_ROWS = 256


class Loader:
    """Batches of one split of a corpus.

    Attributes:
      corpus: where the tokens come from.
      config: how they become rows.
      plan: the rows.
    """

    def __init__(self, corpus: Corpus, config: RowsConfig, plan: Plan | None = None):
        self.corpus = corpus
        self.config = config
        self.plan = plan or make_plan(corpus.sentence_offsets, corpus.document_offsets, config)
        self._specials = corpus.tokenizer.specials
        import grain

        rows = grain.MapDataset.range(self.plan.num_rows).seed(config.seed).shuffle()
        self._shuffled = rows.repeat(None)

    @property
    def num_rows(self) -> int:
        """R, the rows of one epoch."""
        return self.plan.num_rows

    def row_at(self, position: int) -> tuple[int, int]:
        """(epoch, row of the plan) at a position of the run."""
        epoch, index = divmod(position, self.num_rows)
        if self.num_rows < GRAIN_ROWS:
            return epoch, int(permutation(self.num_rows, self.config.seed, epoch)[index])
        return epoch, int(self._shuffled[position])

    def batches(
        self, batch_size: int, *, start: int = 0, rows: Sequence[int] | None = None, prefetch: bool = True
    ) -> Iterator[Batch]:
        """This host's rows of every batch from position `start` on, without end.

        Args:
          batch_size: B over all hosts.
          start: position of the first row, in rows since the beginning of the run.
          rows: which rows of each batch, in this order (`sharding.process_rows`); all by default.
          prefetch: read ahead in threads.
        """
        part = rows_of_batch(batch_size, rows)
        if start < 0:
            raise InputError(f"start is {start}, expected a position from 0 on")

        def read(index: int) -> Batch:
            positions = (start + index * batch_size + part).tolist()
            epochs, rows = zip(*map(self.row_at, positions), strict=True)
            return self.assemble(np.array(rows), np.array(epochs, np.uint32))

        return read_ahead(read, prefetch)

    def in_order(
        self, batch_size: int, *, limit: int | None = None, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Every row once, in the plan's order, epoch 0; the last batch is filled up with empty rows.

        Args:
          batch_size: B over all hosts.
          limit: only so many rows, evenly spread over the plan: its beginning may be all of one source.
          rows: as for `batches`.
        """
        part = rows_of_batch(batch_size, rows)
        count = self.num_rows if limit is None else min(limit, self.num_rows)
        if count < 1:
            raise InputError(f"limit is {limit}, expected at least 1 row")
        spread = np.arange(count) * self.num_rows // count
        for begin in range(0, count, batch_size):
            batch = np.full(batch_size, -1)
            some = spread[begin : begin + batch_size]
            batch[: len(some)] = some
            yield self.assemble(batch[part], np.zeros(len(part), np.uint32))

    def assemble(self, rows: Int[np.ndarray, "B"], epochs: np.ndarray) -> Batch:
        """Reads rows of the plan; -1 makes an empty row."""
        shape, per_row = (len(rows), self.config.length), self.config.examples_per_row
        input_ids = np.full(shape, self._specials.pad, np.int32)
        token_type_ids, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
        example_ids = np.zeros((len(rows), per_row), np.uint32)
        next_sentence = np.full((len(rows), per_row), -1, np.int32)
        for r, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            at = 0
            for s, example in enumerate(self.plan.order[self.plan.rows[row] : self.plan.rows[row + 1]].tolist()):
                ids, b_start = self.example(example)
                place = slice(at, at + len(ids))
                input_ids[r, place] = ids
                token_type_ids[r, at + b_start : at + len(ids)] = 1
                segment_ids[r, place] = s + 1
                positions[r, place] = np.arange(len(ids))
                example_ids[r, s] = example
                next_sentence[r, s] = self.plan.next_sentence[example]
                at += len(ids)
        return Batch(input_ids, token_type_ids, segment_ids, positions, example_ids, epochs, next_sentence)

    def example(self, example: int) -> tuple[Int[np.ndarray, "N"], int]:
        """Ids of one example with `[CLS]` and `[SEP]`, and where B begins (its length without B)."""
        a_start, a_end, b_start, b_end = self.plan.spans[example].tolist()
        cls, sep = [self._specials.cls], [self._specials.sep]
        a = np.concatenate([cls, self.corpus.tokens(a_start, a_end), sep])
        if self.plan.next_sentence[example] < 0:
            return a, len(a)
        return np.concatenate([a, self.corpus.tokens(b_start, b_end), sep]), len(a)


def rows_of_batch(batch_size: int, rows: Sequence[int] | None) -> Int[np.ndarray, "R"]:
    """Those rows of a batch of B, checked; None is all of them."""
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}, expected at least 1")
    part = np.arange(batch_size) if rows is None else np.asarray(rows, int)
    if not len(part) or part.min() < 0 or part.max() >= batch_size:
        raise InputError(f"rows are {part.tolist()}, expected at least one, of 0 to {batch_size - 1}")
    return part


def read_ahead(read: Callable[[int], T], prefetch: bool) -> Iterator[T]:
    """`read(0), read(1), …` without end; with `prefetch` a few ahead, in threads."""
    import grain

    options = grain.ReadOptions(
        num_threads=READ_THREADS if prefetch else 0, prefetch_buffer_size=READ_AHEAD if prefetch else 0
    )
    return iter(grain.MapDataset.range(2**40).map(read).to_iter_dataset(options))


@functools.lru_cache(maxsize=8)
def permutation(size: int, seed: int, epoch: int) -> Int[np.ndarray, "R"]:
    """An order of few rows, or of documents. From raw bits: NumPy keeps nothing else the same over releases."""
    return np.argsort(np.random.Philox([seed, epoch]).random_raw(size), kind="stable")
