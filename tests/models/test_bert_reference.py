"""What Hugging Face's BERT gave for small random models, with gelu and with gelu_new: every layer and every head."""

import json

import numpy as np
import pytest
from oracles import bert as oracle
from oracles.compiling import quick_jit
from oracles.parameters import nested, original_names

from ctx_jax.models.bert import BertConfig, BertForPreTraining
from ctx_jax.nn.parameters import Bound, flat_paths

LAYER = {
    "attention.output.dense": "attention/out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward/up",
    "output.dense": "feed_forward/down",
    "output.LayerNorm": "feed_forward_norm",
}
MODULES = {
    "embeddings.LayerNorm": "encoder/embeddings/norm",
    "pooler.dense": "encoder/pooler/dense",
    "cls.predictions.transform.dense": "masked_lm/dense",
    "cls.predictions.transform.LayerNorm": "masked_lm/norm",
    "cls.seq_relationship": "next_sentence",
}
TABLES = {
    "embeddings.word_embeddings.weight": "encoder/embeddings/token/table",
    "embeddings.position_embeddings.weight": "encoder/embeddings/position/table",
    "embeddings.token_type_embeddings.weight": "encoder/embeddings/type/table",
    "cls.predictions.bias": "masked_lm/bias",
}


def read_safetensors(path):
    """Eight bytes: the header's length; JSON: name → type, shape, place; then the values."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            first, last = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[start + first : start + last], np.float32).reshape(entry["shape"])
    return tensors


def our_tree(tensors, num_layers):
    """torch's Linear holds its kernel transposed; we stack layers, and put query, key and value side by side."""
    tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    ours = {path: tensors.pop(name) for name, path in TABLES.items() if name in tensors}

    def module(name):
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")
        return {"scale": weight, "bias": bias} if name.endswith("LayerNorm") else {"kernel": weight.T, "bias": bias}

    for name, path in MODULES.items():
        if f"{name}.weight" in tensors:
            ours |= {f"{path}/{leaf}": value for leaf, value in module(name).items()}
    layers = []
    for layer in range(num_layers):
        at = f"encoder.layer.{layer}"
        leaves = {f"{path}/{k}": v for name, path in LAYER.items() for k, v in module(f"{at}.{name}").items()}
        parts = [module(f"{at}.attention.self.{which}") for which in ("query", "key", "value")]
        leaves["attention/qkv/kernel"] = np.stack([part["kernel"] for part in parts], axis=1)
        leaves["attention/qkv/bias"] = np.stack([part["bias"] for part in parts])
        layers.append(leaves)
    assert not tensors, f"left over: {sorted(tensors)}"
    return ours | {f"encoder/layers/{path}": np.stack([leaves[path] for leaves in layers]) for path in layers[0]}


@pytest.fixture(scope="module", params=["bert_pretraining", "bert_gelu_new"])
def model(request, reference):
    """(config, Bound, params, what went in and came out of the original)."""
    folder = reference / "hf_tiny" / request.param
    theirs = json.loads((folder / "config.json").read_text())
    config = BertConfig(
        vocab_size=theirs["vocab_size"],
        hidden_size=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        intermediate_size=theirs["intermediate_size"],
        max_position_embeddings=theirs["max_position_embeddings"],
        activation={"gelu": "gelu", "gelu_new": "gelu_tanh"}[theirs["hidden_act"]],
        layer_norm_eps=theirs["layer_norm_eps"],
    )
    bound = Bound(lambda rngs: BertForPreTraining(config, rngs=rngs))
    params = our_tree(read_safetensors(folder / "model.safetensors"), config.num_layers)
    shapes = {path: leaf.shape for path, leaf in flat_paths(bound.shapes).items()}
    if request.param == "bert_gelu_new":  # an encoder without heads: zeros stand in, and are not looked at
        params |= {path: np.zeros(shape, np.float32) for path, shape in shapes.items() if path not in params}
    assert shapes == {path: values.shape for path, values in params.items()}
    with np.load(folder / "io.npz") as arrays:
        return config, bound, nested(params), dict(arrays)


def inputs(io):
    ids, types, mask = (io[k].astype(np.int32) for k in ("input_ids", "token_type_ids", "attention_mask"))
    assert {0, 1} == set(mask.ravel().tolist()) == set(types.ravel().tolist())
    return ids, types, mask, np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))


def test_every_layer_and_head_is_the_originals(model):
    config, bound, params, io = model
    arrays = inputs(io)

    @quick_jit
    def run(params, arrays):
        model = bound(params)
        out = model.encoder(*arrays, all_layers=True)
        cls = out.last[:, 0]
        logits = model.masked_lm_logits(out.last.reshape(-1, config.hidden_size))
        return out.layers, model.encoder.pooler(cls), logits, model.next_sentence_logits(cls)

    layers, pooled, logits, next_sentence = run(params, arrays)
    seen = arrays[2] > 0
    for layer in range(config.num_layers + 1):
        theirs = io.pop(f"out_hidden_states_{layer}")
        np.testing.assert_allclose(layers[layer][seen], theirs[seen], rtol=1e-5, atol=1e-5, err_msg=str(layer))
    heads = {
        "out_last_hidden_state": np.asarray(layers[-1]),
        "out_pooler_output": np.asarray(pooled),
        "out_prediction_logits": np.asarray(logits).reshape(*seen.shape, -1),
        "out_seq_relationship_logits": np.asarray(next_sentence),
    }
    compared = [name for name in heads if name in io]
    assert len(compared) == 2
    for name in compared:
        where = seen if io[name].ndim == 3 else slice(None)
        np.testing.assert_allclose(heads[name][where], io.pop(name)[where], rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_twin_is_the_originals_too(model):
    """The float64 twin, its attention weights included: what the other tests lean on leans on the original."""
    config, _, params, io = model
    w = original_names(params)
    ids, types, mask, positions = inputs(io)
    for row in range(len(ids)):
        n = mask[row].sum()
        assert (mask[row, :n] == 1).all()
        layers, attentions = oracle.encode_text(
            w,
            ids[row, :n],
            types[row, :n],
            positions[row, :n],
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            activation=config.activation,
        )
        for layer in range(config.num_layers):
            theirs = io[f"out_attentions_{layer}"][row, :, :n, :n]
            np.testing.assert_allclose(attentions[layer], theirs, rtol=1e-5, atol=1e-6)
        if "out_pooler_output" in io:
            np.testing.assert_allclose(oracle.pool(w, layers[-1][0]), io["out_pooler_output"][row], rtol=0, atol=1e-6)
        if "out_prediction_logits" in io:
            logits = oracle.masked_lm_logits(w, layers[-1], activation=config.activation)
            np.testing.assert_allclose(logits, io["out_prediction_logits"][row, :n], rtol=1e-5, atol=2e-6)
            ours = oracle.next_sentence_logits(w, layers[-1][0])
            np.testing.assert_allclose(ours, io["out_seq_relationship_logits"][row], rtol=0, atol=1e-6)
