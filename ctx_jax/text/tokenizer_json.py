"""tokenizer.json, the one file in which Hugging Face's library `tokenizers` keeps a whole tokenizer."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers

from ctx_jax.errors import InputError
from ctx_jax.text.bpe import SPACE
from ctx_jax.text.fast import SpacedTokenizer
from ctx_jax.text.tokenizer import Layout, Specials
from ctx_jax.text.vocabulary import read_json, write_config

FILE = "tokenizer.json"

_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}


class Description:
    """What a tokenizer.json says, as far as one must know it.

    Attributes:
      path: the file.
      values: its object, without `truncation` and `padding`: how long a row is, is said where rows are made, and no
        text is cut in silence.
      kind: of its model, `BPE`, `Unigram`, `WordLevel` or `WordPiece`.
      added: the tokens that are found in a text before it is split, and their options.
      layout: of one text or two among special tokens.
      cls, sep: names of the special tokens that the file puts around texts; None where it puts none.
    """

    def __init__(self, path: pathlib.Path):
        """Reads a file. Raises InputError where it is none, or of a kind that is not known."""
        self.path = path
        self.values: dict[str, Any] = {**read_json(path), "truncation": None, "padding": None}
        self.model = self.values.get("model")
        if not isinstance(self.model, dict) or not isinstance(self.model.get("vocab"), (dict, list)):
            raise InputError(f"{path}, model: found {self.model!r:.40}, expected an object with a vocab")
        # Files of before 2020 do not name the kind.
        guess = {"merges": "BPE", "unk_id": "Unigram", "max_input_chars_per_word": "WordPiece"}
        self.kind = self.model.get("type") or next((kind for key, kind in guess.items() if key in self.model), None)
        if self.kind not in _MODELS:
            raise InputError(f"{path}, model.type: found {self.kind!r}, expected one of {', '.join(_MODELS)}")
        for name in ("normalizer", "pre_tokenizer"):
            self.steps(name)
        self.added = self._added()
        self.layout, self.cls, self.sep = self._layout()

    def _layout(self) -> tuple[Layout, str | None, str | None]:
        found = [step for step in self.steps("post_processor") if step["type"] != "ByteLevel"]
        if not found:
            return Layout(), None, None
        step = found[-1]
        if step["type"] in ("BertProcessing", "RobertaProcessing") and _are_pairs(step.get("cls"), step.get("sep")):
            layout = Layout(2, 0) if step["type"] == "RobertaProcessing" else Layout()
            return layout, step["cls"][0], step["sep"][0]
        if step["type"] == "TemplateProcessing":
            single, pair = (list(_template(step.get(name))) for name in ("single", "pair"))
            if len(single) == 3 and single[1][0] is None:
                cls, sep = single[0][0], single[2][0]
                for separators in (1, 2):
                    second = pair[-1][1] if pair else 0
                    middle = [(sep, 0)] * separators
                    if pair == [(cls, 0), (None, 0), *middle, (None, second), (sep, second)]:
                        return Layout(separators, second), cls, sep
        raise InputError(
            f"{self.path}, post_processor: found {step['type']} with {json.dumps(step)!r:.60}…, expected one that "
            "makes [CLS] text [SEP] and [CLS] text [SEP] text [SEP]"
        )

    def steps(self, name: str) -> list[dict[str, Any]]:
        """The parts of a normalizer, pre_tokenizer or post_processor, sequences of them laid flat."""

        def flat(value: object) -> Iterator[dict[str, Any]]:
            if isinstance(value, dict) and isinstance(value.get("type"), str):
                nested = [value[key] for key in ("normalizers", "pretokenizers", "processors") if key in value]
                if value["type"] == "Sequence" and len(nested) == 1 and isinstance(nested[0], list):
                    for inner in nested[0]:
                        yield from flat(inner)
                else:
                    yield value
            elif value is not None:
                raise InputError(f"{self.path}, {name}: found {value!r:.40}, expected an object with a type")

        return list(flat(self.values.get(name)))

    def _added(self) -> dict[str, dict[str, Any]]:
        tokens = self.values.get("added_tokens") or []
        if not isinstance(tokens, list) or not all(isinstance(t, dict) and {"content", "id"} <= set(t) for t in tokens):
            raise InputError(f"{self.path}, added_tokens: found {tokens!r:.40}, expected a list of objects")
        return {token["content"]: token for token in tokens}

    def vocabulary(self) -> dict[str, int]:
        """The model's own pieces and their ids."""
        pieces = self.model["vocab"]
        if isinstance(pieces, dict):
            return pieces
        return {piece[0] if isinstance(piece, list) else piece: index for index, piece in enumerate(pieces)}

    def check_vocabulary(self, tokens: list[str], other: pathlib.Path) -> None:
        """Raises InputError unless the pieces of another file, in the order of their ids, are the model's own."""
        found = self.vocabulary()
        for index, token in enumerate(tokens):
            if found.get(token, self.added.get(token, {}).get("id")) != index:
                raise InputError(
                    f"{self.path}, model.vocab: found {found.get(token, 'no id')} for {token!r}, but it is {index} in "
                    f"{other}: expected the same vocabulary in both"
                )
        if len(found) > len(tokens):
            token = next(token for token in found if token not in set(tokens))
            raise InputError(
                f"{self.path}, model.vocab: found {token!r}, which {other} does not have: expected the same vocabulary "
                "in both"
            )

    def settings(self) -> dict[str, bool]:
        """The options that `tokenizer_config.json` may say too, by Hugging Face's names."""
        found = {}
        normalizer = self.steps("normalizer")
        kinds = [step["type"] for step in normalizer]
        for step in normalizer:
            if step["type"] == "BertNormalizer":
                lowercase, accents = step.get("lowercase", True), step.get("strip_accents")
                found["do_lower_case"] = lowercase
                found["strip_accents"] = lowercase if accents is None else accents
                found["tokenize_chinese_chars"] = step.get("handle_chinese_chars", True)
        if self.kind == "Unigram" and self.replaces_quotes():  # ALBERT's and XLNet's
            found["do_lower_case"] = "Lowercase" in kinds
            found["keep_accents"] = "StripAccents" not in kinds
            found["normalize_quotes"] = True
        for step in self.steps("pre_tokenizer"):
            if step["type"] == "ByteLevel":
                found["add_prefix_space"] = step.get("add_prefix_space", True)
        return found

    def replaces_quotes(self) -> bool:
        """Do two backquotes become one double quote?"""
        return any(step.get("pattern") == {"String": "``"} for step in self.steps("normalizer"))


class TokenizerJson(SpacedTokenizer):
    """A tokenizer that the library `tokenizers` reads and runs, whatever it is made of.

    Ids and words are the library's own. Special tokens are those that the configuration names, else those that the
    file puts around texts, else those with the usual names. In a list each word is split by itself; by byte-level
    tokenizers, and those with `▁`, all but the first as behind a space.
    """

    def __init__(self, path: str | pathlib.Path, names: Mapping[str, str] | None = None):
        """Reads a tokenizer.json.

        Args:
          path: the file.
          names: special tokens by Hugging Face's keys, `cls_token` …; those not given are found in the file.

        Raises:
          InputError: the file does not exist, is broken, or of a kind that is not known.
        """
        path = pathlib.Path(path)
        self.description = Description(path)
        self._tokenizer = self._library(self.description.values)
        spaced = _behind_a_space(self.description.values)
        self._spaced = self._tokenizer if spaced == self.description.values else self._library(spaced)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = sorted(ids, key=lambda token: ids[token])
        for index, token in enumerate(tokens):
            if ids[token] != index:
                raise InputError(f"{path}, model.vocab: found {ids[token]} for {token!r}, expected ids 0, 1, 2 …")
        super().__init__(path, tokens, self._names(tokens, names or {}))
        self.layout = self.description.layout
        self._spaces = np.array([not token.strip(f"{SPACE}▁") for token in tokens])
        self._added = np.array([token in self.description.added for token in tokens])
        self.continues_word = self._continuations()

    def _library(self, values: Mapping[str, Any]) -> tokenizers.Tokenizer:
        # Without its post-processor, which would trim offsets by rules of its own.
        try:
            return tokenizers.Tokenizer.from_str(json.dumps({**values, "post_processor": None}))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{self.description.path}: found no tokenizer ({error}), expected one") from error

    def _names(self, tokens: list[str], given: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        unknown = self.description.model.get("unk_token")
        if self.description.kind == "Unigram" and isinstance(self.description.model.get("unk_id"), int):
            unknown = tokens[self.description.model["unk_id"]]
        own = {"cls": self.description.cls, "sep": self.description.sep, "unk": unknown}
        found = {}
        for field in Specials._fields:
            name = given.get(f"{field}_token") or own.get(field)
            found[field] = _NAMES[field] if name is None else (name,)
        return found

    def _continuations(self) -> np.ndarray:
        model, splits = self.description.model, self.description.steps("pre_tokenizer")
        kinds = {step["type"] for step in splits}
        if model.get("end_of_word_suffix"):
            raise InputError(
                f"{self.path}, model.end_of_word_suffix: found {model['end_of_word_suffix']!r}, expected vocabularies "
                "that mark where words begin"
            )
        if self.description.kind == "WordLevel":
            return np.zeros(self.vocab_size, bool)
        prefix = model.get("continuing_subword_prefix") or ("##" if self.description.kind == "WordPiece" else "")
        if prefix:
            continues = np.array([token.startswith(prefix) for token in self._tokens])
        elif "ByteLevel" in kinds:
            continues = np.array([not token.startswith(SPACE) for token in self._tokens])
        elif "Metaspace" in kinds:
            mark = next(step.get("replacement", "▁") for step in splits if step["type"] == "Metaspace")
            continues = np.array([not token.startswith(mark) for token in self._tokens])
        else:
            found = ", ".join(sorted(kinds)) or "none"
            raise InputError(f"{self.path}, pre_tokenizer: found {found}, expected ByteLevel or Metaspace")
        special = [self._ids[name] for name in self.special_names().values()]
        special += [self._ids[name] for name, token in self.description.added.items() if token.get("special")]
        continues[special] = False
        return continues

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which Hugging Face's AutoTokenizer reads too."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.description.values, ensure_ascii=False)
        (folder / FILE).write_text(text, encoding="utf-8")
        write_config(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_names()})


def _behind_a_space(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer, but each string is split as behind a space."""

    def change(step: object) -> None:
        if isinstance(step, dict):
            if step.get("type") == "ByteLevel":
                step["add_prefix_space"] = True
            elif step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "always":
                step["prepend_scheme"] = "always"
            for inner in step.get("pretokenizers") or []:
                change(inner)

    spaced = {**values, "pre_tokenizer": copy.deepcopy(values.get("pre_tokenizer"))}
    change(spaced["pre_tokenizer"])
    return spaced


def _template(items: object) -> Iterator[tuple[str | None, int]]:
    """Of each part of a template the special token's name, None for a text, and the token type."""
    for item in items if isinstance(items, list) else []:
        for kind, part in item.items() if isinstance(item, dict) else []:
            yield (None if kind == "Sequence" else str(part.get("id")), int(part.get("type_id", 0)))


def _are_pairs(*values: object) -> bool:
    return all(isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) for value in values)
