"""Text in: files, TFDS data sets and Python's own manual become a stream of documents, each a list of sentences.

A source is named by one string:

- a file, plain or compressed by gzip, xz or Zstandard (seen by its first bytes), a folder (every file below it that is
  not hidden) or a glob, both in sorted order. Two formats are told apart by their first line that is not blank: plain
  text with one sentence a line and a blank line between documents, as google-research/bert reads it
  (create_pretraining_data.py, `create_training_instances`), and `<doc id="…" …>` … `</doc>` with one paragraph a line,
  as WikiExtractor writes it;
- `tfds:NAME[/config][:version][:split][#field]`, a TFDS data set in array_record, or `tfds:FOLDER[:split][#field]`,
  the folder of a prepared one: each record is a document, each line of its text a paragraph;
- `python:topics`: CPython's language reference, 79 documents that every Python has on board.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import heapq
import importlib
import itertools
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import sentencex
import zstandard

from ctx_jax.errors import InputError, did_you_mean

SENTENCES = ("lines", "split")

# What one document or one line may hold at once, so that memory stays flat whatever the file holds.
PART_CHARACTERS = 1 << 20
LINE_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 16
_COMPRESSED_BLOCK_BYTES = 1 << 10  # may become ten thousand times as many

_DECOMPRESSORS: dict[bytes, tuple[str, tuple[str, ...], Callable[[], Any]]] = {
    b"\x1f\x8b": ("gzip", (".gz", ".gzip"), lambda: zlib.decompressobj(wbits=31)),
    b"\xfd7zXZ\x00": ("xz", (".xz",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    b"\x28\xb5\x2f\xfd": ("Zstandard", (".zst", ".zstd"), lambda: zstandard.ZstdDecompressor().decompressobj()),
}
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)

_TFDS = re.compile(
    r"tfds:(?P<name>.+?)(:(?P<version>\d+\.\d+\.\d+))?(:(?P<split>\w+(\[[^\]]*\])?))?(#(?P<field>[^#]+))?"
)
_TOPICS = "python:topics"


class Document(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
      id: what its format names it (`id="…"`, the topic), else a hash of its text; never its place in the file, so that
        a hold-out by id does not depend on the order.
      sentences: without line ends and outer spaces.
      ends: False where more of the same document follows; parts have about `PART_CHARACTERS`.
    """

    id: str
    sentences: list[str]
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
    """One file, one TFDS split or Python's topics; `num_bytes` is its size as it lies on the disk."""

    name: str
    num_bytes: int


def find_sources(names: Iterable[str | os.PathLike]) -> list[Source]:
    """Expands folders and globs in sorted order and looks that everything named exists.

    Raises:
      InputError: a name that matches nothing, or a file that is named twice.
    """
    sources: list[Source] = []
    for name in map(os.fspath, names):
        if name == _TOPICS:
            sources.append(Source(name, sum(len(text.encode()) for text in _topics().values())))
        elif name.startswith("tfds:"):
            sources.append(Source(name, _open_tfds(name)[2]))
        elif name.startswith("python:"):
            raise InputError(f"source {name!r}: unknown; expected {_TOPICS!r}")
        else:
            sources.extend(Source(os.fspath(path), path.stat().st_size) for path in _files(name))
    seen: set[str] = set()
    for source in sources:
        if (identity := source_identity(source)) in seen:
            raise InputError(f"source {source.name}: named twice; expected each once")
        seen.add(identity)
    return sources


def source_identity(source: Source) -> str:
    """What two names of one source have in common: the resolved path of a file, else the name."""
    return os.path.realpath(source.name) if is_file(source) else source.name


def is_file(source: Source) -> bool:
    """Is the source a file on the disk?"""
    return not source.name.startswith(("tfds:", "python:"))


def read_documents(
    source: Source,
    sentences: str | None = None,
    language: str = "en",
    on_read: Callable[[int], Any] = lambda num_bytes: None,
) -> Iterator[Document]:
    """Streams the documents of one source.

    Args:
      source: from `find_sources`.
      sentences: 'lines': each line is a sentence; 'split': sentencex finds the sentences of each line. None: 'lines'
        for plain text files, 'split' for everything else.
      language: ISO 639 code, for sentencex.
      on_read: called with the number of bytes of the source that were read since the last call.

    Raises:
      InputError: a source that is broken (the file, line and byte are named) or holds no document.
    """
    if sentences not in (None, *SENTENCES):
        raise InputError(
            f"sentences={sentences!r}{did_you_mean(str(sentences), SENTENCES)}; expected one of {SENTENCES}"
        )
    if is_file(source):
        lines = _lines(source.name, on_read)
        first = next((line for line in lines if line[1]), None)
        lines = itertools.chain([first] if first else [], lines)
        tagged = first is not None and re.match(r"<doc[\s>]", first[1]) is not None
        parts = (_tagged_parts if tagged else _plain_parts)(source.name, lines)
        sentences = sentences or ("split" if tagged else "lines")
    else:
        parts = _topic_parts(on_read) if source.name == _TOPICS else _tfds_parts(source, on_read)
    count = 0
    for count, (identity, paragraphs, ends) in enumerate(parts, 1):  # noqa: B007 (the count is read after the loop)
        if sentences != "lines":
            pieces = (piece.strip() for text in paragraphs for piece in sentencex.segment(language, text))
            paragraphs = [piece for piece in pieces if piece]
        yield Document(identity, paragraphs, ends)
    if not count:
        raise InputError(f"{source.name}: holds no document; expected text")


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The documents held out for validation: those whose hashed id lies below the threshold, in whatever order."""

    threshold: int

    def __contains__(self, identity: str) -> bool:
        """Is the document with this id held out?"""
        return _hash(identity) < self.threshold


def choose_holdout(sources: Iterable[Source], amount: float) -> Holdout:
    """Chooses the documents to hold out.

    Args:
      sources: where the documents come from; read through only where `amount` is a count.
      amount: below 1 the share of the documents, about; from 1 on their number, exactly. Documents of the same id are
        held out together and count once.

    Raises:
      InputError: an amount out of range, or that leaves no document.
    """
    if 0 < amount < 1:
        return Holdout(int(amount * 2**64))
    if amount < 1 or amount != int(amount):
        raise InputError(f"holdout={amount}; expected a share between 0 and 1 or a whole number of documents")
    hashes = {_hash(document.id) for source in sources for document in read_documents(source, "lines")}
    if len(hashes) <= amount:
        raise InputError(
            f"holdout={amount:g} of {len(hashes)} documents; expected fewer, so that some are left to train"
        )
    return Holdout(heapq.nsmallest(int(amount), hashes)[-1] + 1)


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big")


def _text_id(paragraphs: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(paragraphs).encode(), digest_size=8).hexdigest()


def _files(name: str) -> list[pathlib.Path]:
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (item for item in path.rglob("*") if item.is_file())
        files = [item for item in below if not any(part.startswith(".") for part in item.relative_to(path).parts)]
    elif glob.has_magic(name):
        files = [item for item in map(pathlib.Path, glob.glob(os.fspath(path), recursive=True)) if item.is_file()]
    else:
        near = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"source {name}: not found{did_you_mean(path.name, near)}; expected a file, folder or glob")
    if not files:
        raise InputError(f"source {name}: no file there; expected at least one")
    return sorted(files)


def _blocks(path: str, on_read: Callable[[int], Any]) -> Iterator[bytes]:
    """Decompressed blocks. Raises one of `_BROKEN` where the data ends early or makes no sense."""
    with open(path, "rb") as file:
        magic = file.read(6)
        file.seek(0)
        kind, make = None, None
        for prefix, (name, suffixes, factory) in _DECOMPRESSORS.items():
            if magic.startswith(prefix):
                kind, make = name, factory
            elif path.lower().endswith(suffixes):
                raise InputError(
                    f"{path}: begins with the bytes {magic.hex(' ')!r}; expected {name} data, as it is named"
                )
        decompressor = None
        while block := file.read(_COMPRESSED_BLOCK_BYTES if make else _BLOCK_BYTES):
            on_read(len(block))
            if make is None:
                yield block
                continue
            while block:
                if decompressor is None:
                    # Between the streams of one file zero bytes are padding.
                    if not (block := block.lstrip(b"\0")):
                        break
                    decompressor = make()
                if data := decompressor.decompress(block):
                    yield data
                block = decompressor.unused_data if decompressor.eof else b""
                if decompressor.eof:
                    decompressor = None
        if decompressor is not None:
            raise EOFError(f"the {kind} data is cut off")


def _lines(path: str, on_read: Callable[[int], Any]) -> Iterator[tuple[int, str]]:
    """Number (from 1) and stripped text of each line; memory is bounded by the longest line."""
    number, offset, tail = 0, 0, b""
    blocks = _blocks(path, on_read)
    while True:
        try:
            block = next(blocks, b"")
        except _BROKEN as error:
            place = f"byte {offset + len(tail)} of its text (line {number + 1})"
            raise InputError(f"{path}: broken after {place}: {error}; expected a whole file") from error
        *lines, tail = (tail + block).split(b"\n")
        if not block and tail:
            lines = [tail]
        for line in lines:
            number += 1
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                place = f"byte {offset + error.start} of its text (line {number}) is 0x{line[error.start]:02x}"
                raise InputError(f"{path}: {place}, {error.reason}; expected UTF-8") from error
            yield number, (text.removeprefix("\ufeff") if number == 1 else text).strip()
            offset += len(line) + 1
        if not block:
            return
        if len(tail) > LINE_BYTES:
            raise InputError(f"{path}: line {number + 1} is longer than {LINE_BYTES} bytes; expected lines of text")


Part = tuple[str, list[str], bool]


def _plain_parts(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[Part]:
    identity, paragraphs, size = None, [], 0
    for _, line in lines:
        if paragraphs and (not line or size > PART_CHARACTERS):
            identity = identity or _text_id(paragraphs)
            yield identity, paragraphs, not line
            identity, paragraphs, size = identity if line else None, [], 0
        if line:
            paragraphs.append(line)
            size += len(line)
    if paragraphs:
        yield identity or _text_id(paragraphs), paragraphs, True


def _tagged_parts(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[Part]:
    identity, opened, paragraphs, size = None, 0, [], 0
    for number, line in lines:
        if re.match(r"<doc[\s>]", line):
            if identity is not None:
                raise InputError(
                    f"{path}, line {number}: <doc> inside the <doc> of line {opened}; expected </doc> first"
                )
            if not (match := re.fullmatch(r'<doc(?:\s[^<>]*)?\sid="([^"<>]*)"[^<>]*>', line)):
                raise InputError(f'{path}, line {number}: {line[:80]!r}; expected <doc id="…"> alone on its line')
            identity, opened = match[1], number
        elif line == "</doc>":
            if identity is None:
                raise InputError(f"{path}, line {number}: </doc> without <doc>; expected each to be opened once")
            yield identity, paragraphs, True
            identity, paragraphs, size = None, [], 0
        elif line:
            if identity is None:
                raise InputError(
                    f"{path}, line {number}: {line[:80]!r} outside <doc> … </doc>; expected all text inside"
                )
            if size > PART_CHARACTERS:
                yield identity, paragraphs, False
                paragraphs, size = [], 0
            paragraphs.append(line)
            size += len(line)
    if identity is not None:
        raise InputError(f"{path}: ends inside the <doc> of line {opened}; expected </doc>")


def _open_tfds(name: str) -> tuple[Any, str, int]:
    """The records of a TFDS data set, the name of the field with the text, and the size in bytes."""
    import tensorflow_datasets as tfds  # half a second, and only this source needs it

    match = _TFDS.fullmatch(name)
    if match is None:
        raise InputError(f"source {name!r}; expected tfds:NAME[/config][:version][:split][#field]")
    title, split, field = match["name"], match["split"] or "train", match["field"]
    try:
        if pathlib.Path(title).expanduser().is_dir():
            builder = tfds.builder_from_directory(pathlib.Path(title).expanduser())
        else:
            builder = tfds.builder(title + (f":{match['version']}" if match["version"] else ""))
        splits, features = builder.info.splits, builder.info.features
        if not splits:
            raise InputError(f"source {name}: not prepared; expected download_and_prepare(file_format='array_record')")
        if split.split("[")[0] not in splits:
            hint = did_you_mean(split, splits)
            raise InputError(f"source {name}: no split {split!r}{hint}; expected one of {sorted(splits)}")
        records = builder.as_data_source(split)
    except InputError:
        raise
    except Exception as error:  # TFDS raises a dozen kinds for a data set that is absent, unprepared or in tfrecord
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"source {name}: {reason}; expected a prepared TFDS data set in array_record") from error
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if field is None:
        if len(texts) != 1 and "text" not in texts:
            raise InputError(f"source {name}: text fields {texts}; expected #field to name one")
        field = "text" if "text" in texts else texts[0]
    elif field not in texts:
        raise InputError(f"source {name}: no text field {field!r}{did_you_mean(field, texts)}; expected one of {texts}")
    whole = splits[split.split("[")[0]]
    return records, field, whole.num_bytes * len(records) // max(whole.num_examples, 1)


def _tfds_parts(source: Source, on_read: Callable[[int], Any]) -> Iterator[Part]:
    records, field, _ = _open_tfds(source.name)
    read = 0
    for index, record in enumerate(records):
        try:
            text = record[field].decode()
        except UnicodeDecodeError as error:
            place = f"record {index}, field {field!r}, byte {error.start}"
            raise InputError(f"{source.name}: {place} is not UTF-8 ({error.reason}); expected text") from error
        on_read(-read + (read := source.num_bytes * (index + 1) // len(records)))
        paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
        yield _text_id(paragraphs), paragraphs, True


def _topics() -> dict[str, str]:
    return importlib.import_module("pydoc_data.topics").topics


def _topic_parts(on_read: Callable[[int], Any]) -> Iterator[Part]:
    for topic, text in sorted(_topics().items()):
        on_read(len(text.encode()))
        yield topic, list(_topic_paragraphs(text)), True


def _topic_paragraphs(text: str) -> Iterator[str]:
    """Headings and prose of a page that Sphinx wrote as text; its code, grammar, signatures and tables are left out."""
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        kept = [line for line in lines if not re.fullmatch(r"([*=~^\"-])\1{2,}", line)]
        joined = re.sub(r"(?<=\w-)\n(?=\w)", "", "\n".join(kept)).replace("\n", " ")
        paragraph = re.sub(r"^(\* |\d+\. )", "", joined)
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        prose = (
            re.search(r"[.:!?][\")\u2019\u201d]*( \[\d+\])?$", paragraph)
            and paragraph.count(" ") >= 4
            and letters > 0.8 * len(paragraph)
            and not re.search(r"::=|>>>|^[+|]| {3}|  #", paragraph)
        )
        if paragraph and (prose or len(kept) < len(lines)):
            yield paragraph
