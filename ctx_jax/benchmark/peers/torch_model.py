"""What peers that begin with PyTorch share: the model of a Hugging Face folder, and their loop over texts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer


class LastLayer(torch.nn.Module):
    """Ids and mask to the last layer's vectors, nothing else: what exporters see."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, T, D]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class MeanOfTokens(torch.nn.Module):
    """Ids and mask to the mean of each row's vectors, summed in float32."""

    def __init__(self, vectors: LastLayer):
        super().__init__()
        self.vectors = vectors

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, D]."""
        vectors, seen = self.vectors(input_ids, attention_mask).float(), attention_mask[:, :, None].float()
        return (vectors * seen).sum(1) / seen.sum(1)


def set_up(options: Mapping[str, Any]) -> None:
    """Threads, and float32 products in float32, which on a GPU might be in TF32."""
    torch.set_num_threads(options["threads"])
    torch.set_float32_matmul_precision("highest")


def torch_device(options: Mapping[str, Any]) -> str:
    """Where PyTorch runs: on the GPU if there is one, unless the one it is measured beside runs on the processor."""
    return "cuda" if options["device"] != "cpu" and torch.cuda.is_available() else "cpu"


def last_layer(folder: str, options: Mapping[str, Any]) -> LastLayer:
    """The encoder without a pooler, whose product nobody asks for, with fused attention."""
    set_up(options)
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return LastLayer(model).eval()


def example(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask for an exporter: no size is 1, which it would take for a constant."""
    ids = torch.arange(2 * 16).reshape(2, 16) % (vocab_size // 2) + vocab_size // 2
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return ids, mask


def versions(*packages: str) -> dict[str, str]:
    """Of packages, by their names."""
    return {name: importlib.metadata.version(name) for name in packages}


def mean_of_tokens(vectors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[B, D] of [B, T, D], where the mask is 1."""
    return (vectors * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)


class PaddedBatches:
    """The loop that sentence-transformers made common: texts sorted by length, some of them at a time, padded to the
    longest of them.
    """

    def __init__(self, folder: str, options: Mapping[str, Any], mean: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        """`mean` makes of ids and mask [B, T] the mean of each row's vectors, [B, D]."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._options = options
        self._mean = mean

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] in the order of the texts."""
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        size, parts = self._options["batch"], []
        for begin in range(0, len(texts), size):
            batch = self._tokenizer(
                [texts[number] for number in order[begin : begin + size]],
                padding=True,
                truncation=True,
                max_length=self._options["max_length"],
                return_tensors="np",
            )
            parts.append(self._mean(*(batch[name].astype(np.int64) for name in ("input_ids", "attention_mask"))))
        found = np.empty((len(texts), parts[0].shape[1]), np.float32)
        found[order] = np.concatenate(parts)
        return found
