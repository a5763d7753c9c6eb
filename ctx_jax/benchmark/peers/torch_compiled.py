"""transformers on PyTorch, compiled for the one shape by torch.compile, with the weights as constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch._inductor.config
from hugging_face import TorchModel
from torch_model import last_layer, torch_device


def load(folder: str, options: Mapping[str, Any]) -> TorchModel:
    """Compilation itself waits for the first run. The mode is the default one: others try out kernels, for minutes at
    every shape.
    """
    torch._inductor.config.freezing = True
    device = torch_device(options)
    module = last_layer(folder, options).to(device, getattr(torch, options["dtype"]))
    model = TorchModel(module, device, lambda part: torch.compile(part, dynamic=False))
    model.about |= {"mode": "torch.compile, default mode, one shape, frozen weights"}
    return model
