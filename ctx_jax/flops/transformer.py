"""FLOPs of BERT's matrix products, by formula. 1 multiply-add = 2 FLOP.

Counted are matrix products only: per layer and row of T tokens, width D, feed-forward width F,

    query, key, value   3 · 2·T·D·D      scores    2·T·T·D      feed-forward   2 · 2·T·D·F
    output projection       2·T·D·D      context   2·T·T·D

and, for each of P predictions, 2·D·D + 2·D·V in the masked-LM head; for each of S examples 2·D·D in the pooler and
2·D·2 in the next-sentence classifier. Left out are look-ups, norms, activations, softmax, biases and dropout: less than
one per cent of BERT-base, and no device counts them towards its peak. A backward pass takes two products for each of
the forward pass: training is three times forward. Padding is counted: the device computes it.
"""

from __future__ import annotations

from ctx_jax.models.bert import BertConfig

TRAINING_FACTOR = 3


def bert_forward_flops(
    config: BertConfig, length: int, *, predictions: int = 0, examples: int = 0, next_sentence: bool = False
) -> dict[str, int]:
    """Forward FLOPs of one row, by part.

    Args:
      config: sizes.
      length: T.
      predictions: P, slots of the masked-LM head; 0 leaves the head out.
      examples: S, `[CLS]` vectors that are pooled; 0 leaves the pooler out.
      next_sentence: count the classifier on the pooled vectors too.
    """
    t, d, f, layers = length, config.hidden_size, config.intermediate_size, config.num_layers
    return {
        "attention projections": layers * 4 * 2 * t * d * d,
        "attention scores": layers * 2 * 2 * t * t * d,
        "feed-forward": layers * 2 * 2 * t * d * f,
        "masked-LM head": predictions * (2 * d * d + 2 * d * config.vocab_size),
        "pooler": examples * 2 * d * d,
        "next sentence": examples * 2 * d * 2 if next_sentence else 0,
    }
