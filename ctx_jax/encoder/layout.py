"""Weights as a processor's compiled functions take them, and back, inside jit, as the model does.

Cut out of a stack, a layer's weights are copied in every call: with few tokens a tenth of the time, with 16 a third. So
layers are in a list. In bfloat16 kernels have their outputs in front, the order in which the matrix units want them:
products with 128 rows take a quarter less time, with thousands a twentieth (`scripts/measure_forward.py`).
"""

from __future__ import annotations

from operator import itemgetter

import jax
import jax.numpy as jnp
from flax import nnx

from ctx_jax.models.bert import BertWithHeads
from ctx_jax.nn.linear import Linear
from ctx_jax.nn.parameters import Bound, Params


def for_processor(params: Params, *, turned: bool) -> Params:
    """Layers in a list; with `turned` their kernels as a turned `Linear` takes them."""
    stack = params["encoder"]["layers"]
    count = jax.tree.leaves(stack)[0].shape[0]
    layers = [jax.tree.map(itemgetter(layer), stack) for layer in range(count)]
    if turned:
        layers = jax.tree_util.tree_map_with_path(_turn, layers)
    return {**params, "encoder": {**params["encoder"], "layers": layers}}


def from_processor(bound: Bound[BertWithHeads], params: Params, *, turned: bool) -> BertWithHeads:
    """The model with what `for_processor` gave; XLA sees that each layer is cut out of the stack again."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["encoder"]["layers"])
    model = bound({**params, "encoder": {**params["encoder"], "layers": layers}})
    for _, module in nnx.iter_modules(model.encoder.layers):
        if isinstance(module, Linear):
            module.turned = turned
    return model


def _turn(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
    return leaf.reshape(len(leaf), -1).T if path[-1].key == "kernel" else leaf
