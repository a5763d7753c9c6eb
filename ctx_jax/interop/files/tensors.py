"""What every format of file is read as: names, shapes and types at once, values when somebody wants them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.mapping import let_go

MAX_AXES = 64  # NumPy's
_CODES = ("?", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16")
NUMPY_DTYPES = {np.dtype(code).name: np.dtype(code) for code in _CODES}  # numbers of NumPy's own, by their names
_PIECE = 2**24  # bytes of a tensor that are copied before their pages go

# Names and values of a bad file are as long as they like; a message is one line.
short = reprlib.Repr()
short.maxstring = short.maxother = 160


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
      shape: its axes.
      dtype: NumPy's type of an element, ml_dtypes' for bfloat16 and the types of eight bits.
      read: the values; a read-only view of the mapped file where the format allows it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


Tensors = Mapping[str, StoredTensor]
"""The tensors of a file, or of several, by the file's own names."""


def copy_out(tensor: StoredTensor, out: np.ndarray) -> None:
    """Writes the values into `out`, in its type, and lets go of the file's pages that they were read from.

    So a file that is copied tensor by tensor is never in memory twice. `out` may be a view of any strides. Within a
    kind (integers, floats) values are cast as NumPy casts; none is cast to a lesser kind.

    Raises:
      ValueError: `out` has another shape, or is of a lesser kind than the tensor.
      InputError: the values cannot be read.
    """
    if out.shape != tensor.shape:
        raise ValueError(f"out: found shape {list(out.shape)}, expected {list(tensor.shape)}")
    if _kind(out.dtype) < _kind(tensor.dtype):
        raise ValueError(f"out: found {out.dtype}, which cannot hold the values of {tensor.dtype}")
    values = tensor.read()
    if values.flags.c_contiguous and values.nbytes > _PIECE and values.ndim:
        rows = max(1, _PIECE * len(values) // values.nbytes)
        pieces = [slice(start, start + rows) for start in range(0, len(values), rows)]
    else:
        pieces = [...]
    for piece in pieces:
        np.copyto(out[piece], values[piece], casting="unsafe")
        let_go(values[piece])


def _kind(dtype: np.dtype) -> int:
    """From truths over integers and floats (of ml_dtypes too, which are of no kind for NumPy) to complex numbers."""
    return {"b": 0, "i": 1, "u": 1, "c": 3}.get(dtype.kind, 2)


def check_shape(shape: Sequence[int], dtype: np.dtype, where: str) -> None:
    """Refuses what no array of NumPy's can have."""
    if len(shape) > MAX_AXES:
        raise InputError(f"{where}: shape: found {len(shape)} axes, expected at most {MAX_AXES}")
    if min(shape, default=0) < 0 or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        found = short.repr(list(shape))
        raise InputError(f"{where}: shape: found {found}, expected sizes from 0 and less than 2**63 bytes")
