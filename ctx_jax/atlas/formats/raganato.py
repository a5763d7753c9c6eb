"""Words with WordNet senses, in the XML of Raganato et al. 2017.

"Word Sense Disambiguation: A Unified Evaluation Framework and Empirical Comparison", http://lcl.uniroma1.it/wsdeval/.
`NAME.data.xml` has `<sentence>`s of `<wf>` and `<instance id=… lemma=…>`, and `NAME.gold.key.txt` a line for each
instance: its id and its sense keys, one or more. The keys are WordNet's, `lemma%ss_type:…` (senseidx(5WN)).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple
from xml.parsers import expat

import numpy as np

from ctx_jax.atlas.formats.files import lines, opened, shown, wrong
from ctx_jax.atlas.formats.wordnet import PARTS
from ctx_jax.atlas.records import Senses, Words
from ctx_jax.errors import InputError

_WORDS = ("wf", "instance")


class _Instance(NamedTuple):
    name: str
    lemma: str
    begin: int
    end: int
    number: int


def senses(data: str | os.PathLike, gold: str | os.PathLike) -> Senses:
    """Reads both files; the XML is streamed, and nothing of it is kept but what is returned.

    A text of several words (`took place`) is as many words, and an instance's span is over all of them. A sentence
    without words is left out. `lemmas` are the instance's lemma and the part of speech of its first sense key:
    `bank%1`; 1 noun, 2 verb, 3 adjective, 4 adverb.

    Raises:
      InputError: XML that is not well-formed, an instance outside a sentence, without words or without a lemma, one
        that has no keys or whose id comes twice, keys that are none of WordNet's or of no instance.
    """
    keys = _keys(gold)
    sentences: list[Words] = []
    places: list[tuple[int, int, int]] = []
    lemmas, found, names = [], [], []
    for words, instances in _Sentences(data):
        for instance in instances:
            its_name = f"instance {shown(instance.name)}"
            if instance.name not in keys:
                raise wrong(data, instance.number, f"{its_name} has no keys in {os.fspath(gold)}", "one line for each")
            number, its_keys = keys[instance.name]
            if its_keys is None:
                raise wrong(data, instance.number, f"{its_name} a second time", "ids to be unique")
            keys[instance.name] = (number, None)
            places.append((len(sentences), instance.begin, instance.end))
            lemmas.append(f"{instance.lemma}%{PARTS[its_keys[0].partition('%')[2][0]]}")
            found.append(its_keys)
            names.append(instance.name)
        sentences.append(words)
    for name, (number, its_keys) in keys.items():
        if its_keys is not None:
            raise wrong(gold, number, f"keys of {shown(name)}, not in {os.fspath(data)}", "keys of its instances")
    table = np.array(places, np.int32).reshape(-1, 3)
    return Senses(sentences, table[:, 0], table[:, 1:], lemmas, found, names)


def _keys(path: str | os.PathLike) -> dict[str, tuple[int, tuple[str, ...] | None]]:
    """Instance → the line that it stands in, and its keys; None once they are used."""
    keys: dict[str, tuple[int, tuple[str, ...] | None]] = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        name, *its_keys = line.split()
        for key in its_keys or [""]:
            if key.partition("%")[2][:1] not in PARTS:
                raise wrong(path, number, f"key {shown(key)} of {shown(name)}", "WordNet's sense keys: lemma%1:…")
        if name in keys:
            raise wrong(path, number, f"{shown(name)} a second time, after line {keys[name][0]}", "one line for each")
        keys[name] = (number, tuple(its_keys))
    return keys


class _Sentences:
    """Iterates over the sentences of an XML file, (words, instances) each, a block of it at a time."""

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._done: list[tuple[Words, list[_Instance]]] = []
        self._words: list[str] | None = None  # of the sentence that is open
        self._instances: list[_Instance] = []
        self._text: list[str] | None = None  # of the word that is open
        self._attributes: dict[str, str] = {}
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters

    def __iter__(self) -> Iterator[tuple[Words, list[_Instance]]]:
        with opened(self._path) as stream:
            last = False
            while not last:
                block = stream.read(1 << 16)
                last = not block
                try:
                    self._parser.Parse(block, last)
                except expat.ExpatError as error:
                    raise wrong(self._path, error.lineno, expat.ErrorString(error.code), "well-formed XML") from error
                yield from self._done
                self._done.clear()

    def _wrong(self, found: str, expected: str, lines_before: int = 0) -> InputError:
        return wrong(self._path, self._parser.CurrentLineNumber - lines_before, found, expected)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if self._text is not None:
            raise self._wrong(f"<{tag}> inside a word", "text alone")
        if tag == "sentence":
            if self._words is not None:
                raise self._wrong("<sentence> inside a <sentence>", "</sentence> first")
            self._words, self._instances = [], []
        elif tag in _WORDS:
            if self._words is None:
                raise self._wrong(f"<{tag}> outside a sentence", "words inside <sentence>")
            if tag == "instance" and not (attributes.get("id") and attributes.get("lemma")):
                raise self._wrong(f"<instance> with {attributes}", "id and lemma")
            self._text, self._attributes = [], attributes

    def _characters(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)
        elif text.strip():
            # The parser stands at the text's end.
            lines_before = text.lstrip().count("\n")
            raise self._wrong(f"text {shown(text.strip())} outside words", "it in <wf> or <instance>", lines_before)

    def _end(self, tag: str) -> None:
        if tag == "sentence":
            if self._words:
                self._done.append((self._words, self._instances))
            self._words = None
        elif tag in _WORDS:
            begin = len(self._words)
            self._words.extend("".join(self._text).split())
            if tag == "instance":
                if len(self._words) == begin:
                    raise self._wrong("<instance> without text", "its words")
                name, lemma = self._attributes["id"], self._attributes["lemma"]
                place = self._parser.CurrentLineNumber
                self._instances.append(_Instance(name, lemma, begin, len(self._words), place))
            self._text = None
