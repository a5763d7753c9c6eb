"""Our own folders: config.json with the fields of our configuration, weights or checkpoints, a tokenizer.

`ctx-jax pretrain` makes them with all that belongs to a run, `ctx-jax import` without.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

import ctx_jax
from ctx_jax.checkpoint import Checkpoints, load_weights, save_weights
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.interop.files.npz_file import read_npz, write_npz
from ctx_jax.interop.pretrained import Pooling, Pretrained
from ctx_jax.interop.tables import Entry, Part, read_params, whole
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound, Params, flat_paths
from ctx_jax.text.load import load_tokenizer

MODELS: dict[str, tuple[type, type]] = {
    "bert": (BertConfig, BertWithHeads),
    "elmo": (ElmoConfig, ElmoForPreTraining),
}
"""By `model_type` of config.json."""
Weights = Literal["final", "best"]
_ABOUT = ("data", "experiment", "truncated")
CONFIG, WEIGHTS, CHECKPOINTS, TOKENIZER, NPZ = "config.json", "weights", "checkpoints", "tokenizer", "weights.npz"


@functools.lru_cache(maxsize=8)  # to find its shapes takes a tenth of a second, and loading and encoding both need them
def bound_model(config: BertConfig | ElmoConfig) -> Bound:
    """The module of a configuration, heads and all."""
    model = next(model for kind, model in MODELS.values() if isinstance(config, kind))
    return Bound(lambda rngs: model(config, rngs=rngs))


def read_run(folder: pathlib.Path, record: Mapping[str, Any], weights: Weights = "final") -> Pretrained:
    """The model of one of our folders.

    Args:
      folder: where it is.
      record: fields of its config.json.
      weights: `final`, or where the run has not ended those of its newest good checkpoint; `best`: of the checkpoint
        whose held-out loss was the lowest of those that are kept (`Experiment.keep_best`).

    Raises:
      InputError: the configuration or the weights are missing, or do not fit.
    """
    file = folder / CONFIG
    kind = record.get("model_type")
    if kind not in MODELS or not isinstance(record.get("model"), dict):
        raise InputError(
            f"{file}: model_type is {kind!r}, expected one of {', '.join(MODELS)} in a config.json written by ctx_jax"
            + did_you_mean(str(kind), MODELS)
        )
    try:
        config = MODELS[kind][0](**record["model"])
        pooling = Pooling(**record["pooling"]) if record.get("pooling") else None
    except TypeError as error:
        raise InputError(f"{file}: model: {error}") from error
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    about = {name: record[name] for name in _ABOUT if name in record}
    return Pretrained(config, _read_weights(folder, bound_model(config).shapes, weights), tokenizer, pooling, about)


def write_run(folder: pathlib.Path, pretrained: Pretrained, *, npz: bool = False) -> None:
    """Writes a folder that `read_run` reads.

    Args:
      folder: new or empty.
      pretrained: what to write.
      npz: the weights as one NumPy archive of our paths, which needs no JAX to read.
    """
    write_about(folder, pretrained)
    if npz:
        write_weights(folder, pretrained.params)
    else:
        save_weights(folder / WEIGHTS, pretrained.params, {"model": asdict(pretrained.config)})


def write_about(folder: pathlib.Path, pretrained: Pretrained) -> None:
    """config.json and the tokenizer."""
    record = {
        "format": 1,
        "ctx_jax": ctx_jax.__version__,
        "model_type": next(name for name, (kind, _) in MODELS.items() if isinstance(pretrained.config, kind)),
        "model": asdict(pretrained.config),
    }
    if pretrained.pooling is not None:
        record["pooling"] = asdict(pretrained.pooling)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(record | dict(pretrained.about), indent=2) + "\n")
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save(folder / TOKENIZER)


def write_weights(folder: pathlib.Path, params: Params) -> None:
    """The weights as one NumPy archive of our paths."""
    write_npz(folder / NPZ, {path: np.asarray(leaf) for path, leaf in flat_paths(params).items()})


def _read_weights(folder: pathlib.Path, shapes: Params, weights: Weights) -> Params:
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    if weights == "best":
        step = checkpoints.best()
        if step is None:
            raise InputError(f"{folder}: no checkpoint has a held-out loss, expected a run with keep_best above 0")
        return checkpoints.restore({"params": shapes}, step, partial=True).state["params"]
    if (folder / WEIGHTS).exists():
        return load_weights(folder / WEIGHTS, shapes)[0]
    if (folder / NPZ).exists():
        table = [Entry(path, (Part(path, whole),)) for path in flat_paths(shapes)]
        return read_params(table, read_npz(folder / NPZ), shapes, str(folder / NPZ))
    restored = checkpoints.restore({"params": shapes}, partial=True)
    if restored is None:
        raise InputError(f"{folder}: found neither weights nor checkpoints, expected a run that has saved some")
    return restored.state["params"]
