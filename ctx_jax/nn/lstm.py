"""LSTM with a projection (Sak et al. 2014), as tf.nn.rnn_cell.LSTMCell computes it with num_proj and both clips."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ctx_jax.nn.linear import matmul


class LSTMState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      cell: float32 [B, D], c.
      hidden: [B, P], the projected and clipped output, which is also the recurrent state.
    """

    cell: Float[Array, "B D"]
    hidden: Float[Array, "B P"]


def reverse_within(x: Float[Array, "B T ..."], lengths: Int[Array, "B"]) -> Float[Array, "B T ..."]:
    """Each row backwards over its own length; what lies behind it stays where it is. Twice is the identity."""
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1)
    from_ = jnp.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return jnp.take_along_axis(x, from_.reshape(*from_.shape, *(1,) * (x.ndim - 2)), axis=1)


class ProjectedLSTM(nnx.Module):
    """i, j, f, o = x W + h R + b; c ← clip(σ(f + 1) c + σ(i) tanh(j)); h ← clip(σ(o) tanh(c) V).

    The forget gate's 1 is added at run time and is not in the stored bias, as in TensorFlow.

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

    def zero_state(self, rows: int, dtype: jnp.dtype) -> LSTMState:
        """Where a text begins."""
        width, projection = self.projection.shape
        return LSTMState(jnp.zeros((rows, width)), jnp.zeros((rows, projection), dtype))

    def __call__(
        self, x: Float[Array, "B T K"], lengths: Int[Array, "B"], state: LSTMState, *, unroll: bool = False
    ) -> tuple[Float[Array, "B T P"], LSTMState]:
        """Runs over the rows.

        Args:
          x: inputs.
          lengths: steps of each row. Behind them the output is zero and the state stays as it is.
          state: to begin with.
          unroll: write the steps out one after the other.

        Returns:
          The hidden state of every step in x's type, and the state after each row's own last step.
        """
        rows, steps, _ = x.shape
        dtype = x.dtype
        # Time comes first, so that a step is one block; the products of all steps with W are one.
        flat = x.transpose(1, 0, 2).reshape(steps * rows, -1)
        matrix = lambda kernel: kernel[...].reshape(kernel.shape[0], -1).astype(dtype)
        kernel, recurrent = matrix(self.input_kernel), matrix(self.recurrent_kernel)
        gates = matmul(flat, kernel) + self.bias[...].reshape(1, -1)
        projection = self.projection[...].astype(dtype)
        alive = jax.lax.broadcasted_iota(jnp.int32, (steps, rows, 1), 0) < lengths.reshape(1, -1, 1)

        def step(state: LSTMState, inputs: tuple[Array, Array]) -> tuple[LSTMState, Array]:
            gates, alive = inputs
            i, j, f, o = jnp.split(gates + matmul(state.hidden, recurrent), 4, axis=1)
            cell = jax.nn.sigmoid(f + 1.0) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(j)
            if self.cell_clip is not None:
                cell = jnp.clip(cell, -self.cell_clip, self.cell_clip)
            hidden = matmul((jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(dtype), projection)
            if self.projection_clip is not None:
                hidden = jnp.clip(hidden, -self.projection_clip, self.projection_clip)
            hidden = hidden.astype(dtype)
            kept = LSTMState(jnp.where(alive, cell, state.cell), jnp.where(alive, hidden, state.hidden))
            return kept, jnp.where(alive, hidden, jnp.zeros((), dtype))

        state = LSTMState(state.cell.astype(jnp.float32), state.hidden.astype(dtype))
        state, hidden = jax.lax.scan(
            step, state, (gates.reshape(steps, rows, -1), alive), unroll=max(steps, 1) if unroll else 1
        )
        return hidden.transpose(1, 0, 2), state
