"""Which sense a word has, without training: by the nearest vector of a sense (Loureiro et al. 2021, section 4.2), and
whether it has the same one twice, by a threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ctx_jax.atlas.records import Senses
from ctx_jax.atlas.results import SenseTask
from ctx_jax.encoder.vectors import blocks, unit
from ctx_jax.errors import InputError

Answers = list[str | None]
"""A sense for each test occurrence; None where there is nothing to answer with, which is wrong."""

_BUCKETS = (("0", 0), ("1-4", 4), ("5-19", 19))
_OFTEN = "20+"


class Lemma(NamedTuple):
    """A word of the inventory that the test asks for.

    Attributes:
      train: its rows among the training occurrences.
      test: its rows among the test's.
      senses: those that it has in training, the commonest first, by name where they are as common.
      answers: the place in `senses` of each training row's first key: what a nearest occurrence answers.
      members: for each sense, the places in `train` of its occurrences; one with several keys belongs to each.
    """

    train: Int[np.ndarray, "M"]
    test: Int[np.ndarray, "K"]
    senses: list[str]
    answers: Int[np.ndarray, "M"]
    members: list[Int[np.ndarray, "S"]]


class Disambiguation:
    """What is the same for all layers: candidates, the fallback, and the counts of senses.

    The candidates are the senses that the occurrence's lemma has in training. A lemma that never occurs there gets its
    sense from `fallback` (an inventory's first sense, say), and counts as wrong where that does not know it, either.
    """

    def __init__(self, train: Senses, test: Senses, fallback: Mapping[str, str] | None = None) -> None:
        """Sorts occurrences by lemma.

        Raises:
          InputError: no test occurrences, or one without a key.
        """
        for name, occurrences in (("train", train), ("test", test)):
            if len(occurrences.lemmas) != len(occurrences.keys):
                found = f"{len(occurrences.lemmas)} lemmas and {len(occurrences.keys)} keys"
                raise InputError(f"{name}: found {found}, expected as many")
            if bare := [row for row, keys in enumerate(occurrences.keys) if not keys]:
                raise InputError(f"{name}: occurrence {bare[0]}: found no sense, expected one or more")
        if not test.lemmas:
            raise InputError("test: found no occurrences, expected some")
        self.train_keys, self.keys = train.keys, test.keys
        self.counts = Counter(pair for pair in _pairs(train))
        train_rows, test_rows = _rows(train.lemmas), _rows(test.lemmas)
        self.lemmas: dict[str, Lemma] = {}
        self._backstop: Answers = [(fallback or {}).get(lemma) for lemma in test.lemmas]
        self._lemma_of = test.lemmas
        for lemma, rows in test_rows.items():
            self.lemmas[lemma] = self._lemma(lemma, train_rows.get(lemma, []), rows)

    def _lemma(self, lemma: str, train: list[int], test: list[int]) -> Lemma:
        members: dict[str, list[int]] = {}
        for place, row in enumerate(train):
            for key in dict.fromkeys(self.train_keys[row]):
                members.setdefault(key, []).append(place)
        senses = sorted(members, key=lambda sense: (-len(members[sense]), sense))
        place_of = {sense: place for place, sense in enumerate(senses)}
        answers = np.array([place_of[self.train_keys[row][0]] for row in train], np.int64)
        return Lemma(np.array(train), np.array(test), senses, answers, [np.array(members[sense]) for sense in senses])

    def most_frequent(self) -> Answers:
        """Always the commonest sense of the lemma in training."""
        return self._answers((lemma.test, np.zeros(len(lemma.test), np.int64), lemma) for lemma in self._seen())

    def centroid(self, train: Float[np.ndarray, "N D"], test: Float[np.ndarray, "M D"]) -> Answers:
        """The sense whose mean vector, of vectors as they are, has the largest cosine; of equals the commonest."""
        self._check(train, test)
        found = []
        for lemma in self._seen():
            means = _means(train, lemma)
            places = [(unit(block) @ unit(means).T).argmax(1) for block in blocks(test, lemma.test)]
            found.append((lemma.test, np.concatenate(places), lemma))
        return self._answers(found)

    def one_nn(self, train: Float[np.ndarray, "N D"], test: Float[np.ndarray, "M D"]) -> Answers:
        """The first key of the training occurrence of the lemma with the largest cosine; of equals the earliest."""
        self._check(train, test)
        found = []
        for lemma in self._seen():
            nearest = [_nearest(block, train, lemma.train) for block in blocks(test, lemma.test)]
            found.append((lemma.test, lemma.answers[np.concatenate(nearest)], lemma))
        return self._answers(found)

    def accuracy(self, answers: Answers) -> float:
        """Share of occurrences whose answer is one of their keys."""
        return float(np.mean(self._right(answers)))

    def macro_f1(self, answers: Answers) -> float:
        """F1 of each sense that is a key or an answer, their mean for each lemma, the mean of these over lemmas.

        The key of an occurrence that has several is the answer if it is among them, else the first.
        """
        scores = []
        for lemma in self.lemmas.values():
            right, said, meant = Counter(), Counter(), Counter()
            for row in lemma.test:
                answer, keys = answers[row], self.keys[row]
                key = answer if answer in keys else keys[0]
                right[key] += answer == key
                meant[key] += 1
                # No answer is one that is wrong: it lowers the recall of the key, and there is no sense that it is.
                said.update([] if answer is None else [answer])
            senses = meant.keys() | said.keys()
            scores.append(sum(2 * right[sense] / (said[sense] + meant[sense]) for sense in senses) / len(senses))
        return float(np.mean(scores))

    def by_frequency(self, answers: Answers) -> dict[str, float]:
        """Accuracy apart by how often the key occurs in training: `0`, `1-4`, `5-19`, `20+`.

        Of several keys the commonest counts. Parts without an occurrence are left out.
        """
        parts: dict[str, list[bool]] = {}
        for lemma, keys, right in zip(self._lemma_of, self.keys, self._right(answers), strict=True):
            count = max(self.counts[lemma, key] for key in keys)
            name = next((name for name, most in _BUCKETS if count <= most), _OFTEN)
            parts.setdefault(name, []).append(right)
        return {name: float(np.mean(parts[name])) for name in (*dict(_BUCKETS), _OFTEN) if name in parts}

    def _right(self, answers: Answers) -> list[bool]:
        return [answer in keys for answer, keys in zip(answers, self.keys, strict=True)]

    def _seen(self) -> Iterable[Lemma]:
        return [lemma for lemma in self.lemmas.values() if len(lemma.train)]

    def _answers(self, found: Iterable[tuple[np.ndarray, np.ndarray, Lemma]]) -> Answers:
        answers = list(self._backstop)
        for rows, places, lemma in found:
            for row, place in zip(rows, places, strict=True):
                answers[row] = lemma.senses[place]
        return answers

    def _check(self, train: Float[np.ndarray, "N D"], test: Float[np.ndarray, "M D"]) -> None:
        for name, vectors, keys in (("train", train, self.train_keys), ("test", test, self.keys)):
            if len(vectors) != len(keys):
                raise InputError(
                    f"{name}: found {len(vectors)} vectors, expected one for each of {len(keys)} occurrences"
                )


def sense_task(
    name: str,
    train: Senses,
    train_vectors: Float[np.ndarray, "L N D"],
    test: Senses,
    test_vectors: Float[np.ndarray, "L M D"],
    fallback: Mapping[str, str] | None = None,
) -> SenseTask:
    """Disambiguation on every layer.

    Args:
      name: of the corpus.
      train: occurrences with a vector each.
      train_vectors: of each layer, an array or a memory map.
      test: occurrences with a vector each.
      test_vectors: of the same layers.
      fallback: lemma → sense, for lemmas that never occur in training.

    Raises:
      InputError: numbers of layers, vectors and occurrences that do not go together, or no test occurrences.
    """
    if len(train_vectors) != len(test_vectors):
        raise InputError(f"{name}: found {len(train_vectors)} and {len(test_vectors)} layers, expected as many")
    task = Disambiguation(train, test, fallback)
    layers = list(zip(train_vectors, test_vectors, strict=True))
    centroid = [task.centroid(*layer) for layer in layers]
    parts = [task.by_frequency(answers) for answers in centroid]
    return SenseTask(
        name=name,
        train=len(train.keys),
        test=len(test.keys),
        lemmas=len(task.lemmas),
        centroid=[task.accuracy(answers) for answers in centroid],
        one_nn=[task.accuracy(task.one_nn(*layer)) for layer in layers],
        most_frequent=task.accuracy(task.most_frequent()),
        by_frequency={part: [layer[part] for layer in parts] for part in task.by_frequency(task.most_frequent())},
        macro_f1=[task.macro_f1(answers) for answers in centroid],
    )


class SameSense(NamedTuple):
    """Answers by a threshold.

    Attributes:
      threshold: pairs at least as alike have the same sense; -inf says yes and inf no to all.
      dev_accuracy: of it where it was fitted.
      same: answers for the test.
    """

    threshold: float
    dev_accuracy: float
    same: Bool[np.ndarray, "M"]


def wic_threshold(
    similarities_dev: Float[np.ndarray, "N"], same_dev: Bool[np.ndarray, "N"], similarities_test: Float[np.ndarray, "M"]
) -> SameSense:
    """Word in context by the threshold that is best on dev (Pilehvar and Camacho-Collados 2019, section 4.1).

    It is half-way between two similarities, of several that are as good the lowest.

    Raises:
      InputError: not a similarity for each answer of dev, or none.
    """
    similarities, same = np.asarray(similarities_dev, np.float64), np.asarray(same_dev, bool)
    if similarities.shape != same.shape or not len(same):
        found = f"{len(similarities)} similarities for {len(same)} answers"
        raise InputError(f"dev: found {found}, expected as many, and some")
    values, place = np.unique(similarities, return_inverse=True)
    thresholds = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    # Passing a value turns its pairs from yes to no.
    change = np.bincount(place, np.where(same, -1, 1), len(values))
    right = same.sum() + np.concatenate([[0], np.cumsum(change)])
    best = int(right.argmax())
    answers = np.asarray(similarities_test, np.float64) >= thresholds[best]
    return SameSense(float(thresholds[best]), float(right[best] / len(same)), answers)


def _pairs(occurrences: Senses) -> Iterable[tuple[str, str]]:
    """Each occurrence's lemma with each of its senses."""
    for lemma, keys in zip(occurrences.lemmas, occurrences.keys, strict=True):
        yield from ((lemma, key) for key in dict.fromkeys(keys))


def _rows(lemmas: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, lemma in enumerate(lemmas):
        rows.setdefault(lemma, []).append(row)
    return rows


def _means(train: Float[np.ndarray, "N D"], lemma: Lemma) -> Float[np.ndarray, "S D"]:
    means = np.zeros((len(lemma.senses), train.shape[1]))
    for sense, places in enumerate(lemma.members):
        for block in blocks(train, lemma.train[places]):
            means[sense] += block.sum(0)
        means[sense] /= len(places)
    return means


def _nearest(
    test: Float[np.ndarray, "K D"], train: Float[np.ndarray, "N D"], rows: Int[np.ndarray, "M"]
) -> Int[np.ndarray, "K"]:
    """The place in `rows` of the vector with the largest cosine, a block of candidates at a time."""
    directions, start = unit(test), 0
    best, place = np.full(len(test), -np.inf), np.zeros(len(test), np.int64)
    for block in blocks(train, rows):
        cosines = directions @ unit(block).T
        nearest = cosines.argmax(1)
        value = np.take_along_axis(cosines, nearest[:, None], 1)[:, 0]
        place = np.where(value > best, nearest + start, place)
        best = np.maximum(best, value)
        start += len(block)
    return place
