"""Any folder that we can read, recognised by what is in it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from ctx_jax.errors import InputError
from ctx_jax.interop import bilm, hugging_face, sentence_transformers
from ctx_jax.interop.files.flax_file import read_flax
from ctx_jax.interop.files.hdf5_file import read_hdf5
from ctx_jax.interop.files.json_text import parse_json
from ctx_jax.interop.files.safetensors_file import read_safetensors
from ctx_jax.interop.files.shards import read_shards
from ctx_jax.interop.files.tensorflow_file import read_tensorflow
from ctx_jax.interop.files.tensors import Tensors
from ctx_jax.interop.files.torch_file import read_torch
from ctx_jax.interop.google_bert import read_google_model
from ctx_jax.interop.pretrained import REPAIRS, Pretrained, load_repairs
from ctx_jax.interop.run_folder import Weights, bound_model, read_run
from ctx_jax.interop.tables import read_params
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.tokenizer import Tokenizer

SUPPORTED = (
    "a run directory or import of ctx_jax (config.json, weights/ or checkpoints/ or weights.npz)",
    "a Hugging Face folder (config.json with model.safetensors, pytorch_model.bin or flax_model.msgpack)",
    "a sentence-transformers folder (modules.json)",
    "google-research/bert (bert_config.json, *.ckpt.index)",
    "bilm-tf or AllenNLP (*options.json, *weights.hdf5)",
)
_WEIGHTS: tuple[tuple[str, Callable[[pathlib.Path], Tensors]], ...] = (
    ("model.safetensors", read_safetensors),
    ("model.safetensors.index.json", partial(read_shards, read=read_safetensors)),
    ("pytorch_model.bin", read_torch),
    ("pytorch_model.bin.index.json", partial(read_shards, read=read_torch)),
    ("flax_model.msgpack", read_flax),
)
"""Of a Hugging Face folder, in the order in which they are looked for."""


def load(path: str | os.PathLike[str], *, weights: Weights = "final") -> Pretrained:
    """Reads a model from a folder, whatever wrote it, with the repairs that lie beside it.

    Args:
      path: the folder.
      weights: which ones of a run directory, see `run_folder.read_run`; other folders have one set only.

    Raises:
      InputError: there is no such folder, nothing in it is known, or what is there is broken.
    """
    if weights not in get_args(Weights):
        raise InputError(f"weights: found {weights!r}, expected one of {', '.join(get_args(Weights))}")
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: found {'a file' if folder.exists() else 'nothing'}, expected a folder")
    found = _load(folder, weights)
    file, config = folder / REPAIRS, found.config
    if not file.exists():
        return found
    width = 2 * config.projection_dim if isinstance(config, ElmoConfig) else config.hidden_size
    return replace(found, repairs=load_repairs(file, width, config.num_layers))


def _load(folder: pathlib.Path, weights: Weights) -> Pretrained:
    modules, config = folder / "modules.json", folder / "config.json"
    record = read_json(config) if config.is_file() and not modules.is_file() else None
    if record is not None and "model" in record:
        return read_run(folder, record, weights)
    if weights != "final":
        raise InputError(f"{folder}: weights {weights!r} are those of a run directory, which this is not")
    if modules.is_file():
        part, pooling = sentence_transformers.read_modules(folder, read_json)
        return replace(_read_hugging_face(part, read_json(part / "config.json")), pooling=pooling)
    if record is not None:
        return _read_hugging_face(folder, record)
    if (folder / "bert_config.json").is_file():
        return _read_google(folder)
    options, files = sorted(folder.glob("*options.json")), sorted(folder.glob("*weights.hdf5"))
    if len(options) == 1 and files:
        return _read_bilm(options[0], files)
    names = sorted(entry.name for entry in folder.iterdir())
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise InputError(f"{folder}: found {listed or 'nothing'}, expected one of: {'; '.join(SUPPORTED)}")


def read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """The object in a JSON file, or the list.

    Raises:
      InputError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected JSON") from error
    record = parse_json(text, str(path))
    if not isinstance(record, kind):
        expected = "an object" if kind is dict else "a list"
        raise InputError(f"{path}: found {type(record).__name__}, expected {expected} in JSON")
    return record


def _read_hugging_face(folder: pathlib.Path, record: dict[str, Any]) -> Pretrained:
    hugging_face.family_of(record, str(folder / "config.json"))
    present = [(name, read) for name, read in _WEIGHTS if (folder / name).is_file()]
    if not present:
        raise InputError(f"{folder}: found no weights, expected one of {', '.join(name for name, _ in _WEIGHTS)}")
    name, read = present[0]
    config, params = hugging_face.read_model(
        record,
        read(folder / name),
        config_file=str(folder / "config.json"),
        file=str(folder / name),
        flax=name.startswith("flax"),
    )
    return Pretrained(config, params, _tokenizer(folder))


def _read_google(folder: pathlib.Path) -> Pretrained:
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        found = ", ".join(index.name for index in indices) or "none"
        raise InputError(f"{folder}: found {found}, expected one *.index, of a checkpoint of TensorFlow")
    file = folder / "bert_config.json"
    config, params = read_google_model(
        read_json(file), read_tensorflow(indices[0]), config_file=str(file), file=str(indices[0])
    )
    return Pretrained(config, params, _tokenizer(folder))


def _read_bilm(options: pathlib.Path, weights: list[pathlib.Path]) -> Pretrained:
    if len(weights) != 1:
        found = ", ".join(file.name for file in weights)
        raise InputError(f"{options.parent}: found {found}, expected one *weights.hdf5")
    config = bilm.read_options(read_json(options), str(options))
    shapes = bound_model(config).shapes
    return Pretrained(config, read_params(bilm.bilm_table(config), read_hdf5(weights[0]), shapes, str(weights[0])))


def _tokenizer(folder: pathlib.Path) -> Tokenizer | None:
    vocabularies = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    return load_tokenizer(folder) if any((folder / name).exists() for name in vocabularies) else None
