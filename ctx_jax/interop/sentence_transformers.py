"""Folders of sentence-transformers: modules.json, the transformer, and how its vectors are pooled."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pooling

_POOLS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}


def read_modules(folder: pathlib.Path, read_json: Callable[..., Any]) -> tuple[pathlib.Path, Pooling]:
    """The transformer's folder, and the pooling. `read_json` reads a file and checks what kind of value it is.

    Raises:
      InputError: there is a module, or a way of pooling, that we do not have.
    """
    file = folder / "modules.json"
    modules = [module if isinstance(module, dict) else {} for module in read_json(file, list)]
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{file}: found modules {', '.join(kinds) or 'none'}, expected Transformer, Pooling and perhaps Normalize"
        )
    places = [str(module.get("path", "")) for module in modules]
    for place in places:
        # A name comes from a file that somebody downloaded: it may not lead out of the folder.
        if "/" in place.strip("/") or "\\" in place or ".." in place or place.startswith("/"):
            raise InputError(f"{file}: path: found {place!r}, expected a folder beside it")
    pooling = folder / places[1] / "config.json"
    record = read_json(pooling)
    modes = [name for name, on in record.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise InputError(f"{pooling}: found {', '.join(modes) or 'none'}, expected one of {', '.join(_POOLS)}")
    return folder / places[0], Pooling(_POOLS[modes[0]], normalize="Normalize" in kinds)


def write_modules(pooling: Pooling, width: int) -> dict[str, Any]:
    """The files of a sentence encoder beside the transformer's own, by their path; values are JSON."""
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] * pooling.normalize)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(steps)
    ]
    config = {"word_embedding_dimension": width} | {name: pool == pooling.pool for name, pool in _POOLS.items()}
    return {"modules.json": modules, "1_Pooling/config.json": config}
