"""`ctx-jax bench`: how fast a model is, beside its peers."""

import contextlib
import functools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.config_file import load_config
from ctx_jax.cli.parsing import OptionalPath
from ctx_jax.errors import InputError

LENGTHS = (128, 512)
"""Where none are asked for; those that every model takes."""


@dataclass(frozen=True)
class Bench:
    """How fast models are beside their peers: same weights, same inputs, as many threads, each in a process of its own.

    First outputs are compared, then all run in turn. A table, then one line of JSON. Exit code 1 when a peer computes
    something else or ends early.
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL…")]
    """Folders that `import` reads, run directories, or config files, which get random weights; `static` after a model
    is its token table, only looked up."""
    lengths: Annotated[tuple[int, ...], arg(metavar="TOKENS…")] = ()
    """Rows of these lengths, without padding; by default 128 and 512."""
    texts: OptionalPath = None
    """Texts instead, one a line: everybody tokenises, batches and takes the mean by his own recommended loop."""
    batch: Annotated[tuple[int, ...], arg(metavar="ROWS…")] = (1, 8)
    """With lengths: rows at once."""
    pool: Literal["mean"] | None = None
    """With lengths: only the mean of each row's vectors is fetched, made where the model runs; by default the vectors
    of all tokens."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of the computation."""
    peers: Annotated[tuple[str, ...] | None, arg(metavar="NAME…")] = None
    """transformers, torch-compile, onnxruntime, openvino, sentence-transformers; by default all that are installed."""
    peer_python: Annotated[str, arg(metavar="PYTHON")] = sys.executable
    """The Python of the peers, where they are installed in another environment."""
    peer_batch: Annotated[int, arg(metavar="TEXTS")] = 32
    """With texts: how many the peers take at once."""
    threads: int | None = None
    """As many cores for everybody; by default all that there are."""
    repeats: int = 15
    """Runs that count, of each, in turn."""
    profile: OptionalPath = None
    """No peers: where our own time goes, by part of the model; the trace is kept in this folder."""
    json: bool = False
    """Only the line of JSON."""


def bench(command: Bench) -> int:
    """Bench"""
    import jax
    from tqdm import tqdm

    from ctx_jax.benchmark import report
    from ctx_jax.benchmark.bench import bench as run
    from ctx_jax.benchmark.bench import find_peers
    from ctx_jax.benchmark.race import Setting, cores_for
    from ctx_jax.benchmark.work import read_texts

    _check(command)
    if command.profile is not None:
        return _profile(command)
    lines = None if command.texts is None else read_texts(command.texts)
    cores = cores_for(command.threads)
    setting = Setting(
        sys.executable,
        command.peer_python,
        cores,
        len(cores) or command.threads or os.cpu_count(),
        command.repeats,
        command.peer_batch,
    )
    races: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(RuntimeError):
            # A GPU is for those who are measured.
            jax.config.update("jax_platforms", "cpu")
        subjects = _subjects(command.models, pathlib.Path(folder))
        peers, missing = find_peers(command.peers, command.peer_python)
        work = lines or _shapes(command, subjects)
        show = sys.stderr.isatty()
        say = functools.partial(tqdm.write, file=sys.stderr)
        found = run(
            subjects, work, command.dtype, peers, missing, setting, pool=command.pool, show_progress=show, say=say
        )
        for race in found:
            if not command.json:
                same = races and report.title(races[-1]) == report.title(race)
                print("\n".join([*([] if same else ["", *report.head(race)]), *report.lines(race)]), flush=True)
            races.append(race)
    if not command.json:
        print()
    print(json.dumps(report.as_json(races, setting, ["ctx-jax", *sys.argv[1:]])))
    return int(report.failed(races))


def _check(command: Bench) -> None:
    from ctx_jax.benchmark.subjects import STATIC

    if not command.models:
        raise InputError("expected at least one MODEL: a folder, a run directory or a config file")
    if command.pool is not None and command.texts is not None:
        raise InputError("--pool: found --texts with it, whose vectors are pooled anyway, expected --lengths")
    other = (command.texts is not None, command.pool is not None, command.peers, STATIC in command.models)
    if command.profile is not None and any(other):
        raise InputError(
            "--profile: found --texts, --pool, --peers or static with it, expected models and --lengths alone"
        )
    if command.lengths and command.texts is not None:
        raise InputError("expected --lengths or --texts, found both")
    for name, values in {"--batch": command.batch, "--dtype": command.dtype}.items():
        if not values:
            raise InputError(f"{name}: found none, expected at least one")
    numbers = {
        "--lengths": min(command.lengths, default=1),
        "--batch": min(command.batch),
        "--repeats": command.repeats,
        "--peer-batch": command.peer_batch,
    }
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name}: found {number}, expected at least 1")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if command.threads is not None and not 1 <= command.threads <= available:
        raise InputError(f"--threads: found {command.threads}, expected 1 to {available}, the cores there are")


def _profile(command: Bench) -> int:
    """Tables of parts, one for each model, type and shape."""
    from ctx_jax.benchmark.profile import profile_encoder, profile_lines
    from ctx_jax.encoder import Encoder

    found = []
    with tempfile.TemporaryDirectory() as folder:
        subjects = _subjects(command.models, pathlib.Path(folder))
        for dtype in command.dtype:
            for shape in _shapes(command, subjects):
                for subject in subjects:
                    encoder = Encoder.from_pretrained(subject.folder, dtype=dtype)
                    name = f"{subject.name}-{dtype}-{shape.batch}x{shape.length}"
                    parts = profile_encoder(encoder, *shape, folder=command.profile / name)
                    found.append({"model": subject.name, "dtype": dtype, **shape._asdict()})
                    found[-1]["parts"] = [part._asdict() for part in parts]
                    if not command.json:
                        lines = [f"\n{subject}, {dtype}, {shape.batch} × {shape.length}", "", *profile_lines(parts)]
                        print("\n".join(lines), flush=True)
    if not command.json:
        print()
    print(json.dumps(found))
    return 0


def _subjects(models: Sequence[str], folder: pathlib.Path) -> list[Any]:
    from ctx_jax.benchmark.subjects import STATIC, lay_out, static_of, with_random_weights
    from ctx_jax.interop.load import load

    subjects = []
    for number, model in enumerate(models):
        if model == STATIC:
            if not subjects:
                raise InputError(f"{STATIC}: found no model before it, expected one whose token table is looked up")
            subjects.append(static_of(subjects[0]))
            continue
        path = pathlib.Path(model)
        found = with_random_weights(load_config(path).model) if path.suffix == ".py" else load(path)
        subjects.append(
            lay_out(path.stem if path.suffix == ".py" else path.resolve().name, found, folder / str(number))
        )
    return subjects


def _shapes(command: Bench, subjects: Sequence[Any]) -> list[Any]:
    from ctx_jax.benchmark.work import Shape

    limits = [subject.longest for subject in subjects if subject.longest is not None]
    taken = [length for length in LENGTHS if length <= min(limits, default=length)]
    lengths = command.lengths or taken or [min(limits)]
    return [Shape(rows, length) for length in lengths for rows in command.batch]
