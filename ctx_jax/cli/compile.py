"""`ctx-jax compile`: a config's training step for TPUs and GPUs that nobody here has."""

import itertools
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from ctx_jax.cli.config_file import load_config
from ctx_jax.cli.parsing import parse
from ctx_jax.errors import InputError

if TYPE_CHECKING:
    from ctx_jax.experiment.topology import GpuStep, Step

REMATS = ("none", "dots", "all")


def compile_(argv: Sequence[str]) -> int:
    """compile: the fields that may be overridden are those of the config file, so that is read first."""
    from ctx_jax.experiment import Experiment
    from ctx_jax.models.bert import BertConfig

    config = next((word for word in argv if word.endswith(".py")), None)
    default = Experiment(data="DATA", model=BertConfig()) if config is None else load_config(pathlib.Path(config))

    @dataclass(frozen=True)
    class Compile:
        """Compiles the very training step of a config for TPUs or GPUs, on this machine, with their real compilers.

        Says per chip whether it fits, what it exchanges with others, and part by part how long it takes: TPUs by what
        their compiler thinks, GPUs by the least time that each kernel's memory traffic and products need. Times are
        estimates. Several topologies make a table beside each other. Every field of the config can be overridden:
        `--mesh.fsdp 4`, `--model.remat dots`. Needs `pip install ctx_jax[tpu]`, for GPUs `pip install ctx_jax[cuda]`.
        """

        config: Annotated[Positional[pathlib.Path], arg(metavar="CONFIG")]
        """A Python file that defines `config`, an Experiment."""
        topology: tuple[str, ...] = ("v5e:16x16",)
        """Chips to compile for: kind and shape, such as v5e:16x16, v5p:4x4x4, v6e:8x8; or GPUs of a host, or hosts and
        GPUs of each, such as h100:8, h200:8, a100:8, h100:4x8."""
        rows_per_chip: int | None = None
        """Rows of a chip; the config's batch over all chips where it is not given."""
        encode: bool = False
        """The encoder's forward pass instead of the training step."""
        sweep: bool = False
        """Also try other meshes, remat policies and twice the rows, and say which is best."""
        json: bool = False
        """One JSON line a topology instead of tables."""
        experiment: Annotated[Experiment, arg(name="")] = field(default_factory=lambda: default)

    command = parse(Compile, "compile", argv, tyro.conf.AvoidSubcommands)
    if not command.topology:
        raise InputError("topology: found none, expected at least one, such as v5e:16x16")
    steps = list(_steps(command))
    if not steps:
        raise InputError("sweep: nothing that was tried fits; expected fewer rows a chip, or more chips")
    if command.json:
        print("\n".join(json.dumps(step.as_dict()) for step in steps))
    elif len(steps) == 1:
        print("\n".join(report(steps[0])))
    else:
        print("\n".join(table(steps)))
    return 0 if all(step.memory.fits for step in steps) else 1


def _steps(command: object) -> "Iterator[Step]":
    from tqdm import tqdm

    from ctx_jax.experiment.topology import compile_for, topology_devices, with_rows

    work = []
    for topology in command.topology:
        chips = len(topology_devices(topology)[0])
        experiment = command.experiment
        if command.rows_per_chip is not None:
            experiment = with_rows(experiment, command.rows_per_chip, chips)
        variants = _variants(experiment, chips) if command.sweep else [experiment]
        work += [(topology, variant) for variant in variants]
    bar = tqdm(work, desc="compiling", unit="program", disable=len(work) == 1 or command.json)
    for topology, experiment in bar:
        try:
            yield compile_for(experiment, topology, encode=command.encode)
        except InputError as error:  # does not fit, or cannot be cut so
            if not command.sweep:
                raise
            bar.write(f"{_label(experiment)}: {error}", file=sys.stderr)  # by default it writes among the results


def _variants(experiment: object, chips: int) -> Iterator[object]:
    """Meshes, remat policies and batches to try."""
    remats = REMATS if hasattr(experiment.model, "remat") else (None,)
    for fsdp in [size for size in (1, 4, 16) if chips % size == 0]:
        for tensor in [size for size in (1, 2) if chips % (fsdp * size) == 0]:
            mesh = replace(experiment.mesh, data=chips // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
            for remat, times in itertools.product(remats, (1, 2)):
                model = experiment.model if remat is None else replace(experiment.model, remat=remat)
                yield replace(experiment, mesh=mesh, model=model, batch_size=times * experiment.batch_size)


def _label(experiment: object) -> str:
    mesh, remat = experiment.mesh, getattr(experiment.model, "remat", "-")
    return f"data={mesh.data},fsdp={mesh.fsdp},tensor={mesh.tensor} remat={remat} batch={experiment.batch_size}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError


def report(step: "Step") -> Iterator[str]:
    """One step for people, at most 100 columns."""
    from ctx_jax.experiment.topology import GpuStep

    mesh = ", ".join(f"{axis}={size}" for axis, size in step.mesh.items())
    yield f"{step.topology}: {step.chips} × {step.chip.kind}, mesh {mesh}; {step.rows:g} rows of {step.length} a chip"
    yield f"compiled in {step.compile_seconds:.0f} s"
    memory = step.memory
    yield ""
    yield "memory of a chip"
    for name in ("parameters", "optimizer", "other_arguments", "temporaries", "code"):
        yield f"  {name.replace('_', ' '):<24}{_bytes(getattr(memory, name)):>12}"
    fits = "fits" if memory.fits else f"does not fit: {_bytes(memory.total - memory.available)} too much"
    yield f"  {'in all':<24}{_bytes(memory.total):>12}   of {_bytes(memory.available)}: {fits}"
    yield ""
    yield from _gpu_time(step) if isinstance(step, GpuStep) else _tpu_time(step)
    yield ""
    yield "exchanges between chips      of part             a step      sent   chips  times  overlaps"
    for each in sorted(step.estimate.collectives, key=lambda each: -each.sent_bytes)[:12]:
        size = each.bytes * each.times
        yield (
            f"  {each.kind:<27}{each.part:<16}{_bytes(size):>10}{_bytes(each.sent_bytes):>10}"
            f"{each.devices:>8}{each.times:>7}  {'yes' if each.overlaps else 'no'}"
        )
    yield f"  {'in all':<27}{'':<16}{'':>10}{_bytes(sum(e.sent_bytes for e in step.estimate.collectives)):>10}"


def _gpu_time(step: "GpuStep") -> Iterator[str]:
    """By the roofline of each kernel."""
    found, total = step.estimate, step.seconds
    yield "least time by part, ms       forward  backward   share     read and written       products"
    for part, row in found.by_part().items():
        forward, backward = row["forward"], row["backward"]
        yield (
            f"  {part:<24}{1e3 * forward:>10.2f}{1e3 * backward:>10.2f}{(forward + backward) / total:>8.1%}"
            f"{_bytes(row['bytes']):>21}{row['flops'] / 1e9:>9,.1f} GFLOP"
        )
    exposed = step.collective_seconds(exposed=True)
    yield f"  {'exchanges, not hidden':<24}{1e3 * exposed:>10.2f}{exposed / total:>18.1%}"
    yield f"  {'in all':<24}{1e3 * total:>10.2f}{'':>18}{_bytes(found.bytes):>21}{found.flops / 1e9:>9,.1f} GFLOP"
    yield f"  {'products by the shapes of the model':<73}{step.matrix_flops / 1e9:>9,.1f} GFLOP"
    opaque = Counter(each.opaque for each in found.kernels if each.opaque is not None)
    for name, count in opaque.items():
        yield f"  {count} call(s) of {name}: only their bytes are in the sum"
    if found.unknown_loops:
        yield f"  {found.unknown_loops} loop(s) with unknown trips, counted as one trip each"
    yield "an estimate, and a floor: the GPU compiler gives no cycles, and no kernel is faster than its"
    yield "products at the peak and its bytes from memory; but what is still in the cache comes faster"
    yield ""
    yield f"at that time {step.share_of_peak:.1%} of peak (products of the model, nothing computed again)"
    least = f"the model's roofline's step takes {1e3 * step.roofline_seconds:.2f} ms"
    yield f"at that time {step.tokens_per_s:,.0f} tokens/s a chip; {least}"


def _tpu_time(step: "Step") -> Iterator[str]:
    """By the compiler's cycles."""
    from ctx_jax.hlo.estimate import by_part

    yield "estimated time by part, ms            forward    backward       share"
    total = step.seconds
    clock = step.chip.clock_hz
    for part, cycles in by_part(step.estimate).items():
        forward, backward = (1e3 * cycles[direction] / clock for direction in ("forward", "backward"))
        yield f"  {part:<32}{forward:>10.2f}{backward:>12.2f}{(forward + backward) / 1e3 / total:>11.1%}"
    silent = step.compute_seconds - step.estimate.compute_cycles / clock
    yield f"  {'no estimate: by their bytes':<32}{1e3 * silent:>10.2f}{silent / total:>23.1%}"
    exposed = step.collective_seconds(exposed=True)
    yield f"  {'exchanges that nothing hides':<32}{1e3 * exposed:>10.2f}{exposed / total:>23.1%}"
    yield f"  {'in all':<32}{1e3 * total:>10.2f}"
    for kernel in step.estimate.kernels:
        if kernel.cycles is None:
            yield f"  kernel {kernel.name}: its schedule was not at hand; it is not in the sum"
    if step.estimate.unknown_loops:
        yield f"  {step.estimate.unknown_loops} loop(s) with unknown trips, counted as one trip each"
    yield ""
    yield f"estimated share of peak {step.share_of_peak:.1%} (products of the model, nothing computed again)"
    least = f"the roofline's step takes {1e3 * step.roofline_seconds:.2f} ms"
    yield f"estimated tokens/s a chip {step.tokens_per_s:,.0f}; {least}"


def table(steps: "Sequence[Step]") -> Iterator[str]:
    """Several beside each other; the cost of a token relative to the first."""
    from ctx_jax.experiment.topology import GpuStep

    yield "estimates                          remat  rows  memory a chip  step ms  of peak  tokens/s chip  cost a token"
    first = steps[0]
    for step in steps:
        mesh = ",".join(f"{axis}={size}" for axis, size in step.mesh.items() if size > 1) or "data=1"
        memory = f"{_bytes(step.memory.total)}{'' if step.memory.fits else ' !'}"
        yield (
            f"{step.topology:<11}{mesh:<24}{step.remat or '-':>5}{step.rows:>6g}{memory:>15}{1e3 * step.seconds:>9.2f}"
            f"{step.share_of_peak:>9.1%}{step.tokens_per_s:>15,.0f}{first.tokens_per_s / step.tokens_per_s:>14.3f}"
        )
    if any(isinstance(step, GpuStep) for step in steps):
        yield "of GPUs: the least time that the kernels' bytes and products need; what is real is slower"
    best = max((step for step in steps if step.memory.fits), key=lambda step: step.tokens_per_s, default=None)
    if best is None:
        yield "nothing fits"
        return
    words = [f"--mesh.{axis} {size}" for axis, size in best.mesh.items()]
    words += [f"--model.remat {best.remat}"] if best.remat else []
    yield f"most tokens/s a chip, estimated: {best.topology} {' '.join(words)} --rows-per-chip {best.rows:g}"
