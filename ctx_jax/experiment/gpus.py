"""GPUs to compile for that nobody here has: what JAX's CUDA plugin must be told of them.

The plugin (`pip install ctx_jax[cuda]`) compiles on any Linux machine for a card that is described to it. It times no
kernels there as it does on a card, so the kernels that it takes are its defaults.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from ctx_jax.errors import InputError

PLUGINS = ("xla_cuda13", "xla_cuda12")
"""Modules of `jax_plugins`, one of which compiles."""
GPUS_A_HOST = 8
"""The most that NVLink joins on the boards of these cards."""


class Gpu(NamedTuple):
    """A card, as the compiler and the estimates need it.

    Attributes:
      name: as people say it.
      kind: by which `ctx_jax.flops.devices.named_peak` has its rates.
      description: what the driver calls it.
      capability: its compute capability, major and minor.
      accelerated: whether code may use what only this capability has, `sm_90a`.
      cores: streaming multiprocessors.
      lanes: float32 units of a core.
      clock_ghz: the highest.
      memory_bytes: of the card, as the driver has it.
      memory_bytes_per_s: published.
      l2_bytes: of its cache.
      shared_bytes_a_core: shared memory.
      shared_bytes_a_block: of it, what a block may ask for.
      link_bytes_per_s: NVLink, all links, one direction: half of what is published.
      network_bytes_per_s: of a card to other hosts, one direction, as in NVIDIA's own DGX machines.
    """

    name: str
    kind: str
    description: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    lanes: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_s: float
    l2_bytes: int
    shared_bytes_a_core: int
    shared_bytes_a_block: int
    link_bytes_per_s: float
    network_bytes_per_s: float

    @property
    def usable_bytes(self) -> int:
        """Of its memory, what JAX takes: three quarters, unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""
        share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        return int(self.memory_bytes * float(share or 0.75))


_HOPPER = ((9, 0), True, 132, 128, 1.98)
_HOPPER_MEMORY = (50 * 2**20, 233472, 232448, 900e9 / 2, 400e9 / 8)
GPUS = {
    "h100": Gpu("h100", "H100", "NVIDIA H100 80GB HBM3", *_HOPPER, 84942979072, 3352.32e9, *_HOPPER_MEMORY),
    "h200": Gpu("h200", "H200", "NVIDIA H200", *_HOPPER, 151397597184, 4800e9, *_HOPPER_MEMORY),
    "a100": Gpu(
        *("a100", "A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 1.41),
        *(85100068864, 2039.04e9, 40 * 2**20, 167936, 166912, 600e9 / 2, 200e9 / 8),
    ),
}
"""By the name of a topology; the SXM cards. Sizes as XLA's own descriptions have them (openxla/xla,
xla/backends/gpu/target_config/specs), links from NVIDIA's data sheets of the cards and of DGX.
"""


def target_text(gpu: Gpu) -> str:
    """A card's description as the compiler reads it, XLA's `GpuTargetConfigProto` as text."""
    major, minor = gpu.capability
    features = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return f"""
gpu_device_info {{
  name: "{gpu.description}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{"a" if gpu.accelerated else ""}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  memory_bandwidth: {gpu.memory_bytes_per_s:.0f}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {gpu.shared_bytes_a_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes_a_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.description}"
"""


def read_topology(name: str) -> tuple[Gpu, int, int] | None:
    """The card, hosts, and cards of a host of `h100:8` (one host) or `h100:4x8` (four hosts of eight); None where it is
    neither.

    Raises:
      InputError: more cards on a host than NVLink joins.
    """
    found = re.fullmatch(rf"({'|'.join(GPUS)}):(?:([1-9]\d*)x)?([1-9]\d*)", name)
    if found is None:
        return None
    hosts, cards = int(found[2] or 1), int(found[3])
    if cards > GPUS_A_HOST:
        raise InputError(
            f"topology: found {name!r}: {cards} GPUs on a host, expected at most {GPUS_A_HOST}: "
            f"HOSTSxGPUS, such as {found[1]}:{-(-hosts * cards // GPUS_A_HOST)}x{GPUS_A_HOST}"
        )
    return GPUS[found[1]], hosts, cards


def gpu_devices(gpu: Gpu, hosts: int, cards: int) -> Sequence[jax.Device]:
    """Devices to compile for.

    Args:
      gpu: of which kind.
      hosts: machines.
      cards: of a machine.

    Raises:
      InputError: the plugin is not installed, or cannot.
    """
    install = "topology: JAX's CUDA plugin is not installed, which compiles for GPUs: pip install ctx_jax[cuda]"
    if importlib.util.find_spec("jax_plugins") is None or not any(
        importlib.util.find_spec(f"jax_plugins.{plugin}") for plugin in PLUGINS
    ):
        raise InputError(install)
    # It asks for the driver and CUDA's libraries, of which compiling needs none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x{hosts}x{cards}", target_config=target_text(gpu)
        ).devices
    except Exception as error:
        raise InputError(f"topology: found {gpu.name}:{hosts}x{cards}: {' '.join(str(error).split())[:200]}") from error
