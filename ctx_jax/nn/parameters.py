"""Modules as values: parameters are a plain nested dict, the rest of a module is static."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Key

Params = dict[str, Any]
M = TypeVar("M", bound=nnx.Module)


class Bound(Generic[M]):
    """A kind of module without its parameters: makes them, and puts them back.

    `bound = Bound(lambda rngs: Bert(config, rngs=rngs))`; `params = bound.init(key)`; inside jit
    `bound(params)` is the module. Plain dicts keep jit's dispatch at a third of a millisecond for a dozen layers,
    where passing modules takes ten.
    """

    def __init__(self, make: Callable[[nnx.Rngs], M]):
        self._make = make
        self._graph, self._shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    @property
    def shapes(self) -> Params:
        """The parameters' shapes and types, nothing allocated."""
        return _named(nnx.to_pure_dict(self._shapes))

    def init(self, key: Key[Array, ""]) -> Params:
        """New parameters; may run inside jit, so that they are born sharded."""
        return _named(nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key)))))

    def __call__(self, params: Params) -> M:
        """The module with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._shapes)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def _named(tree: Any) -> Any:
    """Members of lists by their number as a name: a path is a path of names, and NNX takes either back."""
    return {str(key): _named(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def count_parameters(params: Params) -> int:
    """Number of values; works on shapes too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flat_paths(params: Params) -> dict[str, Any]:
    """Leaves by path, `encoder/layers/attention/out/kernel`."""
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def nested(leaves: Mapping[str, Any]) -> Params:
    """The tree of leaves by path: `flat_paths` backwards."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = leaf
    return tree
