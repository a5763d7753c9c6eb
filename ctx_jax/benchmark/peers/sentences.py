"""sentence-transformers: its own loop over texts, which sorts and pads by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch_model import torch_device, versions


class SentenceModel:
    """A sentence transformer under the names of the protocol."""

    def __init__(self, model: SentenceTransformer, batch: int):
        self._model = model
        self._batch = batch
        self.about = {
            "device": "cpu" if model.device.type == "cpu" else "gpu",
            "versions": versions("sentence-transformers", "torch", "transformers"),
        }

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The mean of each text's tokens."""
        return self._model.encode(texts, batch_size=self._batch, show_progress_bar=False).astype(np.float32)


def load(folder: str, options: Mapping[str, Any]) -> SentenceModel:
    """The transformer of the folder and a mean over its tokens, whatever pooling the folder asks for."""
    torch.set_num_threads(options["threads"])
    transformer = Transformer(folder, max_seq_length=options["max_length"], model_args={"attn_implementation": "sdpa"})
    pooling = Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling], device=torch_device(options))
    return SentenceModel(model.to(getattr(torch, options["dtype"])).eval(), options["batch"])
