"""What a run takes on each device, told before it is there and counted when it is."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from test_experiment import tiny_experiment
from test_experiment_elmo import tiny_experiment as tiny_elmo

from ctx_jax.data.corpus import Corpus
from ctx_jax.experiment.assembly import abstract_step, assemble, vocabulary_of
from ctx_jax.experiment.cost import state_bytes
from ctx_jax.sharding import MeshShape, bytes_per_device, make_mesh, put_batch, replicated, tree_shardings

MESHES = [
    (MeshShape(), 8),
    (MeshShape(data=1, fsdp=8), 8),
    (MeshShape(data=1, tensor=4), 4),
    (MeshShape(data=2, fsdp=2, tensor=2), 8),
    (MeshShape(), 1),
]


def held(tree):
    """Bytes of the shards that each device holds."""
    sizes = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return sizes


@pytest.mark.parametrize(("shape", "count"), MESHES, ids=str)
@pytest.mark.parametrize("kind", ["bert", "elmo"])
def test_as_many_bytes_as_the_shards_have(kind, shape, count, topics_corpus, words_corpus):
    experiment = tiny_experiment(topics_corpus) if kind == "bert" else tiny_elmo(words_corpus)
    mesh = make_mesh(shape, jax.devices()[:count])
    told = state_bytes(experiment, mesh)

    shapes, batch, _ = abstract_step(experiment)[1]
    zeros = jax.tree.map(
        lambda leaf, place: jax.make_array_from_callback(
            leaf.shape, place, lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
        ),
        shapes,
        tree_shardings(shapes, mesh),
    )
    found = {
        "parameters": zeros.params,
        "optimizer": zeros.optimizer,
        "carry": zeros.carry,
        "gradients": zeros.params,
        "batch": put_batch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch), mesh),
    }
    for name, tree in found.items():
        sizes = held(tree)
        assert set(sizes.values()) == ({told[name]} if jax.tree.leaves(tree) else set()), name
        assert set(sizes) == (set(mesh.devices.flat) if sizes else set()), name
    if count == 1:
        whole = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        assert told["parameters"] == whole(zeros.params)
    moments = 1 if kind == "elmo" else 2
    assert told["optimizer"] == pytest.approx(moments * told["parameters"], rel=1e-3)


def test_the_words_of_a_language_model_are_counted_as_they_are(words_corpus):
    """Each device has the characters of all the words."""
    mesh = make_mesh()
    experiment = tiny_elmo(words_corpus)
    told = state_bytes(experiment, mesh)
    whole = dataclasses.replace(experiment.model, vocab_size=Corpus(words_corpus).tokenizer.vocab_size)
    experiment = dataclasses.replace(experiment, model=whole)
    lexicon = assemble(experiment, vocabulary_of(experiment, Corpus(words_corpus).tokenizer)).objective.arguments
    assert state_bytes(experiment, mesh)["arguments"] == jax.device_put(lexicon, replicated(mesh)).nbytes
    assert told["arguments"] == 500 * experiment.model.max_characters * 2


def test_one_sharding_may_stand_for_all():
    mesh = make_mesh()
    shapes = {"a": jax.ShapeDtypeStruct((4, 6), np.float32), "b": jax.ShapeDtypeStruct((), np.int16)}
    assert bytes_per_device(shapes, replicated(mesh)) == 4 * 6 * 4 + 2
