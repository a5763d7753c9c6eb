"""FLOPs counted three ways: by formula, by walking a jaxpr, by XLA; budgets, rooflines, a search, and claims.

`ctx_jax.flops.count(function, *args)` counts any JAX function, every trip of its loops, without compiling it.
"""

from ctx_jax.flops.jaxpr import Count, count

__all__ = ["Count", "count"]
