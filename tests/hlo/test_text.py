"""Reading HLO: against modules that XLA wrote here, and lines as the TPU compiler writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.hlo.text import Array, read_module, walk

TPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(128)})->f32[8]{0:T(128)}}

%inside (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0:T(128)} parameter(0)
  ROOT %neg = f32[8]{0:T(128)} negate(%param_0), metadata={op_name="jit(step)/while/body/norms/neg"}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%arg), index=1
  %fusion.1 = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%inside, \
metadata={op_name="jit(step)/while/body/norms/neg"}, \
backend_config={"window_config":{"estimated_cycles":"700","iteration_bounds":["1"]}}
  %kernel.1 = f32[8]{0:T(128)S(1)} custom-call(%fusion.1), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"grid_steps":"96"
}}, metadata={op_name="jit(step)/while/body/attention/pallas_call"}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %kernel.1)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %twelve), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_a_module_of_the_tpu_compiler():
    module = read_module(TPU)
    assert module.entry.name == "main"
    assert list(module.computations) == ["inside", "body", "condition", "main"]
    seen = {instruction.name: (instruction, times) for instruction, _, times in walk(module)}
    assert seen["fusion.1"][1] == seen["kernel.1"][1] == 12
    assert seen["loop"][1] == 1
    fusion = seen["fusion.1"][0]
    assert (fusion.cycles, fusion.op_name, fusion.called) == (
        700,
        "jit(step)/while/body/norms/neg",
        {"calls": "inside"},
    )
    assert seen["kernel.1"][0].op_name.endswith("attention/pallas_call")
    assert seen["kernel.1"][0].cycles is None
    assert seen["loop"][0].results == (Array("s32", ()), Array("f32", (8,)))


def test_a_computation_of_the_sparse_cores():
    """It ends in its own way, and its cycles are no estimate; what stands behind it is read as before."""
    cycles = 'backend_config={"estimated_cycles":"9223372036854775807"}'
    lines = [
        "HloModule m",
        "",
        "%offload (q: f32[8]) -> f32[8] {",
        "  %q = f32[8]{0:T(128)} parameter(0)",
        f"  ROOT %gather_fusion = f32[8]{{0:T(128)}} fusion(%q), kind=kCustom, calls=%inside, {cycles}",
        '}, execution_thread="sparsecore"',
        "",
    ]
    module = read_module("\n".join(lines) + TPU.split("\n", 1)[1])
    assert list(module.computations) == ["offload", "inside", "body", "condition", "main"]
    assert [(i.name, i.cycles) for i in module.computations["offload"].instructions] == [
        ("q", None),
        ("gather_fusion", None),
    ]
    assert len(list(walk(module))) == len(list(walk(read_module(TPU))))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("f32", (3, 5), 60), ("bf16", (7,), 14), ("pred", (9,), 9), ("s4", (6,), 3), ("u64", (), 8)],
)
def test_bytes(dtype, shape, size):
    assert Array(dtype, shape).bytes == size


@pytest.mark.parametrize("trips", [1, 7])
def test_trips_of_scans_as_xla_compiles_them_here(trips):
    """On the processor: of the same text another dialect, without tiles and cycles."""

    def step(x, w):
        return jnp.tanh(x @ w), None

    args = jnp.ones((3, 4)), jnp.ones((trips, 4, 4))
    module = read_module(jax.jit(lambda x, ws: jax.lax.scan(step, x, ws)[0]).lower(*args).compile().as_text())
    times = {times for instruction, _, times in walk(module) if "dot_general" in instruction.op_name}
    assert times == {trips}


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 2, x),
        lambda x: jax.lax.while_loop(lambda c: c[1] < 100, lambda c: (c[0] * 2, c[1] * 3), (x, x[0].astype(int)))[0],
        lambda x: jax.lax.while_loop(lambda c: c[1] < c[2], lambda c: (c[0] * 2, c[1] + 1, c[2] - 1), (x, 0, 9))[0],
    ],
    ids=["a sum", "a product", "a moving bound"],
)
def test_a_loop_that_counts_otherwise_is_unknown(loop):
    module = read_module(jax.jit(loop).lower(np.ones(4, np.float32)).compile().as_text())
    loops = [instruction for instruction, _, _ in walk(module) if instruction.opcode == "while"]
    assert [module.trip_count(each) for each in loops] == [None]
    assert None in {times for _, _, times in walk(module)}


def test_a_body_that_steps_otherwise_is_unknown():
    module = read_module(TPU.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)"))
    (loop,) = [instruction for instruction in module.entry.instructions if instruction.opcode == "while"]
    assert module.trip_count(loop) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not a module", "no ENTRY"),
        (TPU.replace("negate(%param_0)", "negate(%param_0"), "line 5.*not an instruction"),
        (TPU[: TPU.index("ENTRY")], "no ENTRY"),
    ],
)
def test_what_is_no_module_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        read_module(text)
