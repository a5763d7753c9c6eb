"""Batches against the text they were made of, read by hand."""

import random
import re
import time
from itertools import islice, pairwise

import jax
import numpy as np
import pytest
from scipy import stats

from ctx_jax.arrays import Batch
from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import GRAIN_ROWS, Loader
from ctx_jax.data.plan import RowsConfig, make_plan
from ctx_jax.errors import InputError
from ctx_jax.text.wordpiece import WordPiece

PAD, UNK, CLS, SEP = range(4)
FIRST = 5  # id of the first word
CONFIGS = [
    RowsConfig(length=24, seed=1),
    RowsConfig(length=24, examples_per_row=4, seed=1),
    RowsConfig(length=24, kind="pairs", seed=1),
    RowsConfig(length=24, kind="pairs", examples_per_row=3, short_probability=0.8, duplicates=2, seed=1),
    RowsConfig(length=3, seed=1),  # so many rows that Grain shuffles them
]
names = lambda config: f"{config.kind}-{config.examples_per_row}-{config.length}"


def write_corpus(path, documents):
    """Builds a corpus of words w0, w1 … that are tokens 5, 6 …; a word that the vocabulary lacks is unknown."""
    (path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map("w{}".format, range(90))])
    )
    lines = lambda document: "\n".join(" ".join(f"w{i - FIRST}" for i in sentence) for sentence in document)
    (path / "text").write_text("\n\n".join(map(lines, documents)))
    tokenizer = WordPiece(path / "vocab.txt")
    build({"train": [path / "text"]}, tokenizer, path / "out", processes=1, record_tokens=30, show_progress=False)
    return Corpus(path / "out")


@pytest.fixture(scope="module")
def documents():
    """80 documents of 1 to 8 sentences of 1 to 40 tokens."""
    rng = random.Random(0)
    sentence = lambda: rng.choices(range(FIRST, FIRST + 90), k=rng.choice([1, 4, rng.randint(1, 40)]))
    return [[sentence() for _ in range(rng.choice([1, rng.randint(1, 8)]))] for _ in range(80)]


@pytest.fixture(scope="module")
def corpus(documents, tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents)


@pytest.fixture(scope="module")
def stream(documents):
    return [token for document in documents for sentence in document for token in sentence]


@pytest.fixture(scope="module", params=CONFIGS, ids=names)
def loader(request, corpus):
    return Loader(corpus, request.param)


def take(batches, count):
    return list(islice(batches, count))


def rows(batches):
    """Batches end to end."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def cut(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def assert_equal(a, b):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


def expected_row(stream, plan, config, row, epoch):
    """A row as plan and text say, by hand."""
    ids, types, segments, positions = [], [], [], []
    examples, labels = [0] * config.examples_per_row, [-1] * config.examples_per_row
    for place, example in enumerate(plan.order[plan.rows[row] : plan.rows[row + 1]]):
        a_start, a_end, b_start, b_end = plan.spans[example]
        a, b = [CLS, *stream[a_start:a_end], SEP], []
        if config.kind == "pairs":
            b = [*stream[b_start:b_end], SEP]
        ids += a + b
        types += [0] * len(a) + [1] * len(b)
        segments += [place + 1] * len(a + b)
        positions += range(len(a + b))
        examples[place], labels[place] = example, plan.next_sentence[example]
    pad = lambda values, value=0: np.array([*values, *[value] * (config.length - len(values))], np.int32)
    return Batch(
        pad(ids, PAD),
        pad(types),
        pad(segments),
        pad(positions),
        np.array(examples, np.uint32),
        np.uint32(epoch),
        np.array(labels, np.int32),
    )


def test_rows_are_what_plan_and_text_say(loader, corpus, stream):
    plan = make_plan(corpus.sentence_offsets, corpus.document_offsets, loader.config)
    assert loader.num_rows == plan.num_rows > 80
    epoch, seen = 1, []
    for batch in take(loader.batches(16, start=loader.num_rows), loader.num_rows // 16):
        assert batch.input_ids.shape == (16, loader.config.length)
        for r in range(16):
            _, row = loader.row_at(loader.num_rows + len(seen))
            assert_equal(cut(batch, r), expected_row(stream, plan, loader.config, row, epoch))
            seen.append(row)
    assert len(set(seen)) == len(seen)
    # Nothing of this could be found if no row were filled up or none held several examples.
    everything = rows(loader.in_order(16))
    assert (everything.segment_ids == 0).any()
    assert (loader.num_rows >= GRAIN_ROWS) == (loader.config.length == 3)
    assert everything.segment_ids.max() == loader.config.examples_per_row
    assert set(np.unique(everything.next_sentence)) >= ({0, 1} if loader.config.kind == "pairs" else {-1})


def test_every_row_once_an_epoch_and_another_order_each(loader):
    size = loader.num_rows
    orders = []
    for epoch in range(4):
        found = [loader.row_at(epoch * size + i) for i in range(size)]
        assert {e for e, _ in found} == {epoch}
        orders.append([row for _, row in found])
        assert sorted(orders[-1]) == list(range(size))
    for i, one in enumerate(orders):
        for other in [*orders[i + 1 :], list(range(size))]:
            assert np.mean(np.array(one) == other) < 0.1
    # The same of the batches: three epochs and one row of the fourth.
    batches = rows(take(loader.batches(1), 3 * size + 1))
    np.testing.assert_array_equal(batches.epochs, [*np.repeat([0, 1, 2], size), 3])
    assert batches.epochs.dtype == np.uint32
    used = batches.segment_ids.max(1)
    for epoch in range(3):
        part = slice(epoch * size, (epoch + 1) * size)
        examples = np.concatenate([e[:n] for e, n in zip(batches.example_ids[part], used[part], strict=True)])
        assert np.array_equal(np.sort(examples), np.arange(loader.plan.num_examples))


def test_an_order_is_a_function_of_seed_and_position(corpus):
    for length in (24, 3):
        size = Loader(corpus, RowsConfig(length=length)).num_rows

        def order(seed, length=length, size=size):
            loader = Loader(corpus, RowsConfig(length=length, seed=seed))
            return np.array([loader.row_at(i)[1] for i in range(2 * size)])

        one, other = order(1), order(2)
        assert np.array_equal(one, order(1))
        assert np.mean(one == other) < 0.1
        # A neighbouring seed's epoch is not the next epoch of this one.
        assert np.mean(one[size:] == other[:size]) < 0.1
    first, again = (take(Loader(corpus, CONFIGS[3]).batches(8), 12) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)


def test_resuming_anywhere_is_going_on(loader):
    begin = 2 * loader.num_rows - 100
    batches = take(loader.batches(8, start=begin), 60)
    assert set(rows(batches).epochs) >= {1, 2}
    for done in (1, 7, 12, 13, 30, 59):
        resumed = take(loader.batches(8, start=begin + 8 * done), 60 - done)
        for a, b in zip(batches[done:], resumed, strict=True):
            assert_equal(a, b)
    # Also in the middle of a batch, and with another batch size.
    resumed = rows(take(loader.batches(5, start=begin + 13), 40))
    assert_equal(cut(rows(batches), slice(13, 13 + 5 * 40)), resumed)


@pytest.mark.parametrize("batch_size", [1, 3, 24, 480])
def test_another_batch_size_gives_the_same_rows(loader, batch_size):
    begin = loader.num_rows - 50
    expected = rows(take(loader.batches(8, start=begin), 60))
    assert_equal(rows(take(loader.batches(batch_size, start=begin), 480 // batch_size)), expected)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_parts_of_the_hosts_make_the_whole(loader, num_hosts):
    whole = take(loader.batches(8, start=3), 20)
    for split in (np.arange(8), np.arange(8).reshape(-1, num_hosts).T.ravel()):  # side by side, and strewn
        parts = [take(loader.batches(8, start=3, rows=part), 20) for part in np.split(split, num_hosts)]
        for batch, *pieces in zip(whole, *parts, strict=True):
            assert all(len(piece.input_ids) == 8 // num_hosts for piece in pieces)
            assert_equal(rows(pieces), cut(batch, split))
    for split in np.split(np.arange(8), num_hosts):
        for batch, part in zip(loader.in_order(8, limit=50), loader.in_order(8, limit=50, rows=split), strict=True):
            assert_equal(part, cut(batch, split))


def test_reading_ahead_changes_nothing(loader):
    for a, b in zip(take(loader.batches(8), 40), take(loader.batches(8, prefetch=False), 40), strict=True):
        assert_equal(a, b)


def test_batches_that_cannot_be_are_refused(corpus):
    loader = Loader(corpus, CONFIGS[0])
    for batch_size in (0, -4):
        with pytest.raises(InputError, match=f"batch size is {batch_size}, expected at least 1"):
            loader.batches(batch_size)
    with pytest.raises(InputError, match="start is -1, expected a position from 0"):
        loader.batches(4, start=-1)
    for part in ([-1, 0], [4], []):
        with pytest.raises(InputError, match=f"rows are {re.escape(str(part))}, expected at least one, of 0 to 3"):
            loader.batches(4, rows=part)


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_in_order_gives_every_row_once_and_fills_up(loader, stream, batch_size):
    batches = list(loader.in_order(batch_size))
    assert len(batches) == -(-loader.num_rows // batch_size)
    assert {batch.input_ids.shape for batch in batches} == {(batch_size, loader.config.length)}
    found = rows(batches)
    for row in range(loader.num_rows):
        expected = expected_row(stream, loader.plan, loader.config, row, 0)
        assert_equal(cut(found, row), expected)
    empty = cut(found, slice(loader.num_rows, None))
    assert len(empty.input_ids) == -loader.num_rows % batch_size
    assert (empty.input_ids == PAD).all()
    assert (empty.next_sentence == -1).all()
    for name in ("token_type_ids", "segment_ids", "positions", "example_ids", "epochs"):
        assert not getattr(empty, name).any()


@pytest.mark.parametrize("limit", [1, 2, 7, 50, 99, 10**6])
def test_in_order_spreads_a_limit_over_the_plan(corpus, limit):
    loader = Loader(corpus, CONFIGS[0])
    found = rows(loader.in_order(16, limit=limit))
    count = min(limit, loader.num_rows)
    assert len(found.input_ids) == -(-count // 16) * 16
    used = found.segment_ids.any(1)
    assert np.array_equal(used, np.arange(len(used)) < count)
    # With one example a row, its id is the row's number.
    chosen = found.example_ids[used, 0].astype(int)
    gaps = np.diff([*chosen, chosen[0] + loader.num_rows])
    assert gaps.min() >= loader.num_rows // count
    assert gaps.max() <= -(-loader.num_rows // count)
    assert_equal(rows(loader.in_order(16, limit=limit)), found)


def test_in_order_of_no_rows_is_refused(corpus):
    for limit in (0, -3):
        with pytest.raises(InputError, match=f"limit is {limit}, expected at least 1"):
            next(Loader(corpus, CONFIGS[0]).in_order(16, limit=limit))


@pytest.mark.alone
def test_resuming_costs_nothing(loader, monkeypatch):
    calls = []
    example = loader.example
    monkeypatch.setattr(loader, "example", lambda index: calls.append(index) or example(index))

    def first(start):
        calls.clear()
        begun = time.perf_counter()
        batch = next(loader.batches(64, start=start, prefetch=False))
        return time.perf_counter() - begun, len(calls), batch

    first(0)  # opens the files
    near = min(first(0)[0] for _ in range(3))
    for start in (10**6, 10**9):
        seconds = []
        for _ in range(3):
            elapsed, read, batch = first(start)
            seconds.append(elapsed)
            assert read == batch.segment_ids.max(1).sum()
        assert min(seconds) < 5 * near + 0.01
        assert batch.epochs[0] == start // loader.num_rows


def test_a_corpus_smaller_than_a_batch(tmp_path):
    documents = [[[5, 6, 7], [8]], [[9, 10]], [[11]]]
    corpus = write_corpus(tmp_path, documents)
    loader = Loader(corpus, RowsConfig(length=8))
    assert loader.num_rows == 3
    batch = next(loader.batches(16))
    assert batch.epochs.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5]
    for epoch in range(5):
        assert sorted(batch.example_ids[3 * epoch : 3 * epoch + 3, 0].tolist()) == [0, 1, 2]
    text = {tuple(row[row != PAD].tolist()) for row in batch.input_ids}
    assert text == {(CLS, 5, 6, 7, 8, SEP), (CLS, 9, 10, SEP), (CLS, 11, SEP)}
    # All six orders are equally likely.
    orders = [tuple(loader.row_at(3 * epoch + i)[1] for i in range(3)) for epoch in range(3000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
    # A single row, packed.
    packed = Loader(corpus, RowsConfig(length=16, examples_per_row=3))
    assert packed.num_rows == 1
    batch = next(packed.batches(4))
    assert batch.epochs.tolist() == [0, 1, 2, 3]
    assert all((a == b).all() for a, b in pairwise(batch.input_ids))
    assert batch.input_ids[0].tolist() == [2, 5, 6, 7, 8, 3, 2, 9, 10, 3, 2, 11, 3, 0, 0, 0]
    assert batch.segment_ids[0].tolist() == [1] * 6 + [2] * 4 + [3] * 3 + [0] * 3
    assert batch.example_ids[0].tolist() == [0, 1, 2]
    assert len(list(packed.in_order(4))) == 1
