"""Parts of a task's data: some sentences, with what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from ctx_jax.atlas.records import Edges, Senses, Trees, Words


def some_sentences(sentences: Sequence[Words], most_words: int, seed: int) -> Int[np.ndarray, "M"]:
    """Numbers of sentences drawn by chance, of about so many words in all, in their order; all where they are fewer."""
    counts = np.array([len(words) for words in sentences])
    if counts.sum() <= most_words:
        return np.arange(len(sentences))
    order = np.random.default_rng(seed).permutation(len(sentences))
    kept = int(np.searchsorted(np.cumsum(counts[order]), most_words, side="right"))
    return np.sort(order[: max(kept, 1)])


def of_sentences(record: Edges | Trees | Senses, numbers: Int[np.ndarray, "M"]) -> Edges | Trees | Senses:
    """What a record says of these sentences, which it counts anew."""
    if isinstance(record, Trees):
        pick = lambda column: None if column is None else [column[number] for number in numbers]
        return Trees(*map(pick, record))
    place = np.full(len(record.sentences), -1)
    place[numbers] = np.arange(len(numbers))
    kept = np.flatnonzero(place[np.asarray(record.sentence)] >= 0)

    def pick(name: str, column: object) -> object:
        if column is None:
            return None
        if name == "sentences":
            return [column[number] for number in numbers]
        if name == "sentence":
            return place[np.asarray(column)[kept]]
        return column[kept] if isinstance(column, np.ndarray) else [column[example] for example in kept]

    return type(record)(*(pick(name, getattr(record, name)) for name in record._fields))
