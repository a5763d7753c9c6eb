"""ctx_jax, as its users call it: the only peer that knows the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ctx_jax.encoder import BertEncoder, ElmoEncoder, Encoder
from ctx_jax.encoder.base import Pool
from ctx_jax.flops.devices import device_peak, measured_peak
from ctx_jax.text.inputs import model_inputs


def _about() -> dict[str, Any]:
    return {
        "device": "cpu" if jax.default_backend() == "cpu" else "gpu",
        "device_kind": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }


class BertModel:
    """Sub-words to vectors."""

    def __init__(self, encoder: BertEncoder):
        self._encoder = encoder
        self._compiled: dict[tuple[Any, ...], Callable[..., np.ndarray]] = {}
        self.about = _about()

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Rows of one shape, which is compiled at the first call."""
        return self._run(ids, mask, None)

    def mean(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of each row's vectors, taken on the device."""
        return self._run(ids, mask, "mean")

    def _run(self, ids: np.ndarray, mask: np.ndarray, pool: Pool | None) -> np.ndarray:
        key = (*ids.shape, pool)
        if key not in self._compiled:
            self._compiled[key] = self._encoder.compiled(*ids.shape, layers="last", pool=pool)
        return self._compiled[key](ids, mask)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The mean of each text's tokens."""
        return self._encoder.encode(texts, pool="mean", on_too_long="truncate")


class ElmoModel:
    """Words to vectors, from their characters."""

    def __init__(self, encoder: ElmoEncoder):
        self._encoder = encoder
        self.about = _about()

    def embed(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> np.ndarray:
        """The mean of each text's words, of which none is known from a call before."""
        self._encoder.forget()
        return self._encoder.encode(texts, pool="mean")


class StaticModel:
    """The token table alone: what is to be had without context."""

    def __init__(self, encoder: BertEncoder):
        self._encoder = encoder
        self._table = np.asarray(encoder.params["encoder"]["embeddings"]["token"]["table"], np.float32)
        self.about = _about()

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Looks up."""
        return self._table[ids] * mask[:, :, None].astype(np.float32)

    def mean(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of each row's vectors."""
        return self.forward(ids, mask).sum(1) / mask.sum(1, keepdims=True, dtype=np.float32)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The mean of each text's tokens."""
        config, tokenizer = self._encoder.config, self._encoder.tokenizer
        rows = model_inputs(tokenizer, texts, max_length=config.max_length, on_too_long="truncate")
        return np.stack([self._table[row.input_ids].mean(0) for row in rows])


def load(folder: str, options: Mapping[str, Any]) -> BertModel | ElmoModel | StaticModel:
    """The folder's model, in the type that is asked for."""
    encoder = Encoder.from_pretrained(folder, dtype=options["dtype"])
    if options["static"]:
        return StaticModel(encoder)
    return ElmoModel(encoder) if isinstance(encoder, ElmoEncoder) else BertModel(encoder)


def peak() -> dict[str, Any] | None:
    """What the device can do, measured here; where its memory is too full for that what is published, None if nothing
    is.
    """
    try:
        # Longer than usual: on a machine that others use too, the shortest of few products is none at best.
        found = measured_peak(seconds=1.0)
    except jax.errors.JaxRuntimeError:
        if jax.default_backend() == "cpu":
            raise
        found = device_peak()
    return None if found is None else found._asdict()
