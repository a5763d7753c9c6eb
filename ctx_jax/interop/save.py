"""A model as a folder of another library's, or of ours, or as a program that computes it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.interop import bilm, hugging_face, sentence_transformers
from ctx_jax.interop.certificate import Check, write_certificate
from ctx_jax.interop.files.flax_file import write_flax
from ctx_jax.interop.files.hdf5_file import write_hdf5
from ctx_jax.interop.files.safetensors_file import write_safetensors
from ctx_jax.interop.files.tensorflow_file import write_tensorflow
from ctx_jax.interop.google_bert import write_google_model
from ctx_jax.interop.names import FAMILIES, FLAX, PYTORCH, Dialect, bert_table
from ctx_jax.interop.pretrained import REPAIRS, Pretrained, save_repairs
from ctx_jax.interop.programs.forward import WHOLE, ProgramOptions
from ctx_jax.interop.programs.onnx import write_onnx
from ctx_jax.interop.programs.saved_model import write_saved_model
from ctx_jax.interop.programs.stablehlo import write_stablehlo
from ctx_jax.interop.run_folder import write_about, write_run, write_weights
from ctx_jax.interop.tables import write_params
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig


def save(
    pretrained: Pretrained,
    folder: str | os.PathLike[str],
    format: str,
    options: ProgramOptions = WHOLE,
    *,
    overwrite: bool = False,
    certificate: bool = True,
    card: str | None = None,
) -> list[Check]:
    """Writes a model as a folder that appears whole or not at all, its repairs beside it; no program applies them.

    Args:
      pretrained: what to write.
      folder: where; it must not exist, or be empty, unless `overwrite`.
      format: one of FORMATS or PROGRAMS.
      options: of a program.
      overwrite: replace what is there.
      card: text of README.md.
      certificate: read the folder again, with all readers that there are, and write down what they got.

    Returns:
      What the readers got; nothing without a certificate.

    Raises:
      InputError: the format is unknown or cannot hold the model, or the folder cannot be written.
    """
    known = (*FORMATS, *PROGRAMS)
    if format not in known:
        raise InputError(f"format: found {format!r}, expected one of {', '.join(known)}{did_you_mean(format, known)}")
    if format in FORMATS and options != WHOLE:
        raise InputError(f"options: found {options}, expected none: {format} holds the whole model")
    with appearing(folder, overwrite=overwrite) as place:
        if format in FORMATS:
            FORMATS[format](place, pretrained)
        else:
            _write_program(place, pretrained, format, options)
        if pretrained.repairs:
            save_repairs(place / REPAIRS, pretrained.repairs)
        if card is not None:
            (place / "README.md").write_text(card, encoding="utf-8")
        return write_certificate(place, pretrained, format, options.layers) if certificate else []


@contextlib.contextmanager
def appearing(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes its name when it is complete.

    Raises:
      InputError: something is there already, or nothing can be written there.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already, expected a new or empty folder")
    mark = secrets.token_hex(8)
    new, old = folder.parent / f".{mark}.new", folder.parent / f".{mark}.old"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable place") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON for people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_program(folder: pathlib.Path, pretrained: Pretrained, format: str, options: ProgramOptions) -> None:
    """In float32, with every head; config.json and the tokenizer say what the program takes in."""
    config, params = replace(pretrained.config, dtype="float32"), pretrained.params
    heads = () if isinstance(config, ElmoConfig) else config.all_heads
    path = folder / PROGRAMS[format]
    inside = options.weights == "inside"
    if not inside and format != "stablehlo":
        raise InputError(f"options.weights: found 'inputs', expected 'inside': {format} has them there")
    write_about(folder, pretrained)
    if format == "stablehlo":
        write_stablehlo(path, config, params, layers=options.layers, heads=heads, weights_inside=inside)
        if not inside:
            write_weights(folder, params)
    elif format == "onnx":
        python = options.python or sys.executable
        write_onnx(path, config, params, layers=options.layers, heads=heads, python_executable=python)
    else:
        write_saved_model(path, config, params, layers=options.layers, heads=heads)


def _hugging_face(folder: pathlib.Path, pretrained: Pretrained) -> None:
    _write_bert(folder, pretrained, PYTORCH)
    if pretrained.pooling is not None:
        for path, value in sentence_transformers.write_modules(
            pretrained.pooling, pretrained.config.hidden_size
        ).items():
            write_json(folder / path, value)


def _flax(folder: pathlib.Path, pretrained: Pretrained) -> None:
    _write_bert(folder, pretrained, FLAX)


def _write_bert(folder: pathlib.Path, pretrained: Pretrained, dialect: Dialect) -> None:
    config = _bert(pretrained)
    family = FAMILIES[hugging_face.kind_of(config)]
    # Classes without heads have the encoder's names bare.
    prefix = f"{family.base}." if config.all_heads else ""
    tensors = write_params(bert_table(config, family, dialect, prefix=prefix), pretrained.params)
    write_json(folder / "config.json", hugging_face.write_config(config))
    if dialect is FLAX:
        write_flax(folder / "flax_model.msgpack", tensors)
    else:
        # Without this note transformers does not load the file.
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save(folder)


def _google(folder: pathlib.Path, pretrained: Pretrained) -> None:
    record, tensors = write_google_model(_bert(pretrained), pretrained.params)
    write_json(folder / "bert_config.json", record)
    write_tensorflow(folder / "bert_model.ckpt", tensors)
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save(folder)


def _bilm(folder: pathlib.Path, pretrained: Pretrained) -> None:
    if not isinstance(pretrained.config, ElmoConfig):
        raise InputError(f"bilm holds an ELMo, found {type(pretrained.config).__name__}")
    write_json(folder / "options.json", bilm.write_options(pretrained.config))
    write_hdf5(folder / "weights.hdf5", write_params(bilm.bilm_table(pretrained.config), pretrained.params))


def _bert(pretrained: Pretrained) -> BertConfig:
    if not isinstance(pretrained.config, BertConfig):
        raise InputError(f"the format holds BERT and its kin, found {type(pretrained.config).__name__}")
    return pretrained.config


FORMATS: dict[str, Callable[[pathlib.Path, Pretrained], None]] = {
    "ctx_jax": write_run,
    "hugging-face": _hugging_face,
    "flax": _flax,
    "google-bert": _google,
    "bilm": _bilm,
    "npz": lambda folder, pretrained: write_run(folder, pretrained, npz=True),
}
"""Writers of folders that `load` reads again."""

PROGRAMS = {"stablehlo": "model.stablehlo", "onnx": "model.onnx", "saved-model": "saved_model"}
"""Formats that hold the computation, and what they are called in their folder."""
