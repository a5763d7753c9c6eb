"""The tables name what transformers' own classes have, PyTorch's and Flax's: every tensor and shape, nothing else."""

import json
import math

import numpy as np
import pytest

from ctx_jax.interop import hugging_face
from ctx_jax.interop.names import FAMILIES, FLAX, PYTORCH, bert_table
from ctx_jax.models.bert import BertWithHeads
from ctx_jax.nn.parameters import Bound, flat_paths

CLASSES = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "RobertaModel",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "ElectraModel",
    "ElectraForPreTraining",
    "ElectraForMaskedLM",
    "AlbertModel",
    "AlbertForPreTraining",
    "DistilBertModel",
    "DistilBertForMaskedLM",
]
FLAX_CLASSES = [
    "FlaxBertForPreTraining",
    "FlaxRobertaForMaskedLM",
    "FlaxAlbertForPreTraining",
    "FlaxElectraForMaskedLM",
    "FlaxElectraForPreTraining",
    "FlaxDistilBertForMaskedLM",
]


def record_of(kind, shapes, architecture):
    """A config.json with the sizes that a class' own shapes have; names are PyTorch's, flax's turned into them."""
    find = lambda end: next(shape for name, shape in shapes.items() if name.endswith(end))
    vocab, width = find("word_embeddings.weight")
    first = {"distilbert": "ffn.lin1.weight", "albert": "ffn.weight"}.get(kind, "intermediate.dense.weight")
    inner, hidden = find(first)
    numbers = {int(part) for name in shapes for part in name.split(".layer.")[1:] for part in [part.split(".")[0]]}
    record = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": vocab,
        "max_position_embeddings": find("position_embeddings.weight")[0],
    }
    names = (
        ("dim", "n_layers", "n_heads", "hidden_dim")
        if kind == "distilbert"
        else ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    record |= dict(zip(names, (hidden, max(numbers, default=3) + 1, 4, inner), strict=True))
    if kind != "distilbert":
        record["type_vocab_size"] = find("token_type_embeddings.weight")[0]
    if kind in ("electra", "albert"):
        record["embedding_size"] = width
    return record


def described(record, names, *, flax):
    """Names and shapes by the table, and the sum of the parameters' sizes."""
    found = hugging_face.find(names, record, flax, "x")
    config = hugging_face.read_config(record, "x", heads=found.heads, pooler=found.pooler)
    table = bert_table(config, FAMILIES[record["model_type"]], found.dialect, prefix=found.prefix, outer=found.outer)
    leaves = flat_paths(Bound(lambda rngs: BertWithHeads(config, rngs=rngs)).shapes)
    assert {entry.ours for entry in table} == leaves.keys()
    views = {}
    for entry in table:
        leaf = np.broadcast_to(np.float32(0), leaves[entry.ours].shape)
        parts = {part.theirs: part.view(leaf).shape for part in entry.parts}
        assert sum(map(math.prod, parts.values())) == leaf.size
        assert not parts.keys() & views.keys()
        views |= parts
    return views, config


@pytest.mark.parametrize("name", CLASSES)
def test_pytorchs(name, reference):
    entry = json.loads((reference / "hf_keys" / "keys.json").read_text())[name]
    shapes = {key: tuple(shape) for key, shape in entry["keys"].items()}
    kind = next(kind for kind in FAMILIES if name.lower().startswith(kind))
    found, config = described(record_of(kind, shapes, name), shapes, flax=False)
    left = {key: shape for key, shape in shapes.items() if key not in {*entry["buffers"], *(entry["tied"] or {})}}
    assert found == left
    assert sum(map(math.prod, found.values())) == entry["n_params"]
    assert hugging_face.write_config(config)["architectures"] == [name]


@pytest.mark.parametrize("name", FLAX_CLASSES)
def test_flaxes(name, reference):
    shapes = {
        key: tuple(shape)
        for key, shape in json.loads((reference / "hf_keys" / "flax_keys.json").read_text())[name].items()
    }
    kind = next(kind for kind in FAMILIES if name.lower().startswith(f"flax{kind}"))
    spelt = {
        key.replace("/", ".").replace(".kernel", ".weight").replace(".embedding", ".weight")
        if key.endswith(("kernel", "/embedding"))
        else key.replace("/", "."): shape[::-1] if key.endswith("kernel") else shape
        for key, shape in shapes.items()
    }
    spelt = {key.replace("word_weights", "word_embeddings"): shape for key, shape in spelt.items()}
    found, _ = described(record_of(kind, spelt, name), shapes, flax=True)
    # One layer is listed for all.
    layers = lambda names: {name for name in names if "/layer/0/" in name or "/layer/" not in name}
    assert {name: found[name] for name in layers(found)} == {name: shapes[name] for name in layers(shapes)}
    assert layers(found) == layers(shapes)


def test_dialects_differ_in_the_kernels_axes_alone():
    config = hugging_face.read_config(
        {"model_type": "bert", "vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"intermediate_size": 6, "max_position_embeddings": 5},
        "x",
    )
    leaves = flat_paths(Bound(lambda rngs: BertWithHeads(config, rngs=rngs)).shapes)
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=leaf.shape) for path, leaf in leaves.items()}
    tables = (bert_table(config, FAMILIES["bert"], dialect, prefix="bert.") for dialect in (PYTORCH, FLAX))
    for torch, flax in zip(*tables, strict=True):
        assert torch.ours == flax.ours
        for one, other in zip(torch.parts, flax.parts, strict=True):
            a, b = one.view(values[torch.ours]), other.view(values[torch.ours])
            np.testing.assert_array_equal(a, b.T if torch.ours.endswith("kernel") else b)
