"""Tokenises text into a corpus: from sources to the folder that `ctx_jax.data.corpus` describes.

One process reads the sources and writes; others tokenise. What is under way at once is bounded, so memory is flat.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import glob
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from ctx_jax.data import sources as sources_lib
from ctx_jax.data.corpus import COUNTS, INDEX, TOKENIZER, SplitCounts, SplitWriter, write_metadata
from ctx_jax.data.sources import Document, Holdout, Source
from ctx_jax.errors import InputError
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.tokenizer import Tokenizer

_TASK_CHARACTERS = 1 << 18
_TASKS_PER_WORKER = 4

Counts = dict[str, SplitCounts]


def build(
    sources: Mapping[str, Sequence[str | os.PathLike]],
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    processes: int | None = None,
    record_tokens: int = 1024,
    sentences: str | None = None,
    language: str = "en",
    holdout: float | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Counts:
    """Tokenises text into the folder `out`, which appears whole or not at all.

    The files do not depend on the number of processes (but for `seconds` in counts.json).

    Args:
      sources: for each split the names of its sources, see `ctx_jax.data.sources`.
      tokenizer: splits each sentence; no special tokens are added.
      out: the folder to write.
      processes: processes that tokenise. 1: this one does; more: that many besides this one, which must then be able to
        spawn (a script needs `if __name__ == "__main__"`). None: one for each core.
      record_tokens: a record is a run of whole sentences of one document with at most so many tokens, or one longer
        sentence.
      sentences: 'lines', 'split' or, by the format, None, see `read_documents`.
      language: ISO 639 code, for splitting sentences.
      holdout: moves documents of 'train' to 'validation': a share below 1 or a whole number, see `choose_holdout`.
      overwrite: replaces an earlier data set.
      show_progress: draws a bar and writes the counts to stderr.

    Returns:
      The counts of each split.

    Raises:
      InputError: a bad argument or source, or a split without a token.
      RuntimeError: a process that tokenises died.
    """
    out = pathlib.Path(out).expanduser().absolute()
    processes = processes or os.cpu_count() or 1
    for name, value in (("processes", processes), ("record_tokens", record_tokens)):
        if value < 1:
            raise InputError(f"{name}={value}; expected at least 1")
    splits = _plan(sources, holdout)
    _check_out(out, overwrite)
    with _incomplete(out) as folder:
        (folder / INDEX).mkdir()
        tokenizer.save(folder / TOKENIZER)
        counts: Counts = {}
        with _workers(folder / TOKENIZER, processes) as encode:
            for split, (found, keep) in splits.items():
                started = time.monotonic()
                with SplitWriter(folder, split, record_tokens, tokenizer.specials.unk) as writer:
                    documents = _documents(split, found, keep, sentences, language, writer, show_progress)
                    for document, ids, lengths in _encoded(documents, encode, processes):
                        _count_text(writer.counts, document)
                        writer.add(ids, lengths, document.ends)
                counts[split] = writer.counts
                counts[split].sources = [_describe(source) for source in found]
                counts[split].seconds = round(time.monotonic() - started, 2)
                if show_progress:
                    tqdm.tqdm.write(_summary(split, counts[split]), file=sys.stderr)
        write_metadata(folder, counts, record_tokens)
        _publish(folder, out, overwrite)
    return counts


def _count_text(counts: SplitCounts, document: Document) -> None:
    counts.characters += sum(map(len, document.sentences))
    counts.text_bytes += sum(len(sentence.encode()) for sentence in document.sentences)


Keep = Callable[[str], bool]


def _plan(
    sources: Mapping[str, Sequence[str | os.PathLike]], holdout: float | None
) -> dict[str, tuple[list[Source], Keep]]:
    """The sources of each split, and which of their documents it takes."""
    if not sources or not all(sources.values()):
        raise InputError(f"sources={dict(sources)}; expected at least one split, each with at least one source")
    found = {}
    for split, names in sources.items():
        if not split.isidentifier() or split == "all":
            raise InputError(f"split {split!r}; expected a name of letters, digits and underscores (TFDS keeps 'all')")
        if isinstance(names, str):
            raise InputError(f"sources of split {split!r}: the string {names!r}; expected a list")
        found[split] = sources_lib.find_sources(names)
    for (first, left), (second, right) in itertools.combinations(found.items(), 2):
        if both := set(map(sources_lib.source_identity, left)) & set(map(sources_lib.source_identity, right)):
            raise InputError(
                f"source {min(both)}: in the splits {first!r} and {second!r}; expected in one (or a holdout)"
            )
    if holdout is None:
        return {split: (items, lambda identity: True) for split, items in found.items()}
    if "train" not in found or "validation" in found:
        raise InputError(f"holdout={holdout} with the splits {sorted(found)}; expected 'train' and no 'validation'")
    held: Holdout = sources_lib.choose_holdout(found["train"], holdout)
    plan = {split: (items, lambda identity: True) for split, items in found.items()}
    plan["train"] = (found["train"], lambda identity: identity not in held)
    plan["validation"] = (found["train"], lambda identity: identity in held)
    return plan


def _documents(
    split: str,
    sources: Sequence[Source],
    keep: Keep,
    sentences: str | None,
    language: str,
    writer: SplitWriter,
    show_progress: bool,
) -> Iterator[Document]:
    total = sum(source.num_bytes for source in sources)
    options = {"unit": "B", "unit_scale": True, "file": sys.stderr, "disable": not show_progress, "mininterval": 0.5}
    with tqdm.tqdm(total=total, desc=split, **options) as bar:
        for source in sources:
            for document in sources_lib.read_documents(source, sentences, language, on_read=bar.update):
                if keep(document.id):
                    yield document
                    bar.set_postfix_str(f"{writer.counts.documents:,} documents", refresh=False)


Encoded = tuple[np.ndarray, np.ndarray]


def _encode(tokenizer: Tokenizer, sentences: Sequence[str]) -> Encoded:
    """Ids of all sentences, int32 [N], and the number of each one's, int32 [S]."""
    pieces = tokenizer.ids_batch(sentences)
    lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
    return np.concatenate([*pieces, np.zeros(0, np.int32)]).astype(np.int32, copy=False), lengths


def _encoded(
    documents: Iterable[Document],
    encode: Callable[[list[str]], concurrent.futures.Future[Encoded]],
    processes: int,
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Each document with its ids and sentence lengths, in order; few tasks are under way at once."""
    pending: collections.deque[tuple[list[Document], concurrent.futures.Future[Encoded]]] = collections.deque()
    limit = _TASKS_PER_WORKER * processes if processes > 1 else 1
    for task in _tasks(documents):
        pending.append((task, encode([sentence for document in task for sentence in document.sentences])))
        if len(pending) >= limit:
            yield from _deal(*pending.popleft())
    while pending:
        yield from _deal(*pending.popleft())


def _tasks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    task, size = [], 0
    for document in documents:
        task.append(document)
        size += sum(map(len, document.sentences))
        if size > _TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _deal(
    task: list[Document], future: concurrent.futures.Future[Encoded]
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    ids, lengths = future.result()
    first = start = 0
    for document in task:
        own = lengths[first : first + len(document.sentences)]
        end = start + int(own.sum())
        yield document, ids[start:end], own
        first, start = first + len(own), end


@contextlib.contextmanager
def _workers(
    folder: pathlib.Path, processes: int
) -> Iterator[Callable[[list[str]], concurrent.futures.Future[Encoded]]]:
    """Gives the function that starts to tokenise a list of sentences."""
    if processes == 1:
        tokenizer = load_tokenizer(folder)

        def encode(sentences: list[str]) -> concurrent.futures.Future[Encoded]:
            future: concurrent.futures.Future[Encoded] = concurrent.futures.Future()
            future.set_result(_encode(tokenizer, sentences))
            return future

        yield encode
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(folder,)
    )
    try:
        yield lambda sentences: pool.submit(_encode_in_worker, sentences)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RuntimeError("a tokenising process died (killed? out of memory?); nothing was written") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: pathlib.Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = load_tokenizer(folder)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent closes no queue, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(sentences: list[str]) -> Encoded:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, sentences)


def _check_out(out: pathlib.Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"{out}: exists; expected a new folder (or overwrite)")
    if not (out / COUNTS).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is no tokenised corpus (no {COUNTS}); refusing to overwrite it")


@contextlib.contextmanager
def _incomplete(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `out` to write into; removed if anything fails, and by the next build if this process is killed.

    The kernel drops a lock with its process, however that ends, so a folder that can be locked is nobody's.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{glob.escape(out.name)}.incomplete-*"):
        with contextlib.suppress(OSError), _lock(stale):
            shutil.rmtree(stale)
    folder = out.parent / f".{out.name}.incomplete-{os.getpid()}"
    folder.mkdir()
    with _lock(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _publish(folder: pathlib.Path, out: pathlib.Path, overwrite: bool) -> None:
    """Gives the finished folder its name once all of it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    _check_out(out, overwrite)  # another build may have been faster
    replaced = out.with_name(f"{folder.name}-replaced")
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _describe(source: Source) -> dict[str, Any]:
    description: dict[str, Any] = {"name": source.name, "bytes": source.num_bytes}
    if sources_lib.is_file(source):
        with open(source.name, "rb") as file:
            description["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return description


def _summary(split: str, counts: SplitCounts) -> str:
    dropped = (
        f"dropped {counts.dropped_documents:,} documents and {counts.dropped_sentences:,} sentences without a token"
    )
    return (
        f"{split}: {counts.documents:,} documents, {counts.sentences:,} sentences, {counts.tokens:,} tokens "
        f"({counts.unknown_rate:.3%} unknown), {counts.text_bytes / 1e6:,.1f} MB in {counts.seconds:,.1f} s; {dropped}"
    )
