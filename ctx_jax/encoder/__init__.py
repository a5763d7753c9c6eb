"""Trained models in use: text in, vectors out."""

from ctx_jax.encoder.base import Candidate, Encoder, cosine
from ctx_jax.encoder.bert import BertEncoder
from ctx_jax.encoder.elmo import ElmoEncoder

__all__ = ["BertEncoder", "Candidate", "ElmoEncoder", "Encoder", "cosine"]
