"""Where a word occurs: a bounded sample of its occurrences in a text of any length, and the vectors they have there."""

from __future__ import annotations

import difflib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from ctx_jax.atlas.features import span_means
from ctx_jax.atlas.formats.discover import discover
from ctx_jax.atlas.records import Corpus, Senses, Words
from ctx_jax.data.sources import find_sources, read_documents
from ctx_jax.encoder.base import Encoder
from ctx_jax.errors import InputError
from ctx_jax.text.words import split_words

SENTENCE_WORDS = 512
"""Of a longer sentence those about the word are kept: BERT's family reads no more at a time, and memory is bounded."""
NEAR_SENTENCES = 200_000
"""Sentences that are read again where a word was not found, for others that are spelt like it."""


class Occurrences(NamedTuple):
    """Occurrences of a word, in the order of the text.

    Attributes:
      sentences: words of each that has one.
      sentence: which one an occurrence is in.
      spans: its words, [begin, end).
      senses: of each, where somebody said so; else None.
      found: how many there are in the text, of which these are a sample.
      read: how many sentences the text has.
      cut: how many of these are in a sentence of more than SENTENCE_WORDS, of which as many about the word are kept.
    """

    sentences: Sequence[Words]
    sentence: Int[np.ndarray, "N"]
    spans: Int[np.ndarray, "N 2"]
    senses: Sequence[str] | None
    found: int
    read: int
    cut: int


class Reservoir:
    """A uniform sample of what comes one by one, in memory for the sample (Vitter 1985, algorithm R).

    Attributes:
      count: how many came.
    """

    def __init__(self, most: int, seed: int = 0):
        if most < 1:
            raise InputError(f"most: found {most}, expected at least 1")
        self.count = 0
        self._most, self._rng = most, np.random.default_rng(seed)
        self._kept: list[tuple[int, Any]] = []

    def offer(self, item: Any) -> None:
        """One more."""
        self.count += 1
        if len(self._kept) < self._most:
            self._kept.append((self.count, item))
        elif (place := int(self._rng.integers(self.count))) < self._most:
            self._kept[place] = (self.count, item)

    def items(self) -> list[Any]:
        """The sample, in the order in which it came."""
        return [item for _, item in sorted(self._kept, key=lambda pair: pair[0])]


def find(word: str, sentences: Iterable[str | Words], most: int = 2000, seed: int = 0) -> Occurrences:
    """Occurrences of a word, or of several one after the other, in whatever case; they do not overlap.

    Words are those of `text.words.split_words`: `bank` is none of `banks` and `bank-note`.

    Args:
      word: one, or several with white space between.
      sentences: read once, one at a time; texts, or their words.
      most: how many to keep, a uniform sample of all.
      seed: of the sample.

    Raises:
      InputError: `word` has no words, or `most` is below 1.
    """
    target, sample, read = words_of(word), Reservoir(most, seed), 0
    for sentence in sentences:
        read += 1
        if isinstance(sentence, str):
            # Splitting is what takes the time, and most sentences do not have the word.
            if target[0] not in _form(sentence):
                continue
            sentence = split_words(sentence)
        for begin in _places(target, [_form(word) for word in sentence]):
            sample.offer((sentence, begin, begin + len(target), None))
    return _occurrences(sample, read)


def labelled(word: str, corpora: Iterable[Corpus], most: int = 2000, seed: int = 0) -> Occurrences:
    """Occurrences of a lemma with their senses, all splits together; what two corpora share counts once.

    The lemma's part of speech does not matter, and the sense is the first of an occurrence's keys. Where no occurrence
    has the lemma none is found.

    Args:
      word: the lemma.
      corpora: those of word senses are read.
      most: see `find`.
      seed: of the sample.

    Raises:
      InputError: as `find`, or a file that is broken, or the lemma's senses are of two inventories.
    """
    target, sample, read = words_of(word), Reservoir(most, seed), 0
    seen: set[tuple[tuple[str, ...], int]] = set()
    of_wordnet: set[bool] = set()
    for examples in _sense_examples(corpora):
        read += len(examples.sentences)
        for number, lemma in enumerate(examples.lemmas):
            if words_of(lemma.partition("%")[0].replace("_", " ")) != target:
                continue
            words, (begin, end) = examples.sentences[examples.sentence[number]], examples.span[number].tolist()
            if (key := (tuple(words), begin)) not in seen:
                seen.add(key)
                of_wordnet.add("%" in examples.keys[number][0])
                sample.offer((words, begin, end, examples.keys[number][0]))
    if len(of_wordnet) > 1:
        raise InputError(f"{word}: found WordNet's senses and others, expected a folder with one inventory")
    return _occurrences(sample, read)


def search(
    word: str,
    corpus: str | os.PathLike[str],
    *,
    most: int = 2000,
    seed: int = 0,
    sentences: str | None = None,
    language: str = "en",
    show_progress: bool = False,
) -> Occurrences:
    """Occurrences of a word in a text, or in a folder of labelled data.

    Of a folder those with senses are found where the word is a lemma of it; else all in the sentences of its senses.

    Args:
      word: see `find`.
      corpus: a text as `data.sources` names them, or a folder as `discover` reads them.
      most: see `find`.
      seed: of the sample.
      sentences: see `data.sources.read_documents`.
      language: see there.
      show_progress: a bar on standard error.

    Raises:
      InputError: no such text, or it is broken; the word does not occur; `sentences` of labelled data.
    """
    words_of(word)  # before anything is read
    if os.path.isdir(corpus):
        if sentences is not None:
            raise InputError(f"sentences: found {sentences!r}, expected none: {corpus} has labelled data, in sentences")
        corpora = [each for each in discover(corpus) if _of_senses(each)]
        if not corpora:
            raise InputError(f"{corpus}: found no word senses, expected such data, or the text in it as DIR/*")
        read = lambda: (words for examples in _sense_examples(corpora) for words in examples.sentences)
        found = labelled(word, corpora, most, seed)
        if not found.found:
            found = find(word, read(), most, seed)
    else:
        sources = find_sources([corpus])
        read = lambda on_read=lambda count: None: (
            sentence
            for source in sources
            for document in read_documents(source, sentences, language, on_read)
            for sentence in document.sentences
        )
        total = sum(source.num_bytes for source in sources)
        with tqdm(total=total, disable=not show_progress, unit="B", unit_scale=True, desc="reading") as bar:
            found = find(word, read(bar.update), most, seed)
    if not found.found:
        raise InputError(f"{corpus}: {word!r} does not occur in its {found.read:,} sentences{_near(word, read())}")
    return found


def words_of(word: str) -> list[str]:
    """What is looked for: words without case, typographic apostrophes as plain ones.

    Raises:
      InputError: there are none.
    """
    if not (words := [_form(part) for part in split_words(word)]):
        raise InputError(f"word: found {word!r}, expected a word, or several with blanks between")
    return words


def _form(text: str) -> str:
    """Without case, and with one kind of apostrophe."""
    return text.casefold().replace("’", "'")


def other_words(
    occurrences: Occurrences, most: int, seed: int = 0
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M 2"]]:
    """A sample of the words beside the occurrences: sentence and span of each.

    As many different words as may be, then each a second time, and so on: else nearly all would be `the` and `of`.
    What has no letter is left out, and so are words that the occurrences themselves are made of.
    """
    places = zip(occurrences.sentence, occurrences.spans, strict=True)
    own = {_form(word) for number, span in places for word in occurrences.sentences[number][slice(*span)]}
    found = [
        (number, place, _form(word))
        for number, words in enumerate(occurrences.sentences)
        for place, word in enumerate(words)
        if _form(word) not in own and any(character.isalpha() for character in word)
    ]
    seen: Counter[str] = Counter()
    ranks = []
    order = np.random.default_rng(seed).permutation(len(found))
    for at in order:
        ranks.append(seen[found[at][2]])
        seen[found[at][2]] += 1
    chosen = np.sort(order[np.argsort(ranks, kind="stable")[:most]])
    table = np.array([found[at][:2] for at in chosen], np.int64).reshape(-1, 2)
    return table[:, 0], np.stack([table[:, 1], table[:, 1] + 1], axis=1)


def span_vectors(
    encoder: Encoder,
    sentences: Sequence[Words],
    sentence: Int[np.ndarray, "N"],
    spans: Int[np.ndarray, "N 2"],
    layers: Sequence[int],
    done: Callable[[int], object] = lambda count: None,
) -> Float[np.ndarray, "K N D"]:
    """Vectors of spans: the mean over their words of the mean over the words' sub-words; no others are kept.

    Args:
      encoder: of words.
      sentences: words of each.
      sentence: which one a span is in.
      spans: words, [begin, end).
      layers: numbers from 0.
      done: is told how many sentences were done.

    Raises:
      InputError: no such layer, or a sentence cannot be encoded.
    """
    vectors = np.zeros((len(layers), len(spans), encoder.width), np.float32)
    for place, mean in span_means(encoder, sentences, sentence, spans, list(layers), done):
        vectors[:, place] = mean
    return vectors


def _places(target: Sequence[str], words: Sequence[str]) -> Iterator[int]:
    begin = 0
    while begin + len(target) <= len(words):
        found = words[begin : begin + len(target)] == target
        if found:
            yield begin
        begin += len(target) if found else 1


def _occurrences(sample: Reservoir, read: int) -> Occurrences:
    items = sample.items()
    sentences: list[Words] = []
    number_of: dict[int, int] = {}
    places, cut = [], 0
    for words, begin, end, _ in items:
        if len(words) > SENTENCE_WORDS:
            first = max(min(begin - SENTENCE_WORDS // 2, len(words) - SENTENCE_WORDS), 0)
            words, begin, end, cut = words[first : first + SENTENCE_WORDS], begin - first, end - first, cut + 1
            number = len(sentences)
        else:
            number = number_of.setdefault(id(words), len(sentences))
        if number == len(sentences):
            sentences.append(words)
        places.append((number, begin, end))
    table = np.array(places, np.int64).reshape(-1, 3)
    senses = [sense for *_, sense in items]
    known = senses if senses and senses[0] is not None else None
    return Occurrences(sentences, table[:, 0], table[:, 1:], known, sample.count, read, cut)


def _of_senses(corpus: Corpus) -> bool:
    return corpus.name.endswith("/senses")


def _sense_examples(corpora: Iterable[Corpus]) -> Iterator[Senses]:
    for corpus in corpora:
        if _of_senses(corpus):
            yield from corpus.splits.values()


def _near(word: str, sentences: Iterable[str | Words]) -> str:
    """For people: what may have been meant."""
    target, known = words_of(word), set()
    for sentence in itertools.islice(sentences, NEAR_SENTENCES):
        known.update(_form(part) for part in (split_words(sentence) if isinstance(sentence, str) else sentence))
    if known.issuperset(target):
        return "; its words do, but not one after the other"
    unknown = [part for part in dict.fromkeys(target) if part not in known]
    near = [other for part in unknown for other in difflib.get_close_matches(part, known, n=3, cutoff=0.7)]
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
