"""The axes' letters and the records that flow through the library.

B batch (rows), T tokens of a row, C characters of a word, D width, H heads, V vocabulary, L layers, P predicted
positions of a row, S examples of a row (packing).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from ctx_jax.errors import InputError


class Batch(NamedTuple):
    """Rows as the loader makes them. A row holds S examples end to end, or one (S = 1), then padding.

    An example is `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`. Examples of a row never see each other.

    Attributes:
      input_ids: ids, padding included.
      token_type_ids: 0 in A, 1 in B (with the `[SEP]` that ends it).
      segment_ids: which example of its row a token belongs to, from 1; 0 is padding.
      positions: position within the example, from 0.
      example_ids: what the masks of an example are drawn from, with the epoch; unused places hold 0.
      epochs: epoch of the row.
      next_sentence: 1 where B is a random text, 0 where it follows A (the original's `next_sentence_labels`),
        -1 where there is no B or no example.
    """

    input_ids: Int[Array, "B T"]
    token_type_ids: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    example_ids: UInt[Array, "B S"]
    epochs: UInt[Array, "B"]
    next_sentence: Int[Array, "B S"]


class Windows(NamedTuple):
    """Windows of a recurrent language model's streams, one a row; the state of a row goes on from window to window.

    The two directions read the same sentences, each in its own order, `<S>` or `</S>` first.

    Attributes:
      forward_ids: words that the forward direction reads.
      forward_targets: the word after each.
      backward_ids: words that the backward direction reads.
      backward_targets: the word before each in the text.
      lengths: how many words of a row there are; T but at the end of a split.
      numbers: how many windows each stream has read before, the same for all rows: random draws depend on it.
    """

    forward_ids: Int[Array, "B T"]
    forward_targets: Int[Array, "B T"]
    backward_ids: Int[Array, "B T"]
    backward_targets: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    numbers: UInt[Array, "B"]


class Masked(NamedTuple):
    """What masked-language-model training feeds and asks for.

    Attributes:
      input_ids: ids with the chosen tokens replaced.
      positions: where predictions are made; unused slots point at 0 and weigh nothing.
      targets: the ids that stood there.
      weights: 1 for a prediction, 0 for an unused slot.
    """

    input_ids: Int[Array, "B T"]
    positions: Int[Array, "B P"]
    targets: Int[Array, "B P"]
    weights: Float[Array, "B P"]


class Representations(NamedTuple):
    """Vectors of a batch: what a model returns inside jit and, on the host and with the tokens, what `Encoder` returns.

    Attributes:
      last: output of the last layer.
      layers: layer 0 is what enters the first layer, layer l the output of the l-th; L layers make L + 1 of them, or as
        many as were asked for. None when not asked for.
      mask: True at tokens, False at padding.
      tokens: of each row, special ones included; None where ids were given, and inside jit.
      word_ids: the word of its row that a token belongs to, -1 at special tokens and padding; None like `tokens`.
      num_words: how many words each row has, those without a token counted; None like `tokens`.
      texts: index of the text that a row comes from, where long texts were split; None like `tokens`.
      first_words: of each row, which word of its text it counts as 0: later rows of a split text begin further on; None
        like `tokens`.
      numbers: of `layers`, where only some were asked for; the last of all is `last` only if it is one of them.
    """

    last: Float[Array, "B T D"]
    layers: Float[Array, "L B T D"] | None
    mask: Bool[Array, "B T"]
    tokens: tuple[tuple[str, ...], ...] | None = None
    word_ids: Int[np.ndarray, "B T"] | None = None
    num_words: tuple[int, ...] | None = None
    texts: tuple[int, ...] | None = None
    first_words: tuple[int, ...] | None = None
    numbers: tuple[int, ...] | None = None

    def layer(self, layer: int) -> Float[Array, "B T D"]:
        """Output of one layer; negative numbers count from the last.

        Raises:
          InputError: there is no such layer, or layers were not asked for.
        """
        if layer == -1 and self.last is not None:
            return self.last
        if self.numbers is not None:
            if layer not in self.numbers:
                raise InputError(f"layer {layer}: expected one of those that were asked for, {self.numbers}")
            return self.layers[self.numbers.index(layer)]
        if self.layers is None:
            raise InputError(f"layer {layer}: only the last layer was computed; encode with layers='all'")
        if not -len(self.layers) <= layer < len(self.layers):
            raise InputError(f"layer {layer}: expected 0 to {len(self.layers) - 1}, or -{len(self.layers)} to -1")
        return self.layers[layer]

    def sentences(self, pool: Literal["mean", "cls", "max"] = "mean", *, layer: int = -1) -> Float[Array, "B D"]:
        """One vector a row: the mean or the maximum over its tokens, special ones included, or the first token's."""
        vectors, mask = np.asarray(self.layer(layer)), np.asarray(self.mask)[..., None]
        if pool == "mean":
            return np.where(mask, vectors, 0).sum(1) / np.maximum(mask.sum(1), 1).astype(vectors.dtype)
        if pool == "max":
            return np.where(mask.any(1), np.where(mask, vectors, -np.inf).max(1, initial=-np.inf), 0)
        if pool == "cls":
            return vectors[:, 0]
        raise InputError(f"pool: found {pool!r}, expected 'mean', 'cls' or 'max'")

    def mix(self, weights: Float[np.ndarray, "L"], *, gamma: float = 1.0) -> Float[np.ndarray, "B T D"]:
        """γ Σ softmax(weights)ₗ · layer l: all layers as one (Peters et al. 2018, equation 1).

        Raises:
          InputError: there is not a weight for each layer.
        """
        weights = np.asarray(weights, np.float64)
        count = None if self.layers is None else len(self.layers)
        if weights.shape != (count,):
            raise InputError(f"weights: found shape {list(weights.shape)}, expected one for each of {count} layers")
        shares = np.exp(weights - weights.max())
        shares = (gamma * shares / shares.sum()).astype(np.float32)
        return np.tensordot(shares, np.asarray(self.layers), axes=1)

    def words(
        self, *, layer: int = -1, pool: Literal["mean", "first", "last"] = "mean"
    ) -> list[Float[np.ndarray, "W D"]]:
        """Vectors of the words of each row, pooled over their sub-words; zeros for a word that has none.

        Words are those that were given, or the tokenizer's own where strings were. The rows of a split text have each
        the words that they hold, whole or in part.
        """
        if self.word_ids is None:
            raise InputError("words: ids were given, and nobody said where their words begin; encode texts instead")
        if pool not in ("mean", "first", "last"):
            raise InputError(f"pool: found {pool!r}, expected 'mean', 'first' or 'last'")
        result = []
        for vectors, ids, count in zip(np.asarray(self.layer(layer)), self.word_ids, self.num_words, strict=True):
            inside = np.flatnonzero(ids >= 0)
            words = ids[inside]
            pooled = np.zeros((count, vectors.shape[-1]), vectors.dtype)
            if pool == "mean":
                np.add.at(pooled, words, vectors[inside])
                pooled /= np.maximum(np.bincount(words, minlength=count), 1)[:, None].astype(vectors.dtype)
            else:
                # Of several assignments to one place the last stays.
                order = slice(None, None, -1 if pool == "first" else 1)
                pooled[words[order]] = vectors[inside[order]]
            result.append(pooled)
        return result
