"""What a run costs, before it begins and when it is done."""

from __future__ import annotations

from typing import Any

import jax

from ctx_jax.experiment.assembly import abstract_step
from ctx_jax.experiment.config import Experiment
from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.flops.budget import Verdict
from ctx_jax.flops.devices import device_peak
from ctx_jax.flops.elmo import bilm_cost
from ctx_jax.flops.parts import Cost
from ctx_jax.flops.transformer import bert_cost
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.objectives.masking import prediction_counts, slots_needed
from ctx_jax.sharding import batch_sharding, bytes_per_device, replicated, tree_shardings
from ctx_jax.train.loop import Progress


def step_cost(experiment: Experiment) -> Cost:
    """What one step costs by formula: `training_matrix_flops` is all of it, forward and backward."""
    rows, objective = experiment.rows, experiment.objective
    if isinstance(experiment.model, ElmoConfig):
        samples = objective.num_samples
        return bilm_cost(experiment.model, rows=experiment.batch_size, length=rows.length, num_samples=samples)
    counts = prediction_counts(objective.rate, rows.length, objective.max_predictions)
    return bert_cost(
        experiment.model,
        rows=experiment.batch_size,
        length=rows.length,
        predictions=slots_needed(counts, rows.examples_per_row),
        examples=rows.examples_per_row if objective.next_sentence else 0,
        next_sentence=objective.next_sentence,
        masked_lm=True,
    )


def budget_verdict(experiment: Experiment) -> Verdict | None:
    """How the encoder stands to the budget that the experiment states; None when it states none."""
    budget = experiment.flop_budget
    return budget.verdict(encoder_cost(experiment.model, length=budget.length).matrix_flops)


def state_bytes(experiment: Experiment, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Bytes that a run keeps on each device, by what they are, before anything is there.

    From shapes alone: parameters, optimizer (moments), carry, gradients (they lie as the parameters do), one batch, and
    arguments (what the objective knows of the vocabulary). Activations are not among them.
    """
    _, (state, batch, arguments) = abstract_step(experiment)
    placed = tree_shardings(state, mesh)
    parameters = bytes_per_device(state.params, placed.params)
    return {
        "parameters": parameters,
        "optimizer": bytes_per_device(state.optimizer, placed.optimizer),
        "carry": bytes_per_device(state.carry, placed.carry),
        "gradients": parameters,
        "batch": bytes_per_device(batch, batch_sharding(mesh)),
        "arguments": bytes_per_device(arguments, replicated(mesh)),
    }


def cost_card(
    experiment: Experiment, progress: Progress, peak: float | None, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """What a run cost: tokens, FLOPs, device-hours, share of peak, waiting, and how the model stands to its budget."""
    cost, verdict = step_cost(experiment), budget_verdict(experiment)
    seconds = max(progress.seconds, 1e-9)
    total = cost.training_matrix_flops * progress.step
    return {
        "steps": progress.step,
        "rows": progress.position,
        "tokens": int(progress.tokens),
        "padding_share": 1 - progress.tokens / (progress.position * experiment.rows.length),
        "matrix_flops": total,
        "matrix_flops_per_step": cost.training_matrix_flops,
        "matrix_flops_per_step_by_part": {part.name: part.training_matrix_flops for part in cost.parts},
        "hours": progress.seconds / 3600,
        "devices": mesh.size,
        "device_kind": jax.devices()[0].device_kind,
        "device_hours": progress.seconds / 3600 * mesh.size,
        "tokens_per_s": progress.tokens / seconds,
        "peak_flops_per_s": peak,
        "share_of_peak": None if peak is None else total / seconds / peak,
        "data_wait_seconds": progress.data_wait_seconds,
        "data_wait_share": progress.data_wait_seconds / seconds,
        "checkpoint_seconds": progress.checkpoint_seconds,
        "checkpoint_seconds_per_save": progress.checkpoint_seconds / max(progress.saves, 1),
        "skipped_steps": progress.skipped,
        "spikes": progress.spikes,
        "budget": None if verdict is None else verdict.as_dict(),
    }


def peak_flops_per_s(dtype: str, mesh: jax.sharding.Mesh) -> float | None:
    """Of all the devices of a mesh together; None where nobody has published it."""
    device = mesh.devices.flat[0]
    peak = device_peak(device)
    if peak is None:
        return None
    # Host devices share one processor, whose peak was measured as a whole.
    return peak.flops_per_s(dtype) * (1 if device.platform == "cpu" else mesh.size)
