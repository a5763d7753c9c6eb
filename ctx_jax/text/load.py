"""Finding out which tokenizer a folder or a file holds."""

from __future__ import annotations

import pathlib

from ctx_jax.errors import InputError
from ctx_jax.text.bpe import MERGES, VOCABULARY, ByteLevelBPE
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.tokenizer import Specials, Tokenizer
from ctx_jax.text.tokenizer_json import FILE as TOKENIZER_JSON
from ctx_jax.text.tokenizer_json import Description, TokenizerJson
from ctx_jax.text.vocabulary import VocabularyTokenizer, read_json
from ctx_jax.text.wordpiece import WordPiece
from ctx_jax.text.words import FILE as WORDS
from ctx_jax.text.words import Words

_SUPPORTED = (
    "vocab.txt (WordPiece), a .model file (SentencePiece), vocab.json with merges.txt (byte-level BPE), tokenizer.json "
    "or words.txt (whole words)"
)
# Their ids are not those of the .model file: fairseq put its own special tokens in front.
_SHIFTED_IDS = ("XLMRoberta", "Camembert", "MBart", "Barthez")


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Makes the tokenizer of a folder (Hugging Face's layout, or one that `save` wrote) or of a single file.

    In a folder, or beside the file, `tokenizer_config.json` says how texts are normalised: Hugging Face's
    `do_lower_case`, `strip_accents`, `tokenize_chinese_chars`, `keep_accents` and `add_prefix_space`, and the
    `max_input_chars_per_word` that `save` writes; it and `special_tokens_map.json` name the special tokens. Where
    nothing says so, case is lowered if the vocabulary has no capital letter.

    Where a folder holds `tokenizer.json` beside another vocabulary, both must have the same pieces, and the other one
    is read as `tokenizer.json` says. Where that says what the other's class cannot do (tokens added to the vocabulary,
    other steps of normalisation), or stands alone, it is read itself. How long rows are and how they are padded, which
    it may say too, is never followed: see `model_inputs`.

    Raises:
      InputError: there is no vocabulary of a supported kind, or several, or two files contradict each other, or the
        configuration cannot be followed.
    """
    path = pathlib.Path(path)
    file = _vocabulary_file(path) if path.is_dir() else path
    config = _Config(file.parent)
    beside = file.parent / TOKENIZER_JSON
    description = None
    if file.name == TOKENIZER_JSON and file.exists():
        tokenizer = _read_json(file, config)
    else:
        if path.is_dir() and beside.exists() and file.name != WORDS:
            description = Description(beside)
            config.agree_with(description)
        if description is not None and file.suffix == ".model" and config.has_shifted_ids():
            return _read_json(beside, config)
        tokenizer = _read_plain(file, config)
        if description is not None:
            description.check_vocabulary(tokenizer.tokens(range(tokenizer.vocab_size)), file)
            if not _can_express(tokenizer, description):
                tokenizer = _read_json(beside, config)
    config.check_tokens(tokenizer)
    return tokenizer


def _read_json(file: pathlib.Path, config: _Config) -> TokenizerJson:
    tokenizer = TokenizerJson(file, config.names())
    config.agree_with(tokenizer.description)
    config.check_tokens(tokenizer)
    return tokenizer


def _read_plain(file: pathlib.Path, config: _Config) -> VocabularyTokenizer:
    if file.name == WORDS:
        return Words(file)
    if file.suffix == ".txt" and file.name != MERGES:
        return WordPiece(
            file,
            lowercase=config.flag("do_lower_case"),
            strip_accents=config.flag("strip_accents"),
            split_cjk=config.flag("tokenize_chinese_chars") is not False,
            max_word_length=config.number("max_input_chars_per_word", 100),
        )
    if file.name == VOCABULARY:
        return ByteLevelBPE(
            file,
            add_prefix_space=config.flag("add_prefix_space") is True,
            mask_takes_space=config.option("mask_token", "lstrip") is not False,
        )
    if file.suffix == ".model":
        if config.has_shifted_ids():
            name = config.values["tokenizer_class"]
            raise InputError(f"{config.path}, tokenizer_class: found {name}, whose ids differ from its .model file's")
        keep_accents = config.flag("keep_accents")
        return SentencePiece(
            file,
            lowercase=config.flag("do_lower_case"),
            strip_accents=None if keep_accents is None else not keep_accents,
            normalize_quotes=config.albert_rule("normalize_quotes"),
            split_digit_comma=config.albert_rule("split_digit_comma"),
        )
    raise InputError(f"{file}: found {'a' if file.exists() else 'no'} file of this name, expected {_SUPPORTED}")


def _vocabulary_file(folder: pathlib.Path) -> pathlib.Path:
    names = sorted(entry.name for entry in folder.iterdir())
    models = [name for name in names if name.endswith(".model")]
    found = [name for name in names if name in ("vocab.txt", WORDS)] + (
        ["spiece.model"] if "spiece.model" in models else models
    )
    if VOCABULARY in names and MERGES in names:
        found.append(VOCABULARY)
    if not found and TOKENIZER_JSON in names:
        return folder / TOKENIZER_JSON
    if len(found) != 1:
        listed = ", ".join((found or names)[:10]) or "nothing"
        more = f" and {len(names) - 10} more" if not found and len(names) > 10 else ""
        raise InputError(f"{folder}: found {listed}{more}, expected one {_SUPPORTED}")
    return folder / found[0]


def _can_express(tokenizer: VocabularyTokenizer, description: Description) -> bool:
    """Does the tokenizer, made without `tokenizer.json` but by the same settings, do all that it says?"""
    model, added = description.model, description.added
    normalizer, splits = description.steps("normalizer"), description.steps("pre_tokenizer")
    names = tokenizer.special_names()
    if (
        description.layout != tokenizer.layout
        or not added.keys() <= set(names.values())
        or any(getattr(description, role) not in (None, names.get(f"{role}_token")) for role in ("cls", "sep"))
        or any(token.get("rstrip") or token.get("single_word") or not token.get("special") for token in added.values())
    ):
        return False
    lstrip = {name for name, token in added.items() if token.get("lstrip")}
    kinds = [step["type"] for step in splits]
    if isinstance(tokenizer, WordPiece):
        return (
            description.kind == "WordPiece"
            and not lstrip
            and not any(token.get("normalized") for token in added.values())
            and model.get("unk_token", "[UNK]") == "[UNK]"
            and model.get("continuing_subword_prefix", "##") == "##"
            and model.get("max_input_chars_per_word", 100) == tokenizer.max_word_length
            and kinds == ["BertPreTokenizer"]
            and [(step["type"], step.get("clean_text", True)) for step in normalizer] == [("BertNormalizer", True)]
            and _settings(tokenizer).items() >= description.settings().items()
        )
    if isinstance(tokenizer, ByteLevelBPE):
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges") or []]
        plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
        return (
            description.kind == "BPE"
            and lstrip == ({names.get("mask_token")} if tokenizer.mask_takes_space else set())
            and merges == tokenizer.merges()
            and not any(model.get(key) for key in (*plain, "ignore_merges"))
            and not normalizer
            and kinds == ["ByteLevel"]
            and splits[0].get("use_regex", True)
            and _settings(tokenizer).items() >= description.settings().items()
        )
    # SentencePiece's own model does what the library's steps imitate.
    assert isinstance(tokenizer, SentencePiece)
    steps = {step["type"] for step in normalizer}
    return (
        description.kind == "Unigram"
        and steps <= {"Replace", "NFKD", "StripAccents", "Lowercase", "Precompiled", "Strip"}
        and tokenizer.lowercase == ("Lowercase" in steps)
        and tokenizer.strip_accents == ("StripAccents" in steps)
        and tokenizer.normalize_quotes == description.replaces_quotes()
        and set(kinds) <= {"WhitespaceSplit", "Metaspace"}
        and not model.get("byte_fallback")
    )


def _settings(tokenizer: WordPiece | ByteLevelBPE) -> dict[str, bool]:
    """The tokenizer's options by Hugging Face's names, as `Description.settings`."""
    if isinstance(tokenizer, WordPiece):
        accents = tokenizer.lowercase if tokenizer.strip_accents is None else tokenizer.strip_accents
        return {
            "do_lower_case": tokenizer.lowercase,
            "strip_accents": accents,
            "tokenize_chinese_chars": tokenizer.split_cjk,
        }
    return {"add_prefix_space": tokenizer.add_prefix_space}


class _Config:
    """`tokenizer_config.json` and, for what it does not say of special tokens, `special_tokens_map.json`."""

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "tokenizer_config.json"
        self.values = read_json(self.path) if self.path.exists() else {}
        self._map = folder / "special_tokens_map.json"
        self._mapped = read_json(self._map) if self._map.exists() else {}
        self._from_json: dict[str, object] = {}
        model = folder / "config.json"
        self._model = read_json(model) if model.exists() else {}

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is None:
            value = self._from_json.get(key)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.path}, {key}: found {value!r}, expected true, false or null")
        return value

    def number(self, key: str, default: int) -> int:
        value = self.values.get(key, self._from_json.get(key, default))
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{self.path}, {key}: found {value!r}, expected a whole number")
        return value

    def albert_rule(self, key: str) -> bool:
        """What a configuration of our own says, else whether the folder is that of an ALBERT."""
        value = self.flag(key)
        return self._model.get("model_type") == "albert" if value is None else value

    def agree_with(self, description: Description) -> None:
        """Takes over what tokenizer.json says. Raises InputError where the configuration says the opposite."""
        found = description.settings()
        for key, value in found.items():
            own = self.flag(key)
            if own is not None and own != value:
                raise InputError(
                    f"{self.path}, {key}: found {str(own).lower()}, but {description.path} says "
                    f"{str(value).lower()}: expected the same in both"
                )
        self._from_json = dict(found)
        if "max_input_chars_per_word" in description.model:
            self._from_json["max_input_chars_per_word"] = description.model["max_input_chars_per_word"]

    def has_shifted_ids(self) -> bool:
        name = self.values.get("tokenizer_class")
        return isinstance(name, str) and name.startswith(_SHIFTED_IDS)

    def names(self) -> dict[str, str]:
        """The special tokens that the configuration names, by its keys."""
        found = {}
        for key in (f"{field}_token" for field in Specials._fields):
            name = _content(self._named(key)[1])
            if name is not None and not isinstance(name, str):
                raise InputError(f"{self._named(key)[0]}, {key}: found {name!r:.40}, expected a token")
            if name is not None:
                found[key] = name
        return found

    def _named(self, key: str) -> tuple[pathlib.Path, object]:
        if self.values.get(key) is None and self._mapped.get(key) is not None:
            return self._map, self._mapped[key]
        return self.path, self.values.get(key)

    def option(self, key: str, option: str) -> object:
        """An option of a special token, such as `lstrip`; None where nothing says it."""
        token = self._named(key)[1]
        return token.get(option) if isinstance(token, dict) else None

    def check_tokens(self, tokenizer: VocabularyTokenizer) -> None:
        """The configuration may name no special token but the one the tokenizer found, and none it does not have."""
        for key, spelling in tokenizer.special_names().items():
            source, value = self._named(key)
            name = _content(value)
            if name is not None and name != spelling:
                raise InputError(f"{source}, {key}: found {name!r}, expected {spelling!r}")
        added = self.values.get("added_tokens_decoder") or {}
        if not isinstance(added, dict):
            raise InputError(f"{self.path}, added_tokens_decoder: found {added!r:.40}, expected an object")
        known = tokenizer.tokens(range(tokenizer.vocab_size))
        for index, token in added.items():
            name = _content(token)
            if not index.isdecimal() or known[int(index) : int(index) + 1] != [name]:
                raise InputError(
                    f"{self.path}, added_tokens_decoder: found {name!r} as {index}, expected tokens of "
                    f"{tokenizer.path.name} alone; added ones are supported in {TOKENIZER_JSON} only"
                )


def _content(token: object) -> object:
    """The spelling of a token, which Hugging Face writes as a string or, with options, as an object."""
    return token.get("content") if isinstance(token, dict) else token
