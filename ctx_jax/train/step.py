"""One training step and one evaluation step: pure functions, jitted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ctx_jax.arrays import Batch
from ctx_jax.nn.parameters import Bound, Params

Sums = dict[str, Array]


class Objective(Protocol):
    """What a model is trained for; `objectives.mlm` says how the methods fit together."""

    def prepare(self, batch: Batch, seed: Int[Array, ""], arguments: Any) -> tuple[Any, Sums]:
        """Rows ready for the model, and the total weights of all of them."""

    def loss(
        self, model: nnx.Module, prepared: Any, totals: Sums, dropout_keys: Key[Array, "B"] | None
    ) -> tuple[Float[Array, ""], Sums]:
        """The rows' share of the loss, and sums for the log."""

    def target_counts(self, prepared: Any) -> Float[Array, "V"]:
        """How often each id is asked for."""


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any


def init_state(bound: Bound, transform: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """Fresh parameters and moments; jit it with `out_shardings`, so that both are born where they belong."""
    params = bound.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))


def row_keys(seed: int, step: Int[Array, ""], rows: int) -> Key[Array, "B"]:
    """A dropout key for each row of the global batch of a step."""
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(rows))


def make_train_step(
    bound: Bound,
    objective: Objective,
    transform: optax.GradientTransformation,
    *,
    mask_seed: int,
    dropout_seed: int,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Sums]]:
    """The step `(state, batch, arguments) → (state, sums)`, to be jitted with the state donated.

    Args:
      bound: the model.
      objective: what it learns.
      transform: what turns gradients into updates.
      mask_seed: the masks are drawn from it, the epoch and the example alone.
      dropout_seed: dropout is drawn from it, the step and the row alone.
      accumulate: micro-batches a step; divides B. The result is that of the whole batch: weights are counted over
        all of it first.
    """

    def step(state: TrainState, batch: Batch, arguments: Any) -> tuple[TrainState, Sums]:
        prepared, totals = objective.prepare(batch, jnp.int32(mask_seed), arguments)
        rows = batch.input_ids.shape[0]
        keys = row_keys(dropout_seed, state.step, rows)

        def loss(params: Params, part: tuple[Any, Array]) -> tuple[Array, Sums]:
            return objective.loss(bound(params), part[0], totals, part[1])

        gradient = jax.grad(loss, has_aux=True)
        if accumulate == 1:
            gradients, sums = gradient(state.params, (prepared, keys))
        else:
            # Micro-batch a takes rows a, a + A, …: of every device's rows the same share.
            split = lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
            parts = jax.tree.map(split, (prepared, keys))
            start = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts)),
            )
            add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(state.params, part)), None)
            (gradients, sums), _ = jax.lax.scan(add, start, parts)

        updates, optimizer = transform.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        sums |= {
            "gradient_norm": optax.tree.norm(gradients),
            "tokens": (batch.segment_ids > 0).sum().astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, optimizer), sums

    return step


def make_eval_step(
    bound: Bound, objective: Objective
) -> Callable[[Params, Batch, Int[Array, ""], Any], tuple[Sums, Float[Array, "V"]]]:
    """The step `(params, batch, seed, arguments) → (sums, counts of the targets by id)`, without dropout."""

    def step(params: Params, batch: Batch, seed: Array, arguments: Any) -> tuple[Sums, Array]:
        prepared, totals = objective.prepare(batch, seed, arguments)
        _, sums = objective.loss(bound(params), prepared, totals, None)
        return sums, objective.target_counts(prepared)

    return step
