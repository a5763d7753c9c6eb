"""Adding a schedule up: cycles, kernels, collectives, from modules written by hand."""

import pytest

from ctx_jax.errors import InputError
from ctx_jax.hlo.estimate import by_part, estimate, group_size
from ctx_jax.hlo.kernels import kernel_bundles
from ctx_jax.hlo.text import read_module

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TRIPS = 'backend_config={"known_trip_count":{"n":"5"}}'
MESH = "replica_groups=mesh['data'=16,'fsdp'=2,'tensor'=4] {'data','fsdp'}"


def module(lines, loop=()):
    """An entry with these lines, and a loop of five trips over the others."""
    text = "HloModule m\n\n%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
    text += "  ROOT %s = f32[] add(%a, %b)\n}\n\n%body (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n"
    text += "".join(f"  {line}\n" for line in loop) + "  ROOT %r = f32[8] copy(%x)\n}\n\n"
    text += "%condition (i: s32[]) -> pred[] {\n  %five = s32[] constant(5)\n  %i = s32[] parameter(0)\n"
    text += "  ROOT %lt = pred[] compare(%i, %five), direction=LT\n}\n\nENTRY %main (p: f32[8]) -> f32[8] {\n"
    text += "  %p = f32[8] parameter(0)\n" + "".join(f"  {line}\n" for line in lines)
    return read_module(text + f"  ROOT %w = f32[8] while(%p), condition=%condition, body=%body, {TRIPS}\n}}\n")


def line(name, opcode, scope, cycles=None, extra="", shape="f32[8]", operand="%p"):
    config = f", {CYCLES % cycles}" if cycles is not None else ""
    return f'%{name} = {shape} {opcode}({operand}){extra}, metadata={{op_name="jit(step)/{scope}/op"}}{config}'


def test_cycles_by_part_and_direction():
    inside = [line("f", "fusion", "jvp(norms)", 10, ", calls=%add", operand="%x")]
    inside += [line("g", "copy", "transpose(jvp(norms))", 7, operand="%x")]
    found = estimate(
        module([line("h", "copy", "input", 100), line("o", "copy", "nothing", 3)], inside), {"norms", "input"}
    )
    assert by_part(found) == {
        "input": {"forward": 100, "backward": 0},
        "norms": {"forward": 0, "backward": 35},
        "other": {"forward": 53, "backward": 0},  # the fusion's own computation names no scope
    }
    assert found.compute_cycles == 188


def test_what_the_compiler_says_nothing_of_counts_by_bytes():
    lines = [
        line("gather_fusion.3", "fusion", "input", None, ", calls=%add", "bf16[100,8]"),
        line("sort.1", "sort", "input"),
        line("offload.2", "call-done", "input", shape="s32[16]"),
    ]
    found = estimate(module(lines), {"input"})
    assert found.unestimated == {("other", "gather_fusion"): 3200, ("input", "sort"): 64, ("input", "offload"): 128}
    assert found.compute_cycles == 0


def test_kernels_are_bundles_times_steps():
    call = ', custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={"grid_steps":"96"}}'
    inside = [line("attention.1", "custom-call", "attention", None, call, operand="%x")]
    found = estimate(module([], inside), {"attention"}, {"attention.1": 2000, "other": 7})
    assert [(kernel.times, kernel.cycles) for kernel in found.kernels] == [(5, 192_000)]
    assert found.compute_cycles == 5 * 192_000
    assert [kernel.cycles for kernel in estimate(module([], inside), {"attention"}).kernels] == [None]


def test_bundles_are_read_from_the_compilers_files(tmp_path):
    for number, (name, count) in enumerate([("attention.1", 10), ("copy-start.2", 3), ("attention.1", 1424)]):
        text = f"Schedule analysis:\n\ttotal scheduled bundles:    9\n\tnon empty scheduled bundles: {count}\n"
        (tmp_path / f"{number}-{name}-71-schedule-analysis_final_bundles.txt").write_text(text)
    (tmp_path / "5-attention.1-72-final_bundles.txt").write_text("non empty scheduled bundles: 9")
    assert kernel_bundles(tmp_path) == {"attention.1": 1424, "copy-start.2": 3}


@pytest.mark.parametrize(
    ("opcode", "shape", "size", "sent"),
    [
        ("all-reduce", "(f32[1000], bf16[4])", 4008, 2 * 31 / 32),
        ("all-gather", "f32[1000]", 4000, 31 / 32),
        ("reduce-scatter", "f32[1000]", 128_000, 31 / 32),
        ("all-to-all", "f32[1000]", 4000, 31 / 32),
    ],
)
def test_collectives_and_what_a_ring_must_send(opcode, shape, size, sent):
    found = estimate(module([], [line("c", opcode, "norms", None, f", {MESH}", shape, "%x")]), {"norms"})
    (one,) = found.collectives
    assert (one.kind, one.part, one.bytes, one.devices, one.times, one.overlaps) == (
        opcode,
        "norms",
        size,
        32,
        5,
        False,
    )
    assert one.sent_bytes == pytest.approx(5 * size * sent)


@pytest.mark.parametrize(("between", "overlaps"), [(12, True), (None, False)])
def test_an_exchange_overlaps_when_something_runs_between_its_start_and_its_end(between, overlaps):
    lines = [line("all-reduce-start.1", "all-reduce-start", "head", None, f", {MESH}")]
    lines += [line("f", "copy", "norms", between)]
    lines += [line("d", "all-reduce-done", "head", operand="%all-reduce-start.1")]
    (one,) = estimate(module(lines), {"head", "norms"}).collectives
    assert (one.kind, one.bytes, one.overlaps) == ("all-reduce", 32, overlaps)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x=1", 3),
        ("replica_groups=[4,8]<=[32]", 8),
        ("replica_groups=mesh['data'=256,'fsdp'=1,'tensor'=1] {'data'}", 256),
        (MESH, 32),
        ("source_target_pairs={{0,1},{1,2},{2,0}}, x", 3),
    ],
)
def test_groups_in_every_notation(text, size):
    assert group_size(text) == size


def test_no_groups_is_an_error():
    with pytest.raises(InputError, match="expected replica_groups"):
        group_size("channel_id=3")
