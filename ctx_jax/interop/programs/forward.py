"""What is exported, the same for every format: a pure function of parameters and named inputs to named outputs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.export  # not an attribute of jax before it is imported
import jax.numpy as jnp
from jaxtyping import Array

from ctx_jax.compilation import float32_means_float32
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound, Params, flat_paths

Layers = Literal["all", "last"] | Sequence[int]
Axes = tuple[int | str, ...]
Named = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ProgramOptions:
    """What a program that is exported holds.

    Attributes:
      layers: which layers make `hidden_states`, as for `forward_program`.
      weights: inside the program, or as inputs of it with an archive of them beside; StableHLO only.
      python: of an environment with jax2onnx; ONNX only. None is this one.
    """

    layers: Layers = "all"
    weights: Literal["inside", "inputs"] = "inside"
    python: str | None = None


WHOLE = ProgramOptions()
"""All layers, weights inside."""


class Program(NamedTuple):
    """A forward pass, ready to be traced.

    Attributes:
      function: (parameters, inputs) → outputs.
      inputs: axes of the int32 inputs by name; an axis is a number or the name of a symbolic one.
      outputs: axes of the float32 outputs by name.
      parameters: shape and type of the leaves that the function reads, in a tree; a model may have others.
      max_length: the largest T, or None.
    """

    function: Callable[[Params, Named], Named]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]
    parameters: Params
    max_length: int | None


def forward_program(config: BertConfig | ElmoConfig, *, layers: Layers = "all", heads: Sequence[str] = ()) -> Program:
    """The forward pass of a model, without dropout.

    BERT takes `input_ids`, `attention_mask` (1, at padding 0) and `token_type_ids`, [B, T] each; ELMo `char_ids`
    [B, T, C], `<S>` and `</S>` included, and `lengths` [B]. Both return `last_hidden_state` [B, T, D] and, unless
    `layers` is "last", `hidden_states` [K, B, T, D]; BERT also `pooler_output` [B, D] when it has a pooler, and the
    logits of heads under their names. ELMo's D is 2 P. BERT's vectors at padding are not zero, as in the original.

    Args:
      config: of the model.
      layers: which layers make `hidden_states`, from 0, what enters the first; negative ones count from the last.
      heads: whose logits to return too, in shapes as `BertWithHeads.logits` has them.

    Raises:
      InputError: there is no such layer, or the model has no such head.
    """
    has = () if isinstance(config, ElmoConfig) else config.all_heads
    for head in heads:
        if head not in has:
            raise InputError(f"heads: found {head!r}, expected some of the model's: {', '.join(has) or 'none'}")
    chosen = chosen_layers(layers, config.num_layers + 1)
    if isinstance(config, ElmoConfig):
        # Steps of a symbolic number cannot be written out.
        return _elmo(dataclasses.replace(config, unroll=False), chosen)
    return _bert(dataclasses.replace(config, remat="none"), chosen, tuple(heads))


def select_parameters(program: Program, params: Params) -> Params:
    """The part of a model's parameters that the program reads.

    Raises:
      InputError: a leaf is missing or of another shape or type.
    """
    found = flat_paths(params)
    for path, expected in flat_paths(program.parameters).items():
        if path not in found:
            raise InputError(f"params: {path}: not found{did_you_mean(path, found)}, expected {_shape(expected)}")
        if _shape(found[path]) != _shape(expected):
            raise InputError(f"params: {path}: found {_shape(found[path])}, expected {_shape(expected)}")
    return _pick(params, program.parameters)


def symbolic_inputs(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs with symbolic axes, bounded by what the model takes."""
    bounds = ["B >= 1", "T >= 1"] + ([] if program.max_length is None else [f"T <= {program.max_length}"])
    scope = jax.export.SymbolicScope(bounds)
    shape = lambda axes: jax.export.symbolic_shape(",".join(map(str, axes)), scope=scope)
    return {name: jax.ShapeDtypeStruct(shape(axes), jnp.int32) for name, axes in program.inputs.items()}


def require_new(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, in a folder that exists, where nothing stands yet.

    Raises:
      InputError: something stands there, or there is no such folder.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise InputError(f"{path}: found {'a folder' if path.is_dir() else 'a file'}, expected a new path")
    if not path.parent.is_dir():
        raise InputError(f"{path}: found no folder {path.parent}, expected one to write into")
    return path


def _bert(config: BertConfig, chosen: list[int] | None, heads: tuple[str, ...]) -> Program:
    bound = Bound(lambda rngs: BertWithHeads(config, rngs=rngs))

    @float32_means_float32(config.dtype)
    def function(params: Params, inputs: Named) -> Named:
        model, ids = bound(params), inputs["input_ids"]
        # Given, because an arange of symbolic length does not convert to ONNX.
        positions = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
        read = model.encoder(
            ids, inputs["token_type_ids"], inputs["attention_mask"], positions, all_layers=chosen is not None
        )
        found = _layers(read.last, read.layers, chosen)
        if config.pooler:
            found["pooler_output"] = model.encoder.pooler(read.last[:, 0]).astype(jnp.float32)
        return found | {head: model.logits(head, read.last) for head in heads}

    outputs = _outputs(chosen, config.hidden_size)
    if config.pooler:
        outputs["pooler_output"] = ("B", config.hidden_size)
    labels = len(config.labels)
    axes = {
        "masked_lm": ("B", "T", config.vocab_size),
        "next_sentence": ("B", 2),
        "replaced_token": ("B", "T"),
        "token_classifier": ("B", "T", labels),
        "sequence_classifier": ("B", labels),
        "span_classifier": ("B", "T", 2),
    }
    outputs |= {head: axes[head] for head in heads}
    inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ("B", "T"))
    return Program(function, inputs, outputs, _parts(bound, ("encoder", *heads)), config.max_length)


def _elmo(config: ElmoConfig, chosen: list[int] | None) -> Program:
    bound = Bound(lambda rngs: ElmoForPreTraining(config, rngs=rngs))

    @float32_means_float32(config.dtype)
    def function(params: Params, inputs: Named) -> Named:
        encoder = bound(params).encoder
        read, _ = encoder(inputs["char_ids"], inputs["lengths"], all_layers=chosen is not None)
        return _layers(read.last, read.layers, chosen)

    inputs = {"char_ids": ("B", "T", config.max_characters), "lengths": ("B",)}
    outputs = _outputs(chosen, 2 * config.projection_dim)
    return Program(function, inputs, outputs, _parts(bound, ("encoder",)), None)


def _parts(bound: Bound, names: Iterable[str]) -> Params:
    shapes = bound.shapes
    return {name: shapes[name] for name in names}


def _outputs(chosen: list[int] | None, width: int) -> dict[str, Axes]:
    last: dict[str, Axes] = {"last_hidden_state": ("B", "T", width)}
    return last if chosen is None else {**last, "hidden_states": (len(chosen), "B", "T", width)}


def _layers(last: Array, layers: Array | None, chosen: list[int] | None) -> Named:
    found = {"last_hidden_state": last.astype(jnp.float32)}
    if chosen is not None:
        layers = layers.astype(jnp.float32)
        every = chosen == list(range(layers.shape[0]))
        found["hidden_states"] = layers if every else jnp.stack([layers[layer] for layer in chosen])
    return found


def chosen_layers(layers: Layers, count: int) -> list[int] | None:
    """Numbers of layers, from 0, of so many; None is the last one alone.

    Raises:
      InputError: there is no such layer.
    """
    if isinstance(layers, str):
        if layers not in ("all", "last"):
            raise InputError(f"layers: found {layers!r}, expected 'all', 'last' or a list of numbers")
        return list(range(count)) if layers == "all" else None
    chosen = list(layers)
    if not chosen:
        raise InputError("layers: found none, expected at least one, or 'last'")
    for layer in chosen:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -count <= layer < count:
            raise InputError(f"layers: found {layer!r}, expected 0 to {count - 1}, or -{count} to -1")
    return [layer % count for layer in chosen]


def _pick(params: Mapping[str, Any], like: Mapping[str, Any]) -> Params:
    return {
        name: _pick(params[name], leaf) if isinstance(leaf, Mapping) else params[name] for name, leaf in like.items()
    }


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}"
