"""transformers on PyTorch, op by op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch_model import PaddedBatches, last_layer, torch_device, versions


class TorchModel:
    """PyTorch's module under the names of the protocol."""

    def __init__(self, module: torch.nn.Module, device: str):
        self._module = module
        self._device = device
        self.about = {"device": "gpu" if device == "cuda" else "cpu", "versions": versions("torch", "transformers")}
        self.embed: PaddedBatches | None = None

    @torch.inference_mode()
    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Fetching the result waits for the device."""
        return self._module(*self._on_device(ids, mask)).float().cpu().numpy()

    @torch.inference_mode()
    def mean(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of each row's vectors, taken on the device."""
        ids, mask = self._on_device(ids, mask)
        vectors, seen = self._module(ids, mask).float(), mask[:, :, None].float()
        return ((vectors * seen).sum(1) / seen.sum(1)).cpu().numpy()

    def _on_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(array).to(self._device) for array in arrays]


def load(folder: str, options: Mapping[str, Any]) -> TorchModel:
    """The module as transformers makes it."""
    device = torch_device(options)
    model = TorchModel(last_layer(folder, options).to(device, getattr(torch, options["dtype"])), device)
    if options["texts"]:
        model.embed = PaddedBatches(folder, options, model.mean)
    return model
