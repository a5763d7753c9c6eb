"""What every trained model in use can do, and how it is loaded."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ctx_jax.arrays import Representations
from ctx_jax.encoder.card import model_card
from ctx_jax.errors import InputError
from ctx_jax.interop.certificate import Check
from ctx_jax.interop.load import load
from ctx_jax.interop.pretrained import Pooling, Pretrained
from ctx_jax.interop.programs.forward import ProgramOptions
from ctx_jax.interop.save import WHOLE, save
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params
from ctx_jax.text.tokenizer import Tokenizer

Text = str | Sequence[str]


class Candidate(NamedTuple):
    """What may stand at a [MASK].

    Attributes:
      token: as the vocabulary spells it.
      probability: of the token among all tokens.
    """

    token: str
    probability: float


class Encoder(abc.ABC):
    """A model with its weights and its tokenizer.

    Attributes:
      config: sizes.
      params: nested dict of arrays.
      tokenizer: None when the folder holds none.
      pooling: how a sentence encoder makes a text's vector; None of others.
      about: what the folder says of how the model was made.
    """

    about: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, config: Any, params: Params, tokenizer: Tokenizer | None = None, pooling: Pooling | None = None):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.pooling = pooling

    @staticmethod
    def from_pretrained(path: str | os.PathLike[str]) -> Encoder:
        """Loads a folder, whatever wrote it: a run directory (its final weights, or those of its newest good
        checkpoint), an import, or another library's, see `interop.load.SUPPORTED`.

        Raises:
          InputError: nothing in the folder is known, or what is there is broken or does not fit.
        """
        from ctx_jax.encoder.bert import BertEncoder
        from ctx_jax.encoder.elmo import ElmoEncoder

        found = load(path)
        kind = ElmoEncoder if isinstance(found.config, ElmoConfig) else BertEncoder
        encoder = kind(found.config, found.params, found.tokenizer, found.pooling)
        encoder.about = found.about
        return encoder

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        format: str | None = None,
        options: ProgramOptions = WHOLE,
        *,
        overwrite: bool = False,
    ) -> list[Check]:
        """Writes the model as a folder of another library's, with a card and a certificate; whole or not at all.

        Args:
          folder: where; it must not exist, or be empty, unless `overwrite`.
          format: a name of `interop.save.FORMATS` or PROGRAMS; None is `hugging-face`, for an ELMo `bilm`.
          options: of a program.
          overwrite: replace what is there.

        Returns:
          What those who could read the folder got back; it stands in its certificate.json too.

        Raises:
          InputError: the format cannot hold the model, or the folder cannot be written.
        """
        format = format or ("bilm" if isinstance(self.config, ElmoConfig) else "hugging-face")
        pretrained = Pretrained(self.config, self.params, self.tokenizer, self.pooling, self.about)
        return save(pretrained, folder, format, options, overwrite=overwrite, card=model_card(pretrained))

    def embed(self, texts: Text | Sequence[Text], *, batch_size: int = 32) -> Float[np.ndarray, "B D"]:
        """A vector for each text, pooled as the model's folder says; else the mean of the last layer's.

        Raises:
          InputError: as `encode`.
        """
        pooling = self.pooling or Pooling()
        found = self.encode(texts, all_layers=False, batch_size=batch_size).sentences(pooling.pool)
        if not pooling.normalize:
            return found
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    @abc.abstractmethod
    def encode(
        self,
        texts: Text | Sequence[Text],
        *,
        all_layers: bool = True,
        batch_size: int = 32,
        on_too_long: Literal["error", "truncate", "split"] = "error",
        stride: int = 0,
    ) -> Representations:
        """Vectors of texts: strings, or lists of words; a single string is a list of one."""

    def fill_mask(self, text: str, *, top: int = 5) -> list[list[Candidate]]:
        """The likeliest tokens for each mask of a text.

        Raises:
          InputError: this kind of model fills none.
        """
        del text, top
        raise InputError(f"fill_mask: {type(self.config).__name__} is no masked language model")

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("the folder holds no tokenizer: use encode_ids, or put the tokenizer's files into it")
        return self.tokenizer


def cosine(a: Float[np.ndarray, "*batch D"], b: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch"]:
    """Cosine of the angle between vectors."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
