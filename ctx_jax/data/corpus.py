"""A tokenised corpus on the disk: how it is laid out, written and read.

    folder/
      dataset_info.json, features.json       TFDS: `tfds.builder_from_directory(folder).as_data_source(split)`
      corpus-SPLIT.array_record-00000-of-N   records: ids, sentence_lengths, document
      index/SPLIT.sentence_lengths.npy       uint32, tokens of each sentence
      index/SPLIT.document_sentences.npy     uint32, sentences of each document
      index/SPLIT.record_tokens.npy          uint32, tokens of each record
      tokenizer/                             as `Tokenizer.save` wrote it
      counts.json                            what was counted, the sources, the size of every other file

A record is a run of whole sentences of one document, without special tokens. Records lie in the order of the text, so a
split is also one long stream of tokens with an address for each.

TFDS' own writer (`tfds.core.GeneratorBasedBuilder`) holds a split in memory up to 1 GB and, unshuffled, all of it after
that (core/shuffle.py: keys in order all fall into the first of its buckets). So the shards are written here, with TFDS'
serializer and TFDS' metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import types
from typing import Any

import numpy as np
from array_record.python import array_record_module

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.tokenizer import Tokenizer

COUNTS = "counts.json"
INDEX = "index"
TOKENIZER = "tokenizer"
SHARD_BYTES = 1 << 28
_NAME = "corpus"
_FORMAT = 1
_ARRAYS = ("sentence_lengths", "document_sentences", "record_tokens")


@dataclasses.dataclass
class SplitCounts:
    """What went into one split; `text_bytes` (UTF-8) and `characters` are those of its sentences.

    Dropped are sentences without a token and documents without a sentence. `fingerprint` is a hash of all ids and of
    where sentences, documents and records end. `sources` name, size and SHA-256 of what was read.
    """

    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    records: int = 0
    unknown_tokens: int = 0
    unknown_rate: float = 0.0
    dropped_documents: int = 0
    dropped_sentences: int = 0
    text_bytes: int = 0
    characters: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    shard_lengths: list[int] = dataclasses.field(default_factory=list)
    shard_bytes: int = 0
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def _features():
    """Raw bytes are quicker to parse than TFDS' lists of int64, for a tenth more on the disk."""
    import tensorflow_datasets as tfds  # half a second: only where a corpus is opened or written

    array = functools.partial(
        tfds.features.Tensor, shape=(None,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES
    )
    return tfds.features.FeaturesDict(
        {"ids": array(), "sentence_lengths": array(), "document": tfds.features.Scalar(np.int64)}
    )


class SplitWriter:
    """Writes the records and index arrays of one split, document by document, in flat memory."""

    def __init__(self, folder: pathlib.Path, split: str, record_tokens: int, unknown: int):
        """Args: record_tokens, the most tokens in a record of several sentences; unknown, the id to count."""
        import tensorflow_datasets as tfds

        self.counts = SplitCounts()
        self._split = split
        self._folder = folder
        self._record_tokens = record_tokens
        self._unknown = unknown
        self._features = _features()
        self._serializer = tfds.core.ExampleSerializer(self._features.get_serialized_info())
        self._hash = hashlib.blake2b(digest_size=8)
        self._arrays = {name: _ArrayFile(folder / INDEX / f"{split}.{name}.npy") for name in _ARRAYS}
        self._shard: Any = None
        self._shard_size = 0
        self._document_sentences = 0

    def __enter__(self) -> SplitWriter:
        """Nothing to do yet: shards are opened with their first record."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: types.TracebackType | None) -> None:
        """Closes the files and gives the shards their final names; what an error left behind is not to be read."""
        self._close_shard()
        for array in self._arrays.values():
            array.close()
        if kind is not None:
            return
        counts = self.counts
        if not counts.tokens:
            raise InputError(f"split {self._split!r}: no token in any of its documents; expected text")
        counts.unknown_rate = counts.unknown_tokens / counts.tokens
        counts.fingerprint = self._hash.hexdigest()
        for index in range(len(counts.shard_lengths)):
            final = self._folder / _shard_name(self._split, index, len(counts.shard_lengths))
            self._unnamed_shard(index).rename(final)

    def _unnamed_shard(self, index: int) -> pathlib.Path:
        """Until all shards are written, their number is not known."""
        return self._folder / f"{self._split}-{index:05d}"

    def add(self, ids: np.ndarray, lengths: np.ndarray, ends: bool = True) -> None:
        """Writes a document or, with `ends` false, a part of one that the next call goes on with.

        Args:
          ids: int32 [N].
          lengths: int32 [S], tokens of each sentence; those without any are dropped.
          ends: is the document complete?
        """
        counts = self.counts
        lengths, given = lengths[lengths > 0], len(lengths)
        counts.dropped_sentences += given - len(lengths)
        counts.sentences += len(lengths)
        counts.tokens += len(ids)
        counts.unknown_tokens += int(np.count_nonzero(ids == self._unknown))
        self._arrays["sentence_lengths"].extend(lengths)
        self._document_sentences += len(lengths)
        ends_at = np.cumsum(lengths)
        first = start = 0
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(ends_at, start + self._record_tokens, side="right")))
            end = int(ends_at[last - 1])
            self._write(ids[start:end], lengths[first:last])
            first, start = last, end
        if ends:
            if self._document_sentences:
                self._arrays["document_sentences"].extend([self._document_sentences])
                counts.documents += 1
            else:
                counts.dropped_documents += 1
            self._document_sentences = 0

    def _write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        counts = self.counts
        record = {"ids": ids, "sentence_lengths": lengths, "document": counts.documents}
        example = self._serializer.get_tf_example(self._features.encode_example(record))
        # Of a protobuf map the order is otherwise free, and differs between processes.
        data = example.SerializeToString(deterministic=True)
        if self._shard is None or self._shard_size + len(data) > SHARD_BYTES:
            self._close_shard()
            path = self._unnamed_shard(len(counts.shard_lengths))
            # Every record by itself, so that one can be read without its neighbours.
            self._shard, self._shard_size = array_record_module.ArrayRecordWriter(str(path), "group_size:1"), 0
            counts.shard_lengths.append(0)
        self._shard.write(data)
        self._hash.update(np.array([counts.documents, len(lengths), *lengths], "<i8").tobytes())
        self._hash.update(ids.astype("<i4", copy=False).tobytes())
        self._arrays["record_tokens"].extend([len(ids)])
        self._shard_size += len(data)
        counts.shard_bytes += len(data)
        counts.shard_lengths[-1] += 1
        counts.records += 1

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


class _ArrayFile:
    """A one-dimensional uint32 .npy file that grows; its header, of fixed length, is written again at the end."""

    def __init__(self, path: pathlib.Path):
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._length = 0
        self._write_header()

    def _write_header(self) -> None:
        self._file.seek(0)
        header = {"descr": "<u4", "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def extend(self, values: Any) -> None:
        self._file.write(np.asarray(values, "<u4").tobytes())
        self._length += len(values)

    def close(self) -> None:
        self._write_header()
        self._file.close()


def write_metadata(folder: pathlib.Path, counts: dict[str, SplitCounts], record_tokens: int) -> None:
    """Writes the files that make the folder a TFDS data set, then counts.json with the size of each file."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=_NAME, filetype_suffix="array_record")
    splits = [
        tfds.core.SplitInfo(
            name=split, shard_lengths=count.shard_lengths, num_bytes=count.shard_bytes, filename_template=template
        )
        for split, count in counts.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=splits,
        version="1.0.0",
        filename_template=template,
        check_data=False,  # it would read the first record with TensorFlow
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    description = {
        "format": _FORMAT,
        "record_tokens": record_tokens,
        "splits": {split: dataclasses.asdict(count) for split, count in counts.items()},
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / COUNTS).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Corpus:
    """One split of a tokenised corpus, opened for reading by any number of threads; pickles as its path.

    Attributes:
      path, split: as given.
      counts: what `build` counted.
      fingerprint: short hash of the split's tokens and of where sentences, documents and records end.
      sentence_lengths: uint32 [S], tokens of each sentence, in order.
      document_sentences: uint32 [D], sentences of each document.
      record_tokens: uint32 [R], tokens of each record.
    """

    def __init__(self, path: str | os.PathLike, split: str = "train"):
        """Opens a split; the arrays are mapped, not read.

        Raises:
          InputError: not a folder that `build` wrote, a split that it does not have, or files that do not fit together.
        """
        from tensorflow_datasets.proto import tf_example_pb2  # brings all of TFDS, a third of a second

        self.path = pathlib.Path(path).expanduser()
        self.split = split
        description = self._describe()
        if split not in (known := description["splits"]):
            raise InputError(
                f"{self.path}: no split {split!r}{did_you_mean(split, known)}; expected one of {sorted(known)}"
            )
        self.counts = SplitCounts(**known[split])
        self.fingerprint = self.counts.fingerprint
        self.sentence_lengths, self.document_sentences, self.record_tokens = map(self._array, _ARRAYS)
        self._readers = self._open_shards()
        self._check()
        self._record_offsets = _offsets(self.record_tokens)
        self._shard_offsets = _offsets(np.array(self.counts.shard_lengths))
        self._example = tf_example_pb2.Example

    def _open_shards(self) -> list[array_record_module.ArrayRecordReader]:
        readers = []
        for index, records in enumerate(self.counts.shard_lengths):
            path = self.path / _shard_name(self.split, index, len(self.counts.shard_lengths))
            reader = array_record_module.ArrayRecordReader(
                str(path), options="readahead_buffer_size:0", file_reader_buffer_size=8192
            )
            if not reader.ok():
                try:
                    reader.close()  # only this says what is wrong
                except RuntimeError as error:
                    raise InputError(
                        f"{path}: {' '.join(str(error).split())}; expected an array_record file"
                    ) from error
            if reader.num_records() != records:
                raise InputError(f"{path}: {reader.num_records()} records; expected {records}, as {COUNTS} says")
            readers.append(reader)
        return readers

    def _describe(self) -> dict[str, Any]:
        try:
            description = json.loads((self.path / COUNTS).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{self.path}: no {COUNTS} there; expected a folder written by ctx_jax.data.build"
            ) from error
        except ValueError as error:
            raise InputError(f"{self.path / COUNTS}: {error}; expected JSON") from error
        if not isinstance(description, dict) or description.get("format") != _FORMAT:
            raise InputError(f"{self.path / COUNTS}: not of format {_FORMAT}; expected what ctx_jax.data.build writes")
        for name, size in description["files"].items():
            file = self.path / name
            if not file.is_file():
                raise InputError(f"{file}: missing; expected a file of {size} bytes, as {COUNTS} says")
            if (found := file.stat().st_size) != size:
                raise InputError(f"{file}: {found} bytes; expected {size}, as {COUNTS} says")
        return description

    def _array(self, name: str) -> np.ndarray:
        path = self.path / INDEX / f"{self.split}.{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}; expected an array") from error

    def _check(self) -> None:
        counts = self.counts
        for what, found, expected in (
            ("sum of shard_lengths", sum(counts.shard_lengths), counts.records),
            ("length of record_tokens", len(self.record_tokens), counts.records),
            ("sum of record_tokens", int(self.record_tokens.sum(dtype=np.int64)), counts.tokens),
            ("sum of sentence_lengths", int(self.sentence_lengths.sum(dtype=np.int64)), counts.tokens),
            ("length of sentence_lengths", len(self.sentence_lengths), counts.sentences),
            ("sum of document_sentences", int(self.document_sentences.sum(dtype=np.int64)), counts.sentences),
            ("length of document_sentences", len(self.document_sentences), counts.documents),
        ):
            if found != expected:
                raise InputError(f"{self.path}, split {self.split!r}: {what} is {found}; expected {expected}")

    def __reduce__(self) -> tuple[type, tuple[pathlib.Path, str]]:
        """Another process opens the files itself."""
        return type(self), (self.path, self.split)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split."""
        return self.counts.tokens

    @property
    def num_sentences(self) -> int:
        """Sentences of the split."""
        return self.counts.sentences

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return self.counts.documents

    @functools.cached_property
    def sentence_offsets(self) -> np.ndarray:
        """int64 [S + 1]: the address of each sentence's first token, and of the end."""
        return _offsets(self.sentence_lengths)

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [D + 1]: the index of each document's first sentence, and the number of sentences."""
        return _offsets(self.document_sentences)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was built with."""
        return load_tokenizer(self.path / TOKENIZER)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """The tokens at the addresses from `start` to before `end`, int32 [end - start]; reads only their records.

        Raises:
          IndexError: addresses outside the split.
          InputError: a damaged file.
        """
        if not 0 <= start <= end <= self.num_tokens:
            raise IndexError(f"tokens {start} to {end} of a split of {self.num_tokens}")
        tokens = np.empty(end - start, np.int32)
        record = int(np.searchsorted(self._record_offsets, start, side="right")) - 1
        filled = 0
        while filled < len(tokens):
            skipped = start + filled - int(self._record_offsets[record])
            ids = self._ids(record)[skipped : skipped + len(tokens) - filled]
            tokens[filled : filled + len(ids)] = ids
            filled += len(ids)
            record += 1
        return tokens

    def _ids(self, record: int) -> np.ndarray:
        shard = int(np.searchsorted(self._shard_offsets, record, side="right")) - 1
        index = record - int(self._shard_offsets[shard])
        try:
            # A range of one: 12 µs. A list of one, as in TFDS' data source, goes through a thread pool: 70 to 190 µs.
            (data,) = self._readers[shard].read(index, index + 1)
            # Only this of the three features: 2 µs, where TFDS' own parser takes 28.
            ids = np.frombuffer(self._example.FromString(data).features.feature["ids"].bytes_list.value[0], "<i4")
        except Exception as error:  # array_record raises RuntimeError, protobuf an error of its own
            place = f"{self.path}, split {self.split!r}, record {record}"
            raise InputError(f"{place}: damaged: {' '.join(str(error).split())}") from error
        if len(ids) != self.record_tokens[record]:
            place = f"{self.path}, split {self.split!r}, record {record}"
            raise InputError(f"{place}: {len(ids)} tokens; expected {self.record_tokens[record]}, as the index says")
        return ids


def _shard_name(split: str, index: int, num_shards: int) -> str:
    """As TFDS' default template has it."""
    return f"{_NAME}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
