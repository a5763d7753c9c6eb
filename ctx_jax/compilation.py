"""Compiled programs on disk: what one process has compiled, the next one reads.

The cache is JAX's own. An entry's key covers the program, the versions of jaxlib and XLA, XLA's flags and the
processor's features, so that environments and unlike machines may share a folder. Whoever may write into it can have
any code run: it belongs to its user alone.
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger("ctx_jax.compilation")

OPTIONS: dict[str, dict[str, bool]] = {
    # Products by cuBLAS alone, which adds the bias as it writes. Where Triton may have them XLA decides too late for
    # that, and adds it in a pass of its own: a twelfth of BERT-base's forward pass on an H100.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}
"""XLA's, by `jax.Device.platform`, for `jax.jit`'s `compiler_options`; of platforms that are not named its own."""


def options_for(device: jax.Device) -> dict[str, bool]:
    """What to compile a model's functions for a device with."""
    return OPTIONS.get(device.platform, {})


def float32_means_float32(dtype: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of functions to be traced: computed in float32, products take float32 whole.

    JAX's own default rounds their operands, to bfloat16 on TPUs and to TF32 on GPUs: vectors that differ in the third
    digit from the processor's. Where `jax_default_matmul_precision` is set, that holds.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def traced(*args: Any, **options: Any) -> Any:
            with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest"):
                return function(*args, **options)

        return traced if dtype == "float32" else function

    return decorate


def keep_compiled(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Keeps what is compiled from now on in a folder, and looks there before anything is compiled.

    What JAX's own variables say holds: `JAX_ENABLE_COMPILATION_CACHE=false` switches the cache off,
    `JAX_COMPILATION_CACHE_DIR` is the folder where none is given, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` the
    least time that makes a program worth keeping; without it all are kept, for JAX's own second would leave out nearly
    every shape of an encoder. JAX warns of an entry that it cannot read, and compiles.

    Args:
      folder: made if need be; None is `ctx_jax/compiled` in `XDG_CACHE_HOME`, or in `~/.cache`.

    Returns:
      The folder; None where the cache is switched off, or the folder cannot be written, which is logged.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    before = jax.config.jax_compilation_cache_dir
    if folder is None and before:
        return before  # JAX makes it; it may be a bucket
    path = pathlib.Path(folder or _default()).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else "not allowed"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        log.warning("%s: cannot be written (%s), nothing compiled is kept", path, reason)
        return None
    if before != str(path):
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # else JAX stays with the folder that it began with
    return str(path)


def _default() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ctx_jax" / "compiled"
