"""The FLOPs that ELECTRA's paper compares models by (Clark et al. 2020, appendix), with its own conventions.

Its script, google-research/electra flops_computation.py, is what most later "pre-training FLOPs" tables descend from.
Its conventions differ from ours, and are kept here so that its table comes out to every digit:

- looking up an embedding counts as the dense product of a one-hot vector with the table, 2·e·v a token;
- training counts as twice the forward pass, not three times;
- dropout counts 4 FLOP a value, LayerNorm 5, softmax 5, an activation 8;
- the LayerNorm after attention counts 5 in all, not 5 a value (a slip, kept);
- the masked-LM head and its softmax count for the share of positions that are predicted.

ELMo and XLNet were not computed but counted by TensorFlow, per example, and are given as such. T5, the table's
one model with a decoder, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

DROPOUT, LAYER_NORM, ACTIVATION, SOFTMAX = 4, 5, 8, 5


@dataclass(frozen=True)
class ElectraCounts:
    """A transformer in the script's terms: width h, length s, vocabulary v, embedding width e, all in FLOP."""

    h: int
    layers: int
    s: int = 512
    v: int = 30522
    e: int | None = None
    heads: int | None = None
    predicted: float = 0.15625
    """Share of the positions that the head sees: 20 of 128."""
    sparse_lookup: bool = False
    """Do not count the look-up as a product."""

    @property
    def _e(self) -> int:
        return self.e or self.h

    def block(self) -> int:
        """One layer over one sequence."""
        h, s = self.h, self.s
        heads = self.heads or max(h // 64, 1)
        projections = 8 * h * h + 4 * h
        attention = 4 * h * s + (SOFTMAX + DROPOUT + 1) * s * heads
        feed_forward = 16 * h * h + (ACTIVATION + 1) * 4 * h + h
        residuals = 2 * (DROPOUT + 1) * h + LAYER_NORM * h + LAYER_NORM
        return s * (projections + attention + feed_forward + residuals)

    def embedding_in(self) -> int:
        """Token, type and position tables, LayerNorm, dropout, and the map from e to h where they differ."""
        e, s = self._e, self.s
        look_up = 0 if self.sparse_lookup else 2 * e * self.v
        factor = 2 * self.h * e + self.h if e != self.h else 0
        return s * (look_up + 2 * e * (s + 2) + 2 * e + (LAYER_NORM + DROPOUT) * e + factor)

    def embedding_out(self) -> float:
        """The masked-LM head over the predicted positions."""
        e, v = self._e, self.v
        hidden = 2 * self.h * e + e + (ACTIVATION + LAYER_NORM) * e
        return self.predicted * (2 * e * v + hidden + SOFTMAX * v + 2 * v) * self.s

    def binary_classifier(self) -> int:
        """ELECTRA's discriminator head over every position."""
        return self.s * (2 * self.h * self.h + (1 + ACTIVATION) * self.h + 2 * self.h)

    def inference(self) -> int:
        """Forward over one sequence, with the classifier."""
        return self.layers * self.block() + self.embedding_in() + self.binary_classifier()

    def training(self, batch_size: int, steps: float, *, discriminator: bool = False) -> float:
        """A whole pre-training: twice the forward pass, a step and a sequence."""
        head = self.binary_classifier() if discriminator else self.embedding_out()
        return 2 * batch_size * steps * (self.layers * self.block() + self.embedding_in() + head)


def _electra(
    h: int, layers: int, generator: int, batch_size: int, steps: float, s: int = 512, e: int | None = None
) -> float:
    """Discriminator and generator, whose embeddings are tied."""
    discriminator = ElectraCounts(h, layers, s=s, e=e).training(batch_size, steps, discriminator=True)
    return discriminator + ElectraCounts(generator, layers, s=s, e=e or h).training(batch_size, steps)


def training_flops() -> dict[str, float]:
    """FLOPs of whole pre-trainings by ELECTRA's conventions, by the names of its table."""
    return {
        # The 1 Billion Word Benchmark's 768,648,884 words, ten epochs; TensorFlow counted 568,093,262,680 FLOP for
        # 20 sentences of 128 words.
        "elmo": 2 * 10 * 768648884 * 568093262680 / (20.0 * 128),
        # TensorFlow counted 15,064,773,691,518 FLOP for 32 sequences.
        "xlnet": 2 * 500000 * 8192 * 15064773691518 / 32.0,
        "gpt": ElectraCounts(768, 12, v=40000, predicted=1.0).training(128, 960800),
        "bert_small": ElectraCounts(256, 12, e=128, s=128).training(128, 1.45e6),
        "bert_base": ElectraCounts(768, 12).training(256, 1e6),
        "bert_large": ElectraCounts(1024, 24).training(256, 1e6),
        "electra_small": _electra(256, 12, 64, 128, 1e6, s=128, e=128),
        "electra_base": _electra(768, 12, 256, 256, 766000),
        "electra_400k": _electra(1024, 24, 256, 2048, 400000),
        "electra_1.75M": _electra(1024, 24, 256, 2048, 1750000),
        "roberta": ElectraCounts(1024, 24, v=50265).training(8000, 500000),
        "albert": ElectraCounts(4096, 12, v=30000, e=128).training(4096, 1.5e6),
    }
