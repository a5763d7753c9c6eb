"""The axes' letters and the records that flow through the library.

B batch (rows), T tokens of a row, C characters of a word, D width, H heads, V vocabulary, L layers, P predicted
positions of a row, S examples of a row (packing).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt


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
    """Vectors of a batch.

    Attributes:
      last: output of the last layer.
      layers: layer 0 is what enters the first layer, layer l the output of the l-th; None when not asked for.
      mask: True at tokens, False at padding.
    """

    last: Float[Array, "B T D"]
    layers: Float[Array, "L B T D"] | None
    mask: Bool[Array, "B T"]
