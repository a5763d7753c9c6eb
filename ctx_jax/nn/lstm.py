"""LSTM with a projection (Sak et al. 2014), as tf.nn.rnn_cell.LSTMCell computes it with num_proj and both clips."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ctx_jax.nn.linear import matmul

FORGET_BIAS = 1.0
"""Added to the forget gate when it is computed; the stored bias does not hold it (rnn_cell_impl.py, LSTMCell)."""


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


class _Trace(NamedTuple):
    """What every step leaves for the backward pass: gates before their sigmoids, and the state after the step."""

    gates: Float[Array, "T B G"]
    cells: Float[Array, "T B D"]
    hiddens: Float[Array, "T B P"]


def _run(
    options: _Options,
    gates: Float[Array, "T B G"],
    alive: Bool[Array, "T B"],
    state: LSTMState,
    recurrent: Float[Array, "P G"],
    projection: Float[Array, "D P"],
    trace: bool,
) -> tuple[_Trace | Float[Array, "T B P"], LSTMState]:
    """The steps one after the other; the hidden vectors of all, or the whole trace; and the last state."""
    # Cast once, not every step.
    recurrent, projection = recurrent.astype(options.dtype), projection.astype(options.dtype)

    def step(state: LSTMState, inputs: tuple[Array, Array]) -> tuple[LSTMState, _Trace | Array]:
        gates, alive = inputs[0], inputs[1][:, None]
        gates = gates + matmul(state.hidden.astype(options.dtype), recurrent)
        cell, output = _cell(gates, state.cell, options.cell_clip)
        hidden = _clip(matmul(output.astype(options.dtype), projection), options.projection_clip)
        state = LSTMState(jnp.where(alive, cell, state.cell), jnp.where(alive, hidden, state.hidden))
        return state, (_Trace(gates.astype(options.dtype), *state) if trace else state.hidden)

    last, steps = jax.lax.scan(step, state, (gates, alive), unroll=options.unroll)
    return steps, last


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    options: _Options, gates: Array, alive: Array, state: LSTMState, recurrent: Array, projection: Array
) -> tuple[Float[Array, "T B P"], LSTMState]:
    """Hidden vectors of all steps, and the last state, from what the inputs add to the gates.

    With a backward pass of its own: the derivative of a scan adds every step's share to a gradient as large as the
    weights, and so reads and writes it T times; here each weight's gradient is one product over all steps.
    """
    return _run(options, gates, alive, state, recurrent, projection, trace=False)


def _recur_forward(options, gates, alive, state, recurrent, projection):
    trace, last = _run(options, gates, alive, state, recurrent, projection, trace=True)
    return (trace.hiddens, last), (trace, alive, state, recurrent, projection)


def _recur_backward(options, residuals, cotangents):
    trace, alive, state, recurrent, projection = residuals
    dhiddens, dlast = cotangents
    before = lambda first, steps: jnp.concatenate([first[None], steps[:-1]])

    def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
        contract = ((axes[0],), (axes[1],))
        a, b = a.astype(options.dtype), b.astype(options.dtype)
        return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)

    weights = recurrent.astype(options.dtype), projection.astype(options.dtype)

    def step(dnext: LSTMState, inputs: tuple[Array, ...]) -> tuple[LSTMState, tuple[Array, ...]]:
        dhidden, gates, cell, hidden, alive = inputs
        alive = alive[:, None]
        dhidden = dhidden + dnext.hidden
        dprojected = jnp.where(alive, dhidden, 0.0)
        if options.projection_clip is not None:
            dprojected = jnp.where(jnp.abs(hidden) < options.projection_clip, dprojected, 0.0)
        forward = lambda gates, cell: _cell(gates, cell, options.cell_clip)
        (_, output), pull = jax.vjp(forward, gates.astype(jnp.float32), cell)
        dgates, dcell = pull((jnp.where(alive, dnext.cell, 0.0), dot(dprojected, weights[1], (1, 1))))
        dgates = jnp.where(alive, dgates, 0.0)
        dbefore = dot(dgates, weights[0], (1, 1))
        # A row that had ended handed its state on as it was.
        dstate = LSTMState(jnp.where(alive, dcell, dnext.cell), jnp.where(alive, dbefore, dhidden))
        return dstate, (dgates, output.astype(options.dtype), dprojected)

    inputs = (dhiddens, trace.gates, before(state.cell, trace.cells), trace.hiddens, alive)
    dfirst, (dgates, outputs, dprojected) = jax.lax.scan(step, dlast, inputs, reverse=True, unroll=options.unroll)
    rows = lambda x: x.reshape(-1, x.shape[-1])
    drecurrent = dot(rows(before(state.hidden, trace.hiddens)), rows(dgates), (0, 0))
    return dgates, None, dfirst, drecurrent, dot(rows(outputs), rows(dprojected), (0, 0))


_recur.defvjp(_recur_forward, _recur_backward)


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
        self, x: Float[Array, "B T K"], lengths: Int[Array, "B"], state: LSTMState, *, unroll: bool = False
    ) -> tuple[Float[Array, "B T P"], LSTMState]:
        """Runs over the rows.

        Args:
          x: inputs, in the type of the computation.
          lengths: steps of each row. Behind them the output is zero and the state stays as it is.
          state: to begin with.
          unroll: write the steps out one after the other.

        Returns:
          The hidden state of every step in x's type, and the state after each row's own last step.
        """
        rows, steps, width = x.shape
        matrix = lambda kernel: kernel[...].reshape(kernel.shape[0], -1)
        # Time comes first, so that a step is one block; the products of all steps with W are one.
        flat = x.transpose(1, 0, 2).reshape(steps * rows, width)
        gates = matmul(flat, matrix(self.input_kernel)) + self.bias[...].reshape(1, -1)
        alive = jax.lax.broadcasted_iota(jnp.int32, (steps, rows), 0) < lengths[None, :]
        options = _Options(self.cell_clip, self.projection_clip, max(steps, 1) if unroll else 1, x.dtype.name)
        hidden, state = _recur(
            options,
            gates.reshape(steps, rows, -1),
            alive,
            LSTMState(*state),
            matrix(self.recurrent_kernel),
            self.projection[...],
        )
        hidden = jnp.where(alive[..., None], hidden, 0.0).astype(x.dtype)
        return hidden.transpose(1, 0, 2), state
