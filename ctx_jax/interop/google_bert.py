"""The checkpoints of google-research/bert: bert_config.json, bert_model.ckpt.*, vocab.txt.

What Google's modeling.py calls `gelu` is the approximation with tanh, which Hugging Face calls `gelu_new`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop import hugging_face
from ctx_jax.interop.files.tensors import Tensors
from ctx_jax.interop.names import GOOGLE, TENSORFLOW, bert_table
from ctx_jax.interop.tables import Entry, read_params, write_params
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, Params

_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}
"""Google's → Hugging Face's."""
_OPTIMIZER = ("/adam_m", "/adam_v")
_REST = ("global_step", "beta1_power", "beta2_power")


def read_google_model(
    record: Mapping[str, Any], tensors: Tensors, *, config_file: str, file: str
) -> tuple[BertConfig, Params]:
    """Configuration and parameters; moments of the optimizer are left out.

    Raises:
      InputError: the configuration cannot be followed, or the tensors are not those it asks for.
    """
    left = {name: t for name, t in tensors.items() if not name.endswith(_OPTIMIZER) and name not in _REST}
    heads = tuple(
        head
        for head, modules in GOOGLE.heads.items()
        if any(name.startswith(theirs.replace(".", "/") + "/") for theirs in modules.values() for name in left)
    )
    activation = record.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        expected = ", ".join(_ACTIVATIONS)
        raise InputError(f"{config_file}: hidden_act: found {activation!r}, expected one of {expected}")
    theirs = {**record, "model_type": "bert", "hidden_act": _ACTIVATIONS[activation]}
    config = hugging_face.read_config(theirs, config_file, heads=heads, pooler="bert/pooler/dense/kernel" in left)
    shapes = Bound(lambda rngs: BertWithHeads(config, rngs=rngs)).shapes
    return config, read_params(_table(config), left, shapes, file)


def write_google_model(config: BertConfig, params: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of bert_config.json, and the tensors.

    Raises:
      InputError: google-research/bert cannot hold the model.
    """
    kind = hugging_face.kind_of(config)
    if kind != "bert" or not set(config.all_heads) <= GOOGLE.heads.keys() or not config.tied_head:
        heads = ", ".join(config.all_heads) or "none"
        raise InputError(f"google-research/bert: found a {kind} with heads {heads}, expected BERT's of pre-training")
    record = hugging_face.write_config(config)
    names = [google for google, theirs in _ACTIVATIONS.items() if theirs == record["hidden_act"]]
    if not names:
        raise InputError(f"google-research/bert: found activation {config.activation!r}, expected gelu_tanh or relu")
    rest = ("architectures", "model_type", "layer_norm_eps", "tie_word_embeddings")
    record = {name: value for name, value in record.items() if name not in rest} | {"hidden_act": names[0]}
    return record, write_params(_table(config), params)


def _table(config: BertConfig) -> list[Entry]:
    return bert_table(config, GOOGLE, TENSORFLOW, prefix="bert.")
