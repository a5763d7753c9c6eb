"""Vectors of all words of a corpus at every layer: computed once, kept on disk, whatever is asked of them later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ctx_jax.arrays import Representations
from ctx_jax.atlas.cache import Cache, text_hash
from ctx_jax.atlas.records import Words
from ctx_jax.encoder.base import Encoder, Text
from ctx_jax.encoder.shards import fingerprint
from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import longest
from ctx_jax.interop.programs.forward import Layers

WINDOW_BYTES = 128 << 20
"""Of the vectors of sub-words that are in memory at once."""
GROUP = 4096
"""Texts whose lengths are found at once."""
STRIDE = 64
"""Tokens by which the parts of a sentence overlap that is longer than the model takes."""


class Features(NamedTuple):
    """Vectors of words; those of a sentence lie together.

    Attributes:
      vectors: word by word, so that what a probe reads of a word is one piece of the disk.
      starts: sentence s has words starts[s] to starts[s + 1].
    """

    vectors: Float[np.ndarray, "N L D"]
    starts: Int[np.ndarray, "S+1"]

    @property
    def num_layers(self) -> int:
        """Layer 0 counted."""
        return self.vectors.shape[1]

    def layers(self) -> Float[np.ndarray, "L N D"]:
        """Layer by layer, not copied."""
        return self.vectors.transpose(1, 0, 2)


def word_features(
    encoder: Encoder,
    sentences: Sequence[Words],
    cache: Cache,
    *,
    dtype: str = "float16",
    done: Callable[[int], object] = lambda count: None,
) -> Features:
    """The mean over a word's sub-words, at every layer; zeros for a word that has none.

    Args:
      encoder: of words.
      sentences: words of each.
      cache: where they are kept.
      dtype: on the disk: "float16", which changes no score that was looked at, or "float32".
      done: is told how many sentences were done.

    Raises:
      InputError: a value does not fit into float16, or a sentence cannot be encoded.
    """
    starts = np.concatenate([[0], np.cumsum([len(words) for words in sentences])]).astype(np.int64)
    shape = (int(starts[-1]), encoder.config.num_layers + 1, encoder.width)
    key = {"what": "words", "model": fingerprint(encoder), "texts": text_hash(sentences), "dtype": dtype}

    def fill(vectors: np.ndarray) -> None:
        for number, means in sentence_means(encoder, sentences, range(len(sentences)), done=done):
            vectors[starts[number] : starts[number + 1]] = _fitting(number, means, dtype)

    return Features(cache.array(key, shape, _dtype(dtype), fill), starts)


def span_features(
    encoder: Encoder,
    sentences: Sequence[Words],
    sentence: Int[np.ndarray, "N"],
    spans: Int[np.ndarray, "N 2"],
    cache: Cache,
    *,
    dtype: str = "float16",
    done: Callable[[int], object] = lambda count: None,
) -> Float[np.ndarray, "N L D"]:
    """The mean over the words of each span, and nothing of the other words; arguments as for `word_features`."""
    places = hashlib.sha256(np.ascontiguousarray(np.column_stack([sentence, spans]), np.int64).tobytes()).hexdigest()
    key = {"what": "spans", "model": fingerprint(encoder), "texts": text_hash(sentences), "places": places[:20],
           "dtype": dtype}  # fmt: skip
    shape = (len(sentence), encoder.config.num_layers + 1, encoder.width)

    def fill(vectors: np.ndarray) -> None:
        for place, mean in span_means(encoder, sentences, sentence, spans, done=done):
            vectors[place] = _fitting(int(sentence[place]), mean, dtype)

    return cache.array(key, shape, _dtype(dtype), fill)


def span_means(
    encoder: Encoder,
    sentences: Sequence[Words],
    sentence: Int[np.ndarray, "N"],
    spans: Int[np.ndarray, "N 2"],
    layers: Layers = "all",
    done: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[int, Float[np.ndarray, "K D"]]]:
    """The place of each span and the mean over its words, in the order in which sentences are encoded."""
    order = np.argsort(sentence, kind="stable")
    begins = np.searchsorted(np.asarray(sentence)[order], np.arange(len(sentences) + 1))
    for number, means in sentence_means(encoder, sentences, np.flatnonzero(np.diff(begins)), layers, done):
        for place in order[begins[number] : begins[number + 1]]:
            yield int(place), means[slice(*spans[place])].mean(0)


def sentence_means(
    encoder: Encoder,
    sentences: Sequence[Words],
    numbers: Sequence[int] | Int[np.ndarray, "M"],
    layers: Layers = "all",
    done: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[int, Float[np.ndarray, "W K D"]]]:
    """Vectors of the words of some sentences, one sentence after the other, the longest first; as `word_features`."""
    most = longest(encoder.config)
    stride = 0 if most is None else min(STRIDE, most // 4)
    numbers = np.array([number for number in numbers if len(sentences[number])], int)
    for window in windows(encoder, [list(sentences[number]) for number in numbers]):
        texts = [list(sentences[number]) for number in numbers[window]]
        counts = [len(words) for words in texts]
        # No names: a window's vectors would stay in memory while the next one's are computed.
        yield from zip(
            numbers[window],
            word_means(encoder.encode(texts, layers=layers, on_too_long="split", stride=stride), counts),
            strict=True,
        )
        done(len(window))


def _dtype(name: str) -> np.dtype:
    if name not in ("float16", "float32"):
        raise InputError(f"dtype: found {name!r}, expected 'float16' or 'float32'")
    return np.dtype(name)


def _fitting(number: int, means: Float[np.ndarray, "W L D"], dtype: str) -> Float[np.ndarray, "W L D"]:
    if not np.abs(means).max(initial=0) <= np.finfo(_dtype(dtype)).max:
        found = f"found {np.abs(means).max():.3g}, more than {dtype} holds"
        raise InputError(f"sentence {number}: {found}; expected float32, or a model without such values")
    return means


def windows(encoder: Encoder, texts: Sequence[Text]) -> Iterator[Int[np.ndarray, "W"]]:
    """Numbers of texts, those of about a length together, so many that their vectors fit into memory."""
    groups = [encoder.lengths(texts[begin : begin + GROUP]) for begin in range(0, len(texts), GROUP)]
    lengths = np.concatenate([np.zeros(0, np.int64), *groups])
    order = np.argsort(-lengths, kind="stable")
    size = lengths[order] * ((encoder.config.num_layers + 1) * encoder.width * 4)
    begin = 0
    while begin < len(order):
        count = max(int(WINDOW_BYTES / size[begin]), 1)  # the longest comes first
        yield order[begin : begin + count]
        begin += count


def word_means(found: Representations, counts: Sequence[int]) -> list[Float[np.ndarray, "W L D"]]:
    """Of each text of words; where it was split, over all the rows that hold a part of it."""
    layers, width = len(found.layers), found.layers.shape[-1]
    sums = [np.zeros((count, layers, width), np.float32) for count in counts]
    tokens = [np.zeros(count, np.int32) for count in counts]
    for row, text in enumerate(found.texts):
        inside = np.flatnonzero(found.word_ids[row] >= 0)
        if not len(inside):
            continue
        words, begins = np.unique(found.word_ids[row][inside], return_index=True)
        words += found.first_words[row]
        vectors = found.layers[:, row, inside[0] : inside[-1] + 1]
        if len(inside) != vectors.shape[1]:
            vectors = found.layers[:, row, inside]
        sums[text][words] += np.add.reduceat(vectors, begins, axis=1).transpose(1, 0, 2)
        tokens[text][words] += np.diff([*begins, len(inside)])
    return [total / np.maximum(count, 1)[:, None, None] for total, count in zip(sums, tokens, strict=True)]
