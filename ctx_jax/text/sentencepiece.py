"""SentencePiece: sub-words from a .model file, ALBERT's or one's own."""

from __future__ import annotations

import pathlib
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import sentencepiece

from ctx_jax.errors import InputError
from ctx_jax.text.vocabulary import EncodedStrings, VocabularyTokenizer, has_capitals, read_file, write_config

_SPACE = "▁"
_QUOTES = re.compile("``|''")
_SPECIALS = {  # the one for what is unknown is the model's own, whatever its name
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


class _Segment(NamedTuple):
    """A part of a string: a special token, or what lies between two."""

    string: int
    start: int
    text: str
    special: bool


class SentencePiece(VocabularyTokenizer):
    """Pieces of a SentencePiece model, with offsets in the text as it was given.

    Kudo and Richardson 2018, "SentencePiece", arXiv:1808.06226. A word begins with each piece that has a leading `▁`;
    a `▁` alone belongs to the pieces after it. Offsets leave that white space out, so a `▁` alone has an empty span;
    pieces that share a character of the text (`1`, `⁄`, `2` of ½) all cover it.

    Special tokens that are written in a text stay whole and are a word. In a list each word is encoded by itself, so
    that each begins with `▁`.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        lowercase: bool | None = None,
        strip_accents: bool | None = None,
        normalize_quotes: bool = False,
        split_digit_comma: bool = False,
    ):
        """Reads a model.

        Args:
          path: the model, `spiece.model` or any other name.
          lowercase: lower the case of texts before the model sees them; None: yes if the model knows no
            capital letter and its own normalisation does not lower the case. ALBERT's models are of that kind.
          strip_accents: decompose (NFKD) and take accents off before the model sees the text; None: as lowercase.
            google-research/albert `tokenization.py` (preprocess_text) does both.
          normalize_quotes: `` and '' become one double quote, as Hugging Face does for ALBERT and XLNet.
          split_digit_comma: a piece that ends in a digit and a comma, `▁2010,`, is split again without the comma.
            google-research/albert `tokenization.py` (encode_pieces) does so, and ALBERT never saw such pieces when
            it was trained; Hugging Face's newer tokenizers leave it out.

        Raises:
          InputError: the file does not exist or is no SentencePiece model, or one with `▁` behind its words.
        """
        path = pathlib.Path(path)
        self._proto = read_file(path, "a SentencePiece model")
        self._model = _model(path, self._proto)
        ids = list(range(len(self._model)))
        unk = self._model.id_to_piece(self._model.unk_id())
        super().__init__(path, self._model.id_to_piece(ids), {**_SPECIALS, "unk": (unk,)})
        if self._model.normalize("a").endswith(_SPACE):
            raise InputError(f"{path}: found a model with {_SPACE} behind words, expected it before them")
        if lowercase is None:
            lowercase = not has_capitals(self._tokens) and "A" in self._model.normalize("A")
        self.lowercase = lowercase
        self.strip_accents = lowercase if strip_accents is None else strip_accents

        self.normalize_quotes = normalize_quotes
        self.split_digit_comma = split_digit_comma
        self._split_again = self._digits_and_commas() if split_digit_comma else {}
        self._is_byte = np.array([self._model.is_byte(index) for index in ids])
        # A character outside the vocabulary continues the word whose ▁ came before it, unless no ▁ can stand alone.
        self.continues_word = np.array(
            [not token.startswith(_SPACE) and not self._model.is_control(i) for i, token in enumerate(self._tokens)]
        )
        self.continues_word[[self._ids[name] for name in self.special_names().values()]] = False
        self.continues_word[self._model.unk_id()] = _SPACE in self._ids
        self._written = re.compile("(" + "|".join(map(re.escape, self.special_names().values())) + ")")

    def _digits_and_commas(self) -> dict[int, list[str]]:
        """For each piece that ends in a digit and a comma the pieces in its place."""
        parts = {}
        for index, piece in enumerate(self._tokens):
            if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                again = self._model.encode(piece[:-1].replace(_SPACE, ""), out_type=str)
                if not piece.startswith(_SPACE) and again[0].startswith(_SPACE):
                    again[0] = again[0].removeprefix(_SPACE)
                parts[index] = [part for part in [*again, ","] if part]
        return parts

    def _encode_strings(self, strings: list[str]) -> EncodedStrings:
        segments = [segment for index, string in enumerate(strings) for segment in self._cut(index, string)]
        ids, offsets, counts = self._encode_segments(segments)
        offsets += np.repeat([segment.start for segment in segments], counts)[:, None].astype(np.int64)
        string_of = np.repeat([segment.string for segment in segments], counts).astype(np.int64)
        per_string = np.bincount(string_of, minlength=len(strings))

        begins = ~self.continues_word[ids]
        begins[_firsts(counts)] = True
        words = np.cumsum(begins)
        words -= np.repeat(words[_firsts(per_string)], per_string[per_string > 0])
        return EncodedStrings(per_string, ids, offsets, words)

    def _cut(self, index: int, string: str) -> Iterator[_Segment]:
        # SentencePiece never finds control symbols in a text, so the text is cut at them here.
        start = 0
        for position, text in enumerate(self._written.split(string)):
            if text:
                yield _Segment(index, start, text, special=position % 2 == 1)
            start += len(text)

    def _encode_segments(self, segments: list[_Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [N], offsets [N, 2] in the piece's own segment, and the number of pieces of each segment.

        SentencePiece's own offsets give a character that becomes several pieces to the last of them alone, and count a
        space to the word behind it. So offsets are made from its normalised text, of which the pieces are the parts,
        and the map from there to the original.
        """
        folded = [self._fold(segment.text) for segment in segments if not segment.special]
        texts = [text for text, _ in folded]
        encoded = zip(
            self._model.encode(texts, return_type="offset_mapping"),
            self._model.normalize(texts, with_offsets=True),
            folded,
            strict=True,
        )
        ids: list[int] = []
        pieces: list[str] = []
        counts: list[int] = []
        norms: list[str] = []
        sources: list[np.ndarray] = []
        bases = np.cumsum([0, *(len(segment.text) + 1 for segment in segments)])
        for segment, base in zip(segments, bases[:-1], strict=True):
            if segment.special:
                ids.append(self._ids[segment.text])
                pieces.append(segment.text)
                counts.append(1)
                norm, source = segment.text, np.arange(len(segment.text) + 1)
            else:
                result, (norm, source), (_, unfolded) = next(encoded)
                before = len(ids)
                for index, piece in zip(result["ids"], result["pieces"], strict=True):
                    parts = self._split_again.get(index)
                    ids += [index] if parts is None else self._model.piece_to_id(parts)
                    pieces += [piece] if parts is None else parts
                counts.append(len(ids) - before)
                source = np.array(source) if unfolded is None else unfolded[source]
            norms.append(norm)
            sources.append(source + base)
        if not ids:
            return np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.array(counts, np.int64)

        # One row for all segments, a position after each for its end: where a character came from, and where that ends.
        source = np.concatenate(sources)
        source_end = source[np.minimum(np.searchsorted(source, source, side="right"), len(source) - 1)]
        utf8 = np.frombuffer("".join(f"{norm}\n" for norm in norms).encode(), np.uint8)
        character = np.cumsum((utf8 & 0xC0) != 0x80) - 1  # of each byte; bytes 10xxxxxx continue a character
        # Counted in bytes, as a piece like <0xE2> stands for one.
        lengths = np.where(self._is_byte[ids], 1, [len(piece.encode()) for piece in pieces])
        segment_of = np.repeat(np.arange(len(segments)), counts)
        ends = np.cumsum(lengths) + segment_of
        spaces = np.where([piece.startswith(_SPACE) for piece in pieces], len(_SPACE.encode()), 0)
        begins = ends - lengths + spaces
        starts = source[character[begins]]
        stops = np.where(begins < ends, source_end[character[ends - 1]], starts)
        offsets = np.stack([starts, stops], axis=1) - bases[segment_of][:, None]
        return np.array(ids), offsets, np.array(counts)

    def _fold(self, text: str) -> tuple[str, np.ndarray | None]:
        """The text with quotes, case and accents folded, and for each character and the end the one it came from."""
        if self.normalize_quotes and (quotes := [match.start() for match in _QUOTES.finditer(text)]):
            kept = np.delete(np.arange(len(text) + 1), np.array(quotes) + 1)
            folded, source = self._fold_letters(_QUOTES.sub('"', text))
            return folded, kept if source is None else kept[source]
        return self._fold_letters(text)

    def _fold_letters(self, text: str) -> tuple[str, np.ndarray | None]:
        if not (self.lowercase or self.strip_accents):
            return text, None
        if text.isascii():
            return (text.lower() if self.lowercase else text), None
        parts = list(text)
        if self.strip_accents:
            # Character by character is the same as NFKD of the whole: that only reorders marks, and those go.
            parts = [
                "".join(c for c in unicodedata.normalize("NFKD", part) if not unicodedata.combining(c))
                for part in parts
            ]
        folded = "".join(parts)
        if self.lowercase:
            # The length of a lowered character is its own affair, its form is not: Σ ends a word as ς.
            parts = ["".join(c.lower() for c in part) for part in parts]
            folded = folded.lower()
        source = np.repeat(np.arange(len(text)), [len(part) for part in parts])
        return folded, np.append(source, len(text))

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `spiece.model` and `tokenizer_config.json`, by the names of Hugging Face's AlbertTokenizer."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spiece.model").write_bytes(self._proto)
        write_config(
            folder,
            {
                "tokenizer_class": "AlbertTokenizer",
                "do_lower_case": self.lowercase,
                "keep_accents": not self.strip_accents,
                "normalize_quotes": self.normalize_quotes,
                "split_digit_comma": self.split_digit_comma,
                **self.special_names(),
            },
        )


def _firsts(counts: np.ndarray) -> np.ndarray:
    """Where each run begins in a row of runs of these lengths, the empty ones left out."""
    return (np.cumsum(counts) - counts)[counts > 0]


def _model(path: pathlib.Path, proto: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        # An empty proto is taken for none given.
        return sentencepiece.SentencePieceProcessor(model_proto=proto or b"\0")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: found no SentencePiece model ({error}), expected a .model file") from error
