"""What every format of file is read as: names, shapes and types at once, values when somebody wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
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
