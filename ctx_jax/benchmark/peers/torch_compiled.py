"""transformers on PyTorch, compiled by torch.compile with constant weights: for one shape, or any of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch._inductor.config
from hugging_face import TorchModel
from torch_model import PaddedBatches, last_layer, torch_device


def load(folder: str, options: Mapping[str, Any]) -> TorchModel:
    """Compilation itself waits for the first run. The mode is the default one: others try out kernels, for minutes at
    every shape. Batches of texts have many shapes, and one program for all of them.
    """
    torch._inductor.config.freezing = True
    device, dynamic = torch_device(options), bool(options["texts"])
    module = last_layer(folder, options).to(device, getattr(torch, options["dtype"]))
    model = TorchModel(module, device, lambda part: torch.compile(part, dynamic=dynamic))
    if dynamic:
        model.embed = PaddedBatches(folder, options, model.mean)
    shapes = "any shape" if dynamic else "one shape"
    model.about |= {"mode": f"torch.compile, default mode, {shapes}, frozen weights"}
    return model
