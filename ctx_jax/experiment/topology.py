"""A run compiled for chips that nobody here has: does it fit, what does it exchange, how long may a step take?

The real compilers run on any Linux machine: that of TPUs (libtpu, `pip install ctx_jax[tpu]`) compiles for a topology
that it is told by name, that of NVIDIA's GPUs (`pip install ctx_jax[cuda]`) for cards that `gpus` describes to it. What
they make is read by `ctx_jax.hlo`. Times are estimates: on TPUs the compiler's cycles at the clock at which its matrix
units reach the published peak; on GPUs, of which the compiler says no cycles, the roofline of every kernel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ctx_jax.compilation import options_for
from ctx_jax.errors import InputError
from ctx_jax.experiment.assembly import abstract_step
from ctx_jax.experiment.config import Experiment
from ctx_jax.experiment.cost import step_cost
from ctx_jax.experiment.gpus import GPUS, Gpu, gpu_devices, read_topology
from ctx_jax.flops.architectures import encoder_cost, encoder_function
from ctx_jax.flops.devices import CHIPS, Chip, Peak, named_peak, roofline
from ctx_jax.hlo.estimate import Estimate, by_part, estimate
from ctx_jax.hlo.kernels import clear_schedules, kernel_bundles, schedule_folder
from ctx_jax.hlo.parts import all_scopes
from ctx_jax.hlo.text import read_module
from ctx_jax.hlo.traffic import GpuCollective, Traffic, traffic
from ctx_jax.sharding import batch_sharding, bytes_per_device, make_mesh, replicated, tree_shardings
from ctx_jax.train.step import TrainState


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip during a step.

    Attributes:
      parameters: float32, as the mesh divides them.
      optimizer: moments.
      other_arguments: the batch, what it hands to the next one, tables.
      temporaries: activations, gradients and all else that the compiler laid out.
      code: the program.
      total: of all, as the compiler has it: results that take an argument's place count once.
      available: of the chip; of a GPU what JAX takes of it.
    """

    parameters: int
    optimizer: int
    other_arguments: int
    temporaries: int
    code: int
    total: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.total <= self.available


@dataclass(frozen=True)
class Step:
    """A training step on a topology, or a forward pass.

    Attributes:
      topology: name, such as `v5e:16x16` or `h100:4x8`.
      chips: how many.
      mesh: axis → size.
      rows: of a chip.
      length: of a row.
      compile_seconds: here.
      memory: of a chip.
      model_flops: matrix products of forward and backward pass, of a chip; nothing that is computed twice.
      matrix_flops: with what is computed again.
      estimate: of the compiled module.
      chip: its clock and links.
      peak: its rates.
      roofline_seconds: the least time by products and memory traffic.
      remat: what is computed again, `BertConfig.remat`; None of models that have no choice.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    rows: float
    length: int
    compile_seconds: float
    memory: Memory
    model_flops: float
    matrix_flops: float
    estimate: Estimate | Traffic
    chip: Chip | Gpu
    peak: Peak
    roofline_seconds: float
    remat: str | None = None

    @property
    def compute_seconds(self) -> float:
        """The compiler's cycles, and what it says nothing of, by its bytes."""
        silent = sum(self.estimate.unestimated.values()) / self.peak.bytes_per_s
        return self.estimate.compute_cycles / self.chip.clock_hz + silent

    def collective_seconds(self, *, exposed: bool = False) -> float:
        """Of all exchanges between chips, or of those beside which nothing else runs."""
        found = [each for each in self.estimate.collectives if not (exposed and each.overlaps)]
        return sum(each.sent_bytes for each in found) / self.chip.link_bytes_per_s

    @property
    def seconds(self) -> float:
        """Of a step: computation, and the exchanges that nothing hides."""
        return self.compute_seconds + self.collective_seconds(exposed=True)

    @property
    def share_of_peak(self) -> float:
        """Model FLOPs over what the chip could do in that time."""
        return self.model_flops / self.seconds / self.peak.bfloat16_flops_per_s

    @property
    def tokens_per_s(self) -> float:
        """Of a chip, padding counted."""
        return self.rows * self.length / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        collectives = [asdict(each) | {"sent_bytes": each.sent_bytes} for each in self.estimate.collectives]
        return {
            "topology": self.topology,
            "device_kind": self.chip.kind,
            "chips": self.chips,
            "mesh": self.mesh,
            "rows_per_chip": self.rows,
            "length": self.length,
            "remat": self.remat,
            "compile_seconds": round(self.compile_seconds, 1),
            "memory": asdict(self.memory) | {"fits": self.memory.fits},
            "model_flops": self.model_flops,
            "matrix_flops": self.matrix_flops,
            "estimated": {
                "seconds": self.seconds,
                "share_of_peak": self.share_of_peak,
                "tokens_per_s_per_chip": self.tokens_per_s,
                "compute_seconds": self.compute_seconds,
                "collective_seconds": self.collective_seconds(),
                "exposed_collective_seconds": self.collective_seconds(exposed=True),
                "roofline_seconds": self.roofline_seconds,
                **self._parts_and_kernels(),
            },
            "collectives": collectives,
        }

    def _parts_and_kernels(self) -> dict[str, Any]:
        return {
            "cycles_by_part": by_part(self.estimate),
            "kernels": [asdict(kernel) for kernel in self.estimate.kernels],
            "unestimated_bytes": {" ".join(key): size for key, size in self.estimate.unestimated.items()},
        }


@dataclass(frozen=True)
class GpuStep(Step):
    """The same on GPUs; `estimate` is a `Traffic`, `chip` a `Gpu`."""

    @property
    def compute_seconds(self) -> float:
        """The kernels' one after the other, as fast as memory and matrix units allow."""
        return self.estimate.seconds

    def collective_seconds(self, *, exposed: bool = False) -> float:
        """Of all exchanges, or what is left of each when the kernels beside it are done.

        A ring within a host goes over NVLink. One over several hosts leaves each through the network cards of all its
        GPUs there, one a GPU.
        """
        return sum(self._exchange_seconds(each, exposed) for each in self.estimate.collectives)

    def _exchange_seconds(self, each: GpuCollective, exposed: bool) -> float:
        rate = self.chip.link_bytes_per_s
        if each.host_devices < each.devices:
            one_card = each.kind in ("all-to-all", "ragged-all-to-all", "collective-permute")
            rate = min(rate, self.chip.network_bytes_per_s * (1 if one_card else each.host_devices))
        seconds = each.sent_bytes / rate
        return max(seconds - each.times * each.beside_seconds, 0.0) if exposed else seconds

    def _parts_and_kernels(self) -> dict[str, Any]:
        found = self.estimate
        return {
            "by_part": found.by_part(),
            "kernel_bytes": found.bytes,
            "kernel_flops": found.flops,
            "kernels": [asdict(kernel) for kernel in found.kernels],
        }


class DoesNotFitError(InputError):
    """The compiler refused the step: it needs more memory than a chip has."""


def topology_devices(name: str) -> tuple[Sequence[jax.Device], Chip | Gpu]:
    """The devices of a topology to compile for.

    Raises:
      InputError: the compiler is not installed, or there is no such topology.
    """
    if (cards := read_topology(name)) is not None:
        return gpu_devices(*cards), cards[0]
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        chips = f"{' or '.join(CHIPS)} and chips, such as v5e:16x16"
        gpus = f"{' or '.join(GPUS)} and GPUs of a host, or hosts and GPUs, such as h100:8 or h100:4x8"
        raise InputError(f"topology: found {name!r}, expected {chips}; or {gpus}")
    # There is no chip to ask, and none that two processes could both take.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    schedule_folder()  # libtpu reads its flags now or never
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        text = " ".join(str(error).split())
        if importlib.util.find_spec("libtpu") is None or "not installed" in text:
            raise InputError(
                "topology: libtpu is not installed, which compiles for TPUs: pip install ctx_jax[tpu]"
            ) from error
        raise InputError(f"topology: found {name!r}: {text[:200]}") from error
    return devices, CHIPS[kind]


def compile_for(
    experiment: Experiment, topology: str, *, encode: bool = False, options: dict[str, Any] | None = None
) -> Step:
    """Compiles an experiment's very training step, or its encoder's forward pass, for a topology.

    Args:
      experiment: what would be run; its batch is that of all chips.
      topology: as libtpu names it, or a kind of GPU with the number of a host, or with hosts and that number.
      encode: the forward pass instead: ids to the last layer's vectors, parameters as the mesh divides them.
      options: of the compiler.

    Raises:
      InputError: the topology or the mesh cannot be.
      DoesNotFitError: the chips' memory is too small; the message says by how much, and what would help.
    """
    devices, chip = topology_devices(topology)
    gpu = isinstance(chip, Gpu)
    schedules = None if gpu else schedule_folder()
    mesh, peak = make_mesh(experiment.mesh, devices), named_peak(chip.kind)
    jitted, args, state = (_forward if encode else _training)(experiment, mesh)
    with jax.set_mesh(mesh):
        traced = jitted.trace(*args)
        if schedules is not None:
            clear_schedules(schedules)
        begin = time.perf_counter()
        try:
            compiled = traced.lower().compile(compiler_options=options or options_for(devices[0]))
        except jax.errors.JaxRuntimeError as error:
            raise _refusal(experiment, mesh, str(error), "GPU" if gpu else "TPU") from error
        seconds = time.perf_counter() - begin
    available = chip.usable_bytes if gpu else int(peak.memory_bytes)
    memory = _memory(compiled.memory_analysis(), state, available)
    if gpu and not memory.fits:  # that of TPUs refuses by itself
        raise _too_large(experiment, mesh, f"{memory.total / 1e9:.2f} GB", f"{available / 1e9:.2f} GB")
    module, names = read_module(compiled.as_text()), set(all_scopes(traced.jaxpr))
    if gpu:
        found = traffic(module, names, peak, read_topology(topology)[2])
    else:
        found = estimate(module, names, kernel_bundles(schedules))
    if encode:
        cost = encoder_cost(experiment.model, rows=experiment.batch_size, length=experiment.rows.length)
        useful, all_of_it, moved = cost.matrix_flops, cost.matrix_flops, cost.bytes_moved
    else:
        cost = step_cost(experiment)
        useful, all_of_it, moved = 3 * cost.matrix_flops, cost.training_matrix_flops, cost.training_bytes
    return (GpuStep if gpu else Step)(
        topology=topology,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        rows=experiment.batch_size / mesh.size,
        length=experiment.rows.length,
        compile_seconds=seconds,
        memory=memory,
        model_flops=useful / mesh.size,
        matrix_flops=all_of_it / mesh.size,
        estimate=found,
        chip=chip,
        peak=peak,
        roofline_seconds=roofline(all_of_it / mesh.size, moved / mesh.size, peak, experiment.model.dtype).seconds,
        remat=getattr(experiment.model, "remat", None),
    )


def _placed(tree: Any, places: Any) -> Any:
    """Shapes of a tree with where each leaf lives, or all of them."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, tree)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, tree, places)


def _training(experiment: Experiment, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Any, ...], Any]:
    """The step as `pretrain` jits it, its arguments, and the state among them."""
    step, (state, batch, arguments) = abstract_step(experiment)
    shardings = tree_shardings(state, mesh)
    state = _placed(state, shardings)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    return jitted, (state, _placed(batch, batch_sharding(mesh)), _placed(arguments, replicated(mesh))), state


def _forward(experiment: Experiment, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Any, ...], Any]:
    """The encoder's forward pass, its arguments, and a state without an optimizer."""
    function, (shapes, ids) = encoder_function(
        experiment.model, rows=experiment.batch_size, length=experiment.rows.length
    )
    params, rows = _placed(shapes, tree_shardings(shapes, mesh)), batch_sharding(mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return jax.jit(function, out_shardings=rows), (params, _placed(ids, rows)), TrainState(step, params, ())


def _memory(analysis: Any, state: TrainState, available: int) -> Memory:
    of = lambda tree: bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
    parameters, optimizer = of(state.params), of(state.optimizer)
    arguments = analysis.argument_size_in_bytes
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        other_arguments=max(arguments - parameters - optimizer, 0),
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        total=arguments + fresh + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
        available=available,
    )


def _refusal(experiment: Experiment, mesh: Mesh, text: str, kind: str) -> Exception:
    """What the compiler of a kind of chip said, and what would help."""
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", text)
    found = found or re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    if found is None:
        return InputError(f"the {kind} compiler: {' '.join(text.split())[:400]}")
    return _too_large(experiment, mesh, found[1], found[2])


def _too_large(experiment: Experiment, mesh: Mesh, needed: str, available: str) -> DoesNotFitError:
    """What a step needs, what there is, and what would help."""
    helps = []
    if getattr(experiment.model, "remat", "all") != "all":
        helps.append("--model.remat all")
    if mesh.shape["fsdp"] == 1 and mesh.size > 1:
        helps.append("--mesh.fsdp 4")
    helps += ["--accumulate 2", "fewer rows a chip"]
    needs = f"needs {needed} of memory, a chip has {available} for it"
    return DoesNotFitError(f"the step does not fit: it {needs}; what helps: {', '.join(helps)}")


def with_rows(experiment: Experiment, rows: int, chips: int) -> Experiment:
    """The same run with so many rows a chip."""
    return replace(experiment, batch_size=rows * chips)
