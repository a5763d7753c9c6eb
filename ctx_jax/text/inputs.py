"""From pieces to what a BERT takes in: [CLS] first [SEP] (second [SEP]), within the model's length.

What differs from model to model, RoBERTa's two separators between texts, is the tokenizer's `layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.text.tokenizer import Layout, Pieces, Tokenizer
from ctx_jax.text.vocabulary import check_text

Text = str | Sequence[str]
Split = TypeVar("Split")
"""What a tokenizer gives for a text: Pieces, or ids."""

_CHARACTERS = 64
"""Of a text that is cut, so many for each piece are looked at first: ten times what a piece has."""


class Inputs(NamedTuple):
    """One row for the model, T tokens long, not padded.

    Attributes:
      input_ids: int32 [T].
      token_type_ids: int32 [T], 0 up to the second text, from there on the layout's type for it: BERT's is 1.
      special: bool [T], the [CLS] and [SEP] that were put around the pieces.
      offsets: int32 [T, 2], first and one past the last character in the first or the second text; (0, 0) for specials.
      words: int32 [T], the word in the first or the second text, −1 for specials.
      text: index of the text, or pair, that the row comes from.
      start: index of the row's first piece among the text's pieces (of a pair, the second text's); not 0 for
        the later rows of a text that was split.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    special: np.ndarray
    offsets: np.ndarray
    words: np.ndarray
    text: int
    start: int


def model_inputs(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    pairs: Sequence[Text] | None = None,
    *,
    max_length: int,
    on_too_long: Literal["error", "truncate", "split"] = "error",
    stride: int = 0,
) -> list[Inputs]:
    """Splits texts, or pairs of them, into pieces and puts special tokens around them.

    What is too long is an error unless one of two ways is asked for:
      "truncate" takes pieces off the end; of a pair one after the other off the longer, the second if they are
        equal (google-research/bert run_classifier.py, _truncate_seq_pair).
      "split" makes several rows; of a pair, the first text stands in each and the second is split.

    Args:
      tokenizer: gives pieces, the ids of [CLS] and [SEP] and the layout.
      texts: strings or lists of words.
      pairs: the second text of each pair.
      max_length: tokens of a row at most, special ones included.
      on_too_long: see above.
      stride: pieces that a row of a split text repeats from the row before it, as Hugging Face's `stride`.

    Returns:
      The rows in the order of the texts; one row a text except with "split".

    Raises:
      InputError: a text is too long, `max_length` or `stride` leaves no room, or an argument is not what it should be.
    """
    around = 2 if pairs is None else 2 + tokenizer.layout.separators
    least = around + (1 if pairs is None else 2)
    _check(max_length, least, around, on_too_long, ("error", "truncate", "split"))
    if stride and on_too_long != "split":
        raise InputError(f"stride: found {stride}, expected 0 unless on_too_long='split'")
    if not 0 <= stride < max_length - around:
        raise InputError(
            f"stride: found {stride}, expected 0 to {max_length - around - 1}, less than a row has room for"
        )
    if pairs is not None and len(pairs) != len(texts):
        raise InputError(f"pairs: found {len(pairs)}, expected one for each of the {len(texts)} texts")

    form = _Form(_special(tokenizer.specials.cls), _special(tokenizer.specials.sep), tokenizer.layout)

    def split(texts: Sequence[Text]) -> list[Pieces]:
        if on_too_long != "truncate":
            return tokenizer.encode_batch(texts)
        return _beginnings(tokenizer.encode_batch, lambda pieces: len(pieces.ids), max_length, texts)

    firsts = split(texts)
    try:
        seconds = [None] * len(firsts) if pairs is None else split(pairs)
    except InputError as error:
        raise InputError(f"second {error}") from error
    rows: list[Inputs] = []
    for text, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        room = max_length - around
        length = len(first.ids) + (0 if second is None else len(second.ids))
        if length <= room:
            rows.append(_row(form, first, second, text, start=0))
        elif on_too_long == "error":
            raise _too_long(text, length, around, max_length)
        elif on_too_long == "truncate":
            rows.append(_row(form, *_truncated(first, second, room), text, start=0))
        elif second is None:
            for start, part in _windows(first, room, stride):
                rows.append(_row(form, part, None, text, start))
        elif len(first.ids) + stride >= room:
            raise InputError(
                f"texts[{text}]: found {len(first.ids)} pieces, expected less than {room - stride}, since max_length = "
                f"{max_length} and stride = {stride} must leave room for the second text, the one that is split"
            )
        else:
            for start, part in _windows(second, room - len(first.ids), stride):
                rows.append(_row(form, first, part, text, start))
    return rows


def model_ids(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    *,
    max_length: int,
    on_too_long: Literal["error", "truncate"] = "error",
) -> list[np.ndarray]:
    """The `input_ids` that `model_inputs` gives for single texts, int32 [T] each, in seven tenths of the time.

    Raises:
      InputError: as there.
    """
    _check(max_length, 2, 2, on_too_long, ("error", "truncate"))
    room = max_length - 2
    if on_too_long == "truncate":
        found = _beginnings(tokenizer.ids_batch, len, max_length, texts)
    else:
        found = tokenizer.ids_batch(texts)
        for text, ids in enumerate(found):
            if len(ids) > room:
                raise _too_long(text, len(ids), 2, max_length)
    cls, sep = (np.array([index], np.int32) for index in (tokenizer.specials.cls, tokenizer.specials.sep))
    flat = np.concatenate([*chain.from_iterable((cls, ids[:room], sep) for ids in found), np.zeros(0, np.int32)])
    ends = np.cumsum([min(len(ids), room) + 2 for ids in found], dtype=np.int64).tolist()
    return [flat[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _check(max_length: int, least: int, around: int, on_too_long: str, possible: tuple[str, ...]) -> None:
    if max_length < least:
        raise InputError(f"max_length: found {max_length}, expected at least {least}, {around} of them special tokens")
    if on_too_long not in possible:
        expected = ", ".join(map(repr, possible[:-1]))
        raise InputError(f"on_too_long: found {on_too_long!r}, expected {expected} or {possible[-1]!r}")


def _too_long(text: int, pieces: int, around: int, max_length: int) -> InputError:
    return InputError(
        f"texts[{text}]: found {pieces} pieces, {pieces + around} tokens with the special ones, expected at most "
        f"max_length = {max_length}; on_too_long='truncate' cuts the end off, 'split' gives several rows"
    )


def _beginnings(
    encode: Callable[[Sequence[Text]], list[Split]],
    size: Callable[[Split], int],
    count: int,
    texts: Sequence[Text],
) -> list[Split]:
    """What `encode` gives, but of a long string some first pieces do, at least twice `count`; `size` counts pieces.

    It is cut before white space, where every tokenizer splits; a piece that knows better, such as an added token with
    a space in it, is among those that nobody reads.
    """
    begun = [_beginning(text, count * _CHARACTERS, f"texts[{number}]") for number, text in enumerate(texts)]
    found = encode(begun)
    for number, (text, beginning) in enumerate(zip(texts, begun, strict=True)):
        if beginning is not text and size(found[number]) < 2 * count:
            (found[number],) = encode([text])
    return found


def _beginning(text: Text, length: int, name: str) -> Text:
    if not isinstance(text, str) or len(text) <= 2 * length:
        return text
    end = max(text.rfind(blank, 0, length) for blank in " \n")
    return check_text(text, name)[:end].rstrip() if end > 0 else text


def _truncated(first: Pieces, second: Pieces | None, room: int) -> tuple[Pieces, Pieces | None]:
    if second is None:
        return _part(first, 0, room), None
    a, b = len(first.ids), len(second.ids)
    # One by one off the longer, in one step: down to the other's length, then by turns.
    if a > b:
        a = max(b, room - b)
    else:
        b = max(a, room - a)
    if a + b > room:
        a, b = room - room // 2, room // 2
    return _part(first, 0, a), _part(second, 0, b)


def _windows(pieces: Pieces, room: int, stride: int) -> Iterator[tuple[int, Pieces]]:
    """Parts of at most `room` pieces, each with its first piece's index; `stride` pieces are in two at a time."""
    for start in range(0, len(pieces.ids) - stride, room - stride):
        yield start, _part(pieces, start, start + room)


def _part(pieces: Pieces, start: int, stop: int) -> Pieces:
    return Pieces(*(field[start:stop] for field in pieces))


class _Form(NamedTuple):
    """What stands around pieces."""

    cls: Pieces
    sep: Pieces
    layout: Layout


def _special(index: int) -> Pieces:
    return Pieces(np.array([index], np.int32), np.zeros((1, 2), np.int32), np.array([-1], np.int32))


def _row(form: _Form, first: Pieces, second: Pieces | None, text: int, start: int) -> Inputs:
    cls, sep, layout = form
    parts = [cls, first, sep] + ([] if second is None else [sep] * (layout.separators - 1) + [second, sep])
    ids, offsets, words = (np.concatenate(field) for field in zip(*parts, strict=True))
    types = np.zeros(len(ids), np.int32)
    if second is not None:
        types[-len(second.ids) - 1 :] = layout.second_type
    return Inputs(ids, types, words < 0, offsets, words, text, start)
