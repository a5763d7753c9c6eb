"""Figures of an audit, computed by hand and counted in the rows of the loader."""

import collections
import dataclasses
import json
import random

import numpy as np
import pytest

from ctx_jax.data.audit import Packing, Predictions, Spread, audit
from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import Loader
from ctx_jax.data.plan import RowsConfig, make_plan
from ctx_jax.errors import InputError
from ctx_jax.text.wordpiece import WordPiece

WORDS = ("the", "bank", "of", "river", "rain", "money", "loan", "mud", "reed", "coin", "debt", "fish")
COUNTS = np.array([0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])


def write_corpus(path, text):
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (path / "text").write_text(text)
    tokenizer = WordPiece(path / "vocab.txt")
    build({"train": [path / "text"]}, tokenizer, path / "out", processes=1, show_progress=False)
    return Corpus(path / "out")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Sentences of 4, 2, 1 | 3 | 12 tokens."""
    text = "the bank of money\nthe loan\ndebt\n\nmud the xyz\n\nthe bank of the river the the bank of the river rain\n"
    return write_corpus(tmp_path_factory.mktemp("small"), text)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    rng = random.Random(0)
    words = [*WORDS, "xyz"]
    weights = [2.0**-i for i in range(len(words))]
    sentence = lambda: " ".join(rng.choices(words, weights, k=rng.choice([1, rng.randint(1, 20), 40])))
    document = lambda: "\n".join(sentence() for _ in range(rng.randint(1, 9)))
    return write_corpus(tmp_path_factory.mktemp("large"), "\n\n".join(document() for _ in range(150)))


def test_figures_of_sentences_by_hand(small):
    # Examples, special tokens counted: 4 + 2 + 1 tokens make 6 + 2 and 1 + 2; 3 + 2; 12 tokens make 6 + 2 twice.
    found = audit(small, RowsConfig(length=8, examples_per_row=2), COUNTS)
    assert (found.documents, found.sentences, found.tokens) == (3, 5, 22)
    assert (found.unknown_tokens, found.unknown_rate) == (1, 1 / 22)
    assert found.sentence_tokens == Spread(22 / 5, 1, 1, 3, 12, 12, 12)
    assert found.document_tokens == Spread(22 / 3, 3, 3, 7, 12, 12, 12)
    assert found.document_sentences == Spread(5 / 3, 1, 1, 1, 3, 3, 3)
    assert found.long_sentences == 1
    assert (found.examples, found.rows, found.row_tokens) == (5, 4, 32)
    assert found.example_tokens == Spread(32 / 5, 3, 3, 8, 8, 8, 8)
    assert found.example_histogram == tuple((n, n, {3: 1, 5: 1, 8: 3}.get(n, 0)) for n in range(1, 9))
    assert (found.short_examples_share, found.full_examples_share) == (1 / 5, 3 / 5)
    assert (found.random_next_share, found.truncated_tokens, found.truncated_share) == (None, 0, 0)
    # 3 and 5 share a row and fill it.
    assert found.packings == (Packing(1, 5, 1 - 32 / 40), Packing(2, 4, 0.0), Packing(8, 4, 0.0))
    assert found.padding_share == 0
    # Rows of 3 + 3, 3 and twice 3 predictions.
    assert found.predictions == Predictions(mean=12 / 4, maximum=3, slots=3, unused_share=0)
    assert (found.sampled_rows, found.sampled_tokens) == (4, 22)
    the, bank, of, river, *once = found.frequent_tokens
    assert (the, bank, of, river) == (("the", 8 / 22), ("bank", 3 / 22), ("of", 3 / 22), ("river", 2 / 22))
    assert once == [(token, 1 / 22) for token in ("[UNK]", "rain", "money", "loan", "mud", "debt")]


def test_figures_of_pairs_by_hand(small):
    config = RowsConfig(length=8, kind="pairs", short_probability=0)
    plan = make_plan(small.sentence_offsets, small.document_offsets, config)
    kept = randoms = 0
    for (a_start, a_end, b_start, b_end), label in zip(plan.spans.tolist(), plan.next_sentence, strict=True):
        kept += a_end - a_start + b_end - b_start
        randoms += label
    found = audit(small, config, COUNTS, slots=5, plan=plan)
    assert found.examples == found.rows == len(plan.spans)
    assert found.random_next_share == randoms / len(plan.spans)
    assert found.row_tokens == kept + 3 * len(plan.spans)
    assert found.long_sentences == 1
    chosen = kept + plan.truncated_tokens
    assert (found.truncated_tokens, found.truncated_share) == (plan.truncated_tokens, plan.truncated_tokens / chosen)
    assert found.truncated_tokens > 0
    assert found.predictions.slots == 5


@pytest.mark.parametrize("kind", ["sentences", "pairs"])
@pytest.mark.parametrize("per_row", [1, 3, 8])
def test_figures_are_those_of_the_loaders_rows(large, kind, per_row):
    length = 48
    counts = np.array([0, *(1 + np.arange(1, length + 1) // 5)])
    config = RowsConfig(
        length=length, kind=kind, examples_per_row=per_row, duplicates=2 if kind == "pairs" else 1, seed=3
    )
    found = audit(large, config, counts, sample_rows=10**9)
    loader = Loader(large, config)
    rows, padding, lengths, predictions, labels = 0, 0, [], [], []
    tokens = collections.Counter()
    for batch in loader.batches(1):
        if batch.epochs[0]:
            break
        rows += 1
        padding += np.count_nonzero(batch.segment_ids == 0)
        segments = [int(np.count_nonzero(batch.segment_ids == s + 1)) for s in range(batch.segment_ids.max())]
        lengths += segments
        predictions.append(sum(counts[n] for n in segments))
        labels += batch.next_sentence[0, : len(segments)].tolist()
        tokens.update(i for i in batch.input_ids[batch.segment_ids > 0].tolist() if i not in (2, 3))
    assert (found.rows, found.examples) == (rows, len(lengths))
    assert found.sampled_rows == rows
    assert found.row_tokens == sum(lengths)
    assert found.padding_share == pytest.approx(padding / (rows * length), rel=1e-12)
    assert found.padding_share == {p.examples_per_row: p for p in found.packings}[per_row].padding_share
    assert found.example_tokens.mean == pytest.approx(np.mean(lengths), rel=1e-12)
    for name, percent in (("p5", 5), ("p50", 50), ("p95", 95), ("p99", 99)):
        assert getattr(found.example_tokens, name) == np.percentile(lengths, percent, method="inverted_cdf")
    assert (found.example_tokens.minimum, found.example_tokens.maximum) == (min(lengths), max(lengths))
    assert len(found.example_histogram) == 16
    for low, high, count in found.example_histogram:
        assert count == sum(low <= n <= high for n in lengths)
    assert sum(count for *_, count in found.example_histogram) == len(lengths)
    assert found.short_examples_share == pytest.approx(np.mean([n < 24 for n in lengths]), rel=1e-12)
    assert found.full_examples_share == pytest.approx(np.mean([n == 48 for n in lengths]), rel=1e-12)
    if kind == "pairs":
        assert found.random_next_share == pytest.approx(np.mean([label == 1 for label in labels]), rel=1e-12)
        assert found.truncated_tokens > 0
    else:
        assert found.random_next_share is None
    assert found.predictions.mean == pytest.approx(np.mean(predictions), rel=1e-12)
    assert found.predictions.maximum == found.predictions.slots == max(predictions)
    unused = sum(max(predictions) - n for n in predictions)
    assert found.predictions.unused_share == pytest.approx(unused / (rows * max(predictions)), rel=1e-9)
    assert found.sampled_tokens == tokens.total()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    for (token, share), (_, count) in zip(found.frequent_tokens, tokens.most_common(10), strict=True):
        assert share == count / tokens.total() == tokens[names.index(token)] / tokens.total()
    # Without and with packing.
    for packing in found.packings:
        other = make_plan(
            large.sentence_offsets,
            large.document_offsets,
            dataclasses.replace(config, examples_per_row=packing.examples_per_row),
        )
        assert packing.rows == other.num_rows
        assert packing.padding_share == pytest.approx(1 - sum(lengths) / (other.num_rows * length), rel=1e-12)
    assert [p.examples_per_row for p in found.packings] == sorted({1, per_row, 8})


def test_corpus_figures_are_those_of_the_text(large):
    found = audit(large, RowsConfig(length=48))
    text = (large.path.parent / "text").read_text()
    documents = [[len(s.split()) for s in d.split("\n")] for d in text.split("\n\n")]
    sentences = [n for document in documents for n in document]
    assert (found.documents, found.sentences, found.tokens) == (150, len(sentences), sum(sentences))
    assert found.unknown_tokens == text.split().count("xyz") > 0
    assert found.unknown_rate == found.unknown_tokens / found.tokens
    for spread, values in (
        (found.sentence_tokens, sentences),
        (found.document_tokens, [sum(document) for document in documents]),
        (found.document_sentences, [len(document) for document in documents]),
    ):
        p5, p50, p95, p99 = np.percentile(values, [5, 50, 95, 99], method="inverted_cdf").tolist()
        assert dataclasses.astuple(spread) == (np.mean(values), min(values), p5, p50, p95, p99, max(values))
    assert found.predictions is None
    for length, kind, most in ((38, "sentences", 36), (42, "sentences", 40), (43, "pairs", 39), (44, "pairs", 40)):
        long = audit(large, RowsConfig(length=length, kind=kind), sample_rows=1).long_sentences
        assert long == sum(n > most for n in sentences)


def test_a_sample_is_near_the_whole(large):
    whole = audit(large, RowsConfig(length=16), sample_rows=10**9)
    part = audit(large, RowsConfig(length=16), sample_rows=100)
    assert part.sampled_rows == 100 < whole.sampled_rows == whole.rows
    assert dict(part.frequent_tokens)["the"] == pytest.approx(dict(whole.frequent_tokens)["the"], abs=0.06)
    assert part.sampled_tokens < whole.sampled_tokens == whole.tokens
    sampled = {"sampled_rows": 0, "sampled_tokens": 0, "frequent_tokens": ()}
    assert dataclasses.replace(part, **sampled) == dataclasses.replace(whole, **sampled)


@pytest.mark.parametrize("kind", ["sentences", "pairs"])
def test_the_report_says_it_all_in_100_columns(large, kind, monkeypatch):
    monkeypatch.setattr(large, "path", large.path.parent / ("out/../" * 30) / "out")
    config = RowsConfig(length=48, kind=kind, examples_per_row=3)
    found = audit(large, config, np.arange(49), slots=60)
    text = found.text()
    assert max(map(len, text.splitlines())) <= 100
    said = {line[:22].strip(): line[22:].split()[0] for line in text.splitlines() if line[22:].split()}
    assert said["documents"] == "150"
    assert said["unknown tokens"] == f"{found.unknown_rate:.2%}"
    assert said["rows"] == f"{found.rows:,}"
    assert said["padding, 3 a row"] == f"{found.padding_share:.2%}"
    assert said["padding, unpacked"] == f"{found.packings[0].padding_share:.2%}"
    assert said["predictions a row"] == f"{found.predictions.mean:.2f}"
    assert said["unused slots"] == f"{found.predictions.unused_share:.2%}"
    assert ("random next sentences" in said) == (kind == "pairs")
    assert ("truncated tokens" in said) == (kind == "pairs")
    bars = [line.count("#") for line in text.splitlines() if " to " in line and line.lstrip()[0].isdigit()]
    counts = [count for *_, count in found.example_histogram]
    assert len(bars) == 16
    assert max(bars) == 60 == bars[int(np.argmax(counts))]
    assert all((bar > 0) == (count > 0) for bar, count in zip(bars, counts, strict=True))
    assert json.loads(json.dumps(found.as_dict()))["packings"][1]["examples_per_row"] == 3
    assert set(found.as_dict()) == {field.name for field in dataclasses.fields(found)}


def test_a_report_of_large_numbers_keeps_its_columns(small):
    found = audit(small, RowsConfig(length=8, kind="pairs", examples_per_row=512), COUNTS)
    huge = Spread(1234567.8, 1, 2, 3, 1_234_567, 12_345_678, 98_765_432)
    large = dataclasses.replace(
        found,
        documents=10**9,
        tokens=10**12,
        unknown_tokens=10**11,
        long_sentences=10**9,
        truncated_tokens=10**11,
        document_tokens=huge,
        example_histogram=tuple((8 * i + 1, 8 * i + 8, 10**9 + i) for i in range(16)),
        frequent_tokens=(("x" * 300, 0.5),),
    )
    assert max(map(len, large.text().splitlines())) <= 100


def test_what_cannot_be_is_refused(small):
    config = RowsConfig(length=8)
    with pytest.raises(InputError, match="counts has 8 entries, expected at least 9"):
        audit(small, config, COUNTS[:8])
    audit(small, config, COUNTS[:9])
    with pytest.raises(InputError, match="slots is 2, expected at least 3"):
        audit(small, config, COUNTS, slots=2)
    with pytest.raises(InputError, match="sample_rows is 0"):
        audit(small, config, sample_rows=0)
