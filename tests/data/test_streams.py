"""Windows against the text itself: every step of every chain in plain lists, laid out and cut by hand."""

import collections
import random
import re
import time
from itertools import islice, pairwise

import numpy as np
import pytest

from ctx_jax.arrays import Windows
from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.plan import RowsConfig
from ctx_jax.data.streams import Streams
from ctx_jax.errors import InputError
from ctx_jax.text.words import Words

END, BEGIN, UNK, FIRST = range(4)  # FIRST: id of the first word
CORPORA = ["mixed", "distinct", "single", "short", "one"]
# B and T: a step at a time; longer than a sentence; longer than a document; one stream; streams of few windows.
CUTS = [(1, 1), (3, 1), (4, 5), (2, 37), (1, 90), (8, 20), (5, 7)]


def random_documents(name, seed=0):
    """Documents of sentences of ids."""
    rng = random.Random(f"{name} {seed}")
    word = lambda: rng.randrange(FIRST, 60)
    if name == "one":  # document, of long and short sentences
        return [[[word() for _ in range(rng.choice([1, 2, 50]))] for _ in range(30)]]
    if name == "single":  # words, nothing else
        return [[[word()] for _ in range(rng.randint(1, 6))] for _ in range(100)]
    if name == "short":  # documents of a sentence of 1 to 3 words
        return [[[word() for _ in range(rng.randint(1, 3))]] for _ in range(200)]
    lengths = lambda: [rng.choice([1, 2, rng.randint(1, 45)]) for _ in range(rng.choice([1, rng.randint(1, 7)]))]
    documents = [[[word() for _ in range(length)] for length in lengths()] for _ in range(70)]
    if name == "distinct":  # no word comes twice
        number = iter(range(FIRST, 10**6))
        documents = [[[next(number) for _ in sentence] for sentence in document] for document in documents]
    return documents


def write_corpus(path, documents):
    """Builds a corpus of words w3, w4 … with these ids; some sentences are longer than a record."""
    size = max(word for document in documents for sentence in document for word in sentence) + 1
    vocabulary = ["</S>", "<S>", "<UNK>", *(f"w{index}" for index in range(FIRST, size))]
    (path / "words.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    lines = lambda document: "\n".join(" ".join(f"w{word}" for word in sentence) for sentence in document)
    (path / "text").write_text("\n\n".join(map(lines, documents)))
    tokenizer = Words(path / "words.txt")
    build({"train": [path / "text"]}, tokenizer, path / "out", processes=1, record_tokens=30, show_progress=False)
    return Corpus(path / "out")


@pytest.fixture(scope="module")
def texts():
    return {name: random_documents(name) for name in CORPORA}


@pytest.fixture(scope="module")
def corpora(texts, tmp_path_factory):
    return {name: write_corpus(tmp_path_factory.mktemp(name), texts[name]) for name in CORPORA}


def config(length, seed=1):
    return RowsConfig(length=length, kind="stream", seed=seed)


def take(batches, count):
    return list(islice(batches, count))


def assert_equal(found, expected):
    for name, x, y in zip(Windows._fields, found, expected, strict=True):
        assert x.dtype == (np.uint32 if name == "numbers" else np.int32), name
        np.testing.assert_array_equal(x, y, err_msg=name, strict=True)


# The oracle.


def epoch_order(size, seed, epoch):
    """Documents sorted by the epoch's random numbers."""
    numbers = np.random.Philox([seed, epoch]).random_raw(size).tolist()
    return sorted(range(size), key=lambda document: numbers[document])


def all_steps(documents, order):
    """(forward input, forward target, backward input, backward target), for every step one after the other."""
    steps = []
    for document in order:
        for sentence in documents[document]:
            forward = [BEGIN, *sentence, END]
            backward = [END, *reversed(sentence), BEGIN]
            for place in range(len(sentence) + 1):
                steps.append((forward[place], forward[place + 1], backward[place], backward[place + 1]))
    return steps


def as_windows(rows, length, number):
    """Lists of steps as a batch; what a row lacks is 0."""
    ids = np.zeros((4, len(rows), length), np.int32)
    for r, row in enumerate(rows):
        for t, step in enumerate(row):
            ids[:, r, t] = step
    lengths = np.array([len(row) for row in rows], np.int32)
    return Windows(*ids, lengths, np.full(len(rows), number, np.uint32))


def expected_epoch(documents, batch_size, length, seed, epoch):
    """All batches of an epoch."""
    steps = all_steps(documents, epoch_order(len(documents), seed, epoch))
    count = len(steps) // batch_size // length
    streams = [steps[b * count * length : (b + 1) * count * length] for b in range(batch_size)]
    return [
        as_windows([stream[w * length : (w + 1) * length] for stream in streams], length, epoch * count + w)
        for w in range(count)
    ]


def test_the_corpora_are_of_the_kinds_that_they_should_be(texts, corpora):
    steps = {name: len(all_steps(texts[name], range(len(texts[name])))) for name in CORPORA}
    assert min(steps.values()) >= 2 * 90
    assert steps["mixed"] > 1000
    for name in CORPORA:
        sentences = [sentence for document in texts[name] for sentence in document]
        assert min(map(len, sentences)) == 1
        assert (max(map(len, sentences)) > 37) == (name in ("mixed", "distinct", "one"))
        np.testing.assert_array_equal(corpora[name].sentence_lengths, [len(sentence) for sentence in sentences])
        words = [word for sentence in sentences for word in sentence]
        assert corpora[name].tokens(0, corpora[name].num_tokens).tolist() == words
        assert (len(set(words)) == len(words)) == (name == "distinct")


# Training: B streams of an epoch's order.


@pytest.mark.parametrize(("batch_size", "length"), CUTS)
@pytest.mark.parametrize("name", CORPORA)
def test_windows_are_what_the_text_says(name, batch_size, length, texts, corpora):
    documents, streams = texts[name], Streams(corpora[name], config(length))
    steps = len(all_steps(documents, range(len(documents))))
    assert streams.num_steps == steps
    assert streams.num_rows == steps // length
    epochs = 3 if length > 1 else 2  # of the many windows of a step
    expected = [batch for epoch in range(epochs) for batch in expected_epoch(documents, batch_size, length, 1, epoch)]
    assert len(expected) == epochs * streams.windows_per_stream(batch_size) >= epochs
    for found, batch in zip(streams.batches(batch_size, prefetch=False), expected, strict=False):
        assert_equal(found, batch)


def test_other_random_corpora(tmp_path):
    rng = random.Random(3)
    for trial in range(12):
        (tmp_path / str(trial)).mkdir()
        documents = [
            [[rng.randrange(FIRST, 9) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
            for _ in range(rng.randint(1, 6))
        ]
        corpus = write_corpus(tmp_path / str(trial), documents)
        steps = len(all_steps(documents, range(len(documents))))
        batch_size = rng.randint(1, min(4, steps))
        length = rng.randint(1, steps // batch_size)
        streams = Streams(corpus, config(length, seed=trial))
        for epoch in (0, 1, 10**6):
            expected = expected_epoch(documents, batch_size, length, trial, epoch)
            start = epoch * len(expected) * batch_size
            for found, batch in zip(streams.batches(batch_size, start=start, prefetch=False), expected, strict=False):
                assert_equal(found, batch)


@pytest.mark.parametrize(("batch_size", "length"), [(4, 5), (3, 1), (8, 20)])
def test_every_step_once_an_epoch_but_for_what_is_left_over(batch_size, length, texts, corpora):
    # No two steps of this corpus are the same but those of the same words.
    documents = texts["distinct"]
    everything = collections.Counter(all_steps(documents, range(len(documents))))
    assert max(everything.values()) == 1
    document_of = {word: d for d, document in enumerate(documents) for sentence in document for word in sentence}
    streams = Streams(corpora["distinct"], config(length))
    per_epoch = streams.windows_per_stream(batch_size)
    batches = take(streams.batches(batch_size), 4 * per_epoch)
    assert streams.num_steps % (8 * 20)  # something is left over
    orders = []
    for epoch in range(4):
        ids = np.stack([batch[:4] for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch]])
        # [window, kind, stream, step] → the streams end to end
        steps = [tuple(step) for step in ids.transpose(2, 0, 3, 1).reshape(-1, 4).tolist()]
        assert max(collections.Counter(steps).values()) == 1
        missing = set(everything) - set(steps)
        assert set(steps) <= set(everything)
        assert len(missing) == streams.num_steps % (batch_size * length) < batch_size * length
        # Documents come one after the other, each once.
        order = [document_of[step[0]] for step in steps if step[0] >= FIRST]
        runs = [d for d, before in zip(order, [None, *order], strict=False) if d != before]
        assert len(set(runs)) == len(runs) > 30
        # Those that are missing are the last ones.
        gone = {document_of[word] for step in missing for word in step if word >= FIRST}
        assert not gone & set(runs[:-1])
        orders.append(runs)
    for i, one in enumerate(orders):
        for other in [*orders[i + 1 :], list(range(len(documents)))]:
            assert sum(a == b for a, b in zip(one, other, strict=False)) < 8


def test_an_order_is_a_function_of_the_seed(texts, corpora):
    # Two at once: neither gets the other's order.
    for one, other in [(1, 2), (0, 1)]:
        pair = [Streams(corpora["mixed"], config(5, seed)) for seed in (one, other)]
        count = 2 * pair[0].windows_per_stream(4)
        found = list(zip(*(take(streams.batches(4), count) for streams in pair), strict=True))
        turns = list(islice(zip(*(streams.batches(4) for streams in pair), strict=True), count))
        for a, b in zip(found, turns, strict=True):
            assert_equal(a[0], b[0])
            assert_equal(a[1], b[1])
        ids = np.stack([[batch.forward_ids for batch in pair] for pair in found])
        assert np.mean(ids[:, 0] == ids[:, 1]) < 0.3
        # A neighbouring seed's epoch is not the next epoch of this one.
        assert np.mean(ids[count // 2 :, 0] == ids[: count // 2, 1]) < 0.3
        for seed, streams in zip((one, other), turns[0], strict=True):
            assert_equal(streams, expected_epoch(texts["mixed"], 4, 5, seed, 0)[0])


@pytest.mark.parametrize(("batch_size", "length"), [(4, 5), (3, 1), (8, 20)])
@pytest.mark.parametrize("name", ["mixed", "short"])
def test_resuming_anywhere_is_going_on(name, batch_size, length, corpora):
    streams = Streams(corpora[name], config(length))
    per_epoch = streams.windows_per_stream(batch_size)
    batches = take(streams.batches(batch_size, prefetch=False), 2 * per_epoch + 3)
    for done in {
        *range(min(len(batches), 20)),
        *range(max(per_epoch - 2, 0), per_epoch + 3),
        2 * per_epoch,
        len(batches) - 1,
    }:
        fresh = Streams(corpora[name], config(length))
        resumed = fresh.batches(batch_size, start=done * batch_size, prefetch=False)
        for a, b in zip(resumed, batches[done : done + 12], strict=False):
            assert_equal(a, b)
    for done in (1, per_epoch - 1):  # and to the end, reading ahead
        resumed = take(streams.batches(batch_size, start=done * batch_size), len(batches) - done)
        for a, b in zip(resumed, batches[done:], strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_parts_of_the_hosts_make_the_whole(num_hosts, texts, corpora):
    streams = Streams(corpora["mixed"], config(7))
    count = streams.windows_per_stream(8) + 5  # into the second epoch
    expected = [batch for epoch in range(2) for batch in expected_epoch(texts["mixed"], 8, 7, 1, epoch)][3:count]
    for split in (np.arange(8), np.arange(8).reshape(-1, num_hosts).T.ravel()):  # side by side, and strewn
        parts = [
            take(streams.batches(8, start=24, rows=part, prefetch=False), count - 3)
            for part in np.split(split, num_hosts)
        ]
        for batch, *pieces in zip(expected, *parts, strict=True):
            assert all(piece.forward_ids.shape == (8 // num_hosts, 7) for piece in pieces)
            together = Windows(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
            assert_equal(together, Windows(*(array[split] for array in batch)))
    for part in np.split(np.arange(8), num_hosts):
        for batch, piece in zip(streams.in_order(8), streams.in_order(8, rows=part), strict=True):
            assert_equal(piece, Windows(*(array[part] for array in batch)))


@pytest.mark.parametrize("name", ["mixed", "single"])
def test_reading_ahead_changes_nothing(name, corpora):
    streams = Streams(corpora[name], config(3))
    count = 2 * streams.windows_per_stream(4) + 2
    ahead, plain = (take(streams.batches(4, prefetch=prefetch), count) for prefetch in (True, False))
    for a, b in zip(ahead, plain, strict=True):
        assert_equal(a, b)


def test_numbers_count_windows_over_epochs_and_resuming(corpora):
    streams = Streams(corpora["mixed"], config(20))
    per_epoch = streams.windows_per_stream(8)
    assert per_epoch > 2
    for start in (0, 1, per_epoch - 1, 3 * per_epoch + 1):
        for part in (range(8), (6, 7)):
            batches = take(streams.batches(8, start=8 * start, rows=part), 2 * per_epoch)
            for number, batch in enumerate(batches, start=start):
                assert batch.numbers.dtype == np.uint32
                assert batch.numbers.tolist() == [number] * len(part)
                assert batch.lengths.tolist() == [20] * len(part)


@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (4, 5), (8, 19), (2, 37)])
@pytest.mark.parametrize("name", ["mixed", "single", "one"])
def test_the_next_window_goes_on_where_the_last_one_ended(name, batch_size, length, corpora):
    streams = Streams(corpora[name], config(length))
    per_epoch = streams.windows_per_stream(batch_size)
    batches = take(streams.batches(batch_size, prefetch=False), 2 * per_epoch)
    went_on = ended = 0
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        for before, after in pairwise(epoch):
            for row in range(batch_size):
                last, first = before.forward_targets[row, -1], after.forward_ids[row, 0]
                back_last, back_first = before.backward_targets[row, -1], after.backward_ids[row, 0]
                if last == END:
                    assert (first, back_last, back_first) == (BEGIN, BEGIN, END)
                    ended += 1
                else:
                    assert (first, back_first) == (last, back_last)
                    assert min(first, back_first) >= FIRST
                    went_on += 1
        # Within a window it is the same.
        for window in epoch:
            inputs, targets = window.forward_ids[:, 1:], window.forward_targets[:, :-1]
            np.testing.assert_array_equal(inputs, np.where(targets == END, BEGIN, targets))
            inputs, targets = window.backward_ids[:, 1:], window.backward_targets[:, :-1]
            np.testing.assert_array_equal(inputs, np.where(targets == BEGIN, END, targets))
    assert went_on > 0
    assert ended > 0


# Held-out text: every step once, in order.


@pytest.mark.parametrize(("batch_size", "length"), [*CUTS, (7, 11), (100, 3), (1000, 20), (2, 10**4)])
@pytest.mark.parametrize("name", CORPORA)
def test_in_order_gives_every_step_once(name, batch_size, length, texts, corpora):
    documents = texts[name]
    steps = all_steps(documents, range(len(documents)))
    streams = Streams(corpora[name], config(length))
    count = -(-len(steps) // (batch_size * length))
    cut = [steps[b * count * length : (b + 1) * count * length] for b in range(batch_size)]
    batches = list(streams.in_order(batch_size))
    assert len(batches) == count
    for number, batch in enumerate(batches):
        rows = [stream[number * length : (number + 1) * length] for stream in cut]
        assert_equal(batch, as_windows(rows, length, number))
    # Streams end to end are the text.
    found = []
    for row in range(batch_size):
        for batch in batches:
            found += zip(*(ids[row, : batch.lengths[row]].tolist() for ids in batch[:4]), strict=True)
    assert found == steps
    if batch_size == 1000:
        assert not batches[0].lengths[-1]  # there are more streams than the text has windows


def test_in_order_does_not_depend_on_the_seed_and_may_be_read_again(corpora):
    streams, other = (Streams(corpora["mixed"], config(6, seed)) for seed in (1, 2))
    found = list(streams.in_order(5))
    for a, b, c in zip(found, streams.in_order(5), other.in_order(5), strict=True):
        assert_equal(a, b)
        assert_equal(a, c)


@pytest.mark.parametrize(
    ("limit", "windows"), [(1, 1), (4, 1), (7, 1), (8, 2), (9, 2), (40, 10), (43, 10), (10**6, None), (None, None)]
)
def test_in_order_limits_each_stream(limit, windows, corpora):
    streams = Streams(corpora["mixed"], config(6))
    everything = list(streams.in_order(4))
    assert len(everything) > 40
    found = list(streams.in_order(4, limit=limit))
    assert len(found) == (windows or len(everything))
    for a, b in zip(found, everything, strict=False):
        assert_equal(a, b)


# What cannot be, and how long it takes.


def test_batches_that_cannot_be_are_refused(corpora):
    streams = Streams(corpora["mixed"], config(5))
    for batch_size in (0, -4):
        with pytest.raises(InputError, match=f"batch size is {batch_size}, expected at least 1"):
            streams.batches(batch_size)
    for start in (-4, -1, 1, 6):
        with pytest.raises(InputError, match=f"start is {start}, expected a multiple of the batch size 4"):
            streams.batches(4, start=start)
    for part in ([-1, 0], [4], []):
        with pytest.raises(InputError, match=f"rows are {re.escape(str(part))}, expected at least one, of 0 to 3"):
            streams.batches(4, rows=part)
    for limit in (0, -3):
        with pytest.raises(InputError, match=f"limit is {limit}, expected at least 1"):
            next(streams.in_order(4, limit=limit))


def test_too_few_words_are_refused(tmp_path):
    corpus = write_corpus(tmp_path, [[[FIRST] * 4, [FIRST]], [[FIRST] * 2]])  # 5 + 2 + 3 steps
    assert Streams(corpus, config(5)).windows_per_stream(2) == 1
    assert len(take(Streams(corpus, config(10)).batches(1), 3)) == 3
    for batch_size, length in ((2, 6), (1, 11), (11, 1)):
        streams = Streams(corpus, config(length))
        message = f"out, split 'train': 10 words are too few for {batch_size} streams of {length}$"
        with pytest.raises(InputError, match=message):
            streams.windows_per_stream(batch_size)
        with pytest.raises(InputError, match=message):
            streams.batches(batch_size)
        assert len(list(streams.in_order(batch_size))) == 1


def test_resuming_costs_nothing(corpora, monkeypatch):
    streams = Streams(corpora["mixed"], config(5))
    reads = []
    chain = streams._chain
    monkeypatch.setattr(streams, "_chain", lambda *place: reads.append(place) or chain(*place))
    per_epoch = streams.windows_per_stream(4)
    for window in (0, per_epoch * 1000 + 1, per_epoch * 10**6):
        reads.clear()
        batch = next(streams.batches(4, start=4 * window, prefetch=False))
        # Each row: the sentences that it begins in and those that begin in it.
        begun = np.count_nonzero(batch.forward_ids == BEGIN) + np.count_nonzero(batch.forward_ids[:, 0] != BEGIN)
        assert len(reads) == begun < 30


@pytest.mark.alone
def test_assembling_is_quick(tmp_path):
    rng = random.Random(5)
    documents = [
        [[rng.randrange(FIRST, 2000) for _ in range(rng.randint(8, 40))] for _ in range(rng.randint(5, 30))]
        for _ in range(200)
    ]
    streams = Streams(write_corpus(tmp_path, documents), config(20))
    batches = streams.batches(128, prefetch=False)
    next(batches)  # opens the files and sorts the documents
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        batch = next(batches)
        seconds.append(time.perf_counter() - begun)
    assert batch.forward_ids.shape == (128, 20)
    assert min(seconds) < 0.5, seconds
