"""What an import gives and an export takes: a model whole, whatever it is stored as."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.interop.files.npz_file import read_npz, write_npz
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params
from ctx_jax.text.tokenizer import Tokenizer

REPAIRS = "repairs.npz"
"""Repairs beside the weights, in a folder of any format."""
KINDS = ("centre", "all-but-the-top", "whiten", "zca")
"""Of repairs, see `encoder.repair`."""


@dataclass(frozen=True)
class Pooling:
    """How a sentence's vector comes from its tokens' (Reimers and Gurevych 2019, section 3).

    Attributes:
      pool: over all tokens of the last layer, special ones among them, or the `[CLS]` alone.
      normalize: to length 1.
    """

    pool: Literal["cls", "mean", "max"] = "mean"
    normalize: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "matrix"], meta_fields=["kind"])
@dataclass(frozen=True)
class Repair:
    """x ↦ (x - mean) @ matrix; a tree of two arrays for JAX.

    Attributes:
      kind: one of `KINDS`.
      mean: float32.
      matrix: float32; None is the identity.
    """

    kind: str
    mean: Float[Array, "D"]
    matrix: Float[Array, "D K"] | None


Repairs = Mapping[int, Mapping[str, Repair]]
"""By layer, from 0, and by kind."""


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights.

    Attributes:
      config: sizes, and the heads that the weights have.
      params: nested dict of float32 arrays, of BertWithHeads or ElmoForPreTraining; of an ELMo that came without its
        language model's output layer, of Elmo under `encoder` alone.
      tokenizer: None where there is none.
      pooling: of a sentence encoder; None of others.
      about: what the folder says of how the model was made: `experiment` and `data` of a run directory, `truncated` of
        a model that was cut off (`encoder.truncation`).
      repairs: of its layers' spaces.
    """

    config: BertConfig | ElmoConfig
    params: Params
    tokenizer: Tokenizer | None = None
    pooling: Pooling | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    repairs: Repairs = field(default_factory=dict)


def save_repairs(path: str | os.PathLike[str], repairs: Repairs) -> None:
    """Writes arrays `12/zca/mean` and `12/zca/matrix`: layer, kind, field.

    Raises:
      InputError: the path cannot be written.
    """
    arrays = {}
    for layer, kinds in sorted(repairs.items()):
        for kind, repair in sorted(kinds.items()):
            arrays[f"{layer}/{kind}/mean"] = np.asarray(repair.mean)
            if repair.matrix is not None:
                arrays[f"{layer}/{kind}/matrix"] = np.asarray(repair.matrix)
    write_npz(path, arrays)


def load_repairs(path: str | os.PathLike[str], width: int, num_layers: int) -> dict[int, dict[str, Repair]]:
    """What `save_repairs` wrote.

    Args:
      path: of the file.
      width: D of the vectors that are to be repaired.
      num_layers: L of the model that they come from; layers are 0 to L.

    Raises:
      InputError: it is no such file, or its repairs are of other vectors.
    """
    path, fields = pathlib.Path(path), {}
    for name, tensor in read_npz(path).items():
        number, _, rest = name.partition("/")
        kind, _, field_name = rest.partition("/")
        where = f"{path}: array {name!r}"
        if not (number.isdecimal() and number.isascii()) or field_name not in ("mean", "matrix"):
            raise InputError(f"{where}: expected a name like 12/zca/mean or 12/zca/matrix")
        # Longer numbers than Python reads are no layers either.
        if len(number) > 9 or int(number) > num_layers:
            raise InputError(f"{where}: found layer {number:.9}, expected 0 to {num_layers}")
        if kind not in KINDS:
            raise InputError(f"{where}: found kind {kind!r}, expected {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
        axes = 1 if field_name == "mean" else 2
        if len(tensor.shape) != axes or tensor.shape[0] != width or 0 in tensor.shape:
            expected = f"[{width}]" if field_name == "mean" else f"[{width}, K] with K at least 1"
            raise InputError(f"{where}: found shape {list(tensor.shape)}, expected {expected}")
        if tensor.dtype != np.float32:
            raise InputError(f"{where}: found {tensor.dtype}, expected float32")
        values = np.array(tensor.read())
        if not np.isfinite(values).all():
            raise InputError(f"{where}: found NaN or infinity, expected finite numbers")
        of_kind = fields.setdefault(int(number), {}).setdefault(kind, {})
        if field_name in of_kind:
            raise InputError(f"{where}: found layer {int(number)} under two numbers, expected it once")
        of_kind[field_name] = values
    return {
        layer: {kind: _repair(f"{path}: layer {layer}: {kind}", kind, found) for kind, found in kinds.items()}
        for layer, kinds in sorted(fields.items())
    }


def _repair(where: str, kind: str, found: dict[str, np.ndarray]) -> Repair:
    expected = {"mean"} if kind == "centre" else {"mean", "matrix"}
    if set(found) != expected:
        raise InputError(f"{where}: found {', '.join(sorted(found))}, expected {', '.join(sorted(expected))}")
    return Repair(kind, found["mean"], found.get("matrix"))
