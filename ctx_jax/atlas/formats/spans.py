"""Labelled spans as JSON, a sentence a line: the format of edge probing (Tenney et al. 2019).

    {"text": "Ian ate ice cream", "targets": [{"span1": [1, 2], "span2": [2, 4], "label": "A1"}]}

jiant v1's probing/data/README.md. `text` is divided at white space; `tokens`, a list of words, may stand for it. Spans
are [begin, end) of words. `span2` is either in all targets of a file or in none. A label may be a list. Other fields
are left aside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np

from ctx_jax.atlas.formats.files import lines, shown, wrong
from ctx_jax.atlas.records import Edges, Words

_TARGET = '{"span1": [begin, end], "label": …} with "span2" in all targets or in none'


def edges(path: str | os.PathLike) -> Edges:
    """Reads a file; a target with several labels is as many edges, one with none is no edge.

    A sentence without words is left out.

    Raises:
      InputError: a line that is no such JSON, a span that is empty or outside the sentence, targets with and
        without `span2`.
    """
    sentences, places, labels = [], [], []
    pairs: bool | None = None  # None until a target has said it
    for number, line in lines(path):
        if not line.strip():
            continue
        words, targets = _record(path, number, line)
        for target in targets:
            first = _span(path, number, target, "span1", len(words))
            second = () if target.get("span2") is None else _span(path, number, target, "span2", len(words))
            if pairs is None:
                pairs = bool(second)
            if pairs != bool(second):
                raise wrong(path, number, f"target {shown(str(target))}, others unlike it", _TARGET)
            names = target.get("label")
            names = [names] if isinstance(names, str) else names
            if not _is_words(names):
                raise wrong(path, number, f"label {shown(str(names))}", "a text, or a list of texts")
            places.extend([(len(sentences), *first, *second)] * len(names))
            labels.extend(names)
        if words:
            sentences.append(words)
    table = np.array(places, np.int32).reshape(len(places), 5 if pairs else 3)
    return Edges(sentences, table[:, 0], table[:, 1:3], table[:, 3:] if pairs else None, labels)


def is_spans(path: str | os.PathLike) -> bool:
    """Is the first line JSON with `targets`?"""
    text = next((line for _, line in lines(path) if line.strip()), "")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "targets" in record


def _record(path: str | os.PathLike, number: int, line: str) -> tuple[Words, list[dict]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong(path, number, f"{error} in {shown(line)}", "JSON") from error
    if not isinstance(record, dict):
        raise wrong(path, number, shown(line), "an object")
    words, text, targets = (record.get(field) for field in ("tokens", "text", "targets"))
    if words is None and isinstance(text, str):
        words = text.split()
    if not (_is_words(words) and all(word.strip() for word in words)):
        raise wrong(path, number, shown(line), '"text", or "tokens" as a list of words')
    if not (isinstance(targets, list) and all(isinstance(target, dict) for target in targets)):
        raise wrong(path, number, f"targets {shown(str(targets))}", f'"targets", a list of {_TARGET}')
    return words, targets


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _span(path: str | os.PathLike, number: int, target: dict, name: str, length: int) -> Sequence[int]:
    span = target.get(name)
    whole = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
    if not (whole and 0 <= span[0] < span[1] <= length):
        raise wrong(path, number, f"{name} {shown(str(span))}", f"[begin, end), within {length} words")
    return span
