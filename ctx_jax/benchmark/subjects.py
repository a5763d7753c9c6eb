"""Models that are measured: read once, and laid out in a folder that we and every peer read."""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import EncoderConfig, describe, longest
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.save import save
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.tokenizer import Tokenizer

STATIC = "static"
"""Said for a model: the first model's token table, looked up and no more."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
      name: in tables.
      config: sizes.
      folder: its weights and tokenizer.
      tokenizer: None where there is none.
      static: only its token table is looked up.
      alone: why no peer can be beside it; None where they can.
      alone_with_texts: why they cannot where texts are to be split.
    """

    name: str
    config: EncoderConfig
    folder: pathlib.Path
    tokenizer: Tokenizer | None
    static: bool = False
    alone: str | None = None
    alone_with_texts: str | None = None

    @property
    def is_elmo(self) -> bool:
        """Its rows are of words, and it needs no tokenizer."""
        return isinstance(self.config, ElmoConfig)

    @property
    def longest(self) -> int | None:
        """The longest row that it takes; None if it takes any."""
        return longest(self.config)

    def __str__(self) -> str:
        """In one line."""
        return f"{self.name}: " + ("token table of the first model" if self.static else describe(self.config))


def with_random_weights(config: EncoderConfig) -> Pretrained:
    """A model that has learnt nothing; it takes as long as one that has."""
    params = bound_model(config).init(jax.random.key(0))
    return Pretrained(config, params)


def lay_out(name: str, pretrained: Pretrained, folder: pathlib.Path) -> Subject:
    """Writes the model as a Hugging Face folder, so that everybody reads the same file; where that format cannot hold
    it, as one of ours that nobody else reads.
    """
    config, alone = dataclasses.replace(pretrained.config, dtype="float32"), None
    # The vectors that are compared are means, whatever the model's folder asks for.
    pretrained = dataclasses.replace(pretrained, config=config, pooling=None)
    if isinstance(config, BertConfig):
        try:
            save(pretrained, folder, "hugging-face", certificate=False)
        except InputError as error:
            alone = str(error)
    else:
        alone = "no peer has ELMo"
    if alone is not None:
        save(pretrained, folder, "npz", certificate=False)
    # transformers takes any other model than ALBERT's for one of tiktoken's.
    foreign = isinstance(pretrained.tokenizer, SentencePiece) and not config.shared_layers
    reason = "transformers reads no SentencePiece model in a folder of this kind" if foreign else None
    return Subject(name, config, folder, pretrained.tokenizer, alone=alone, alone_with_texts=reason)


def static_of(first: Subject) -> Subject:
    """The token table of a model, to be looked up.

    Raises:
      InputError: it has none.
    """
    if first.is_elmo or first.static:
        raise InputError(f"{STATIC}: found {first.name} before it, expected a model with a token table first")
    return dataclasses.replace(first, name=STATIC, static=True, alone="a look-up has no peers")
