"""Encoders small enough to ask anything of."""

import jax
import pytest

from ctx_jax.encoder.bert import BertEncoder
from ctx_jax.encoder.elmo import ElmoEncoder
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound
from ctx_jax.text.load import load_tokenizer


@pytest.fixture(scope="session")
def tiny_encoders(topics_corpus):
    """A BERT of three layers and an ELMo of two, their weights larger than at birth, so that neighbours matter."""
    bert = BertConfig(
        vocab_size=600, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=64, max_position_embeddings=48
    )
    params = Bound(lambda rngs: BertWithHeads(bert, rngs=rngs)).init(jax.random.key(0))
    grow = lambda path, leaf: leaf * 8 if path[-1].key in ("kernel", "table") else leaf
    params = jax.tree_util.tree_map_with_path(grow, params)
    elmo = ElmoConfig(
        filters=((1, 4), (3, 6)), character_dim=4, max_characters=12, num_highway=1, lstm_dim=12, projection_dim=6,
        vocab_size=9,
    )  # fmt: skip
    born = Bound(lambda rngs: ElmoForPreTraining(elmo, rngs=rngs)).init(jax.random.key(0))
    return {
        "bert": BertEncoder(bert, params, load_tokenizer(topics_corpus / "tokenizer")),
        "elmo": ElmoEncoder(elmo, jax.tree.map(lambda leaf: leaf * 2, born)),
    }
