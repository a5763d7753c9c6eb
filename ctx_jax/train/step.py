"""One training step and one evaluation step: pure functions, jitted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ctx_jax.nn.parameters import Bound, Params

Sums = dict[str, Array]


class Objective(Protocol):
    """What a model is trained for; `objectives.mlm` says how the methods fit together."""

    def start(self, rows: int) -> Any:
        """What the first batch of so many rows finds in the place of what a batch hands to the next: the carry, a
        pytree whose leaves have a row each for the batch's rows; () where rows have nothing to do with each other.
        """

    def prepare(self, batch: Any, seed: Int[Array, ""], arguments: Any) -> tuple[Any, Sums]:
        """Rows ready for the model, and the total weights of all of them."""

    def loss(
        self, model: nnx.Module, prepared: Any, totals: Sums, carry: Any, dropout_keys: Key[Array, "B"] | None
    ) -> tuple[Float[Array, ""], tuple[Sums, Any]]:
        """The rows' share of the loss, sums for the log, and the carry for the next batch."""

    def evaluate(self, model: nnx.Module, prepared: Any, totals: Sums, carry: Any) -> tuple[Sums, Any]:
        """Sums for the log, without dropout, and the carry for the next batch."""

    def count_tokens(self, batch: Any) -> Float[Array, ""]:
        """Tokens of a batch that are not padding."""

    def target_counts(self, prepared: Any) -> Float[Array, "V"]:
        """How often each id is asked for."""


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: steps taken.
      params: of the model.
      optimizer: moments.
      carry: what a batch hands to the next, see `Objective.start`.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    carry: Any = ()


def init_state(
    bound: Bound, transform: optax.GradientTransformation, key: Key[Array, ""], carry: Any = ()
) -> TrainState:
    """Fresh parameters and moments; jit it with `out_shardings`, so that both are born where they belong."""
    params = bound.init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params), carry)


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
    skip_non_finite: bool = False,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Sums]]:
    """The step `(state, batch, arguments) → (state, sums)`, to be jitted with the state donated.

    Args:
      bound: the model.
      objective: what it learns.
      transform: what turns gradients into updates.
      mask_seed: the masks are drawn from it, the epoch and the example alone.
      dropout_seed: dropout is drawn from it, the step and the row alone.
      accumulate: micro-batches a step; divides B. The result is that of the whole batch: weights are counted over
        all of it first.
      skip_non_finite: a step whose loss or gradient is not finite leaves parameters, moments and the optimizer's count
        as they were, and its sums say `skipped` 1 instead of 0. Rows whose carry is not finite begin anew.
    """

    def train_step(state: TrainState, batch: Any, arguments: Any) -> tuple[TrainState, Sums]:
        prepared, totals = objective.prepare(batch, jnp.int32(mask_seed), arguments)
        rows = jax.tree.leaves(batch)[0].shape[0]
        keys = row_keys(dropout_seed, state.step, rows)

        def loss(params: Params, part: tuple[Any, Any, Array]) -> tuple[Array, tuple[Sums, Any]]:
            prepared, carry, keys = part
            return objective.loss(bound(params), prepared, totals, carry, keys)

        gradient = jax.grad(loss, has_aux=True)
        if accumulate == 1:
            gradients, (sums, carry) = gradient(state.params, (prepared, state.carry, keys))
        else:
            # Micro-batch a takes rows a, a + A, …: of every device's rows the same share.
            split = lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
            parts = jax.tree.map(split, (prepared, state.carry, keys))

            def add(total: tuple[Params, Sums], part: Any) -> tuple[tuple[Params, Sums], Any]:
                gradients, (sums, carry) = gradient(state.params, part)
                return jax.tree.map(jnp.add, total, (gradients, sums)), carry

            shapes, (sums, _) = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts))
            start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, sums))
            (gradients, sums), carry = jax.lax.scan(add, start, parts)
            carry = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), carry)

        updates, optimizer = transform.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        sums |= {
            "gradient_norm": optax.tree.norm(gradients),
            "tokens": objective.count_tokens(batch),
        }
        if skip_non_finite:
            finite = jnp.all(jnp.stack([jnp.isfinite(value) for value in sums.values()]))
            before, after = (state.params, state.optimizer), (params, optimizer)
            params, optimizer = jax.tree.map(lambda old, new: jnp.where(finite, new, old), before, after)
            carry = _restarted(carry, objective.start(rows))
            sums |= {"skipped": 1.0 - finite.astype(jnp.float32)}
        return TrainState(state.step + 1, params, optimizer, carry), sums

    return train_step


def _restarted(carry: Any, start: Any) -> Any:
    """The carry, with the rows of it that are not finite as at the start.

    A row that is finite is right even when its step was skipped: it is what the parameters, which stay, made of the
    words that were read. One that is not finite has lost its past; what it came from may be what led to the overflow
    and would lead to it again, and it belongs to a place in the text one window back.
    """
    finite: Any = True
    for leaf in jax.tree.leaves(carry):
        finite = finite & jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    choose = lambda leaf, first: jnp.where(finite.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, first)
    return jax.tree.map(choose, carry, start)


def make_eval_step(
    bound: Bound, objective: Objective
) -> Callable[[Params, Any, Int[Array, ""], Any, Any], tuple[Sums, Float[Array, "V"], Any]]:
    """The step `(params, batch, seed, arguments, carry) → (sums, counts of the targets by id, carry)`."""

    def eval_step(params: Params, batch: Any, seed: Array, arguments: Any, carry: Any) -> tuple[Sums, Array, Any]:
        prepared, totals = objective.prepare(batch, seed, arguments)
        sums, carry = objective.evaluate(bound(params), prepared, totals, carry)
        return sums, objective.target_counts(prepared), carry

    return eval_step
