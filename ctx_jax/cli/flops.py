"""`ctx-jax flops …`: what models cost, which ones fit a budget, and what is claimed."""

import contextlib
import gc
import json
import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ctx_jax.cli.config_file import load_config
from ctx_jax.cli.parsing import OptionalPath
from ctx_jax.errors import InputError


@dataclass(frozen=True)
class Flops:
    """What models cost: FLOPs by part, counted by formula, by walking the jaxpr and by XLA; nothing is compiled.

    1 multiply-add = 2 FLOP. A config's own budget, or --budget, gives the verdict. Exit code 1 when one is over it.
    """

    configs: Annotated[Positional[tuple[pathlib.Path, ...]], arg(metavar="CONFIG…")]
    """Config files."""
    length: Annotated[tuple[int, ...], arg(metavar="TOKENS…")] = (128, 512)
    """Lengths of a row; those that a model does not take are left out."""
    batch: Annotated[int, arg(metavar="ROWS")] = 1
    """Rows at once."""
    budget: Annotated[float | None, arg(metavar="FLOP")] = None
    """Budget for the forward pass over one row of the longest --length, 22.4e9 say, instead of the config's own."""
    train: bool = False
    """Also the training step, forward and backward, as the config runs it."""
    device: Annotated[str | None, arg(metavar="NAME")] = None
    """Time at best on a device: H200, A100, v5e, …, or cpu for the one at hand, which is measured."""
    json: bool = False
    """One JSON list instead of tables."""


def flops(command: Flops) -> int:
    """Flops"""
    from ctx_jax.flops.budget import FlopBudget
    from ctx_jax.flops.devices import named_peak

    if not command.configs:
        raise InputError("expected at least one CONFIG, for example configs/bert_base.py")
    if command.batch < 1 or not command.length or min(command.length) < 1:
        raise InputError(f"--batch {command.batch}, --length {list(command.length)}: expected numbers of at least 1")
    experiments = {path: load_config(path) for path in command.configs}
    peak = None if command.device is None else named_peak(command.device)
    override = None if command.budget is None else FlopBudget(command.budget, max(command.length))
    with _garbage_kept():
        records = [_one(path, experiment, command, override, peak) for path, experiment in experiments.items()]
    if command.json:
        print(json.dumps(records))
    over = [record["config"] for record in records if record["budget"] and not record["budget"]["within"]]
    return 1 if over else 0


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Of a second of tracing, a tenth goes to Python's search for cycles, among objects that nearly all live on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _one(path: pathlib.Path, experiment: Any, command: Flops, override: Any, peak: Any) -> dict[str, Any]:
    """Prints one config's tables, unless JSON is asked for, and returns its record."""
    from ctx_jax.experiment.assembly import abstract_step
    from ctx_jax.experiment.cost import step_cost
    from ctx_jax.flops.architectures import count_encoder, describe, encoder_cost, longest, unit
    from ctx_jax.flops.jaxpr import count
    from ctx_jax.flops.report import UNIT, cost_json, counts_json, forward_lines, training_lines

    model, budget = experiment.model, override or experiment.flop_budget
    limit = longest(model) or math.inf
    lengths = [length for length in dict.fromkeys(command.length) if length <= limit] or [longest(model)]
    counts = [count_encoder(model, rows=command.batch, length=length) for length in lengths]
    if budget.forward_flops is not None and budget.length > limit:
        raise InputError(f"{path}: a budget at {budget.length} tokens, but the model takes {limit}")
    verdict = budget.verdict(encoder_cost(model, length=budget.length).matrix_flops)
    record = {
        "config": str(path),
        "model": describe(model),
        "forward": [counts_json(found) for found in counts],
        "budget": None if verdict is None else verdict.as_dict(),
    }
    lines = [f"{path}: {describe(model)} ({UNIT})", "", *forward_lines(counts, peak, model.dtype, unit(model))]
    if command.train:
        cost = step_cost(experiment)
        function, args = abstract_step(experiment)
        # The masks' loop has no bound in the program; it holds integers only, and so no FLOP.
        walk = count(function, *args, while_trips=1)
        record["training_step"] = cost_json(cost) | {"walk": {"matrix_flops": walk.matrix, "flops": walk.flops}}
        lines += ["", *training_lines(cost, walk, experiment.steps, peak, model.dtype)]
    lines += ["", f"  {verdict or 'no budget stated'}", ""]
    if not command.json:
        print("\n".join(lines), flush=True)
    return record


@dataclass(frozen=True)
class Search:
    """Encoders that fit a budget: for every shape of a layer the deepest one, most parameters first.

    Times and memory are predicted, not measured: the roofline of the device with every dimension filled up to its tile,
    and a training step's parameters, moments and kept activations.
    """

    budget: Annotated[float, arg(metavar="FLOP")]
    """FLOP of the forward pass over one row, 22.4e9 for example."""
    length: Annotated[int, arg(metavar="TOKENS")] = 512
    """Of the row."""
    vocab_size: int = 30522
    """Costs the encoder no FLOP, but parameters."""
    multiple: int = 64
    """Widths are multiples of it: 64 suits tensor cores, 128 TPUs."""
    head_sizes: Annotated[tuple[int, ...], arg(metavar="SIZE…")] = (64,)
    """Widths of a head."""
    ratios: Annotated[tuple[float, ...], arg(metavar="RATIO…")] = (4.0,)
    """Feed-forward width over width; gated ones get two thirds of it."""
    plain: bool = False
    """Only what BERT has: no gates, attention to the whole row."""
    windows: Annotated[tuple[int, ...], arg(metavar="TOKENS…")] = (64,)
    """Windows of local attention to try besides attention to the whole row."""
    least_share: float = 0.95
    """Of the budget that must be used."""
    device: Annotated[str, arg(metavar="NAME")] = "H200"
    """Whose time and memory to predict: H200, A100, v5e, …, or cpu."""
    rows: int = 32
    """Rows at once, for time and memory."""
    top: int = 20
    """List so many."""
    write: OptionalPath = None
    """Write a config that trains the one of --pick."""
    pick: int = 1
    """Which, as numbered in the list."""
    json: bool = False
    """One JSON list instead of a table."""


def search(command: Search) -> int:
    """Flops search"""
    from ctx_jax.flops.budget import FlopBudget
    from ctx_jax.flops.devices import named_peak
    from ctx_jax.flops.report import candidate_json, search_lines
    from ctx_jax.flops.search import SearchSpace, config_file, picked
    from ctx_jax.flops.search import search as run

    if command.rows < 1 or command.top < 1:
        raise InputError(f"--rows {command.rows}, --top {command.top}: expected at least 1")
    budget, peak = FlopBudget(command.budget, command.length), named_peak(command.device)
    space = SearchSpace(
        vocab_size=command.vocab_size,
        multiple=command.multiple,
        head_sizes=command.head_sizes,
        ratios=command.ratios,
        gated=(False,) if command.plain else (False, True),
        windows=(None,) if command.plain else (None, *command.windows),
        least_share=command.least_share,
    )
    found = run(budget, space)
    if not found:
        share = f"{command.least_share:.0%} to 100 %"
        raise InputError(f"no encoder uses {share} of {command.budget:g} FLOP at {command.length} tokens")
    if command.write is not None:
        if command.write.exists():
            raise InputError(f"--write {command.write}: is there already")
        if not command.write.parent.is_dir():
            raise InputError(f"--write {command.write}: there is no folder {command.write.parent}")
        command.write.write_text(config_file(picked(found, command.pick), budget))
    shown = found[: command.top]
    if command.json:
        print(json.dumps([candidate_json(one, peak, rows=command.rows, length=command.length) for one in shown]))
        return 0
    print(f"{len(found)} encoders on {budget.forward_flops / 1e9:.2f} GFLOP forward at {budget.length} tokens;")
    print(f"time and memory for {command.rows} rows, predicted for {command.device} ({peak.source})\n")
    print("\n".join(search_lines(shown, peak, rows=command.rows, length=command.length)))
    if command.write is not None:
        print(f"\nwrote {command.write}, number {command.pick}")
    return 0


@dataclass(frozen=True)
class Claims:
    """What papers and talks say of FLOPs and parameters, what was counted here, and the verdict."""

    json: bool = False
    """One JSON list instead of a table."""


def claims(command: Claims) -> int:
    """Flops claims"""
    from ctx_jax.flops.claims import check, lines

    found = check()
    print(json.dumps([claim._asdict() for claim in found]) if command.json else "\n".join(lines(found)))
    return 0
