"""What the tokenizers share that have their work done by the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import tokenizers

from ctx_jax.text.vocabulary import EncodedStrings, VocabularyTokenizer, flatten

_BLANKS = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)


class LibraryTokenizer(VocabularyTokenizer):
    """A vocabulary with a `tokenizers.Tokenizer` that splits strings, in parallel over a batch."""

    _tokenizer: tokenizers.Tokenizer

    def ids_batch(self, texts: Sequence[str | Sequence[str]]) -> list[np.ndarray]:
        """The ids alone of what `encode_batch` gives; the library finds no offsets then."""
        strings, text_of, _, _ = flatten(texts)
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        counts = np.array([len(encoding) for encoding in encodings], np.int64)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, counts.sum())
        ends = np.cumsum(np.bincount(text_of, counts, len(texts)).astype(np.int64)).tolist()
        return [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def _encode_strings(self, strings: list[str]) -> EncodedStrings:
        return run(self._tokenizer, strings)


class SpacedTokenizer(LibraryTokenizer):
    """One whose pieces begin with the space before a word, as in byte-level BPE.

    A word of a list, but for the first, is split as behind a space. Offsets leave spaces at the ends of a piece out,
    so that a piece of spaces alone has an empty span behind them.

    Attributes:
      _spaced: as `_tokenizer`, but a string is split as behind a space.
      _spaces: bool [V], pieces of spaces alone. One that `_spaced` put before a text stands for none of its characters.
      _added: bool [V], tokens that are found in a text before it is split, and may take white space with them.
    """

    _spaced: tokenizers.Tokenizer
    _spaces: np.ndarray
    _added: np.ndarray

    def ids_batch(self, texts: Sequence[str | Sequence[str]]) -> list[np.ndarray]:
        """The ids alone of what `encode_batch` gives, sooner where there are no lists of words."""
        strings_alone = all(isinstance(text, str) for text in texts)
        return super().ids_batch(texts) if strings_alone else VocabularyTokenizer.ids_batch(self, texts)

    def _encode_strings(self, strings: list[str]) -> EncodedStrings:
        return self._trimmed(strings, run(self._tokenizer, strings))

    def _encode_words(self, strings: list[str], follows: np.ndarray) -> EncodedStrings:
        if not follows.any():
            return self._encode_strings(strings)
        order = np.argsort(follows, kind="stable")
        begins = len(strings) - int(follows.sum())
        sorted_strings = [strings[at] for at in order]
        parts = (run(self._tokenizer, sorted_strings[:begins]), run(self._spaced, sorted_strings[begins:]))
        both = EncodedStrings(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        # Back into the order in which the strings were given: a stable sort of the pieces by their string.
        back = np.argsort(np.repeat(order, both.counts), kind="stable")
        counts = np.empty_like(both.counts)
        counts[order] = both.counts
        found = EncodedStrings(counts, both.ids[back], both.offsets[back], both.words[back])
        return self._trimmed(strings, found)

    def _trimmed(self, strings: list[str], found: EncodedStrings) -> EncodedStrings:
        characters = np.frombuffer("".join(strings).encode("utf-32-le"), "<u4")
        lengths = np.array([len(string) for string in strings], np.int64)
        base = np.repeat(np.cumsum(lengths) - lengths, found.counts)
        starts, ends = (found.offsets + base[:, None]).T
        space, blank = characters == ord(" "), np.isin(characters, _BLANKS)

        def leaves_out(places: np.ndarray, among: np.ndarray) -> np.ndarray:
            at = places[among]
            return among[space[at] | (blank[at] & self._added[found.ids[among]])]

        among = np.flatnonzero(starts < ends)
        while len(among := leaves_out(starts, among)):
            starts[among] += 1
            among = among[starts[among] < ends[among]]
        among = np.flatnonzero(starts < ends)
        while len(among := leaves_out(ends - 1, among)):
            ends[among] -= 1
            among = among[starts[among] < ends[among]]
        ends = np.where(self._spaces[found.ids], starts, ends)
        return found._replace(offsets=np.stack([starts - base, ends - base], axis=1))


def run(tokenizer: tokenizers.Tokenizer, strings: list[str]) -> EncodedStrings:
    """The pieces of strings as the library gives them, without special tokens around them."""
    encodings = tokenizer.encode_batch(strings, add_special_tokens=False)
    flat = chain.from_iterable
    one_by_one = lambda values: np.fromiter(values, np.int32)  # of pairs NumPy makes arrays twice as slowly
    return EncodedStrings(
        counts=np.array([len(encoding) for encoding in encodings], np.int64),
        ids=one_by_one(flat(e.ids for e in encodings)),
        offsets=one_by_one(flat(flat(e.offsets for e in encodings))).reshape(-1, 2),
        words=one_by_one(flat(e.word_ids for e in encodings)),
    )
