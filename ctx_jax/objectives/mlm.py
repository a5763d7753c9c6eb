"""Masked-language-model pre-training, alone or with next-sentence prediction (Devlin et al. 2019, section 3.1).

An objective has pure methods that run inside jit:

    prepared, totals = objective.prepare(batch, seed, objective.arguments)                 rows, and the weight of all
    loss, (sums, carry) = objective.loss(model, prepared, totals, carry, dropout_keys)     a part of the rows

`totals` covers the whole batch before it is split into micro-batches, so that adding the micro-batches' losses and
gradients gives those of the large batch. Nothing is carried from batch to batch here: the carry is ().
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ctx_jax.arrays import Batch, Masked
from ctx_jax.models.bert import BertWithHeads
from ctx_jax.objectives.masking import Unit, Vocabulary, draw_masks, prediction_counts, slots_needed

Sums = dict[str, Array]


class Prepared(NamedTuple):
    """Rows with their masks drawn."""

    batch: Batch
    masked: Masked


def softmax_cross_entropy(
    logits: Float[Array, "N V"], targets: Int[Array, "N"], weights: Float[Array, "N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(Σ weight · -log p(target), Σ weight · [target is the likeliest]), in float32."""
    correct = (_at(logits, targets) >= logits.max(1)).astype(jnp.float32)
    # Not vdot: matrix units would round its float32 operands (bfloat16 on a TPU).
    return (_losses(logits, targets) * weights).sum(), (correct * weights).sum()


def _at(logits: Float[Array, "N V"], targets: Int[Array, "N"]) -> Float[Array, "N"]:
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


@jax.custom_vjp
def _losses(logits: Float[Array, "N V"], targets: Int[Array, "N"]) -> Float[Array, "N"]:
    """-log p(target).

    The gradient is p less 1 at the target, in one pass over the logits; JAX's own adds to a copy of it in a second.
    """
    return _losses_forward(logits, targets)[0]


def _losses_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    total = jax.nn.logsumexp(logits, axis=1)
    return total - _at(logits, targets), (logits, targets, total)


def _losses_backward(residuals: tuple[Array, Array, Array], cotangent: Float[Array, "N"]) -> tuple[Array, None]:
    logits, targets, total = residuals
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    return (jnp.exp(logits - total[:, None]) - hit.astype(jnp.float32)) * cotangent[:, None], None


_losses.defvjp(_losses_forward, _losses_backward)


@dataclass(frozen=True)
class MaskedLM:
    """Settings of masked-language-model training."""

    rate: float = 0.15
    """Share of an example's tokens to predict."""
    max_predictions: int | None = None
    """At most so many in one example (`max_predictions_per_seq`)."""
    unit: Unit = "token"
    """Choose single tokens, whole words, or spans of words."""
    next_sentence: bool = False
    """Also tell whether B follows A; needs rows of pairs and a model with a pooler."""


class MaskedLMObjective:
    """Masked-language-model training on rows of one shape and one vocabulary.

    Attributes:
      config: settings.
      vocabulary: which ids are special, which go on with a word.
      slots: P, predictions that a row may hold.
      arguments: int32 [T + 1], how many tokens to predict in an example of n tokens.
    """

    def __init__(self, config: MaskedLM, vocabulary: Vocabulary, *, length: int, examples_per_row: int):
        self.config = config
        self.vocabulary = vocabulary
        self.arguments: Int[np.ndarray, "N"] = prediction_counts(config.rate, length, config.max_predictions)
        self.slots = slots_needed(self.arguments, examples_per_row)

    @staticmethod
    def start(rows: int) -> tuple[()]:
        """Nothing: no batch hands anything to the next."""
        del rows
        return ()

    def prepare(self, batch: Batch, seed: Int[Array, ""], arguments: Int[Array, "N"]) -> tuple[Prepared, Sums]:
        """Draws the masks of all rows and counts the predictions.

        Args:
          batch: rows.
          seed: of the masks.
          arguments: as the attribute, or for another rate: it does not recompile, but must not need more slots.
        """
        masked = draw_masks(batch, seed, arguments, self.vocabulary, slots=self.slots, unit=self.config.unit)
        totals = {"mlm": masked.weights.sum()}
        if self.config.next_sentence:
            totals["nsp"] = (batch.next_sentence >= 0).astype(jnp.float32).sum()
        return Prepared(batch, masked), totals

    def loss(
        self,
        model: BertWithHeads,
        prepared: Prepared,
        totals: Sums,
        carry: tuple[()] = (),
        dropout_keys: Key[Array, "B"] | None = None,
    ) -> tuple[Float[Array, ""], tuple[Sums, tuple[()]]]:
        """This part's share of the weighted mean over `totals`, and sums for the log.

        The vocabulary projection sees the P predicted positions of each row only.
        """
        batch, masked = prepared
        vectors = model.encoder(
            masked.input_ids, batch.token_type_ids, batch.segment_ids, batch.positions, dropout_keys=dropout_keys
        ).last
        predicted = jnp.take_along_axis(vectors, masked.positions[..., None], axis=1)
        logits = model.masked_lm_logits(predicted.reshape(-1, vectors.shape[-1]))
        loss, correct = softmax_cross_entropy(logits, masked.targets.reshape(-1), masked.weights.reshape(-1))
        sums = {"mlm_loss": loss, "mlm_correct": correct, "mlm_weight": masked.weights.sum()}
        mean = loss / jnp.maximum(totals["mlm"], 1.0)
        if self.config.next_sentence:
            nsp_loss, nsp_correct, nsp_weight = self._next_sentence(model, vectors, batch)
            sums |= {"nsp_loss": nsp_loss, "nsp_correct": nsp_correct, "nsp_weight": nsp_weight}
            mean = mean + nsp_loss / jnp.maximum(totals["nsp"], 1.0)
        return mean, (sums, carry)

    def evaluate(
        self, model: BertWithHeads, prepared: Prepared, totals: Sums, carry: tuple[()] = ()
    ) -> tuple[Sums, tuple[()]]:
        """The sums of `loss` without dropout."""
        return self.loss(model, prepared, totals, carry)[1]

    @staticmethod
    def count_tokens(batch: Batch) -> Float[Array, ""]:
        """Tokens that are not padding."""
        return (batch.segment_ids > 0).sum().astype(jnp.float32)

    def _next_sentence(
        self, model: BertWithHeads, vectors: Float[Array, "B T D"], batch: Batch
    ) -> tuple[Array, Array, Array]:
        """Loss, right answers and count over the examples that have a B."""
        segments = jnp.arange(1, batch.example_ids.shape[1] + 1)
        cls_at = jnp.argmax(batch.segment_ids[:, None, :] == segments[None, :, None], axis=2)
        cls = jnp.take_along_axis(vectors, cls_at[..., None], axis=1).reshape(-1, vectors.shape[-1])
        labels = batch.next_sentence.reshape(-1)
        weights = (labels >= 0).astype(jnp.float32)
        logits = model.next_sentence_logits(cls)
        return *softmax_cross_entropy(logits, jnp.maximum(labels, 0), weights), weights.sum()

    @staticmethod
    def means(sums: dict[str, float]) -> dict[str, float]:
        """What a log shows, from sums over any number of batches."""
        means = {}
        for name in ("mlm", "nsp"):
            if f"{name}_weight" in sums:
                weight = max(sums[f"{name}_weight"], 1.0)
                means[f"{name}_loss"] = sums[f"{name}_loss"] / weight
                means[f"{name}_accuracy"] = sums[f"{name}_correct"] / weight
        return means | {"loss": sum(v for k, v in means.items() if k.endswith("_loss"))}

    def target_counts(self, prepared: Prepared) -> Float[Array, "V"]:
        """How often each id is asked for: of these counts comes the unigram entropy."""
        return jnp.zeros(self.vocabulary.size).at[prepared.masked.targets].add(prepared.masked.weights)


def unigram_entropy(counts: Float[np.ndarray, "V"]) -> float:
    """Entropy in nats of a distribution given by counts: the loss of the best predictor that sees no context."""
    share = counts[counts > 0].astype(np.float64) / counts.sum(dtype=np.float64)
    return float(-(share * np.log(share)).sum())
