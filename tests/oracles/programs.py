"""Small models, their parameters and inputs, for every format that the forward pass is exported to."""

import functools

import jax
import numpy as np

from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound

BERT = BertConfig(
    vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, max_position_embeddings=40
)
ELMO = ElmoConfig(filters=((1, 8), (3, 12)), character_dim=4, lstm_dim=24, projection_dim=16, vocab_size=30)
SHAPES = [(1, 1), (3, 7), (5, 33)]
"""(B, T)."""


@functools.cache
def params_of(config):
    """Parameters of which none is zero or one throughout, so that a forgotten bias shows."""
    model = BertWithHeads if isinstance(config, BertConfig) else ElmoForPreTraining
    params = Bound(lambda rngs: model(config, rngs=rngs)).init(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + rng.normal(scale=0.05, size=x.shape).astype(x.dtype), params)


def inputs_of(config, rows, steps):
    """Rows of random lengths, the first of them full."""
    rng = np.random.default_rng(rows * 1000 + steps)
    lengths = np.array([steps, *rng.integers(1, steps + 1, rows - 1)], np.int32)
    inside = np.arange(steps)[None, :] < lengths[:, None]
    ids = lambda limit, *shape: rng.integers(0, limit, (rows, steps, *shape), np.int32)
    if isinstance(config, ElmoConfig):
        return {"char_ids": ids(config.num_characters, config.max_characters), "lengths": lengths}
    types = ids(config.type_vocab_size)
    return {"input_ids": ids(config.vocab_size), "attention_mask": inside.astype(np.int32), "token_type_ids": types}
