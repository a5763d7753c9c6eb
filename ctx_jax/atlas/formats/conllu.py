"""CoNLL-U, the format of Universal Dependencies: https://universaldependencies.org/format.html.

A word a line in ten columns divided by tabs (ID, FORM, LEMMA, UPOS, XPOS, FEATS, HEAD, DEPREL, DEPS, MISC), a blank
line after each sentence, comments that begin with `#`. Lines of multiword tokens (ID `1-2`) and of empty nodes (ID
`1.1`) are no words of the basic tree and are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ctx_jax.atlas.formats.files import lines, shown, wrong
from ctx_jax.atlas.records import Edges, Trees, Words

UNSPECIFIED = "_"
_PUNCTUATION = "PUNCT"
_COLUMNS = 10
_NUMBER = re.compile(r"[0-9]{1,9}")
_NO_WORD = re.compile(r"[0-9]+[-.][0-9]+")


class Sentence(NamedTuple):
    """A sentence with its basic dependencies.

    Attributes:
      words: forms.
      upos: universal part of speech of each, `_` where unspecified.
      xpos: the treebank's own, likewise.
      heads: of each word, -1 at a root.
      relations: of each word to its head.
    """

    words: Words
    upos: Sequence[str]
    xpos: Sequence[str]
    heads: Int[np.ndarray, "W"]
    relations: Sequence[str]


def sentences(path: str | os.PathLike) -> Iterator[Sentence]:
    """Streams the sentences of a file.

    Raises:
      InputError: a line that is no line of CoNLL-U, ids that do not count from 1, a head that is no word of the
        sentence, a sentence without a root or with a cycle.
    """
    rows: list[list[str]] = []
    numbers: list[int] = []
    for number, line in lines(path):
        if not line.strip():
            if rows:
                yield _sentence(path, rows, numbers)
                rows, numbers = [], []
            continue
        if line.startswith("#"):
            continue
        row = line.split("\t")
        if len(row) != _COLUMNS:
            raise wrong(path, number, f"{len(row)} columns in {shown(line)}", f"{_COLUMNS}, divided by tabs")
        if row[0] == str(len(rows) + 1):
            rows.append(row)
            numbers.append(number)
        elif not _NO_WORD.fullmatch(row[0]):
            raise wrong(
                path, number, f"ID {shown(row[0])}", f"{len(rows) + 1}, or a range (1-2) or an empty node (1.1)"
            )
    if rows:
        yield _sentence(path, rows, numbers)


def _sentence(path: str | os.PathLike, rows: list[list[str]], numbers: list[int]) -> Sentence:
    _, words, _, upos, xpos, _, heads, relations, *_ = zip(*rows, strict=True)
    for word, number in zip(words, numbers, strict=True):
        if not word.strip():
            raise wrong(path, number, f"FORM {word!r}", "a word")
    return Sentence(words, upos, xpos, _heads(path, heads, numbers), relations)


def _heads(path: str | os.PathLike, column: Sequence[str], numbers: list[int]) -> np.ndarray:
    heads = []
    for place, (text, number) in enumerate(zip(column, numbers, strict=True)):
        if not _NUMBER.fullmatch(text) or int(text) > len(column):
            raise wrong(path, number, f"HEAD {shown(text)}", f"0 or the ID of a word, up to {len(column)}")
        if int(text) == place + 1:
            raise wrong(path, number, f"HEAD {text} of itself", "another word, or 0 at a root")
        heads.append(int(text) - 1)
    # Up from every word until a root, or until a word that is known to lead to one. Without a root there is a cycle.
    known = [False] * len(heads)
    for start in range(len(heads)):
        way: dict[int, int] = {}
        at = start
        while at >= 0 and not known[at]:
            if at in way:
                cycle = ", ".join(str(word + 1) for word in list(way)[way[at] :])
                raise wrong(path, numbers[at], f"a cycle through the words {cycle}", "heads that lead to a root")
            way[at] = len(way)
            at = heads[at]
        for at in way:
            known[at] = True
    return np.array(heads, np.int32)


def pos(corpus: Sequence[Sentence]) -> Edges:
    """UPOS of each word that has one, as labels of spans of one word."""
    return _of_words(corpus, [sentence.upos for sentence in corpus])


def xpos(corpus: Sequence[Sentence]) -> Edges:
    """The treebank's own part of speech of each word that has one, as labels of spans of one word."""
    return _of_words(corpus, [sentence.xpos for sentence in corpus])


def _of_words(corpus: Sequence[Sentence], columns: Sequence[Sequence[str]]) -> Edges:
    sentence, place = _places(columns)
    labels = [label for column in columns for label in column]
    kept = np.array([label != UNSPECIFIED for label in labels], bool)
    first = np.stack([place, place + 1], axis=1)[kept]
    labels = [label for label in labels if label != UNSPECIFIED]
    return Edges([sentence.words for sentence in corpus], sentence[kept], first, None, labels)


def dependencies(corpus: Sequence[Sentence]) -> Edges:
    """The relation of each word to its head: `first` is the word, `second` the head.

    A root is its own head, as in the edge probing of Tenney et al. 2019 (jiant v1's probing/data/ud_to_json.py,
    `convert_ud_file`); unlike there, sentences with empty nodes stay, without these nodes.
    """
    heads = [sentence.heads for sentence in corpus]
    sentence, place = _places(heads)
    head = np.concatenate([*heads, np.zeros(0, np.int32)])
    head = np.where(head < 0, place, head)
    labels = [relation for sentence in corpus for relation in sentence.relations]
    first, second = (np.stack([at, at + 1], axis=1) for at in (place, head))
    return Edges([sentence.words for sentence in corpus], sentence, first, second, labels)


def trees(corpus: Sequence[Sentence]) -> Trees:
    """Dependency trees in which words with UPOS `PUNCT` are not scored (Hewitt and Manning 2019, section 4.1)."""
    return Trees(
        [sentence.words for sentence in corpus],
        [sentence.heads for sentence in corpus],
        [np.array([label != _PUNCTUATION for label in sentence.upos], bool) for sentence in corpus],
        [sentence.relations for sentence in corpus],
    )


def _places(columns: Iterable[Sequence[object]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each word of a corpus: which sentence it is in, and where there."""
    lengths = np.array([len(column) for column in columns], np.int32)
    sentence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    begins = np.cumsum(lengths, dtype=np.int32) - lengths
    return sentence, np.arange(len(sentence), dtype=np.int32) - np.repeat(begins, lengths)
