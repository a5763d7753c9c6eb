"""Peaks by name, the roofline by hand, and the processor at hand."""

import contextlib
import statistics
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctx_jax.flops import devices
from ctx_jax.flops.devices import (
    PUBLISHED,
    Peak,
    device_peak,
    measured_cpu_peak,
    measured_peak,
    named_peak,
    roofline,
)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5", "TPU v5"),
        ("TPU v6 lite", "TPU v6 lite"),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA A1000", None),
    ],
)
def test_the_longest_name_that_fits_counts(kind, name):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert device_peak(device) is (PUBLISHED[name] if name else None)


def test_published_figures_are_of_the_right_order():
    for name, peak in PUBLISHED.items():
        assert 1e14 < peak.bfloat16_flops_per_s < 3e15, name
        assert peak.float32_flops_per_s <= peak.bfloat16_flops_per_s, name
        # FLOP a byte at which products and memory take equally long: 78 to 1,300 on every machine people rent.
        assert 100 < peak.bfloat16_flops_per_s / peak.bytes_per_s < 600, name
        assert 16e9 <= peak.memory_bytes <= 200e9, name
        assert peak.source


def median_seconds(function, calls=9):
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@pytest.mark.alone
def test_the_processor_is_measured():
    peak = device_peak(jax.devices("cpu")[0])
    assert peak is measured_cpu_peak() is measured_peak() is named_peak("cpu")
    assert peak.source == "measured here: 1536 × 1536 products, 128 MiB read and written"
    a = np.ones((512, 512), np.float32)
    rate = 2 * 512**3 / median_seconds(lambda: a @ a)
    # NumPy's rate in the same minute, within what a busy machine does to either.
    assert rate / 30 < peak.float32_flops_per_s < rate * 30
    # Into memory that is there already; into new memory it is less than a third of that.
    source, target = np.ones((2, 1 << 25), np.float32)
    rate = 2 * source.nbytes / median_seconds(lambda: np.copyto(target, source))
    assert rate / 2 < peak.bytes_per_s < 1e12
    assert peak.memory_bytes > 1e9


def test_another_device_is_measured_its_own_way(monkeypatch):
    """With what stands for a GPU: bfloat16 results of bfloat16 products, several calls in flight, its name and tile."""
    seen = []

    def note(function, argument, in_flight, seconds, in_place=False):
        assert in_place == (argument.ndim == 1)
        seen.append((argument, jax.eval_shape(function, argument), str(jax.make_jaxpr(function)(argument)), in_flight))
        return 0.5

    card = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: None)
    monkeypatch.setattr(devices, "_ACCELERATOR", devices._Probe(64, 1 << 18, 8, jnp.bfloat16))
    monkeypatch.setattr(devices, "_shortest", note)
    monkeypatch.setattr(jax, "default_device", lambda device: contextlib.nullcontext())
    peak = devices._measured_peak.__wrapped__(card, 1.0)
    assert peak == Peak(
        2 * 2 * 64**3, 2 * 2 * 64**3, 2 * 2 * (1 << 20), PUBLISHED["H100"].memory_bytes, PUBLISHED["H100"].tile,
        "measured on NVIDIA H100 80GB HBM3: 64 × 64 products, 1 MiB read and written",
    )  # fmt: skip
    for (argument, result, jaxpr, in_flight), dtype in zip(seen, ("bfloat16", "float32", "float32"), strict=True):
        assert argument.dtype == result.dtype == dtype
        assert in_flight == 8
        assert np.std(np.asarray(argument, np.float32)) == pytest.approx(1, abs=0.05), "random values"
        assert ("HIGHEST" in jaxpr) == (dtype == "float32" and argument.ndim == 2)
    assert devices._memory_bytes(card) == 0


@pytest.mark.parametrize(
    ("flops", "moved", "bound", "seconds"), [(6e9, 1e6, "compute", 6e-3), (6e6, 1e9, "memory", 1e-1)]
)
def test_roofline(flops, moved, bound, seconds):
    peak = Peak(2e12, 1e12, 1e10, 1e10, 16, "invented")
    best = roofline(flops, moved, peak, "float32")
    assert best.bound == bound
    assert best.seconds == pytest.approx(seconds)
    assert best.flops_per_byte == flops / moved
    assert best.share_of_peak(2 * best.compute_seconds) == pytest.approx(0.5)
    assert roofline(flops, moved, peak, "bfloat16").compute_seconds == pytest.approx(flops / 2e12)
