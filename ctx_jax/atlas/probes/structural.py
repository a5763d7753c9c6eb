"""Is the syntax tree in the vectors? Probes for its distances, its depths and its arcs (Hewitt and Manning 2019).

All read whole sentences: features [B, T, D], zeros at padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from scipy import stats
from scipy.sparse.csgraph import minimum_spanning_tree

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.examples import Examples
from ctx_jax.atlas.probes.labelling import interval
from ctx_jax.atlas.probes.training import Fitted, predict
from ctx_jax.atlas.records import Trees
from ctx_jax.atlas.results import Score
from ctx_jax.nn.parameters import Params

LENGTHS = (8, 16, 32, 64)
"""Words of rows; longer sentences are left out."""
SCORED_LENGTHS = range(5, 51)
"""Of sentences whose rank correlations are averaged, each length alike (section 4.1)."""


def tree_distances(heads: Int[np.ndarray, "W"]) -> Int[np.ndarray, "W W"]:
    """Edges between any two words; words of different trees, under two roots, are as far as if one root were the
    other's child.
    """
    count = len(heads)
    depths = tree_depths(heads)
    above = np.zeros((count, count + 1), bool)  # word w, its ancestors and itself, and what is above all roots
    for word in range(count):
        here = word
        while here >= 0:
            above[word, here] = True
            here = heads[here]
    # The deepest common ancestor's depth is the number of common ancestors less one; none is one above the roots.
    common = above[:, :count].astype(np.int64) @ above[:, :count].T.astype(np.int64)
    distances = depths[:, None] + depths[None, :] - 2 * (common - 1)
    return np.where(common == 0, depths[:, None] + depths[None, :] + 1, distances)


def tree_depths(heads: Int[np.ndarray, "W"]) -> Int[np.ndarray, "W"]:
    """Edges from the root."""
    depths = np.zeros(len(heads), np.int64)
    for word in range(len(heads)):
        here = word
        while heads[here] >= 0:
            here, depths[word] = heads[here], depths[word] + 1
    return depths


class TreeSource:
    """Sentences as rows, those of about a length together, padded."""

    def __init__(self, features: Features, trees: Trees, sentences: Int[np.ndarray, "N"], piece_words: int = 8192):
        """
        Args:
          features: of all the sentences.
          trees: of them.
          sentences: which ones; those with more words than the last of LENGTHS are left out.
          piece_words: of a piece, padding counted.
        """
        self.features, self.trees = features, trees
        counts = np.array([len(trees.heads[number]) for number in sentences], int)
        bucket = np.searchsorted(LENGTHS, counts)
        self.pieces_of = []  # (T, P, numbers)
        for place, length in enumerate(LENGTHS):
            some = np.asarray(sentences)[(bucket == place) & (counts > 0)]
            size = min(piece_words // length, max(1 << (len(some) - 1).bit_length(), 1)) if len(some) else 0
            self.pieces_of += [(length, size, some[begin : begin + size]) for begin in range(0, len(some), size or 1)]

    @property
    def sentences(self) -> Int[np.ndarray, "N"]:
        """Their numbers, in the order of `pieces()`."""
        return np.concatenate([some for _, _, some in self.pieces_of])

    def counts(self) -> list[int]:
        """Sentences of each piece."""
        return [len(some) for _, _, some in self.pieces_of]

    def __len__(self) -> int:
        return sum(self.counts())

    def pieces(self, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """All sentences."""
        pieces = self.pieces_of
        if rng is not None:
            drawn = []
            for length in LENGTHS:
                own = [piece for piece in pieces if piece[0] == length]
                if own:
                    mixed = rng.permutation(np.concatenate([some for _, _, some in own]))
                    size = own[0][1]
                    drawn += [(length, size, mixed[begin : begin + size]) for begin in range(0, len(mixed), size)]
            pieces = [drawn[place] for place in rng.permutation(len(drawn))]
        for length, size, some in pieces:
            yield self._piece(length, size, some)

    def _piece(self, length: int, size: int, some: Int[np.ndarray, "n"]) -> Examples:
        _, layers, width = self.features.vectors.shape
        vectors = np.zeros((layers, size, length, width), self.features.vectors.dtype)
        distances = np.zeros((size, length, length), np.int16)
        depths, heads = np.zeros((size, length), np.int16), np.zeros((size, length), np.int16)
        lengths = np.zeros(size, np.int32)
        for row, number in enumerate(some):
            first, last = self.features.starts[number], self.features.starts[number + 1]
            count = lengths[row] = last - first
            vectors[:, row, :count] = self.features.vectors[first:last].swapaxes(0, 1)
            tree = np.asarray(self.trees.heads[number])
            distances[row, :count, :count] = tree_distances(tree)
            depths[row, :count] = tree_depths(tree)
            heads[row, :count] = tree
        weights = (np.arange(size) < len(some)).astype(np.float32)
        return Examples(vectors, (distances, depths, heads, lengths), weights)


@dataclass(frozen=True)
class _Structural:
    """A projection B and what is read off it.

    Attributes:
      width: D.
      rank: rows of B.
    """

    width: int
    rank: int = 128

    def init(self, key: Key[Array, ""]) -> Params:
        """Uniform, ±0.05 (structural-probes, probe.py)."""
        return {"projection": jax.random.uniform(key, (self.width, self.rank), minval=-0.05, maxval=0.05)}


@dataclass(frozen=True)
class Distance(_Structural):
    """‖B(hᵢ - hⱼ)‖² as the distance of two words (equation 1), by the mean absolute error over the pairs of a sentence
    (equation 2).
    """

    def distances(self, params: Params, features: Float[Array, "B T D"]) -> Float[Array, "B T T"]:
        """Of all pairs."""
        projected = features @ params["projection"]
        squares = jnp.square(projected).sum(-1)
        products = jnp.einsum("bir,bjr->bij", projected, projected)
        return jnp.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0.0)

    def losses(self, params: Params, features: Float[Array, "B T D"], targets: tuple) -> Float[Array, "B"]:
        """Of each sentence."""
        distances, _, _, lengths = targets
        inside = jnp.arange(features.shape[1])[None] < lengths[:, None]
        pairs = inside[:, :, None] & inside[:, None, :]
        errors = jnp.abs(self.distances(params, features) - distances.astype(jnp.float32))
        return jnp.where(pairs, errors, 0.0).sum((1, 2)) / jnp.maximum(jnp.square(lengths), 1).astype(jnp.float32)

    def predict(self, params: Params, features: Float[Array, "B T D"]) -> Float[Array, "B T T"]:
        """Distances."""
        return self.distances(params, features)


@dataclass(frozen=True)
class Depth(_Structural):
    """‖B hᵢ‖² as the depth of a word (section 2.3)."""

    def losses(self, params: Params, features: Float[Array, "B T D"], targets: tuple) -> Float[Array, "B"]:
        """Of each sentence."""
        _, depths, _, lengths = targets
        inside = jnp.arange(features.shape[1])[None] < lengths[:, None]
        errors = jnp.abs(self.predict(params, features) - depths.astype(jnp.float32))
        return jnp.where(inside, errors, 0.0).sum(1) / jnp.maximum(lengths, 1).astype(jnp.float32)

    def predict(self, params: Params, features: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Depths."""
        return jnp.square(features @ params["projection"]).sum(-1)


@dataclass(frozen=True)
class Arcs(_Structural):
    """Which word is another's head: (U hᵢ) · (V hⱼ) over the words of the sentence, and one number for none, the root.

    No parser: each word is asked by itself, and the answers need not be a tree.
    """

    def init(self, key: Key[Array, ""]) -> Params:
        """Small random weights."""
        draw = lambda key: jax.random.normal(key, (self.width, self.rank)) * 0.05
        first, second, third = jax.random.split(key, 3)
        return {"dependent": draw(first), "head": draw(second), "root": jax.random.normal(third, (self.rank,)) * 0.05}

    def logits(self, params: Params, features: Float[Array, "B T D"]) -> Float[Array, "B T T+1"]:
        """Of each word, of every head; the last is none."""
        dependents = features @ params["dependent"]
        heads = features @ params["head"]
        scores = jnp.einsum("bir,bjr->bij", dependents, heads)
        present = (features != 0).any(-1)
        own = jnp.eye(features.shape[1], dtype=bool)[None]
        scores = jnp.where(present[:, None, :] & ~own, scores, -1e9)
        root = (dependents * params["root"][None, None]).sum(-1, keepdims=True)
        return jnp.concatenate([scores, root], axis=-1)

    def losses(self, params: Params, features: Float[Array, "B T D"], targets: tuple) -> Float[Array, "B"]:
        """Cross-entropy a word, of each sentence."""
        _, _, heads, lengths = targets
        logits = self.logits(params, features)
        inside = jnp.arange(features.shape[1])[None] < lengths[:, None]
        gold = jax.nn.one_hot(jnp.where(heads < 0, features.shape[1], heads), features.shape[1] + 1)
        found = jax.nn.logsumexp(logits, axis=-1) - (logits * gold).sum(-1)
        return jnp.where(inside, found, 0.0).sum(1) / jnp.maximum(lengths, 1).astype(jnp.float32)

    def predict(self, params: Params, features: Float[Array, "B T D"]) -> Int[Array, "B T"]:
        """The likeliest head, -1 for none."""
        found = self.logits(params, features).argmax(-1)
        return jnp.where(found == features.shape[1], -1, found)


def uuas(
    distances: Float[np.ndarray, "W W"], heads: Int[np.ndarray, "W"], scored: Bool[np.ndarray, "W"]
) -> tuple[int, int]:
    """Arcs of the gold tree that the minimum spanning tree over distances has, without direction, and how many there
    are; both over the words that count (section 4.1).
    """
    words = np.flatnonzero(scored)
    number = {word: place for place, word in enumerate(words.tolist())}
    gold = {frozenset((number[word], number[heads[word]])) for word in words.tolist() if heads[word] in number}
    if len(words) < 2:
        return 0, len(gold)
    # SciPy takes a distance of zero for no edge.
    found = minimum_spanning_tree(np.triu(np.asarray(distances, np.float64)[np.ix_(words, words)] + 1e-9, 1)).tocoo()
    edges = {frozenset(edge) for edge in zip(found.row.tolist(), found.col.tolist(), strict=True)}
    return len(edges & gold), len(gold)


def rank_correlations(
    found: Iterable[Float[np.ndarray, "*K W ..."]], gold: Iterable[Int[np.ndarray, "W ..."]]
) -> Float[np.ndarray, "*K"]:
    """Spearman's correlation of each row, averaged over a sentence's rows, then over sentences of each length from 5 to
    50, then over lengths (section 4.1, DSpr. and NSpr.).

    Rows that are all the same have none, and are left out; a sentence of such rows has 0.

    Args:
      found: of each sentence, of any number of probes, distances [W, W] or depths [W].
      gold: of each sentence.
    """
    by_length: dict[int, list[np.ndarray]] = {}
    for ours, theirs in zip(found, gold, strict=True):
        if len(theirs) not in SCORED_LENGTHS:
            continue
        a, b = (_centred(stats.rankdata(values, axis=-1)) for values in (ours, theirs))
        sizes = np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))
        values = np.divide((a * b).sum(-1), sizes, out=np.zeros(sizes.shape), where=sizes > 0)
        if theirs.ndim > 1:
            values = values.sum(-1) / np.maximum((sizes > 0).sum(-1), 1)
        by_length.setdefault(len(theirs), []).append(values)
    means = [np.mean(values, axis=0) for values in by_length.values()]
    return np.mean(means, axis=0) if means else np.array(np.nan)


def _centred(ranks: Float[np.ndarray, "... W"]) -> Float[np.ndarray, "... W"]:
    return ranks - ranks.mean(-1, keepdims=True)


def scored_trees(fitted: Fitted, source: TreeSource) -> tuple[list[Score], list[Score]]:
    """Two scores of each layer: of distances UUAS and Spearman's correlation (DSpr.), of depths the share of sentences
    whose root is the word of least depth and Spearman's correlation (NSpr.).
    """
    members, trees = np.asarray(fitted.loss).shape, source.trees
    right, total, ours, theirs = np.zeros(members), 0, [], []
    deep = isinstance(fitted.probe, Depth)
    rows = (piece[:, :, row] for piece in predict(fitted, source) for row in range(piece.shape[2]))
    for number, row in zip(source.sentences, rows, strict=True):
        heads, scored = np.asarray(trees.heads[number]), np.asarray(trees.scored[number])
        count = len(heads)
        if deep:
            found = row[:, :, :count]
            if scored.any():
                words = np.flatnonzero(scored)
                right += heads[words[found[:, :, words].argmin(-1)]] < 0
                total += 1
        else:
            found = row[:, :, :count, :count]
            these = [[uuas(distances, heads, scored) for distances in of_seed] for of_seed in found]
            right += np.array(these)[:, :, 0]
            total += these[0][0][1]
        ours.append(found)
        theirs.append(tree_depths(heads) if deep else tree_distances(heads))
    shares, ranks = right / max(total, 1), np.broadcast_to(rank_correlations(ours, theirs), members)
    return [interval(seeds) for seeds in shares.T], [interval(seeds) for seeds in ranks.T]
