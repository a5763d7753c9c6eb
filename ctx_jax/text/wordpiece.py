"""WordPiece: BERT's sub-words, from its vocab.txt."""

from __future__ import annotations

import pathlib

import numpy as np
import tokenizers

from ctx_jax.errors import InputError
from ctx_jax.text.fast import LibraryTokenizer
from ctx_jax.text.tokenizer import Specials
from ctx_jax.text.vocabulary import has_capitals, read_file, write_config


class WordPiece(LibraryTokenizer):
    """Cleans, splits at white space, punctuation and CJK characters, then takes the longest piece again and again.

    As google-research/bert `tokenization.py` (FullTokenizer) and Hugging Face's BertTokenizerFast; the work is done
    by the library `tokenizers`, in parallel over a batch. For whole-word masking a word is what lies between
    those splits: `##` pieces belong to the word before them.

    In a list of words a word may still be split at punctuation; all its pieces belong to it.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        lowercase: bool | None = True,
        strip_accents: bool | None = None,
        split_cjk: bool = True,
        max_word_length: int = 100,
    ):
        """Reads a vocabulary.

        Args:
          path: vocab.txt, UTF-8, one piece a line, the line's number (from 0) being the id.
          lowercase: lower the case of texts; None: yes if no piece of the vocabulary has a capital letter.
          strip_accents: take accents off; None: when lowering the case, as BERT does.
          split_cjk: every CJK ideograph is a word of its own.
          max_word_length: longer words, in characters, become [UNK] whole. Hugging Face's number; Google's own code
            has 200.

        Raises:
          InputError: there is no such file, it is empty or not UTF-8, a line is blank or repeated, [UNK] is missing.
        """
        path = pathlib.Path(path)
        super().__init__(path, _read_vocabulary(path), {field: (f"[{field.upper()}]",) for field in Specials._fields})
        if max_word_length < 1:
            raise InputError(f"max_word_length: found {max_word_length}, expected at least 1")
        self._special_id("unk")
        self.lowercase = not has_capitals(self._tokens) if lowercase is None else lowercase
        self.strip_accents = strip_accents
        self.split_cjk = split_cjk
        self.max_word_length = max_word_length
        # Google's rule for whole words, create_pretraining_data.py: what begins with ## continues a word.
        self.continues_word = np.array([token.startswith("##") for token in self._tokens])
        self._tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordPiece(self._ids, unk_token="[UNK]", max_input_chars_per_word=max_word_length)
        )
        self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=split_cjk,
            strip_accents=strip_accents,
            lowercase=self.lowercase,
        )
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        # Only those that the vocabulary has: the library gives new ids to the others.
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False, special=True) for name in self.special_names().values()]
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `vocab.txt` and `tokenizer_config.json`, which Hugging Face's BertTokenizer reads too."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_bytes("".join(f"{token}\n" for token in self._tokens).encode())
        write_config(
            folder,
            {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": self.lowercase,
                "strip_accents": self.strip_accents,
                "tokenize_chinese_chars": self.split_cjk,
                "max_input_chars_per_word": self.max_word_length,
                **self.special_names(),
            },
        )


def _read_vocabulary(path: pathlib.Path) -> list[str]:
    try:
        text = read_file(path, "a WordPiece vocabulary (vocab.txt)").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found a byte that is not UTF-8 at {error.start}, expected a vocab.txt") from error
    # Not splitlines(): some vocabularies hold characters such as U+2028 as pieces.
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise InputError(f"{path}: found an empty file (line 1), expected one piece a line")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        token = line.removesuffix("\r")
        if not token:
            raise InputError(f"{path}, line {number}: found a blank line, expected a piece")
        if token in first:
            raise InputError(f"{path}, line {number}: found {token!r} again, first on line {first[token]}")
        first[token] = number
    return list(first)
