"""Examples of a task from vectors on the disk, a piece at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.examples import Examples

PIECE = 4096
"""Examples that are in memory, and shuffled among each other, at once."""
DEVICE_BYTES = 1 << 30
"""On an accelerator a piece is as many examples as this holds, if those are more: most tasks are read once then, and
stay there.
"""
LONGEST = 32
"""Words of a span that are kept apart: of a longer one the first and the last 16."""
RUN = 64
"""Examples that lie together on the disk and stay together when pieces are drawn."""


class SpanSource:
    """Vectors of spans, or of pairs of them, with their classes; a span's vector is the mean of its words'."""

    def __init__(
        self,
        features: Features,
        spans: tuple[Int[np.ndarray, "N 2"], ...],
        classes: Int[np.ndarray, "N"],
        size: int | None = None,
    ):
        """
        Args:
          features: of all the sentences.
          spans: the first ones, and the second where there are any, words counted over all sentences.
          classes: what is to be said.
          size: of a piece; None is as many as go to the device together. How examples are shuffled depends on it.
        """
        self.features, self.classes = features, np.asarray(classes, np.int32)
        self.spans = spans
        # Few sizes, as each is compiled for.
        self.size = min(self._most(size or self._together()), max(1 << (len(self.classes) - 1).bit_length(), RUN))

    def _together(self) -> int:
        if jax.default_backend() == "cpu":
            return PIECE
        bytes_of_one = len(self.spans) * math.prod(self.features.vectors.shape[1:]) * self.features.vectors.itemsize
        return max(PIECE, 1 << ((DEVICE_BYTES // bytes_of_one) | 1).bit_length() - 1)

    def _most(self, size: int) -> int:
        return size

    def some(self, examples: Int[np.ndarray, "P"]) -> SpanSource:
        """A part of it, in the order of the whole."""
        examples = np.sort(examples)
        return type(self)(self.features, tuple(span[examples] for span in self.spans), self.classes[examples])

    def __len__(self) -> int:
        return len(self.classes)

    def counts(self) -> list[int]:
        """Examples of each piece."""
        return [min(self.size, len(self) - begin) for begin in range(0, len(self), self.size)]

    def pieces(self, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """All examples, a fixed number at a time."""
        order = np.arange(len(self.classes))
        if rng is not None:
            runs = [order[begin : begin + RUN] for begin in range(0, len(order), RUN)]
            order = np.concatenate([runs[number] for number in rng.permutation(len(runs))])
        for begin in range(0, len(order), self.size):
            some = order[begin : begin + self.size]
            yield Examples(
                tuple(self.vectors(span[some], self.size) for span in self.spans),
                self._filled(self.classes[some]),
                self._filled(np.ones(len(some), np.float32)),
            )

    def vectors(self, spans: Int[np.ndarray, "P 2"], size: int) -> Float[np.ndarray, "L S D"]:
        """Means over words, zeros from P on."""
        lengths = spans[:, 1] - spans[:, 0]
        begins = np.cumsum(lengths) - lengths
        words = np.repeat(spans[:, 0] - begins, lengths) + np.arange(lengths.sum())
        num_layers, width = self.features.vectors.shape[1:]
        result = np.empty((num_layers, size, width), self.features.vectors.dtype)
        result[:, len(spans) :] = 0
        # Many words a span: not all at once.
        for begin in range(0, len(spans), RUN):
            end = min(begin + RUN, len(spans))
            first, last = begins[begin], begins[end - 1] + lengths[end - 1]
            found = self.features.vectors[words[first:last]]
            if (lengths[begin:end] > 1).any():
                sums = np.add.reduceat(found.astype(np.float32), begins[begin:end] - first, axis=0)
                found = sums / lengths[begin:end, None, None]
            result[:, begin:end] = found.swapaxes(0, 1)
        return result

    def _filled(self, array: Shaped[np.ndarray, "P"]) -> Shaped[np.ndarray, "S"]:
        return np.concatenate([array, np.zeros(self.size - len(array), array.dtype)])


class SpanWords(SpanSource):
    """Spans with the vectors of their words apart, [L, S, W, D], zeros after the last word."""

    @functools.cached_property
    def width(self) -> int:
        """W: words of the longest span, rounded up so that few shapes are compiled for."""
        longest = max((int((span[:, 1] - span[:, 0]).max(initial=1)) for span in self.spans), default=1)
        return min(1 << (longest - 1).bit_length(), LONGEST)

    def _most(self, size: int) -> int:
        # A piece of long spans would take as many times the memory.
        return max(size // self.width, 256)

    def vectors(self, spans: Int[np.ndarray, "P 2"], size: int) -> Float[np.ndarray, "L S W D"]:
        """Of the words of each span, zeros from P on."""
        num_layers, width = self.features.vectors.shape[1:]
        result = np.zeros((num_layers, size, self.width, width), self.features.vectors.dtype)
        half = self.width // 2
        for row, (begin, end) in zip(result.swapaxes(0, 1), spans, strict=False):
            if end - begin <= self.width:
                row[:, : end - begin] = self.features.vectors[begin:end].swapaxes(0, 1)
            else:
                row[:, :half] = self.features.vectors[begin : begin + half].swapaxes(0, 1)
                row[:, half:] = self.features.vectors[end - half : end].swapaxes(0, 1)
        return result
