"""Finding out which tokenizer a folder or a file holds."""

from __future__ import annotations

import json
import pathlib

from ctx_jax.errors import InputError
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.text.vocabulary import VocabularyTokenizer, read_file
from ctx_jax.text.wordpiece import WordPiece
from ctx_jax.text.words import FILE as WORDS
from ctx_jax.text.words import Words

_SUPPORTED = "vocab.txt (WordPiece), a .model file (SentencePiece) or words.txt (whole words)"
# Their ids are not those of the .model file: fairseq put its own special tokens in front.
_SHIFTED_IDS = ("XLMRoberta", "Camembert", "MBart", "Barthez")


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Makes the tokenizer of a folder (Hugging Face's layout, or one that `save` wrote) or of a single file.

    In a folder, or beside the file, `tokenizer_config.json` says how texts are normalised: Hugging Face's
    `do_lower_case`, `strip_accents`, `tokenize_chinese_chars` and `keep_accents`, and the `max_input_chars_per_word`
    that `save` writes. Where it does not say, case is lowered if the vocabulary has no capital letter.

    Raises:
      InputError: there is no vocabulary of a supported kind, or several, or the configuration cannot be followed.
    """
    path = pathlib.Path(path)
    file = _vocabulary_file(path) if path.is_dir() else path
    config = _Config(file.parent / "tokenizer_config.json")
    if file.name == WORDS:
        tokenizer = Words(file)
    elif file.suffix == ".txt":
        tokenizer = WordPiece(
            file,
            lowercase=config.flag("do_lower_case"),
            strip_accents=config.flag("strip_accents"),
            split_cjk=config.flag("tokenize_chinese_chars") is not False,
            max_word_length=config.number("max_input_chars_per_word", 100),
        )
    elif file.suffix == ".model":
        config.refuse_shifted_ids()
        keep_accents = config.flag("keep_accents")
        tokenizer = SentencePiece(
            file,
            lowercase=config.flag("do_lower_case"),
            strip_accents=None if keep_accents is None else not keep_accents,
        )
    else:
        raise InputError(f"{file}: found {'a' if file.exists() else 'no'} file of this name, expected {_SUPPORTED}")
    config.check_tokens(tokenizer)
    return tokenizer


def _vocabulary_file(folder: pathlib.Path) -> pathlib.Path:
    names = sorted(entry.name for entry in folder.iterdir())
    models = [name for name in names if name.endswith(".model")]
    found = [name for name in names if name in ("vocab.txt", WORDS)] + (
        ["spiece.model"] if "spiece.model" in models else models
    )
    if len(found) != 1:
        listed = ", ".join((found or names)[:10]) or "nothing"
        more = f" and {len(names) - 10} more" if not found and len(names) > 10 else ""
        raise InputError(f"{folder}: found {listed}{more}, expected one {_SUPPORTED}")
    return folder / found[0]


class _Config:
    """`tokenizer_config.json`, or nothing where there is none."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.values: dict[str, object] = {}
        if not path.exists():
            return
        try:
            values = json.loads(read_file(path, "a JSON object"))
        except ValueError as error:
            raise InputError(f"{path}: found no JSON ({error}), expected an object") from error
        if not isinstance(values, dict):
            raise InputError(f"{path}: found {type(values).__name__}, expected a JSON object")
        self.values = values

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.path}, {key}: found {value!r}, expected true, false or null")
        return value

    def number(self, key: str, default: int) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{self.path}, {key}: found {value!r}, expected a whole number")
        return value

    def refuse_shifted_ids(self) -> None:
        name = self.values.get("tokenizer_class")
        if isinstance(name, str) and name.startswith(_SHIFTED_IDS):
            raise InputError(f"{self.path}, tokenizer_class: found {name}, whose ids differ from its .model file's")

    def check_tokens(self, tokenizer: VocabularyTokenizer) -> None:
        """The configuration may name no special token but the one the tokenizer found, and add none."""
        for key, spelling in tokenizer.special_names().items():
            name = _content(self.values.get(key, spelling))
            if name is not None and name != spelling:
                raise InputError(f"{self.path}, {key}: found {name!r}, expected {spelling!r}")
        added = self.values.get("added_tokens_decoder") or {}
        if not isinstance(added, dict):
            raise InputError(f"{self.path}, added_tokens_decoder: found {added!r:.40}, expected an object")
        known = tokenizer.tokens(range(tokenizer.vocab_size))
        for index, token in added.items():
            name = _content(token)
            if not index.isdecimal() or known[int(index) : int(index) + 1] != [name]:
                raise InputError(
                    f"{self.path}, added_tokens_decoder: found {name!r} as {index}, expected tokens of "
                    f"{tokenizer.path.name} alone; added ones are not supported"
                )


def _content(token: object) -> object:
    """The spelling of a token, which Hugging Face writes as a string or, with options, as an object."""
    return token.get("content") if isinstance(token, dict) else token
