"""Peak rates of devices: published for those people rent, measured for the processor at hand."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Peak(NamedTuple):
    """Dense matrix products of one device.

    Attributes:
      bfloat16_flops_per_s: operands bfloat16, sums float32.
      float32_flops_per_s: what a float32 training run can use: on NVIDIA's tensor cores TF32 is another type, so this
        is the plain float32 rate there; TPUs multiply in bfloat16 by default, and have no other.
      source: where the figures come from.
    """

    bfloat16_flops_per_s: float
    float32_flops_per_s: float
    source: str

    def flops_per_s(self, dtype: str) -> float:
        """Peak for operands of a type."""
        return self.bfloat16_flops_per_s if dtype == "bfloat16" else self.float32_flops_per_s


_TPU = "cloud.google.com/tpu/docs, system architecture"
PUBLISHED: dict[str, Peak] = {
    "TPU v4": Peak(275e12, 275e12, _TPU),
    "TPU v5 lite": Peak(197e12, 197e12, _TPU),
    "TPU v5": Peak(459e12, 459e12, _TPU),
    "TPU v6 lite": Peak(918e12, 918e12, _TPU),
    "A100": Peak(312e12, 19.5e12, "NVIDIA A100 data sheet"),
    "H100": Peak(989e12, 67e12, "NVIDIA H100 data sheet, SXM"),
    "H200": Peak(989e12, 67e12, "NVIDIA H200 data sheet, SXM"),
    "L4": Peak(121e12, 30.3e12, "NVIDIA L4 data sheet"),
}
"""By `jax.Device.device_kind`, or a part of it; the longest name that fits counts. Dense, without sparsity."""


def device_peak(device: jax.Device | None = None) -> Peak | None:
    """The device's peak; for a processor measured here, once; None for a device that is not in the table."""
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return measured_cpu_peak()
    fitting = [name for name in PUBLISHED if name.lower() in device.device_kind.lower()]
    return PUBLISHED[max(fitting, key=len)] if fitting else None


@functools.cache
def measured_cpu_peak(size: int = 1536, seconds: float = 0.4) -> Peak:
    """Best rate of square products over a few tenths of a second a type, all cores at work.

    With `--xla_force_host_platform_device_count` each of the devices is the whole processor; the peak is that of all of
    them together.
    """
    return Peak(
        _fastest_product(jnp.bfloat16, size, seconds),
        _fastest_product(jnp.float32, size, seconds),
        f"measured here, {size} × {size} products",
    )


def _fastest_product(dtype: jnp.dtype, size: int, seconds: float) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jax.lax.dot_general(a, a, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
