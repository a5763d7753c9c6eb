"""What the TPU compiler thinks that a program takes: cycles by part, collectives, kernels. Estimates, all of them.

    a fusion, a copy, …   the compiler's own `estimated_cycles`, times the trip counts of the loops around it
    a Pallas kernel       the bundles that the compiler scheduled for a step of its grid, one a cycle, times the steps;
                          what it reads and writes is taken to be hidden behind them
    a gather, a scatter   for which the compiler says nothing: twice the bytes of the result over the memory's bandwidth
    a collective          its bytes over the links, as a ring on all of a chip's links takes them; apart, for it may
                          overlap with the rest

Copies between a chip's memories that were started ahead (`copy-start`, `slice-start`) are taken to be hidden.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.hlo.parts import OTHER, owner_of, scopes
from ctx_jax.hlo.text import Array, Instruction, Module, walk

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
UNESTIMATED = ("fusion", "gather", "scatter", "sort", "convolution", "dot", "call-done")
"""Operations that take time even where the compiler says nothing of them; `call-done` ends what sparse cores did."""


@dataclass(frozen=True)
class Collective:
    """One instruction in which chips exchange values.

    Attributes:
      kind: `all-reduce`, …
      part: of the model.
      bytes: that a chip puts in (reduce, permute, all-to-all) or gets out (gather), in one execution.
      devices: in a group.
      times: executions in a step; 1 where the loop's trips are not known.
      overlaps: whether other work was scheduled between its start and its end, or is done in one fusion with it.
      shapes: of the largest arrays, for people.
    """

    kind: str
    part: str
    bytes: int
    devices: int
    times: int
    overlaps: bool
    shapes: tuple[str, ...]

    @property
    def sent_bytes(self) -> float:
        """What each chip must send in all, in a ring (Patarasuk and Yuan 2009)."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.bytes * factor


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel.

    Attributes:
      name: of its instruction.
      part: of the model.
      times: executions in a step.
      cycles: of one execution; None where the compiler's schedule was not at hand.
    """

    name: str
    part: str
    times: int
    cycles: int | None


@dataclass
class Estimate:
    """Of one step on one chip.

    Attributes:
      cycles: by part of the model, forward and backward apart: (part, "forward" or "backward") → cycles.
      largest: (cycles, part, what) of the dearest instructions.
      unestimated: (part, opcode) → bytes of results of operations that the compiler says nothing of.
      collectives: in the order of the schedule.
      kernels: likewise.
      unknown_loops: loops whose trips are not known, counted as one.
    """

    cycles: Counter[tuple[str, str]] = field(default_factory=Counter)
    largest: list[tuple[int, str, str]] = field(default_factory=list)
    unestimated: Counter[tuple[str, str]] = field(default_factory=Counter)
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    unknown_loops: int = 0

    @property
    def compute_cycles(self) -> int:
        """The compiler's and the kernels'."""
        return sum(self.cycles.values())


def direction_of(op_name: str) -> str:
    """`backward` for what differentiation made; remat's second forward pass belongs to it."""
    return "backward" if "transpose(" in op_name else "forward"


def estimate(module: Module, names: set[str], bundles: Mapping[str, int] | None = None) -> Estimate:
    """Adds a module's schedule up.

    Args:
      module: compiled for a TPU.
      names: the program's named scopes, `parts.all_scopes`.
      bundles: of a grid step of each kernel, by the name of its instruction; see `kernel_bundles`.
    """
    found, owner, bundles = Estimate(), owner_of(module, names), bundles or {}
    done = _overlapped(module)
    # Of equal kernels the compiler schedules one.
    alike = {_kernel_key(i): bundles[i.name] for i, _, _ in walk(module) if i.name in bundles}
    for instruction, _, known in walk(module):
        times = 1 if known is None else known
        found.unknown_loops += instruction.opcode == "while" and module.trip_count(instruction) is None
        exchange = exchange_of(module, instruction)
        if exchange is not None:
            part, _ = owner(instruction)
            hidden = exchange is not instruction or instruction.name in done
            found.collectives.append(read_collective(exchange, part, times, hidden))
        elif instruction.name.startswith("async-collective"):
            continue  # its end
        elif instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
            own = instruction.name.split(".")[0]  # is a scope, too
            part = next((each for each in [*scopes(instruction.op_name)][::-1] if each in names and each != own), OTHER)
            steps = re.search(r'"?grid_steps"?\s*[:=]\s*"?(\d+)', instruction.attributes)
            each = bundles.get(instruction.name, alike.get(_kernel_key(instruction)))
            cycles = None if each is None or steps is None else each * int(steps[1])
            found.kernels.append(Kernel(instruction.name, part, times, cycles))
            found.cycles[part, direction_of(instruction.op_name)] += times * (cycles or 0)
        elif instruction.cycles is not None:
            part, _ = owner(instruction)
            found.cycles[part, direction_of(instruction.op_name)] += times * instruction.cycles
            shapes = ", ".join(shape_text(array) for array in instruction.results[:3])
            found.largest.append(
                (times * instruction.cycles, part, f"{instruction.opcode} {instruction.name}: {shapes}")
            )
        elif instruction.opcode in UNESTIMATED:
            part, _ = owner(instruction)
            found.unestimated[part, instruction.name.split(".")[0]] += times * 2 * instruction.bytes
    found.largest = sorted(found.largest, reverse=True)[:20]
    return found


def _kernel_key(instruction: Instruction) -> tuple[str, ...]:
    """Kernels of a name that give the same arrays are the same."""
    return instruction.name.split(".")[0], *map(shape_text, instruction.results)


def shape_text(array: Array) -> str:
    """Type and sizes as HLO writes them."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _collective(instruction: Instruction) -> str | None:
    """Its kind, of those that begin one: `all-reduce-start` counts, `all-reduce-done` does not."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def exchange_of(module: Module, instruction: Instruction) -> Instruction | None:
    """The exchange that an instruction begins: itself, or one in what it calls, as fusions with computation do it."""
    if _collective(instruction) is not None:
        return instruction
    if instruction.opcode == "async-start" or instruction.name.startswith("async-collective-start"):
        inner = module.computations[instruction.called["calls"]].instructions
        return next((found for each in inner if (found := exchange_of(module, each)) is not None), None)
    return None


def read_collective(exchange: Instruction, part: str, times: int, overlaps: bool) -> Collective:
    """What an exchange moves, from the instruction that `exchange_of` gives."""
    kind, arrays, given = _collective(exchange), exchange.results, len(exchange.operands)
    if exchange.opcode.endswith("-start") and len(arrays) >= 2 * given:
        arrays = arrays[given : 2 * given]  # operands, results and counters in one tuple; all-reduce of TPUs: results
    devices = group_size(exchange.attributes)
    size = sum(array.bytes for array in arrays) * (devices if kind == "reduce-scatter" else 1)
    largest = sorted(arrays, key=lambda array: -array.bytes)[:3]
    return Collective(kind, part, size, devices, times, overlaps, tuple(map(shape_text, largest)))


def _overlapped(module: Module) -> set[str]:
    """Names of starts between which and their ends something else was scheduled that takes time."""
    found = set()
    for computation in module.computations.values():
        starts: dict[str, int] = {}
        work = 0
        for instruction in computation.instructions:
            if instruction.opcode.endswith("-start"):
                starts[instruction.name] = work
            elif instruction.opcode.endswith("-done"):
                begin = next((starts[name] for name in instruction.operands if name in starts), work)
                found |= {name for name in instruction.operands if name in starts and work > begin}
            else:
                work += (instruction.cycles or 0) > 0 or instruction.opcode in ("while", "custom-call")
    return found


def group_size(attributes: str) -> int:
    """Devices of a collective's group, in any of the ways in which HLO writes `replica_groups`.

    Raises:
      InputError: none of them.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        size = 1
        for axis in re.findall(r"'([^']+)'", found[2]):
            size *= int(sizes[axis])
        return size
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return found[1].count("{")
    raise InputError(f"HLO text: found a collective with {attributes[:120]!r}, expected replica_groups")


def group_members(attributes: str) -> list[int]:
    """Numbers of the devices in a collective's first group; nothing where only pairs are named.

    Raises:
      InputError: `replica_groups` is written in no way that is known.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(each) for each in found[1].split(",")]
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        sizes = [int(each) for each in found[2].split(",")]
        order = [int(each) for each in found[3].split(",")] if found[3] else range(len(sizes))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, int(found[1]))[0].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        axes = re.findall(r"'([^']+)'", found[2])
        numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return numbers[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel().tolist()
    if "source_target_pairs=" in attributes:
        return []
    raise InputError(f"HLO text: found a collective with {attributes[:120]!r}, expected replica_groups")


def by_part(estimate: Estimate) -> dict[str, dict[str, int]]:
    """Part → forward and backward cycles, the dearest part first."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: {"forward": 0, "backward": 0})
    for (part, direction), cycles in estimate.cycles.items():
        table[part][direction] += cycles
    return dict(sorted(table.items(), key=lambda item: -sum(item[1].values())))
