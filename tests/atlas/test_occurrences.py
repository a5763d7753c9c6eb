"""Occurrences beside a regular expression; samples, vectors and senses that were planted."""

import dataclasses
import json
import re
import sys
import tracemalloc
import types
import zlib

import jax
import numpy as np
import pytest
import scipy.stats
from oracles.parameters import random_params

from ctx_jax import InputError
from ctx_jax.arrays import Representations
from ctx_jax.atlas.formats.discover import discover
from ctx_jax.atlas.occurrences import (
    SENTENCE_WORDS,
    Occurrences,
    Reservoir,
    find,
    labelled,
    other_words,
    search,
    span_vectors,
)
from ctx_jax.atlas.report.senses import write_map
from ctx_jax.atlas.results import WordSenses, from_json
from ctx_jax.atlas.word_senses import CONTEXTS, context, umap_2d, word_senses
from ctx_jax.data.sources import find_sources, read_documents
from ctx_jax.encoder import BertEncoder
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig
from ctx_jax.text.load import load_tokenizer

CONFIG = BertConfig(
    vocab_size=600, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=48
)


@pytest.fixture(scope="module")
def topics():
    (source,) = find_sources(["python:topics"])
    return [sentence for document in read_documents(source) for sentence in document.sentences]


def counted(word, text):
    """What a regular expression finds: no letter, digit or inner mark of a word on either side."""
    inside = r"\s+".join(re.escape(part).replace("'", "['’]") for part in word.split())
    pattern = rf"(?<![^\W_])(?<![^\W_]['’.\-]){inside}(?![^\W_])(?!['’.\-][^\W_])"
    return len(re.findall(pattern, text, re.IGNORECASE))


@pytest.mark.parametrize("word", ["name", "The", "isn't", "base class", "for example", "e.g", "built-in", "«"])
def test_as_many_as_a_regular_expression_finds(topics, word):
    found = find(word, topics, most=10**6)
    assert found.found == len(found.sentence) == sum(counted(word, text) for text in topics)
    assert (found.found > 0) == (word != "«")
    assert found.read == len(topics)
    assert found.senses is None
    for number, (begin, end) in zip(found.sentence, found.spans, strict=True):
        assert " ".join(found.sentences[number][begin:end]).replace("’", "'").casefold() == word.casefold()
    # Each sentence once, in the order of the text.
    assert len({tuple(words) for words in found.sentences}) <= len(set(found.sentence)) == len(found.sentences)
    assert (np.diff(found.sentence) >= 0).all()


def test_words_and_texts_are_alike():
    texts = ["A bank, a BANK; banks.", "No.", "Bank bank bank-note snow_bank"]
    found = find("bank", texts)
    given = find("bank", [re.findall(r"[^\W_]+(?:-\w+)*|_|[^\w\s]", text) for text in texts])
    assert found.spans.tolist() == given.spans.tolist() == [[1, 2], [4, 5], [0, 1], [1, 2], [5, 6]]
    assert found.sentence.tolist() == given.sentence.tolist() == [0, 0, 1, 1, 1]
    # They do not overlap.
    assert find("a a", ["a a a a a"]).spans.tolist() == [[0, 2], [2, 4]]


@pytest.mark.parametrize("word", ["", " ", "\n"])
def test_no_word(word):
    with pytest.raises(InputError, match=r"word: found .*expected a word"):
        find(word, ["a"])
    with pytest.raises(InputError, match="most: found 0"):
        find("a", ["a"], most=0)


def test_the_sample_is_uniform():
    """Of 40 the 10 of a sample, 2,000 times. Counts of draws without replacement spread 1 - 10/40 as much."""
    counts = np.zeros(40)
    for seed in range(2000):
        sample = Reservoir(10, seed)
        for item in range(40):
            sample.offer(item)
        items = sample.items()
        assert len(set(items)) == 10
        assert items == sorted(items)
        assert sample.count == 40
        counts[items] += 1
    expected = 2000 * 10 / 40
    statistic = (np.square(counts - expected) / expected).sum() / (1 - 10 / 40) * 39 / 40
    assert 0.005 < scipy.stats.chi2.sf(statistic, 39) < 0.995


def test_samples_repeat_and_differ_by_seed(topics):
    spans = lambda **options: find("name", topics, most=50, **options).sentence.tolist()
    texts = lambda **options: [tuple(words) for words in find("name", topics, most=50, **options).sentences]
    assert spans(seed=1) == spans(seed=1)
    assert texts(seed=1) == texts(seed=1) != texts(seed=2)


def test_memory_is_of_the_sample():
    def peak(count):
        tracemalloc.start()
        found = find("bank", (f"The bank of number {number} is here." for number in range(count)), most=50)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (found.found, len(found.spans)) == (count, 50)
        return size

    peak(100)
    assert peak(10_000) < 1.5 * peak(300)


def test_long_sentences_are_cut_about_the_word():
    words = [f"w{number}" for number in range(3000)]
    for place in (0, 7, 1500, 2999):
        words[place] = "Bank"
    found = find("bank", [words, words[:SENTENCE_WORDS]])
    assert found.cut == 4
    assert [len(sentence) for sentence in found.sentences] == [SENTENCE_WORDS] * 5
    assert found.sentence.tolist() == [0, 1, 2, 3, 4, 4]
    for number, (begin, end) in zip(found.sentence, found.spans, strict=True):
        assert found.sentences[number][begin:end] == ["Bank"]
    assert found.sentences[2][255:258] == ["w1499", "Bank", "w1501"]


COARSE = {
    "bank/classes_map.txt": '{"0": "money", "1": "river"}',
    "bank/train.data.txt": "1\tthe bank lends\n3\tsat on the bank .\n",
    "bank/train.gold.txt": "0\n1",
    "bank/test.data.txt": "0\tbanks pay\n1\tthe bank lends\n",
    "bank/test.gold.txt": "0\n0\n",
}
XML = """<corpus><sentence><wf>They</wf><instance id="{0}.1" lemma="take_place">took place</instance></sentence>
<sentence><instance id="{0}.2" lemma="bank">banked</instance><wf>and</wf>
<instance id="{0}.3" lemma="bank">bank</instance></sentence></corpus>"""
KEYS = "{0}.1 take_place%2:30:00::\n{0}.2 bank%2:31:00:: bank%2:40:00::\n{0}.3 bank%1:14:00::\n"


@pytest.fixture
def coarse(tmp_path):
    for name, text in COARSE.items():
        (tmp_path / "coarse" / "words" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coarse" / "words" / name).write_text(text)
    return tmp_path / "coarse"


@pytest.fixture
def raganato(tmp_path):
    (tmp_path / "raganato").mkdir()
    for name in ("semcor", "ALL"):
        (tmp_path / "raganato" / f"{name}.data.xml").write_text(XML.format(name))
        (tmp_path / "raganato" / f"{name}.gold.key.txt").write_text(KEYS.format(name))
    return tmp_path / "raganato"


def test_lemmas_with_their_senses(coarse, raganato):
    found = search("Bank", coarse)
    assert found.senses == ["money", "river", "money"]  # one stands in train and in test
    assert [found.sentences[n][b] for n, (b, _) in zip(found.sentence, found.spans, strict=True)] == [
        "bank",
        "bank",
        "banks",
    ]
    assert (found.found, found.read) == (3, 4)
    found = search("bank", raganato)
    assert found.senses == ["bank%2:31:00::", "bank%1:14:00::"]  # what two corpora share counts once
    found = search("take place", raganato)
    assert (found.senses, found.spans.tolist()) == (["take_place%2:30:00::"], [[1, 3]])
    assert len(labelled("bank", discover(coarse), most=2).senses) == 2


def test_words_of_labelled_data_that_are_no_lemma(coarse):
    found = search("the", coarse)
    assert (found.found, found.senses) == (3, None)
    with pytest.raises(InputError, match=r"'lend' does not occur in its 4 sentences \(did you mean 'lends'\?\)"):
        search("lend", coarse)
    with pytest.raises(InputError, match="sentences: found 'split', expected none"):
        search("bank", coarse, sentences="split")


def test_two_inventories(coarse, raganato):
    with pytest.raises(InputError, match="WordNet's senses and others"):
        search("bank", coarse.parent)


def test_what_is_not_found_is_said(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The river bank.\n\nA bank lends money, and lands.\n")
    assert search("bank", path).found == 2
    with pytest.raises(InputError, match=r"'bnak' does not occur in its 2 sentences \(did you mean 'bank'\?\)"):
        search("bnak", path)
    with pytest.raises(InputError, match=r"did you mean 'lends' or 'lands'|did you mean 'lands' or 'lends'"):
        search("lnds", path)
    with pytest.raises(InputError, match="does not occur in its 2 sentences; its words do, but not one after the"):
        search("bank river", path)
    with pytest.raises(InputError, match=r"sentences$"):
        search("xyzzyx", path)
    with pytest.raises(InputError, match=r"nowhere\.txt: not found"):
        search("bank", tmp_path / "nowhere.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.conllu").write_text("1\ta\ta\tNOUN\tNN\t_\t0\troot\t_\t_\n\n")
    with pytest.raises(InputError, match="found no word senses"):
        search("bank", tmp_path / "other")


def test_other_words_are_many():
    sentences = [["the", "Bank", "of", "the", "river", "!"], ["the", "banks", "and", "The", "bank", "3"]]
    found = Occurrences(sentences, np.array([0, 1]), np.array([[1, 2], [1, 2]]), None, 2, 2, 0)
    name = lambda pair: sorted(sentences[n][b].casefold() for n, (b, _) in zip(*pair, strict=True))
    # Forms that occur are the word itself, and what has no letter is none.
    assert name(other_words(found, 100)) == ["and", "of", "river", "the", "the", "the", "the"]
    for seed in range(5):
        assert name(other_words(found, 4, seed)) == ["and", "of", "river", "the"]
    assert len({str(other_words(found, 4, seed)) for seed in range(9)}) > 1
    alone = Occurrences([["bank"]], np.array([0]), np.array([[0, 1]]), None, 1, 1, 0)
    assert other_words(alone, 4)[1].shape == (0, 2)


def test_vectors_are_those_of_the_sentence_alone(topics_corpus):
    params = jax.tree.map(jax.numpy.asarray, random_params(bound_model(CONFIG).shapes, 0))
    encoder = BertEncoder(CONFIG, params, load_tokenizer(topics_corpus / "tokenizer"))
    sentences = [["A", "set", "is", "empty", "."], ["Incomprehensibilities", "are", "the", "base", "class"]]
    sentence, spans = np.array([1, 0, 1]), np.array([[3, 5], [1, 2], [0, 1]])
    seen = []
    found = span_vectors(encoder, sentences, sentence, spans, [2, 0], seen.append)
    assert sum(seen) == 2
    each = [encoder.encode([words], layers=[2, 0]) for words in sentences]
    for place, (number, (begin, end)) in enumerate(zip(sentence, spans, strict=True)):
        alone = each[number]
        for row, layer in enumerate([2, 0]):
            expected = alone.words(layer=layer)[0][begin:end].mean(0)
            np.testing.assert_allclose(found[row, place], expected, rtol=1e-5, atol=2e-6)


class Planted:
    """`bank` points where `river` stands beside it, and elsewhere where it does not, but on layer 0.

    `shore` and `loan` are there too. A long word is two sub-words about its vector.
    """

    config = CONFIG
    width = 16
    params = {"kernel": np.ones(2, np.float32)}

    def vector(self, word, words, layer):
        vector = np.random.default_rng(zlib.crc32(f"{word} {layer}".encode())).standard_normal(16)
        vector[:3] = 0
        if word in ("bank", "shore", "loan"):
            vector *= 0.02
            place = 0 if layer == 0 else 1 if word == "shore" or "river" in words else 2
            vector[place] = 1
            if word == "bank":
                vector[3:] += 0.1 * np.random.default_rng(zlib.crc32(" ".join(words).encode())).standard_normal(13)
        return vector

    def lengths(self, texts):
        return np.array([2 * len(words) for words in texts])

    def encode(self, texts, *, layers, on_too_long, stride):
        assert on_too_long == "split"
        ids = [[n for n, word in enumerate(words) for _ in range(1 + (len(word) > 3))] for words in texts]
        length = max(map(len, ids)) + 2
        found = np.zeros((len(layers), len(texts), length, 16), np.float32)
        word_ids = np.full((len(texts), length), -1)
        for row, words in enumerate(texts):
            word_ids[row, 1 : 1 + len(ids[row])] = ids[row]
            for at, number in enumerate(ids[row], 1):
                sign = 0 if len(words[number]) <= 3 else 1 if word_ids[row, at - 1] != number else -1
                for k, layer in enumerate(layers):
                    found[k, row, at] = self.vector(words[number], words, layer) + 5 * sign
        numbers, zeros = tuple(range(len(texts))), (0,) * len(texts)
        return Representations(None, found, word_ids >= 0, word_ids=word_ids, texts=numbers, first_words=zeros)


def planted(count=30):
    rivers = [f"the river bank and shore number n{number} ." for number in range(count)]
    money = [f"a bank gives the loan number n{number} ." for number in range(2 * count)]
    senses = ["river"] * count + ["money"] * (2 * count)
    found = find("bank", [*rivers, *money])
    return found, senses


@pytest.mark.parametrize("gold", [False, True], ids=["unnamed", "named"])
def test_planted_senses_are_found(gold):
    found, senses = planted()
    found = found._replace(senses=senses if gold else None)
    told = []
    result = word_senses(Planted(), "bank", found, [2, 0, 1], model="m", corpus="c", clustered=told.append)
    assert told == [1, 1, 1]
    assert [layer.layer for layer in result.layers] == [0, 1, 2]
    assert (result.word, result.model, result.corpus) == ("bank", "m", "c")
    assert (result.occurrences, result.sentences, result.cut) == (90, 90, 0)
    assert result.best in (1, 2)
    for layer in result.layers[1:]:
        assert layer.labels == [1] * 30 + [0] * 60  # the largest first
        assert [cluster.share for cluster in layer.clusters] == pytest.approx([2 / 3, 1 / 3])
        money, river = layer.clusters
        assert money.words[0][0] == "loan"
        assert river.words[0][0] == "shore"
        assert min(money.words[0][1], river.words[0][1]) > 0.9 > 0.5 > money.words[1][1]
        assert len({word for word, _ in river.words}) == len(river.words) == 10
        assert len(river.contexts) == CONTEXTS
        assert all(re.fullmatch(r"the river « bank » and shore number n\d+\.", text) for text in river.contexts)
        assert (layer.ari, layer.v_measure) == ((1.0, 1.0) if gold else (None, None))
        assert money.senses == ({"money": 60} if gold else {})
    directions = np.array([Planted().vector("bank", s, 2) for s in found.sentences])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = (directions @ directions.T)[np.triu_indices(90, 1)]
    assert result.layers[2].self_similarity == pytest.approx(cosines.mean(), abs=1e-6)
    # Contexts: those of the largest cosine with their mean.
    mean = directions[:30].mean(0)
    best = int(np.argmax(directions[:30] @ mean))
    assert result.layers[2].clusters[1].contexts[0] == f"the river « bank » and shore number n{best}."
    (points,) = result.maps
    assert (points.word, points.method, list(points.layers)) == ("bank", "PCA", ["0", "1", "2"])
    assert points.senses == (["money", "river"] if gold else ["cluster 1", "cluster 2"])
    assert points.sense == [1] * 30 + [0] * 60
    x = np.array(points.layers["2"])[:, 0]
    assert x[:30].max() < x[30:].min() or x[30:].max() < x[:30].min()
    assert from_json(WordSenses, json.loads(json.dumps(dataclasses.asdict(result)))) == result


def test_the_best_layer():
    """Layer 0 knows no context: only where it is alone. With senses known ARI decides."""
    found, senses = planted(4)
    assert word_senses(Planted(), "bank", found, [0], model="m", corpus="c").best == 0

    class Cased(Planted):
        """Layer 2 has three tight groups, which are no senses."""

        def vector(self, word, words, layer):
            if word == "bank" and layer == 2:
                return np.eye(16)[zlib.crc32(" ".join(words).encode()) % 3]
            return super().vector(word, words, layer)

    assert word_senses(Cased(), "bank", found, [0, 1, 2], model="m", corpus="c").best == 2
    named = found._replace(senses=senses)
    assert word_senses(Cased(), "bank", named, [0, 1, 2], model="m", corpus="c").best == 1
    one = found._replace(senses=["money"] * 12)
    result = word_senses(Cased(), "bank", one, [0, 1, 2], model="m", corpus="c")
    assert (result.best, result.layers[0].ari) == (2, None)
    assert result.maps[0].senses == ["money"]


def test_one_occurrence():
    result = word_senses(Planted(), "bank", find("bank", ["bank"]), [0, 2], model="m", corpus="c")
    (cluster,) = result.layers[1].clusters
    assert (cluster.share, cluster.contexts, cluster.words) == (1.0, ["« bank »"], [])
    assert result.maps[0].layers["2"] == [(0.0, 0.0)]


def test_vectors_that_are_no_numbers():
    class Broken(Planted):
        def vector(self, word, words, layer):
            return super().vector(word, words, layer) * (np.nan if layer == 1 else 1)

    with pytest.raises(InputError, match="m: found vectors with NaN"):
        word_senses(Broken(), "bank", planted(2)[0], [1], model="m", corpus="c")


def test_contexts():
    words = [*"123456789", "(", "the", "bank", ",", "which", "lends", ")", "."]
    assert context(words, np.array([11, 12])) == "… 4 5 6 7 8 9 (the « bank », which lends)."
    assert context(words, np.array([0, 2])) == "« 1 2 » 3 4 5 6 7 8 9 ( …"
    assert context(["bank"], np.array([0, 1])) == "« bank »"


def test_umap_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(InputError, match="pip install umap-learn"):
        word_senses(Planted(), "bank", planted(2)[0], [1], model="m", corpus="c", with_umap=True)

    class UMAP:
        def __init__(self, **options):
            self.options = options

        def fit_transform(self, vectors):
            return vectors[:, : self.options["n_neighbors"] // 2][:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    result = word_senses(Planted(), "bank", planted(2)[0], [1], model="m", corpus="c", with_umap=True)
    assert [points.method for points in result.maps] == ["PCA", "UMAP"]
    assert len(result.maps[1].layers["1"]) == 6
    with pytest.raises(InputError, match="found 4 occurrences, expected five"):
        umap_2d(0, 4)


def test_maps_are_drawn(tmp_path):
    (points,) = word_senses(Planted(), "bank", planted(3)[0], [0, 1, 2], model="m", corpus="c").maps
    assert write_map(points, "m", tmp_path) == ["pca-0.svg", "pca-1.svg", "pca-2.svg"]
    drawn = (tmp_path / "pca-1.svg").read_text()
    assert drawn.count("<title>") >= len(points.contexts)
    with pytest.raises(InputError, match="cannot be written"):
        write_map(points, "m", tmp_path / "none")
