"""ELMo (Peters et al. 2018): a character CNN and two stacks of LSTMs, as allenai/bilm-tf's model.py computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ctx_jax.arrays import Representations
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.models.heads import OutputTable
from ctx_jax.nn.char_cnn import ACTIVATIONS, CharCNN
from ctx_jax.nn.dropout import dropout, fold
from ctx_jax.nn.lstm import LSTMState, ProjectedLSTM, reverse_within

ORIGINAL_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))


@dataclass(frozen=True)
class ElmoConfig:
    """Sizes and choices of an ELMo, by the words of bilm-tf's options.json; the defaults are the original's."""

    filters: tuple[tuple[int, int], ...] = ORIGINAL_FILTERS
    """Width in characters and count of each convolution."""
    character_dim: int = 16
    """Width of a character's vector."""
    max_characters: int = 50
    """C, characters of a word, marks counted."""
    num_characters: int = 262
    """Character ids, 0 for absent words counted."""
    num_highway: int = 2
    """Highway layers over the convolutions."""
    activation: Literal["relu", "tanh"] = "relu"
    """After the maximum over the word."""
    lstm_dim: int = 4096
    """Width of an LSTM's cell."""
    projection_dim: int = 512
    """Width of a word's vector and of an LSTM's output; a direction has half of a layer."""
    num_layers: int = 2
    """L, LSTMs of a direction."""
    cell_clip: float | None = 3.0
    """Bound of the cell; None does not clip."""
    projection_clip: float | None = 3.0
    """Bound of the output; None does not clip."""
    skip_connections: bool = True
    """From the second LSTM on, add what enters it to what leaves it."""
    vocab_size: int = 793471
    """V, words that training predicts; all others are one, `<UNK>`. The encoder itself knows no words, and 0 is an ELMo
    without the output layer, as bilm-tf's were published."""
    dropout: float = 0.1
    """Of what enters each LSTM, and of what leaves the last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and states stay float32."""
    unroll: bool = False
    """Write the steps of the LSTMs out instead of scanning over them."""

    def __post_init__(self) -> None:
        least = {"character_dim": 1, "max_characters": 3, "num_highway": 0}
        least |= {"lstm_dim": 1, "projection_dim": 1, "num_layers": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"ElmoConfig.{name} is {getattr(self, name)}, expected at least {bound}")
        if self.vocab_size and self.vocab_size < 4:
            raise InputError(f"ElmoConfig.vocab_size is {self.vocab_size}, expected at least 4, or 0 for none")
        object.__setattr__(self, "filters", tuple(map(tuple, self.filters)))  # JSON has lists
        if not self.filters:
            raise InputError("ElmoConfig.filters is empty, expected at least one (width, count)")
        for width, count in self.filters:
            if not 1 <= width <= self.max_characters or count < 1:
                raise InputError(
                    f"ElmoConfig.filters: found ({width}, {count}), expected a width of 1 to {self.max_characters}"
                    " and a count of at least 1"
                )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"ElmoConfig.activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
                + did_you_mean(self.activation, ACTIVATIONS)
            )
        if self.num_characters < 262:
            raise InputError(
                f"ElmoConfig.num_characters is {self.num_characters}, expected at least 262: bytes, five marks and 0"
                " (published options say 261 and mean 262)"
            )
        for name in ("cell_clip", "projection_clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"ElmoConfig.{name} is {getattr(self, name)}, expected above 0, or None")
        if not 0 <= self.dropout < 1:
            raise InputError(f"ElmoConfig.dropout is {self.dropout}, expected at least 0 and below 1")


class ElmoState(NamedTuple):
    """Where each row's text stands: a state for each LSTM of each direction."""

    forward: tuple[LSTMState, ...]
    backward: tuple[LSTMState, ...]


def zero_state(config: ElmoConfig, rows: int) -> ElmoState:
    """The state at the beginning of so many texts."""
    zeros = lambda width: jnp.zeros((rows, width))
    state = lambda: LSTMState(zeros(config.lstm_dim), zeros(config.projection_dim))
    direction = lambda: tuple(state() for _ in range(config.num_layers))
    return ElmoState(direction(), direction())


class Elmo(nnx.Module):
    """The encoder: words from characters, then L LSTMs forwards and L backwards.

    Attributes:
      words: CharCNN.
      forward: LSTMs from the first word to the last.
      backward: LSTMs from the last word to the first.
    """

    def __init__(self, config: ElmoConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.words = CharCNN(
            num_characters=config.num_characters,
            character_dim=config.character_dim,
            filters=config.filters,
            num_highway=config.num_highway,
            projection_dim=config.projection_dim,
            activation=config.activation,
            rngs=rngs,
        )
        make = lambda: ProjectedLSTM(
            config.projection_dim,
            config.lstm_dim,
            config.projection_dim,
            cell_clip=config.cell_clip,
            projection_clip=config.projection_clip,
            rngs=rngs,
        )
        self.forward = nnx.List([make() for _ in range(config.num_layers)])
        self.backward = nnx.List([make() for _ in range(config.num_layers)])

    def __call__(
        self,
        char_ids: Int[Array, "B T C"],
        lengths: Int[Array, "B"] | None = None,
        state: ElmoState | None = None,
        *,
        dropout_keys: Key[Array, "B"] | None = None,
        all_layers: bool = True,
    ) -> tuple[Representations, ElmoState]:
        """Encodes rows of words.

        Args:
          char_ids: as `text.characters` makes them; `<S>` and `</S>` are words like others.
          lengths: words of each row; as many as have ids when None. What stands behind them is never seen.
          state: of the rows' texts so far; None begins each row anew, so that a sentence has the same vectors
            whatever was encoded before it.
          dropout_keys: a key for each row switches dropout on.
          all_layers: fill `Representations.layers`: 0 is the word's vector twice, l the l-th LSTMs' output, forwards
            and backwards side by side. Width 2 P.

        Returns:
          The layers in the computation's type, zero behind a row's length, and the state after each row's last word.
        """
        if lengths is None:
            lengths = (char_ids != 0).any(-1).sum(-1, dtype=jnp.int32)
        # Ids that are none, behind a row's length, would make the CNN's gradients NaN, though nobody reads the vectors.
        present = jax.lax.broadcasted_iota(jnp.int32, char_ids.shape, 1) < lengths[:, None, None]
        vectors = self.word_vectors(jnp.where(present, char_ids, jnp.zeros((), char_ids.dtype)))
        return self.contextualise(vectors, lengths, state, dropout_keys=dropout_keys, all_layers=all_layers)

    @jax.named_scope("layers")
    def contextualise(
        self,
        vectors: Float[Array, "B T P"],
        lengths: Int[Array, "B"],
        state: ElmoState | None = None,
        *,
        begins: Bool[Array, "B T"] | None = None,
        dropout_keys: Key[Array, "B"] | None = None,
        all_layers: bool = True,
    ) -> tuple[Representations, ElmoState]:
        """Runs both directions over word vectors, of which each distinct word's needs to be made only once.

        Args:
          vectors: of the words.
          lengths: as in the call, like dropout_keys and all_layers.
          state: of the text that a row begins with, and of the one that it ends with.
          begins: True at the first word of each further text of a row, when several stand in it one after the other.
            None of them sees another, in either direction.
          dropout_keys: a key for each row switches dropout on.
          all_layers: fill `Representations.layers`.
        """
        rows, steps, _ = vectors.shape
        state = zero_state(self.config, rows) if state is None else state
        mask = jax.lax.broadcasted_iota(jnp.int32, (rows, steps), 1) < lengths[:, None]
        # Absent words have vectors too, of nothing but biases.
        words = jnp.where(mask[..., None], vectors, jnp.zeros((), vectors.dtype))
        forward, forward_state = self.run(self.forward, words, lengths, state.forward, begins, fold(dropout_keys, 0))
        # Backwards a text begins at its last word.
        ends = None if begins is None else reverse_within(jnp.pad(begins[:, 1:], ((0, 0), (0, 1))), lengths)
        reversed_, backward_state = self.run(
            self.backward,
            reverse_within(words, lengths),
            lengths,
            state.backward,
            ends,
            fold(dropout_keys, 1),
        )
        backward = [reverse_within(x, lengths) for x in reversed_]
        both = [jnp.concatenate(pair, axis=-1) for pair in zip([words, *forward], [words, *backward], strict=True)]
        representations = Representations(both[-1], jnp.stack(both) if all_layers else None, mask)
        return representations, ElmoState(forward_state, backward_state)

    def word_vectors(self, char_ids: Int[Array, "B T C"]) -> Float[Array, "B T P"]:
        """The character CNN over every word."""
        rows, steps, characters = char_ids.shape
        return self.words(char_ids.reshape(-1, characters), self.config.dtype).reshape(rows, steps, -1)

    def run(
        self,
        lstms: nnx.List,
        x: Float[Array, "B T P"],
        lengths: Int[Array, "B"],
        states: tuple[LSTMState, ...],
        begins: Bool[Array, "B T"] | None = None,
        dropout_keys: Key[Array, "B"] | None = None,
    ) -> tuple[list[Float[Array, "B T P"]], tuple[LSTMState, ...]]:
        """One direction, in the order in which x stands: each LSTM's output, and the state after each row's length.

        What dropout leaves of an input enters both the LSTM and, where there is one, its skip connection.
        """
        outputs, after = [], []
        for layer, (lstm, state) in enumerate(zip(lstms, states, strict=True)):
            x = dropout(x, self.config.dropout, fold(dropout_keys, layer))
            y, state = lstm(x, lengths, state, begins=begins, unroll=self.config.unroll)
            x = x + y if self.config.skip_connections and layer else y
            outputs.append(x)
            after.append(state)
        return outputs, tuple(after)


class ElmoForPreTraining(nnx.Module):
    """ELMo with the output layer that its language models share.

    Attributes:
      encoder: Elmo.
      softmax: OutputTable; both directions predict with it, and the character CNN has nothing to do with it. None where
        the vocabulary is empty.
    """

    def __init__(self, config: ElmoConfig, *, rngs: nnx.Rngs):
        self.encoder = Elmo(config, rngs=rngs)
        self.softmax = OutputTable(config.vocab_size, config.projection_dim, rngs=rngs) if config.vocab_size else None


def without_ends(representations: Representations) -> Representations:
    """Rows without their first and last word, `<S>` and `</S>`: T is two less (bilm-tf's remove_bos_eos)."""
    last, layers, mask = representations.last[:, 1:-1], representations.layers, representations.mask[:, 2:]
    inside = lambda x: jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
    return Representations(inside(last), None if layers is None else inside(layers[:, :, 1:-1]), mask)
