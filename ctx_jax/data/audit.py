"""What a trainer should know of a corpus and of the rows it becomes, before the device is paid for.

Everything follows exactly from lengths, which are in memory; only the most frequent tokens are read, from a sample of
rows.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import Loader
from ctx_jax.data.plan import Plan, RowsConfig, make_plan
from ctx_jax.errors import InputError
from ctx_jax.packing import pack

_COLUMNS = 100
_BARS, _BAR = 16, 60
_PACKED = 8
_TOP = 10
_READ_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Spread:
    """How lengths are distributed. A percentile is the least of the lengths that so many percent do not exceed."""

    mean: float
    minimum: int
    p5: int
    p50: int
    p95: int
    p99: int
    maximum: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """The same examples in rows of at most `examples_per_row`; `padding_share` is that of all places of those rows."""

    examples_per_row: int
    rows: int
    padding_share: float


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of a row, from the lengths of its examples.

    At most: whole words and spans take fewer where they do not fit, and a row of unknown tokens has none to offer.

    Attributes:
      mean, maximum: over the rows of an epoch.
      slots: P, places for them in every row.
      unused_share: of all slots of an epoch.
    """

    mean: float
    maximum: int
    slots: int
    unused_share: float


@dataclasses.dataclass(frozen=True)
class Audit:
    """A corpus and its rows. Tokens of the corpus are without special ones, those of examples and rows with.

    Attributes:
      path, split, fingerprint: which corpus.
      config: how it becomes rows.
      documents, sentences, tokens: of the split.
      unknown_tokens, unknown_rate: [UNK] among them, as `build` counted.
      sentence_tokens, document_tokens, document_sentences: how long sentences and documents are.
      long_sentences: sentences that fit no example whole; they are cut.
      examples, rows, row_tokens: of one epoch.
      example_tokens: how long examples are.
      example_histogram: (shortest, longest, examples) of equally wide ranges up to the length of a row.
      short_examples_share: of the examples, those shorter than half a row.
      full_examples_share: of the examples, those as long as a row.
      random_next_share: of the examples, those whose B is random; None where there is no B.
      truncated_tokens, truncated_share: lost as pairs were cut to length; of the tokens chosen for them.
      packings: rows and padding of an epoch, without packing, as configured, and with 8 examples a row.
      sampled_rows, sampled_tokens: what was read for the following.
      frequent_tokens: (token, share of the sampled tokens), ten of them; special ones at the edges are not counted.
      predictions: None where no table of counts was given.
    """

    path: str
    split: str
    fingerprint: str
    config: RowsConfig
    documents: int
    sentences: int
    tokens: int
    unknown_tokens: int
    unknown_rate: float
    sentence_tokens: Spread
    document_tokens: Spread
    document_sentences: Spread
    long_sentences: int
    examples: int
    rows: int
    row_tokens: int
    example_tokens: Spread
    example_histogram: tuple[tuple[int, int, int], ...]
    short_examples_share: float
    full_examples_share: float
    random_next_share: float | None
    truncated_tokens: int
    truncated_share: float
    packings: tuple[Packing, ...]
    sampled_rows: int
    sampled_tokens: int
    frequent_tokens: tuple[tuple[str, float], ...]
    predictions: Predictions | None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def padding_share(self) -> float:
        """Share of an epoch's places that are padding, as configured."""
        return 1 - self.row_tokens / (self.rows * self.config.length)

    def text(self) -> str:
        """A report of at most 100 columns."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        config = self.config
        yield from textwrap.wrap(f"{self.path}, split {self.split}, fingerprint {self.fingerprint}", _COLUMNS)
        yield ""
        yield _line("documents", self.documents)
        yield _line("sentences", self.sentences)
        yield _line("tokens", self.tokens, "without special ones")
        yield _line("unknown tokens", self.unknown_rate, f"of the tokens ({self.unknown_tokens:,})")
        yield _line(
            "sentences too long",
            self.long_sentences / self.sentences,
            f"of the sentences ({self.long_sentences:,}): fit no example whole",
        )
        yield ""
        yield _columns("", "mean", "least", "5 %", "median", "95 %", "99 %", "most")
        for label, spread in (
            ("tokens a sentence", self.sentence_tokens),
            ("tokens a document", self.document_tokens),
            ("sentences a document", self.document_sentences),
            ("tokens an example", self.example_tokens),
        ):
            yield _columns(label, f"{spread.mean:,.1f}", *(f"{x:,}" for x in dataclasses.astuple(spread)[1:]))
        yield ""
        per_row = config.examples_per_row
        yield f"Rows of {config.length:,} tokens, {config.kind}, up to {per_row} examples a row; one epoch:"
        yield ""
        yield _line("examples", self.examples)
        yield _line("rows", self.rows)
        yield _line("tokens", self.row_tokens, "special ones counted, without padding")
        yield _line("examples a row", f"{self.examples / self.rows:.2f}", "on average")
        yield _line("short examples", self.short_examples_share, "of the examples: shorter than half a row")
        yield _line("full examples", self.full_examples_share, "of the examples: as long as a row")
        if self.random_next_share is not None:
            yield _line("random next sentences", self.random_next_share, "of the examples: B is of another document")
            yield _line(
                "truncated tokens",
                self.truncated_share,
                f"of the pairs' tokens ({self.truncated_tokens:,}): cut off to fit",
            )
        for packing in self.packings:
            label = (
                f"padding, {packing.examples_per_row} a row" if packing.examples_per_row > 1 else "padding, unpacked"
            )
            here = " (as configured)" if packing.examples_per_row == per_row else ""
            yield _line(label, packing.padding_share, f"of all places in {packing.rows:,} rows{here}")
        if self.predictions is not None:
            yield _line("predictions a row", f"{self.predictions.mean:.2f}", "on average")
            yield _line("most predictions", self.predictions.maximum, "of a row")
            yield _line("slots", self.predictions.slots, "for predictions in every row")
            yield _line("unused slots", self.predictions.unused_share, "of the slots")
        yield ""
        yield "Tokens an example, and how many examples:"
        most = max(count for *_, count in self.example_histogram)
        for low, high, count in self.example_histogram:
            bar = "#" * max(round(_BAR * count / most), count > 0)
            yield f"{low:>7,} to {high:>6,} {count:>13,}  {bar}".rstrip()
        yield ""
        part = "all" if self.sampled_rows == self.rows else f"a sample of {self.sampled_rows:,}"
        yield f"Most frequent of the {self.sampled_tokens:,} tokens in {part} rows:"
        for token, share in self.frequent_tokens:
            yield f"{share:>9.2%}  {token if len(token) <= 80 else token[:79] + '…'}"


def _line(label: str, value: int | float | str, unit: str = "") -> str:
    if not isinstance(value, str):
        value = f"{value:,}" if isinstance(value, int) else f"{value:.2%}"
    return f"{label:<22} {value:>17} {unit}".rstrip()


def _columns(label: str, *cells: str) -> str:
    return f"{label:<20} " + " ".join(f"{cell:>10}" for cell in cells)


def audit(
    corpus: Corpus,
    config: RowsConfig,
    counts: Int[np.ndarray, "N"] | None = None,
    *,
    slots: int | None = None,
    plan: Plan | None = None,
    sample_rows: int = 1000,
) -> Audit:
    """Looks at a split of a corpus and at the rows it becomes.

    Args:
      corpus: the split.
      config: how it becomes rows.
      counts: how many tokens are predicted of an example of n tokens, `objectives.masking.prediction_counts`.
      slots: P, `objectives.masking.slots_needed`; None: as many as the fullest row of this plan needs.
      plan: the rows, if they are already made.
      sample_rows: how many rows, evenly spread over the plan, are read for the most frequent tokens.

    Raises:
      InputError: a table of counts that is too short, too few slots, no row to sample, or what `make_plan` says.
    """
    if sample_rows < 1:
        raise InputError(f"sample_rows is {sample_rows}, expected at least 1")
    plan = plan or make_plan(corpus.sentence_offsets, corpus.document_offsets, config)
    lengths, length = plan.lengths, config.length
    pairs = config.kind == "pairs"
    body = int(lengths.sum()) - (3 if pairs else 2) * plan.num_examples
    sampled_rows = min(sample_rows, plan.num_rows)
    sampled_tokens, frequent = _frequent_tokens(Loader(corpus, config, plan), sampled_rows)
    return Audit(
        path=str(corpus.path),
        split=corpus.split,
        fingerprint=corpus.fingerprint,
        config=config,
        documents=corpus.num_documents,
        sentences=corpus.num_sentences,
        tokens=corpus.num_tokens,
        unknown_tokens=corpus.counts.unknown_tokens,
        unknown_rate=corpus.counts.unknown_rate,
        sentence_tokens=_spread(corpus.sentence_lengths),
        document_tokens=_spread(np.diff(corpus.sentence_offsets[corpus.document_offsets])),
        document_sentences=_spread(corpus.document_sentences),
        # The longest that an example holds whole: a pair has at least one more token.
        long_sentences=int(np.count_nonzero(corpus.sentence_lengths > length - (4 if pairs else 2))),
        examples=plan.num_examples,
        rows=plan.num_rows,
        row_tokens=int(lengths.sum()),
        example_tokens=_spread(lengths),
        example_histogram=_histogram(lengths, length),
        short_examples_share=float(np.mean(2 * lengths < length)),
        full_examples_share=float(np.mean(lengths == length)),
        random_next_share=float(np.mean(plan.next_sentence == 1)) if pairs else None,
        truncated_tokens=plan.truncated_tokens,
        truncated_share=plan.truncated_tokens / (plan.truncated_tokens + body),
        packings=tuple(_packing(plan, length, per_row) for per_row in sorted({1, _PACKED, config.examples_per_row})),
        sampled_rows=sampled_rows,
        sampled_tokens=sampled_tokens,
        frequent_tokens=frequent,
        predictions=None if counts is None else _predictions(plan, counts, slots),
    )


def _spread(lengths: np.ndarray) -> Spread:
    """Counts first: the lengths of billions of tokens are many, and few of them differ."""
    found = np.bincount(lengths)
    values = np.flatnonzero(found)
    reached = np.cumsum(found[values])
    total = int(reached[-1])
    # In whole numbers, so that no percentile depends on a rounding.
    p5, p50, p95, p99 = (
        int(values[np.searchsorted(reached, -(-percent * total // 100))]) for percent in (5, 50, 95, 99)
    )
    mean = float(values @ found[values]) / total
    return Spread(mean, int(values[0]), p5, p50, p95, p99, int(values[-1]))


def _histogram(lengths: Int[np.ndarray, "E"], length: int) -> tuple[tuple[int, int, int], ...]:
    width = -(-length // _BARS)
    found = np.bincount((lengths - 1) // width, minlength=-(-length // width)).tolist()
    return tuple((i * width + 1, min((i + 1) * width, length), count) for i, count in enumerate(found))


def _packing(plan: Plan, length: int, per_row: int) -> Packing:
    rows = len(pack(plan.lengths, length, per_row)[0]) - 1
    return Packing(per_row, rows, 1 - int(plan.lengths.sum()) / (rows * length))


def _frequent_tokens(loader: Loader, rows: int) -> tuple[int, tuple[tuple[str, float], ...]]:
    tokenizer = loader.corpus.tokenizer
    found = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in loader.in_order(_READ_ROWS, limit=rows):
        found += np.bincount(batch.input_ids[batch.segment_ids > 0], minlength=len(found))
    found[[tokenizer.specials.cls, tokenizer.specials.sep]] = 0
    total = int(found.sum())
    ids = np.argsort(-found, kind="stable")[:_TOP]
    ids = ids[found[ids] > 0]
    names = tokenizer.tokens(ids.tolist())
    return total, tuple((name, int(found[i]) / total) for name, i in zip(names, ids, strict=True))


def _predictions(plan: Plan, counts: Int[np.ndarray, "N"], slots: int | None) -> Predictions:
    longest = int(plan.lengths.max())
    if len(counts) <= longest:
        raise InputError(
            f"counts has {len(counts)} entries, expected at least {longest + 1}, up to the longest example"
        )
    per_row = np.add.reduceat(np.asarray(counts, np.int64)[plan.lengths[plan.order]], plan.rows[:-1])
    most = int(per_row.max())
    if slots is not None and slots < most:
        raise InputError(f"slots is {slots}, expected at least {most}: so many predictions has the fullest row")
    slots = most if slots is None else slots
    mean = float(per_row.mean())
    return Predictions(mean, most, slots, 1 - mean / slots)
