"""Vectors of more texts than memory holds: .npy or Parquet files of so many rows each, and a note of what they are.

A shard has its name when it is whole, so a run that was stopped goes on with the first one that is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Literal

import jax
import numpy as np

from ctx_jax.encoder.base import Encoder, OnTooLong, Pool, Text
from ctx_jax.encoder.repair import find_repairs
from ctx_jax.errors import InputError
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.programs.forward import Layers, chosen_layers
from ctx_jax.nn.parameters import flat_paths

Format = Literal["npy", "parquet"]
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
    repair: str | None = None,
    rows: int = ROWS,
    format: Format = "npy",
    with_texts: bool = False,
    on_too_long: OnTooLong = "error",
    batch_tokens: int | None = None,
    show_progress: bool = False,
    told: Callable[[str], object] = lambda line: None,
) -> int:
    """Writes vectors as float32 `00000.npy`, `00001.npy` …, [N, D] or [N, K, D], in the order of the texts.

    Parquet's columns are `number`, the text's from 0 (int64); `text`, if asked for, words of a list with spaces between
    them; and `vector` (fixed_size_list<float32>[D]), or `layer_0` … by number, where `layers` is "all" or a list.

    Args:
      encoder: makes the vectors.
      texts: the same ones each time, when a run goes on.
      folder: to write into; made if need be. It goes on where one that was stopped has ended.
      layers: as for `Encoder.encode_stream`, like pool, repair, on_too_long, batch_tokens and show_progress.
      pool: see above.
      repair: see above; a kind.
      rows: texts of a shard.
      format: of the files; `parquet` needs pyarrow.
      with_texts: write the texts beside their vectors; Parquet only.
      on_too_long: see above.
      batch_tokens: see above.
      show_progress: see above.
      told: is told what is gone on with.

    Returns:
      How many texts there are.

    Raises:
      InputError: the folder holds something else, the texts of a shard have changed, pyarrow is wanted and not
        installed, or as `encode_stream`.
    """
    folder = pathlib.Path(folder)
    if format not in ("npy", "parquet"):
        raise InputError(f"format: found {format!r}, expected 'npy' or 'parquet'")
    if with_texts and format == "npy":
        raise InputError("with_texts: found npy, which holds numbers alone, expected format 'parquet'")
    chosen = chosen_layers(layers, encoder.config.num_layers + 1)
    columns = ["vector"] if chosen is None else [f"layer_{layer}" for layer in chosen]
    if format == "parquet":
        _require_pyarrow()
        if twice := [column for column in columns if columns.count(column) > 1]:
            raise InputError(f"layers: found {twice[0]} twice, expected each once, as columns have names")
    about = {
        "model": fingerprint(encoder),
        "layers": layers if isinstance(layers, str) else list(layers),
        "pool": pool,
        "repair": None if repair is None else _repair(encoder, repair, chosen or [encoder.config.num_layers]),
        "on_too_long": on_too_long,
        "rows": rows,
        "format": format,
        "with_texts": with_texts,
    }
    options = {
        "layers": layers,
        "pool": pool,
        "repair": repair,
        "on_too_long": on_too_long,
        "batch_tokens": batch_tokens,
    }
    shards = _claim(folder, about)
    stream, count, number = iter(texts), 0, -1
    while some := list(itertools.islice(stream, rows)):
        count, number = count + len(some), number + 1
        name, texts_hash = f"{number:05d}.{format}", _hash(some)
        if name in shards and (folder / name).exists():
            if shards[name] != texts_hash:
                raise InputError(f"{folder / name}: was made of other texts, expected those of {ABOUT}")
            told(f"{name}: is there already")
            continue
        vectors = np.stack(list(encoder.encode_stream(some, show_progress=show_progress, **options)))
        with replacing(folder / name) as (file,):
            if format == "npy":
                np.save(file, vectors)
            else:
                _write_parquet(file, vectors, columns, count - len(some), some if with_texts else None)
        shards[name] = texts_hash
        _note(folder, about, shards)
        told(f"{name}: {list(vectors.shape)}")
    return count


def read_shards(folder: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The vectors of the shards in their order, as they were written; .npy files are mapped.

    Raises:
      InputError: the folder was not written by `write_shards`, or it holds Parquet and pyarrow is not installed.
    """
    folder = pathlib.Path(folder)
    for name in sorted(_read_about(folder)["shards"]):
        if name.endswith(".npy"):
            yield np.load(folder / name, mmap_mode="r", allow_pickle=False)
        else:
            yield _read_parquet(folder / name)


def _require_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError("format: found parquet and no pyarrow, expected it installed: pip install 'ctx-jax[parquet]'")


def _write_parquet(
    file: BinaryIO, vectors: np.ndarray, columns: list[str], first: int, texts: Sequence[Text] | None
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table: dict[str, Any] = {"number": pa.array(np.arange(first, first + len(vectors)))}
    if texts is not None:
        table["text"] = pa.array([text if isinstance(text, str) else " ".join(text) for text in texts], pa.string())
    for place, column in enumerate(columns):
        layer = vectors if vectors.ndim == 2 else vectors[:, place]
        table[column] = pa.FixedSizeListArray.from_arrays(pa.array(layer.reshape(-1)), layer.shape[1])
    # Neither packs floats any closer.
    parquet.write_table(pa.table(table), file, compression="none", use_dictionary=False)


def _read_parquet(path: pathlib.Path) -> np.ndarray:
    _require_pyarrow()
    from pyarrow import parquet

    table = parquet.read_table(path)
    layers = {
        name: table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        for name in table.column_names
        if name not in ("number", "text")
    }
    return layers["vector"] if "vector" in layers else np.stack(list(layers.values()), axis=1)


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


def fingerprint(encoder: Encoder) -> str:
    """Of the configuration and a thousand values of every leaf: other weights are another model."""
    found = hashlib.sha256(repr(encoder.config).encode())
    for path, leaf in flat_paths(encoder.params).items():
        found.update(path.encode())
        found.update(np.asarray(leaf.reshape(-1)[:: max(leaf.size // 1000, 1)]).tobytes())
    return found.hexdigest()[:16]


def _repair(encoder: Encoder, kind: str, layers: Sequence[int]) -> str:
    """Another fit is another repair."""
    found = hashlib.sha256()
    for repair in find_repairs(kind, encoder.repairs, layers, encoder.width):
        for leaf in jax.tree.leaves(repair):
            found.update(np.asarray(leaf).tobytes())
    return f"{kind} {found.hexdigest()[:16]}"


def _hash(texts: list[Text]) -> str:
    return hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode()).hexdigest()[:16]
