"""Examples, and rows packed with them, as the loader hands them over."""

from typing import NamedTuple

import numpy as np

from ctx_jax.arrays import Batch
from ctx_jax.objectives.masking import Vocabulary

SPECIALS = PAD, UNK, CLS, SEP, MASK = range(5)


class Example(NamedTuple):
    ids: np.ndarray
    types: np.ndarray
    number: int
    next_sentence: int


def vocabulary(size):
    return Vocabulary(size, MASK, SPECIALS, np.zeros(size, bool))


def make_examples(rng, count, low, high, vocab_size):
    """`[CLS] A [SEP]` (label -1) and `[CLS] A [SEP] B [SEP]` (0 or 1), low to high tokens long."""
    examples = []
    for number in range(count):
        ids = rng.integers(len(SPECIALS), vocab_size, rng.integers(low, high + 1)).astype(np.int32)
        types = np.zeros_like(ids)
        ids[0], ids[-1] = CLS, SEP
        label = int(rng.integers(-1, 2))
        if label >= 0:
            middle = rng.integers(2, len(ids) - 2)
            ids[middle] = SEP
            types[middle + 1 :] = 1
        examples.append(Example(ids, types, 1000 + 7 * number, label))
    return examples


def rows_of(examples, length, per_row, epoch=0, rows=None):
    """In order, `per_row` at most in a row; rows of nothing but padding up to `rows`."""
    packed = [[]]
    for example in examples:
        if len(packed[-1]) == per_row or sum(len(e.ids) for e in packed[-1]) + len(example.ids) > length:
            packed.append([])
        packed[-1].append(example)
    packed += [[]] * ((rows or 0) - len(packed))
    batch = Batch(
        **{
            k: np.zeros((len(packed), length), np.int32)
            for k in ("input_ids", "token_type_ids", "segment_ids", "positions")
        },
        example_ids=np.zeros((len(packed), per_row), np.uint32),
        epochs=np.full(len(packed), epoch, np.uint32),
        next_sentence=np.full((len(packed), per_row), -1, np.int32),
    )
    for r, row in enumerate(packed):
        at = 0
        for s, example in enumerate(row):
            place = slice(at, at + len(example.ids))
            batch.input_ids[r, place] = example.ids
            batch.token_type_ids[r, place] = example.types
            batch.segment_ids[r, place] = s + 1
            batch.positions[r, place] = np.arange(len(example.ids))
            batch.example_ids[r, s] = example.number
            batch.next_sentence[r, s] = example.next_sentence
            at += len(example.ids)
    return batch
