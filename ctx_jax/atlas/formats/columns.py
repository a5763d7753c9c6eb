"""Columns of words and labels, one word a line and a blank line after each sentence: CoNLL's shared tasks.

Two kinds. In the one for named entities the first column is the word and the last its tag, as in CoNLL-2003
(https://www.clips.uantwerpen.be/conll2003/ner/, spaces) and WNUT17 (tabs). In the other are trees and predicates:
number, word, two parts of speech, a piece of the tree, the predicate's lemma, its roleset, then one column for each
predicate of the sentence, all divided by tabs; trees and arguments are written as in CoNLL-2012
(https://conll.cemantix.org/2012/data.html).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ctx_jax.atlas.formats.files import lines, shown, wrong
from ctx_jax.atlas.records import Edges, Words

_DOCUMENT = "-DOCSTART-"
_TAG = re.compile(r"O|([BI])-(.+)")
_PIECE = re.compile(r"((?:\([^()*\s]+)*)\*(\)*)")
_ARGUMENT = re.compile(r"(?:\(([^()*\s]+))?\*(\))?")
_NO_PREDICATE = "-"
_PREDICATE = "V"
_WORD, _TREE, _ROLESET, _ARGUMENTS = 1, 4, 6, 7
_TOP = "TOP"

# Begin, end and label.
Labelled = tuple[int, int, str]


def named_entities(path: str | os.PathLike) -> Edges:
    """Entities as spans with their types; IOB1 and IOB2 are read by one rule.

    An entity begins at `B-X`, and at an `I-X` that does not follow `B-X` or `I-X`: the rule of conlleval, the script of
    the shared tasks. Lines of `-DOCSTART-` are no sentences.

    Raises:
      InputError: a line with other columns than the first, a tag that is not `O`, `B-…` or `I-…`.
    """
    sentences, entities, columns = [], [], None
    for block in _blocks(path, comments=False):
        words, tags = [], []
        for number, line in block:
            row = line.split("\t") if "\t" in line else line.rstrip(" ").split(" ")
            columns = columns or len(row)
            if len(row) != columns or columns < 2 or not row[0].strip():
                expected = "two or more" if columns < 2 else f"{columns} as in the first line, none of them empty"
                raise wrong(path, number, f"{len(row)} columns in {shown(line)}", expected)
            if not (tag := _TAG.fullmatch(row[-1])):
                raise wrong(path, number, f"tag {shown(row[-1])}", "O, B-… or I-…")
            words.append(row[0])
            tags.append((tag[1] or "", tag[2] or ""))
        if words[0] == _DOCUMENT:
            continue
        sentences.append(words)
        entities.append(_entities(tags))
    return _edges(sentences, entities)


def _entities(tags: Sequence[tuple[str, str]]) -> list[Labelled]:
    found: list[Labelled] = []
    begin, kind = 0, ""
    for place, (letter, label) in enumerate([*tags, ("", "")]):
        if letter == "I" and label == kind:
            continue
        if kind:
            found.append((begin, place, kind))
        begin, kind = place, label
    return found


class Frame(NamedTuple):
    """A predicate with its arguments.

    Attributes:
      predicate: its span.
      arguments: their spans and roles.
    """

    predicate: tuple[int, int]
    arguments: Sequence[Labelled]


class Parsed(NamedTuple):
    """A sentence with its constituents and predicates.

    Attributes:
      words: of it.
      constituents: spans and labels, a larger one before what is in it.
      frames: one for each predicate.
    """

    words: Words
    constituents: Sequence[Labelled]
    frames: Sequence[Frame]


def is_parsed(path: str | os.PathLike) -> bool:
    """Has a file trees and predicates, by its first sentence? Else it is one of named entities."""
    block = next(_blocks(path, comments=True), [])
    rows = [line.split("\t") for _, line in block]
    return bool(rows) and all(len(row) >= _ARGUMENTS and _PIECE.fullmatch(row[_TREE]) for row in rows)


def parsed(path: str | os.PathLike) -> Iterator[Parsed]:
    """Streams the sentences of a file with trees and predicates.

    Raises:
      InputError: a line with other columns than its sentence has predicates, words that do not count from 1, brackets
        that do not close.
    """
    for block in _blocks(path, comments=True):
        numbers = [number for number, _ in block]
        rows = [line.split("\t") for _, line in block]
        # A predicate has a roleset: the n-th of them owns the n-th column of arguments.
        owners = [place for place, row in enumerate(rows) if row[_ROLESET : _ROLESET + 1] not in ([], [_NO_PREDICATE])]
        columns = _ARGUMENTS + len(owners)
        for place, (number, row) in enumerate(zip(numbers, rows, strict=True), 1):
            if len(row) != columns:
                expected = f"{columns}, {_ARGUMENTS} and one for each predicate"
                raise wrong(path, number, f"{len(row)} columns", expected)
            if row[0] != str(place) or not row[_WORD].strip():
                raise wrong(path, number, f"word {shown(row[_WORD])} with number {shown(row[0])}", f"a word, {place}")
        yield Parsed(
            [row[_WORD] for row in rows],
            _constituents(path, [row[_TREE] for row in rows], numbers),
            [
                _frame(path, owner, [row[_ARGUMENTS + column] for row in rows], numbers)
                for column, owner in enumerate(owners)
            ],
        )


def constituents(corpus: Sequence[Parsed]) -> Edges:
    """Labels of all constituents of more than a part of speech (Tenney et al. 2019, "nonterminals").

    Function tags and indices are cut off: `NP-SBJ-1` is `NP` (jiant v1's probing/data/extract_ontonotes_all.py,
    `constituents_to_record`). A constituent over one word counts, the part of speech below it does not; of constituents
    over the same words each is an edge. TOP is left out: every sentence has it, over all its words.
    """
    return _edges([sentence.words for sentence in corpus], [sentence.constituents for sentence in corpus])


def semantic_roles(corpus: Sequence[Parsed]) -> Edges:
    """Roles of arguments: `first` is the predicate, `second` the argument (Tenney et al. 2019, "SRL").

    The predicate is the words of its `V`, else the word that has the roleset; `V` is no edge. `C-…` and
    `R-…` are roles like others, `C-V` with them.
    """
    words = [sentence.words for sentence in corpus]
    arguments = [[edge for frame in sentence.frames for edge in frame.arguments] for sentence in corpus]
    edges = _edges(words, arguments)
    predicates = [frame.predicate for sentence in corpus for frame in sentence.frames for _ in frame.arguments]
    return edges._replace(first=np.array(predicates, np.int32).reshape(-1, 2), second=edges.first)


def _constituents(path: str | os.PathLike, pieces: Sequence[str], numbers: Sequence[int]) -> list[Labelled]:
    found: list[tuple[int, str]] = []
    ends: dict[int, int] = {}
    still_open: list[int] = []
    for place, (piece, number) in enumerate(zip(pieces, numbers, strict=True)):
        if not (match := _PIECE.fullmatch(piece)):
            raise wrong(path, number, f"piece of a tree {shown(piece)}", "(LABEL(LABEL* or * or *))")
        for label in match[1].split("(")[1:]:
            still_open.append(len(found))
            found.append((place, re.split(r"(?<=.)[-=|]", label, maxsplit=1)[0]))
        for _ in match[2]:
            if not still_open:
                raise wrong(path, number, f"piece of a tree {shown(piece)}", "a bracket to close only what is open")
            ends[still_open.pop()] = place + 1
    if still_open:
        begin, label = found[still_open[-1]]
        raise wrong(path, numbers[begin], f"constituent {label} is not closed in its sentence", "a bracket for each")
    return [(begin, ends[place], label) for place, (begin, label) in enumerate(found) if label != _TOP]


def _frame(path: str | os.PathLike, owner: int, column: Sequence[str], numbers: Sequence[int]) -> Frame:
    arguments: list[Labelled] = []
    predicate = (owner, owner + 1)
    role, begin = "", 0
    for place, (piece, number) in enumerate(zip(column, numbers, strict=True)):
        match = _ARGUMENT.fullmatch(piece)
        if not match or (match[1] and role) or (match[2] and not match[1] and not role):
            raise wrong(path, number, f"argument {shown(piece)}", "(ROLE* or (ROLE*), * or *), one open at a time")
        if match[1]:
            role, begin = match[1], place
        if match[2]:
            if role == _PREDICATE:
                predicate = (begin, place + 1)
            else:
                arguments.append((begin, place + 1, role))
            role = ""
    if role:
        raise wrong(path, numbers[begin], f"argument {role} is not closed in its sentence", "a bracket for each")
    return Frame(predicate, arguments)


def _blocks(path: str | os.PathLike, *, comments: bool) -> Iterator[list[tuple[int, str]]]:
    """The lines of each sentence; with `comments`, those that begin with `#` are none."""
    block: list[tuple[int, str]] = []
    for number, line in lines(path):
        if line.strip():
            if not (comments and line.startswith("#")):
                block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _edges(sentences: Sequence[Words], labelled: Iterable[Sequence[Labelled]]) -> Edges:
    every = [(number, *edge) for number, edges in enumerate(labelled) for edge in edges]
    places = np.array([edge[:3] for edge in every], np.int32).reshape(-1, 3)
    return Edges(sentences, places[:, 0], places[:, 1:], None, [edge[3] for edge in every])
