"""The baseline of a language model: interpolated modified Kneser-Ney, its perplexity on held-out text, as JSON.

python scripts/kneser_ney.py CORPUS [--vocab-size V] [--order 5] [--split validation] [--backward]

CORPUS is a folder that `ctx-jax data build` wrote; counted is its split 'train'. V is the size of the softmax that the
perplexity is compared with: words beyond it are one word, the unknown one, in training and in held-out text.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import platform
import resource
import sys
import time

import numpy as np
import tqdm

from ctx_jax.data.corpus import Corpus
from ctx_jax.errors import InputError

FALLBACK = (0.0, 0.5, 1.0, 1.5)
"""Discounts of counts of 0, 1, 2 and more where they cannot be estimated: those of `lmplz --discount_fallback`."""

MOST = (1 << 31) - 1
"""Tokens and words at most: ids and counts are int32, and an id and a word together int64."""

MOST_ORDER = 100

READ_TOKENS = 1 << 20


@dataclasses.dataclass
class Level:
    """The n-grams of one order, and the contexts that they continue: (n - 1)-grams by their index in the level below.

    Attributes:
      keys: int64 [G], ascending, context × base + word of each n-gram, whose index is its id.
      counts: int32 [G], adjusted counts.
      discounts: what is taken off a count of 0, 1, 2, and 3 or more.
      estimated: are these discounts estimated from the counts, or FALLBACK?
      totals: int32 [C], sum of the adjusted counts of each context's n-grams.
      weights: float64 [C], what the discounts set free in each context, the weight of the order below.
    """

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    estimated: bool
    totals: np.ndarray
    weights: np.ndarray

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Ids of n-grams, int64 [N]; -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998, section 3 and equation 26), unpruned.

    As in lmplz (Heafield et al. 2013, section 3.2), the count of an n-gram is its occurrences where n is the order of
    the model or where it begins a sentence, and else the number of different words before it. Of the order - 1 begin
    symbols before a sentence only the last counts: n-grams with more of them say no more than a shorter one, and the
    first words are predicted at the lower orders alone. The order of one word is interpolated with 1 / vocab_size.

    Where a count of counts or a discount is out of range, as on little text, that order's three are FALLBACK.

    The begin symbol is one of the model's own outside the vocabulary; the end symbol is a word, which may also occur in
    the text.

    Attributes:
      order: N.
      vocab_size: V.
      levels: order by order, that of single words first.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        vocab_size: int,
        order: int = 5,
        *,
        eos_id: int,
        show_progress: bool = False,
    ):
        """Counts.

        Takes some 100 bytes a token while it sorts and half of that after, at order 5.

        Args:
          tokens: int [T], all sentences one after the other, without begin and end.
          offsets: int [S + 1], where each sentence begins, and T.
          vocab_size: V; ids are below it.
          order: N, the longest n-gram.
          eos_id: the word that ends every sentence.
          show_progress: draws a bar on stderr.

        Raises:
          InputError: no sentence, offsets that are not of these tokens, or a number out of its range.
        """
        if not 1 <= order <= MOST_ORDER:
            raise InputError(f"order: found {order}, expected 1 to {MOST_ORDER}")
        if not 1 <= vocab_size < MOST:
            raise InputError(f"vocab_size: found {vocab_size}, expected 1 to {MOST - 1}")
        if not 0 <= eos_id < vocab_size:
            raise InputError(f"eos_id: found {eos_id}, expected an id below vocab_size, {vocab_size}")
        if len(offsets) < 2:
            raise InputError("offsets: found no sentence, expected at least one")
        self.order, self.vocab_size = order, vocab_size
        self._begin, self._end, self._base = vocab_size, eos_id, vocab_size + 1
        self.levels: list[Level] = []
        stream, distance = self._stream(tokens, offsets)

        # `ids`, `keys` and `counts` are those of one order at a time: the id of the n-gram that ends at each place of
        # the stream, and keys and occurrences of the different ones. Words are their own ids.
        ids, keys = stream, np.arange(self._base)
        counts = np.bincount(stream[distance > 0], minlength=self._base).astype(np.int32)
        with tqdm.tqdm(total=order, desc="orders", disable=not show_progress) as bar:
            for n in range(2, order + 1):
                places = np.flatnonzero(distance >= n - 1)
                higher, occurrences, places, numbers = _distinct(places, self._keys(ids, stream, places))
                # Every different n-gram is one different word before the (n - 1)-gram that it ends in. No word is
                # before one at the beginning of a sentence.
                before = np.bincount(ids[places[_starts(occurrences)]], minlength=len(keys)).astype(np.int32)
                self._add(keys, np.where(before > 0, before, counts))
                if n < order:
                    ids = np.zeros(len(stream), np.int32)
                    ids[places] = numbers
                keys, counts = higher, occurrences
                del places, numbers, before
                bar.update()
            self._add(keys, counts)
            bar.update()

    def _stream(self, tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 [T + 2 S], sentences with one begin and end each, and int16, how far from its begin each place is."""
        tokens, offsets = np.asarray(tokens), np.asarray(offsets, np.int64)
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (lengths < 0).any():
            raise InputError(f"offsets: expected them to ascend from 0 to the number of tokens, {len(tokens)}")
        size = len(tokens) + 2 * len(lengths)
        if size > MOST:
            raise InputError(f"tokens: found {size} with sentence boundaries, expected {MOST} at most")
        if len(tokens):
            if tokens.dtype.kind not in "iu":
                raise InputError(f"tokens: found {tokens.dtype}, expected integers")
            least, most = tokens.min(), tokens.max()
            if least < 0 or most >= self.vocab_size:
                raise InputError(f"tokens: found ids from {least} to {most}, expected 0 to {self.vocab_size - 1}")
        begins = offsets[:-1] + 2 * np.arange(len(lengths))
        stream = np.empty(size, np.int32)
        inside = np.ones(size, bool)
        inside[begins] = inside[begins + lengths + 1] = False
        stream[inside] = tokens
        stream[begins], stream[begins + lengths + 1] = self._begin, self._end
        # A place that is not among the first `order` of its sentence has no need to say how far it is.
        distance = np.full(size, self.order, np.int16)
        for step in range(self.order - 1, -1, -1):
            distance[begins[lengths + 1 >= step] + step] = step
        return stream, distance

    def _keys(self, ids: np.ndarray, stream: np.ndarray, places: np.ndarray) -> np.ndarray:
        """int64: the n-gram that ends at a place, as the (n - 1)-gram that ended before it and a word."""
        keys = ids[places - 1].astype(np.int64)
        keys *= self._base
        keys += stream[places]
        return keys

    def _add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Makes the next level; contexts are the n-grams of the last one, or nothing."""
        discounts, estimated = estimate_discounts(counts)
        contexts = len(self.levels[-1].keys) if self.levels else 1
        totals, weights = np.zeros(contexts, np.int32), np.ones(contexts)
        if len(keys):
            context = keys // self._base if self.levels else np.zeros(len(keys), np.int64)
            first = np.flatnonzero(np.diff(context, prepend=-1))
            context = context[first]
            total = np.add.reduceat(counts, first, dtype=np.int64)
            totals[context] = total
            weights[context] = np.add.reduceat(discounts[np.minimum(counts, 3)], first) / total
        self.levels.append(Level(keys, counts, discounts, estimated, totals, weights))

    def log_probabilities(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Natural logarithm of the probability of each word after the words before it in its sentence.

        Args:
          tokens: int [T], all sentences one after the other, without begin and end.
          offsets: int [S + 1], where each sentence begins, and T.

        Returns:
          float64 [T + S], for each sentence its words and its end.

        Raises:
          InputError: offsets that are not of these tokens, or ids outside the vocabulary.
        """
        if len(offsets) < 2:
            raise InputError("offsets: found no sentence, expected at least one")
        stream, distance = self._stream(tokens, offsets)
        probabilities = np.full(len(stream), 1 / self.vocab_size)
        ids = np.zeros(len(stream), np.int64)
        for n, level in enumerate(self.levels, start=1):
            places = np.flatnonzero(distance >= max(n - 1, 1))
            contexts = ids[places - 1]
            if n > 1:
                places, contexts = places[contexts >= 0], contexts[contexts >= 0]
            found = level.find(self._keys(ids, stream, places)) if n > 1 else stream[places]
            count = np.where(found >= 0, level.counts[found] if len(level.counts) else 0, 0)
            left = count - level.discounts[np.minimum(count, 3)]
            # A context that only ever ended a text has no total, and its weight is one.
            share = left / np.maximum(level.totals[contexts], 1)
            probabilities[places] = share + level.weights[contexts] * probabilities[places]
            ids = np.full(len(stream), -1) if n > 1 else stream.astype(np.int64)
            ids[places] = found
        return np.log(probabilities[distance > 0])


def _distinct(places: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Different keys, ascending; how often each occurs; the places by their keys; the index of each one's key."""
    order = np.argsort(keys)
    keys, places = keys[order], places[order]
    del order
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    first = np.flatnonzero(new)
    numbers = np.cumsum(new, dtype=np.int32)
    numbers -= 1
    return keys[first], np.diff(first, append=len(keys)).astype(np.int32), places, numbers


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of the runs of these lengths begins."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def estimate_discounts(counts: np.ndarray) -> tuple[np.ndarray, bool]:
    """What to take off counts of 0, 1, 2, and 3 or more (Chen and Goodman 1998, equation 26), float64 [4].

    Returns:
      The discounts, and whether they are estimates: FALLBACK where no n-gram has a count of 1, 2 or 3, or where a
      discount is above its count or not above zero (lmplz lets zero pass, which may leave unseen words nothing).
    """
    numbers = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if numbers[1:4].all():
        share = numbers[1] / (numbers[1] + 2 * numbers[2])
        found = np.array([j - (j + 1) * share * numbers[j + 1] / numbers[j] if j else 0.0 for j in range(4)])
        if (found[1:] > 0).all() and (found <= np.arange(4)).all():
            return found, True
    return np.array(FALLBACK), False


def reverse_sentences(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The words of each sentence from the last to the first; the sentences stay where they are."""
    index = np.repeat(offsets[:-1] + offsets[1:] - 1, np.diff(offsets))
    index -= np.arange(len(tokens))
    return np.asarray(tokens)[index]


def read(corpus: Corpus, vocab_size: int, unk_id: int, backward: bool, show_progress: bool) -> np.ndarray:
    """All ids of a split, int32 [T], those from `vocab_size` on as the unknown one."""
    tokens = np.empty(corpus.num_tokens, np.int32)
    with tqdm.tqdm(total=len(tokens), desc=corpus.split, unit=" tokens", disable=not show_progress) as bar:
        for start in range(0, len(tokens), READ_TOKENS):
            end = min(start + READ_TOKENS, len(tokens))
            part = corpus.tokens(start, end)
            tokens[start:end] = np.where(part < vocab_size, part, unk_id)
            bar.update(end - start)
    return reverse_sentences(tokens, corpus.sentence_offsets) if backward else tokens


def measure(arguments: argparse.Namespace) -> dict:
    """Counts one split and scores another; what is printed at the end."""
    if arguments.split == "train":
        raise InputError("--split train: that is what is counted; expected another")
    if not 1 <= arguments.order <= MOST_ORDER:
        raise InputError(f"--order {arguments.order}: expected 1 to {MOST_ORDER}")
    train, held_out = (Corpus(arguments.corpus, split) for split in ("train", arguments.split))
    known, specials = train.tokenizer.vocab_size, train.tokenizer.specials
    vocab_size = known if arguments.vocab_size is None else arguments.vocab_size
    least = max(specials.unk, specials.cls, specials.sep) + 1
    if not least <= vocab_size <= known:
        raise InputError(f"--vocab-size {vocab_size}: expected {least} to {known}, the tokenizer's own")
    # From the end of a sentence down to its begin: the chains of `ctx_jax.data.streams`.
    end = specials.cls if arguments.backward else specials.sep
    options = {"vocab_size": vocab_size, "unk_id": specials.unk, "backward": arguments.backward, "show_progress": True}

    begin = time.perf_counter()
    tokens = read(train, **options)
    read_s = time.perf_counter() - begin
    share = np.count_nonzero(tokens == specials.unk) / train.num_tokens
    begin = time.perf_counter()
    model = KneserNey(tokens, train.sentence_offsets, vocab_size, arguments.order, eos_id=end, show_progress=True)
    del tokens
    count_s = time.perf_counter() - begin
    print(f"train       {train.num_tokens:,} tokens, {share:.2%} unknown; {train.num_sentences:,} sentences")
    for n, level in enumerate(model.levels, start=1):
        print(
            f"{n}-grams     {np.count_nonzero(level.counts):,}, discounts"
            f" {' '.join(f'{discount:.4f}' for discount in level.discounts[1:])}"
            f"{'' if level.estimated else ' (fallback)'}"
        )

    tokens = read(held_out, **options)
    held_out_share = np.count_nonzero(tokens == specials.unk) / held_out.num_tokens
    begin = time.perf_counter()
    log_probabilities = model.log_probabilities(tokens, held_out.sentence_offsets)
    score_s = time.perf_counter() - begin
    perplexity = float(np.exp(-log_probabilities.mean()))
    print(f"{arguments.split:11} {held_out.num_tokens:,} tokens, {held_out_share:.2%} unknown")
    print(f"time        {read_s:.1f} s to read, {count_s:.1f} s to count, {score_s:.2f} s to score")
    print(f"perplexity  {perplexity:.3f}, {len(log_probabilities):,} predictions, ends of sentences included")
    return {
        "corpus": str(arguments.corpus),
        "fingerprints": {corpus.split: corpus.fingerprint for corpus in (train, held_out)},
        "split": arguments.split,
        "direction": "backward" if arguments.backward else "forward",
        "order": arguments.order,
        "vocab_size": vocab_size,
        "train_tokens": train.num_tokens,
        "train_sentences": train.num_sentences,
        "train_unknown_share": round(share, 6),
        "ngrams": [int(np.count_nonzero(level.counts)) for level in model.levels],
        "discounts": [[round(float(discount), 6) for discount in level.discounts[1:]] for level in model.levels],
        "discounts_estimated": [level.estimated for level in model.levels],
        "predictions": len(log_probabilities),
        "unknown_share": round(held_out_share, 6),
        "perplexity": perplexity,
        "nats_per_prediction": float(-log_probabilities.mean()),
        "read_s": round(read_s, 2),
        "count_s": round(count_s, 2),
        "score_s": round(score_s, 3),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "machine": platform.processor() or platform.machine(),
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=pathlib.Path, help="a folder that `ctx-jax data build` wrote")
    parser.add_argument("--vocab-size", type=int, help="ids from here on are the unknown word (default: none)")
    parser.add_argument("--order", type=int, default=5, help="the longest n-gram (default: 5)")
    parser.add_argument("--split", default="validation", help="what to score (default: validation)")
    parser.add_argument("--backward", action="store_true", help="each sentence from its last word to its first")
    try:
        print(json.dumps(measure(parser.parse_args(argv))), flush=True)
    except InputError as error:
        print(f"kneser_ney: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
