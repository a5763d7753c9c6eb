"""A model of every kind goes out in every format that can hold it, and comes back the same; bad folders are named."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from oracles.parameters import random_params

from ctx_jax import InputError
from ctx_jax.interop import bilm
from ctx_jax.interop.files.safetensors_file import read_safetensors, write_safetensors
from ctx_jax.interop.load import load
from ctx_jax.interop.pretrained import Pooling, Pretrained
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.save import FORMATS
from ctx_jax.interop.save import save as save_with_certificate
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import flat_paths

save = functools.partial(save_with_certificate, certificate=False)
SMALL = BertConfig(61, 16, 3, 2, 24, 20, pooler=False)
LABELS = ("no", "yes", "perhaps")
BERTS = {
    "for pre-training": dataclasses.replace(SMALL, pooler=True, heads=("masked_lm", "next_sentence")),
    "without heads": dataclasses.replace(SMALL, heads=(), pooler=True),
    "for masked LM": dataclasses.replace(SMALL, heads=("masked_lm",), activation="relu"),
    "own table": dataclasses.replace(SMALL, heads=("masked_lm",), tied_head=False),
    "token labels": dataclasses.replace(SMALL, heads=("token_classifier",), labels=LABELS),
    "text labels": dataclasses.replace(SMALL, heads=("sequence_classifier",), labels=LABELS, pooler=True),
    "spans": dataclasses.replace(SMALL, heads=("span_classifier",)),
    "RoBERTa": dataclasses.replace(SMALL, heads=("masked_lm",), position_offset=2, type_vocab_size=1),
    "RoBERTa, text labels": dataclasses.replace(
        SMALL, heads=("sequence_classifier",), labels=LABELS, position_offset=2, classifier_activation="tanh"
    ),
    "ELECTRA": dataclasses.replace(SMALL, heads=("replaced_token",), embedding_size=8),
    "ELECTRA's generator": dataclasses.replace(SMALL, heads=("masked_lm",), embedding_size=8),
    "DistilBERT": dataclasses.replace(SMALL, heads=("masked_lm",), type_vocab_size=0),
    "DistilBERT, text labels": dataclasses.replace(
        SMALL, heads=("sequence_classifier",), labels=LABELS, type_vocab_size=0, classifier_activation="relu"
    ),
    "ALBERT": dataclasses.replace(
        SMALL,
        heads=("masked_lm", "next_sentence"),
        embedding_size=8,
        shared_layers=True,
        pooler=True,
        activation="gelu_tanh",
    ),
}
ELMO = ElmoConfig(
    filters=((1, 4), (2, 8), (3, 12)),
    character_dim=4,
    num_highway=2,
    lstm_dim=20,
    projection_dim=6,
    vocab_size=0,
    cell_clip=None,
)


def pretrained(config, seed=0, **rest):
    params = jax.tree.map(jax.numpy.asarray, random_params(bound_model(config).shapes, seed))
    return Pretrained(config, params, **rest)


def assert_same(found, expected):
    assert found.config == expected.config
    assert found.pooling == expected.pooling
    ours, theirs = flat_paths(found.params), flat_paths(expected.params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("format", ["hugging-face", "flax", "npz"])
@pytest.mark.parametrize("name", BERTS)
def test_out_and_back(name, format, tmp_path):
    model = pretrained(BERTS[name])
    save(model, tmp_path / "out", format)
    found = load(tmp_path / "out")
    assert_same(found, model)
    save(found, tmp_path / "again", format)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "out"]


def test_our_own_folder_out_and_back(tmp_path):
    model = pretrained(BERTS["for pre-training"], pooling=Pooling("cls", normalize=True))
    save(model, tmp_path / "out", "ctx_jax")
    assert_same(load(tmp_path / "out"), model)


def test_googles_checkpoints_out_and_back(tmp_path):
    """Their gelu is the one with tanh; of an optimizer's moments nothing is read."""
    from ctx_jax.interop.files.tensorflow_file import read_tensorflow, write_tensorflow

    model = pretrained(dataclasses.replace(BERTS["for pre-training"], activation="gelu_tanh"))
    save(model, tmp_path / "out", "google-bert")
    assert json.loads((tmp_path / "out" / "bert_config.json").read_text())["hidden_act"] == "gelu"
    assert_same(load(tmp_path / "out"), model)
    tensors = {name: t.read() for name, t in read_tensorflow(tmp_path / "out" / "bert_model.ckpt").items()}
    assert tensors["cls/seq_relationship/output_weights"].shape == (2, 16)
    tensors |= {f"{name}/adam_m": np.zeros_like(value) for name, value in tensors.items()}
    write_tensorflow(tmp_path / "out" / "bert_model.ckpt", tensors | {"global_step": np.int64([7])[0:1].reshape(())})
    assert_same(load(tmp_path / "out"), model)
    with pytest.raises(InputError, match="activation 'gelu', expected gelu_tanh or relu"):
        save(pretrained(BERTS["for pre-training"]), tmp_path / "exact", "google-bert")
    with pytest.raises(InputError, match=r"found a albert|found a roberta"):
        save(pretrained(BERTS["RoBERTa"]), tmp_path / "other", "google-bert")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_elmo_out_and_back(tmp_path):
    model = pretrained(ELMO)
    for format in ("bilm", "npz", "ctx_jax"):
        save(model, tmp_path / format, format)
        assert_same(load(tmp_path / format), model)
    for format in ("hugging-face", "flax", "google-bert"):
        with pytest.raises(InputError, match="holds BERT and its kin, found ElmoConfig"):
            save(model, tmp_path / "x", format)
    with pytest.raises(InputError, match="holds an ELMo, found BertConfig"):
        save(pretrained(BERTS["spans"]), tmp_path / "x", "bilm")
    assert not (tmp_path / "x").exists()


def test_a_trained_elmo_leaves_without_its_output_layer(tmp_path):
    model = pretrained(dataclasses.replace(ELMO, vocab_size=9))
    save(model, tmp_path / "out", "bilm")
    found = load(tmp_path / "out")
    assert found.config == ELMO
    encoder = {path: leaf for path, leaf in flat_paths(model.params).items() if path.startswith("encoder/")}
    for path, leaf in flat_paths(found.params).items():
        np.testing.assert_array_equal(leaf, encoder.pop(path), err_msg=path)
    assert not encoder


@pytest.mark.parametrize("which", ["elmo_allennlp", "elmo_bilmtf"])
def test_the_originals_file_out_again(which, reference, tmp_path):
    """Every tensor of the original's weights, by its own names."""
    from ctx_jax.interop.files.hdf5_file import read_hdf5

    (tmp_path / "in").mkdir()
    for name, source in (("options.json", "options.json"), ("weights.hdf5", "lm_weights.hdf5")):
        shutil.copy(reference / which / source, tmp_path / "in" / name)
    model = load(tmp_path / "in")
    save(model, tmp_path / "out", "bilm")
    ours, theirs = (read_hdf5(tmp_path / place / "weights.hdf5") for place in ("out", "in"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name].read(), tensor.read(), err_msg=name)
    options = [json.loads((tmp_path / place / "options.json").read_text()) for place in ("out", "in")]
    assert options[0] == options[1]


@pytest.mark.parametrize("which", ["bert_pretraining", "bert_gelu_new", "bert_tokcls", "roberta_mlm", "electra_disc"])
def test_hugging_faces_file_out_again(which, reference, tmp_path):
    folder = reference / "hf_tiny" / which
    save(load(folder), tmp_path / "out", "hugging-face")
    ours, theirs = (
        read_safetensors(tmp_path / "out" / "model.safetensors"),
        read_safetensors(folder / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].read(), tensor.read(), err_msg=name)
    config, original = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", folder))
    labels = {"id2label", "label2id"}
    for name, value in config.items():
        if name not in labels or which == "bert_tokcls":
            assert original[name] == value, name


@pytest.fixture
def folder(tmp_path):
    save(pretrained(BERTS["for pre-training"], 3), tmp_path / "model", "hugging-face")
    return tmp_path / "model"


def rewritten(folder, change, **fields):
    """The folder with other tensors and other fields of config.json."""
    file = folder / "model.safetensors"
    tensors = {name: np.array(tensor.read()) for name, tensor in read_safetensors(file).items()}
    write_safetensors(file, change(tensors) or tensors, {"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | fields))
    return folder


def test_old_names_prefixes_and_buffers(folder):
    """gamma and beta, a wrapper's prefix, buffers of positions, tied copies: all of one model."""
    expected = load(folder)

    def change(tensors):
        copies = {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
            "bert.embeddings.position_ids": np.arange(20)[None],
        }
        old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )
        return {f"module.{old(name)}": value for name, value in (tensors | copies).items()}

    assert_same(load(rewritten(folder, change)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types(folder, dtype):
    import ml_dtypes

    expected = load(folder)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    found = load(rewritten(folder, lambda tensors: {name: value.astype(kind) for name, value in tensors.items()}))
    for path, leaf in flat_paths(found.params).items():
        assert leaf.dtype == np.float32
        theirs = np.asarray(flat_paths(expected.params)[path]).astype(kind).astype(np.float32)
        np.testing.assert_array_equal(leaf, theirs, err_msg=path)


def test_a_table_of_its_own_is_kept(folder):
    rng = np.random.default_rng(0)
    own = rng.normal(size=(61, 16)).astype(np.float32)
    found = load(rewritten(folder, lambda tensors: tensors | {"cls.predictions.decoder.weight": own}))
    assert not found.config.tied_head
    np.testing.assert_array_equal(found.params["masked_lm"]["table"], own)


def drop(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def put(name, value):
    return lambda tensors: tensors | {name: value}


NORM = "bert.encoder.layer.1.output.LayerNorm.weight"


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (drop(NORM), {}, rf"model\.safetensors: found no tensor {NORM}, expected one of \[16\]"),
        (put("bert.extra", np.ones(3, np.float32)), {}, r"does not have: bert\.extra; expected none"),
        (put(NORM, np.ones((2, 8), np.float32)), {}, rf"tensor {NORM}: found \[2, 8\], expected \[16\]"),
        (put(NORM, np.ones(16, np.int32)), {}, rf"tensor {NORM}: found int32, expected floating-point numbers"),
        (drop("bert.embeddings.word_embeddings.weight"), {}, r"found 0 tensors …embeddings\.word_embeddings\.weight"),
        (
            drop("x"),
            {"hidden_act": "geluu"},
            r"config\.json: hidden_act: found 'geluu', expected one of .*did you mean",
        ),
        (drop("x"), {"hidden_size": "16"}, r"config\.json: hidden_size: found '16', expected a whole number"),
        (
            drop("x"),
            {"num_attention_heads": 3},
            r"config\.json: BertConfig\.hidden_size 16 is not a multiple of num_heads 3",
        ),
        (
            drop("x"),
            {"model_type": "t5"},
            r"config\.json: model_type: found 't5', expected one of bert, roberta, electra",
        ),
        (drop("x"), {"position_embedding_type": "relative_key"}, r"position_embedding_type: found 'relative_key'"),
        (drop("x"), {"is_decoder": True}, r"is_decoder: found True, expected False"),
        (drop("x"), {"num_hidden_layers": 4}, r"found no tensor bert\.encoder\.layer\.3\.attention"),
        (drop("x"), {"num_hidden_layers": 2}, r"does not have: bert\.encoder\.layer\.2\.attention.* and 11 more"),
        (
            put("cls.predictions.decoder.bias", np.ones(61, np.float32)),
            {},
            r"tensor cls\.predictions\.decoder\.bias: found other values than in cls\.predictions\.bias",
        ),
        (
            put("classifier.weight", np.ones((3, 16), np.float32)),
            {},
            r"found a tensor classifier\.weight and architectures",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder, change, fields, message):
    with pytest.raises(InputError, match=message):
        load(rewritten(folder, change, **fields))


def test_folders_that_nobody_knows(tmp_path, folder):
    with pytest.raises(InputError, match="nowhere: found nothing, expected a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights.pt").touch()
    with pytest.raises(InputError, match=r"a: found weights\.pt, expected one of: a run directory .* Hugging Face"):
        load(tmp_path / "a")
    with pytest.raises(InputError, match=r"weights.pt: found a file, expected a folder"):
        load(tmp_path / "a" / "weights.pt")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model: found no weights, expected one of model\.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: found list, expected an object in JSON"):
        load(folder)


def test_nothing_is_replaced_unasked(folder, tmp_path):
    model = pretrained(BERTS["spans"])
    before = contents(folder)
    with pytest.raises(InputError, match="exists already, expected a new or empty folder"):
        save(model, folder, "hugging-face")
    with pytest.raises(InputError, match=r"format: found 'hugingface', expected one of .*did you mean 'hugging-face'"):
        save(model, folder, "hugingface")
    # A model that the format cannot hold leaves what is there.
    with pytest.raises(InputError, match="expected BERT's of pre-training"):
        save(model, folder, "google-bert", overwrite=True)
    assert contents(folder) == before
    save(model, folder, "hugging-face", overwrite=True)
    assert_same(load(folder), model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("option", [{"gated": True}, {"attention_window": 4}])
def test_no_class_of_theirs_has_our_options(option, tmp_path):
    with pytest.raises(InputError, match=f"BertConfig.{next(iter(option))} is .*no class of transformers"):
        save(pretrained(dataclasses.replace(BERTS["for masked LM"], **option)), tmp_path / "x", "hugging-face")


def test_a_sentence_encoder_brings_its_pooling(tmp_path):
    for pooling in (Pooling("mean", normalize=True), Pooling("cls"), Pooling("max")):
        model = pretrained(BERTS["without heads"], pooling=pooling)
        save(model, tmp_path / "out", "hugging-face", overwrite=True)
        assert_same(load(tmp_path / "out"), model)
    modules = tmp_path / "out" / "modules.json"
    record = json.loads(modules.read_text())
    modules.write_text(json.dumps([*record, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]))
    with pytest.raises(InputError, match="found modules Transformer, Pooling, Dense, expected"):
        load(tmp_path / "out")
    modules.write_text(json.dumps([{**record[0], "path": "../elsewhere"}, record[1]]))
    with pytest.raises(InputError, match=r"path: found '../elsewhere', expected a folder beside it"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("lstm", "dim"), None, "lstm.dim: found None, expected a whole number"),
        (("char_cnn", "n_characters"), 300, "char_cnn.n_characters: found 300, expected 262"),
        (("char_cnn", "activation"), "gelu", "ElmoConfig.activation is 'gelu'"),
        (("char_cnn", "filters"), [[1, 2, 3]], "char_cnn.filters: found"),
    ],
)
def test_options_that_cannot_be_followed(place, value, message):
    record = bilm.write_options(ELMO)
    record[place[0]][place[1]] = value
    with pytest.raises(InputError, match=f"options.json: {message}"):
        bilm.read_options(record, "options.json")
    del record[place[0]][place[1]]
    with pytest.raises(InputError, match=r"options.json: "):
        bilm.read_options(record, "options.json")


def test_a_wrong_group_in_hdf5(tmp_path):
    from ctx_jax.interop.files.hdf5_file import read_hdf5, write_hdf5

    save(pretrained(ELMO), tmp_path / "out", "bilm")
    file = tmp_path / "out" / "weights.hdf5"
    tensors = {name: np.array(tensor.read()) for name, tensor in read_hdf5(file).items()}
    write_hdf5(file, {name.replace("CNN_proj", "CNN_projection"): value for name, value in tensors.items()})
    with pytest.raises(InputError, match=r"weights\.hdf5: found no tensor CNN_proj/W_proj, expected one of \[24, 6\]"):
        load(tmp_path / "out")
    write_hdf5(file, tensors | {"RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_0": np.ones((13, 80), np.float32)})
    with pytest.raises(InputError, match=r"Cell0/LSTMCell/W_0: found \[13, 80\], expected \[12, 80\]"):
        load(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"weights\.hdf5: cannot be read"):
        load(tmp_path / "out")


def test_every_format_is_tried_here():
    assert FORMATS.keys() == {"ctx_jax", "hugging-face", "flax", "google-bert", "bilm", "npz"}
