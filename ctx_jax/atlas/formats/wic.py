"""WiC, does a word mean the same in two contexts: Pilehvar and Camacho-Collados 2019.

`NAME.data.txt` has five columns divided by tabs: the word, its part of speech (`N` or `V`), its places in the two
sentences (`2-5`), and the sentences, tokenised. `NAME.gold.txt` has `T` or `F` for each (README of
https://pilehvar.github.io/wic/).
"""

from __future__ import annotations

import os

import numpy as np

from ctx_jax.atlas.formats.files import lines, shown, wrong
from ctx_jax.atlas.formats.tables import index, paired
from ctx_jax.atlas.records import WordPairs

_COLUMNS = 5
_ANSWERS = {"T": True, "F": False}


def word_pairs(data: str | os.PathLike, gold: str | os.PathLike) -> WordPairs:
    """Reads both files.

    Raises:
      InputError: other columns, a place outside its sentence, an answer that is neither T nor F, files of different
        lengths.
    """
    sentences, places, same = [], [], []
    for (number, line), (gold_number, answer) in paired((data, lines(data)), (gold, lines(gold))):
        row = line.split("\t")
        if len(row) != _COLUMNS:
            raise wrong(data, number, f"{len(row)} columns in {shown(line)}", f"{_COLUMNS}, divided by tabs")
        both = row[2].split("-")
        words = [text.split() for text in row[3:]]
        at = [index(place, len(sentence)) for place, sentence in zip(both, words, strict=False)]
        if len(both) != len(words) or None in at:
            sizes = " and ".join(str(len(sentence)) for sentence in words)
            raise wrong(data, number, f"places {shown(row[2])}", f"two, I-J, in sentences of {sizes} words")
        if answer.strip() not in _ANSWERS:
            raise wrong(gold, gold_number, shown(answer), "T or F")
        sentences.extend(words)
        places.extend(at)
        same.append(_ANSWERS[answer.strip()])
    begins = np.array(places, np.int32)
    return WordPairs(sentences, np.stack([begins, begins + 1], axis=1), np.array(same, bool))
