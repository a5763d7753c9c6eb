"""What every trained model in use can do, and how it is loaded."""

from __future__ import annotations

import abc
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ctx_jax.arrays import Representations
from ctx_jax.checkpoint import Checkpoints, load_weights
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.models.bert import BertConfig, BertForPreTraining
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound, Params
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.tokenizer import Tokenizer

MODELS: dict[str, tuple[type, type]] = {
    "bert": (BertConfig, BertForPreTraining),
    "elmo": (ElmoConfig, ElmoForPreTraining),
}
"""By `model_type` of config.json."""

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
    """

    def __init__(self, config: Any, params: Params, tokenizer: Tokenizer | None = None):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer

    @staticmethod
    def from_pretrained(path: str | os.PathLike[str]) -> Encoder:
        """Loads a run directory: its final weights, or those of its newest good checkpoint.

        Raises:
          InputError: the folder, its config.json or its weights are missing or do not fit.
        """
        from ctx_jax.encoder.bert import BertEncoder
        from ctx_jax.encoder.elmo import ElmoEncoder

        folder = pathlib.Path(path)
        file = folder / "config.json"
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no folder"
            raise InputError(f"{folder}: found {found or 'nothing'}, expected a run directory with config.json")
        config, model = _read_config(file)
        bound = Bound(lambda rngs: model(config, rngs=rngs))
        if (folder / "weights").exists():
            params, _ = load_weights(folder / "weights", bound.shapes)
        else:
            restored = Checkpoints(folder / "checkpoints").restore({"params": bound.shapes}, partial=True)
            if restored is None:
                raise InputError(f"{folder}: found neither weights nor checkpoints, expected a run that has saved some")
            params = restored.state["params"]
        tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").exists() else None
        kind = ElmoEncoder if isinstance(config, ElmoConfig) else BertEncoder
        return kind(config, params, tokenizer)

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


def _read_config(file: pathlib.Path) -> tuple[Any, type]:
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    kind = record.get("model_type")
    if kind not in MODELS or "model" not in record:
        raise InputError(
            f"{file}: model_type is {kind!r}, expected one of {', '.join(MODELS)} in a config.json written by ctx_jax"
            + did_you_mean(str(kind), MODELS)
        )
    config, model = MODELS[kind]
    try:
        return config(**record["model"]), model
    except TypeError as error:
        raise InputError(f"{file}: model: {error}") from error


def cosine(a: Float[np.ndarray, "*batch D"], b: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch"]:
    """Cosine of the angle between vectors."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
