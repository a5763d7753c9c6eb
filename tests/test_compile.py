"""`ctx-jax compile`: what it says of a step on chips that nobody here has."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest

from ctx_jax import cli
from ctx_jax.cli.compile import report, table
from ctx_jax.errors import InputError
from ctx_jax.experiment import topology
from ctx_jax.experiment.gpus import GPUS, read_topology, target_text
from ctx_jax.experiment.topology import GpuStep, Memory, Step
from ctx_jax.flops.devices import CHIPS, PUBLISHED, named_peak
from ctx_jax.hlo.estimate import Collective, Estimate, Kernel
from ctx_jax.hlo.traffic import GpuCollective, GpuKernel, Traffic

CONFIG = """
from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Experiment
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM

config = Experiment(
    data="none",
    model=BertConfig(vocab_size=4096, hidden_size=256, num_layers=2, num_heads=4, intermediate_size=512,
                     pooler=False, dtype="bfloat16"),
    rows=RowsConfig(length=128),
    objective=MaskedLM(),
    batch_size=64,
)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def step(**changes):
    """A step of 1.503 million cycles, a millisecond on v5e, and exchanges of another half."""
    chip = CHIPS["v5e"]
    estimate = Estimate()
    estimate.cycles.update(
        {("norms", "forward"): 500_000, ("norms", "backward"): 503_000, ("head", "forward"): 500_000}
    )
    estimate.collectives = [
        Collective("all-reduce", "norms", 50_000_000, 2, 2, False, ("f32[12500000]",)),
        Collective("all-gather", "head", 10_000_000, 2, 1, True, ("f32[2500000]",)),
    ]
    estimate.kernels = [Kernel("attention.1", "attention", 12, None)]
    fields = {
        "topology": "v5e:1x2", "chips": 2, "mesh": {"data": 2, "fsdp": 1, "tensor": 1}, "rows": 8.0, "length": 128,
        "compile_seconds": 61.0, "memory": Memory(1, 2, 3, 4, 5, 15, 16), "model_flops": 1e11, "matrix_flops": 1.2e11,
        "estimate": estimate, "chip": chip, "peak": named_peak("v5e"), "roofline_seconds": 0.0005,
    }  # fmt: skip
    return Step(**fields | changes)


@pytest.mark.parametrize("name", CHIPS)
def test_the_clock_is_that_of_the_published_peak(name):
    chip = CHIPS[name]
    assert chip.clock_hz * chip.flops_per_cycle == PUBLISHED[chip.kind].bfloat16_flops_per_s
    assert 1.4e9 < chip.clock_hz < 1.8e9


def test_times_are_cycles_and_exchanges_that_nothing_hides():
    found = step()
    assert found.compute_seconds == pytest.approx(1.503e6 / (197e12 / 131072))
    # Twice 50 MB in a ring of two: each chip sends 100 MB over 200 GB/s; the gather is hidden.
    assert found.collective_seconds(exposed=True) == pytest.approx(0.5e-3)
    assert found.collective_seconds() == pytest.approx(0.5e-3 + 5e6 / 200e9)
    assert found.share_of_peak == pytest.approx(1e11 / found.seconds / 197e12)
    assert found.tokens_per_s == pytest.approx(8 * 128 / found.seconds)
    assert json.loads(json.dumps(found.as_dict()))["estimated"]["seconds"] == found.seconds


def test_the_report_for_people():
    lines = list(report(step()))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "15 B   of 16 B: fits" in text
    assert "kernel attention.1: its schedule was not at hand" in text
    assert [line.split()[0] for line in lines if "%" in line][:2] == ["norms", "head"]
    too_much = "\n".join(report(step(memory=Memory(1, 2, 3, 4, 5, 20, 16))))
    assert "does not fit: 4 B too much" in too_much


def test_the_table_names_the_best_that_fits():
    slow = step(topology="v5e:2x2", rows=4.0)
    large = step(topology="v5e:4x4", rows=16.0, memory=Memory(1, 2, 3, 4, 5, 20, 16))
    lines = list(table([step(), slow, large]))
    assert [line.split()[-1] for line in lines[1:4]] == ["1.000", "2.000", "0.500"]
    recommended = "v5e:1x2 --mesh.data 2 --mesh.fsdp 1 --mesh.tensor 1 --rows-per-chip 8"
    assert lines[-1] == f"most tokens/s a chip, estimated: {recommended}"
    assert list(table([step(remat="dots")]))[-1].endswith("--mesh.tensor 1 --model.remat dots --rows-per-chip 8")
    assert list(table([large]))[-1] == "nothing fits"


@pytest.mark.parametrize("topology", ["v5x:2x2", "v5e", "v5e:4", "v4:2x2x1", "", "b200:8", "h100", "h100:0", "h100:8x"])
def test_no_such_chips(config, capsys, topology):
    assert cli.main(["compile", str(config), "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert "expected v5e or v5p or v6e and chips" in error
    assert "h100 or h200 or a100 and GPUs" in error


@pytest.mark.parametrize(("topology", "better"), [("h100:16", "h100:2x8"), ("a100:3x12", "a100:5x8")])
def test_more_gpus_than_a_host_holds(config, capsys, topology, better):
    assert cli.main(["compile", str(config), "--topology", topology]) == 2
    assert f"expected at most 8: HOSTSxGPUS, such as {better}" in capsys.readouterr().err


def test_gpus_of_one_host_or_of_several():
    assert read_topology("h100:8") == (GPUS["h100"], 1, 8)
    assert read_topology("h200:4x8") == (GPUS["h200"], 4, 8)
    assert read_topology("v5e:4x8") is None


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_described_as_its_data_sheet_has_it(name, monkeypatch):
    gpu, peak = GPUS[name], named_peak(GPUS[name].kind)
    assert gpu.memory_bytes == pytest.approx(peak.memory_bytes, rel=0.08)
    assert gpu.memory_bytes_per_s == pytest.approx(peak.bytes_per_s, rel=0.002)
    text = target_text(gpu)
    assert text.count("{") == text.count("}") == 3
    assert f"core_count: {gpu.cores}\n" in text
    assert f"device_memory_size: {gpu.memory_bytes}\n" in text
    assert ("ACCELERATED" in text) == (name != "a100")
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert gpu.usable_bytes == int(0.9 * gpu.memory_bytes)


def gpu_step(**changes):
    """A step of a millisecond, and an exchange of a half within a host or of another time between two."""
    found = Traffic(
        kernels=[GpuKernel("f", "head", "forward", 2, 10**6, 10**9, 0.5e-3, None, ("f32[8]",))],
        collectives=[GpuCollective("all-reduce", "head", 225_000_000, 2, 1, True, ("f32[8]",), **changes)],
    )
    fields = vars(step(topology="h100:2", estimate=found, chip=GPUS["h100"], peak=named_peak("H100")))
    return GpuStep(**fields)


def test_times_on_gpus():
    # In a ring of two each GPU sends 225 MB over 450 GB/s.
    found = gpu_step(host_devices=2, beside_seconds=0.2e-3)
    assert found.compute_seconds == pytest.approx(1e-3)
    assert found.collective_seconds() == pytest.approx(0.5e-3)
    assert found.seconds == pytest.approx(1.3e-3)
    between = gpu_step(host_devices=1, beside_seconds=1.0)
    assert between.collective_seconds() == pytest.approx(4.5e-3)
    assert between.seconds == pytest.approx(1e-3)


def test_the_report_and_the_table_of_gpus():
    found = gpu_step(host_devices=2)
    lines = list(report(found))
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if "%" in line][:2] == ["head", "exchanges,"]
    assert any("the GPU compiler gives no cycles" in line for line in lines)
    assert list(table([found, step()]))[-2].startswith("of GPUs: the least time")
    assert json.loads(json.dumps(found.as_dict()))["estimated"]["by_part"]["head"]["bytes"] == 2_000_000


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="a plugin is installed")
def test_without_the_gpu_compiler_it_says_what_to_install(config, capsys):
    assert cli.main(["compile", str(config), "--topology", "h100:8"]) == 2
    assert "pip install ctx_jax[cuda]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_for_gpus(config):
    pytest.importorskip("jax_plugins.xla_cuda13")
    words = ["compile", str(config), "--topology", "h100:1", "h100:8", "--json"]
    done = run_command(["-m", "ctx_jax.cli", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    one, eight = (json.loads(line) for line in done.stdout.splitlines())
    assert (one["chips"], eight["chips"]) == (1, 8)
    for found in (one, eight):
        assert found["memory"]["fits"]
        assert found["memory"]["optimizer"] >= 2 * found["memory"]["parameters"]
        assert {"norms", "feed-forward", "projections", "head"} <= found["estimated"]["by_part"].keys()
        if not any(kernel["opaque"] for kernel in found["estimated"]["kernels"]):
            assert found["estimated"]["kernel_flops"] == pytest.approx(found["matrix_flops"], rel=1e-3)
        assert found["estimated"]["seconds"] >= found["estimated"]["roofline_seconds"]
    assert one["collectives"] == []
    # Every gradient goes once over the links, and the token table's twice: of the look-up, and of the tied head.
    reduced = sum(each["bytes"] * each["times"] for each in eight["collectives"] if each["kind"] == "all-reduce")
    assert reduced == pytest.approx(eight["memory"]["parameters"] + 4 * 4096 * 256, abs=1000)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_it_says_what_to_install(config, capsys):
    assert cli.main(["compile", str(config), "--topology", "v5e:2x2"]) == 2
    assert "pip install ctx_jax[tpu]" in capsys.readouterr().err


def run_command(arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_step_for_a_slice(config, mesh):
    pytest.importorskip("libtpu")
    sizes = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    done = run_command(["-m", "ctx_jax.cli", "compile", str(config), "--topology", "v5e:2x4", "--json", *sizes])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["chips"] == 8
    assert found["memory"]["fits"]
    parts = found["estimated"]["cycles_by_part"]
    assert {"attention", "norms", "feed-forward", "projections", "head"} <= parts.keys()
    assert all(kernel["cycles"] for kernel in found["estimated"]["kernels"])
    assert {kernel["part"] for kernel in found["estimated"]["kernels"]} == {"attention", "norms"}
    assert 0 < found["estimated"]["share_of_peak"] < 1
    if mesh == {"data": 8}:
        # Every gradient goes once over the links, and the token table's twice: of the look-up, and of the tied head.
        reduced = sum(each["bytes"] * each["times"] for each in found["collectives"] if each["kind"] == "all-reduce")
        assert reduced == pytest.approx(found["memory"]["parameters"] + 4 * 4096 * 256, abs=1000)
    # Nothing as large as a chip's logits is gathered.
    gathered = [each["bytes"] for each in found["collectives"] if each["kind"] == "all-gather"]
    assert max(gathered, default=0) < 4 * 4096 * 64 * 20 // 8


TRIED = set(itertools.product((1, 2), ("none", "dots", "all"), (32, 64)))
"""What a sweep tries on two chips with 64 rows in all: tensor, remat, rows a chip."""


@pytest.fixture
def compiler(monkeypatch):
    """Instead of the TPU's: twice the rows do not fit with `tensor` 1, and what is computed again takes time."""
    tried = []

    def compile_for(experiment, topology, *, encode):
        mesh, remat, rows = experiment.mesh, experiment.model.remat, experiment.batch_size / 2
        tried.append((mesh.tensor, remat, rows))
        if rows * experiment.rows.length > limit[0] * mesh.tensor:
            raise InputError(f"{topology}: does not fit")
        estimate = Estimate()
        estimate.cycles[("head", "forward")] = int(rows * {"none": 10_000, "dots": 12_000, "all": 14_000}[remat])
        axes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor")}
        return step(topology=topology, mesh=axes, remat=remat, rows=rows, estimate=estimate)

    limit = [32 * 128]
    monkeypatch.setattr(topology, "compile_for", compile_for)
    monkeypatch.setattr(topology, "topology_devices", lambda name: (list(range(2)), None))
    return tried, limit


def test_a_sweep_tries_them_all_and_goes_on_past_what_cannot_be(config, compiler, capsys):
    """On two chips: one or two parts of every product, three policies, one batch and two."""
    tried, limit = compiler
    words = ["compile", str(config), "--topology", "v5e:1x2", "--sweep"]
    assert cli.main(words) == 0
    assert sorted(tried) == sorted(TRIED)
    out, err = capsys.readouterr()
    assert err.count("does not fit") == 3
    assert len(out.splitlines()) == 1 + 9 + 1
    # As fast a row everywhere, so the first of the fastest.
    best = "v5e:1x2 --mesh.data 2 --mesh.fsdp 1 --mesh.tensor 1 --model.remat none --rows-per-chip 32"
    assert out.splitlines()[-1] == f"most tokens/s a chip, estimated: {best}"
    assert cli.main([*words, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(each["mesh"]["tensor"], each["remat"], each["rows_per_chip"]) for each in found} == {
        (tensor, remat, rows) for tensor, remat, rows in TRIED if rows == 32 or tensor == 2
    }
    limit[0] = 0
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("does not fit") == 12
    assert "sweep: nothing that was tried fits" in err


@pytest.mark.slow
def test_a_sweep_on_one_chip(config):
    pytest.importorskip("libtpu")
    words = ["compile", str(config), "--topology", "v5e:1x1", "--model.num-layers", "1", "--sweep", "--json"]
    done = run_command(["-m", "ctx_jax.cli", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    tried = {(each["remat"], each["rows_per_chip"]) for each in found}
    assert tried == set(itertools.product(("none", "dots", "all"), (64, 128)))
    assert all(each["memory"]["fits"] for each in found)


@pytest.mark.slow
def test_a_mesh_that_the_torus_cannot_be_cut_into(config):
    pytest.importorskip("libtpu")
    sizes = ["--mesh.fsdp", "16", "--rows-per-chip", "8"]
    done = run_command(["-m", "ctx_jax.cli", "compile", str(config), "--topology", "v6e:8x8", *sizes])
    assert done.returncode == 2
    assert "mesh data=4 fsdp=16 tensor=1: expected products of the sides of the chips' torus" in done.stderr


@pytest.mark.slow
def test_a_forward_pass(config):
    pytest.importorskip("libtpu")
    done = run_command(["-m", "ctx_jax.cli", "compile", str(config), "--topology", "v5e:2x4", "--encode", "--json"])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["memory"]["optimizer"] == 0
    assert found["collectives"] == []
    parts = found["estimated"]["cycles_by_part"]
    assert parts["feed-forward"]["forward"] > 0
    assert not any(part["backward"] for part in parts.values())


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_helps(config):
    pytest.importorskip("libtpu")
    done = run_command(
        ["-m", "ctx_jax.cli", "compile", str(config), "--topology", "v5e:2x2", "--rows-per-chip", "32768"]
    )
    assert done.returncode == 2
    assert "the step does not fit: it needs" in done.stderr
    assert "--model.remat all" in done.stderr
