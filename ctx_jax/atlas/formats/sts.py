"""Pairs of texts with how alike they are, from 0 to 5: SemEval's STS and the benchmark made of it (Cer et al. 2017).

The benchmark's `sts-SPLIT.csv` are divided by tabs, not by commas, and quotes are part of the text: genre, file, year,
number, score, two texts and, in some lines, where these are from
(http://ixa2.si.ehu.eus/stswiki/index.php/STSbenchmark). SemEval's sets of 2012 to 2016 as brmson/dataset-sts has them:
score, tab, text, tab, text; a pair that nobody has scored has an empty score.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

import numpy as np

from ctx_jax.atlas.formats.files import lines, shown, wrong
from ctx_jax.atlas.formats.tables import score
from ctx_jax.atlas.records import TextPairs

LOWEST, HIGHEST = 0.0, 5.0
_FILE, _SCORE, _FIRST = 1, 4, 5
_COLUMNS = (7, 9)


def benchmark(path: str | os.PathLike) -> TextPairs:
    """Reads a split of the STS benchmark; `sets` are the files that its lines name.

    Raises:
      InputError: other columns, a score that is no number from 0 to 5.
    """
    rows = []
    for number, line in lines(path):
        if not line.strip():
            continue
        row = line.split("\t")
        if len(row) not in _COLUMNS:
            expected = " or ".join(map(str, _COLUMNS))
            raise wrong(path, number, f"{len(row)} columns in {shown(line)}", f"{expected}, divided by tabs")
        rows.append((*row[_FIRST : _FIRST + 2], _score(path, number, row[_SCORE]), row[_FILE]))
    return _pairs(rows)


def semeval(paths: Iterable[str | os.PathLike]) -> TextPairs:
    """Reads the sets of a year, one after another; `sets` are the names of the files up to their first dot.

    Pairs without a score are left out.

    Raises:
      InputError: other columns, a score that is no number from 0 to 5.
    """
    rows = []
    for path in paths:
        for number, line in lines(path):
            if not line.strip():
                continue
            row = line.split("\t")
            if len(row) != 3:
                raise wrong(path, number, f"{len(row)} columns in {shown(line)}", "3, divided by tabs")
            if row[0]:
                rows.append((*row[1:], _score(path, number, row[0]), pathlib.Path(path).name.partition(".")[0]))
    return _pairs(rows)


def _score(path: str | os.PathLike, number: int, text: str) -> float:
    value = score(text, LOWEST, HIGHEST)
    if value is None:
        raise wrong(path, number, f"score {shown(text)}", f"a number from {LOWEST:g} to {HIGHEST:g}")
    return value


def _pairs(rows: list[tuple[str, str, float, str]]) -> TextPairs:
    first, second, scores, sets = zip(*rows, strict=True) if rows else ((), (), (), ())
    return TextPairs(first, second, np.array(scores, np.float64), sets)
