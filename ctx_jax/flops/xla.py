"""What XLA counts: a second opinion, with its own rules.

XLA's cost analysis visits each instruction once, so that the body of a scan counts once however often it runs (jax
issues 13956, 18672, 22249): ask it about a twin whose layers are written out. It counts comparisons, selections, casts
and integer arithmetic as FLOPs, exp, tanh and their like apart, and what hides in a library call not at all; so it is
asked about the program before optimisation, where no product is hidden yet, and nothing is compiled. And it has no erf:
that is a polynomial of some sixty operations, which make a narrow model with exact GELU several per cent dearer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def xla_flops(traced: jax.stages.Traced) -> int:
    """FLOPs of a traced function, `jax.jit(f).trace(…)`, by XLA's cost analysis, transcendental ones included.

    Loops that are not written out count once.
    """
    found = traced.lower().cost_analysis()
    return int(found.get("flops", 0)) + int(found.get("transcendentals", 0))


@functools.cache
def erfc_flops(dtype: str) -> int:
    """Operations that XLA writes the complementary error function of one value out in."""
    return xla_flops(jax.jit(jax.lax.erfc).trace(jax.ShapeDtypeStruct((), jnp.dtype(dtype))))
