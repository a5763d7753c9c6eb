"""Peak rates of devices, published for those people rent or measured on the one at hand; and the roofline."""

from __future__ import annotations

import functools
import os
import time
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ctx_jax.errors import InputError, did_you_mean


class Peak(NamedTuple):
    """What one device can do at best.

    Attributes:
      bfloat16_flops_per_s: dense matrix products with bfloat16 operands and float32 sums.
      float32_flops_per_s: what a float32 run can use. On NVIDIA's tensor cores TF32 is another type, so this is the
        plain float32 rate; TPUs multiply in bfloat16 unless told otherwise, and have no other rate.
      bytes_per_s: of its memory.
      memory_bytes: how much of it there is.
      tile: to a multiple of which a matrix unit fills up every dimension of a product.
      source: where the figures come from.
    """

    bfloat16_flops_per_s: float
    float32_flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    tile: int
    source: str

    def flops_per_s(self, dtype: str) -> float:
        """Peak for operands of a type."""
        return self.bfloat16_flops_per_s if dtype == "bfloat16" else self.float32_flops_per_s


_TPU = "Google Cloud TPU documentation, system architecture, per chip"
_SHEET = "NVIDIA data sheet, without sparsity"
PUBLISHED: dict[str, Peak] = {
    "TPU v4": Peak(275e12, 275e12, 1228e9, 32e9, 128, _TPU),
    "TPU v5 lite": Peak(197e12, 197e12, 819e9, 16e9, 128, _TPU),
    "TPU v5": Peak(459e12, 459e12, 2765e9, 95e9, 128, _TPU),
    "TPU v6 lite": Peak(918e12, 918e12, 1640e9, 32e9, 256, _TPU),
    "A10": Peak(125e12, 31.2e12, 600e9, 24e9, 64, _SHEET),
    "A100": Peak(312e12, 19.5e12, 1555e9, 40e9, 64, _SHEET),
    "A100-SXM4-80GB": Peak(312e12, 19.5e12, 2039e9, 80e9, 64, _SHEET),
    "A100 80GB PCIe": Peak(312e12, 19.5e12, 1935e9, 80e9, 64, _SHEET),
    "L4": Peak(121e12, 30.3e12, 300e9, 24e9, 64, _SHEET),
    "L40S": Peak(362e12, 91.6e12, 864e9, 48e9, 64, _SHEET),
    "H100": Peak(989e12, 67e12, 3350e9, 80e9, 64, f"{_SHEET}, SXM"),
    "H100 PCIe": Peak(756e12, 51e12, 2000e9, 80e9, 64, _SHEET),
    "H200": Peak(989e12, 67e12, 4800e9, 141e9, 64, f"{_SHEET}, SXM"),
}
"""By `jax.Device.device_kind`, or a part of it; the longest name that fits counts. Products dense, without sparsity.

Devices without bfloat16 (T4, V100) are left out, and so are chips that JAX shows as two devices.
"""

_ALIASES = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


class Chip(NamedTuple):
    """What estimates need to know of a TPU beside its peak.

    Attributes:
      name: as people say it.
      kind: `jax.Device.device_kind`.
      flops_per_cycle: of all its matrix units: two for each of their multipliers.
      link_bytes_per_s: over all links to other chips, published.
    """

    name: str
    kind: str
    flops_per_cycle: int
    link_bytes_per_s: float

    @property
    def clock_hz(self) -> float:
        """The clock at which the matrix units reach the published peak."""
        return PUBLISHED[self.kind].bfloat16_flops_per_s / self.flops_per_cycle


CHIPS = {
    "v5e": Chip("v5e", "TPU v5 lite", 2 * 4 * 128 * 128, 1600e9 / 8),
    "v5p": Chip("v5p", "TPU v5", 2 * 8 * 128 * 128, 4800e9 / 8),
    "v6e": Chip("v6e", "TPU v6 lite", 2 * 4 * 256 * 256, 3584e9 / 8),
}
"""By the name of a topology. Matrix units and links from the Cloud TPU documentation, system architecture; v4 is left
out, for the compiler's cycles there are those of one of a chip's two cores.
"""


def device_peak(device: jax.Device | None = None) -> Peak | None:
    """The device's peak; for a processor measured here, once; None for a device that is not in the table."""
    device = device or jax.devices()[0]
    return measured_peak(device) if device.platform == "cpu" else _longest(device.device_kind)


def named_peak(name: str) -> Peak:
    """The peak of a device by the name that people use: `H200`, `A100`, `v5e`, or `cpu` for the one at hand.

    Raises:
      InputError: nobody has published it here.
    """
    if name.lower() == "cpu":
        return measured_cpu_peak()
    peak = _longest(_ALIASES.get(name.lower(), name))
    if peak is None:
        names = ["cpu", *_ALIASES, *PUBLISHED]
        raise InputError(f"device: found {name!r}{did_you_mean(name, names)}, expected one of {', '.join(names)}")
    return peak


def _longest(kind: str) -> Peak | None:
    # Word by word: L4 is no part of L40S.
    words = f" {kind.lower().replace('-', ' ')} "
    fitting = [name for name in PUBLISHED if f" {name.lower().replace('-', ' ')} " in words]
    return PUBLISHED[max(fitting, key=len)] if fitting else None


class Roofline(NamedTuple):
    """The least time that a device needs (Williams et al. 2009).

    Attributes:
      seconds: the larger of the two times below: products and memory traffic overlap at best.
      compute_seconds: FLOPs over peak.
      memory_seconds: bytes over bandwidth.
      flops_per_byte: what the work has; the device's own ratio is where the two times meet.
      bound: which of the two it is.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    flops_per_byte: float
    bound: Literal["compute", "memory"]

    def share_of_peak(self, seconds: float) -> float:
        """Of a run that took so long: the device's peak that its products used."""
        return self.compute_seconds / seconds


def roofline(matrix_flops: float, bytes_moved: float, peak: Peak, dtype: str) -> Roofline:
    """Time at best for so much work on one device."""
    compute, memory = matrix_flops / peak.flops_per_s(dtype), bytes_moved / peak.bytes_per_s
    bound = "compute" if compute >= memory else "memory"
    return Roofline(max(compute, memory), compute, memory, matrix_flops / max(bytes_moved, 1), bound)


def measured_peak(device: jax.Device | None = None, seconds: float = 0.4) -> Peak:
    """Best rate of square products, and of memory read and written in place, as long each, once for a device.

    Values are random: GPUs draw less power on zeros and ones, and run faster.

    A processor takes products of 1,536 rows and columns with float32 results, all cores at work. With
    `--xla_force_host_platform_device_count` each of the devices is the whole processor; the peak is that of all of them
    together. Other devices take 8,192, results in the type of the operands, float32 in full precision, many products
    waiting for the device while it computes one.

    Args:
      device: None is the first of those that JAX runs on.
      seconds: of each of the three, at least.
    """
    return _measured_peak(device or jax.devices()[0], seconds)


def measured_cpu_peak(seconds: float = 0.4) -> Peak:
    """The processor's, whatever else JAX runs on."""
    return measured_peak(jax.devices("cpu")[0], seconds)


class _Probe(NamedTuple):
    """What a kind of device is measured with.

    Attributes:
      size: rows and columns of the operands of a product.
      copied: float32 values that are read and written.
      in_flight: calls that are waited for together.
      out: type of a bfloat16 product's result.
    """

    size: int
    copied: int
    in_flight: int
    out: jnp.dtype


_PROCESSOR = _Probe(1536, 1 << 25, 1, jnp.float32)
_ACCELERATOR = _Probe(8192, 1 << 28, 8, jnp.bfloat16)


@functools.cache
def _measured_peak(device: jax.Device, seconds: float) -> Peak:
    cpu = device.platform == "cpu"
    probe, known = _PROCESSOR if cpu else _ACCELERATOR, _longest(device.device_kind)
    where = "here" if cpu else f"on {device.device_kind}"
    with jax.default_device(device):
        return Peak(
            _fastest_product(jnp.bfloat16, probe, seconds),
            _fastest_product(jnp.float32, probe, seconds),
            _fastest_negation(probe, seconds),
            _memory_bytes(device) if known is None else known.memory_bytes,
            16 if cpu else 64 if known is None else known.tile,
            f"measured {where}: {probe.size} × {probe.size} products, {probe.copied >> 18} MiB read and written",
        )


def _fastest_product(dtype: jnp.dtype, probe: _Probe, seconds: float) -> float:
    wide = dtype == jnp.float32

    @jax.jit
    def product(a: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
        out = jnp.float32 if wide else probe.out
        return jax.lax.dot_general(a, a, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=out)

    return 2 * probe.size**3 / _shortest(product, _normal((probe.size, probe.size), dtype), probe.in_flight, seconds)


def _fastest_negation(probe: _Probe, seconds: float) -> float:
    # A MiB of random values, again and again: to draw them all takes a processor seconds.
    values = jnp.tile(_normal((1 << 18,), jnp.float32), probe.copied >> 18)
    # In place: new memory has to be had from the system first, which takes a processor longer than to write it.
    negative = jax.jit(jnp.negative, donate_argnums=0)
    return 2 * 4 * probe.copied / _shortest(negative, values, probe.in_flight, seconds, in_place=True)


def _normal(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Made on the device, in one program, so that no more than the result is ever in its memory."""
    # The key is an argument: of a constant the compiler might compute the values itself.
    return jax.jit(lambda key: jax.random.normal(key, shape, dtype))(jax.random.key(0))


def _shortest(
    function: jax.stages.Wrapped, argument: jax.Array, in_flight: int, seconds: float, *, in_place: bool = False
) -> float:
    """Seconds of a call: the best of several rounds, each of so many calls; `in_place`, each takes the last result."""
    result = function(argument).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(in_flight):
            # What is let go is free again as soon as the device has written it.
            result = function(result if in_place else argument)
        result.block_until_ready()
        best = min(best, (time.perf_counter() - start) / in_flight)
    return best


def _memory_bytes(device: jax.Device) -> float:
    """All of a processor's; of another device what JAX may take, 0 where it does not say."""
    if device.platform == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float((device.memory_stats() or {}).get("bytes_limit", 0))
