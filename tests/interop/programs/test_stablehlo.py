import dataclasses
import os
import struct

import jax
import numpy as np
import pytest
from oracles.programs import BERT, ELMO, SHAPES, inputs_of, params_of

from ctx_jax.errors import InputError
from ctx_jax.interop.programs import stablehlo
from ctx_jax.interop.programs.forward import forward_program
from ctx_jax.interop.programs.portable import export_function
from ctx_jax.interop.programs.stablehlo import read_stablehlo, write_stablehlo


@pytest.fixture(scope="module")
def bert_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "bert.stablehlo"
    write_stablehlo(path, BERT, params_of(BERT), heads=["masked_lm"])
    return path


def expected(config, inputs, **options):
    return jax.jit(forward_program(config, **options).function)(params_of(config), inputs)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_file_computes_bert_at_every_shape(bert_file, shape):
    inputs = inputs_of(BERT, *shape)
    assert_equal(read_stablehlo(bert_file)(inputs), expected(BERT, inputs, heads=["masked_lm"]))


def test_weights_as_inputs_are_not_in_the_file(bert_file, tmp_path):
    path = tmp_path / "program"
    write_stablehlo(path, BERT, params_of(BERT), heads=["masked_lm"], weights_inside=False)
    program, inputs = read_stablehlo(path), inputs_of(BERT, 3, 7)
    assert_equal(program(inputs, params_of(BERT)), expected(BERT, inputs, heads=["masked_lm"]))
    with pytest.raises(InputError, match="params: found none"):
        program(inputs)
    with pytest.raises(InputError, match="masked_lm"):
        program(inputs, {"encoder": params_of(BERT)["encoder"]})
    assert path.stat().st_size < bert_file.stat().st_size / 2


@pytest.mark.parametrize("inside", [True, False])
def test_elmo(tmp_path, inside):
    path, params = tmp_path / "elmo", params_of(ELMO)
    write_stablehlo(path, ELMO, params, weights_inside=inside)
    program = read_stablehlo(path)
    assert not any(name.startswith("softmax") for name in program.about["parameters"])
    for shape in SHAPES if inside else SHAPES[1:2]:
        inputs = inputs_of(ELMO, *shape)
        assert_equal(program(inputs, None if inside else params), expected(ELMO, inputs))


def test_local_attention_goes_by_blocks_whatever_the_length(tmp_path):
    config = dataclasses.replace(BERT, attention_window=5)
    write_stablehlo(tmp_path / "local", config, params_of(BERT))
    program = read_stablehlo(tmp_path / "local")
    for shape in SHAPES[1:]:
        inputs = inputs_of(config, *shape)
        inside = inputs["attention_mask"] > 0
        found, wanted = program(inputs), expected(config, inputs)
        # Padding without any key takes the mean of as many values as its row or its block has.
        for name in ("last_hidden_state", "hidden_states"):
            np.testing.assert_allclose(found[name][..., inside, :], wanted[name][..., inside, :], rtol=1e-6, atol=1e-6)


def test_one_file_serves_three_platforms(bert_file):
    assert read_stablehlo(bert_file).exported.platforms == ("cpu", "cuda", "tpu")


def test_jax_alone_reads_the_file(bert_file):
    import jax.export

    inputs = inputs_of(BERT, 3, 7)
    exported = jax.export.deserialize(bytearray(bert_file.read_bytes()))
    assert_equal(exported.call(inputs), expected(BERT, inputs, heads=["masked_lm"]))


def test_the_file_names_no_folder_of_this_machine(bert_file, tmp_path):
    jax.jit(forward_program(BERT).function).lower(params_of(BERT), inputs_of(BERT, 2, 5))  # remembers its places
    write_stablehlo(tmp_path / "file", BERT, params_of(BERT))
    for path in (bert_file, tmp_path / "file"):
        content = path.read_bytes()
        assert b"attention.py" in content
        assert b"/ctx_jax" not in content
        assert b"site-packages" not in content


def test_chosen_layers(tmp_path):
    write_stablehlo(tmp_path / "some", BERT, params_of(BERT), layers=[-1, 0])
    write_stablehlo(tmp_path / "last", BERT, params_of(BERT), layers="last")
    inputs = inputs_of(BERT, 2, 5)
    some, last = read_stablehlo(tmp_path / "some")(inputs), read_stablehlo(tmp_path / "last")(inputs)
    every = expected(BERT, inputs)
    np.testing.assert_allclose(some["hidden_states"], every["hidden_states"][np.array([2, 0])], atol=1e-6)
    assert last.keys() == {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {**x, "input_ids": x["input_ids"][:, :4]}, r"attention_mask|input_ids"),
        (lambda x: {"input_ids": x["input_ids"]}, "expected attention_mask, input_ids, token_type_ids"),
        (lambda x: {**x, "input_ids": x["input_ids"].astype(np.int16)}, "found int16"),
        (lambda x: {name: np.repeat(value, 9, 1) for name, value in x.items()}, "rows of 45, the model takes 40"),
        (lambda x: {name: value[:0] for name, value in x.items()}, "at least 1"),
    ],
    ids=["shape", "missing", "type", "too long", "empty"],
)
def test_wrong_inputs(bert_file, change, message):
    with pytest.raises(InputError, match=message):
        read_stablehlo(bert_file)(change(inputs_of(BERT, 2, 5)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: b"PK" + os.urandom(500),
        lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
        lambda content: content[:-20] + struct.pack("<Q", 2**60) + content[-12:],
    ],
    ids=["half", "one byte short", "five bytes", "empty", "foreign", "one bit", "length"],
)
def test_a_damaged_file_is_refused(bert_file, tmp_path, damage):
    path = tmp_path / "damaged"
    path.write_bytes(damage(bert_file.read_bytes()))
    with pytest.raises(InputError, match="damaged: found"):
        read_stablehlo(path)


def test_a_program_that_this_jax_cannot_read_is_refused(tmp_path, monkeypatch):
    unreadable = lambda *given: dataclasses.replace(export_function(*given), mlir_module_serialized=b"of tomorrow")
    monkeypatch.setattr(stablehlo, "export_function", unreadable)
    write_stablehlo(tmp_path / "file", BERT, params_of(BERT), platforms=["cpu"])
    with pytest.raises(InputError, match="cannot read"):
        read_stablehlo(tmp_path / "file")


def test_older_readers_find_no_op_that_they_do_not_know(bert_file):
    text = read_stablehlo(bert_file).exported.mlir_module()
    assert "composite" not in text
    assert "chlo.erfc" not in text or "func.func private @chlo.erfc" in text


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"file: cannot be written \(disk full\)"):
        write_stablehlo(tmp_path / "file", BERT, params_of(BERT), weights_inside=False, platforms=["cpu"])
    assert not list(tmp_path.iterdir())


def test_where_and_what_to_write(bert_file, tmp_path):
    params = params_of(BERT)
    with pytest.raises(InputError, match="found a file, expected a new path"):
        write_stablehlo(bert_file, BERT, params)
    with pytest.raises(InputError, match="found no folder"):
        write_stablehlo(tmp_path / "no" / "file", BERT, params)
    with pytest.raises(InputError, match="'gpu'"):
        write_stablehlo(tmp_path / "file", BERT, params, platforms=["gpu"])
    with pytest.raises(InputError, match="no file"):
        read_stablehlo(tmp_path / "file")
    with pytest.raises(InputError, match="a folder"):
        read_stablehlo(tmp_path)
