"""Training a SentencePiece vocabulary of one's own from a stream of texts."""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from ctx_jax.errors import InputError
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.vocabulary import check_text

_MAX_BYTES = 4192  # of a sentence; SentencePiece leaves longer ones out without a word
_THREADS = 16  # a constant: the number of threads changes the order of sums, and is written into the model
_RESERVED = "\u2585"  # SentencePiece's mark for rare characters; it leaves out sentences with it


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | pathlib.Path,
    *,
    model_type: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float = 0.9995,
    lowercase: bool = True,
    max_sentences: int = 1_000_000,
) -> SentencePiece:
    """Trains a vocabulary with [PAD] = 0, [UNK] = 1, [CLS] = 2, [SEP] = 3, [MASK] = 4 and saves it in a folder.

    Every line of a text is a sentence; a longer one than 4192 bytes is cut, at white space where there is some.
    The same texts and options give the same model, byte for byte: of more than `max_sentences`, a sample is taken with
    SentencePiece's fixed seed.

    Args:
      texts: read once, one at a time.
      vocab_size: pieces, the five special ones included.
      folder: for `spiece.model` and `tokenizer_config.json`.
      model_type: the unigram language model (Kudo 2018, arXiv:1804.10959) or byte-pair encoding.
      character_coverage: 0.98 to 1, share of the characters that get pieces of their own; the rest is [UNK].
      lowercase: normalise by NFKC and fold the case (`nmt_nfkc_cf`), otherwise NFKC alone (`nmt_nfkc`).
      max_sentences: more than 100; bounds the memory, about 4 kB each at most.

    Raises:
      InputError: an option is out of range, a text is no valid string, there is no text, or the vocabulary size does
        not fit the texts.
    """
    if model_type not in ("unigram", "bpe"):
        raise InputError(f"model_type: found {model_type!r}, expected 'unigram' or 'bpe'")
    if vocab_size <= 5:
        raise InputError(f"vocab_size: found {vocab_size}, expected more than the 5 special pieces")
    if not 0.98 <= character_coverage <= 1:
        raise InputError(f"character_coverage: found {character_coverage}, expected 0.98 to 1")
    if max_sentences <= 100:
        raise InputError(f"max_sentences: found {max_sentences}, expected more than 100")

    sentences = _Sentences(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            input_sentence_size=max_sentences,
            max_sentence_length=_MAX_BYTES,
            num_threads=_THREADS,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            minloglevel=4,  # the C++ log; errors come as exceptions
        )
    except RuntimeError as error:
        if sentences.error is not None:
            raise sentences.error from None
        raise InputError(_explained(str(error), vocab_size, sentences.count)) from error
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    tokenizer = SentencePiece(path, lowercase=False, strip_accents=False)
    tokenizer.save(folder)
    return tokenizer


class _Sentences:
    """Texts cut to what SentencePiece accepts; keeps the texts' own exception, which it would give as text only."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.count = 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for index, text in enumerate(self.texts):
                check_text(text, f"texts[{index}]")
                for line in text.replace(_RESERVED, " ").splitlines():
                    for sentence in _cut(line):
                        self.count += 1
                        yield sentence
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise


def _cut(line: str) -> Iterator[str]:
    """Parts of a line of at most 4192 bytes that are not blank; each but the last ends at white space if it has any."""
    start = 0
    while start < len(line):
        part = line[start : start + _MAX_BYTES].encode()[:_MAX_BYTES].decode(errors="ignore")
        if start + len(part) < len(line) and (last := re.search(r"\s\S*$", part)):
            part = part[: last.start() + 1]
        if not part.isspace():
            yield part
        start += len(part)


def _explained(message: str, vocab_size: int, sentences: int) -> str:
    if not sentences:
        return "texts: found no text, expected at least one line that is not blank"
    if most := re.search(r"Please set it to a value <= (\d+)", message):
        return (
            f"vocab_size: found {vocab_size}, expected at most {most[1]}, which is what {sentences} sentences give; "
            "give more text or ask for fewer pieces"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size: found {vocab_size}, expected at least {least[1]}, one for each character and special piece; "
            "ask for more pieces or lower character_coverage"
        )
    return f"texts: SentencePiece cannot train on these {sentences} sentences: {message}"
