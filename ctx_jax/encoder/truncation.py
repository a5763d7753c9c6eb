"""A model's first layers as a model."""

from __future__ import annotations

from dataclasses import replace

import jax

from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params


def truncate(pretrained: Pretrained, layers: int, name: str | None = None) -> Pretrained:
    """The first layers, exactly as they were, with the tokenizer, the pooling and their repairs.

    Pooler and heads, of an ELMo the output layer, read the last layer and know no other: they go, unless every layer
    stays. No other field of a configuration is of single layers, and layers that share their parameters
    (`BertConfig.shared_layers`) keep them.

    Args:
      pretrained: the whole model.
      layers: how many, from 1; vectors then are those of layers 0 to this one.
      name: of the whole model, for the card.

    Raises:
      InputError: the model has not as many.
    """
    config, params = pretrained.config, pretrained.params
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= config.num_layers:
        raise InputError(f"layers: found {layers!r}, expected 1 to {config.num_layers}, as many as the model has")
    if layers == config.num_layers:
        return pretrained
    if isinstance(config, ElmoConfig):
        config, encoder = replace(config, num_layers=layers, vocab_size=0), _first_lstms(params["encoder"], layers)
    else:
        config = replace(config, num_layers=layers, heads=(), pooler=False, labels=(), classifier_activation=None)
        encoder = _first_of_stack(params["encoder"], layers)
    # The first layers of some first layers are those of the whole.
    whole = pretrained.about.get("truncated", {"of": pretrained.config.num_layers, "name": name})
    return replace(
        pretrained,
        config=config,
        params={"encoder": encoder},
        about={**pretrained.about, "truncated": {**whole, "layers": layers}},
        repairs={layer: kinds for layer, kinds in pretrained.repairs.items() if layer <= layers},
    )


def _first_lstms(encoder: Params, layers: int) -> Params:
    first = {str(layer) for layer in range(layers)}
    cut = lambda direction: {number: lstm for number, lstm in encoder[direction].items() if number in first}
    return {**encoder, "forward": cut("forward"), "backward": cut("backward")}


def _first_of_stack(encoder: Params, layers: int) -> Params:
    stack = jax.tree.map(lambda leaf: leaf[:layers], encoder["layers"])
    return {name: part for name, part in encoder.items() if name != "pooler"} | {"layers": stack}
