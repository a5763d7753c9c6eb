"""A corpus as parallel streams of words, cut into windows: what a recurrent language model reads.

Every sentence becomes the chain `<S> w₁ … wₙ </S>`, and a chain n + 1 steps: from each of its words to the next. The
backward direction goes down the same chain from `</S>` to `<S>`. Documents in the order of an epoch, one after the
other, make one long sequence of steps, which is cut into B equal streams; window w of a stream is its steps w·T to
w·T + T. The state of a row is carried from window to window (bilm-tf, data.py: LMDataset, _get_batch).

Where a window lies is a function of (seed, position, B) alone, so resuming costs nothing. Another B is another cut.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from ctx_jax.arrays import Windows
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import permutation, read_ahead, rows_of_batch
from ctx_jax.data.plan import RowsConfig
from ctx_jax.errors import InputError


class Streams:
    """Windows of one split of a corpus.

    Attributes:
      corpus: where the words come from.
      config: `length` is T, `seed` that of the documents' order.
      num_steps: steps of an epoch, from a word to the next.
    """

    def __init__(self, corpus: Corpus, config: RowsConfig):
        self.corpus = corpus
        self.config = config
        self._begin, self._end = corpus.tokenizer.specials.cls, corpus.tokenizer.specials.sep
        # A sentence of n words has n + 1 steps: their addresses are those of words, shifted by the sentence's number.
        self._sentence_steps = corpus.sentence_offsets + np.arange(len(corpus.sentence_offsets))
        self._document_steps = self._sentence_steps[corpus.document_offsets]
        self.num_steps = int(self._sentence_steps[-1])

    @property
    def num_rows(self) -> int:
        """Windows of an epoch, all streams together."""
        return self.num_steps // self.config.length

    def windows_per_stream(self, batch_size: int) -> int:
        """Windows of an epoch in each of B streams; what does not fill one for all of them waits for another epoch."""
        windows = self.num_steps // (batch_size * self.config.length)
        if windows < 1:
            raise InputError(
                f"{self.corpus.path}, split {self.corpus.split!r}: {self.num_steps} words are too few for"
                f" {batch_size} streams of {self.config.length}"
            )
        return windows

    def batches(
        self, batch_size: int, *, start: int = 0, rows: Sequence[int] | None = None, prefetch: bool = True
    ) -> Iterator[Windows]:
        """This host's rows of every batch from position `start` on, without end; see `Loader.batches`.

        `start` counts rows and is a multiple of B: all streams stand at the same window.
        """
        part = rows_of_batch(batch_size, rows)
        if start < 0 or start % batch_size:
            raise InputError(
                f"start is {start}, expected a multiple of the batch size {batch_size}: streams go on as they began"
            )
        per_stream = self.windows_per_stream(batch_size)

        def read(index: int) -> Windows:
            number = start // batch_size + index
            epoch, window = divmod(number, per_stream)
            begins = (part * per_stream + window) * self.config.length
            lengths = np.full(len(part), self.config.length, np.int32)
            return self.assemble(begins, lengths, epoch, number)

        return read_ahead(read, prefetch)

    def in_order(
        self, batch_size: int, *, limit: int | None = None, rows: Sequence[int] | None = None
    ) -> Iterator[Windows]:
        """Every step once, in the order of the text, in B streams; the last windows may be short or empty.

        Args:
          batch_size: B over all hosts.
          limit: only so many rows: the beginning of each stream, which together are spread over the text.
          rows: as for `Loader.batches`.
        """
        part = rows_of_batch(batch_size, rows)
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}, expected at least 1 row")
        length = self.config.length
        per_stream = -(-self.num_steps // (batch_size * length))
        count = per_stream if limit is None else min(per_stream, max(limit // batch_size, 1))
        for window in range(count):
            begins = (part * per_stream + window) * length
            lengths = np.clip(self.num_steps - begins, 0, length).astype(np.int32)
            yield self.assemble(begins, lengths, None, window)

    def assemble(
        self, begins: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], epoch: int | None, number: int
    ) -> Windows:
        """Reads windows; epoch None is the order of the text."""
        ids = np.zeros((4, len(begins), self.config.length), np.int32)
        for row, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
            at = 0
            while at < length:
                chain, place = self._chain(begin + at, epoch)
                count = min(length - at, len(chain) - 1 - place)
                here, from_, to = (
                    slice(at, at + count),
                    slice(place, place + count),
                    slice(place + 1, place + count + 1),
                )
                back = chain[::-1]
                ids[:, row, here] = chain[from_], chain[to], back[from_], back[to]
                at += count
        return Windows(*ids, lengths, np.full(len(begins), number, np.uint32))

    def _chain(self, step: int, epoch: int | None) -> tuple[Int[np.ndarray, "N"], int]:
        """The chain of the sentence that a step of an epoch is of, and the step's place in it."""
        if epoch is not None:
            order, starts = self._order(epoch)
            slot = int(np.searchsorted(starts, step, side="right")) - 1
            step = int(self._document_steps[order[slot]]) + step - int(starts[slot])
        sentence = int(np.searchsorted(self._sentence_steps, step, side="right")) - 1
        offsets = self.corpus.sentence_offsets
        words = self.corpus.tokens(int(offsets[sentence]), int(offsets[sentence + 1]))
        return np.concatenate([[self._begin], words, [self._end]]), step - int(self._sentence_steps[sentence])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a loader lives as long as its run)
    def _order(self, epoch: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Documents in the order of an epoch, and the step at which each begins there."""
        order = permutation(self.corpus.num_documents, self.config.seed, epoch)
        steps = np.diff(self._document_steps)[order]
        return order, np.concatenate([[0], np.cumsum(steps)[:-1]])
