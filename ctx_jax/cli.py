"""The command `ctx-jax`. Exit codes: 0 done (or stopped by SIGTERM and saved), 1 failed, 2 bad input."""

import ctypes
import importlib.util
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

import ctx_jax
from ctx_jax.errors import InputError, did_you_mean

Folder = Annotated[pathlib.Path, arg(metavar="DIR")]
OptionalPath = Annotated[pathlib.Path | None, arg(metavar="PATH")]


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
    """A vocab.txt, a SentencePiece model, or a folder with either."""
    train_vocab: Annotated[int | None, arg(metavar="SIZE")] = None
    """Train a SentencePiece vocabulary of this size on the sources instead."""
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
    if (command.vocab is None) == (command.train_vocab is None):
        raise InputError("expected either --vocab or --train-vocab")
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

    texts = (
        sentence
        for source in find_sources(command.sources)
        for document in read_documents(source, sentences=command.sentences, language=command.language)
        for sentence in document.sentences
    )
    print(f"training a vocabulary of {command.train_vocab:,} pieces", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
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


@dataclass(frozen=True)
class Encode:
    """Vectors of texts, every layer, as an .npz file: layers [L+1, B, T, D], mask [B, T], tokens [B, T]."""

    model: Annotated[Positional[pathlib.Path], arg(metavar="RUN")]
    """Run directory."""
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT…")] = ()
    """Texts, or none with --file."""
    file: OptionalPath = None
    """A text a line instead."""
    out: OptionalPath = None
    """The .npz file to write; without it a summary is printed."""
    layers: Literal["all", "last"] = "all"
    """Keep every layer, or the last."""
    on_too_long: Literal["error", "truncate", "split"] = "error"
    """What to do with a text that is longer than the model takes."""
    stride: int = 0
    """With `split`: tokens by which the parts overlap."""
    batch_size: int = 32
    """Texts at once."""


def encode(command: Encode) -> int:
    """Encode"""
    import numpy as np

    from ctx_jax.encoder import Encoder

    if bool(command.texts) == (command.file is not None):
        raise InputError("expected either texts or --file")
    texts = list(command.texts)
    if command.file is not None:
        try:
            texts = command.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{command.file}: {error}") from error
    if command.out is not None and not command.out.parent.is_dir():
        raise InputError(f"--out {command.out}: there is no folder {command.out.parent}")
    encoded = Encoder.from_pretrained(command.model).encode(
        texts,
        all_layers=command.layers == "all",
        batch_size=command.batch_size,
        on_too_long=command.on_too_long,
        stride=command.stride,
    )
    width = encoded.mask.shape[1]
    tokens = np.array([row + ("",) * (width - len(row)) for row in encoded.tokens])
    vectors = {"last": encoded.last} if encoded.layers is None else {"layers": encoded.layers}
    if command.out is None:
        for row, text in zip(encoded.tokens, encoded.texts, strict=True):
            print(f"{text}: {' '.join(row)}")
        print(", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in vectors.items()))
    else:
        np.savez(command.out, **vectors, mask=encoded.mask, tokens=tokens, texts=np.array(encoded.texts))
        print(f"wrote {command.out}: {', '.join(f'{k} {list(v.shape)}' for k, v in vectors.items())}")
    return 0


@dataclass(frozen=True)
class FillMask:
    """The likeliest tokens at each [MASK] of a text."""

    model: Annotated[Positional[pathlib.Path], arg(metavar="RUN")]
    """Run directory."""
    text: Annotated[Positional[str], arg(metavar="TEXT")]
    """A text with [MASK] in it."""
    top: int = 5
    """How many."""


def fill_mask(command: FillMask) -> int:
    """fill-mask"""
    from ctx_jax.encoder import Encoder

    for place in Encoder.from_pretrained(command.model).fill_mask(command.text, top=command.top):
        print("  ".join(f"{candidate.token} {candidate.probability:.3f}" for candidate in place))
    return 0


def pretrain(argv: Sequence[str]) -> int:
    """pretrain: the fields that may be overridden are those of the config file, so that is read first."""
    from ctx_jax.experiment import Experiment
    from ctx_jax.experiment import pretrain as run
    from ctx_jax.models.bert import BertConfig

    config = next((word for word in argv if word.endswith(".py")), None)
    default = Experiment(data="DATA", model=BertConfig()) if config is None else load_config(pathlib.Path(config))

    @dataclass(frozen=True)
    class Pretrain:
        """Pre-trains the run that a config file describes; started again, goes on from the last checkpoint.

        Every field of the config can be overridden: `--steps 100`, `--optimizer.schedule.peak 1e-3`. SIGTERM saves and
        exits 0. Name the config file to see its values as the defaults below.
        """

        config: Annotated[Positional[pathlib.Path], arg(metavar="CONFIG")]
        """A Python file that defines `config`, an Experiment."""
        workdir: Folder
        """The run directory."""
        experiment: Annotated[Experiment, arg(name="")] = field(default_factory=lambda: default)

    command = _parse(Pretrain, "pretrain", argv)
    outcome = run(command.experiment, command.workdir)
    if outcome.finished:
        figures = outcome.evaluation
        print(
            f"held-out masked-LM loss {figures['mlm_loss']:.3f} nats, accuracy {figures['mlm_accuracy']:.1%};"
            f" unigram entropy of the same tokens {figures['unigram_entropy']:.3f} nats\n"
            f"the run is in {command.workdir}"
        )
    return 0


def load_config(path: pathlib.Path) -> Any:
    """The `config` of a Python file."""
    from ctx_jax.experiment import Experiment

    if not path.is_file():
        near = (
            did_you_mean(path.name, [entry.name for entry in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        )
        raise InputError(f"{path}: no such config file{near}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, Experiment):
        raise InputError(f"{path}: `config` is {type(config).__name__}, expected ctx_jax.Experiment")
    return config


def _parse(kind: type, name: str, argv: Sequence[str], *markers: Any) -> Any:
    return tyro.cli(kind, prog=f"ctx-jax {name}", args=list(argv), config=markers)


def _command(kind: type, run: Callable[[Any], int], name: str) -> Callable[[Sequence[str]], int]:
    return lambda argv: run(_parse(kind, name, argv, tyro.conf.FlagCreatePairsOff))


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "data build": ("text → tokenised corpus", _command(Build, build, "data build")),
    "data audit": ("what a trainer should know of a corpus", _command(Audit, audit, "data audit")),
    "pretrain": ("train the run of a config file, or go on with it", pretrain),
    "encode": ("texts → vectors of every layer", _command(Encode, encode, "encode")),
    "fill-mask": ("the likeliest tokens at [MASK]", _command(FillMask, fill_mask, "fill-mask")),
}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  ctx-jax {name:<12}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [f"ctx_jax {ctx_jax.__version__}: {ctx_jax.__doc__}", "", *lines, "", "  ctx-jax COMMAND --help  its arguments"]
    )


def keep_memory() -> None:
    """Tells glibc to keep freed memory: it gives large buffers back after every step and faults them in anew, which
    costs a training step on the processor a quarter of its time.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 << 20)
    except (OSError, AttributeError):
        return  # another C library


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the installed script exits with what it returns."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(ctx_jax.__version__)
        return 0
    words = 2 if argv[0] == "data" else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        if name == "data" or (words == 2 and argv[1:2] in (["-h"], ["--help"])):
            print("\n".join(line for line in usage().splitlines() if "ctx-jax data" in line))
            return 0 if len(argv) > 1 else 2
        print(f"ctx-jax: no command {name!r}{did_you_mean(name, COMMANDS)}; see ctx-jax --help", file=sys.stderr)
        return 2
    keep_memory()
    try:
        return COMMANDS[name][1](argv[words:])
    except InputError as error:
        print(f"ctx-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if type(error).__name__ in ("NonFiniteLoss",):
            print(f"ctx-jax: {error}", file=sys.stderr)
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
