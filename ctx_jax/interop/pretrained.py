"""What an import gives and an export takes: a model whole, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params
from ctx_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pooling:
    """How a sentence's vector comes from its tokens' (Reimers and Gurevych 2019, section 3).

    Attributes:
      pool: over all tokens of the last layer, special ones among them, or the `[CLS]` alone.
      normalize: to length 1.
    """

    pool: Literal["cls", "mean", "max"] = "mean"
    normalize: bool = False


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights.

    Attributes:
      config: sizes, and the heads that the weights have.
      params: nested dict of float32 arrays, of BertWithHeads or ElmoForPreTraining; of an ELMo that came without its
        language model's output layer, of Elmo under `encoder` alone.
      tokenizer: None where there is none.
      pooling: of a sentence encoder; None of others.
      about: what the folder says of how the model was made: `experiment` and `data` of a run directory.
    """

    config: BertConfig | ElmoConfig
    params: Params
    tokenizer: Tokenizer | None = None
    pooling: Pooling | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
