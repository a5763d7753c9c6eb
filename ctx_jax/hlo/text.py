"""Reads the text of a compiled HLO module: computations, instructions, trip counts of loops.

The text is XLA's own (`jax.stages.Compiled.as_text()`); nothing else says what the TPU compiler scheduled. Only what
the accounting needs is read: shapes, operands, called computations, `op_name` and the compiler's `estimated_cycles`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ctx_jax.errors import InputError

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
"""Widths in memory of the types whose name does not end in it."""
NO_ESTIMATE = 2**63 - 1
"""What stands in place of cycles where sparse cores work."""

_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_END = re.compile(r'\}(, execution_thread="\w+")?')
"""Of a computation; what v5p and v6e hand to their sparse cores says so."""
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """An array of the program: type and dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """In memory, without the padding of tiles."""
        digits = re.search(r"\d+$", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.match(r"[a-z]+(\d+)", self.dtype)[1]) if digits else 8
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the per cent sign.
      opcode: `fusion`, `all-reduce`, …
      results: arrays that it gives; a tuple's, flattened.
      operands: names.
      attributes: the rest of the line.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it made none: it says nothing, -1, or the largest number there is."""
        found = _CYCLES.search(self.attributes)
        return None if found is None or not 0 <= int(found[1]) < NO_ESTIMATE else int(found[1])

    @property
    def op_name(self) -> str:
        """Where in the JAX program it comes from: named scopes, then the primitive."""
        found = _OP_NAME.search(self.attributes)
        return "" if found is None else found[1]

    @property
    def place(self) -> int | None:
        """Which of a tuple's elements a get-tuple-element takes; None of others."""
        found = _INDEX.search(self.attributes)
        return None if found is None else int(found[1])

    @property
    def called(self) -> dict[str, str]:
        """Role → computation: `calls`, `body`, `condition`, …"""
        return dict(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of which a conditional runs one."""
        found = _BRANCHES.search(self.attributes)
        if found is not None:
            return tuple(_NAME.findall(found[1]))
        called = self.called
        return tuple(called[role] for role in ("true_computation", "false_computation") if role in called)

    @property
    def bytes(self) -> int:
        """Of what it gives."""
        return sum(array.bytes for array in self.results)


@dataclass
class Computation:
    """Instructions in the order of the schedule."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def __getitem__(self, name: str) -> Instruction:
        """The instruction of a name."""
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is such an instruction."""
        return name in self._by_name

    @property
    def _by_name(self) -> dict[str, Instruction]:
        if "_index" not in self.__dict__ or len(self.__dict__["_index"]) != len(self.instructions):
            self.__dict__["_index"] = {instruction.name: instruction for instruction in self.instructions}
        return self.__dict__["_index"]

    @property
    def root(self) -> Instruction:
        """Its result."""
        return next(instruction for instruction in self.instructions if instruction.root)


@dataclass(frozen=True)
class Module:
    """A compiled module.

    Attributes:
      computations: by name.
      entry: where it begins.
    """

    computations: dict[str, Computation]
    entry: Computation

    def trip_count(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs, where that is a constant: XLA says it, or the condition compares an
        integer that begins at 0, as `lax.scan` and `fori_loop` have it, and that the body steps by 1, with a constant.
        None for any other loop.
        """
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(said[1])
        condition, root = self._unwrapped(self.computations[loop.called["condition"]])
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        left, right = (condition[name] for name in root.operands)
        bound = _integer(right)
        if bound is None or left.opcode not in ("get-tuple-element", "parameter"):
            return None
        body = self.computations[loop.called["body"]]
        stepped = body.root
        if left.opcode == "get-tuple-element":
            stepped = body[stepped.operands[left.place]] if stepped.opcode == "tuple" else None
        return bound if stepped is not None and self._adds_one(body, stepped) else None

    def _unwrapped(self, computation: Computation) -> tuple[Computation, Instruction]:
        """The computation that the root really stands in: it may have been fused."""
        root = computation.root
        if root.opcode != "fusion":
            return computation, root
        inner = self.computations[root.called["calls"]]
        outer = dict(zip(_parameters(inner), root.operands, strict=True))
        # Its parameters stand for instructions outside.
        stand_ins = [
            replace(computation[outer[i.name]], name=i.name) if i.name in outer else i for i in inner.instructions
        ]
        return Computation(inner.name, stand_ins), inner.root

    def _adds_one(self, computation: Computation, instruction: Instruction) -> bool:
        while instruction.opcode in ("copy", "bitcast"):
            instruction = computation[instruction.operands[0]]
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.called["calls"]]
            return self._adds_one(inner, inner.root)
        return instruction.opcode == "add" and 1 in [_integer(computation[name]) for name in instruction.operands]


def _parameters(computation: Computation) -> list[str]:
    """Names of its parameters, in their order."""
    found = [each for each in computation.instructions if each.opcode == "parameter"]
    return [each.name for each in sorted(found, key=lambda each: int(each.operands[0]))]


def _integer(instruction: Instruction) -> int | None:
    """The value of a scalar integer constant."""
    if instruction.opcode != "constant" or instruction.results[0].dtype[0] not in "su":
        return None
    return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None


def read_module(text: str) -> Module:
    """Reads a module's text.

    Raises:
      InputError: it is no HLO, or a line that looks like an instruction cannot be read.
    """
    computations: dict[str, Computation] = {}
    entry = None
    here: Computation | None = None
    for number, line in _lines(text):
        if here is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) (\(|\{)", line)
            if head and line.rstrip().endswith("{") and not line.startswith("HloModule"):
                here = Computation(head[2])
                computations[here.name] = here
                entry = here if head[1] else entry
        elif _END.fullmatch(line):
            here = None
        elif " = " in line:
            try:
                here.instructions.append(_instruction(line))
            except (ValueError, IndexError) as error:
                raise InputError(f"HLO text, line {number}: {line[:120]!r}: not an instruction") from error
    if entry is None:
        raise InputError("HLO text: found no ENTRY, expected what `compiled.as_text()` gives")
    return Module(computations, entry)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; what a line break within an attribute cut off is put back."""
    number, whole = 0, ""
    for place, line in enumerate(text.splitlines(), 1):
        if number and line and not line[0].isspace() and not _END.fullmatch(line) and whole.startswith("  "):
            whole += line
            continue
        if number:
            yield number, whole
        number, whole = place, line
    yield number, whole


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode, _ = rest.split("(", 1)
    closing = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : closing]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    results = tuple(
        Array(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in _SHAPE.findall(shape)
    )
    return Instruction(
        left.removeprefix("ROOT ").removeprefix("%"), opcode, results, operands, rest[closing + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    raise ValueError("no closing parenthesis")


def walk(module: Module) -> Iterator[tuple[Instruction, Computation, int | None]]:
    """Every instruction that is scheduled, with its computation and how often it runs (the product of the trip counts
    around it; None inside a loop whose count is not known). Of a conditional all branches are walked.
    """

    def visit(computation: Computation, times: int | None) -> Iterator[tuple[Instruction, Computation, int | None]]:
        for instruction in computation.instructions:
            yield instruction, computation, times
            if instruction.opcode == "while":
                count = module.trip_count(instruction)
                inner = None if count is None or times is None else times * count
                yield from visit(module.computations[instruction.called["body"]], inner)
                yield from visit(module.computations[instruction.called["condition"]], inner)
            elif instruction.opcode == "conditional":
                for branch in instruction.branches:
                    yield from visit(module.computations[branch], times)
            elif instruction.opcode == "call":
                yield from visit(module.computations[instruction.called["to_apply"]], times)

    return visit(module.entry, 1)
