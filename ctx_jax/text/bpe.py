"""Byte-level BPE: RoBERTa's sub-words, from its vocab.json and merges.txt."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tokenizers

from ctx_jax.errors import InputError
from ctx_jax.text.fast import SpacedTokenizer
from ctx_jax.text.tokenizer import Layout
from ctx_jax.text.vocabulary import read_file, read_json, write_config

VOCABULARY, MERGES = "vocab.json", "merges.txt"
SPACE = "Ġ"
"""How byte-level vocabularies spell a space."""

_SPECIALS = {"pad": ("<pad>",), "unk": ("<unk>",), "cls": ("<s>",), "sep": ("</s>",), "mask": ("<mask>",)}


class ByteLevelBPE(SpacedTokenizer):
    """Splits a text as GPT-2 does, spells each part in bytes, and merges neighbours in the order of merges.txt.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; Sennrich et al. 2016,
    arXiv:1508.07909; the special tokens and the layout are those of Liu et al. 2019, "RoBERTa", arXiv:1907.11692.
    No byte is unknown to a whole vocabulary; where one is missing it becomes `<unk>`.

    The first piece of a text has a leading `Ġ` only if the text begins with a space or `add_prefix_space` is set. A
    list of words is as the words joined by single spaces: Hugging Face wants `add_prefix_space` for lists, and then
    the two agree.

    Words of a string are the parts that GPT-2's pattern makes (`don` `'t` `,`), Hugging Face's `word_ids`; those that
    `continues_word` knows begin with `Ġ`, as in fairseq's masking of whole words. Several pieces may share a character
    that takes several bytes: all of them cover it. Offsets leave spaces out, as Hugging Face's with `trim_offsets` do;
    where with `add_prefix_space` theirs are off, at a text's first space and behind a special token, these are not.
    """

    layout = Layout(separators=2, second_type=0)

    def __init__(
        self,
        path: str | pathlib.Path,
        merges: str | pathlib.Path | None = None,
        *,
        add_prefix_space: bool = False,
        mask_takes_space: bool = True,
    ):
        """Reads a vocabulary.

        Args:
          path: vocab.json, an object of pieces and their ids.
          merges: merges.txt, two pieces a line, the first merge first; None: beside the vocabulary.
          add_prefix_space: split a text that does not begin with a space as if it did.
          mask_takes_space: `<mask>` stands for the white space before it too, as in RoBERTa.

        Raises:
          InputError: a file is missing or cannot be understood, the two do not fit together, `<unk>` is missing.
        """
        path = pathlib.Path(path)
        self.merges_path = path.with_name(MERGES) if merges is None else pathlib.Path(merges)
        super().__init__(path, _read_vocabulary(path), _SPECIALS)
        self._special_id("unk")
        self.add_prefix_space = add_prefix_space
        self.mask_takes_space = mask_takes_space
        self._merges = self._read_merges()
        names = list(self.special_names().values())
        self.continues_word = np.array([not token.startswith(SPACE) and token not in names for token in self._tokens])
        self._spaces = np.array([not token.strip(SPACE) for token in self._tokens])
        self._added = np.array([token in names for token in self._tokens])
        self._tokenizer = self._library(add_prefix_space)
        self._spaced = self._tokenizer if add_prefix_space else self._library(True)

    def _library(self, add_prefix_space: bool) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=self._ids, merges=self._merges, unk_token=self.special_names()["unk_token"])
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(
                    name, lstrip=field == "mask_token" and self.mask_takes_space, normalized=False, special=True
                )
                for field, name in self.special_names().items()
            ]
        )
        return tokenizer

    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are merged, the first first."""
        return list(self._merges)

    def _read_merges(self) -> list[tuple[str, str]]:
        path = self.merges_path
        try:
            text = read_file(path, f"the merges of {self.path.name}").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: found a byte that is not UTF-8 at {error.start}, expected merges") from error
        merges = []
        for number, line in enumerate(text.rstrip("\r\n").split("\n"), start=1):
            line = line.removesuffix("\r")
            if number == 1 and (line.startswith("#version") or not line):
                continue
            pair = line.split(" ")
            if len(pair) != 2 or not all(pair):
                raise InputError(f"{path}, line {number}: found {line!r:.60}, expected two pieces and a space between")
            for piece in (*pair, "".join(pair)):
                if piece not in self._ids:
                    raise InputError(
                        f"{path}, line {number}: found {line!r:.60}, but {self.path} has no piece {piece!r}: expected "
                        "the two files of one vocabulary"
                    )
            merges.append((pair[0], pair[1]))
        return merges

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json`, which HF's RobertaTokenizer reads too."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCABULARY).write_text(json.dumps(self._ids, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{first} {second}" for first, second in self._merges)]
        (folder / MERGES).write_bytes("".join(f"{line}\n" for line in lines).encode())
        names: dict[str, object] = dict(self.special_names())
        if "mask_token" in names:
            names["mask_token"] = added_token(str(names["mask_token"]), lstrip=self.mask_takes_space)
        config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": self.add_prefix_space, **names}
        write_config(folder, config)


def added_token(name: str, *, lstrip: bool) -> dict[str, object]:
    """A special token with options, as Hugging Face's configurations spell it."""
    flags = {"lstrip": lstrip, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"__type": "AddedToken", "content": name, **flags}


def _read_vocabulary(path: pathlib.Path) -> list[str]:
    ids = read_json(path, "a vocabulary (vocab.json), pieces and their ids")
    tokens: dict[int, str] = {}
    for token, index in ids.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(ids):
            raise InputError(f"{path}, {token!r}: found {index!r:.40}, expected an id from 0 to {len(ids) - 1}")
        if index in tokens:
            raise InputError(f"{path}, {token!r}: found the id {index} again, first that of {tokens[index]!r}")
        tokens[index] = token
    return [tokens[index] for index in range(len(ids))]
