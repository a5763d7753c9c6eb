"""`ctx-jax encode` and `fill-mask`: a trained model in use."""

import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.parsing import OptionalPath
from ctx_jax.errors import InputError


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
    batch_tokens: int = 8192
    """Tokens on the device at once, padding counted."""


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
        layers=command.layers,
        batch_tokens=command.batch_tokens,
        show_progress=sys.stderr.isatty(),
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
