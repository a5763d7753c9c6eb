"""What GPU kernels read, write and multiply, from a module written by hand."""

import pytest

from ctx_jax.errors import InputError
from ctx_jax.flops.devices import Peak
from ctx_jax.hlo.estimate import group_members
from ctx_jax.hlo.text import read_module
from ctx_jax.hlo.traffic import traffic

PEAK = Peak(1e12, 1e11, 1e9, 1e9, 64, "made up")
TEXT = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%take (stack: bf16[5,64,32], i: s32[]) -> bf16[64,32] {
  %stack = bf16[5,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%part)
}

%put (stack.1: f32[5,16,32], new: f32[16,32], i.1: s32[]) -> f32[5,16,32] {
  %stack.1 = f32[5,16,32]{2,1,0} parameter(0)
  %new = f32[16,32]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %row = f32[1,16,32]{2,1,0} bitcast(%new)
  ROOT %update = f32[5,16,32]{2,1,0} dynamic-update-slice(%stack.1, %row, %i.1, %zero.1, %zero.1)
}

%gemm (left: bf16[16,64], right: bf16[64,32]) -> f32[16,32] {
  %left = bf16[16,64]{1,0} parameter(0)
  %right = bf16[64,32]{1,0} parameter(1)
  ROOT %dot = f32[16,32]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(head))/dot_general"}
}

%body (state: (s32[], f32[5,16,32], bf16[5,64,32], bf16[16,64])) -> (s32[], f32[5,16,32], bf16[5,64,32], bf16[16,64]) {
  %state = (s32[], f32[5,16,32]{2,1,0}, bf16[5,64,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %out = f32[5,16,32]{2,1,0} get-tuple-element(%state), index=1
  %weights = bf16[5,64,32]{2,1,0} get-tuple-element(%state), index=2
  %x = bf16[16,64]{1,0} get-tuple-element(%state), index=3
  %fusion-start = ((bf16[5,64,32]{2,1,0}, s32[]), bf16[64,32]{1,0}, u32[]) fusion-start(%weights, %n), kind=kLoop, calls=%take, metadata={op_name="jit(f)/layers/while/body/dynamic_slice"}
  %fusion-done = bf16[64,32]{1,0} fusion-done(%fusion-start)
  %gemm_fusion = f32[16,32]{1,0} fusion(%x, %fusion-done), kind=kCustom, calls=%gemm, metadata={op_name="jit(f)/transpose(jvp(head))/dot_general"}
  %store = f32[5,16,32]{2,1,0} fusion(%out, %gemm_fusion, %n), kind=kLoop, calls=%put
  ROOT %next = (s32[], f32[5,16,32]{2,1,0}, bf16[5,64,32]{2,1,0}, bf16[16,64]{1,0}) tuple(%n, %store, %weights, %x)
}

%condition (state.1: (s32[], f32[5,16,32], bf16[5,64,32], bf16[16,64])) -> pred[] {
  %state.1 = (s32[], f32[5,16,32]{2,1,0}, bf16[5,64,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: f32[1000], q: f32[64,32], r: f32[32,8], s: (s32[], f32[5,16,32], bf16[5,64,32], bf16[16,64])) -> f32[64,8] {
  %p = f32[1000]{0} parameter(0)
  %q = f32[64,32]{1,0} parameter(1)
  %r = f32[32,8]{1,0} parameter(2)
  %s.1 = (s32[], f32[5,16,32]{2,1,0}, bf16[5,64,32]{2,1,0}, bf16[16,64]{1,0}) parameter(3)
  %all-reduce-start = ((f32[1000]{0}, f32[64,32]{1,0}), (f32[1000]{0}, f32[64,32]{1,0})) all-reduce-start(%p, %q), replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, to_apply=%add
  %loop = (s32[], f32[5,16,32]{2,1,0}, bf16[5,64,32]{2,1,0}, bf16[16,64]{1,0}) while(%s.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce-done = (f32[1000]{0}, f32[64,32]{1,0}) all-reduce-done(%all-reduce-start)
  %reduce-scatter-start = ((f32[1000]{0}), f32[500]{0}) reduce-scatter-start(%p), replica_groups={{0,8},{1,9}}, dimensions={0}, to_apply=%add
  %reduce-scatter-done = f32[500]{0} reduce-scatter-done(%reduce-scatter-start)
  %mine = f32[1000]{0} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/head/mine/pallas_call"}
  ROOT %gemm.1 = f32[64,8]{1,0} custom-call(%q, %r), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501 (lines as the compiler writes them)
FOUND = traffic(read_module(TEXT), {"layers", "head", "mine"}, PEAK, 8)
KERNELS = {each.name: each for each in FOUND.kernels}


def test_of_a_stack_only_what_is_taken_or_put_counts():
    assert KERNELS["fusion-start"].bytes == 2 * 2 * 64 * 32 + 4
    assert KERNELS["store"].bytes == 2 * 4 * 16 * 32 + 4
    assert KERNELS["fusion-start"].times == 5
    assert KERNELS["fusion-start"].part == "layers"


def test_products_at_the_peak_of_their_operands():
    gemm = KERNELS["gemm_fusion"]
    assert (gemm.part, gemm.direction, gemm.flops) == ("head", "backward", 2 * 16 * 32 * 64)
    assert gemm.bytes == 2 * 16 * 64 + 2 * 64 * 32 + 4 * 16 * 32
    assert gemm.seconds == gemm.bytes / PEAK.bytes_per_s
    fast_memory = traffic(read_module(TEXT), set(), PEAK._replace(bytes_per_s=1e15), 8).kernels
    seconds = {each.name: each.seconds for each in fast_memory}
    assert seconds["gemm_fusion"] == gemm.flops / 1e12
    assert seconds["gemm.1"] == 2 * 64 * 8 * 32 / 0.5e12
    assert FOUND.flops == 5 * gemm.flops + 2 * 64 * 8 * 32


def test_kernels_by_hand_are_named():
    assert {name: each.opaque for name, each in KERNELS.items() if each.opaque} == {"mine": "__gpu$xla.gpu.triton"}
    assert (KERNELS["mine"].bytes, KERNELS["mine"].part) == (8000, "head")


def test_exchanges_of_tuples_within_a_host_and_between_two():
    reduce, scatter = FOUND.collectives
    assert (reduce.kind, reduce.bytes, reduce.devices, reduce.host_devices) == ("all-reduce", 4 * (1000 + 2048), 8, 8)
    loop = sum(each.times * each.seconds for each in FOUND.kernels if each.times == 5)
    assert reduce.overlaps
    assert reduce.beside_seconds == pytest.approx(loop)
    assert (scatter.kind, scatter.bytes, scatter.devices, scatter.host_devices) == ("reduce-scatter", 4000, 2, 1)
    assert not scatter.overlaps


def test_parts_add_up():
    table = FOUND.by_part()
    assert sum(row["bytes"] for row in table.values()) == FOUND.bytes
    assert sum(row["forward"] + row["backward"] for row in table.values()) == pytest.approx(FOUND.seconds)


@pytest.mark.parametrize(
    ("written", "members"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("[4,2]<=[8]", [0, 1]),
        ("[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("mesh['axis_0'=8] {'axis_0'}", [*range(8)]),
    ],
)
def test_members_of_a_group(written, members):
    assert group_members(f", replica_groups={written}, dimensions={{0}}") == members


def test_groups_that_nobody_knows():
    assert group_members("source_target_pairs={{0,1},{1,0}}") == []
    with pytest.raises(InputError, match="expected replica_groups"):
        group_members("replica_groups=?")
