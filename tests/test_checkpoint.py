"""Checkpoints: bit for bit back, on any sharding, past damage of every kind, through kills and full disks."""

import gc
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles.events import compiled, durations

from ctx_jax.checkpoint import Checkpoints, load_weights, save_weights
from ctx_jax.errors import InputError
from ctx_jax.leaves import checksum, checksums

# Where one array cannot be read, Orbax closes the event loop over the reads of the others (asyncio_utils.py,
# `_run_sync_via_new_loop`), and their coroutines and callbacks complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. (<coroutine object|None):pytest.PytestUnraisableExceptionWarning"
)


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_mesh(shape, names):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def make_state(seed=0, sharding=None):
    """Every type that training has, in the structures it has; random bits, NaNs and negative zeros among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, size=(16, 24), dtype=np.uint32)
    kernel = jax.device_put(bits.view(np.float32), sharding)
    half = jax.lax.bitcast_convert_type(jnp.asarray(bits[:, :8].astype(np.uint16)), jnp.bfloat16)
    params = {
        "layers": {"kernel": kernel, "half": jax.device_put(half, sharding)},
        "bias": jnp.zeros(5).at[2].set(-0.0),
    }
    moments = Moments(jnp.int32(7 + seed), {"kernel": kernel})
    key = jax.random.key_data(jax.random.key(seed))
    return {"params": params, "opt": (moments, [jnp.array([True, False])]), "key": key, "step": jnp.int32(seed)}


def like(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def same_bits(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 10 and 20, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(10, make_state(1), {"tokens": 10})
        checkpoints.save(20, make_state(2), {"tokens": 20})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    yield pathlib.Path(shutil.copytree(saved, tmp_path / "run"))
    gc.collect()  # what a failed read leaves behind comes up here, and not in another module's tests


@pytest.mark.parametrize("asynchronous", [True, False])
def test_comes_back_bit_for_bit(tmp_path, asynchronous):
    state, metadata = make_state(3), {"config": {"a": [1, 2.5, None]}, "text": "ü"}
    with Checkpoints(tmp_path, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(3, state, metadata)
    restored = Checkpoints(tmp_path).restore(like(state))
    assert restored.step == 3
    assert restored.metadata == metadata
    assert same_bits(restored.state, state)
    assert type(restored.state["opt"][0]) is Moments
    assert Checkpoints(tmp_path).metadata(3) == metadata


def test_an_empty_folder_holds_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore(like(make_state())) is None
    assert checkpoints.steps() == []
    assert not (tmp_path / "none").exists()


def test_shardings_are_those_asked_for(tmp_path):
    """Saved over 8 devices; restored over 2 × 2, over one, and replicated over 8."""
    eight = make_mesh((8,), ("data",))
    state = make_state(4, NamedSharding(eight, PartitionSpec("data")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    four = make_mesh((2, 2), ("data", "model"))
    wanted = [
        NamedSharding(four, PartitionSpec("model", "data")),
        jax.sharding.SingleDeviceSharding(jax.devices()[5]),
        NamedSharding(eight, PartitionSpec()),
    ]
    for sharding in wanted:
        shapes = jax.tree.map(
            lambda x, sharding=sharding: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding if x.ndim == 2 else None
            ),
            state,
        )
        restored = Checkpoints(tmp_path).restore(shapes)
        assert same_bits(restored.state, state)
        assert restored.state["params"]["layers"]["kernel"].sharding == sharding
        assert restored.state["step"].sharding.device_set == {jax.devices()[0]}
    concrete = Checkpoints(tmp_path).restore(jax.tree.map(jnp.zeros_like, state))
    assert concrete.state["params"]["layers"]["kernel"].sharding.device_set == set(jax.devices())


def test_the_state_may_be_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        x = jnp.zeros((512, 1024))
        for step in range(6):
            checkpoints.save(step, {"x": x}, {})
            x = overwrite(x)
    for step in range(6):
        restored = Checkpoints(tmp_path).restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, step)
        assert np.all(np.asarray(restored.state["x"]) == step)


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
    assert checkpoints.steps() == [3, 4]
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_keeps_the_best_besides(tmp_path):
    """However old, and however often the folder was opened anew in between."""
    scores = {1: 0.5, 2: 0.3, 3: None, 4: 0.4, 5: 0.2, 6: 0.6, 7: 0.7, 8: 0.1, 9: None}
    kept = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [2, 4], 5: [2, 5], 6: [2, 5, 6], 7: [2, 5, 7], 8: [5, 8], 9: [5, 8, 9]}
    best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5, 8: 8, 9: 8}
    for first, last in ((1, 2), (3, 5), (6, 9)):
        with Checkpoints(tmp_path, keep_last=1, keep_best=2) as checkpoints:
            for step in range(first, last + 1):
                checkpoints.restore({"x": jnp.float32(0)})
                checkpoints.save(step, {"x": jnp.float32(step)}, {}, score=scores[step], wait=True)
                assert checkpoints.steps() == kept[step]
                assert checkpoints.best() == best[step]
    assert Checkpoints(tmp_path).best() == 8
    assert Checkpoints(tmp_path).restore({"x": jnp.float32(0)}).step == 9
    # One whose description is damaged is not the best of anything.
    about = tmp_path / "8" / "about" / "metadata"
    about.write_text(about.read_text().replace("0.1", "0.0"))
    assert Checkpoints(tmp_path).best() == 5
    with Checkpoints(tmp_path, keep_last=1, keep_best=2) as checkpoints:
        checkpoints.restore({"x": jnp.float32(0)})
        checkpoints.save(10, {"x": jnp.float32(10)}, {}, score=0.9)
    assert checkpoints.steps() == [5, 10]


def test_there_is_no_best_without_scores(tmp_path):
    assert Checkpoints(tmp_path).best() is None
    with Checkpoints(tmp_path, keep_best=1) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
    assert checkpoints.best() is None
    assert checkpoints.steps() == [2, 3, 4]


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def array_file(step):
    """The largest file holds the kernels."""
    return max(files_of(step), key=lambda path: path.stat().st_size)


def flip(path, at, bit=3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def truncate_arrays(step):
    path = array_file(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_json(step):
    (step / "about" / "metadata").write_text("{")


def other_json(step):
    path = step / "about" / "metadata"
    path.write_text(path.read_text().replace('"tokens": 20', '"tokens": 21'))


DAMAGES = {
    "array file truncated": truncate_arrays,
    "array file empty": lambda step: array_file(step).write_bytes(b""),
    "array file missing": lambda step: array_file(step).unlink(),
    "bit of an array flipped": lambda step: flip(array_file(step), 1000),
    "manifest missing": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "arrays missing": lambda step: shutil.rmtree(step / "state"),
    "metadata missing": lambda step: (step / "about" / "metadata").unlink(),
    "metadata no JSON": not_json,
    "metadata changed": other_json,
    "metadata no text": lambda step: (step / "about" / "metadata").write_bytes(b"\xff\xfe\x00"),
    "folder empty": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_replaced(folder, caplog, damage):
    DAMAGES[damage](folder / "20")
    with Checkpoints(folder) as checkpoints, caplog.at_level(logging.WARNING, "ctx_jax"):
        restored = checkpoints.restore(like(make_state()))
        assert (restored.step, restored.metadata) == (10, {"tokens": 10})
        assert same_bits(restored.state, make_state(1))
        (warning,) = [record for record in caplog.records if record.name == "ctx_jax.checkpoint"]
        assert warning.getMessage().startswith(f"{folder / '20'}: damaged, passed over: ")
        checkpoints.save(15, make_state(5), {"tokens": 15})
    assert Checkpoints(folder).steps() == [10, 15]
    assert same_bits(Checkpoints(folder).restore(like(make_state())).state, make_state(5))


@pytest.mark.parametrize("step", [20, 30])
def test_damage_that_harms_nothing_is_no_hindrance(folder, step):
    """Orbax's record of the whole step, which nothing here needs, but which its manager reads on opening a folder."""
    (folder / "20" / "_CHECKPOINT_METADATA").write_text('{"item_handlers": 3}')
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(like(make_state())).step == 20
        checkpoints.save(step, make_state(3), {})
    assert same_bits(Checkpoints(folder).restore(like(make_state()), step).state, make_state(3))


def test_no_flipped_bit_goes_unnoticed(folder):
    """Flips all over the files that are read: what comes back is what was saved, or the step before."""
    rng = np.random.default_rng(0)
    caught = 0
    for path in files_of(folder / "20"):
        content = path.read_bytes()
        for _ in range(3):
            flip(path, rng.integers(len(content)), rng.integers(8))
            restored = Checkpoints(folder).restore(like(make_state()))
            assert same_bits(restored.state, make_state(restored.step // 10))
            assert restored.metadata == {"tokens": restored.step}
            caught += restored.step == 10
            path.write_bytes(content)
    assert caught > 10


def test_orbax_alone_would_not_notice(folder):
    """Why the leaves have checksums: Orbax hands out the flipped bit without an error."""
    import orbax.checkpoint as ocp

    flip(array_file(folder / "20"), 1000)
    leaves = jax.tree_util.tree_leaves_with_path(make_state(2))
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    target = like(leaves, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    arguments = ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arrays = reader.restore(folder / "20" / "state", args=arguments)
    assert not same_bits(arrays, leaves)


def test_all_damaged_is_an_error_that_lists_them(folder):
    not_json(folder / "10")
    truncate_arrays(folder / "20")
    with pytest.raises(
        InputError, match=r"no usable checkpoint, tried step 20: .*; step 10: about/metadata: "
    ) as error:
        Checkpoints(folder).restore(like(make_state()))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="tried step 20: "):
        Checkpoints(folder).restore(like(make_state()), 20)
    with pytest.raises(InputError, match="10: damaged: about/metadata"):
        Checkpoints(folder).metadata(10)


def test_a_part_may_be_restored(folder):
    """Only the parameters; but what is asked for must be there."""
    restored = Checkpoints(folder).restore({"params": like(make_state()["params"])}, partial=True)
    assert restored.step == 20
    assert same_bits(restored.state, {"params": make_state(2)["params"]})
    with pytest.raises(InputError, match="20: leaf params: not found"):
        Checkpoints(folder).restore({"params": jax.ShapeDtypeStruct((), jnp.int32)}, partial=True)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "key"), "20: leaf key: found, expected no such leaf"),
        (lambda s: s | {"steq": s["step"]}, r"20: leaf steq: not found \(did you mean 'step'\?\), expected {'shape'"),
        (
            lambda s: s | {"key": jax.ShapeDtypeStruct((3,), jnp.uint32)},
            r"20: leaf key: found {'shape': \[2\], 'dtype': 'uint32'}, expected {'shape': \[3\], 'dtype': 'uint32'}",
        ),
        (
            lambda s: s | {"step": jax.ShapeDtypeStruct((), jnp.float32)},
            r"leaf step: found .*'int32'}, expected .*'float32'",
        ),
        (lambda s: s | {"opt": s["opt"][:1]}, "20: leaf opt/1/0: found, expected no such leaf"),
        (lambda s: s | {"step": 3}, "leaf step: found int, expected a jax.Array"),
    ],
)
def test_what_does_not_fit_is_no_damage(folder, caplog, change, message):
    with pytest.raises(InputError, match=message):
        Checkpoints(folder).restore(change(like(make_state())))
    assert not caplog.records


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        (
            {"a": {"key": jax.eval_shape(lambda: jax.random.key(0))}},
            {},
            "leaf a/key: found key<fry>, expected .*key_data",
        ),
        ({"a": np.ones(2)}, {}, "leaf a: found ndarray, expected a jax.Array"),
        ({"a": jax.ShapeDtypeStruct((0, 2), jnp.float32)}, {}, r"leaf a: found shape \(0, 2\), expected at least one"),
        ({"a": jax.ShapeDtypeStruct((1,), jnp.complex64)}, {}, "leaf a: found complex64, expected one of"),
        (
            {"a/b": jax.ShapeDtypeStruct((1,), jnp.int32), "a": {"b": jax.ShapeDtypeStruct((1,), jnp.int32)}},
            {},
            "found two",
        ),
        ({}, {"a": object()}, "metadata of a checkpoint: .*, expected what JSON can hold"),
    ],
)
def test_refuses_to_save(tmp_path, state, metadata, message):
    with pytest.raises(InputError, match=message):
        Checkpoints(tmp_path).save(0, state, metadata)
    assert not os.listdir(tmp_path)


def test_the_same_step_twice(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(like(make_state()))
        before = array_file(folder / "20").stat().st_mtime_ns
        checkpoints.save(20, make_state(2), {"tokens": 20}, wait=True)
        assert array_file(folder / "20").stat().st_mtime_ns == before  # nothing to do
        checkpoints.save(20, make_state(6), {"tokens": 21})
        checkpoints.save(20, make_state(6), {"tokens": 22})
    restored = Checkpoints(folder).restore(like(make_state()))
    assert restored.metadata == {"tokens": 22}
    assert same_bits(restored.state, make_state(6))
    assert sorted(os.listdir(folder)) == ["10", "20"]


def test_a_step_that_was_being_replaced_still_counts(folder):
    """As a process leaves it that was killed between setting the old one aside and completing the new one."""
    (folder / "20").rename(folder / "20.replaced")
    (folder / "20.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.restore(like(make_state())).step == 20
        assert sorted(os.listdir(folder)) == ["10", "20.orbax-checkpoint-tmp", "20.replaced"]
        checkpoints.save(30, make_state(3), {})
    assert sorted(os.listdir(folder)) == ["10", "20", "30"]


def test_turning_back_removes_what_came_after(folder, caplog):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(like(make_state()), 10).step == 10
        assert checkpoints.steps() == [10, 20]
        checkpoints.save(30, make_state(7), {})
    assert checkpoints.steps() == [10, 30]
    assert f"{folder / '20'}: removed, the run goes on from step 10" in caplog.text


def test_another_run_is_not_overwritten(folder):
    checkpoints = Checkpoints(folder)
    with pytest.raises(InputError, match="holds step 20: cannot save step 5, expected at least 21"):
        checkpoints.save(5, make_state(), {})
    assert checkpoints.steps() == [10, 20]
    with pytest.raises(InputError, match="no step 15, expected one of 10, 20"):
        checkpoints.restore(like(make_state()), 15)
    with pytest.raises(InputError, match="keep_last: 0, expected at least 1"):
        Checkpoints(folder, keep_last=0)
    with pytest.raises(InputError, match="keep_best: -1, expected at least 0"):
        Checkpoints(folder, keep_best=-1)


def test_checksum_does_not_depend_on_the_sharding():
    mesh = make_mesh((4, 2), ("a", "b"))
    x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
    specs = [PartitionSpec("a"), PartitionSpec(None, "b", "a"), PartitionSpec(("a", "b")), PartitionSpec()]
    assert (
        len({int(checksum(jax.device_put(x, NamedSharding(mesh, spec)))) for spec in specs} | {int(checksum(x))}) == 1
    )


def test_checksums_of_many_leaves_are_one_program():
    """A program a leaf deadlocked on eight host devices: see `checksums`."""
    mesh = make_mesh((8,), ("a",))
    rng = np.random.default_rng(0)
    values = {f"leaf {size}": rng.normal(size=(8, size)).astype(np.float32) for size in range(1, 41)}
    spread = jax.device_put(values, NamedSharding(mesh, PartitionSpec("a")))
    with durations() as events:
        found = checksums(spread)
    assert len(compiled(events)) == 1
    assert found == {name: int(checksum(value)) for name, value in values.items()}
    apart = {name: jax.device_put(x, jax.devices()[len(name) % 2]) for name, x in values.items()}
    assert checksums(apart) == found


def test_checksum_sees_what_sums_would_not():
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    changed = [x, -x, x[::-1], x[:, ::-1], np.roll(x, 1), np.where(np.arange(8) < 2, -x, x), np.zeros_like(x)]
    changed += [np.where(np.arange(48).reshape(6, 8) == at, -x, x) for at in range(48)]
    assert len({int(checksum(np.ascontiguousarray(y))) for y in changed}) == len(changed)


WRITER = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from ctx_jax.checkpoint import Checkpoints
draw = lambda step: {"x": jax.random.normal(jax.random.key(step), (600, 1000))}
checkpoints = Checkpoints(sys.argv[1], keep_last=1)
restored = checkpoints.restore(draw(0))
step = restored.step if restored else 0
while True:
    step += 1
    checkpoints.save(step, draw(step), {})
    print(step - 1, flush=True)  # the one before is complete
"""


def kill_a_writer(folder, seconds):
    """Lets a process save without end, kills it, and returns the last step that it knew to be complete."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True) as writer:
        complete = [int(writer.stdout.readline())]
        time.sleep(seconds)
        writer.kill()
        return [*complete, *map(int, writer.stdout)][-1]


def survive_kills(folder, delays):
    """How often a half-written checkpoint was left behind."""
    half_written = 0
    for seconds in delays:
        complete = kill_a_writer(folder, seconds)
        half_written += any("tmp" in name for name in os.listdir(folder))
        restored = Checkpoints(folder).restore({"x": jax.ShapeDtypeStruct((600, 1000), jnp.float32)})
        if complete:
            assert restored.step >= complete
        if restored:
            expected = jax.random.normal(jax.random.key(restored.step), (600, 1000))
            np.testing.assert_array_equal(restored.state["x"], expected)
    return half_written


def test_a_kill_loses_nothing(tmp_path):
    survive_kills(tmp_path, [0.31, 0.47])


@pytest.mark.slow
def test_many_kills_lose_nothing(tmp_path):
    rng = np.random.default_rng(0)
    assert survive_kills(tmp_path, rng.uniform(0, 1, 12)) > 0


FULL_DISK = """
import os, resource, signal, sys
os.environ["JAX_PLATFORMS"] = "cpu"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import jax, jax.numpy as jnp
from ctx_jax.checkpoint import Checkpoints
state = {"x": jax.random.normal(jax.random.key(0), (300, 300))}
checkpoints = Checkpoints(sys.argv[1], keep_last=1)
checkpoints.save(1, state, {}, wait=True)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
errors = []
checkpoints.save(2, state, {})
for attempt in (lambda: checkpoints.save(3, state, {}), lambda: checkpoints.save(3, state, {}, wait=True)):
    try:
        attempt()
    except OSError as error:
        errors.append(str(error))
assert checkpoints.steps() == [1], checkpoints.steps()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
checkpoints.save(3, state, {})
checkpoints.close()
print("\\n".join([*errors, str(checkpoints.steps())]))
"""


def test_a_full_disk_is_an_error_and_no_end(tmp_path):
    """The failed save of step 2 is reported by the next, that of step 3 by itself; then there is room again."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert run.returncode == 0, run.stderr
    second, third, steps = run.stdout.splitlines()
    assert second.startswith(f"{tmp_path}: step 2 was not written: ")
    assert third.startswith(f"{tmp_path}: step 3 was not written: ")
    assert "File too large" in second
    assert "File too large" in third
    assert steps == "[3]"


def test_weights_come_back_as_they_were(tmp_path):
    eight = NamedSharding(make_mesh((8,), ("data",)), PartitionSpec("data"))
    params = make_state(8, eight)["params"]
    save_weights(tmp_path / "weights", params, {"config": "bert"})
    loaded, metadata = load_weights(tmp_path / "weights")
    assert metadata == {"config": "bert"}
    assert same_bits(loaded, params)
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(loaded))
    kernel = {"layers": like(params["layers"], eight), "bias": params["bias"]}
    assert load_weights(tmp_path / "weights", kernel)[0]["layers"]["kernel"].sharding == eight


def test_weights_refused(tmp_path):
    with pytest.raises(InputError, match="none: no step 0, expected a folder with checkpoints"):
        load_weights(tmp_path / "none")
    with pytest.raises(InputError, match=r"found a leaf under \['a', SequenceKey\(idx=0\)\], expected a nested dict"):
        save_weights(tmp_path / "list", {"a": [jnp.ones(1)]}, {})
    save_weights(tmp_path / "weights", {"a": jnp.ones(1)}, {})
    with pytest.raises(InputError, match="holds step 0 already, expected a new folder"):
        save_weights(tmp_path / "weights", {"a": jnp.ones(1)}, {})
    other_json_format(tmp_path / "weights" / "0")
    with pytest.raises(InputError, match="damaged: about/metadata: the checksum does not match"):
        load_weights(tmp_path / "weights")


def other_json_format(step):
    path = step / "about" / "metadata"
    about = json.loads(path.read_text())
    about["content"]["format"] = 2
    path.write_text(json.dumps(about))


def test_importing_it_does_not_import_orbax():
    code = "import sys, ctx_jax.checkpoint; print([name for name in sys.modules if name.startswith('orbax')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
