"""Which tokens make which example, and which examples share a row: decided once, from lengths alone.

A corpus is one long stream of tokens with sentence and document boundaries. A plan holds addresses in that stream, not
tokens, and is a pure function of (boundaries, options), so that row r can be read at any time without reading row r-1.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from ctx_jax.errors import InputError
from ctx_jax.packing import pack

Kind = Literal["sentences", "pairs", "stream"]


@dataclass(frozen=True)
class RowsConfig:
    """How a corpus becomes rows."""

    length: int = 128
    """T: tokens of a row, special ones counted."""
    kind: Kind = "sentences"
    """`sentences`: `[CLS] A [SEP]`, A as many whole sentences of one document as fit (DOC-SENTENCES of the RoBERTa
    paper). `pairs`: `[CLS] A [SEP] B [SEP]` for next-sentence prediction, as google-research/bert makes them. `stream`:
    windows of B streams of words that go on from step to step, for a recurrent language model."""
    examples_per_row: int = 1
    """Up to how many examples share a row, each blind to the others; 1 does not pack."""
    short_probability: float = 0.1
    """Of the documents of `pairs`, the share whose examples get a random shorter length (`short_seq_prob`)."""
    duplicates: int = 1
    """How many different cuts of the corpus into `pairs` make one epoch (`dupe_factor`)."""
    seed: int = 0
    """Of the pairs, and of the order of the rows."""

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(Kind)):
            raise InputError(f"RowsConfig.kind is {self.kind!r}, expected one of {kinds}")
        least = {"sentences": 3, "pairs": 5, "stream": 1}[self.kind]
        if self.length < least:
            raise InputError(f"RowsConfig.length is {self.length}, expected at least {least} for {self.kind}")
        if self.examples_per_row < 1 or self.duplicates < 1:
            raise InputError("RowsConfig.examples_per_row and duplicates must be at least 1")
        if self.kind == "stream" and self.examples_per_row > 1:
            raise InputError("RowsConfig.examples_per_row is not for streams: a window is of one stream")
        if self.duplicates > 1 and self.kind != "pairs":
            raise InputError("RowsConfig.duplicates is for pairs: every cut of the corpus into sentences is the same")
        if not 0 <= self.short_probability <= 1:
            raise InputError(f"RowsConfig.short_probability is {self.short_probability}, expected 0 to 1")
        if self.seed < 0:
            raise InputError(f"RowsConfig.seed is {self.seed}, expected at least 0")


@dataclass(frozen=True)
class Plan:
    """Examples and rows.

    Attributes:
      spans: int64 [E, 4], A's first and one past its last token, then B's (0, 0 without B); an example's id is its
        place here.
      next_sentence: int8 [E], 1 if B is random, 0 if it follows A, -1 without B.
      rows: int64 [R + 1], row r holds the examples `order[rows[r]:rows[r + 1]]`.
      order: int64 [E].
      truncated_tokens: how many tokens pairs lost of the sentences chosen for them, as they were cut to length.
    """

    spans: Int[np.ndarray, "E 4"]
    next_sentence: Int[np.ndarray, "E"]
    rows: Int[np.ndarray, "R"]
    order: Int[np.ndarray, "E"]
    truncated_tokens: int

    @property
    def num_examples(self) -> int:
        """E."""
        return len(self.spans)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.rows) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "E"]:
        """Tokens of each example, `[CLS]` and `[SEP]` counted."""
        a, b = self.spans[:, 1] - self.spans[:, 0], self.spans[:, 3] - self.spans[:, 2]
        return a + b + 2 + (self.next_sentence >= 0)


def make_plan(
    sentence_offsets: Int[np.ndarray, "S"],
    document_offsets: Int[np.ndarray, "N"],
    config: RowsConfig,
    *,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Plan:
    """Cuts a corpus into examples and packs them into rows.

    Args:
      sentence_offsets: address of the first token of each sentence, and the number of tokens at the end.
      document_offsets: first sentence of each document, and the number of sentences at the end.
      config: how.
      progress: wraps the loop over documents, for a progress bar.

    Raises:
      InputError: no document; or a single one, where pairs need another to draw a random B from.
    """
    num_documents = len(document_offsets) - 1
    if num_documents < 1:
        raise InputError("the corpus has no documents")
    if config.kind == "pairs" and num_documents < 2:
        raise InputError("pairs need at least 2 documents: a random B comes from another document; found 1")
    spans: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    truncated = 0
    for duplicate in range(config.duplicates):
        for document in progress(range(num_documents)):
            if config.kind == "sentences":
                first, last = document_offsets[document], document_offsets[document + 1]
                found = _sentences(sentence_offsets[first : last + 1].tolist(), config.length - 2)
                spans += found
                labels += [-1] * len(found)
            else:
                rng = random.Random(f"{config.seed} {duplicate} {document}")
                found, random_next, lost = _pairs(sentence_offsets, document_offsets, document, config, rng)
                spans += found
                labels += random_next
                truncated += lost
    examples = np.array(spans, np.int64).reshape(-1, 4)
    next_sentence = np.array(labels, np.int8)
    plan = Plan(examples, next_sentence, np.zeros(1, np.int64), np.zeros(0, np.int64), truncated)
    rows, order = pack(plan.lengths, config.length, config.examples_per_row)
    return Plan(examples, next_sentence, rows, order, truncated)


def _sentences(offsets: list[int], body: int) -> list[tuple[int, int, int, int]]:
    """Runs of whole sentences of at most `body` tokens; a longer sentence is cut, and nothing of it lost."""
    spans = []
    start, end = offsets[0], offsets[-1]
    while start < end:
        stop = end if start + body >= end else offsets[bisect_right(offsets, start + body) - 1]
        if stop <= start:
            stop = start + body
        spans.append((start, stop, 0, 0))
        start = stop
    return spans


def _pairs(
    sentence_offsets: np.ndarray, document_offsets: np.ndarray, document: int, config: RowsConfig, rng: random.Random
) -> tuple[list[tuple[int, int, int, int]], list[int], int]:
    """Google's create_instances_from_document on addresses; a random B never comes from the same document (the
    original gives up after ten draws).
    """
    first, last = int(document_offsets[document]), int(document_offsets[document + 1])
    offsets = sentence_offsets[first : last + 1].tolist()
    most = config.length - 3
    target = rng.randint(2, most) if rng.random() < config.short_probability else most
    spans, labels, lost = [], [], 0
    begin, i, count = 0, 0, last - first
    while i < count:
        if i == count - 1 or offsets[i + 1] - offsets[begin] >= target:
            sentences = i + 1 - begin
            a_sentences = rng.randint(1, sentences - 1) if sentences >= 2 else 1
            middle = begin + a_sentences
            a_start, a_end = offsets[begin], offsets[middle]
            is_random = sentences == 1 or rng.random() < 0.5
            if is_random:
                other = rng.randrange(len(document_offsets) - 2)
                other += other >= document
                b_start, b_end = _random_b(sentence_offsets, document_offsets, other, target - (a_end - a_start), rng)
                i = middle - 1  # what A left over is used again
            else:
                b_start, b_end = a_end, offsets[i + 1]
            whole = a_end - a_start + b_end - b_start
            a_start, a_end, b_start, b_end = _truncate(a_start, a_end, b_start, b_end, most, rng)
            lost += whole - (a_end - a_start + b_end - b_start)
            spans.append((a_start, a_end, b_start, b_end))
            labels.append(int(is_random))
            begin = i + 1
        i += 1
    return spans, labels, lost


def _random_b(
    sentence_offsets: np.ndarray, document_offsets: np.ndarray, other: int, target: int, rng: random.Random
) -> tuple[int, int]:
    """Whole sentences of another document from a random one on, until they reach the target length."""
    first, last = int(document_offsets[other]), int(document_offsets[other + 1])
    sentence = rng.randrange(first, last)
    start = int(sentence_offsets[sentence])
    # The first sentence end at or past the target, at least one sentence, at most the rest of the document.
    stop = int(np.searchsorted(sentence_offsets[sentence + 1 : last + 1], start + max(target, 1)))
    return start, int(sentence_offsets[min(sentence + 1 + stop, last)])


def _truncate(
    a_start: int, a_end: int, b_start: int, b_end: int, most: int, rng: random.Random
) -> tuple[int, int, int, int]:
    """truncate_seq_pair: a token at a time off the longer one, off its front or its end with equal probability."""
    a, b = a_end - a_start, b_end - b_start
    excess = a + b - most
    if excess <= 0:
        return a_start, a_end, b_start, b_end
    # Off the longer one down to the shorter one's length, then in turn, B first.
    alone = min(excess, abs(a - b))
    rest = excess - alone
    cut_a = (alone if a > b else 0) + rest // 2
    cut_b = excess - cut_a
    front_a = rng.getrandbits(cut_a).bit_count() if cut_a else 0
    front_b = rng.getrandbits(cut_b).bit_count() if cut_b else 0
    return a_start + front_a, a_end - (cut_a - front_a), b_start + front_b, b_end - (cut_b - front_b)
