"""Meshes, and where each parameter of a BERT and each moment of its optimizer lives."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles.rows import make_examples, rows_of

from ctx_jax.errors import InputError
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, flat_paths
from ctx_jax.sharding import MeshShape, batch_sharding, make_mesh, put_batch, replicated, tree_shardings
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

VOCABULARY = ("tensor", "fsdp")
SPECS = {
    "encoder/embeddings/token/table": P(VOCABULARY, None),
    "encoder/embeddings/position/table": P("fsdp", None),
    "encoder/embeddings/type/table": P(None, None),
    "encoder/layers/attention/qkv/kernel": P(None, "fsdp", None, "tensor"),
    "encoder/layers/attention/qkv/bias": P(None, None, "tensor"),
    "encoder/layers/attention/out/kernel": P(None, "tensor", "fsdp"),
    "encoder/layers/feed_forward/up/kernel": P(None, "fsdp", "tensor"),
    "encoder/layers/feed_forward/up/bias": P(None, "tensor"),
    "encoder/layers/feed_forward/down/kernel": P(None, "tensor", "fsdp"),
    "encoder/pooler/dense/kernel": P("fsdp", "tensor"),
    "masked_lm/dense/kernel": P("fsdp", "tensor"),
    "masked_lm/bias": P(VOCABULARY),
}


def shapes(**sizes):
    config = BertConfig(**({"vocab_size": 64, "hidden_size": 16, "num_layers": 3, "num_heads": 2} | sizes))
    return Bound(lambda rngs: BertWithHeads(config, rngs=rngs)).shapes


def specs(tree, mesh):
    """Path → spec with the trailing Nones left out."""
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(tree_shardings(tree, mesh)):
        axes = list(sharding.spec)
        while axes and axes[-1] is None:
            axes.pop()
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = P(*axes)
    return found


def without_end(spec):
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


@pytest.mark.parametrize(
    ("shape", "count", "sizes"),
    [
        (MeshShape(), 8, (8, 1, 1)),
        (MeshShape(), 1, (1, 1, 1)),
        (MeshShape(data=2, fsdp=-1), 8, (2, 4, 1)),
        (MeshShape(data=1, fsdp=2, tensor=-1), 8, (1, 2, 4)),
        (MeshShape(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshShape(data=-1, tensor=3), 6, (2, 1, 3)),
    ],
)
def test_meshes(shape, count, sizes):
    devices = jax.devices()[:count]
    mesh = make_mesh(shape, devices)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.ravel()) == set(devices)
    if count == 8:
        assert make_mesh(shape) == mesh


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (MeshShape(data=-1, fsdp=-1), "at most one -1"),
        (MeshShape(data=0), "expected positive numbers"),
        (MeshShape(tensor=-2), "expected positive numbers"),
        (MeshShape(data=4), "data=4 fsdp=1 tensor=1 does not fit 8 devices"),
        (MeshShape(data=-1, fsdp=3), "fsdp=3 tensor=1 does not fit 8 devices"),
        (MeshShape(data=-1, fsdp=16), "fsdp=16 tensor=1 does not fit 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(shape, words):
    with pytest.raises(InputError, match=words):
        make_mesh(shape)


def test_every_parameter_goes_where_the_rules_say():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    found = specs(shapes(), mesh)
    assert found.keys() == flat_paths(shapes()).keys()
    for path, spec in found.items():
        assert spec == without_end(SPECS.get(path, P())), path


def test_a_gated_feed_forward_is_split_like_a_plain_one():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    found = specs(shapes(gated=True), mesh)
    assert found["encoder/layers/feed_forward/gated_up/kernel"] == P(None, "fsdp", None, "tensor")
    assert found["encoder/layers/feed_forward/gated_up/bias"] == P(None, None, "tensor")
    assert found["encoder/layers/feed_forward/down/kernel"] == P(None, "tensor", "fsdp")
    assert not [path for path in found if "/up/" in path]


@pytest.mark.parametrize("kind", ["bert_adamw", "lamb", "adagrad"])
def test_moments_go_with_their_parameters(kind):
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    params = shapes()
    state = jax.eval_shape(Optimizer(kind, Schedule("constant")).build().init, params)
    found, own = specs(state, mesh), specs(params, mesh)
    moments = 0
    for path, spec in found.items():
        parameter = next((p for p in own if path.endswith(f"/{p}")), None)
        assert spec == (own[parameter] if parameter else P()), path
        moments += parameter is not None
    assert moments == len(own) * (1 if kind == "adagrad" else 2)


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=4))
    found = specs(shapes(vocab_size=63, hidden_size=18, max_position_embeddings=33, intermediate_size=22), mesh)
    # 18 is even and no multiple of 4; 63 and 33 are odd; 22 is even and no multiple of 4.
    assert found["encoder/embeddings/token/table"] == P()
    assert found["encoder/embeddings/position/table"] == P()
    assert found["masked_lm/bias"] == P()
    assert found["encoder/layers/attention/qkv/kernel"] == P(None, "fsdp")
    assert found["encoder/layers/attention/qkv/bias"] == P()
    assert found["encoder/layers/feed_forward/down/kernel"] == P(None, None, "fsdp")
    assert found["masked_lm/dense/kernel"] == P("fsdp")


def test_the_first_rule_wins_and_what_none_names_is_replicated():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    tree = {"a": {"kernel": np.zeros((4, 4))}, "b": {"kernel": np.zeros((4, 4)), "other": np.zeros(4)}}
    rules = ((r"b/kernel$", P("tensor")), (r"kernel$", P(None, "fsdp")), (r"other$", P(None, "data")))
    found = tree_shardings(tree, mesh, rules)
    assert found["b"]["kernel"].spec == P("tensor")
    assert found["a"]["kernel"].spec == P(None, "fsdp")
    # A rule for more axes than the leaf has is not for that leaf.
    assert found["b"]["other"].spec == P()


def test_a_batch_is_split_over_data_and_fsdp_and_copied_over_tensor():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)
    batch = rows_of(make_examples(rng, 12, 5, 12, 60), 24, 2, rows=8)
    placed = put_batch(batch, mesh)
    for host, device in zip(batch, placed, strict=True):
        assert device.sharding.is_equivalent_to(batch_sharding(mesh), host.ndim)
        np.testing.assert_array_equal(device, host)
        assert len(device.addressable_shards) == 8
        assert {shard.data.shape[0] for shard in device.addressable_shards} == {2}
        assert len({shard.index[0].start for shard in device.addressable_shards}) == 4


def test_replicated_is_a_copy_on_every_device():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    array = jax.device_put(np.arange(6.0, dtype=np.float32), replicated(mesh))
    assert [shard.data.shape for shard in array.addressable_shards] == [(6,)] * 8
