"""Which tokens a masked language model must predict, drawn on the device inside the jitted step.

The rule is Google's (create_pretraining_data.py, create_masked_lm_predictions): of an example of n tokens,
`min(max_predictions, max(1, round(n · rate)))` are chosen without replacement, never a special token; of the chosen
80 % become [MASK], 10 % a random token, 10 % stay. Two things differ, both on purpose: special tokens are never drawn
as random tokens (the original draws from the whole vocabulary), and all draws depend on (seed, epoch, example id,
position in the example) alone, not on the order of the data.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from ctx_jax.arrays import Batch, Masked
from ctx_jax.errors import InputError

Unit = Literal["token", "word", "span"]

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1

SPAN_BREAK, MAX_SPAN_WORDS = 0.2, 10
"""Spans end after each word with probability 0.2 (mean 5 words before clipping), at 10 words at the latest: SpanBERT
(Joshi et al. 2020, section 3.1)."""


class Vocabulary(NamedTuple):
    """What masking must know of a vocabulary.

    Attributes:
      size: V.
      mask_id: id of [MASK].
      special_ids: ids that are never chosen and never drawn as a random token, ascending.
      continues_word: bool [V], True for pieces that go on with the word before them.
    """

    size: int
    mask_id: int
    special_ids: tuple[int, ...]
    continues_word: Bool[Array, "V"] | np.ndarray


def prediction_counts(rate: float, max_length: int, max_predictions: int | None = None) -> Int[np.ndarray, "N"]:
    """How many tokens are chosen of an example of n tokens, special ones counted, for n = 0 … max_length.

    Computed on the host in float64, as the original does, with Python's rounding of halves to even, and handed to the
    step as an array: another rate is another array, not another compilation. (In float32, 190 · 0.15 already rounds
    the other way.)
    """
    if not 0 < rate < 1:
        raise InputError(f"masking rate is {rate}, expected above 0 and below 1")
    limit = max_length if max_predictions is None else max_predictions
    counts = [min(limit, max(1, round(n * rate))) for n in range(max_length + 1)]
    return np.array([0, *counts[1:]], np.int32)


def slots_needed(counts: Int[np.ndarray, "N"], examples_per_row: int) -> int:
    """The most predictions that a row can hold, whatever the lengths of its examples: the static P."""
    best = counts.astype(np.int64)
    for _ in range(examples_per_row - 1):
        best = np.array([(counts[: n + 1] + best[n::-1]).max() for n in range(len(counts))])
    return int(best.max())


def _groups(
    unit: Unit, maskable: Array, starts_word: Array, segment_ids: Array, bits: UInt[Array, "B T"]
) -> Int[Array, "B T"]:
    """For each token the index of the first token of its group; a group is chosen or left as a whole."""
    index = jnp.broadcast_to(jnp.arange(maskable.shape[1])[None, :], maskable.shape)
    if unit == "token":
        return index
    before = jnp.pad(maskable[:, :-1], ((0, 0), (1, 0)))
    edge = maskable & ~(before & (segment_ids == jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))))
    start = maskable & (starts_word | edge)
    if unit == "span":
        breaks = start & (edge | (bits < jnp.uint32(SPAN_BREAK * 2**32)))
        word = jnp.cumsum(start, axis=1)
        first_word = jax.lax.cummax(jnp.where(breaks, word, 0), axis=1)
        start = breaks | (start & ((word - first_word) % MAX_SPAN_WORDS == 0))
    return jax.lax.cummax(jnp.where(start, index, 0), axis=1)


def _choose(
    maskable: Array,
    group: Array,
    segment_ids: Array,
    score: UInt[Array, "B T"],
    counts: Int[Array, "B S"],
    *,
    single: bool,
) -> Bool[Array, "B T"]:
    """Takes groups in the order of their scores as long as they fit into the example's count, as the original does:
    a group that is too large is passed over, smaller ones after it are still taken.
    """
    num_segments = counts.shape[1]
    index = jnp.broadcast_to(jnp.arange(maskable.shape[1])[None, :], maskable.shape)
    # Tokens that cannot be chosen sort behind all others.
    segment = jnp.where(maskable, segment_ids - 1, num_segments)
    segment, _, group, index = jax.lax.sort(
        (segment, jnp.take_along_axis(score, group, axis=1), group, index), dimension=1, num_keys=4
    )
    same = lambda x: jnp.pad(x[:, 1:] == x[:, :-1], ((0, 0), (1, 0)))
    first = (~same(segment) | ~same(group)) & (segment < num_segments)
    # A group's size stands at its first token: the distance to where the next one begins.
    length = maskable.shape[1]
    place = jnp.arange(length)[None, :]
    starts = jnp.where(first | (segment == num_segments), place, length)
    following = jax.lax.cummin(jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length), axis=1, reverse=True)
    size = jnp.where(first, following - place, 0)

    member = jax.nn.one_hot(segment, num_segments, dtype=jnp.int32)  # [B T S]

    def remaining_at(remaining: Array) -> Array:
        return jnp.einsum("bts,bs->bt", member, remaining)

    def take(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        open_, taken, remaining = state
        sizes = jnp.where(open_, size, 0)
        running = jnp.einsum("bts,bts->bt", member, jnp.cumsum(member * sizes[..., None], axis=1))
        now = open_ & (running <= remaining_at(remaining))
        remaining = remaining - jnp.einsum("bts,bt->bs", member, jnp.where(now, size, 0))
        taken = taken | now
        return open_ & ~now & (size <= remaining_at(remaining)), taken, remaining

    remaining = counts.astype(jnp.int32)
    open_ = first & (size <= remaining_at(remaining))
    state = open_, jnp.zeros_like(open_), remaining
    # Of single tokens the first pass takes all: no loop, whose end the devices would have to agree on at every trip.
    state = take(state) if single else jax.lax.while_loop(lambda state: state[0].any(), take, state)
    taken = state[1]
    # Whole groups: the first token's fate is that of the run it begins.
    run = jax.lax.cummax(jnp.where(first, place, 0), axis=1)
    chosen = jnp.take_along_axis(taken, run, axis=1) & (segment < num_segments)
    return jnp.zeros_like(maskable).at[jnp.arange(maskable.shape[0])[:, None], index].set(chosen)


def _random_ids(keys: Key[Array, "B P"], vocabulary: Vocabulary) -> Int[Array, "B P"]:
    """Uniform over the ids that are not special."""
    draw = lambda key: jax.random.randint(key, (), 0, vocabulary.size - len(vocabulary.special_ids))
    ids = jax.vmap(jax.vmap(draw))(keys)
    for special in vocabulary.special_ids:
        ids = ids + (ids >= special).astype(ids.dtype)
    return ids


def draw_masks(
    batch: Batch,
    seed: Int[Array, ""],
    counts: Int[Array, "N"],
    vocabulary: Vocabulary,
    *,
    slots: int,
    unit: Unit = "token",
) -> Masked:
    """Chooses, replaces and gathers.

    Args:
      batch: rows of S examples.
      seed: of the run; the masks of an example depend on (seed, its row's epoch, its id) and on nothing else.
      counts: `prediction_counts(...)`, at least as long as the longest example.
      vocabulary: ids to spare and, for words and spans, which pieces go on with a word.
      slots: P, at least `slots_needed(counts, S)`: nothing may be dropped.
      unit: choose single tokens, whole words (the original's `do_whole_word_mask`) or spans of words.

    Returns:
      Rows with tokens replaced, and the predictions in the order of their positions.
    """
    batch = Batch(*map(jnp.asarray, batch))
    segment_ids = batch.segment_ids
    num_segments = batch.example_ids.shape[1]
    special = jnp.isin(batch.input_ids, jnp.array(vocabulary.special_ids, batch.input_ids.dtype))
    maskable = (segment_ids > 0) & ~special

    def example_key(epoch: Array, example: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), epoch), example)

    example_keys = jax.vmap(jax.vmap(example_key, in_axes=(None, 0)))(batch.epochs, batch.example_ids)
    keys = jnp.take_along_axis(example_keys, jnp.maximum(segment_ids - 1, 0), axis=1)
    keys = jax.vmap(jax.vmap(jax.random.fold_in))(keys, batch.positions)
    bits = jax.random.key_data(keys)

    starts_word = ~jnp.asarray(vocabulary.continues_word)[batch.input_ids]
    group = _groups(unit, maskable, starts_word, segment_ids, bits[..., 1])
    lengths = jax.nn.one_hot(segment_ids - 1, num_segments, dtype=jnp.int32).sum(1)
    counts = jnp.asarray(counts)[lengths]
    chosen = _choose(maskable, group, segment_ids, bits[..., 0], counts, single=unit == "token")

    index = jnp.broadcast_to(jnp.arange(chosen.shape[1])[None, :], chosen.shape)
    ordered = jnp.sort(jnp.where(chosen, index, chosen.shape[1]), axis=1)[:, :slots]
    ordered = jnp.pad(ordered, ((0, 0), (0, slots - ordered.shape[1])), constant_values=chosen.shape[1])
    used = ordered < chosen.shape[1]
    positions = jnp.where(used, ordered, 0)

    here = jnp.take_along_axis(keys, positions, axis=1)
    # One fate for a whole span (SpanBERT), one for each token of a word (Google's whole-word masking).
    fate_at = jnp.take_along_axis(group, positions, axis=1) if unit == "span" else positions
    fate_keys = jnp.take_along_axis(keys, fate_at, axis=1)
    fate = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))(fate_keys)
    drawn = _random_ids(jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, 2)))(here), vocabulary)

    targets = jnp.take_along_axis(batch.input_ids, positions, axis=1)
    replacement = jnp.where(
        fate < MASK_SHARE, vocabulary.mask_id, jnp.where(fate < MASK_SHARE + RANDOM_SHARE, drawn, targets)
    ).astype(targets.dtype)
    rows = jnp.arange(chosen.shape[0])[:, None]
    # Unused slots write past the end of the row, which JAX drops.
    input_ids = batch.input_ids.at[rows, ordered].set(replacement, mode="drop")
    weights: Float[Array, "B P"] = used.astype(jnp.float32)
    return Masked(input_ids, positions, targets, weights)
