"""transformers on PyTorch, op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch_model import LastLayer, MeanOfTokens, PaddedBatches, last_layer, torch_device, versions


class TorchModel:
    """PyTorch's module under the names of the protocol."""

    def __init__(
        self,
        module: LastLayer,
        device: str,
        compiled: Callable[[torch.nn.Module], Callable[..., torch.Tensor]] = lambda module: module,
    ):
        """`compiled` makes what runs of a module, at its first call."""
        self._vectors = compiled(module)
        self._mean = compiled(MeanOfTokens(module).eval())
        self._device = device
        self.about = {"device": "gpu" if device == "cuda" else "cpu", "versions": versions("torch", "transformers")}
        self.embed: PaddedBatches | None = None

    @torch.inference_mode()
    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, T, D]; fetching the result waits for the device."""
        return self._vectors(*self._on_device(ids, mask)).float().cpu().numpy()

    @torch.inference_mode()
    def mean(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Of each row's vectors, [B, D], made on the device."""
        return self._mean(*self._on_device(ids, mask)).cpu().numpy()

    def _on_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(array).to(self._device) for array in arrays]


def load(folder: str, options: Mapping[str, Any]) -> TorchModel:
    """The module as transformers makes it."""
    device = torch_device(options)
    model = TorchModel(last_layer(folder, options).to(device, getattr(torch, options["dtype"])), device)
    if options["texts"]:
        model.embed = PaddedBatches(folder, options, model.mean)
    return model
