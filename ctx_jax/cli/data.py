"""`ctx-jax data …`: text to a corpus, and what is in it."""

import json
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.parsing import Folder, OptionalPath
from ctx_jax.errors import InputError


@dataclass(frozen=True)
class Build:
    """Text in, tokenised corpus out: a TFDS data set in array_record, with its vocabulary inside.

    Sources are files (plain, .gz, .xz, .zst), folders, globs, `tfds:NAME`, or `python:topics`, the language reference
    that every CPython carries. Plain text has a sentence a line and a blank line between documents; text with
    `<doc id=…>` tags has a paragraph a line.
    """

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE…")]
    """Training text."""
    out: Folder
    """Folder to write; it appears whole or not at all."""
    vocab: OptionalPath = None
    """A vocab.txt, a SentencePiece model, a tokenizer.json, or the folder of a tokenizer."""
    train_vocab: Annotated[int | None, arg(metavar="SIZE")] = None
    """Train a SentencePiece vocabulary of this size on the sources instead."""
    train_words: Annotated[int | None, arg(metavar="MOST")] = None
    """Count whole words on the sources and keep so many: what ELMo trains on. 1000000 is as good as all."""
    cased: bool = False
    """With --train-vocab: keep upper and lower case apart."""
    validation: Annotated[tuple[str, ...], arg(metavar="SOURCE…")] = ()
    """Held-out text."""
    holdout: Annotated[float | None, arg(metavar="SHARE")] = None
    """Hold out this share (or this number) of the documents instead; which ones depends on their ids alone."""
    sentences: Annotated[Literal["lines", "split"] | None, arg(metavar="{lines,split}")] = None
    """`lines` takes each line as a sentence, `split` finds the sentences; by default as the format has it."""
    language: Annotated[str, arg(metavar="CODE")] = "en"
    """For finding sentences, ISO 639."""
    processes: Annotated[int | None, arg(metavar="N")] = None
    """Processes that tokenise; one a core by default."""
    overwrite: bool = False
    """Replace an existing folder."""


def build(command: Build) -> int:
    """Data build"""
    from ctx_jax.data.build import build as run
    from ctx_jax.data.sources import find_sources, read_documents
    from ctx_jax.text.load import load_tokenizer

    if not command.sources:
        raise InputError("expected at least one SOURCE, for example python:topics")
    if [command.vocab, command.train_vocab, command.train_words].count(None) != 2:
        raise InputError("expected one of --vocab, --train-vocab and --train-words")
    sources = {"train": command.sources} | ({"validation": command.validation} if command.validation else {})

    def tokenise(tokenizer: Any) -> int:
        run(
            sources,
            tokenizer,
            command.out,
            processes=command.processes,
            sentences=command.sentences,
            language=command.language,
            holdout=command.holdout,
            overwrite=command.overwrite,
        )
        print(f"wrote {command.out}")
        return 0

    if command.vocab is not None:
        return tokenise(load_tokenizer(command.vocab))
    import tempfile

    from ctx_jax.text.sentencepiece_training import train_sentencepiece
    from ctx_jax.text.words import train_words

    texts = (
        sentence
        for source in find_sources(command.sources)
        for document in read_documents(source, sentences=command.sentences, language=command.language)
        for sentence in document.sentences
    )
    with tempfile.TemporaryDirectory() as folder:
        if command.train_words is not None:
            print(f"counting words, to keep {command.train_words:,}", file=sys.stderr)
            return tokenise(train_words(texts, command.train_words, folder))
        print(f"training a vocabulary of {command.train_vocab:,} pieces", file=sys.stderr)
        return tokenise(train_sentencepiece(texts, command.train_vocab, folder, lowercase=not command.cased))


@dataclass(frozen=True)
class Audit:
    """What a trainer should know of a corpus: lengths, unknown tokens, padding, truncation, next-sentence rate."""

    corpus: Annotated[Positional[pathlib.Path], arg(metavar="CORPUS")]
    """Folder that `ctx-jax data build` wrote."""
    split: str = "train"
    """Which split."""
    length: int = 128
    """Tokens of a row."""
    kind: Literal["sentences", "pairs"] = "sentences"
    """Rows of whole sentences, or of pairs for next-sentence prediction."""
    examples_per_row: int = 1
    """Up to how many examples share a row."""
    rate: float = 0.15
    """Share of the tokens to predict."""
    json: bool = False
    """One JSON object instead of a table."""


def audit(command: Audit) -> int:
    """Data audit"""
    from ctx_jax.data.audit import audit as run
    from ctx_jax.data.corpus import Corpus
    from ctx_jax.data.plan import RowsConfig
    from ctx_jax.objectives.masking import prediction_counts, slots_needed

    counts = prediction_counts(command.rate, command.length)
    slots = slots_needed(counts, command.examples_per_row)
    rows = RowsConfig(length=command.length, kind=command.kind, examples_per_row=command.examples_per_row)
    found = run(Corpus(command.corpus, command.split), rows, counts, slots=slots)
    print(json.dumps(found.as_dict()) if command.json else found.text())
    return 0
