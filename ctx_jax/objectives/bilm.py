"""Bidirectional language-model training (Peters et al. 2018, section 3.1), as allenai/bilm-tf does it.

Each direction predicts the next word of its stream, with its state carried from window to window. In training the
softmax is sampled (Jean et al. 2015): the word asked for against S others, drawn once a step and direction and shared
by the batch, word k (by frequency) with probability p_k = log((k + 2) / (k + 1)) / log(V + 1). TensorFlow draws until
it has S different ones, and corrects each logit by the logarithm of how often its word was to be expected. The same
draw without a loop: every word waits an exponential time of rate p_k, and the first S to arrive are the sample. With τ
the time at which the next one arrives, a word is in the sample with probability 1 - exp(-p_k · τ), the expectation
(bottom-k sampling, Cohen and Kaplan 2007: sums over the sample with each term divided by it are unbiased).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ctx_jax.arrays import Windows
from ctx_jax.errors import InputError
from ctx_jax.models.elmo import Elmo, ElmoConfig, ElmoForPreTraining, ElmoState, zero_state
from ctx_jax.nn.dropout import dropout, fold
from ctx_jax.nn.linear import matmul

Sums = dict[str, Array]

DIRECTIONS = ("forward", "backward")
CHUNK = 8192
"""Words of the vocabulary whose logits are held at once in evaluation."""


@dataclass(frozen=True)
class BiLM:
    """Settings of bidirectional language-model training."""

    num_samples: int = 8192
    """S, words that each step's softmax is sampled with; at V or above the softmax is whole."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise InputError(f"BiLM.num_samples is {self.num_samples}, expected at least 1")


class Sample(NamedTuple):
    """Words that stand for the whole vocabulary.

    Attributes:
      ids: different from each other.
      log_expected: logarithm of each one's expected count.
      time: τ; of it follow the expected counts of words that are not in the sample.
    """

    ids: Int[Array, "S"]
    log_expected: Float[Array, "S"]
    time: Float[Array, ""]


class Lexicon(NamedTuple):
    """What training must know of a corpus' words.

    Attributes:
      characters: int16 [W, C], of the word that each id stands for.
      unknown: the id that words beyond the model's vocabulary are predicted as.
    """

    characters: Int[np.ndarray, "W C"]
    unknown: int


class Prepared(NamedTuple):
    """Windows with the characters of their words.

    Attributes:
      windows: as the loader makes them.
      forward_characters: of `forward_ids`.
      backward_characters: of `backward_ids`.
    """

    windows: Windows
    forward_characters: Int[Array, "B T C"]
    backward_characters: Int[Array, "B T C"]


def log_uniform(vocab_size: int) -> Float[np.ndarray, "V"]:
    """p_k, which falls about as words' frequencies do; sums to one."""
    ids = np.arange(vocab_size, dtype=np.float64)
    return np.log1p(1 / (ids + 1)) / np.log(vocab_size + 1)


def _log_expected(ids: Int[Array, "N"], time: Float[Array, ""], vocab_size: int) -> Float[Array, "N"]:
    """log(1 - exp(-p τ)), exact where p τ is small."""
    p = jnp.log1p(1 / (ids.astype(jnp.float32) + 1)) / jnp.log(jnp.float32(vocab_size + 1))
    return jnp.log(-jnp.expm1(-p * time))


def draw_sample(key: Key[Array, ""], vocab_size: int, size: int) -> Sample:
    """The first S words to arrive, see the module; S is less than V."""
    rates = jnp.asarray(log_uniform(vocab_size), jnp.float32)
    arrivals = jax.random.exponential(key, (vocab_size,)) / rates
    first, ids = jax.lax.top_k(-arrivals, size + 1)
    time = -first[-1]
    return Sample(ids[:-1], _log_expected(ids[:-1], time, vocab_size), time)


def sampled_losses(
    hidden: Float[Array, "N P"],
    targets: Int[Array, "N"],
    table: Float[Array, "V P"],
    bias: Float[Array, "V"],
    sample: Sample,
) -> Float[Array, "N"]:
    """-log of the target's share among itself and the sample, logits corrected by expected counts.

    A sampled word that is the target is left out of the sum (TensorFlow's `remove_accidental_hits`).
    """
    vocab_size = table.shape[0]
    rows = jnp.concatenate([targets, sample.ids])
    vectors, biases = table[rows], bias[rows]
    count = targets.shape[0]
    at_target = (hidden.astype(jnp.float32) * vectors[:count]).sum(1) + biases[:count]
    at_target = at_target - _log_expected(targets, sample.time, vocab_size)
    others = matmul(hidden, vectors[count:].T) + (biases[count:] - sample.log_expected).reshape(1, -1)
    others = jnp.where(sample.ids[None, :] == targets[:, None], -jnp.inf, others)
    return jnp.logaddexp(jax.nn.logsumexp(others, axis=1), at_target) - at_target


def whole_losses(
    hidden: Float[Array, "N P"], targets: Int[Array, "N"], table: Float[Array, "V P"], bias: Float[Array, "V"]
) -> Float[Array, "N"]:
    """-log softmax at the target over the whole vocabulary, whose logits are made CHUNK words at a time."""
    vocab_size, width = table.shape
    chunk = min(CHUNK, vocab_size)
    short = -vocab_size % chunk
    tables = jnp.pad(table, ((0, short), (0, 0))).reshape(-1, chunk, width)
    biases = jnp.pad(bias, (0, short), constant_values=-jnp.inf).reshape(-1, chunk)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        logits = matmul(hidden, part[0].T) + part[1].reshape(1, -1)
        return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1)), None

    start = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    total, _ = jax.lax.scan(jax.checkpoint(add), start, (tables, biases))
    return total - (hidden.astype(jnp.float32) * table[targets]).sum(1) - bias[targets]


class BiLMObjective:
    """Bidirectional language-model training on streams.

    Attributes:
      config: settings.
      model: sizes.
      unknown: as in the lexicon.
      arguments: the lexicon's characters.
    """

    def __init__(self, config: BiLM, model: ElmoConfig, lexicon: Lexicon):
        self.config = config
        self.model = model
        self.unknown = lexicon.unknown
        self.arguments = lexicon.characters

    def start(self, rows: int) -> ElmoState:
        """What the first window of each stream begins with: zeros."""
        return zero_state(self.model, rows)

    def prepare(self, windows: Windows, seed: Int[Array, ""], characters: Int[Array, "W C"]) -> tuple[Prepared, Sums]:
        """Looks the words' characters up, and counts the words of all rows."""
        windows = Windows(*map(jnp.asarray, windows))
        totals = {
            "words": windows.lengths.sum().astype(jnp.float32),
            "seed": jnp.asarray(seed),
            "number": windows.numbers[0],
        }
        characters = jnp.asarray(characters)
        return Prepared(windows, characters[windows.forward_ids], characters[windows.backward_ids]), totals

    def loss(
        self,
        model: ElmoForPreTraining,
        prepared: Prepared,
        totals: Sums,
        carry: ElmoState,
        dropout_keys: Key[Array, "B"] | None = None,
    ) -> tuple[Float[Array, ""], tuple[Sums, ElmoState]]:
        """This part's share of the mean loss of both directions; sums for the log; the state for the next windows."""
        outputs, carry = self._outputs(model.encoder, prepared, carry, dropout_keys)
        vocab_size, samples = self.model.vocab_size, self.config.num_samples
        table, bias = model.softmax.table[...], model.softmax.bias[...]
        step_key = jax.random.fold_in(jax.random.key(totals["seed"], impl="threefry2x32"), totals["number"])
        losses = []
        for number, (hidden, targets) in enumerate(outputs):
            if samples < vocab_size:
                sample = draw_sample(jax.random.fold_in(step_key, number), vocab_size, samples)
                losses.append(sampled_losses(hidden, targets, table, bias, sample))
            else:
                losses.append(whole_losses(hidden, targets, table, bias))
        sums = self._sums(prepared, losses)
        total = (sums["forward_loss"] + sums["backward_loss"]) / 2
        return total / jnp.maximum(totals["words"], 1.0), (sums, carry)

    def evaluate(
        self, model: ElmoForPreTraining, prepared: Prepared, totals: Sums, carry: ElmoState
    ) -> tuple[Sums, ElmoState]:
        """Sums with the whole softmax, and the state for the next windows."""
        outputs, carry = self._outputs(model.encoder, prepared, carry, None)
        table, bias = model.softmax.table[...], model.softmax.bias[...]
        return self._sums(prepared, [whole_losses(*output, table, bias) for output in outputs]), carry

    def _outputs(
        self, encoder: Elmo, prepared: Prepared, carry: ElmoState, keys: Key[Array, "B"] | None
    ) -> tuple[list[tuple[Float[Array, "N P"], Int[Array, "N"]]], ElmoState]:
        """For each direction the last LSTM's output at every word, and the word that is asked for there."""
        windows = prepared.windows
        length = windows.forward_ids.shape[1]
        # One pass of the character CNN for both directions. They lie behind each other in their rows: rows are divided
        # over devices, and would have to move if they were put together.
        both = jnp.concatenate([prepared.forward_characters, prepared.backward_characters], axis=1)
        vectors = encoder.word_vectors(both)
        found, states = [], []
        for number, (lstms, state, targets) in enumerate(
            (
                (encoder.forward, carry.forward, windows.forward_targets),
                (encoder.backward, carry.backward, windows.backward_targets),
            )
        ):
            own = fold(keys, number)
            x = vectors[:, number * length : (number + 1) * length]
            outputs, after = encoder.run(lstms, x, windows.lengths, state, dropout_keys=own)
            hidden = dropout(outputs[-1], self.model.dropout, fold(own, self.model.num_layers))
            known = jnp.where(targets < self.model.vocab_size, targets, self.unknown)
            found.append((hidden.reshape(-1, hidden.shape[-1]), known.reshape(-1)))
            states.append(after)
        return found, ElmoState(*states)

    def _sums(self, prepared: Prepared, losses: list[Float[Array, "N"]]) -> Sums:
        weights = self._inside(prepared).reshape(-1).astype(jnp.float32)
        sums = {f"{name}_loss": (loss * weights).sum() for name, loss in zip(DIRECTIONS, losses, strict=True)}
        return sums | {"words": weights.sum()}

    @staticmethod
    def _inside(prepared: Prepared) -> Bool[Array, "B T"]:
        windows = prepared.windows
        place = jax.lax.broadcasted_iota(jnp.int32, windows.forward_ids.shape, 1)
        return place < windows.lengths[:, None]

    @staticmethod
    def count_tokens(windows: Windows) -> Float[Array, ""]:
        """Words of a batch; each is read in both directions."""
        return windows.lengths.sum().astype(jnp.float32)

    @staticmethod
    def means(sums: dict[str, float]) -> dict[str, float]:
        """What a log shows: nats a word and perplexities. Under a sampled softmax they are those of the sample."""
        words = max(sums["words"], 1.0)
        means = {f"{name}_loss": sums[f"{name}_loss"] / words for name in DIRECTIONS}
        loss = sum(means.values()) / 2
        perplexities = {f"{name}_perplexity": _exp(means[f"{name}_loss"]) for name in DIRECTIONS}
        return means | {"loss": loss} | perplexities | {"perplexity": _exp(loss)}

    def target_counts(self, prepared: Prepared) -> Float[Array, "V"]:
        """How often each word is asked for, forwards."""
        targets = prepared.windows.forward_targets
        known = jnp.where(targets < self.model.vocab_size, targets, self.unknown)
        return jnp.zeros(self.model.vocab_size).at[known].add(self._inside(prepared).astype(jnp.float32))


def _exp(loss: float) -> float:
    return float(np.exp(min(loss, 700.0)))
