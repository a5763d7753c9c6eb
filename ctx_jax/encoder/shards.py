"""Vectors of more texts than memory holds: .npy files of so many rows each, and a note of what they are.

A shard has its name when it is whole, so a run that was stopped goes on with the first one that is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ctx_jax.encoder.base import Encoder, OnTooLong, Pool, Text
from ctx_jax.errors import InputError
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.programs.forward import Layers
from ctx_jax.nn.parameters import flat_paths

ABOUT = "about.json"
ROWS = 65_536
"""Texts of a shard."""


def write_shards(
    encoder: Encoder,
    texts: Iterable[Text],
    folder: str | os.PathLike[str],
    *,
    layers: Layers = "last",
    pool: Pool = "mean",
    rows: int = ROWS,
    on_too_long: OnTooLong = "error",
    batch_tokens: int,
    show_progress: bool = False,
    told: Callable[[str], object] = lambda line: None,
) -> int:
    """Writes vectors as float32 `00000.npy`, `00001.npy` …, [N, D] or [N, K, D], in the order of the texts.

    Args:
      encoder: makes the vectors.
      texts: the same ones each time, when a run goes on.
      folder: to write into; made if need be. It goes on where one that was stopped has ended.
      layers: as for `Encoder.encode_stream`, like pool, on_too_long, batch_tokens and show_progress.
      pool: see above.
      rows: texts of a shard.
      on_too_long: see above.
      batch_tokens: see above.
      show_progress: see above.
      told: is told what is gone on with.

    Returns:
      How many texts there are.

    Raises:
      InputError: the folder holds something else, or the texts of a shard have changed, or as `encode_stream`.
    """
    folder = pathlib.Path(folder)
    about = {
        "model": _fingerprint(encoder),
        "layers": layers if isinstance(layers, str) else list(layers),
        "pool": pool,
        "on_too_long": on_too_long,
        "rows": rows,
    }
    options = {"layers": layers, "pool": pool, "on_too_long": on_too_long, "batch_tokens": batch_tokens}
    shards = _claim(folder, about)
    stream, count, number = iter(texts), 0, -1
    while some := list(itertools.islice(stream, rows)):
        count, number = count + len(some), number + 1
        name, texts_hash = f"{number:05d}.npy", _hash(some)
        if name in shards and (folder / name).exists():
            if shards[name] != texts_hash:
                raise InputError(f"{folder / name}: was made of other texts, expected those of {ABOUT}")
            told(f"{name}: is there already")
            continue
        vectors = np.stack(list(encoder.encode_stream(some, show_progress=show_progress, **options)))
        with replacing(folder / name) as (file,):
            np.save(file, vectors)
        shards[name] = texts_hash
        _note(folder, about, shards)
        told(f"{name}: {list(vectors.shape)}")
    return count


def read_shards(folder: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The shards in their order, mapped.

    Raises:
      InputError: the folder was not written by `write_shards`.
    """
    folder = pathlib.Path(folder)
    for name in sorted(_read_about(folder)["shards"]):
        yield np.load(folder / name, mmap_mode="r", allow_pickle=False)


def _claim(folder: pathlib.Path, about: dict[str, Any]) -> dict[str, str]:
    if not folder.exists():
        folder.mkdir(parents=True)
        _note(folder, about, {})
        return {}
    before = _read_about(folder)
    shards = before.pop("shards")
    for name, value in about.items():
        if before.get(name) != value:
            raise InputError(f"{folder}: was begun with {name} {before.get(name)!r}, expected {value!r}")
    return shards


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: found no {ABOUT} ({error}), expected a folder of shards") from error


def _note(folder: pathlib.Path, about: dict[str, Any], shards: dict[str, str]) -> None:
    with replacing(folder / ABOUT) as (file,):
        file.write((json.dumps({**about, "shards": shards}, indent=2) + "\n").encode())


def _fingerprint(encoder: Encoder) -> str:
    """Of the configuration and a thousand values of every leaf: other weights are another model."""
    found = hashlib.sha256(repr(encoder.config).encode())
    for path, leaf in flat_paths(encoder.params).items():
        found.update(path.encode())
        found.update(np.asarray(leaf.reshape(-1)[:: max(leaf.size // 1000, 1)]).tobytes())
    return found.hexdigest()[:16]


def _hash(texts: list[Text]) -> str:
    return hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode()).hexdigest()[:16]
