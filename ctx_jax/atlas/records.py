"""What tasks are made of: sentences, what is said of spans of their words, and where it was read.

One record a kind of question. Words are counted within their sentence, from 0; a span is [begin, end).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Words = Sequence[str]


class Edges(NamedTuple):
    """Labels of spans, or of pairs of spans: every classification that probes learn (Tenney et al. 2019, section 2).

    Part of speech is a label of spans of one word, a dependency's relation one of a pair of them.

    Attributes:
      sentences: words of each.
      sentence: which one an edge belongs to.
      first: its span.
      second: the other span; None where there is none.
      labels: of each edge.
    """

    sentences: Sequence[Words]
    sentence: Int[np.ndarray, "N"]
    first: Int[np.ndarray, "N 2"]
    second: Int[np.ndarray, "N 2"] | None
    labels: Sequence[str]


class Trees(NamedTuple):
    """Dependency trees.

    Attributes:
      sentences: words of each.
      heads: the head of each word, -1 at a root.
      scored: words that count; punctuation does not (Hewitt and Manning 2019, section 4.1).
      relations: of each word to its head; None where they are not known.
    """

    sentences: Sequence[Words]
    heads: Sequence[Int[np.ndarray, "W"]]
    scored: Sequence[Bool[np.ndarray, "W"]]
    relations: Sequence[Sequence[str]] | None = None


class Senses(NamedTuple):
    """Occurrences of ambiguous words, each with its senses.

    Attributes:
      sentences: words of each.
      sentence: which one an occurrence is in.
      span: its words.
      lemmas: what the inventory is asked for, with the part of speech where that matters: `bank`, `bank%1`.
      keys: the senses that are right, one or more.
      names: of the occurrences, as the file has them.
    """

    sentences: Sequence[Words]
    sentence: Int[np.ndarray, "N"]
    span: Int[np.ndarray, "N 2"]
    lemmas: Sequence[str]
    keys: Sequence[tuple[str, ...]]
    names: Sequence[str]


class WordPairs(NamedTuple):
    """Does a word mean the same in two sentences? (Pilehvar and Camacho-Collados 2019)

    Attributes:
      sentences: words of each, the two of pair n at 2n and 2n + 1.
      spans: of the word in each sentence.
      same: the answer.
    """

    sentences: Sequence[Words]
    spans: Int[np.ndarray, "2N 2"]
    same: Bool[np.ndarray, "N"]


class TextPairs(NamedTuple):
    """Pairs of texts and how alike they are.

    Attributes:
      first: texts.
      second: texts.
      scores: as people gave them.
      sets: which of several data sets a pair is from; empty where there is but one.
    """

    first: Sequence[str]
    second: Sequence[str]
    scores: Float[np.ndarray, "N"]
    sets: Sequence[str] = ()


Examples = Edges | Trees | Senses | WordPairs | TextPairs


class Corpus(NamedTuple):
    """What one kind of question has in a folder of data.

    Attributes:
      name: unique over the folder: `en_ewt-ud/pos`.
      title: for people: "part of speech".
      splits: `train`, `dev`, `test` → examples, all of one kind; those of files are read when asked for.
    """

    name: str
    title: str
    splits: Mapping[str, Examples]
