"""Contextual embeddings in JAX: pre-trained, read out layer by layer, accounted for and exported."""

import importlib

__version__ = "0.1.0"

# Loaded when first used: `import ctx_jax` costs nothing, and text-only work never loads JAX.
_PUBLIC = {
    "BertConfig": "ctx_jax.models.bert",
    "ElmoConfig": "ctx_jax.models.elmo",
    "Encoder": "ctx_jax.encoder",
    "Experiment": "ctx_jax.experiment",
    "InputError": "ctx_jax.errors",
    "Representations": "ctx_jax.arrays",
    "load_tokenizer": "ctx_jax.text.load",
    "pretrain": "ctx_jax.experiment",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ctx_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
