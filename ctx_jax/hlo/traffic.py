"""What the GPU compiler's kernels read, write and multiply, and how fast a card could at best.

That compiler says no cycles. So of each kernel:

    bytes      of the arrays that it is given and gives; of an array of which it takes slices or looks rows up, these
    products   FLOPs of the matrix products and convolutions in it; what a kernel written by hand multiplies is unknown
    time       the longer of products over the peak of their type, and bytes over the memory's bandwidth

and the times are added up, loop bodies as often as they run. Launches, waiting and all arithmetic that is no product
are not in it, so a step takes longer; but what a kernel still finds in the card's cache comes faster than from memory.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ctx_jax.flops.devices import Peak
from ctx_jax.hlo.estimate import Collective, direction_of, exchange_of, group_members, read_collective, shape_text
from ctx_jax.hlo.parts import owner_of, scopes
from ctx_jax.hlo.text import Computation, Instruction, Module, walk

_FREE = (
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|opt-barrier|add-dependency"
)
NO_KERNEL = frozenset((*_FREE.split("|"), "while", "conditional", "call"))
"""Operations for which nothing is launched, or what they call is."""
TAKES_PART = frozenset(("dynamic-slice", "slice", "gather"))
TF32_SHARE = 0.5
"""Of the bfloat16 peak: what tensor cores do with float32 operands where the program does not ask for more digits."""


@dataclass(frozen=True)
class GpuKernel:
    """One launch.

    Attributes:
      name: of its instruction.
      part: of the model.
      direction: `forward` or `backward`.
      times: executions in a step; 1 where the loop's trips are not known.
      bytes: read and written by one.
      flops: of the products of one.
      seconds: of one, at best.
      opaque: what is called, where it may multiply and does not say how much.
      shapes: of its results, for people.
    """

    name: str
    part: str
    direction: str
    times: int
    bytes: int
    flops: int
    seconds: float
    opaque: str | None
    shapes: tuple[str, ...]


@dataclass(frozen=True)
class GpuCollective(Collective):
    """An exchange between GPUs.

    Attributes:
      host_devices: how many of its group are on one host.
      beside_seconds: of the kernels, at best, that were scheduled between its start and its end.
    """

    host_devices: int = 1
    beside_seconds: float = 0.0


@dataclass
class Traffic:
    """Of one step on one GPU.

    Attributes:
      kernels: in the order of the schedule.
      collectives: likewise.
      unknown_loops: loops whose trips are not known, counted as one.
    """

    kernels: list[GpuKernel] = field(default_factory=list)
    collectives: list[GpuCollective] = field(default_factory=list)
    unknown_loops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written by all."""
        return sum(each.times * each.bytes for each in self.kernels)

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(each.times * each.flops for each in self.kernels)

    @property
    def seconds(self) -> float:
        """Of all kernels one after the other, at best."""
        return sum(each.times * each.seconds for each in self.kernels)

    def by_part(self) -> dict[str, dict[str, float]]:
        """Part → seconds `forward` and `backward`, `bytes` and `flops`, the dearest part first."""
        table: dict[str, dict[str, float]] = defaultdict(
            lambda: {"forward": 0.0, "backward": 0.0, "bytes": 0, "flops": 0}
        )
        for each in self.kernels:
            row = table[each.part]
            row[each.direction] += each.times * each.seconds
            row["bytes"] += each.times * each.bytes
            row["flops"] += each.times * each.flops
        return dict(sorted(table.items(), key=lambda item: -item[1]["forward"] - item[1]["backward"]))


def traffic(module: Module, names: set[str], peak: Peak, cards: int) -> Traffic:
    """Adds a module's kernels up.

    Args:
      module: compiled for a GPU.
      names: the program's named scopes, `parts.all_scopes`.
      peak: of the card.
      cards: of a host; device n is on host n // cards.
    """
    found, owner = Traffic(), owner_of(module, names)
    lasting = _durations(module, peak)
    beside = _beside(module, lasting)
    for instruction, computation, known in walk(module):
        times = 1 if known is None else known
        found.unknown_loops += instruction.opcode == "while" and module.trip_count(instruction) is None
        exchange = exchange_of(module, instruction)
        if exchange is not None:
            meanwhile = beside.get(instruction.name, 0.0)
            each = read_collective(exchange, owner(instruction)[0], times, meanwhile > 0)
            hosts = Counter(member // cards for member in group_members(exchange.attributes))
            together = max(hosts.values(), default=1) if len(hosts) != 1 else each.devices
            found.collectives.append(GpuCollective(**vars(each), host_devices=together, beside_seconds=meanwhile))
        elif _is_kernel(instruction):
            size, products = kernel_bytes(module, computation, instruction), _products(module, computation, instruction)
            path = instruction.op_name or _inner_path(module, instruction)
            found.kernels.append(
                GpuKernel(
                    name=instruction.name,
                    part=_pallas_part(instruction, names) or owner(instruction)[0],
                    direction=direction_of(path),
                    times=times,
                    bytes=size,
                    flops=sum(products.values()),
                    seconds=_seconds(size, products, peak),
                    opaque=_opaque(instruction),
                    shapes=tuple(map(shape_text, instruction.results[:3])),
                )
            )
    return found


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode not in NO_KERNEL and not instruction.opcode.endswith(("-done", "-update"))


def _pallas_part(instruction: Instruction, names: set[str]) -> str | None:
    """Of a Pallas kernel, whose own name is a scope too: the innermost around that; None of anything else."""
    around, _, last = instruction.op_name.rpartition("/")
    if last != "pallas_call":
        return None
    return next((each for each in [*scopes(around.rpartition("/")[0])][::-1] if each in names), None)


def _inner_path(module: Module, instruction: Instruction) -> str:
    """Where what was fused comes from, its last operation that says so."""
    inner = module.computations.get(instruction.called.get("calls", ""))
    return next((each.op_name for each in reversed(inner.instructions) if each.op_name), "") if inner else ""


def _durations(module: Module, peak: Peak) -> dict[str, float]:
    """Seconds at best by the name of an instruction, of loops and calls with all that they run."""
    found: dict[str, float] = {}

    def lasts(computation: Computation) -> float:
        for each in computation.instructions:
            seconds = 0.0
            if each.opcode == "while":
                seconds = (module.trip_count(each) or 1) * lasts(module.computations[each.called["body"]])
            elif each.opcode == "call":
                seconds = lasts(module.computations[each.called["to_apply"]])
            elif each.opcode == "conditional":
                seconds = min((lasts(module.computations[branch]) for branch in each.branches), default=0.0)
            elif _is_kernel(each) and exchange_of(module, each) is None:
                size = kernel_bytes(module, computation, each)
                seconds = _seconds(size, _products(module, computation, each), peak)
            found[each.name] = seconds
        return sum(found[each.name] for each in computation.instructions)

    lasts(module.entry)
    return found


def _beside(module: Module, lasting: dict[str, float]) -> dict[str, float]:
    """Start of an exchange → seconds, at best, of what was scheduled between it and its end."""
    found = {}
    for computation in module.computations.values():
        starts: dict[str, float] = {}
        clock = 0.0
        for instruction in computation.instructions:
            if instruction.opcode.endswith("-start") and exchange_of(module, instruction) is not None:
                starts[instruction.name] = clock
            elif instruction.opcode.endswith("-done"):
                found |= {name: clock - starts[name] for name in instruction.operands if name in starts}
            clock += lasting.get(instruction.name, 0.0)
    return found


def _seconds(size: int, products: Counter[str], peak: Peak) -> float:
    rates = {"half": peak.bfloat16_flops_per_s, "single": peak.bfloat16_flops_per_s * TF32_SHARE}
    rates["exact"] = peak.float32_flops_per_s
    return max(sum(flops / rates[kind] for kind, flops in products.items()), size / peak.bytes_per_s)


def _opaque(instruction: Instruction) -> str | None:
    """A called kernel whose products nobody counts here: neither one of cuBLAS nor one that has none."""
    found = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    if instruction.opcode != "custom-call" or found is None:
        return None
    return None if "__cublas" in found[1] or "TopK" in found[1] or "Sort" in found[1] else found[1]


# Bytes.


def kernel_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """What one execution reads from memory and writes to it.

    Args:
      module: for what the instruction calls.
      computation: that it stands in.
      instruction: a fusion, a library's call, a copy, …
    """
    inner = module.computations.get(instruction.called.get("calls", ""))
    if inner is not None:
        shares = _shares(module, inner)
        given = [each for each in inner.instructions if each.opcode == "parameter"]
        read = sum(math.ceil(shares[each.name] * _size(each)) for each in given)
        return read + sum(_written(module, inner, output) for output in _outputs(inner, inner.root))
    if instruction.opcode in TAKES_PART:
        return 2 * _size(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(computation[instruction.operands[1]])
    if instruction.opcode in ("copy-start", "slice-start"):
        return 2 * instruction.results[0].bytes
    read = sum(_size(computation[name]) for name in set(instruction.operands) if name in _names(computation))
    return read + _size(instruction)


def _size(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.results)


def _elements(instruction: Instruction) -> int:
    return max(sum(math.prod(array.shape) for array in instruction.results), 1)


def _names(computation: Computation) -> set[str]:
    return {each.name for each in computation.instructions}


def _outputs(computation: Computation, root: Instruction) -> list[Instruction]:
    """The values that a computation gives, a tuple's one by one."""
    return [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(module: Module, computation: Computation, output: Instruction) -> int:
    """Bytes: where an array is updated in place, of the update."""
    while output.opcode in ("bitcast", "reshape"):
        output = computation[output.operands[0]]
    if output.opcode == "dynamic-update-slice":
        return _size(computation[output.operands[1]])
    if output.opcode == "scatter" and computation[output.operands[0]].opcode == "parameter":
        return min(_size(computation[output.operands[-1]]), _size(output))
    if output.opcode == "fusion":
        inner = module.computations[output.called["calls"]]
        return sum(_written(module, inner, each) for each in _outputs(inner, inner.root))
    return 0 if output.opcode == "parameter" else _size(output)


def _shares(module: Module, computation: Computation) -> dict[str, float]:
    """Of each value of a fused computation the share, 0 to 1, that its result needs."""
    users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    for each in computation.instructions:
        if each.opcode not in ("parameter", "constant"):
            for place, name in enumerate(each.operands):
                users[name].append((each, place))
    inner = functools.cache(lambda name: _parameter_shares(module, module.computations[name]))
    shares: dict[str, float] = {}

    def through(user: Instruction, place: int, given: Instruction) -> float:
        if user.opcode in TAKES_PART:
            return shares[user.name] * _elements(user) / _elements(given) if place == 0 else 1.0
        if user.opcode == "dynamic-update-slice" and place == 0:
            return 0.0
        if user.opcode == "scatter" and place == 0:
            return min(_elements(computation[user.operands[-1]]) / _elements(given), 1.0)
        if user.opcode == "fusion":
            return inner(user.called["calls"])[place]
        return shares[user.name] if _elements(user) == _elements(given) else 1.0

    # Operands stand before what uses them.
    for each in reversed(computation.instructions):
        needed = sum(through(user, place, each) for user, place in users[each.name])
        shares[each.name] = 1.0 if each.root else min(needed, 1.0)
    return shares


def _parameter_shares(module: Module, computation: Computation) -> list[float]:
    shares = _shares(module, computation)
    given = [each for each in computation.instructions if each.opcode == "parameter"]
    return [shares[each.name] for each in sorted(given, key=lambda each: int(each.operands[0]))]


# Products.


def _products(module: Module, computation: Computation, instruction: Instruction) -> Counter[str]:
    """FLOPs of one execution: with operands of `half` (16 bits or less), with float32 as `single` or `exact`."""
    found: Counter[str] = Counter()
    for each, around in _inside(module, computation, instruction):
        if each.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)[1]
        elif each.opcode == "custom-call" and '"__cublas' in each.attributes:
            axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', each.attributes)
            axes = axes[1].replace('"', "") if axes else ""
        elif each.opcode == "convolution":
            found[_precision(each, around)] += _convolution(each, around)
            continue
        else:
            continue
        left = around[each.operands[0]].results[0]
        contracted = math.prod(left.shape[int(axis)] for axis in axes.split(",") if axis)
        found[_precision(each, around)] += 2 * math.prod(each.results[0].shape) * contracted
    return found


def _inside(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Instruction, Computation]]:
    """An instruction, or those that were fused in it, with the computations that they stand in."""
    inner = module.computations.get(instruction.called.get("calls", ""))
    if inner is None:
        yield instruction, computation
        return
    for each in inner.instructions:
        yield from _inside(module, inner, each)


def _precision(product: Instruction, computation: Computation) -> str:
    """`half`, `single` or `exact`, of the wider operand."""
    operands = [computation[name] for name in product.operands[:2]]
    if all(_size(each) <= 2 * _elements(each) for each in operands):
        return "half"
    return "exact" if "highest" in product.attributes.lower() else "single"


def _convolution(product: Instruction, computation: Computation) -> int:
    """FLOPs: for each result two for every number of the kernel that goes into it."""
    kernel = computation[product.operands[1]].results[0]
    labels = re.search(r"dim_labels=\w+_(\w+)->", product.attributes)[1]
    return 2 * math.prod(product.results[0].shape) * math.prod(kernel.shape) // kernel.shape[labels.index("o")]
