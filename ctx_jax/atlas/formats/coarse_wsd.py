"""CoarseWSD-20, ambiguous nouns with their coarse senses (Loureiro et al. 2021).

"Analysis and Evaluation of Language Models for Word Sense Disambiguation". A folder for each word, with
`train.data.txt` and `test.data.txt` (the place of the word, a tab, a tokenised sentence), `*.gold.txt` (the number of
its sense) and `classes_map.txt` (JSON, number → name of the sense): README of github.com/danlou/bert-disambiguation,
data/CoarseWSD-20. The folder of folders may be a tar file, which is read without unpacking.
"""

from __future__ import annotations

import json
import os
import pathlib
import tarfile
from collections.abc import Iterable

import numpy as np

from ctx_jax.atlas.formats.files import decoded, opened, shown, wrong
from ctx_jax.atlas.formats.tables import File, index, paired
from ctx_jax.atlas.records import Senses
from ctx_jax.errors import InputError

CLASSES = "classes_map.txt"


def senses(words: Iterable[str | os.PathLike], split: str) -> Senses:
    """Reads a split of the words whose folders are given.

    Lemmas are the words, keys the names of the senses.

    Raises:
      InputError: a file that is missing, data and gold of different lengths, a place outside the sentence, a class that
        the map does not have.
    """
    return _senses(((pathlib.Path(word).name, _of_folder(pathlib.Path(word), split)) for word in words), split)


def senses_of_tar(path: str | os.PathLike, split: str) -> Senses:
    """Reads a split of a tar file of such folders, words in alphabetical order; otherwise as `senses`."""
    return _senses(sorted(_of_tar(path, split).items()), split)


def names_of(split: str) -> tuple[str, str, str]:
    """What the files of a word's split are called: its classes, its sentences, its answers."""
    return CLASSES, f"{split}.data.txt", f"{split}.gold.txt"


def _of_folder(folder: pathlib.Path, split: str) -> list[File]:
    files: list[File] = []
    for path in (folder / name for name in names_of(split)):
        with opened(path) as stream:
            files.append((os.fspath(path), list(decoded(path, stream))))
    return files


def _of_tar(path: str | os.PathLike, split: str) -> dict[str, list[File]]:
    wanted: dict[str, dict[str, File]] = {}
    try:
        # As a stream, once from its beginning to its end: to go back would be to decompress all of it again.
        with opened(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                place = pathlib.PurePosixPath(member.name)
                if member.isfile() and place.name in names_of(split):
                    name = f"{os.fspath(path)}/{member.name}"
                    text = list(decoded(name, tar.extractfile(member)))
                    wanted.setdefault(place.parent.name, {})[place.name] = (name, text)
    except tarfile.TarError as error:
        raise InputError(f"{os.fspath(path)}: {error}; expected a tar file") from error
    expected = ", ".join(names_of(split))
    for word, files in wanted.items():
        for name in names_of(split):
            if name not in files:
                raise InputError(f"{os.fspath(path)}: {word} has no {name}; expected {expected} of each word")
    if not wanted:
        raise InputError(f"{os.fspath(path)}: no folder with {expected}; expected one for each word")
    return {word: [files[name] for name in names_of(split)] for word, files in wanted.items()}


def _senses(words: Iterable[tuple[str, list[File]]], split: str) -> Senses:
    sentences, places, lemmas, keys, names = [], [], [], [], []
    for word, ((classes_path, classes_lines), data, gold) in words:
        classes = _classes(classes_path, classes_lines)
        for (number, line), (gold_number, label) in paired(data, gold):
            place, tab, text = line.partition("\t")
            tokens = text.split()
            if not tab:
                raise wrong(data[0], number, shown(line), "the place of the word, a tab, the sentence")
            at = index(place, len(tokens))
            if at is None:
                raise wrong(data[0], number, f"place {shown(place)}", f"that of a word, below {len(tokens)}")
            label = label.strip()
            if label not in classes:
                expected = f"one of {', '.join(classes)} in {classes_path}"
                raise wrong(gold[0], gold_number, f"class {shown(label)}", expected)
            places.append((len(sentences), at, at + 1))
            sentences.append(tokens)
            lemmas.append(word)
            keys.append((classes[label],))
            names.append(f"{word}.{split}.{number}")
    table = np.array(places, np.int32).reshape(-1, 3)
    return Senses(sentences, table[:, 0], table[:, 1:], lemmas, keys, names)


def _classes(path: str, file: list[tuple[int, str]]) -> dict[str, str]:
    try:
        classes = json.loads("\n".join(line for _, line in file))
    except json.JSONDecodeError as error:
        raise wrong(path, error.lineno, error.msg, "JSON") from error
    if not (isinstance(classes, dict) and all(isinstance(name, str) for name in classes.values())):
        raise wrong(path, 1, shown(str(classes)), 'numbers and names of senses, {"0": "bank_bank", …}')
    return classes
