"""Repaired vectors are the plain ones under the map, in float64 by NumPy; repairs go where the model goes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from oracles.parameters import random_params

from ctx_jax import Encoder, InputError, cli
from ctx_jax.encoder import BertEncoder, ElmoEncoder
from ctx_jax.encoder.repair import FITS, Repair
from ctx_jax.encoder.shards import read_shards, write_shards
from ctx_jax.interop.load import load
from ctx_jax.interop.pretrained import KINDS, REPAIRS, Pooling, Pretrained, save_repairs
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.save import FORMATS, save
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.load import load_tokenizer

BERT = BertConfig(600, 8, 2, 2, 16, 32, activation="gelu_tanh")  # which every format can hold
ELMO = ElmoConfig(filters=((1, 4), (3, 6)), character_dim=4, lstm_dim=12, projection_dim=4, vocab_size=0)
WORDS = ["set", "names", "bank", "river", "statement", "and", "value", "."]
TEXTS = [" ".join(np.random.default_rng(seed).choice(WORDS, 1 + seed % 9)) for seed in range(24)]
LAYERS = {"last": [2], "all": [0, 1, 2], "[2, 0]": [2, 0], "[1]": [1]}


def make(config, tokenizer=None):
    params = jax.tree.map(jax.numpy.asarray, random_params(bound_model(config).shapes, 0))
    kind = BertEncoder if isinstance(config, BertConfig) else ElmoEncoder
    return kind(config, params, tokenizer)


@pytest.fixture(scope="module")
def encoders(topics_corpus):
    found = {"BERT": make(BERT, load_tokenizer(topics_corpus / "tokenizer")), "ELMo": make(ELMO)}
    for encoder in found.values():
        encoder.fit_repairs(TEXTS, k=4)  # ELMo's layer 0 is a vector twice: half of the directions
    return found


@pytest.fixture(scope="module")
def plain(encoders):
    """Vectors of all layers: of tokens, and means."""
    return {
        name: (encoder.encode(TEXTS), encoder.encode(TEXTS, layers="all", pool="mean"))
        for name, encoder in encoders.items()
    }


@pytest.fixture(scope="module")
def uneven(encoders):
    """Encoders whose layers have not the same repairs."""
    found = [make(BERT, encoders["BERT"].tokenizer), make(ELMO)]
    for encoder in found:
        encoder.fit_repairs(TEXTS, ["centre", "whiten"], layers=[2], k=4)
        encoder.fit_repairs(TEXTS, ["whiten"], layers=[1], k=3)
    return found


def by_numpy(encoder, kind, vectors, layers):
    """(x - mean) @ matrix, layer by layer, in float64."""
    found = []
    for layer, x in zip(layers, np.asarray(vectors, np.float64), strict=True):
        repair = encoder.repairs[layer][kind]
        matrix = np.eye(8) if repair.matrix is None else np.asarray(repair.matrix, np.float64)
        found.append((x - np.asarray(repair.mean, np.float64)) @ matrix)
    return np.stack(found)


def asked(layers):
    return layers if layers in ("last", "all") else json.loads(layers)


def assert_close(found, expected):
    """To float32, of the largest: whitening makes small directions large."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(np.abs(expected).max(), 1))


KINDS_OF_LAYERS = [("last", kind) for kind in KINDS] + [("all", "zca"), ("[2, 0]", "whiten"), ("[1]", "centre")]


@pytest.mark.parametrize(("layers", "kind"), KINDS_OF_LAYERS)
@pytest.mark.parametrize("name", ["BERT", "ELMo"])
def test_pooled_vectors(encoders, plain, name, layers, kind):
    encoder, ask = encoders[name], asked(layers)
    found = encoder.encode(TEXTS, layers=ask, pool="mean", repair=kind)
    expected = by_numpy(encoder, kind, plain[name][1][LAYERS[layers]], LAYERS[layers])
    assert found.shape[-1] == (4 if kind == "whiten" else 8)
    assert_close(found, expected[0] if layers == "last" else expected)
    stream = np.stack(list(encoder.encode_stream(iter(TEXTS), layers=ask, repair=kind)))
    np.testing.assert_array_equal(stream, found if layers == "last" else np.moveaxis(found, 0, 1))


@pytest.mark.parametrize("pool", ["max", "cls"])
@pytest.mark.parametrize("name", ["BERT", "ELMo"])
def test_the_repair_comes_after_pooling(encoders, name, pool):
    encoder = encoders[name]
    plain = encoder.encode(TEXTS, layers="all", pool=pool)
    found = encoder.encode(TEXTS, layers="all", pool=pool, repair="zca")
    assert_close(found, by_numpy(encoder, "zca", plain, [0, 1, 2]))


@pytest.mark.parametrize(
    ("layers", "kind"), [("last", "centre"), ("last", "whiten"), ("all", "whiten"), ("[2, 0]", "zca")]
)
@pytest.mark.parametrize("name", ["BERT", "ELMo"])
def test_vectors_of_tokens(encoders, plain, name, layers, kind):
    encoder, every = encoders[name], plain[name][0]
    found = encoder.encode(TEXTS, layers=asked(layers), repair=kind)
    expected = by_numpy(encoder, kind, every.layers[LAYERS[layers]], LAYERS[layers]) * every.mask[..., None]
    np.testing.assert_array_equal(found.mask, every.mask)
    assert_close(found.last[None] if layers == "last" else found.layers, expected)
    assert not (found.last[None] if layers == "last" else found.layers)[:, ~found.mask].any()


def test_embed_normalises_what_is_repaired(encoders):
    encoder = make(BERT, encoders["BERT"].tokenizer)
    encoder.repairs, encoder.pooling = encoders["BERT"].repairs, Pooling("cls", normalize=True)
    expected = encoder.encode(TEXTS, pool="cls", repair="zca")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.embed(TEXTS, repair="zca"), expected, rtol=1e-5)


def test_ids_and_one_shape(encoders):
    encoder = encoders["BERT"]
    ids = np.random.default_rng(0).integers(5, 600, (3, 9))
    mask = (np.arange(9) < [[9], [4], [1]]).astype(int)
    plain = encoder.encode_ids(ids, mask)
    expected = by_numpy(encoder, "whiten", plain.layers, [0, 1, 2]) * mask[..., None]
    assert_close(encoder.encode_ids(ids, mask, repair="whiten").layers, expected)
    assert_close(encoder.compiled(3, 9, layers="all", repair="whiten")(ids, mask), expected)
    pooled = by_numpy(encoder, "zca", plain.sentences("mean")[None], [2])[0]
    assert_close(encoder.compiled(3, 9, pool="mean", repair="zca")(ids, mask), pooled)


def test_a_text_that_goes_on(encoders):
    encoder = encoders["ELMo"]
    sentences = [["a", "bank"], ["the", "river", "."]]
    plain, state = encoder.encode_on(sentences)
    found, same = encoder.encode_on(sentences, repair="zca")
    assert_close(found.layers, by_numpy(encoder, "zca", plain.layers, [0, 1, 2]) * plain.mask[..., None])
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize(("name", "pool"), [("BERT", "mean"), ("ELMo", None)])
def test_in_bfloat16_the_repair_is_float32(encoders, name, pool):
    config = dataclasses.replace(encoders[name].config, dtype="bfloat16")
    encoder = make(config, encoders["BERT"].tokenizer)
    encoder.repairs = encoders[name].repairs
    plain = encoder.encode(TEXTS, layers="last", pool=pool)
    found = encoder.encode(TEXTS, layers="last", pool=pool, repair="zca")
    plain, found = (x if pool else x.last[x.mask] for x in (plain, found))
    assert_close(found, by_numpy(encoder, "zca", plain[None], [2])[0])


def test_another_repair_of_the_same_shape_compiles_nothing(encoders):
    encoder = make(BERT, encoders["BERT"].tokenizer)
    encoder.repairs = encoders["BERT"].repairs
    others = make(BERT, encoders["BERT"].tokenizer)
    others.fit_repairs(TEXTS[:12], ["zca"], layers="last")
    before = encoder._forward._cache_size()
    first = encoder.encode(TEXTS, pool="mean", repair="zca")
    compiled = encoder._forward._cache_size()
    assert compiled > before
    encoder.encode(TEXTS, pool="mean", repair="all-but-the-top")
    encoder.repairs = others.repairs
    second = encoder.encode(TEXTS, pool="mean", repair="zca")
    assert encoder._forward._cache_size() == compiled
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(second, encoder.encode(TEXTS, pool="mean", repair=others.repairs[2]["zca"]))

    elmo = encoders["ELMo"]
    elmo.encode(TEXTS, repair="zca")
    compiled = elmo._contextualise._cache_size()
    elmo.encode(TEXTS, repair="all-but-the-top")
    elmo.encode(TEXTS[::-1], pool="max", repair="zca")
    assert elmo._contextualise._cache_size() <= compiled + 1  # the pooled ones: vectors without a repair


def test_warm_up_compiles_for_a_repair(encoders):
    encoder = make(BERT, encoders["BERT"].tokenizer)
    encoder.repairs = encoders["BERT"].repairs
    encoder.warm_up(8, pool="mean", repair="zca", batch_tokens=64)
    compiled = encoder._forward._cache_size()
    encoder.encode(["set", "bank and river"], pool="mean", repair="all-but-the-top", batch_tokens=64)
    assert encoder._forward._cache_size() == compiled


def test_fits_are_those_of_the_vectors(encoders):
    encoder = make(ELMO)
    encoder.fit_repairs(TEXTS, "centre", layers=[1, -1], pool="max")
    assert {layer: list(kinds) for layer, kinds in encoder.repairs.items()} == {1: ["centre"], 2: ["centre"]}
    vectors = encoder.encode(TEXTS, layers="all", pool="max").astype(np.float64)
    np.testing.assert_allclose(encoder.repairs[1]["centre"].mean, vectors[1].mean(0), rtol=1e-5, atol=1e-6)
    encoder.fit_repairs(TEXTS, ["zca"], layers="last", pool=None)
    assert list(encoder.repairs[2]) == ["centre", "zca"]
    tokens = encoder.encode(TEXTS, layers="last")
    expected = FITS["zca"](tokens.last[tokens.mask])
    np.testing.assert_allclose(encoder.repairs[2]["zca"].matrix, expected.matrix, rtol=1e-5)
    before = encoder.repairs
    with pytest.raises(InputError, match=r"kinds: found 'whitten'.*did you mean 'whiten'"):
        encoder.fit_repairs(TEXTS, "whitten")
    with pytest.raises(InputError, match="layer 0: whiten: k: found 9"):
        encoder.fit_repairs(TEXTS, ["centre", "whiten"], k=9)
    assert encoder.repairs is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": "zka"}, "repair: found 'zka', expected centre.*did you mean 'zca'"),
        ({"repair": 3}, "repair: found 3"),
        ({"repair": "zca"}, "repair: layer 2 has no 'zca', expected one that it has: centre, whiten"),
        (
            {"repair": "centre", "layers": "all"},
            "repair: layer 0 has no 'centre', expected one that it has: none; fit_r",
        ),
        ({"repair": "whiten", "layers": [1, 2]}, r"different widths: 3 \(layer 1\), 4 \(layer 2\), expected one"),
        ({"repair": FITS["centre"](np.eye(8)), "layers": [1, 2]}, "repair: found one for 2 layers"),
        ({"repair": FITS["centre"](np.eye(7))}, r"layer 2: found shapes \[\(7,\)"),
        ({"repair": Repair("zca", np.zeros(8), np.zeros((7, 8)))}, r"expected \[8\] and \[8, K\]"),
    ],
)
def test_repairs_that_there_are_not(uneven, options, message):
    for encoder in uneven:
        with pytest.raises(InputError, match=message):
            encoder.encode(TEXTS, pool="mean", **options)


@pytest.mark.parametrize("format", [*FORMATS, "sentence-transformers"])
def test_every_format_has_them_beside_the_weights(encoders, format, tmp_path):
    name = "ELMo" if format == "bilm" else "BERT"
    if format == "bilm":
        pytest.importorskip("h5py")
    encoder = encoders[name]
    pooling = Pooling("cls") if format == "sentence-transformers" else None
    pretrained = Pretrained(encoder.config, encoder.params, encoder.tokenizer, pooling, repairs=encoder.repairs)
    for folder in ("out", "again"):
        format = format if format in FORMATS else "hugging-face"
        save(pretrained, tmp_path / folder, format, certificate=False)
        pretrained = load(tmp_path / folder)
        assert pretrained.repairs.keys() == {0, 1, 2}
        for layer, kinds in pretrained.repairs.items():
            assert kinds.keys() == set(KINDS)
            for kind, repair in kinds.items():
                assert repair.kind == kind
                jax.tree.map(np.testing.assert_array_equal, repair, encoder.repairs[layer][kind])


@pytest.mark.parametrize("name", ["BERT", "ELMo"])
def test_an_exported_model_gives_the_same_vectors(encoders, name, tmp_path):
    if name == "ELMo":
        pytest.importorskip("h5py")
    encoders[name].save_pretrained(tmp_path / "out")
    assert f"are in {REPAIRS}: layer 0: " in (tmp_path / "out" / "README.md").read_text()
    found = Encoder.from_pretrained(tmp_path / "out").encode(TEXTS, layers="all", pool="mean", repair="whiten")
    expected = encoders[name].encode(TEXTS, layers="all", pool="mean", repair="whiten")
    np.testing.assert_array_equal(found, expected)


def test_a_program_has_them_beside_it(encoders, tmp_path):
    encoders["BERT"].save_pretrained(tmp_path / "out", "stablehlo")
    assert (tmp_path / "out" / REPAIRS).exists()


def test_a_model_without_has_no_file(encoders, tmp_path):
    make(ELMO).save_pretrained(tmp_path / "out", "npz")
    assert not (tmp_path / "out" / REPAIRS).exists()
    assert not Encoder.from_pretrained(tmp_path / "out").repairs


def test_broken_files_are_named(encoders, tmp_path, capsys):
    folder = tmp_path / "out"
    encoders["BERT"].save_pretrained(folder, "npz")
    whole = (folder / REPAIRS).read_bytes()
    for broken in (b"", b"hello", whole[: len(whole) // 2], whole.replace(b"<f4", b"<f8")):
        (folder / REPAIRS).write_bytes(broken)
        with pytest.raises(InputError, match=REPAIRS):
            Encoder.from_pretrained(folder)
    assert cli.main(["encode", str(folder), "A set."]) == 2
    assert str(folder / REPAIRS) in capsys.readouterr().err
    repairs = encoders["BERT"].repairs
    save_repairs(folder / REPAIRS, {**repairs, 3: repairs[2]})
    with pytest.raises(InputError, match="found layer 3, expected 0 to 2"):
        Encoder.from_pretrained(folder)


def test_from_the_command_line(encoders, tmp_path, capsys):
    encoder, folder = encoders["BERT"], str(tmp_path / "model")
    encoder.save_pretrained(folder, "npz")
    assert cli.main(["encode", folder, *TEXTS[:3], "--repair", "whiten", "--out", str(tmp_path / "tokens.npz")]) == 0
    with np.load(tmp_path / "tokens.npz") as arrays:
        expected = encoder.encode(TEXTS[:3], repair="whiten").layers
        np.testing.assert_allclose(arrays["layers"], expected, rtol=1e-5, atol=1e-5)
    shards = ["encode", folder, *TEXTS[:3], "--pool", "mean", "--out", str(tmp_path / "shards"), "--repair"]
    assert cli.main([*shards, "zca"]) == 0
    (vectors,) = read_shards(tmp_path / "shards")
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS[:3], pool="mean", repair="zca"), rtol=1e-5, atol=1e-5)
    assert cli.main([*shards, "centre"]) == 2
    assert "was begun with repair 'zca " in capsys.readouterr().err
    (tmp_path / "model" / REPAIRS).unlink()
    assert cli.main([*shards, "zca"]) == 2
    assert "repair: layer 2 has no 'zca'" in capsys.readouterr().err


def test_shards_of_another_fit_are_not_gone_on_with(tmp_path):
    encoder = make(ELMO)
    encoder.fit_repairs(TEXTS, ["zca"], layers="last")
    write_shards(encoder, TEXTS, tmp_path / "shards", repair="zca")
    assert write_shards(encoder, TEXTS, tmp_path / "shards", repair="zca") == len(TEXTS)
    encoder.fit_repairs(TEXTS[:9], ["zca"], layers="last")
    with pytest.raises(InputError, match="was begun with repair"):
        write_shards(encoder, TEXTS, tmp_path / "shards", repair="zca")
