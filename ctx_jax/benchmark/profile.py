"""Where the time goes: a compiled function runs under JAX's profiler, and every instant goes to a part of the model.

Parts are the program's own `jax.named_scope`s. The models name `input`, `projections`, `transposes`, `scores`,
`softmax`, `context`, `feed-forward`, `activation`, `norms`, `pooling` and `head`; ELMo's are `characters`, `highway`,
`projections`, `input products`, `recurrence` and `mix`; and `layers` is what stands between them: loops, the weights
that they cut out of stacks, residuals, reversals.

    an operation   belongs to the innermost scope that it stands in, or to `other`
    a fusion       to the part of its matrix products and convolutions, or where it has none to the one that most of
                   its operations name; the others are listed as fused with that part
    an instant     to the operations that run in it, on whatever thread or stream, in equal shares; to a loop only while
                   nothing of its body runs; to `transfer` where nothing runs: dispatch, copies in and out, waiting
    an end         where the trace has it, but not after an operation began that reads the result: on a processor ends
                   are noted by whoever did the last piece, often only after he has run what follows

So the seconds of the parts add up to those of the call. They are taken with the profiler on, which costs a
little at every operation: nothing beside large ones, something in a loop of many small ones.

FLOPs are those of the matrix products in the jaxpr (`ctx_jax.flops`), by the same scopes, whatever was fused.
"""

from __future__ import annotations

import math
import pathlib
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData, ProfileOptions

from ctx_jax.encoder import BertEncoder, ElmoEncoder, Encoder
from ctx_jax.encoder.elmo import NEW_WORDS_AT_ONCE, _Rows
from ctx_jax.errors import InputError
from ctx_jax.flops.jaxpr import CALLS, count_jaxpr
from ctx_jax.hlo.parts import NO_WORK, OTHER, all_scopes, inner_jaxprs, open_jaxpr, owner_of, scopes
from ctx_jax.hlo.text import Computation, Module, read_module

TRANSFER = "transfer"
"""Time in which no operation runs."""


class Part(NamedTuple):
    """What one part of a program takes.

    Attributes:
      name: of its scope, or OTHER or TRANSFER.
      seconds: of one call.
      share: of the call's time, 0 to 1.
      flops: of the matrix products of one call; NaN where the trips of a loop around them cannot be proved.
      operations: run in one call, as the compiler cut them; in the body of a loop on every trip.
      fused: parts of which the compiler put something into this one's operations.
    """

    name: str
    seconds: float
    share: float
    flops: float
    operations: float
    fused: tuple[str, ...]


class _Work(NamedTuple):
    """A jitted function, the arguments of a call, and how often it is called where the whole is called once."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    times: int = 1


def profile(function: Callable[..., Any], *args: Any, folder: pathlib.Path | None = None, calls: int = 3) -> list[Part]:
    """Runs a function, once to compile it and then under the profiler, and says which part takes how long.

    Args:
      function: what `jax.jit` returned.
      *args: of the call, static ones too.
      folder: keeps the trace, for a viewer; made if need be. None keeps none.
      calls: under the profiler; the mean is returned.

    Returns:
      The parts, the longest first.

    Raises:
      InputError: the function is not jitted, there are no calls, the folder is a file, or the trace of this device
        does not name the program's operations.
    """
    return _profile([_Work(function, args)], folder, calls)


def profile_encoder(
    encoder: Encoder, rows: int, length: int, folder: pathlib.Path | None = None, calls: int = 3
) -> list[Part]:
    """Like `profile`, of an encoder's own forward pass over full rows.

    A BERT makes the mean of each row's last layer. An ELMo makes all layers, of words it has not seen before: its
    character CNN runs over every one, as many at once as in `encode`.

    Args:
      encoder: of either kind.
      rows: B.
      length: T, in sub-words or words.
      folder: as in `profile`, like `calls`.
      calls: see there.

    Raises:
      InputError: rows or length are below 1 or more than the model takes; or as `profile`.
    """
    config, longest = encoder.config, getattr(encoder.config, "max_length", math.inf)
    if rows < 1:
        raise InputError(f"rows: found {rows}, expected at least 1")
    if not 1 <= length <= longest:
        most = f", at most {longest}" if longest < math.inf else ""
        raise InputError(f"length: found {length}, expected at least 1{most}")
    if isinstance(encoder, BertEncoder):
        work = [_Work(*encoder.forward(rows, length, pool="mean"))]
    elif isinstance(encoder, ElmoEncoder):
        draw = np.random.default_rng(0)
        at_once = min(rows * length, NEW_WORDS_AT_ONCE)
        ids = draw.integers(0, config.num_characters, (at_once, config.max_characters), np.int16)
        vectors = draw.standard_normal((rows, length, config.projection_dim), np.float32).astype(config.dtype)
        batch = _Rows(vectors, np.full(rows, length, np.int32), np.zeros((rows, length), bool))
        work = [
            _Work(encoder._words, (encoder.params, ids), math.ceil(rows * length / at_once)),
            _Work(encoder._contextualise, (encoder.params, batch, None, tuple(range(config.num_layers + 1)))),
        ]
    else:
        raise InputError(f"encoder: found {type(encoder).__name__}, expected BertEncoder or ElmoEncoder")
    return _profile(work, folder, calls)


def profile_lines(parts: Sequence[Part]) -> list[str]:
    """A table for people; `?` are FLOPs that are not known."""
    seconds, flops = sum(part.seconds for part in parts), sum(part.flops for part in parts)
    whole = Part("a call", seconds, 1.0, flops, sum(part.operations for part in parts), ())
    width = max(len(part.name) for part in (*parts, whole)) + 2
    lines = [f"{'':<{width}}{'ms':>10}{'share':>8}{'GFLOP':>10}{'GFLOP/s':>10}{'operations':>12}  fused with it"]
    for part in (*parts, whole):
        rate = part.flops / part.seconds if part.seconds else 0.0
        row = f"{part.name:<{width}}{part.seconds * 1e3:>10.3f}{part.share:>8.1%}{_giga(part.flops):>10}"
        row += f"{_giga(rate):>10}{part.operations:>12,.0f}  {', '.join(part.fused)}"
        lines.append(row.rstrip())
    return lines


def _giga(flops: float) -> str:
    return "?" if math.isnan(flops) else f"{flops / 1e9:,.3f}" if flops else "·"


def _profile(work: Sequence[_Work], folder: pathlib.Path | None, calls: int) -> list[Part]:
    if calls < 1:
        raise InputError(f"calls: found {calls}, expected at least 1")
    if folder is not None and pathlib.Path(folder).is_file():
        raise InputError(f"folder: found {folder}, a file, expected a folder or nothing")
    programs, flops = {}, Counter()
    for one in work:
        name, program, products = _compiled(one.function, one.args)
        programs[name] = program
        flops.update({part: found * one.times for part, found in products.items()})
    with tempfile.TemporaryDirectory() as temporary:
        path, seconds = _trace(work, pathlib.Path(folder or temporary), calls)
        spans = _spans(path)
    if not any(span.module in programs and span.operation in programs[span.module].owners for span in spans):
        raise InputError(
            f"profile: found none of the program's operations in the trace of {jax.default_backend()}, expected a"
            " device whose profiler names them, a CPU or GPU"
        )
    nothing, unknown = _Program({}, {}), _Owner(OTHER)
    spans = _until_read(spans, {name: program.reads for name, program in programs.items()})
    owned = [(span, programs.get(span.module, nothing).owners.get(span.operation, unknown)) for span in spans]
    taken = _taken(owned)
    taken[TRANSFER] = max(seconds - sum(taken.values()), 0.0)
    operations = Counter(owner.part for _, owner in owned if not owner.is_loop)
    fused = defaultdict(set)
    for _, owner in owned:
        fused[owner.part] |= owner.fused
    whole = sum(taken.values())
    parts = [
        Part(
            name,
            taken.get(name, 0.0) / calls,
            taken.get(name, 0.0) / whole,
            float(flops[name]),
            operations[name] / calls,
            tuple(sorted(fused[name])),
        )
        for name in {**taken, **flops}
    ]
    return sorted(parts, key=lambda part: -part.seconds)


# The program: who owns which operation.


class _Owner(NamedTuple):
    """The part that an operation belongs to.

    Attributes:
      part: its name.
      is_loop: whether the operation only runs others, which have owners of their own.
      fused: other parts of which it computes something.
    """

    part: str
    is_loop: bool = False
    fused: frozenset[str] = frozenset()


class _Program(NamedTuple):
    """A compiled module.

    Attributes:
      owners: of its operations, by name.
      reads: the operations whose results each one reads, by name.
    """

    owners: dict[str, _Owner]
    reads: dict[str, frozenset[str]]


LOOPS = frozenset(("while", "conditional", "call"))
_MODULE = re.compile(r"HloModule ([\w.\-]+)")


def _compiled(function: Callable[..., Any], args: Sequence[Any]) -> tuple[str, _Program, Counter[str]]:
    """Name of a function's module, the module, and FLOPs of its products by part."""
    if not hasattr(function, "trace"):
        raise InputError(f"function: found {function!r:.60}, expected what jax.jit returns")
    traced = function.trace(*args)
    text = traced.lower().compile().as_text()
    module = read_module(text)
    program = _Program(_owners(module, set(all_scopes(traced.jaxpr))), _reads(module))
    return _MODULE.match(text)[1], program, _products(traced.jaxpr, OTHER)


def _owners(module: Module, names: set[str]) -> dict[str, _Owner]:
    """Owners of all instructions of a module; `names` are the scopes that its function opened."""
    owner, owners = owner_of(module, names), {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            part, fused = owner(instruction)
            is_loop = instruction.opcode in LOOPS
            owners[instruction.name] = _Owner(part, is_loop, frozenset() if is_loop else fused)
    return owners


def _reads(module: Module) -> dict[str, frozenset[str]]:
    """The instructions whose results each one reads; through those that only name them, and from trip to trip."""
    bodies = {
        instruction.called["body"]
        for computation in module.computations.values()
        for instruction in computation.instructions
        if "body" in instruction.called
    }

    def makers(computation: Computation, name: str, passed: frozenset[str] = frozenset()) -> Iterator[str]:
        instruction = computation[name]
        if instruction.opcode not in NO_WORK:
            yield name
            return
        sources = () if instruction.opcode in ("parameter", "constant") else instruction.operands
        if instruction.opcode == "get-tuple-element" and computation.name in bodies:
            carried, root = computation[instruction.operands[0]], computation.root
            if carried.opcode == "parameter" and root.opcode == "tuple":
                sources = (root.operands[instruction.place],)
        for source in {*sources} - passed:  # a loop hands some things on as they are
            yield from makers(computation, source, passed | {name})

    return {
        instruction.name: frozenset(
            maker
            for operand in instruction.operands
            if operand in computation
            for maker in makers(computation, operand)
        )
        for computation in module.computations.values()
        for instruction in computation.instructions
    }


def _products(jaxpr: Any, part: str) -> Counter[str]:
    """FLOPs of matrix products by part; what stands in no scope of its own belongs to `part`."""
    found = Counter()
    for equation in open_jaxpr(jaxpr).eqns:
        here = [part, *scopes(str(equation.source_info.name_stack))][-1]
        name, inner = equation.primitive.name, list(inner_jaxprs(equation.params.values()))
        if name == "scan" or (name in CALLS and len(inner) == 1):
            trips = equation.params["length"] if name == "scan" else 1
            found.update({part: flops * trips for part, flops in _products(inner[0], here).items()})
            continue
        try:
            flops = count_jaxpr(open_jaxpr(jaxpr).replace(eqns=[equation])).matrix
        except InputError:
            flops = math.nan
        if flops:
            found[here] += flops
    return found


# The trace: what ran when.


class _Span(NamedTuple):
    """When an operation of a module ran, in seconds."""

    start: float
    end: float
    module: str
    operation: str


def _trace(work: Sequence[_Work], folder: pathlib.Path, calls: int) -> tuple[pathlib.Path, float]:
    """Calls under the profiler: the trace's file, and the seconds that all the calls took."""
    options = ProfileOptions()
    # Python's own functions would slow down what is measured.
    options.python_tracer_level = 0
    for function, args, _ in work:
        jax.block_until_ready(function(*args))
    with jax.profiler.trace(str(folder), profiler_options=options):
        start = time.perf_counter()
        for _ in range(calls):
            for function, args, times in work:
                for _ in range(times):
                    jax.block_until_ready(function(*args))
        seconds = time.perf_counter() - start
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns), seconds


def _spans(path: pathlib.Path) -> list[_Span]:
    """The operations in a trace: those of the devices, or else, when the host is the device, the host's."""
    with warnings.catch_warnings():
        # From Python 3.12 on, of a type of the profiler's own.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        planes = list(ProfileData.from_file(str(path)).planes)
        devices = [line for plane in planes if plane.name.startswith("/device:") for line in plane.lines]
        # Lines of other names sum the streams up.
        streams = [line for line in devices if line.name.startswith("Stream")]
        return _spans_of(streams) or _spans_of(line for plane in planes for line in plane.lines)


def _spans_of(lines: Iterable[Any]) -> list[_Span]:
    spans, ends = [], {}
    for line in lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                span = _Span(event.start_ns / 1e9, event.end_ns / 1e9, stats.get("hlo_module", ""), stats["hlo_op"])
                spans.append((span, stats.get("_p")))
            elif event.name.startswith("end: "):
                ends[stats.get("_c")] = event.start_ns / 1e9
    # An operation of the CPU may return before other threads have done its work; then they note its end.
    return [span._replace(end=max(span.end, ends.get(number, span.end))) for span, number in spans]


def _until_read(spans: Iterable[_Span], reads: Mapping[str, Mapping[str, frozenset[str]]]) -> list[_Span]:
    """Spans in the order of their starts; each ends before an operation starts that reads its result.

    Args:
      spans: of a trace.
      reads: by module and operation, see `_Program`.
    """
    found = sorted(spans, key=lambda span: span.start)
    latest: dict[tuple[str, str], int] = {}
    for number, span in enumerate(found):
        for maker in reads.get(span.module, {}).get(span.operation, ()):
            made = latest.get((span.module, maker))
            if made is not None and found[made].end > span.start:
                found[made] = found[made]._replace(end=span.start)
        latest[span.module, span.operation] = number
    return found


def _taken(owned: Iterable[tuple[_Span, _Owner]]) -> dict[str, float]:
    """Seconds by part, see the module: each instant once."""
    owned = list(owned)
    edges = sorted((at, number) for number, (span, _) in enumerate(owned) for at in (span.start, span.end))
    taken: dict[str, float] = defaultdict(float)
    running: dict[bool, dict[int, str]] = {True: {}, False: {}}  # by whether it is a loop; parts by number
    before = 0.0
    for at, number in edges:
        _share(taken, at - before, running)
        before = at
        part, is_loop, _ = owned[number][1]
        if running[is_loop].pop(number, None) is None:
            running[is_loop][number] = part
    return dict(taken)


def _share(taken: dict[str, float], seconds: float, running: Mapping[bool, Mapping[int, str]]) -> None:
    """Gives time to what runs; of loops to the one that began last, the innermost."""
    parts = list(running[False].values()) or list(running[True].values())[-1:]
    for part in parts:
        taken[part] += seconds / len(parts)
