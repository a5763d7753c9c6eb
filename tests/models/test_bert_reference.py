"""What Hugging Face's BERT, RoBERTa and ELECTRA gave for small random models: every layer and every head."""

import numpy as np
import pytest
from oracles import bert as oracle
from oracles.parameters import original_names

from ctx_jax import Encoder
from ctx_jax.models.bert import BertConfig

HEADS = {
    "bert_pretraining": {
        "masked_lm": "out_prediction_logits",
        "next_sentence": "out_seq_relationship_logits",
    },
    "bert_gelu_new": {},
    "bert_tokcls": {"token_classifier": "out_logits"},
    "roberta_mlm": {"masked_lm": "out_logits"},
    "electra_disc": {"replaced_token": "out_logits"},
}
CONFIGS = {
    "bert_pretraining": BertConfig(120, 32, 3, 4, 48, 40, heads=("masked_lm", "next_sentence")),
    "bert_gelu_new": BertConfig(120, 32, 3, 4, 48, 40, activation="gelu_tanh", heads=()),
    "bert_tokcls": BertConfig(
        120, 32, 3, 4, 48, 40, pooler=False, heads=("token_classifier",), labels=[f"LABEL_{i}" for i in range(5)]
    ),
    "roberta_mlm": BertConfig(
        120,
        32,
        3,
        4,
        48,
        42,
        type_vocab_size=1,
        position_offset=2,
        layer_norm_eps=1e-5,
        pooler=False,
        heads=("masked_lm",),
    ),
    "electra_disc": BertConfig(120, 32, 3, 4, 48, 40, embedding_size=16, pooler=False, heads=("replaced_token",)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, reference):
    """Name, encoder, and what went in and came out of the original."""
    folder = reference / "hf_tiny" / request.param
    with np.load(folder / "io.npz") as arrays:
        return request.param, Encoder.from_pretrained(folder), dict(arrays)


def inputs(io):
    ids, mask = (io[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
    types = io.get("token_type_ids", np.zeros_like(ids)).astype(np.int32)
    assert set(mask.ravel().tolist()) == {0, 1}
    return ids, mask, types


def test_every_layer_and_head_is_the_originals(model):
    name, encoder, io = model
    assert encoder.config == CONFIGS[name]
    ids, mask, types = inputs(io)
    found, seen = encoder.encode_ids(ids, mask, types), mask > 0
    for layer in range(encoder.config.num_layers + 1):
        theirs = io[f"out_hidden_states_{layer}"]
        np.testing.assert_allclose(found.layers[layer][seen], theirs[seen], rtol=1e-5, atol=1e-5, err_msg=str(layer))
    for head, output in HEADS[name].items():
        logits = encoder.logits(head, ids, mask, types)
        theirs = io[output]
        assert logits.shape == theirs.shape
        where = slice(None) if head == "next_sentence" else seen
        np.testing.assert_allclose(logits[where], theirs[where], rtol=1e-5, atol=1e-5, err_msg=head)


def test_the_twin_is_the_originals_too(model):
    """The float64 twin, its attention weights included: what the other tests lean on leans on the original."""
    _, encoder, io = model
    config, w = encoder.config, original_names(encoder.params)
    ids, mask, types = inputs(io)
    for row in range(len(ids)):
        n = mask[row].sum()
        assert (mask[row, :n] == 1).all()
        layers, attentions = oracle.encode_text(
            w,
            ids[row, :n],
            types[row, :n],
            np.arange(n),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            activation=config.activation,
            eps=config.layer_norm_eps,
            position_offset=config.position_offset,
        )
        for layer in range(config.num_layers):
            theirs = io[f"out_attentions_{layer}"][row, :, :n, :n]
            np.testing.assert_allclose(attentions[layer], theirs, rtol=1e-5, atol=1e-6)
        if "out_pooler_output" in io:
            np.testing.assert_allclose(oracle.pool(w, layers[-1][0]), io["out_pooler_output"][row], rtol=0, atol=1e-6)
        output = io.get("out_prediction_logits", io.get("out_logits") if "masked_lm" in config.all_heads else None)
        if output is not None:
            logits = oracle.masked_lm_logits(w, layers[-1], activation=config.activation, eps=config.layer_norm_eps)
            np.testing.assert_allclose(logits, output[row, :n], rtol=1e-5, atol=1e-5)
        if "out_seq_relationship_logits" in io:
            ours = oracle.next_sentence_logits(w, layers[-1][0])
            np.testing.assert_allclose(ours, io["out_seq_relationship_logits"][row], rtol=0, atol=1e-6)
