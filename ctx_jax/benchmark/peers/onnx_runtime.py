"""onnxruntime on the processor, with the program that torch.onnx makes of the model, batch and length left open."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch_model import PaddedBatches, example, last_layer, mean_of_tokens, versions

NAMES = ("input_ids", "attention_mask")


class OnnxModel:
    """A session under the names of the protocol."""

    def __init__(self, session: onnxruntime.InferenceSession):
        self._session = session
        self.about = {"device": "cpu", "versions": versions("onnxruntime", "torch", "transformers", "onnx")}
        self.embed: PaddedBatches | None = None

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, T, D]."""
        return self._session.run(None, dict(zip(NAMES, (ids, mask), strict=True)))[0]

    def mean(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of each row's vectors."""
        return mean_of_tokens(self.forward(ids, mask), mask)


def load(folder: str, options: Mapping[str, Any]) -> OnnxModel:
    """Exports to a file that lives no longer than it takes to read it."""
    module = last_layer(folder, options)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    settings.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as name:
        file = os.path.join(name, "model.onnx")
        torch.onnx.export(
            module,
            example(module.model.config.vocab_size),
            file,
            input_names=NAMES,
            dynamic_shapes=({0: "batch", 1: "length"},) * 2,
            verbose=False,
        )
        model = OnnxModel(onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"]))
    if options["texts"]:
        model.embed = PaddedBatches(folder, options, model.mean)
    return model
