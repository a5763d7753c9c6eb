import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctx_jax import InputError, flops
from ctx_jax.benchmark import profile as module
from ctx_jax.benchmark.profile import OTHER, TRANSFER, profile, profile_encoder, profile_lines
from ctx_jax.encoder import BertEncoder, ElmoEncoder
from ctx_jax.flops.transformer import bert_cost
from ctx_jax.hlo.text import read_module
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound

pytestmark = pytest.mark.alone

ROWS, LENGTH = 8, 32
BERT = BertConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256)
ELMO = ElmoConfig(
    filters=((1, 8), (3, 16)), character_dim=4, max_characters=10, lstm_dim=32, projection_dim=16, vocab_size=0
)


def by_name(parts):
    return {part.name: part for part in parts}


class Timed:
    """A jitted function that notes how long each call took, until its result is there."""

    def __init__(self, function):
        self.function, self.seconds = function, []

    def trace(self, *args):
        return self.function.trace(*args)

    def __call__(self, *args):
        start = time.perf_counter()
        result = jax.block_until_ready(self.function(*args))
        self.seconds.append(time.perf_counter() - start)
        return result


def looped(trips):
    """A scan of matrix products, and half as many beside it."""

    @jax.jit
    def function(x):
        def body(x, _):
            with jax.named_scope("inside"):
                return jnp.tanh(x @ x), None

        with jax.named_scope("loop"):
            x, _ = jax.lax.scan(body, x, None, length=trips)
        with jax.named_scope("beside"):
            return x @ x

    return function


def test_two_products_of_which_one_is_eight_times_as_large():
    @jax.jit
    def function(x, small, large):
        with jax.named_scope("small"):
            y = x @ small
        with jax.named_scope("large"):
            return (x @ large).sum() + y.sum()

    draw = np.random.default_rng(0)
    arrays = (draw.standard_normal((256, width), np.float32) for width in (512, 128, 1024))
    x, small, large = next(arrays).T, next(arrays), next(arrays)
    found = by_name(profile(function, x, small, large))
    assert {"small", "large", TRANSFER} <= set(found) <= {"small", "large", TRANSFER, OTHER}
    assert found["large"].flops == 8 * found["small"].flops == 2 * 512 * 256 * 1024
    assert found["large"].seconds > found["small"].seconds > 0
    assert found["large"].share > found["small"].share
    assert sum(part.share for part in found.values()) == pytest.approx(1)


def test_every_trip_of_a_loop_counts_and_the_loop_itself_does_not_count_again():
    x = np.eye(300, dtype=np.float32)
    ten, twenty = (by_name(profile(looped(trips), x)) for trips in (10, 20))
    assert ten["inside"].flops == 10 * ten["beside"].flops == 10 * 2 * 300**3
    assert twenty["inside"].flops == 2 * ten["inside"].flops
    assert twenty["inside"].operations == 2 * ten["inside"].operations >= 20
    assert twenty["beside"].operations == ten["beside"].operations
    # Of the loop without its body there is next to nothing left.
    assert ten["loop"].seconds < ten["inside"].seconds / 2


def test_parts_add_up_to_the_time_of_the_calls():
    function = Timed(looped(10))
    found = profile(function, np.eye(500, dtype=np.float32), calls=4)
    calls = sum(function.seconds[-4:]) / 4
    assert len(function.seconds) == 5  # one beforehand
    assert sum(part.seconds for part in found) == pytest.approx(calls, rel=0.1)
    busy = sum(part.seconds for part in found if part.name != TRANSFER)
    assert calls / 2 <= busy <= 1.01 * calls


def test_instants_against_a_clock_that_ticks():
    draw = np.random.default_rng(1)
    for _ in range(20):
        owned = []
        for number in range(draw.integers(1, 12)):
            start, length = draw.integers(0, 30), draw.integers(0, 15)
            span = module._Span(float(start), float(start + length), "m", str(number))
            owned.append((span, module._Owner("abcd"[draw.integers(4)], is_loop=bool(draw.integers(2)))))
        expected = dict.fromkeys("abcd", 0.0)
        # By when they began, of equals in the order given: the last loop is the innermost.
        owned.sort(key=lambda pair: pair[0].start)
        for tick in range(50):
            now = [owner for span, owner in owned if span.start <= tick < span.end]
            leaves = [owner.part for owner in now if not owner.is_loop]
            for part in leaves or [owner.part for owner in now][-1:]:
                expected[part] += 1 / max(len(leaves), 1)
        found = module._taken(owned)
        assert {part: found.get(part, 0.0) for part in expected} == pytest.approx(expected)


HLO = """HloModule jit_step, is_scheduled=true

%products (p: f32[4,4], q: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  %q = f32[4,4]{1,0} parameter(1)
  %e = f32[4,4]{1,0} exponential(%p), metadata={op_name="jit(step)/soft/jit(norm)/exp"}
  %n = f32[4,4]{1,0} negate(%e), metadata={op_name="jit(step)/soft/neg"}
  ROOT %d = f32[4,4]{1,0} dot(%n, %q), metadata={op_name="jit(step)/while/body/multiply/ab,bc->ac/dot_general"}
}

%mostly (p.1: f32[4,4]) -> (f32[4,4], f32[4,4]) {
  %p.1 = f32[4,4]{1,0} parameter(0)
  %c = f32[] constant(1), metadata={op_name="jit(step)/soft/exp"}
  %b = f32[4,4]{1,0} broadcast(%c), metadata={op_name="jit(step)/soft/exp"}
  %a.1 = f32[4,4]{1,0} add(%p.1, %b), metadata={op_name="jit(step)/transpose(jvp(norm))/add"}
  %a.2 = f32[4,4]{1,0} add(%a.1, %p.1), metadata={op_name="jit(step)/transpose(jvp(norm))/add"}
  %s = f32[4,4]{1,0} sine(%a.2), metadata={op_name="jit(step)/soft/sin"}
  ROOT %t = (f32[4,4]{1,0}, f32[4,4]{1,0}) tuple(%a.2, %s)
}

%even (p.2: f32[4,4]) -> f32[4,4] {
  %p.2 = f32[4,4]{1,0} parameter(0)
  %x.1 = f32[4,4]{1,0} add(%p.2, %p.2), metadata={op_name="jit(step)/norm/add"}
  ROOT %x.2 = f32[4,4]{1,0} add(%x.1, %p.2), metadata={op_name="jit(step)/soft/add"}
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0), metadata={op_name="x"}
  %fusion.1 = f32[4,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%products, metadata={op_name="jit(step)/soft/exp"}
  %fusion.2 = (f32[4,4]{1,0}, /*index=1*/f32[4,4]{1,0}) fusion(%fusion.1), kind=kLoop, calls=%mostly
  %fusion.3 = f32[4,4]{1,0} fusion(%x), kind=kLoop, calls=%even, metadata={op_name="jit(step)/soft/add"}
  %jitted = f32[4,4]{1,0} negate(%x), metadata={op_name="jit(step)/jit(norm)/neg"}
  %inner = f32[4,4]{1,0} negate(%x), metadata={op_name="jit(step)/soft/norm/neg"}
  %copy = f32[4,4]{1,0} copy(%x)
  ROOT %while.1 = f32[4,4]{1,0} while(%x), condition=%c, body=%b, metadata={op_name="jit(step)/soft/while"}
}
"""


def test_who_owns_a_fusion():
    owners = module._owners(read_module(HLO), {"soft", "multiply", "norm"})
    assert owners["fusion.1"] == ("multiply", False, {"soft"})  # its product's
    assert owners["fusion.2"] == ("norm", False, {"soft"})  # two operations of three; constants are none
    assert owners["fusion.3"] == ("soft", False, {"norm"})  # of equals the root's
    assert owners["jitted"] == (OTHER, False, set())  # a function of a scope's name is no scope
    assert owners["inner"] == ("norm", False, set())
    assert owners["copy"] == (OTHER, False, set())
    assert owners["while.1"] == ("soft", True, set())


LOOP = """HloModule jit_loop, is_scheduled=true

%body (p: (s32[], f32[4], f32[4])) -> (s32[], f32[4], f32[4]) {
  %p = (s32[], f32[4]{0}, f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %w = f32[4]{0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %first = f32[4]{0} multiply(%x, %w)
  %turned = f32[4]{0} bitcast(%first)
  %second = f32[4]{0} sine(%turned)
  ROOT %t = (s32[], f32[4]{0}, f32[4]{0}) tuple(%next, %second, %w)
}

%condition (p.1: (s32[], f32[4], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}, f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (a: f32[4], b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %before = f32[4]{0} exponential(%a)
  %init = (s32[], f32[4]{0}, f32[4]{0}) tuple(%zero, %before, %b)
  %while = (s32[], f32[4]{0}, f32[4]{0}) while(%init), condition=%condition, body=%body
  %x.2 = f32[4]{0} get-tuple-element(%while), index=1
  ROOT %after = f32[4]{0} add(%x.2, %a)
}
"""


def test_what_an_operation_reads():
    reads = module._reads(read_module(LOOP))
    assert reads["first"] == {"second"}  # of the trip before
    assert (reads["second"], reads["next"]) == ({"first"}, {"next"})
    assert (reads["while"], reads["after"], reads["before"]) == ({"before"}, {"while"}, set())


def test_an_end_that_is_noted_late():
    span = lambda start, end, name: module._Span(start, end, "m", name)
    reads = {"m": {"second": frozenset({"first"}), "first": frozenset({"second"})}}
    given = [
        span(0, 9, "first"), span(1, 3, "else"), span(2, 4, "second"), span(5, 9, "first"), span(6, 20, "second")
    ]  # fmt: skip
    expected = [
        span(0, 2, "first"), span(1, 3, "else"), span(2, 4, "second"), span(5, 6, "first"), span(6, 20, "second")
    ]  # fmt: skip
    assert module._until_read(given[::-1], reads) == expected
    assert module._until_read(given, {}) == given


def test_what_runs_between_products_is_not_taken_for_them():
    """On a processor a product's last piece runs what follows before it notes the end of what came before."""

    @jax.jit
    def function(x, kernels):
        for kernel in kernels:
            with jax.named_scope("product"):
                x = x @ kernel
            with jax.named_scope("between"):
                x = jnp.tanh(x)
        return x

    draw = np.random.default_rng(0)
    x = draw.standard_normal((1024, 1024), np.float32) / 32
    found = by_name(profile(function, x, list(np.stack([x] * 6))))
    alone = Timed(jax.jit(jnp.tanh))
    for _ in range(9):
        alone(x)
    assert found["between"].seconds < 6 * 4 * np.median(alone.seconds)
    assert found["product"].share > 0.5


def line(name, *events):
    return SimpleNamespace(
        name=name,
        events=[SimpleNamespace(name=n, start_ns=a, end_ns=b, stats=tuple(stats.items())) for n, a, b, stats in events],
    )


def test_operations_that_return_before_they_are_done(monkeypatch):
    operation = {"hlo_op": "dot", "hlo_module": "m", "_p": 7}
    one = line("thread 1", ("dot", 1e9, 2e9, operation), ("dot", 8e9, 9e9, operation | {"_p": 8}))
    two = line("thread 2", ("end: dot", 5e9, 6e9, {"_c": 7}), ("end: dot", 8.5e9, 8.6e9, {"_c": 8}))
    host = SimpleNamespace(name="/host:CPU", lines=[one, two])
    trace = SimpleNamespace(planes=[host])
    monkeypatch.setattr(module, "ProfileData", SimpleNamespace(from_file=lambda path: trace))
    assert module._spans("trace") == [(1, 5, "m", "dot"), (8, 9, "m", "dot")]
    # Where a device has streams, what the host and other lines say of them is not counted again.
    kernel = {"hlo_op": "gemm", "hlo_module": "m"}
    stream, summary = (line(name, ("k", 3e9, 4e9, kernel)) for name in ("Stream #13(Compute)", "XLA Ops"))
    trace.planes.append(SimpleNamespace(name="/device:GPU:0", lines=[stream, summary]))
    assert module._spans("trace") == [(3, 4, "m", "gemm")]


def loss(x):
    @jax.checkpoint
    def inside(x):
        with jax.named_scope("inside"):
            return jnp.tanh(jnp.einsum("ab,bc->ac", x, x))

    with jax.named_scope("before"):
        x = x @ x
    return inside(x).sum()


def test_flops_of_gradients_and_what_is_computed_again():
    function = jax.jit(jax.value_and_grad(loss))
    x = np.eye(32, dtype=np.float32)
    found = by_name(profile(function, x))
    one = 2 * 32**3
    assert found["before"].flops == 3 * one
    assert found["inside"].flops == 4 * one
    assert sum(part.flops for part in found.values()) == flops.count(function, x).matrix
    assert set(found) <= {"before", "inside", OTHER, TRANSFER}


def test_a_loop_without_provable_trips_has_unknown_flops():
    @jax.jit
    def function(x):
        with jax.named_scope("unbounded"):
            x = jax.lax.while_loop(lambda x: x.max() < 1e4, lambda x: x @ x, x)
        with jax.named_scope("known"):
            return x @ x

    found = profile(function, np.full((2, 2), 2.0, np.float32))
    assert np.isnan(by_name(found)["unbounded"].flops)
    assert by_name(found)["known"].flops == 16
    assert " ? " in next(line for line in profile_lines(found) if line.startswith("unbounded"))


@pytest.fixture(scope="module")
def bert():
    return BertEncoder(BERT, jax.jit(Bound(lambda rngs: BertWithHeads(BERT, rngs=rngs)).init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def elmo():
    return ElmoEncoder(ELMO, jax.jit(Bound(lambda rngs: ElmoForPreTraining(ELMO, rngs=rngs)).init)(jax.random.key(0)))


def test_parts_of_a_bert(bert):
    parts = profile_encoder(bert, ROWS, LENGTH)
    found = by_name(parts)
    expected = {
        "input",
        "norms",
        "projections",
        "scores",
        "softmax",
        "context",
        "feed-forward",
        "activation",
        "pooling",
    }
    assert expected | {TRANSFER} <= set(found)
    for name in expected:
        # What is fused with another part has no time of its own, and then it is said which.
        assert found[name].seconds > 0 or any(name in part.fused for part in parts), name
    assert all(found[name].seconds > 0 for name in ("projections", "scores", "context", "feed-forward", "norms"))
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert [part.seconds for part in parts] == sorted((part.seconds for part in parts), reverse=True)
    cost = {part.name: part.matrix_flops for part in bert_cost(BERT, rows=ROWS, length=LENGTH).parts}
    assert found["projections"].flops == cost["attention projections"]
    assert found["scores"].flops == found["context"].flops == cost["attention scores"] / 2
    assert found["feed-forward"].flops == cost["feed-forward"]
    assert found[OTHER].operations < 0.1 * sum(part.operations for part in parts)


def test_parts_of_an_elmo(elmo, monkeypatch):
    monkeypatch.setattr(module, "NEW_WORDS_AT_ONCE", 100)
    found = by_name(profile_encoder(elmo, 4, 75))
    expected = ["characters", "highway", "projections", "input products", "recurrence", "layers", TRANSFER]
    for name in expected:
        assert found[name].seconds > 0, name
    assert sum(part.share for part in found.values()) == pytest.approx(1)
    width, words = 8 + 16, 4 * 75
    assert found["characters"].flops == 2 * words * (10 * 4 * 8 + 8 * 3 * 4 * 16)
    assert found["highway"].flops == 2 * 2 * words * width * 2 * width
    assert found["projections"].flops == 2 * words * width * 16
    # Two layers in two directions.
    assert found["input products"].flops == 4 * 2 * words * 16 * 4 * 32
    assert found["recurrence"].flops == 4 * 2 * words * (16 * 4 * 32 + 32 * 16)


def test_mix_and_heads_have_names(bert):
    from ctx_jax.nn.scalar_mix import ScalarMix

    mix = Bound(lambda rngs: ScalarMix(3))
    layers = np.ones((3, 2, 5, 16), np.float32)
    mixed = jax.jit(lambda params, layers: mix(params)(layers))
    assert "mix" in by_name(profile(mixed, mix.init(jax.random.key(0)), layers))
    ids = np.ones((2, 8), np.int32)
    for head, flops_of_head in (("masked_lm", 16 * (64 * 64 + 64 * 100)), ("next_sentence", 2 * 64 * 2)):
        found = by_name(profile(bert._logits, bert._weights(), ids, ids * 0, ids, head))
        assert found["head"].flops == 2 * flops_of_head
        assert ("pooling" in found) == (head == "next_sentence")


def test_the_trace_is_kept_where_asked_and_the_newest_is_read(tmp_path):
    folder = tmp_path / "new" / "traces"
    first = profile(looped(2), np.eye(8, dtype=np.float32), folder=folder, calls=1)
    (trace,) = folder.rglob("*.xplane.pb")
    trace.rename(folder / "first.xplane.pb")  # two within a second would be one
    second = profile(looped(5), np.eye(8, dtype=np.float32), folder=folder, calls=1)
    trips = [by_name(parts)["inside"].operations for parts in (first, second)]
    assert trips[0] / 2 == trips[1] / 5


def test_table():
    parts = [
        module.Part("norms", 3e-3, 0.75, 0.0, 4.0, ("layers", "softmax")),
        module.Part("feed-forward", 1e-3, 0.25, 2e9, 1.0, ()),
    ]
    assert [line.split() for line in profile_lines(parts)] == [
        ["ms", "share", "GFLOP", "GFLOP/s", "operations", "fused", "with", "it"],
        ["norms", "3.000", "75.0%", "·", "·", "4", "layers,", "softmax"],
        ["feed-forward", "1.000", "25.0%", "2.000", "2,000.000", "1"],
        ["a", "call", "4.000", "100.0%", "2.000", "500.000", "5"],
    ]
    assert len({line.index("%") for line in profile_lines(parts)[1:]}) == 1


class Other:
    config = None


def test_bad_input(bert, elmo, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for call, message in (
        (lambda: profile(jnp.tanh.__call__, 1.0), r"function: found .*, expected what jax\.jit returns"),
        (lambda: profile(looped(1), np.eye(2, dtype=np.float32), calls=0), "calls: found 0, expected at least 1"),
        (lambda: profile(looped(1), np.eye(2, dtype=np.float32), folder=file), "folder: found .*file, a file"),
        (lambda: profile_encoder(bert, 0, 8), "rows: found 0, expected at least 1"),
        (lambda: profile_encoder(bert, 1, 513), "length: found 513, expected at least 1, at most 512"),
        (lambda: profile_encoder(elmo, 1, 0), "length: found 0, expected at least 1"),
        (lambda: profile_encoder(Other(), 1, 1), "encoder: found Other, expected BertEncoder or"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert file.read_text() == "mine"


def test_a_device_that_names_no_operations(monkeypatch):
    monkeypatch.setattr(module, "_spans", lambda path: [])
    with pytest.raises(InputError, match="found none of the program's operations in the trace of cpu, expected a"):
        profile(looped(1), np.eye(2, dtype=np.float32))
