"""A stack of equal layers: built at once, run as a scan or unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ctx_jax.nn.linear import PRODUCT

Remat = Literal["none", "dots", "all"]


def build_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose parameters have a leading layer axis, each from a key of its own."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


@jax.named_scope("layers")
def run_layers(
    layers: nnx.Module,
    apply: Callable[[Any, Array, Array], Array],
    x: Float[Array, "B T D"],
    *,
    count: int,
    all_layers: bool = False,
    remat: Remat = "none",
    unroll: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None]:
    """Runs x through the layers, `apply(layer, x, index)` each.

    Args:
      layers: as `build_layers` makes them.
      apply: one layer.
      x: what enters the first layer.
      count: L; where only one layer is stored, it is run each time (Lan et al. 2020, section 3.1).
      all_layers: also return x and every layer's output, stacked (L + 1 of them). The last stays a value of its
        own: a training step that reads it out of the stack keeps the whole stack alive.
      remat: what the backward pass computes again: nothing, all but the matrix products, or everything.
      unroll: write the layers out one after the other; compiles longer.
    """
    stored = jax.tree.leaves(layers)[0].shape[0]
    if stored not in (1, count):
        raise ValueError(f"{stored} layers are stored, expected {count}, or one for all")
    shared = jax.tree.map(lambda leaf: leaf[0], layers) if stored < count else None

    def body(x: Array, layer_and_index: tuple[Any, Array]) -> tuple[Array, Array | None]:
        layer, index = layer_and_index
        y = apply(layer if shared is None else shared, x, index)
        return y, (y if all_layers else None)

    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if remat == "dots" else None
        body = jax.checkpoint(body, policy=policy, prevent_cse=unroll)
    scanned = (layers if shared is None else None, jnp.arange(count))
    last, outputs = jax.lax.scan(body, x, scanned, unroll=count if unroll else 1)
    return last, (jnp.concatenate([x[None], outputs]) if all_layers else None)
