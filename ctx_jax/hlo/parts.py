"""Whose work an instruction does: the part of the model that its named scopes say.

An operation belongs to the innermost `jax.named_scope` that it stands in. A fusion belongs to the part of its matrix
products and convolutions, or where it has none to the one that most of its operations name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.extend import core

from ctx_jax.hlo.text import Instruction, Module

OTHER = "other"
"""Operations outside every scope."""
PRODUCTS = frozenset(("dot", "convolution"))
MOSAIC = "mpmd_map"
"""A kernel's equation, in which JAX opens a scope of the kernel's own name: no part of the model."""
NO_WORK = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "broadcast"))


def scopes(path: str) -> Iterator[str]:
    """Names in a path of scopes, the outermost first: `a` and `b` of `jit(f)/transpose(jvp(a))/while/body/b`, and
    `while` and `body`.
    """
    for component in path.split("/"):
        *wrappers, name = component.rstrip(")").split("(")
        # einsum opens a scope named after its axes.
        if name and "jit" not in wrappers and "->" not in name:
            yield name


def all_scopes(jaxpr: Any) -> Iterator[str]:
    """Names of the scopes that a function opened, from its jaxpr."""
    for equation in open_jaxpr(jaxpr).eqns:
        names = list(scopes(str(equation.source_info.name_stack)))
        if equation.primitive.name == MOSAIC:
            yield from names[:-1]
            continue
        yield from names
        for inner in inner_jaxprs(equation.params.values()):
            yield from all_scopes(inner)


def open_jaxpr(jaxpr: Any) -> core.Jaxpr:
    """Without its constants: up to JAX 0.10 a jaxpr with them is another class."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def inner_jaxprs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    """Jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield open_jaxpr(value)
        elif isinstance(value, tuple | list):
            yield from inner_jaxprs(value)


def owner_of(module: Module, names: set[str]) -> Callable[[Instruction], tuple[str, frozenset[str]]]:
    """A function from an instruction to its part and the other parts that were fused with it.

    Args:
      module: that it stands in.
      names: scopes that the program opened: jit and loops are in a path too, and others' functions may be called as
        our scopes are.
    """

    def parts(instruction: Instruction) -> Iterator[tuple[str, bool]]:
        """(part, whether it is a product) of all that an instruction does, the last one first."""
        computation = next(
            (instruction.called[role] for role in ("calls", "to_apply") if role in instruction.called), ""
        )
        if instruction.opcode in ("fusion", "call"):
            for inner in reversed(module.computations[computation].instructions):
                yield from parts(inner)
        elif instruction.opcode not in NO_WORK:
            for scope in [scope for scope in scopes(instruction.op_name) if scope in names][-1:]:
                yield scope, instruction.opcode in PRODUCTS

    def owner(instruction: Instruction) -> tuple[str, frozenset[str]]:
        found = list(parts(instruction))
        counts = Counter(part for part, is_product in found if is_product) or Counter(part for part, _ in found)
        # Of equals the last computed, the root's.
        part = max(counts, key=counts.get, default=OTHER)
        return part, frozenset(other for other, _ in found) - {part}

    return owner
