"""The proof that comes with every export: sample inputs, our outputs, and how far off is what a reader gets back.

A reader is whatever can read the folder: ours, and the other framework's own where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

import ctx_jax
from ctx_jax.errors import InputError
from ctx_jax.interop.files.flax_file import read_flax
from ctx_jax.interop.files.npz_file import read_npz
from ctx_jax.interop.files.tensorflow_file import read_tensorflow
from ctx_jax.interop.files.tensors import Tensors
from ctx_jax.interop.load import load, read_json
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.interop.programs.forward import Layers, forward_program
from ctx_jax.interop.programs.stablehlo import read_stablehlo
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import nested
from ctx_jax.text.characters import Characters

FILE, ARRAYS = "certificate.json", "certificate.npz"
TOLERANCE = 1e-5
"""Of the largest error, in units of the largest value of an output, or of 1 where that is smaller."""

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Check:
    """What one reader gets out of a folder.

    Attributes:
      reader: who, with versions.
      error: the largest difference over all outputs, as TOLERANCE has it; None where the reader is not installed.
      output: the output that it is found in.
    """

    reader: str
    error: float | None
    output: str = ""

    @property
    def passed(self) -> bool | None:
        """None where nothing was read."""
        return None if self.error is None else bool(self.error <= TOLERANCE)


def sample_inputs(config: BertConfig | ElmoConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows of random tokens, two with padding; of an ELMo, words with every kind of character."""
    rng = np.random.default_rng(seed)
    if isinstance(config, ElmoConfig):
        words = ["bank", "Überraschung", "銀行", "🙂", "x" * 60, "", "3.14", "don't"]
        texts = [[words[place] for place in rng.integers(len(words), size=length)] for length in (6, 4, 1)]
        ids, lengths = Characters(config.max_characters).batch(texts)
        return {"char_ids": ids.astype(np.int32), "lengths": lengths.astype(np.int32)}
    length = min(16, config.max_length)
    lengths = np.array([length, max(length - 3, 1), max(length // 2, 1)])
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    # Neither the first ids nor the last, which are special in one vocabulary or another.
    ids = rng.integers(min(5, config.vocab_size - 1), config.vocab_size, (3, length)).astype(np.int32)
    types = (np.arange(length) >= lengths[:, None] // 2) * (config.type_vocab_size > 1) * mask
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types.astype(np.int32)}


def model_outputs(pretrained: Pretrained, inputs: dict[str, np.ndarray], layers: Layers = "all") -> Outputs:
    """What `forward_program` gives, with the logits of every head, computed in float32; zero at padding."""
    config = replace(pretrained.config, dtype="float32")
    program = forward_program(config, layers=layers, heads=getattr(config, "all_heads", ()))
    found = jax.device_get(jax.jit(program.function)(pretrained.params, jax.tree.map(jnp.asarray, inputs)))
    return {name: _seen(np.asarray(value), inputs) for name, value in found.items()}


def write_certificate(folder: pathlib.Path, pretrained: Pretrained, format: str, layers: Layers = "all") -> list[Check]:
    """Writes the certificate of a folder that holds the model, or some of its layers, and what its readers got back.

    Raises:
      InputError: somebody got something else back.
    """
    inputs = sample_inputs(pretrained.config)
    outputs = model_outputs(pretrained, inputs, layers)
    arrays = {f"in/{name}": value for name, value in inputs.items()}
    np.savez(folder / ARRAYS, **arrays, **{f"out/{name}": value for name, value in outputs.items()})
    checks = list(_checks(folder, format, inputs, outputs))
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise InputError(
            f"{format}: {failed[0].reader} gets {failed[0].output} back with an error of {failed[0].error:.1e}, "
            f"expected at most {TOLERANCE}; nothing was written"
        )
    record = {
        "format": format,
        "ctx_jax": ctx_jax.__version__,
        "tolerance": TOLERANCE,
        "checks": [asdict(check) for check in checks],
    }
    (folder / FILE).write_text(json.dumps(record, indent=2) + "\n")
    return checks


def verify(folder: pathlib.Path) -> list[Check]:
    """Does again what the certificate says was done, with all readers that are installed now.

    Raises:
      InputError: there is no certificate, or the folder cannot be read.
    """
    record = read_json(folder / FILE)
    format = record.get("format")
    try:
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / ARRAYS}: cannot be read ({error}), expected the arrays of {FILE}") from error
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    return list(_checks(folder, str(format), part("in/"), part("out/")))


def _checks(folder: pathlib.Path, format: str, inputs: dict[str, np.ndarray], outputs: Outputs) -> Iterator[Check]:
    if format in _PROGRAMS:
        readers = _PROGRAMS[format]
    else:
        again = load(folder)
        yield _compared(f"ctx_jax {ctx_jax.__version__}", model_outputs(again, inputs), outputs)
        readers = _READERS.get(format, ())
    for modules, read in readers:
        versions = _versions(modules)
        if versions is None:
            yield Check(f"{modules[0]} (not installed)", None)
            continue
        yield _compared(versions, *read(folder, inputs, outputs))


def _compared(reader: str, found: Outputs, expected: Outputs) -> Check:
    errors = {}
    for name, value in found.items():
        theirs = expected.get(name)
        if theirs is None or theirs.shape != value.shape:
            return Check(reader, float("inf"), name)
        scale = max(float(np.abs(theirs).max(initial=0)), 1.0)
        difference = np.abs(value.astype(np.float64) - theirs)
        # NaN is never within a tolerance, and max() would lose it.
        errors[name] = float("inf") if np.isnan(difference).any() else float(difference.max(initial=0)) / scale
    if not errors:
        return Check(reader, float("inf"), "nothing")
    output = max(errors, key=errors.get)
    return Check(reader, errors[output], output)


def _seen(value: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Zeros at padding, where every library has something else."""
    mask = inputs.get("attention_mask")
    if mask is None or value.ndim < 2:
        return value
    if value.shape[:2] == mask.shape:
        seen = mask
    elif value.ndim == 4 and value.shape[1:3] == mask.shape:
        seen = mask[None]
    else:
        return value
    return np.where(seen.reshape(*seen.shape, *(1,) * (value.ndim - seen.ndim)) > 0, value, 0)


def _versions(modules: tuple[str, ...]) -> str | None:
    """By the modules, for a distribution may be called otherwise: tensorflow-cpu, onnxruntime-gpu."""
    if any(importlib.util.find_spec(name) is None for name in modules):
        return None
    return ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in modules)


def _transformers(folder: pathlib.Path, inputs: dict[str, np.ndarray], outputs: Outputs) -> tuple[Outputs, Outputs]:
    """What the class that config.json names computes, on PyTorch."""
    import torch
    import transformers

    record = read_json(folder / "config.json")
    given = {name: torch.from_numpy(value.astype(np.int64)) for name, value in inputs.items()}
    if record["model_type"] == "distilbert":
        del given["token_type_ids"]
    kind = getattr(transformers, record["architectures"][0])
    with torch.no_grad():
        out = kind.from_pretrained(folder).eval()(**given, output_hidden_states=True)
    found = {"hidden_states": torch.stack(out.hidden_states).numpy()}
    names = {
        "masked_lm": ("prediction_logits",),
        "next_sentence": ("sop_logits", "seq_relationship_logits"),
        "pooler_output": ("pooler_output",),
    }
    for output in outputs.keys() - {"hidden_states", "last_hidden_state"}:
        if output == "span_classifier":
            found[output] = torch.stack([out.start_logits, out.end_logits], -1).numpy()
        elif name := next((name for name in (*names.get(output, ()), "logits") if name in out), None):
            found[output] = out[name].numpy()
    if "pooler_output" not in out:
        found.pop("pooler_output", None)
    return {name: _seen(value, inputs) for name, value in found.items()}, outputs


def _flax(folder: pathlib.Path, *_: object) -> tuple[Outputs, Outputs]:
    """The file's tensors, by Flax's own reader and by ours."""
    from flax import serialization, traverse_util

    file = folder / "flax_model.msgpack"
    return traverse_util.flatten_dict(serialization.msgpack_restore(file.read_bytes()), sep="/"), _values(
        read_flax(file)
    )


def _tensorflow(folder: pathlib.Path, *_: object) -> tuple[Outputs, Outputs]:
    """The checkpoint's tensors, by TensorFlow and by our reader."""
    import tensorflow as tf

    theirs = tf.train.load_checkpoint(str(folder / "bert_model.ckpt"))
    found = {name: theirs.get_tensor(name) for name in theirs.get_variable_to_shape_map()}
    return found, _values(read_tensorflow(folder / "bert_model.ckpt"))


def _values(tensors: Tensors) -> Outputs:
    return {name: tensor.read() for name, tensor in tensors.items()}


def _stablehlo(folder: pathlib.Path, inputs: dict[str, np.ndarray], outputs: Outputs) -> tuple[Outputs, Outputs]:
    """The program, and where its weights are inputs those of the archive beside it."""
    program = read_stablehlo(folder / "model.stablehlo")
    params = None if program.about["weights"] == "inside" else nested(_values(read_npz(folder / "weights.npz")))
    found = {name: _seen(np.asarray(value), inputs) for name, value in program(inputs, params).items()}
    return found, outputs


def _onnx(folder: pathlib.Path, inputs: dict[str, np.ndarray], outputs: Outputs) -> tuple[Outputs, Outputs]:
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of every constant that it does without
    session = onnxruntime.InferenceSession(folder / "model.onnx", quiet, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name: _seen(value, inputs) for name, value in zip(names, session.run(None, inputs), strict=True)}, outputs


def _saved_model(folder: pathlib.Path, inputs: dict[str, np.ndarray], outputs: Outputs) -> tuple[Outputs, Outputs]:
    import tensorflow as tf

    run = tf.saved_model.load(str(folder / "saved_model")).signatures["serving_default"]
    found = run(**{name: tf.constant(value) for name, value in inputs.items()})
    return {name: _seen(value.numpy(), inputs) for name, value in found.items()}, outputs


_Reader = Callable[..., tuple[Outputs, Outputs]]
_Readers = dict[str, tuple[tuple[tuple[str, ...], _Reader], ...]]
_READERS: _Readers = {
    "hugging-face": ((("transformers", "torch"), _transformers),),
    "flax": ((("flax",), _flax),),
    "google-bert": ((("tensorflow",), _tensorflow),),
}
"""By format: the other frameworks' own readers, with the modules that they need. They give what they found, and
what was expected."""
_PROGRAMS: _Readers = {
    "stablehlo": ((("jax",), _stablehlo),),
    "onnx": ((("onnxruntime",), _onnx),),
    "saved-model": ((("tensorflow",), _saved_model),),
}
"""Likewise, of formats that hold the computation and not the model."""
