"""What is computed: rows of one length, or texts; and what that costs."""

from __future__ import annotations

import json
import pathlib
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ctx_jax.benchmark.subjects import Subject
from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.text.inputs import model_inputs
from ctx_jax.text.words import split_words


class Shape(NamedTuple):
    """Rows of one length.

    Attributes:
      batch: B.
      length: T, tokens, or words for ELMo.
    """

    batch: int
    length: int


Pool = Literal["mean"]
"""What is made of a row's vectors before they are fetched."""


class Work(NamedTuple):
    """What one run does.

    Attributes:
      inputs: the file that workers read.
      shape: of rows of one length; None of texts.
      pool: what is fetched of each row or text; None for the vectors of all tokens.
      mask: int64 [B, T] of the vectors [B, T, D]; None where they are pooled.
      sentences: rows, or texts.
      tokens: real ones, special tokens counted and padding not.
      matrix_flops: of the model over each row at its own length, in matrix products.
      bytes_moved: as `flops.parts` counts them, all rows at once.
    """

    inputs: pathlib.Path
    shape: Shape | None
    pool: Pool | None
    mask: np.ndarray | None
    sentences: int
    tokens: int
    matrix_flops: int
    bytes_moved: int


def rows(subject: Subject, shape: Shape, folder: pathlib.Path, pool: Pool | None = None, seed: int = 0) -> Work:
    """Rows without padding, of random ids, or of random words for ELMo, whose vectors are always pooled.

    Raises:
      InputError: the model does not take so long a row.
    """
    if subject.longest is not None and shape.length > subject.longest:
        raise InputError(f"--lengths: found {shape.length}, {subject.name} takes {subject.longest} tokens at most")
    rng = np.random.default_rng(seed)
    if subject.is_elmo:
        words = [[_word(rng) for _ in range(shape.length)] for _ in range(shape.batch)]
        return _written(subject, words, shape, [shape.length] * shape.batch, folder)
    # Special tokens stand in the lower half of a vocabulary: an id of padding would be none of the row's.
    size = subject.config.vocab_size
    ids = rng.integers(size // 2, size, shape, dtype=np.int64)
    mask = np.ones_like(ids)
    file = folder / "inputs.npz"
    np.savez(file, ids=ids, mask=mask)
    real = mask if pool is None else None
    return Work(file, shape, pool, real, shape.batch, ids.size, *_cost(subject, [shape.length] * shape.batch))


def texts(subject: Subject, lines: Sequence[str], folder: pathlib.Path) -> Work:
    """Texts as they are; what is longer than the model takes is truncated.

    Raises:
      InputError: the model has no tokenizer.
    """
    if subject.is_elmo:
        lengths = [len(split_words(line)) for line in lines]
    elif subject.tokenizer is None:
        raise InputError(f"--texts: {subject.name} has no tokenizer; use --lengths, or a model with one")
    else:
        found = model_inputs(subject.tokenizer, lines, max_length=subject.longest, on_too_long="truncate")
        lengths = [len(row.input_ids) for row in found]
    return _written(subject, lines, None, lengths, folder)


def read_texts(path: pathlib.Path) -> list[str]:
    """A text a line; blank lines are left out.

    Raises:
      InputError: the file cannot be read or has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--texts {path}: {error}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise InputError(f"--texts {path}: found no text, expected at least one line")
    return found


def _written(
    subject: Subject,
    given: Sequence[str] | Sequence[list[str]],
    shape: Shape | None,
    lengths: Sequence[int],
    folder: pathlib.Path,
) -> Work:
    file = folder / "inputs.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    return Work(file, shape, "mean", None, len(given), sum(lengths), *_cost(subject, lengths))


def _cost(subject: Subject, lengths: Sequence[int]) -> tuple[int, int]:
    """FLOPs and bytes of rows of these lengths; ELMo reads `<S>` and `</S>` beside its words."""
    if subject.static:
        return 0, 4 * sum(lengths) * subject.config.embedding_width
    around = 2 if subject.is_elmo else 0
    flops = sum(
        encoder_cost(subject.config, rows=count, length=length + around).matrix_flops
        for length, count in Counter(lengths).items()
    )
    # Bytes grow with the tokens, however they are cut into rows; the weights cross once.
    tokens = sum(lengths) + around * len(lengths)
    return flops, encoder_cost(subject.config, rows=tokens, length=1).bytes_moved


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(string.ascii_lowercase), rng.integers(1, 13)))
