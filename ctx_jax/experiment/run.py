"""Runs an experiment: data, state, steps, checkpoints, and the directory that holds it all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import ctx_jax
from ctx_jax.checkpoint import Checkpoints, save_weights
from ctx_jax.compilation import options_for
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import Loader
from ctx_jax.data.streams import Streams
from ctx_jax.errors import InputError
from ctx_jax.experiment.assembly import assemble, open_rows, vocabulary_of
from ctx_jax.experiment.config import Evaluation, Experiment
from ctx_jax.experiment.cost import cost_card, peak_flops_per_s, state_bytes, step_cost
from ctx_jax.hosts import Team, on_first_process, wait_for_all
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Bound, Params, count_parameters
from ctx_jax.objectives.mlm import unigram_entropy
from ctx_jax.sharding import make_mesh, process_rows, put_batch, replicated, tree_shardings
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.train.log import Log
from ctx_jax.train.loop import Progress, StopSignal, run
from ctx_jax.train.step import Objective, make_eval_step

CONFIG, LOG, COST, CHECKPOINTS, WEIGHTS, TOKENIZER = (
    "config.json", "log.jsonl", "cost.json", "checkpoints", "weights", "tokenizer"
)  # fmt: skip

SHARED_SECONDS = 60.0
"""How long a process looks for what the first one wrote: NFS may show for up to a minute what was there before."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: steps taken in all.
      finished: False when a signal stopped it before its last step.
      evaluation: held-out figures of the last state; empty when stopped.
      cost: as in cost.json; empty when stopped.
    """

    step: int
    finished: bool
    evaluation: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


# A run goes on only with what it was begun with; the rest (steps, logging, mesh, …) may change between two starts.
_FIXED = ("model", "rows", "objective", "seed")


def pretrain(
    experiment: Experiment,
    workdir: str | os.PathLike[str],
    *,
    devices: Sequence[jax.Device] | None = None,
    show_progress: bool = True,
    team: Team | None = None,
) -> Outcome:
    """Trains, or goes on with, the run in `workdir`, until its last step or a SIGTERM.

    The directory is complete: config.json, tokenizer/, checkpoints/, weights/, log.jsonl and cost.json.

    Args:
      experiment: what to do.
      workdir: the run directory; made if need be, gone on with if it holds this run.
      devices: all of them by default.
      show_progress: tell on the terminal what is done; where there are several processes, the first one tells.
      team: the processes that train together, from `ctx_jax.hosts.joined`; each calls this with the same experiment,
        and `workdir` is a folder that all of them see.

    Raises:
      InputError: the data are missing or do not fit, or `workdir` holds another run.
      NonFiniteLoss: training diverged.
    """
    team = team or Team()
    if team.count != jax.process_count():
        raise InputError(
            f"{jax.process_count()} processes without a team: call pretrain inside `with ctx_jax.hosts.joined(hosts) as"
            " team`, and not jax.distributed.initialize"
        )
    workdir = pathlib.Path(workdir)
    if re.match(r"[a-z0-9]+:/", str(workdir)):
        raise InputError(f"{workdir}: expected a local or mounted folder, not an address")
    mesh = make_mesh(experiment.mesh, devices)
    with StopSignal() as stop:
        return _pretrain(experiment, workdir, mesh, stop, show_progress and team.process == 0, team)


def _pretrain(
    experiment: Experiment,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    stop: StopSignal,
    show_progress: bool,
    team: Team,
) -> Outcome:
    model, say = experiment.model, _speaker(show_progress)
    corpus = Corpus(experiment.data, "train")
    tokenizer = corpus.tokenizer
    vocabulary = vocabulary_of(experiment, tokenizer)
    rows_at_once = experiment.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    if experiment.batch_size % rows_at_once or experiment.evaluation.batch_size % rows_at_once:
        raise InputError(
            f"batch sizes {experiment.batch_size} (training) and {experiment.evaluation.batch_size} (evaluation) must"
            f" be multiples of {rows_at_once}: micro-batches × devices that hold rows"
        )
    record = _record(experiment, corpus)
    on_first_process(lambda: _claim(workdir, record, tokenizer))
    _require_agreement(workdir, record)

    loader = _rows(corpus, experiment, "rows", show_progress)
    held_out = _rows(Corpus(experiment.data, "validation"), experiment, "held-out rows", show_progress)
    bound, objective, init, schedule, step = assemble(experiment, vocabulary)
    init_key = jax.random.key(experiment.seed, impl="threefry2x32")
    shapes = jax.eval_shape(init, init_key)
    shardings = tree_shardings(shapes, mesh)
    say(
        f"{count_parameters(bound.shapes):,} parameters; {loader.num_rows:,} rows of {experiment.rows.length}"
        f" an epoch, {held_out.num_rows:,} held out; {mesh.size} {jax.devices()[0].device_kind} device(s)"
    )

    needed = {name: size / 1e6 for name, size in state_bytes(experiment, mesh).items()}
    say(
        f"{needed['parameters'] + needed['optimizer']:,.1f} MB a device for parameters and optimizer,"
        f" {needed['gradients']:,.1f} MB for gradients"
    )

    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        keep = {"keep_last": experiment.keep_checkpoints, "keep_best": experiment.keep_best}
        checkpoints = closing.enter_context(Checkpoints(workdir / CHECKPOINTS, **keep))
        team.describe = lambda: _last_checkpoint(checkpoints)
        like = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
        )
        restored = checkpoints.restore(like)
        if restored is None:
            state, progress = jax.jit(init, out_shardings=shardings)(init_key), Progress()
        else:
            state, progress = restored.state, Progress(**restored.metadata["progress"])
            say(f"resuming from step {progress.step}")
        log = closing.enter_context(Log(workdir / LOG, resume_step=progress.step, write=team.process == 0))

        begin = time.perf_counter()
        arguments = jax.device_put(objective.arguments, replicated(mesh))
        batches = _device_batches(loader, experiment, progress.position, mesh)
        first = next(batches)
        options = options_for(mesh.devices.flat[0])
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)), compiler_options=options)
        compiled = jitted.lower(state, first, arguments).compile()
        say(f"compiled in {time.perf_counter() - begin:.1f} s")
        evaluate = _evaluator(bound, objective, arguments, held_out, experiment.evaluation, mesh)

        flops = step_cost(experiment).training_matrix_flops
        peak = peak_flops_per_s(model.dtype, mesh)

        def extras(updates: int, seconds: float, steps: int) -> dict[str, float]:
            values = {"learning_rate": float(schedule(max(updates - 1, 0))), "seconds_per_step": seconds / steps}
            return values if peak is None else values | {"share_of_peak": flops * steps / seconds / peak}

        def chain() -> Iterator[Any]:
            yield first
            yield from batches

        state, evaluation = run(
            lambda state, batch: compiled(state, batch, arguments),
            state,
            chain(),
            progress,
            steps=experiment.steps,
            batch_size=experiment.batch_size,
            config=experiment.loop,
            means=objective.means,
            extras=extras,
            evaluate=evaluate,
            checkpoints=checkpoints,
            metadata={"data": corpus.fingerprint},
            log=log,
            show_progress=show_progress,
            stop=lambda step: team.stop_at(step, stop.name),
        )
        if progress.step < experiment.steps:
            say(f"{team.stopped}: saved step {progress.step}; the same command goes on from there")
            return Outcome(progress.step, False)
        _save_final_weights(workdir, state.params, progress.step)
    cost = cost_card(experiment, progress, peak, mesh)
    on_first_process(lambda: _write_json(workdir / COST, cost | {"evaluation": evaluation}))
    return Outcome(progress.step, True, evaluation, cost)


def _save_final_weights(workdir: pathlib.Path, params: Params, step: int) -> None:
    """Writes `weights/`; what an earlier end of the same run left there stays until the new ones are whole."""
    new = workdir / f"{WEIGHTS}.new"

    def replace() -> None:
        shutil.rmtree(workdir / WEIGHTS, ignore_errors=True)
        new.rename(workdir / WEIGHTS)

    on_first_process(lambda: shutil.rmtree(new, ignore_errors=True))
    save_weights(new, params, {"step": step})
    on_first_process(replace)


def _speaker(show: bool) -> Any:
    def say(text: str) -> None:
        if show:
            tqdm.write(text)

    return say


def _rows(corpus: Corpus, experiment: Experiment, what: str, show: bool) -> Loader | Streams:
    bar = lambda documents: tqdm(documents, desc=f"planning {what}", unit="doc", disable=not show, leave=False)
    return open_rows(corpus, experiment, bar)


def _device_batches(
    loader: Loader | Streams, experiment: Experiment, position: int, mesh: jax.sharding.Mesh
) -> Iterator[Any]:
    rows = process_rows(mesh, experiment.batch_size)
    for batch in loader.batches(experiment.batch_size, start=position, rows=rows):
        yield put_batch(batch, mesh)


def _evaluator(
    bound: Bound,
    objective: Objective,
    arguments: Any,
    held_out: Loader | Streams,
    config: Evaluation,
    mesh: jax.sharding.Mesh,
) -> Any:
    """A function from parameters to held-out figures."""
    start = lambda: objective.start(config.batch_size)
    carried = tree_shardings({"carry": jax.eval_shape(start)}, mesh)["carry"]
    step = jax.jit(make_eval_step(bound, objective), out_shardings=(replicated(mesh), replicated(mesh), carried))
    first = jax.jit(start, out_shardings=carried)
    rows = process_rows(mesh, config.batch_size)

    def evaluate(params: Any) -> dict[str, float]:
        sums: dict[str, float] = {}
        counts: Any = 0.0
        carries = [first() for _ in range(config.repeats)]
        for batch in held_out.in_order(config.batch_size, limit=config.rows, rows=rows):
            batch = put_batch(batch, mesh)
            for repeat, carry in enumerate(carries):
                found, targets, carries[repeat] = step(params, batch, jnp.int32(config.seed + repeat), arguments, carry)
                found, targets = jax.device_get((found, targets))
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
                counts = counts + targets.astype(np.float64)
        figures = {"unigram_entropy": unigram_entropy(counts), "predictions": float(counts.sum())}
        return objective.means(sums) | figures

    return evaluate


def _record(experiment: Experiment, corpus: Corpus) -> dict[str, Any]:
    """What config.json says."""
    return {
        "format": 1,
        "ctx_jax": ctx_jax.__version__,
        "model_type": "elmo" if isinstance(experiment.model, ElmoConfig) else "bert",
        "model": json.loads(json.dumps(asdict(experiment.model))),
        "data": corpus.fingerprint,
        "experiment": json.loads(json.dumps(asdict(experiment))),
    }


def _claim(workdir: pathlib.Path, record: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Makes the run directory, or checks that it belongs to this run."""
    path = workdir / CONFIG
    if path.exists():
        before = _read_json(path)
        if before.get("data") != record["data"]:
            raise InputError(f"{path}: the run was begun with other data; choose another --workdir")
        # A recurrent state belongs to as many streams as there were.
        for name in (*_FIXED, "batch_size") if record["experiment"]["rows"]["kind"] == "stream" else _FIXED:
            differing = _difference(before["experiment"].get(name), record["experiment"][name], name)
            if differing:
                raise InputError(f"{path}: the run was begun with {differing}; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / TOKENIZER).exists():
        tokenizer.save(workdir / TOKENIZER)
    _write_json(path, record)


def _require_agreement(workdir: pathlib.Path, record: dict[str, Any]) -> None:
    """Every process must see what the first one wrote, and have been given the same."""
    until, path = time.monotonic() + SHARED_SECONDS, workdir / CONFIG
    while (found := _read_json(path) if path.exists() else None) != record:
        if time.monotonic() > until:
            process = jax.process_index()
            if found is None:
                raise InputError(
                    f"{path}: process {process} does not see it, but process 0 wrote it; expected a folder that all"
                    " the processes share"
                )
            differing = _difference(found, record, CONFIG)
            raise InputError(
                f"{path}: process 0 was given {differing}, as process {process}; expected the same for all"
            )
        time.sleep(0.5)
    wait_for_all()  # none begins while another may still refuse


def _last_checkpoint(checkpoints: Checkpoints) -> str:
    steps = checkpoints.steps()
    return f"the last checkpoint is step {steps[-1]}" if steps else "no checkpoint was saved yet"


def _difference(before: Any, now: Any, name: str) -> str:
    """The first field that differs, `name = before, not now`; nothing when all are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now.keys() & before.keys():  # a field that was not there then said nothing
            found = _difference(before[key], now[key], f"{name}.{key}")
            if found:
                return found
        return ""
    return "" if before == now else f"{name} = {before!r}, not {now!r}"


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
