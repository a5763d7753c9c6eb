"""jit for tests that compile much and compute little."""

import functools

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Leaves LLVM's optimisations out: compiles in a quarter of the time. XLA's own, fusion for one, stay."""
