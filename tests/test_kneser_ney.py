"""The Kneser-Ney baseline by hand, by the book (a dictionary an order), and as the command that is run."""

import collections
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.errors import InputError
from ctx_jax.text.wordpiece import WordPiece

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "kneser_ney.py"
BEGIN = "<s>"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kneser_ney", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kneser_ney"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kneser_ney"]


def flat(sentences):
    """Ids and offsets."""
    offsets = np.concatenate([[0], np.cumsum([len(sentence) for sentence in sentences])]).astype(np.int64)
    return np.array([word for sentence in sentences for word in sentence], np.int32), offsets


class ByTheBook:
    """Chen and Goodman's equations word by word; n-grams are tuples, and a sentence has one begin symbol."""

    def __init__(self, sentences, vocab_size, order, eos):
        self.vocab_size, self.order, self.eos = vocab_size, order, eos
        occurrences = collections.Counter()
        for sentence in sentences:
            chain = (BEGIN, *sentence, eos)
            for n in range(1, order + 1):
                occurrences.update(chain[i : i + n] for i in range(len(chain) - n + 1))
        before = collections.defaultdict(set)
        for gram in occurrences:
            before[gram[1:]].add(gram[0])
        self.counts = {
            gram: count if len(gram) == order or gram[0] == BEGIN else len(before[gram])
            for gram, count in occurrences.items()
            if gram != (BEGIN,)
        }
        self.discounts = [None] + [self.estimate(n) for n in range(1, order + 1)]
        self.following = collections.defaultdict(list)
        for gram, count in self.counts.items():
            self.following[gram[:-1]].append(count)

    def estimate(self, n):
        n1, n2, n3, n4 = (sum(len(g) == n and c == k for g, c in self.counts.items()) for k in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            if min(found) > 0:
                return found
        return [0.5, 1.0, 1.5]

    def probability(self, word, context):
        lower = 1 / self.vocab_size if not context else self.probability(word, context[1:])
        if context == (BEGIN,):
            lower = self.probability(word, ())
        if not (following := self.following[context]):
            return lower
        discounts = self.discounts[len(context) + 1]
        taken = lambda count: discounts[min(count, 3) - 1]
        count = self.counts.get((*context, word), 0)
        own = count - taken(count) if count else 0
        return (own + sum(map(taken, following)) * lower) / sum(following)

    def log_probabilities(self, sentences):
        found = []
        for sentence in sentences:
            chain = (BEGIN, *sentence, self.eos)
            for at in range(1, len(chain)):
                context = chain[max(at - self.order + 1, 0) : at]
                found.append(np.log(self.probability(chain[at], context)))
        return np.array(found)


def random_sentences(rng, number, vocab_size, longest=12):
    """Words of a skewed distribution, each often the one that came three words ago or the next after the last."""
    sentences = []
    for length in rng.integers(0, longest, number):
        words = (vocab_size * rng.random(length) ** 3).astype(int).tolist()
        for at in range(1, length):
            if (chance := rng.random()) < 0.3:
                words[at] = words[max(at - 3, 0)]
            elif chance < 0.6:
                words[at] = (words[at - 1] + 1) % vocab_size
        sentences.append(words)
    return sentences


def test_two_sentences_by_hand(script):
    """`a b` and `a` of the words </s>, a, b and c. No n-gram occurs three times, so the discounts are ½, 1 and 1½.

    Words before: <s> before a, a before b, a and b before </s>: counts 1, 1 and 2 of 4,
    which leaves (½ + ½ + 1) / 4 = ½ for ¼ each.
    """
    end, a, b, c = range(4)
    model = script.KneserNey(*flat([[a, b], [a]]), vocab_size=4, order=2, eos_id=end)
    assert [level.estimated for level in model.levels] == [False, False]
    p_end, p_a, p_b, p_c = 1 / 4 + 1 / 8, 1 / 8 + 1 / 8, 1 / 8 + 1 / 8, 1 / 8
    expected = [
        [(2 - 1) / 2 + 1 / 2 * p_a, 1 / 4 + 1 / 2 * p_b, 1 / 2 + 1 / 2 * p_end],  # a after <s>, b after a, </s> after b
        [1 / 2 * p_c, p_a, 1 / 4 + 1 / 2 * p_end],  # after c is nothing known: a as it is
        [1 / 2 * p_end],
    ]
    found = model.log_probabilities(*flat([[a, b], [c, a], []]))
    np.testing.assert_allclose(np.exp(found), np.concatenate(expected), rtol=1e-14)


def test_discounts_by_hand(script):
    """4, 2, 1 and 1 n-grams that occur one to four times: Y = 4 / (4 + 2·2) = ½."""
    discounts, estimated = script.estimate_discounts(np.array([1, 2, 3, 4, 1, 1, 2, 1, 0, 9]))
    assert estimated
    np.testing.assert_allclose(discounts, [0, 1 - 0.5 * 2 * 2 / 4, 2 - 0.5 * 3 * 1 / 2, 3 - 0.5 * 4 * 1 / 1])


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [1, 1, 2],  # nothing occurs three times
        [2, 2, 3],  # … or once
        [1, 2, 3, 3, 3, 3],  # 2 - 3 · ⅓ · 4 is below zero
        [1, 2, 3, 3],  # … and 2 - 3 · ⅓ · 2 zero
        [1, 2, 3, 4, 4, 4, 4, 4],  # 3 - 4 · ⅓ · 5
    ],
)
def test_discounts_that_cannot_be_estimated(script, counts):
    discounts, estimated = script.estimate_discounts(np.array(counts, np.int32))
    assert not estimated
    assert discounts.tolist() == list(script.FALLBACK)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("vocab_size", "size"), [(14, 3), (60, 600), (200, 300)])
def test_equals_the_book(script, order, vocab_size, size):
    """With discounts of which few can be estimated, all but those of single words, and those of single words too."""
    rng = np.random.default_rng(order)
    train, held_out = random_sentences(rng, size, vocab_size), random_sentences(rng, 40, vocab_size)
    model = script.KneserNey(*flat(train), vocab_size=vocab_size, order=order, eos_id=0)
    oracle = ByTheBook(train, vocab_size, order, 0)
    for n, level in enumerate(model.levels, start=1):
        assert np.count_nonzero(level.counts) == sum(len(gram) == n for gram in oracle.counts)
        np.testing.assert_allclose(level.discounts[1:], oracle.discounts[n], rtol=1e-12)
    estimated = [level.estimated for level in model.levels]
    if size == 3:
        assert not estimated[0]
    if size == 600:
        assert estimated == [False] + [True] * (order - 1)
    if size == 300 and order != 3:
        assert estimated[0]
    for sentences in (train, held_out):
        found = model.log_probabilities(*flat(sentences))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, oracle.log_probabilities(sentences), rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 9])
def test_sums_to_one(script, order):
    """After what the text has, what it has a part of, what only ends it, and what it never has."""
    rng = np.random.default_rng(1)
    train = random_sentences(rng, 100, 20)
    model = script.KneserNey(*flat(train), vocab_size=25, order=order, eos_id=3)
    longest = max(train, key=len)
    contexts = [longest[:n] for n in range(len(longest) + 1)] + random_sentences(rng, 20, 25)
    contexts += [[3], [24], [24, *longest[:3]], [*longest[:3], 24], [*longest, 3]]
    for context in contexts:
        found = model.log_probabilities(*flat([[*context, word] for word in range(25)]))
        mass = np.exp(found.reshape(25, -1)[:, len(context)])
        assert mass.min() > 0
        assert abs(mass.sum() - 1) < 1e-9, context


def test_order_above_every_sentence(script):
    """Orders without an n-gram have nothing to say."""
    train = [[1, 2], [2], []]
    few, many = (script.KneserNey(*flat(train), vocab_size=4, order=order, eos_id=0) for order in (4, 7))
    assert [len(level.keys) for level in many.levels[4:]] == [0, 0, 0]
    # The fourth order has the whole of the longest sentence, which occurs once whichever way it is counted.
    held_out = flat([[1, 2, 3, 1, 2, 2], [1, 2]])
    np.testing.assert_array_equal(few.log_probabilities(*held_out), many.log_probabilities(*held_out))


def test_uniform_words_have_the_perplexity_of_their_number(script):
    """All words of the vocabulary alike and independent, the end of the sentence among them."""
    rng = np.random.default_rng(0)
    vocab_size = 200

    def draw(number):
        words = rng.integers(0, vocab_size, number)
        ends = np.flatnonzero(words == 0)
        return [part[1:].tolist() for part in np.split(words, ends)[1:-1]]

    model = script.KneserNey(*flat(draw(300_000)), vocab_size=vocab_size, order=3, eos_id=0)
    perplexity = np.exp(-model.log_probabilities(*flat(draw(20_000))).mean())
    assert vocab_size * 0.99 < perplexity < vocab_size * 1.1


def test_longer_context_helps(script):
    rng = np.random.default_rng(2)
    train, held_out = (flat(random_sentences(rng, number, 30)) for number in (5000, 500))
    one, two, four = (
        -script.KneserNey(*train, vocab_size=30, order=order, eos_id=0).log_probabilities(*held_out).mean()
        for order in (1, 2, 4)
    )
    assert four < two - 0.03 < one - 0.2


def test_reverse_sentences(script):
    sentences = [[1, 2, 3], [], [4], [5, 6]]
    assert script.reverse_sentences(*flat(sentences)).tolist() == [3, 2, 1, 4, 6, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order: found 0"),
        ({"order": 101}, "order: found 101, expected 1 to 100"),
        ({"vocab_size": 0}, "vocab_size: found 0"),
        ({"eos_id": 5}, "eos_id: found 5"),
        ({"tokens": np.array([1, 2, 5])}, "ids from 1 to 5, expected 0 to 4"),
        ({"tokens": np.array([1, -1, 4])}, "ids from -1 to 4"),
        ({"tokens": np.array([1.0, 2.0, 4.0])}, "found float64, expected integers"),
        ({"offsets": np.array([0])}, "no sentence"),
        ({"offsets": np.array([0, 2])}, "number of tokens, 3"),
        ({"offsets": np.array([1, 3])}, "ascend from 0"),
        ({"offsets": np.array([0, 2, 1, 3])}, "ascend from 0"),
    ],
)
def test_bad_arguments(script, change, message):
    good = {"tokens": np.array([1, 2, 4]), "offsets": np.array([0, 1, 3]), "vocab_size": 5, "order": 2, "eos_id": 0}
    model = script.KneserNey(**good)
    with pytest.raises(InputError, match=message):
        script.KneserNey(**good | change)
    if change.keys() & {"tokens", "offsets"}:
        with pytest.raises(InputError, match=message):
            model.log_probabilities(**{name: (good | change)[name] for name in ("tokens", "offsets")})


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = 45


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus of 60 words, one of the same sentences each from its end, and the ids of both splits."""
    folder = tmp_path_factory.mktemp("kneser_ney")
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n")
    tokenizer = WordPiece(folder / "vocab.txt")
    rng = np.random.default_rng(5)
    drawn = {"train": random_sentences(rng, 400, 60), "validation": random_sentences(rng, 60, 60)}
    splits = {split: [sentence for sentence in sentences if sentence] for split, sentences in drawn.items()}
    for name, step in (("forward", 1), ("reversed", -1)):
        for split, sentences in splits.items():
            lines = (" ".join(words[word] for word in sentence[::step]) for sentence in sentences)
            (folder / f"{name}.{split}").write_text("\n".join(lines) + "\n")
        sources = {split: [folder / f"{name}.{split}"] for split in splits}
        build(sources, tokenizer, folder / name, processes=1, record_tokens=50, sentences="lines", show_progress=False)
    ids = {split: [[word + 5 for word in sentence] for sentence in sentences] for split, sentences in splits.items()}
    return folder, ids


def run(script, capsys, *arguments):
    assert script.main([str(argument) for argument in arguments]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_command(script, corpora, capsys, monkeypatch):
    """What the book says of the same ids, with those beyond the vocabulary made unknown."""
    monkeypatch.setattr(script, "READ_TOKENS", 100)
    folder, ids = corpora
    out, record = run(script, capsys, folder / "forward", "--vocab-size", VOCAB_SIZE, "--order", 3)
    mapped = {
        split: [[word if word < VOCAB_SIZE else 1 for word in sentence] for sentence in sentences]
        for split, sentences in ids.items()
    }
    oracle = ByTheBook(mapped["train"], VOCAB_SIZE, 3, 3).log_probabilities(mapped["validation"])
    assert record["perplexity"] == pytest.approx(np.exp(-oracle.mean()), rel=1e-9)
    assert f"{record['perplexity']:.3f}" in out
    held_out = Corpus(folder / "forward", "validation")
    assert record["predictions"] == len(oracle) == held_out.num_tokens + held_out.num_sentences
    assert record["unknown_share"] == pytest.approx(
        np.mean([word == 1 for sentence in mapped["validation"] for word in sentence]), abs=1e-6
    )
    assert 0.05 < record["unknown_share"] < 0.5
    assert (record["vocab_size"], record["order"], record["direction"]) == (VOCAB_SIZE, 3, "forward")
    assert len(record["ngrams"]) == len(record["discounts"]) == 3


def test_backward_is_forward_on_reversed_sentences(script, corpora, capsys):
    folder, _ = corpora
    records = {
        (name, backward): run(script, capsys, folder / name, *backward)[1]
        for name in ("forward", "reversed")
        for backward in ((), ("--backward",))
    }
    perplexity = {key: record["perplexity"] for key, record in records.items()}
    assert perplexity["forward", ("--backward",)] == pytest.approx(perplexity["reversed", ()], rel=1e-12)
    assert perplexity["reversed", ("--backward",)] == pytest.approx(perplexity["forward", ()], rel=1e-12)
    assert perplexity["forward", ()] != pytest.approx(perplexity["reversed", ()], rel=1e-3)
    assert {record["direction"] for record in records.values()} == {"forward", "backward"}
    assert all(record["vocab_size"] == 65 and record["order"] == 5 for record in records.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no counts.json"),
        (["forward", "--split", "validatoin"], "did you mean 'validation'?"),
        (["forward", "--split", "train"], "--split train"),
        (["forward", "--order", "0"], "--order 0: expected 1 to 100"),
        (["forward", "--vocab-size", "3"], "--vocab-size 3: expected 4 to 65"),
        (["forward", "--vocab-size", "66"], "--vocab-size 66: expected 4 to 65"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, corpora, capsys, arguments, message):
    folder, _ = corpora
    assert script.main([str(folder / arguments[0]), *arguments[1:]]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("kneser_ney: ")
    assert message in line
    assert not captured.out
