"""ctx_jax, as its users call it: the only peer that knows the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctx_jax.encoder import BertEncoder, ElmoEncoder, Encoder
from ctx_jax.encoder.batches import padded_length
from ctx_jax.flops.devices import device_peak, measured_cpu_peak
from ctx_jax.nn.parameters import flat_paths, nested
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
        self.about = _about()

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """All rows at once, as everybody else takes them."""
        at_once = len(ids) * padded_length(ids.shape[1], self._encoder.config.max_length)
        return self._encoder.encode_ids(ids, mask, layers="last", batch_tokens=at_once).last

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
        self._encoder._known.clear()
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

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The mean of each text's tokens."""
        config, tokenizer = self._encoder.config, self._encoder.tokenizer
        rows = model_inputs(tokenizer, texts, max_length=config.max_length, on_too_long="truncate")
        return np.stack([self._table[row.input_ids].mean(0) for row in rows])


def load(folder: str, options: Mapping[str, Any]) -> BertModel | ElmoModel | StaticModel:
    """The folder's model, in the type that is asked for."""
    if options["dtype"] == "float32":
        # GPUs multiply float32 in TF32 unless told not to, and PyTorch tells them.
        jax.config.update("jax_default_matmul_precision", "highest")
    encoder = Encoder.from_pretrained(folder)
    if options["static"]:
        return StaticModel(encoder)
    encoder = _in_type(encoder, options["dtype"])
    return ElmoModel(encoder) if isinstance(encoder, ElmoEncoder) else BertModel(encoder)


def _in_type(encoder: Encoder, dtype: str) -> Encoder:
    """On the device and, but for biases and norms, in the type of the computation: nothing is cast at every call."""
    params = {}
    for path, leaf in flat_paths(encoder.params).items():
        kept = leaf.ndim < 2 or path.endswith(("/bias", "/scale"))
        params[path] = jnp.asarray(leaf, leaf.dtype if kept else dtype)
    config = dataclasses.replace(encoder.config, dtype=dtype)
    return type(encoder)(config, nested(params), encoder.tokenizer, encoder.pooling)


def peak() -> dict[str, Any] | None:
    """What the device can do, measured here if it is a processor; None where nobody has published it."""
    # Longer than usual: on a machine that others use too, the shortest of few products is none at best.
    cpu = jax.default_backend() == "cpu"
    found = measured_cpu_peak(seconds=1.0) if cpu else device_peak()
    return None if found is None else found._asdict()
