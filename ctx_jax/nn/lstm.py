"""LSTM with a projection (Sak et al. 2014), as tf.nn.rnn_cell.LSTMCell computes it with num_proj and both clips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ctx_jax.kernels.division import rows_of_a_device
from ctx_jax.nn.linear import matmul

FORGET_BIAS = 1.0
"""Added to the forget gate when it is computed; the stored bias does not hold it (rnn_cell_impl.py, LSTMCell)."""


WORDS_AT_ONCE = 4096
"""Words whose gates a device has in memory at once in a forward pass: 268 MB at the original size. Gradients keep those
of all."""


class LSTMState(NamedTuple):
    """What one step hands to the next, in float32 whatever the type of the computation: cells add up many small steps,
    most of which bfloat16's eight bits would lose.

    Attributes:
      cell: c, after its clip.
      hidden: the projected and clipped output, without any skip connection.
    """

    cell: Float[Array, "B D"]
    hidden: Float[Array, "B P"]


class _Options(NamedTuple):
    cell_clip: float | None
    projection_clip: float | None
    unroll: int
    dtype: str


def reverse_within(x: Float[Array, "B T ..."], lengths: Int[Array, "B"]) -> Float[Array, "B T ..."]:
    """Each row backwards over its own length; what lies behind it stays where it is. Twice is the identity.

    Backward layers turn their input around, run forwards and turn their output back: such a model can be exported,
    where a scan in reverse cannot.
    """
    # Not jnp.arange: T may be symbolic.
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1)
    from_ = jnp.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return jnp.take_along_axis(x, from_.reshape(*from_.shape, *(1,) * (x.ndim - 2)), axis=1)


def _clip(x: Array, bound: float | None) -> Array:
    return x if bound is None else jnp.clip(x, -bound, bound)


def _cell(gates: Float[Array, "B G"], cell: Float[Array, "B D"], clip: float | None) -> tuple[Array, Array]:
    """The new cell, clipped, and the output before its projection; gates in the order i, j, f, o."""
    i, j, f, o = jnp.split(gates, 4, axis=-1)
    cell = _clip(jax.nn.sigmoid(f + FORGET_BIAS) * cell + jax.nn.sigmoid(i) * jnp.tanh(j), clip)
    return cell, jax.nn.sigmoid(o) * jnp.tanh(cell)


def _anew(state: LSTMState, begins: Bool[Array, "*T B"] | None) -> LSTMState:
    """The state, zero where a text begins."""
    return state if begins is None else LSTMState(*(jnp.where(begins[..., None], 0.0, x) for x in state))


class _Trace(NamedTuple):
    """What every step leaves for the backward pass: gates before their sigmoids, and the state after the step."""

    gates: Float[Array, "T B G"]
    cells: Float[Array, "T B D"]
    hiddens: Float[Array, "T B P"]


def _run(
    options: _Options,
    gates: Float[Array, "T B G"],
    alive: Bool[Array, "T B"],
    begins: Bool[Array, "T B"] | None,
    state: LSTMState,
    recurrent: Float[Array, "P G"],
    projection: Float[Array, "D P"],
    trace: bool,
) -> tuple[_Trace | Float[Array, "T B P"], LSTMState]:
    """The steps one after the other; the hidden vectors of all, or the whole trace; and the last state."""
    # Cast once, not every step.
    recurrent, projection = recurrent.astype(options.dtype), projection.astype(options.dtype)

    def step(state: LSTMState, inputs: tuple[Array, Array, Array | None]) -> tuple[LSTMState, _Trace | Array]:
        gates, alive, state = inputs[0], inputs[1][:, None], _anew(state, inputs[2])
        gates = gates + matmul(state.hidden.astype(options.dtype), recurrent)
        cell, output = _cell(gates, state.cell, options.cell_clip)
        hidden = _clip(matmul(output.astype(options.dtype), projection), options.projection_clip)
        state = LSTMState(jnp.where(alive, cell, state.cell), jnp.where(alive, hidden, state.hidden))
        return state, (_Trace(gates.astype(options.dtype), *state) if trace else state.hidden)

    last, steps = jax.lax.scan(step, state, (gates, alive, begins), unroll=options.unroll)
    return steps, last


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    options: _Options,
    gates: Array,
    alive: Array,
    begins: Array | None,
    state: LSTMState,
    recurrent: Array,
    projection: Array,
) -> tuple[Float[Array, "T B P"], LSTMState]:
    """Hidden vectors of all steps, and the last state, from what the inputs add to the gates.

    With a backward pass of its own: the derivative of a scan adds every step's share to a gradient as large as the
    weights, and so reads and writes it T times; here each weight's gradient is one product over all steps.
    """
    return _run(options, gates, alive, begins, state, recurrent, projection, trace=False)


def _recur_forward(options, gates, alive, begins, state, recurrent, projection):
    trace, last = _run(options, gates, alive, begins, state, recurrent, projection, trace=True)
    return (trace.hiddens, last), (trace, alive, begins, state, recurrent, projection)


def _recur_backward(options, residuals, cotangents):
    trace, alive, begins, state, recurrent, projection = residuals
    dhiddens, dlast = cotangents
    shifted = lambda first, steps: jnp.concatenate([first[None], steps[:-1]])
    before = _anew(LSTMState(shifted(state.cell, trace.cells), shifted(state.hidden, trace.hiddens)), begins)

    def dot(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
        a, b = a.astype(options.dtype), b.astype(options.dtype)
        return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)

    weights = recurrent.astype(options.dtype), projection.astype(options.dtype)

    def step(dnext: LSTMState, inputs: tuple[Array, ...]) -> tuple[LSTMState, tuple[Array, ...]]:
        dhidden, gates, cell, hidden, alive, begins = inputs
        alive = alive[:, None]
        dhidden = dhidden + dnext.hidden
        dprojected = jnp.where(alive, dhidden, 0.0)
        if options.projection_clip is not None:
            dprojected = jnp.where(jnp.abs(hidden) < options.projection_clip, dprojected, 0.0)
        forward = lambda gates, cell: _cell(gates, cell, options.cell_clip)
        (_, output), pull = jax.vjp(forward, gates.astype(jnp.float32), cell)
        dgates, dcell = pull((jnp.where(alive, dnext.cell, 0.0), dot(dprojected, weights[1], ((1,), (1,)))))
        dgates = jnp.where(alive, dgates, 0.0)
        dbefore = dot(dgates, weights[0], ((1,), (1,)))
        # A row that had ended handed its state on as it was.
        dstate = LSTMState(jnp.where(alive, dcell, dnext.cell), jnp.where(alive, dbefore, dhidden))
        return _anew(dstate, begins), (dgates, output.astype(options.dtype), dprojected)

    inputs = (dhiddens, trace.gates, before.cell, trace.hiddens, alive, begins)
    dfirst, (dgates, outputs, dprojected) = jax.lax.scan(step, dlast, inputs, reverse=True, unroll=options.unroll)
    all_steps = ((0, 1), (0, 1))
    drecurrent = dot(before.hidden, dgates, all_steps)
    return dgates, None, None, dfirst, drecurrent, dot(outputs, dprojected, all_steps)


_recur.defvjp(_recur_forward, _recur_backward)


def _in_spans(
    run: Callable[[LSTMState, Any], tuple[LSTMState, Array]], state: LSTMState, inputs: tuple[Array, Array, Any]
) -> tuple[LSTMState, Float[Array, "T B P"]]:
    """Runs as many steps at once as WORDS_AT_ONCE allows, span after span, and then what is left of them."""
    steps, rows = inputs[1].shape
    # A symbolic shape cannot be cut.
    if not (isinstance(steps, int) and isinstance(rows, int)):
        return run(state, inputs)
    rows = rows_of_a_device(rows)
    if steps * rows <= WORDS_AT_ONCE:
        return run(state, inputs)
    span = max(WORDS_AT_ONCE // rows, 1)
    whole = steps // span * span
    spans = jax.tree.map(lambda x: x[:whole].reshape(-1, span, *x.shape[1:]), inputs)
    state, hidden = jax.lax.scan(run, state, spans)
    hidden = hidden.reshape(whole, *hidden.shape[2:])
    if whole == steps:
        return state, hidden
    state, rest = run(state, jax.tree.map(lambda x: x[whole:], inputs))
    return state, jnp.concatenate([hidden, rest])


class ProjectedLSTM(nnx.Module):
    """i, j, f, o = x W + h R + b; c ← clip(σ(f + 1) c + σ(i) tanh(j)); h ← clip(σ(o) tanh(c) V).

    Attributes:
      input_kernel: W, float32 [K, 4, D], gates in the order i, j, f, o.
      recurrent_kernel: R, float32 [P, 4, D]. TensorFlow stores W over R as one matrix [K + P, 4 D].
      bias: b, float32 [4, D].
      projection: V, float32 [D, P], without a bias.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        projection: int,
        *,
        cell_clip: float | None,
        projection_clip: float | None,
        rngs: nnx.Rngs,
    ):
        self.cell_clip = cell_clip
        self.projection_clip = projection_clip
        # TensorFlow's default: Glorot's uniform distribution, of the one matrix that W and R are there.
        bound = (6 / (inputs + projection + 4 * width)) ** 0.5
        uniform = lambda shape, limit: jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit)
        self.input_kernel = nnx.Param(uniform((inputs, 4, width), bound))
        self.recurrent_kernel = nnx.Param(uniform((projection, 4, width), bound))
        self.bias = nnx.Param(jnp.zeros((4, width)))
        self.projection = nnx.Param(uniform((width, projection), (6 / (width + projection)) ** 0.5))

    def __call__(
        self,
        x: Float[Array, "B T K"],
        lengths: Int[Array, "B"],
        state: LSTMState,
        *,
        begins: Bool[Array, "B T"] | None = None,
        unroll: bool = False,
    ) -> tuple[Float[Array, "B T P"], LSTMState]:
        """Runs over the rows.

        Args:
          x: inputs, in the type of the computation.
          lengths: steps of each row. Behind them the output is zero and the state stays as it is.
          state: to begin with.
          begins: steps at which a text begins: the state before them is zero, whatever stands there. None where a row
            is one text.
          unroll: write the steps out one after the other.

        Returns:
          The hidden state of every step in x's type, and the state after each row's own last step.
        """
        rows, steps, _ = x.shape
        matrix = lambda kernel: kernel[...].reshape(kernel.shape[0], -1)
        options = _Options(self.cell_clip, self.projection_clip, max(steps, 1) if unroll else 1, x.dtype.name)

        def run(state: LSTMState, inputs: tuple[Array, Array, Array | None]) -> tuple[LSTMState, Float[Array, "S B P"]]:
            """Some steps: their products with W are one, which costs memory."""
            x, alive, begins = inputs
            with jax.named_scope("input products"):
                # Steps and rows stay apart: rows may be divided over devices, which know no part of their product.
                gates = matmul(x, matrix(self.input_kernel)) + self.bias[...].reshape(1, 1, -1)
            with jax.named_scope("recurrence"):
                hidden, state = _recur(
                    options, gates, alive, begins, state, matrix(self.recurrent_kernel), self.projection[...]
                )
            return state, jnp.where(alive[..., None], hidden, 0.0).astype(options.dtype)

        # Time comes first, so that a step is one block.
        alive = jax.lax.broadcasted_iota(jnp.int32, (steps, rows), 0) < lengths[None, :]
        inputs = x.transpose(1, 0, 2), alive, None if begins is None else begins.T & alive
        state, hidden = run(LSTMState(*state), inputs) if unroll else _in_spans(run, LSTMState(*state), inputs)
        return hidden.transpose(1, 0, 2), state
