"""What is in a folder of labelled data: files are known by their names, and go together where only their split differs.

The split is a word of the name (`en_ewt-ud-train.conllu`, `test.jsonl`, `train.data.txt`), else the name of the folder,
else `train`. The rest of the name is the corpus's; where nothing is left it is the folder's.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ctx_jax.atlas.formats import coarse_wsd, columns, conllu, raganato, spans, sts, wic
from ctx_jax.atlas.formats.files import COMPRESSED, without_compression
from ctx_jax.atlas.formats.splits import Splits
from ctx_jax.atlas.formats.wordnet import first_senses, is_wordnet
from ctx_jax.atlas.records import Corpus, Examples
from ctx_jax.errors import InputError

TITLES = {
    "pos": "part of speech",
    "xpos": "the treebank's own part of speech",
    "dep": "relation of a word to its head",
    "tree": "dependency tree",
    "ner": "named entity",
    "constituents": "constituent",
    "srl": "semantic role",
    "spans": "label of spans",
    "senses": "word sense",
    "same-sense": "same sense in two sentences",
    "similarity": "how alike two texts are",
}

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "devel", "development", "valid", "validation", "val", "trial"), "dev"),
    "test": "test",
}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?=$|[-_.])", re.IGNORECASE)
# The end of the names of columns: conll, conll03, … but not conllu.
_CONLL = r"conll(?!u$)\w*"
# Published files whose names do not say what they are, and what they would be called if they did.
_COLUMNS = {
    "eng.train": "conll2003.train",
    "eng.testa": "conll2003.dev",
    "eng.testb": "conll2003.test",
    "wnut17train.conll": "wnut17.train",
    "emerging.dev.conll": "wnut17.dev",
    "emerging.test.annotated": "wnut17.test",
}
# Raganato et al. 2017, section 4: what is trained on, what is tuned on and what is tested on.
_SENSES = {
    "semcor": "semcor.train",
    "semeval2007": "semeval2007.dev",
    **{name: f"{name}.test" for name in ("senseval2", "senseval3", "semeval2013", "semeval2015", "ALL")},
}


class _Part(NamedTuple):
    """A split, or a part of one: in which folder, called what (corpus and split), and the files it is in."""

    folder: pathlib.Path
    name: str
    files: tuple[pathlib.Path, ...]


_Reader = Callable[[], Examples]
# The folder and the names of its files → parts.
_Find = Callable[[pathlib.Path, Sequence[str]], Iterator[_Part]]


class _Format(NamedTuple):
    """A format: how its files are found among those of a folder, and what tasks they hold.

    Attributes:
      expected: what its files are called, for people.
      find: parts in a folder.
      tasks: a split and the files of its parts → task → reader.
      several: can a split have several parts?
    """

    expected: str
    find: _Find
    tasks: Callable[[str, Sequence[tuple[pathlib.Path, ...]]], Mapping[str, _Reader]]
    several: bool = False


def discover(folder: str | os.PathLike) -> list[Corpus]:
    """The corpora of a folder and of those below it, in the order of their names, which are unique.

    A name is the corpus's and the task's, `en_ewt-ud/pos`; where two corpora share theirs, the folder stands before it.
    Of the files hardly more than a first sentence is read; splits are read when they are asked for. Hidden files are no
    files.

    Raises:
      InputError: no such folder, nothing in it that is known, two files for one split of a corpus, a known file
        that cannot be read.
    """
    root = _folder(folder)
    groups: dict[tuple[int, pathlib.Path, str], dict[str, list[tuple[pathlib.Path, ...]]]] = {}
    number_of_files = 0
    for below, names in _walk(root):
        number_of_files += len(names)
        for kind, part in _parts(below, names):
            place, stem, split = _place(root, part)
            files = groups.setdefault((kind, place, stem), {}).setdefault(split, [])
            if files and not _FORMATS[kind].several:
                raise InputError(f"{split} of {stem}: both {files[0][0]} and {part.files[0]}; expected one file")
            files.append(part.files)
    if not groups:
        known = "; ".join([*(form.expected for form in _FORMATS), f"each plain or as {', '.join(COMPRESSED)}"])
        raise InputError(f"{root}: nothing known among {number_of_files} files; expected {known}")
    return _named(root, [(place, stem, _tasks(kind, splits)) for (kind, place, stem), splits in groups.items()])


def inventory(folder: str | os.PathLike) -> dict[str, str]:
    """First senses of the first WordNet in a folder or below it, see `first_senses`; nothing where there is none.

    Raises:
      InputError: no such folder, or a WordNet that cannot be read.
    """
    paths = (below / name for below, names in _walk(_folder(folder)) for name in names if is_wordnet(name))
    path = next(paths, None)
    return {} if path is None else first_senses(path)


def left_aside(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files of a folder that `discover` makes nothing of, in sorted order.

    Raises:
      InputError: no such folder, a known file that cannot be read.
    """
    every: set[pathlib.Path] = set()
    used: set[pathlib.Path] = set()
    for below, names in _walk(_folder(folder)):
        every |= {below / name for name in names}
        used |= {file for _, part in _parts(below, names) for file in part.files}
        used |= {below / name for name in names if is_wordnet(name)}
    return sorted(every - used)


def _folder(folder: str | os.PathLike) -> pathlib.Path:
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no folder; expected one with labelled data")
    return root


def _walk(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """Folders and the names of their files, sorted and without hidden ones; links are followed, each folder once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield pathlib.Path(folder), sorted(name for name in names if not name.startswith("."))
        seen.add(real)


def _parts(folder: pathlib.Path, names: Sequence[str]) -> Iterator[tuple[int, _Part]]:
    for kind, form in enumerate(_FORMATS):
        for part in form.find(folder, names):
            yield kind, part


def _place(root: pathlib.Path, part: _Part) -> tuple[pathlib.Path, str, str]:
    """The folder, the name and the split of the corpus that a part is of."""
    folder, stem, split = part.folder, part.name, None
    if found := list(_SPLIT.finditer(stem)):
        split = found[-1][1]
        stem = (stem[: found[-1].start()] + stem[found[-1].end() :]).strip("-_.")
    if folder != root and _name(folder).lower() in _SPLITS:
        split = split or _name(folder)
        folder = folder.parent
    return folder, stem or _name(folder), _SPLITS[(split or "train").lower()]


def _name(folder: pathlib.Path) -> str:
    """What a folder is called, "." too."""
    return os.path.basename(os.path.abspath(folder))


def _tasks(kind: int, splits: Mapping[str, Sequence[tuple[pathlib.Path, ...]]]) -> dict[str, dict[str, _Reader]]:
    tasks: dict[str, dict[str, _Reader]] = {}
    for split in [split for split in ("train", "dev", "test") if split in splits]:
        for task, reader in _FORMATS[kind].tasks(split, splits[split]).items():
            tasks.setdefault(task, {})[split] = reader
    return tasks


def _named(
    root: pathlib.Path, groups: Sequence[tuple[pathlib.Path, str, dict[str, dict[str, _Reader]]]]
) -> list[Corpus]:
    count = Counter(f"{stem}/{task}" for _, stem, tasks in groups for task in tasks)
    corpora: dict[str, Corpus] = {}
    for folder, stem, tasks in groups:
        for task, readers in tasks.items():
            name = f"{stem}/{task}"
            if count[name] > 1:
                name = f"{pathlib.Path(os.path.relpath(folder / stem, root)).as_posix()}/{task}"
            if name in corpora:
                raise InputError(f"{folder}: two corpora are called {name}; expected other names, or other folders")
            corpora[name] = Corpus(name, TITLES[task], Splits(readers))
    return [corpora[name] for name in sorted(corpora)]


def _one_file(suffix: str, known: Mapping[str, str], is_it: Callable[[pathlib.Path], bool]) -> _Find:
    """Finds files by the end of their names or by their whole names, that also look like it."""

    def find(folder: pathlib.Path, names: Sequence[str]) -> Iterator[_Part]:
        for name in names:
            plain = without_compression(name)
            match = re.fullmatch(rf"(.*)\.{suffix}", plain)
            if (plain in known or match) and is_it(folder / name):
                yield _Part(folder, known[plain] if plain in known else match[1], (folder / name,))

    return find


def _two_files(data: str, gold: str, known: Mapping[str, str]) -> _Find:
    """Finds files of which another has the answers; without it they are no use."""

    def find(folder: pathlib.Path, names: Sequence[str]) -> Iterator[_Part]:
        answers = {without_compression(name): name for name in names}
        for name in names:
            plain = without_compression(name)
            stem = plain.removesuffix(data)
            if plain != stem and stem + gold in answers and coarse_wsd.CLASSES not in answers:
                yield _Part(folder, known.get(stem, stem), (folder / name, folder / answers[stem + gold]))

    return find


def _find_coarse_words(folder: pathlib.Path, names: Sequence[str]) -> Iterator[_Part]:
    for split in ("train", "test"):
        files = coarse_wsd.names_of(split)
        if set(files) <= set(names):
            yield _Part(folder.parent, split, tuple(folder / name for name in files))


def _find_coarse_tars(folder: pathlib.Path, names: Sequence[str]) -> Iterator[_Part]:
    for name in names:
        if match := re.fullmatch(r"(coarsewsd.*)\.tar", without_compression(name), re.IGNORECASE):
            for split in ("train", "test"):
                yield _Part(folder, f"{match[1]}.{split}", (folder / name,))


def _find_semeval(folder: pathlib.Path, names: Sequence[str]) -> Iterator[_Part]:
    if year := re.fullmatch(r"20(1[2-7])", _name(folder)):
        for name in names:
            if match := re.fullmatch(r".+\.(train|test)\.tsv", without_compression(name)):
                yield _Part(folder, f"sts{year[1]}.{match[1]}", (folder / name,))


def _conllu_tasks(_: str, parts: Sequence[tuple[pathlib.Path, ...]]) -> Mapping[str, _Reader]:
    ((path,),) = parts
    read = functools.cache(lambda: list(conllu.sentences(path)))
    first = next(conllu.sentences(path))
    return {
        "pos": lambda: conllu.pos(read()),
        **({"xpos": lambda: conllu.xpos(read())} if set(first.xpos) != {conllu.UNSPECIFIED} else {}),
        "dep": lambda: conllu.dependencies(read()),
        "tree": lambda: conllu.trees(read()),
    }


def _parsed_tasks(_: str, parts: Sequence[tuple[pathlib.Path, ...]]) -> Mapping[str, _Reader]:
    ((path,),) = parts
    read = functools.cache(lambda: list(columns.parsed(path)))
    return {"constituents": lambda: columns.constituents(read()), "srl": lambda: columns.semantic_roles(read())}


_FORMATS = (
    _Format(
        "CoNLL-U (*.conllu)",
        _one_file("conllu", {}, lambda path: next(conllu.sentences(path), None) is not None),
        _conllu_tasks,
    ),
    _Format(
        "columns of words and entities (*.conll)",
        _one_file(_CONLL, _COLUMNS, lambda path: not columns.is_parsed(path)),
        lambda _, parts: {"ner": lambda: columns.named_entities(*parts[0])},
    ),
    _Format("columns with trees and predicates (*.conll)", _one_file(_CONLL, {}, columns.is_parsed), _parsed_tasks),
    _Format(
        "spans as JSON (*.jsonl)",
        _one_file("jsonl", {}, spans.is_spans),
        lambda _, parts: {"spans": lambda: spans.edges(*parts[0])},
    ),
    _Format(
        "senses (*.data.xml with *.gold.key.txt)",
        _two_files(".data.xml", ".gold.key.txt", _SENSES),
        lambda _, parts: {"senses": lambda: raganato.senses(*parts[0])},
    ),
    _Format(
        "CoarseWSD-20 (a folder for each word, with classes_map.txt)",
        _find_coarse_words,
        lambda split, parts: {"senses": lambda: coarse_wsd.senses([files[0].parent for files in parts], split)},
        several=True,
    ),
    _Format(
        "CoarseWSD-20's archive (CoarseWSD*.tar)",
        _find_coarse_tars,
        lambda split, parts: {"senses": lambda: coarse_wsd.senses_of_tar(*parts[0], split)},
    ),
    _Format(
        "WiC (*.data.txt with *.gold.txt)",
        _two_files(".data.txt", ".gold.txt", {}),
        lambda _, parts: {"same-sense": lambda: wic.word_pairs(*parts[0])},
    ),
    _Format(
        "the STS benchmark (sts-train.csv, sts-dev.csv, sts-test.csv)",
        _one_file("csv", {}, lambda path: path.name.startswith("sts-")),
        lambda _, parts: {"similarity": lambda: sts.benchmark(*parts[0])},
    ),
    _Format(
        "SemEval's STS (*.test.tsv in a folder called by its year)",
        _find_semeval,
        lambda _, parts: {"similarity": lambda: sts.semeval([path for (path,) in parts])},
        several=True,
    ),
)
