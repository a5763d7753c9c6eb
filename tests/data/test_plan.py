"""Plans against slow rules on lists of tokens, and against what Google's own script made of its sample text."""

import json
import random
from itertools import chain, pairwise

import numpy as np
import pytest
from scipy import stats

from ctx_jax.data.plan import RowsConfig, make_plan
from ctx_jax.errors import InputError
from ctx_jax.text.load import load_tokenizer


def offsets(documents):
    """Boundaries of documents that are lists of sentence lengths."""
    sentences = [length for document in documents for length in document]
    return np.cumsum([0, *sentences]), np.cumsum([0, *map(len, documents)])


def random_documents(seed, count=40, longest=30):
    """Sentences of one token and far longer than a row, documents of one sentence and of many."""
    rng = random.Random(seed)
    lengths = (lambda: 1, lambda: rng.randint(1, longest), lambda: rng.randint(1, 8), lambda: rng.randint(1, 400))
    sentence = lambda: rng.choices(lengths, (2, 8, 8, 1))[0]()
    return [[sentence() for _ in range(rng.choice([1, 1, 2, 3, 10, 40]))] for _ in range(count)]


def one_sentence_each(lengths):
    """A plan whose examples, one a document, have these lengths, special tokens counted."""
    return offsets([[length - 2] for length in lengths])


def flatten(sentences):
    return list(chain.from_iterable(sentences))


# --- sentences


def test_sentences_of_a_corpus_by_hand():
    #             0..3 | 3..5 5..9  9..10 | 10..21 21..23 | 23..28 (5 tokens: just fit)
    boundaries = offsets([[3], [2, 4, 1], [11, 2], [5]])
    plan = make_plan(*boundaries, RowsConfig(length=7))
    a = [(0, 3), (3, 5), (5, 10), (10, 15), (15, 20), (20, 23), (23, 28)]
    assert plan.spans.tolist() == [[*span, 0, 0] for span in a]
    assert plan.lengths.tolist() == [5, 4, 7, 7, 7, 5, 7]
    assert plan.next_sentence.tolist() == [-1] * 7
    assert plan.truncated_tokens == 0


@pytest.mark.parametrize("length", [3, 4, 16, 64, 1000])
def test_sentences_lose_nothing_and_are_greedy(length):
    body = length - 2
    cut = 0
    for seed in range(10):
        documents = random_documents(seed)
        sentence_offsets, document_offsets = offsets(documents)
        plan = make_plan(sentence_offsets, document_offsets, RowsConfig(length=length, seed=seed))
        spans = plan.spans[:, :2].tolist()
        assert not plan.spans[:, 2:].any()
        boundaries = set(sentence_offsets.tolist())
        ends = set(sentence_offsets[document_offsets].tolist())
        # In order, nothing lost, nothing twice.
        assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), sentence_offsets[-1]]
        # Never across documents.
        assert ends <= {0, *(end for _, end in spans)}
        for start, end in spans:
            assert start < end <= start + body
            if end not in ends:
                # The next sentence, or the rest of this one, would not fit.
                following = sentence_offsets[np.searchsorted(sentence_offsets, end, side="right")]
                assert following - start > body
            if end not in boundaries:
                # Only a sentence that does not fit a row is cut, and it fills the row.
                assert end - start == body
                assert not boundaries & set(range(start + 1, end))
                cut += 1
        assert (plan.lengths == plan.spans[:, 1] - plan.spans[:, 0] + 2).all()
    assert cut > 0 or length == 1000


# --- pairs


def oracle(documents, document, config, rng, *, random_share=0.5, put_back=True):
    """create_instances_from_document on lists of tokens; a random document is never the same one.

    The flags make it wrong on purpose.
    """
    most = config.length - 3
    target = most
    if rng.random() < config.short_probability:
        target = rng.randint(2, most)
    found, lost = [], 0
    waiting = list(documents[document])
    chunk = []
    while waiting:
        chunk.append(waiting.pop(0))
        if waiting and sum(map(len, chunk)) < target:
            continue
        a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
        a = flatten(chunk[:a_end])
        if len(chunk) == 1 or rng.random() < random_share:
            is_random = True
            others = [other for i, other in enumerate(documents) if i != document]
            other = others[rng.randrange(len(others))]
            b = []
            for sentence in other[rng.randrange(len(other)) :]:
                b += sentence
                if len(b) >= target - len(a):
                    break
            if put_back:
                waiting = chunk[a_end:] + waiting
        else:
            is_random = False
            b = flatten(chunk[a_end:])
        whole = len(a) + len(b)
        a, b = truncate(a, b, most, rng)
        lost += whole - len(a) - len(b)
        found.append((a, b, is_random))
        chunk = []
    return found, lost


def truncate(a, b, most, rng):
    """Token by token off the longer one, B when equal; its front where the next of its random bits is set.

    The bits of all tokens that A loses are drawn at once, then those of B.
    """
    left, losers = [len(a), len(b)], []
    while sum(left) > most:
        losers.append(0 if left[0] > left[1] else 1)
        left[losers[-1]] -= 1
    bits = [rng.getrandbits(n) if n else 0 for n in (losers.count(0), losers.count(1))]
    texts = [list(a), list(b)]
    for loser in losers:
        del texts[loser][0 if bits[loser] & 1 else -1]
        bits[loser] >>= 1
    return texts


def as_tokens(sentence_offsets, document_offsets):
    """Documents as lists of sentences, sentences as lists of tokens; a token's name is its address."""
    sentences = [list(range(a, b)) for a, b in pairwise(sentence_offsets)]
    return [sentences[a:b] for a, b in pairwise(document_offsets)]


@pytest.mark.parametrize(
    ("length", "short", "duplicates"), [(5, 0.1, 1), (16, 0.5, 2), (64, 0.1, 3), (64, 0.0, 1), (512, 1.0, 1)]
)
def test_pairs_are_googles(length, short, duplicates):
    truncated = 0
    for seed in range(6):
        boundaries = offsets(random_documents(seed))
        config = RowsConfig(length=length, kind="pairs", short_probability=short, duplicates=duplicates, seed=seed)
        plan = make_plan(*boundaries, config)
        documents = as_tokens(*boundaries)
        expected, lost = [], 0
        for duplicate in range(duplicates):
            for document in range(len(documents)):
                rng = random.Random(f"{seed} {duplicate} {document}")
                found, cut = oracle(documents, document, config, rng)
                expected += found
                lost += cut
        actual = [
            (list(range(*span[:2])), list(range(*span[2:])), bool(is_random))
            for span, is_random in zip(plan.spans.tolist(), plan.next_sentence, strict=True)
        ]
        assert actual == expected
        assert plan.truncated_tokens == lost
        assert plan.lengths.tolist() == [len(a) + len(b) + 3 for a, b, _ in expected]
        assert plan.lengths.max() <= length
        truncated += lost
    assert truncated > 0


def document_of(addresses, sentence_offsets, document_offsets):
    return np.searchsorted(sentence_offsets[document_offsets], addresses, side="right") - 1


@pytest.mark.parametrize("count", [2, 3, 40])
def test_random_b_is_never_of_the_same_document_and_the_other_always_follows(count):
    boundaries = offsets(random_documents(count, count))
    plan = make_plan(*boundaries, RowsConfig(length=48, kind="pairs", duplicates=30))
    a, b = (document_of(plan.spans[:, i], *boundaries) for i in (0, 2))
    last_a, last_b = (document_of(plan.spans[:, i] - 1, *boundaries) for i in (1, 3))
    assert (a == last_a).all()
    assert (b == last_b).all()
    is_random = plan.next_sentence == 1
    assert (a[is_random] != b[is_random]).all()
    assert (a[~is_random] == b[~is_random]).all()
    assert (plan.spans[~is_random, 1] <= plan.spans[~is_random, 2]).all()
    assert set(plan.next_sentence.tolist()) == {0, 1}


def test_truncation_takes_front_and_end_with_equal_probability():
    # Two documents of one sentence of 200 tokens: each loses 150 of them, the longer one first, in turn after that.
    plan = make_plan(
        *offsets([[200], [200]]), RowsConfig(length=103, kind="pairs", duplicates=2000, short_probability=0)
    )
    assert len(plan.spans) == 4000
    assert (plan.lengths == 103).all()
    assert plan.truncated_tokens == 4000 * 300
    for start in (plan.spans[:, 0], plan.spans[:, 2]):
        bins = np.array([0, 68, 70, 72, 74, 76, 78, 80, 82, 151])
        observed = np.histogram(start % 200, bins)[0]
        expected = len(start) * np.diff(stats.binom.cdf(bins - 1, 150, 0.5))
        assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert stats.pearsonr(plan.spans[:, 0] % 200, plan.spans[:, 2] % 200).pvalue > 1e-3


def test_plans_are_functions_of_their_options():
    boundaries = offsets(random_documents(3))
    make = lambda **options: make_plan(*boundaries, RowsConfig(length=48, kind="pairs", **options))
    first, again, other = make(seed=1, duplicates=2), make(seed=1, duplicates=2), make(seed=2, duplicates=2)
    for field in ("spans", "next_sentence", "rows", "order", "truncated_tokens"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.spans, other.spans)
    # The first duplicate is the plan without duplicates, the second is another cut.
    alone = make(seed=1)
    size = alone.num_examples
    assert np.array_equal(first.spans[:size], alone.spans)
    assert not np.array_equal(first.spans[size : 2 * size], alone.spans)
    seen = []
    make_plan(
        *boundaries,
        RowsConfig(length=48, kind="pairs", duplicates=3),
        progress=lambda documents: [seen.append(document) or document for document in documents],
    )
    assert seen == [*range(40)] * 3


def test_a_single_document_makes_no_pairs():
    with pytest.raises(InputError, match="at least 2 documents"):
        make_plan(*offsets([[5, 5, 5]]), RowsConfig(length=16, kind="pairs"))
    assert make_plan(*offsets([[5, 5, 5]]), RowsConfig(length=16)).num_rows == 2
    for kind in ("sentences", "pairs"):
        with pytest.raises(InputError, match="no documents"):
            make_plan(*offsets([]), RowsConfig(length=16, kind=kind))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"length": 2}, "length"),
        ({"length": 4, "kind": "pairs"}, "length"),
        ({"kind": "pair"}, "kind"),
        ({"examples_per_row": 0}, "examples_per_row"),
        ({"kind": "pairs", "duplicates": 0}, "duplicates"),
        ({"duplicates": 2}, "duplicates"),
        ({"short_probability": 1.1}, "short_probability"),
        ({"short_probability": -0.1}, "short_probability"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_options_are_refused(options, field):
    with pytest.raises(InputError, match=field):
        RowsConfig(**options)


# --- pairs against the original's own instances


@pytest.fixture(scope="module")
def sample(data, reference):
    """Google's sample text as documents of sentences of tokens."""
    tokenizer = load_tokenizer(data / "vocab" / "bert_base_uncased")
    text = (reference / "bert_pretraining_data" / "sample_text.txt").read_text()
    return [
        [tokenizer.tokens(tokenizer.encode(line).ids) for line in document.splitlines()]
        for document in text.strip().split("\n\n")
    ]


@pytest.fixture(scope="module")
def google(reference):
    """Runs of Google's script by name: its options, and its instances as (A, B, is random), masks undone."""
    runs = json.loads((reference / "bert_pretraining_data" / "instances.json").read_text())
    result = {}
    for name, run in runs.items():
        instances = []
        for instance in run["instances"]:
            tokens = np.array(instance["tokens"], object)
            tokens[instance["positions"]] = instance["labels"]
            kinds = np.array(instance["segment_ids"])
            a, b = tokens[kinds == 0].tolist(), tokens[kinds == 1].tolist()
            assert (a[0], a[-1], b[-1]) == ("[CLS]", "[SEP]", "[SEP]")
            instances.append((a[1:-1], b[:-1], instance["is_random_next"]))
        args = run["args"]
        options = {"length": args["max_seq_length"], "short_probability": args["short_seq_prob"]}
        result[name] = (options | {"duplicates": args["dupe_factor"], "kind": "pairs"}, instances)
    return result


def places(part, document):
    """(first, one past the last) of every occurrence of a run of tokens."""
    return [(i, i + len(part)) for i in range(len(document) - len(part) + 1) if document[i : i + len(part)] == part]


def test_googles_instances_are_made_of_the_same_tokens(sample, google):
    flat = [flatten(document) for document in sample]
    edges = [set(np.cumsum([0, *map(len, document)]).tolist()) for document in sample]
    whole = 0
    for options, instances in google.values():
        for a, b, is_random in instances:
            in_a = [(d, *place) for d, document in enumerate(flat) for place in places(a, document)]
            in_b = [(d, *place) for d, document in enumerate(flat) for place in places(b, document)]
            if is_random:
                fitting = [(x, y) for x in in_a for y in in_b if x[0] != y[0]]
            else:
                fitting = [(x, y) for x in in_a for y in in_b if x[0] == y[0] and x[2] <= y[1]]
            assert fitting, (a, b, is_random)
            if len(a) + len(b) + 3 < options["length"]:
                assert any(
                    {x[1], x[2]} <= edges[x[0]] and {y[1], y[2]} <= edges[y[0]] and (is_random or x[2] == y[1])
                    for x, y in fitting
                )
                whole += 1
    assert whole > 90


def figures(lengths, is_random, length):
    """What a run is told by: examples, share of random next, mean length, share of rows that are not full."""
    lengths = np.array(lengths)
    return np.array([len(lengths), np.mean(is_random), lengths.mean(), np.mean(lengths < length)])


def plan_figures(boundaries, options, seed):
    plan = make_plan(*boundaries, RowsConfig(**options, seed=seed))
    return figures(plan.lengths, plan.next_sentence, options["length"])


def oracle_figures(documents, options, seed, flags):
    rng = random.Random(seed)
    config = RowsConfig(**options)
    found = [
        pair
        for _ in range(config.duplicates)
        for document in range(len(documents))
        for pair in oracle(documents, document, config, rng, **flags)[0]
    ]
    return figures([len(a) + len(b) + 3 for a, b, _ in found], [r for _, _, r in found], config.length)


@pytest.fixture(scope="module")
def cases(sample, google):
    """Boundaries, options and figures of what Google's script made: two runs of 128 tokens taken as one, one of 32."""
    boundaries = offsets([[len(sentence) for sentence in document] for document in sample])
    result = []
    for names in (["default_seq128_seed12345", "wwm_seq128_seed12345"], ["default_seq32_seed7"]):
        options = google[names[0]][0]
        instances = [instance for name in names for instance in google[name][1]]
        found = figures([len(a) + len(b) + 3 for a, b, _ in instances], [r for *_, r in instances], options["length"])
        result.append((boundaries, options | {"duplicates": len(names) * options["duplicates"]}, found))
    return result


def p_values(google_found, simulated):
    """Two-sided, of Google's figures among those of runs of the same size with other seeds, taken as normal."""
    scale = simulated.std(0, ddof=1) * np.sqrt(1 + 1 / len(simulated))
    return 2 * stats.t.sf(np.abs(google_found - simulated.mean(0)) / np.maximum(scale, 1e-9), len(simulated) - 1)


LEVEL = 0.01 / 8  # eight figures: by chance one of a hundred right algorithms fails


def test_statistics_are_those_of_googles_script(cases):
    for boundaries, options, found in cases:
        simulated = np.array([plan_figures(boundaries, options, seed) for seed in range(200)])
        varies = simulated.std(0) > 0
        assert varies[:2].all()
        assert (p_values(found, simulated)[varies] > LEVEL).all(), (found, simulated.mean(0), simulated.std(0))
        assert (found == simulated[0])[~varies].all()


@pytest.mark.parametrize(
    ("options", "flags", "wrong"),
    [
        ({}, {}, False),
        ({}, {"put_back": False}, True),
        ({}, {"random_share": 0.3}, True),
        ({}, {"random_share": 0.7}, True),
        ({"short_probability": 0.4}, {}, True),
    ],
    ids=["right", "no put-back", "random 0.3", "random 0.7", "short 0.4"],
)
def test_those_statistics_find_a_wrong_algorithm(cases, options, flags, wrong):
    boundaries, rightly, found = cases[0]
    documents = as_tokens(*boundaries)
    simulated = np.array([oracle_figures(documents, rightly | options, seed, flags) for seed in range(100)])
    assert (p_values(found, simulated) < LEVEL).any() == wrong


# --- packing


def test_one_example_a_row_is_the_identity():
    for kind in ("sentences", "pairs"):
        plan = make_plan(*offsets(random_documents(1)), RowsConfig(length=32, kind=kind))
        assert plan.num_rows == plan.num_examples > 100
        assert np.array_equal(plan.rows, np.arange(plan.num_rows + 1))
        assert np.array_equal(plan.order, np.arange(plan.num_rows))


@pytest.mark.parametrize("kind", ["sentences", "pairs"])
@pytest.mark.parametrize("per_row", [2, 3, 8])
def test_packing_is_best_fit(kind, per_row):
    rng = random.Random(per_row)
    documents = [[rng.choice([1, 1, 2, rng.randint(1, 60)])] for _ in range(300)]
    plan = make_plan(*offsets(documents), RowsConfig(64, kind, per_row))
    alone = make_plan(*offsets(documents), RowsConfig(64, kind))
    assert np.array_equal(plan.spans, alone.spans)
    assert np.array_equal(plan.next_sentence, alone.next_sentence)
    # Every example exactly once.
    assert plan.rows[0] == 0
    assert plan.rows[-1] == plan.num_examples
    assert np.array_equal(np.sort(plan.order), np.arange(plan.num_examples))
    sizes = np.diff(plan.rows)
    assert sizes.min() >= 1
    assert sizes.max() == per_row
    row_of = np.empty(plan.num_examples, int)
    row_of[plan.order] = np.repeat(np.arange(plan.num_rows), sizes)
    assert np.bincount(row_of, plan.lengths).max() <= 64
    # Example by example: the fullest row that has room, a new one only where none has.
    room, places_left = np.full(plan.num_rows, 64), np.full(plan.num_rows, per_row)
    opened = 0
    for length, row in zip(plan.lengths, row_of, strict=True):
        open_rows = np.arange(plan.num_rows) < opened
        fitting = room[open_rows & (places_left > 0) & (room >= length)]
        if len(fitting):
            assert row < opened
            assert room[row] == fitting.min()
        else:
            assert row == opened
            opened += 1
        room[row] -= length
        places_left[row] -= 1
    assert room.min() >= 0
    assert places_left.min() >= 0
    assert opened == plan.num_rows < plan.num_examples


def test_packed_rows_are_full():
    lengths = np.random.default_rng(0).integers(5, 129, 10_000)
    boundaries = one_sentence_each(lengths)
    packed = make_plan(*boundaries, RowsConfig(length=128, examples_per_row=8))
    assert np.array_equal(packed.lengths, lengths)
    assert lengths.sum() / (packed.num_rows * 128) > 0.95
    assert lengths.sum() / (make_plan(*boundaries, RowsConfig(length=128)).num_rows * 128) < 0.6
