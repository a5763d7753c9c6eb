"""`ctx-jax encode` and `fill-mask`: a trained model in use."""

import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.parsing import OptionalPath, parse_layers
from ctx_jax.errors import InputError


@dataclass(frozen=True)
class Encode:
    """Vectors of texts: of every token as an .npz file, layers [L+1, B, T, D], mask [B, T], tokens [B, T].

    With --pool one vector a text, as a folder of .npy or Parquet shards, for texts of any number; a run that was
    stopped goes on with the same command.
    """

    model: Annotated[Positional[pathlib.Path], arg(metavar="RUN")]
    """Run directory."""
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT…")] = ()
    """Texts, or none with --file."""
    file: OptionalPath = None
    """A text a line instead."""
    out: OptionalPath = None
    """The .npz file to write, or with --pool the folder; without it a summary is printed."""
    layers: Annotated[str | None, arg(metavar="{all,last,N,N,…}")] = None
    """Which layers; by default all, with --pool the last."""
    pool: Literal["mean", "max", "cls"] | None = None
    """One vector a text: the mean or maximum over its tokens, or the first token's."""
    repair: Literal["centre", "all-but-the-top", "whiten", "zca"] | None = None
    """Repair the vectors, if the model's folder has repairs of this kind (repairs.npz) of all the layers."""
    on_too_long: Literal["error", "truncate", "split"] = "error"
    """What to do with a text that is longer than the model takes."""
    stride: int = 0
    """With `split`: tokens by which the parts overlap."""
    batch_tokens: int | None = None
    """Tokens on a device at once, padding counted; by default as many as suit it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation; by default what the model's folder says."""
    rows: int = 65536
    """With --pool: texts of a shard."""
    format: Literal["npy", "parquet"] = "npy"
    """With --pool and --out: what the shards are; parquet needs pyarrow."""
    with_texts: bool = False
    """With --format parquet: the texts beside their vectors."""


def encode(command: Encode) -> int:
    """Encode"""
    import numpy as np

    from ctx_jax.compilation import keep_compiled
    from ctx_jax.encoder import Encoder

    if bool(command.texts) == (command.file is not None):
        raise InputError("expected either texts or --file")
    if command.out is not None and not command.out.parent.is_dir():
        raise InputError(f"--out {command.out}: there is no folder {command.out.parent}")
    if (command.format != "npy" or command.with_texts) and not (command.pool and command.out):
        raise InputError("--format and --with-texts are of shards, expected --pool and --out too")
    texts = list(command.texts) if command.file is None else _lines(command.file)
    layers = None if command.layers is None else parse_layers(command.layers)
    keep_compiled()
    encoder = Encoder.from_pretrained(command.model, dtype=command.dtype)
    options = {"batch_tokens": command.batch_tokens, "show_progress": sys.stderr.isatty()}
    if command.pool and command.out:
        from ctx_jax.encoder.shards import write_shards

        count = write_shards(
            encoder,
            texts,
            command.out,
            layers=layers or "last",
            pool=command.pool,
            repair=command.repair,
            rows=command.rows,
            format=command.format,
            with_texts=command.with_texts,
            on_too_long=command.on_too_long,
            told=print,
            **options,
        )
        print(f"wrote {command.out}: {count:,} texts")
        return 0
    options |= {
        "layers": layers,
        "repair": command.repair,
        "on_too_long": command.on_too_long,
        "stride": command.stride,
    }
    encoded = encoder.encode(list(texts), pool=command.pool, **options)
    if command.pool:
        print(f"{command.pool} {list(encoded.shape)} {encoded.dtype}")
        return 0
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


def _lines(path: pathlib.Path) -> Iterator[str]:
    """A text a line; no more of the file is in memory than is at work."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error


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
    from ctx_jax.compilation import keep_compiled
    from ctx_jax.encoder import Encoder

    keep_compiled()
    for place in Encoder.from_pretrained(command.model).fill_mask(command.text, top=command.top):
        print("  ".join(f"{candidate.token} {candidate.probability:.3f}" for candidate in place))
    return 0
