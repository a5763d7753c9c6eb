"""OpenVINO on the processor, with the program that it makes of PyTorch's module, batch and length left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
from torch_model import PaddedBatches, example, last_layer, mean_of_tokens, versions

PRECISION = {"float32": "f32", "bfloat16": "bf16"}
"""Said for float32 too: where the processor has bfloat16, that is what OpenVINO takes when it is not told."""


class OpenVinoModel:
    """A compiled model under the names of the protocol."""

    def __init__(self, compiled: openvino.CompiledModel):
        self._compiled = compiled
        self.about = {"device": "cpu", "versions": versions("openvino", "torch", "transformers")}
        self.embed: PaddedBatches | None = None

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, T, D]."""
        return self._compiled({"input_ids": ids, "attention_mask": mask})[0]

    def mean(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of each row's vectors."""
        return mean_of_tokens(self.forward(ids, mask), mask)


def load(folder: str, options: Mapping[str, Any]) -> OpenVinoModel:
    """Converts in memory and compiles for one request at a time, with all threads at it."""
    module = last_layer(folder, options)
    ids, mask = example(module.model.config.vocab_size)
    converted = openvino.convert_model(module, example_input={"input_ids": ids, "attention_mask": mask})
    settings = {
        "INFERENCE_NUM_THREADS": options["threads"],
        "INFERENCE_PRECISION_HINT": PRECISION[options["dtype"]],
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = OpenVinoModel(openvino.Core().compile_model(converted, "CPU", settings))
    if options["texts"]:
        model.embed = PaddedBatches(folder, options, model.mean)
    return model
