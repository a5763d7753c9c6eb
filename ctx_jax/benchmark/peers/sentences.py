"""sentence-transformers: its own loop over texts, which sorts and pads by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch_model import set_up, torch_device, versions


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
    """The transformer of the folder and a mean over its tokens, which is what a folder without a word on it gets."""
    set_up(options)
    settings = {"attn_implementation": "sdpa", "dtype": getattr(torch, options["dtype"])}
    model = SentenceTransformer(folder, device=torch_device(options), model_kwargs=settings, local_files_only=True)
    model.max_seq_length = options["max_length"]
    return SentenceModel(model.eval(), options["batch"])
