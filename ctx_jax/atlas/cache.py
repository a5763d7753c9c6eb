"""What was computed, by what it was computed of: a second run does only what is new.

A key is a dict of all that a result depends on. A result has its name when it is whole, so that a run that was stopped
goes on with the first one that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.replacing import replacing

MADE = 2
"""Counts changes of how numbers are made of vectors: those of another way are made anew."""


class Cache:
    """A folder of results.

    Attributes:
      folder: made if need be.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}), expected a writable folder") from error

    def path(self, key: dict[str, Any], ending: str) -> pathlib.Path:
        """Where a result lies; what it is of stands in its name."""
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{key['what']}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.{ending}"

    def value(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """JSON of what `make` gives."""
        key = key | {"made": MADE}
        path = self.path(key, "json")
        if path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))["value"]
            except (ValueError, KeyError) as error:
                raise InputError(f"{path}: {error}, expected a result of ours; delete it") from error
        value = make()
        with replacing(path) as (file,):
            file.write(json.dumps({"of": key, "value": value}).encode())
        return json.loads(json.dumps(value))

    def array(
        self, key: dict[str, Any], shape: tuple[int, ...], dtype: Any, fill: Callable[[np.ndarray], object]
    ) -> np.ndarray:
        """An array on the disk, mapped, that `fill` writes where it is not there yet.

        Args:
          key: see the module.
          shape: of the array.
          dtype: of it.
          fill: is given the array, all zeros.
        """
        path = self.path(key, "npy")
        if not path.exists():
            with replacing(path) as (file,):
                header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
                start = file.tell()
                file.truncate(start + int(np.prod(shape)) * np.dtype(dtype).itemsize)
                file.flush()
                array = np.memmap(file, dtype, "r+", start, shape)
                fill(array)
                array.flush()
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.shape != shape:
            raise InputError(f"{path}: found shape {list(found.shape)}, expected {list(shape)}; delete it")
        return found


def text_hash(sentences: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Of words of sentences."""
    found = hashlib.sha256()
    for words in sentences:
        found.update(("\x1f".join(words) + "\x1e").encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:20]
