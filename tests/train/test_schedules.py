"""Learning-rate curves against the closed formulas in float64 and against the published table."""

import json
import math

import jax
import numpy as np
import optax
import pytest

from ctx_jax.errors import InputError
from ctx_jax.train.schedules import KINDS, Schedule

HUGGING_FACE = {"num_warmup_steps": "warmup_steps", "num_training_steps": "total_steps", "num_cycles": "cycles"}
HUGGING_FACE |= {"power": "power", "lr_end": "end"}


def closed_form(kind, step, peak, warmup, total, end=0.0, power=1.0, cycles=None):
    """The curves as the originals write them, in float64."""
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if kind in ("constant", "constant_with_warmup"):
        return peak
    if kind == "linear":
        return peak * max(0.0, (total - step) / max(1, total - warmup))
    if kind == "bert_linear":
        return peak * (1 - min(step, total) / total)
    if kind == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * (0.5 if cycles is None else cycles) * 2 * progress)))
    if kind == "cosine_hard_restarts":
        turns = (1 if cycles is None else cycles) * progress
        return 0.0 if progress >= 1 else peak * max(0.0, 0.5 * (1 + math.cos(math.pi * (turns % 1.0))))
    return end if step > total else (peak - end) * (1 - progress) ** power + end


CASES = [
    {"kind": "constant"},
    {"kind": "constant_with_warmup", "warmup_steps": 7},
    {"kind": "linear", "warmup_steps": 10},
    {"kind": "linear"},
    {"kind": "bert_linear", "warmup_steps": 10},
    {"kind": "cosine", "warmup_steps": 10},
    {"kind": "cosine", "warmup_steps": 3, "cycles": 1.5},
    {"kind": "cosine_hard_restarts", "warmup_steps": 10},
    {"kind": "cosine_hard_restarts", "warmup_steps": 1, "cycles": 3},
    {"kind": "polynomial", "warmup_steps": 10, "power": 2.0, "end": 1e-7},
    {"kind": "polynomial", "power": 0.5},
]


def oracle(case, steps, total, peak):
    rest = {name: case[name] for name in ("end", "power", "cycles") if name in case}
    return np.array([closed_form(case["kind"], s, peak, case.get("warmup_steps", 0), total, **rest) for s in steps])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("total", [97, 1_000_000])
def test_equals_the_closed_form(case, total):
    peak = 3e-4
    steps = np.unique(np.concatenate([np.arange(60), np.linspace(0, total, 500, dtype=int)]))
    expected = oracle(case, steps.tolist(), total, peak)
    schedule = Schedule(**{"peak": peak, "total_steps": total, **case}).build()
    lrs = schedule(steps)
    assert lrs.dtype == np.float32
    np.testing.assert_allclose(lrs, expected, rtol=1e-6, atol=1e-12 * peak)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule(steps), expected, rtol=1e-9, atol=1e-15)


def test_every_kind_has_a_case():
    assert {case["kind"] for case in CASES} == set(KINDS)


def test_published_curves(reference):
    table = json.loads((reference / "lr_schedules" / "expected.json").read_text())
    steps = range(table["num_steps"])
    seen = set()
    for kind, case in table["cases"].items():
        settings = {HUGGING_FACE[name]: value for name, value in case["args"].items()}
        settings = {"kind": kind, "total_steps": table["num_steps"], **settings}
        total, peak = settings.pop("total_steps"), table["base_lr"]
        exact = oracle(settings, steps, total, peak)
        # The table cuts the digits off rather than rounding them, most often after two decimals.
        cut_off = exact - np.array(case["lrs"])
        assert np.all((cut_off > -1e-9) & (cut_off < 0.01)), (kind, cut_off)
        schedule = Schedule(peak=peak, total_steps=total, **settings).build()
        np.testing.assert_allclose([schedule(s) for s in steps], exact, rtol=1e-6, atol=1e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose([schedule(s) for s in steps], exact, rtol=1e-9, atol=1e-12)
        seen.add(kind)
    assert seen == set(KINDS) - {"bert_linear"}


def test_last_steps_of_a_long_run_keep_their_digits():
    """Where optax's own polynomial loses them: the reason for the integer differences."""
    total = 1_000_000
    steps = np.arange(total - 20, total)
    expected = (total - steps) / total
    ours = Schedule(kind="linear", peak=1.0, total_steps=total).build()(steps)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    theirs = optax.polynomial_schedule(1.0, 0.0, 1, total)(steps)
    assert np.max(np.abs(theirs / expected - 1)) > 1e-3


def test_bert_steps_down_where_the_warmup_ends():
    schedule = Schedule(kind="bert_linear", peak=1.0, warmup_steps=10, total_steps=100).build()
    np.testing.assert_allclose([schedule(9), schedule(10)], [0.9, 0.9], rtol=1e-6)
    assert Schedule(kind="linear", peak=1.0, warmup_steps=10, total_steps=100).build()(10) == 1.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_holds_its_last_value_after_the_end(case):
    schedule = Schedule(**{"total_steps": 50, **case}).build()
    assert schedule(50) == schedule(51) == schedule(10_000)


def test_scalar_inside_jit():
    schedule = Schedule(kind="cosine", peak=1.0, warmup_steps=2, total_steps=10).build()
    lr = jax.jit(schedule)(np.int32(6))
    assert lr.shape == ()
    assert lr.dtype == np.float32
    np.testing.assert_allclose(lr, 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosin"}, r"Schedule.kind: 'cosin' \(did you mean 'cosine'\?\), expected one of constant"),
        ({"warmup_steps": 11, "total_steps": 10}, "Schedule.warmup_steps: 11, expected at most total_steps = 10"),
        ({"warmup_steps": -1}, "Schedule.warmup_steps: -1, expected at least 0"),
        ({"total_steps": 0}, "Schedule.total_steps: 0, expected at least 1"),
        ({"peak": -1e-4}, "Schedule.peak: -0.0001, expected"),
        ({"peak": math.nan}, "Schedule.peak: nan, expected"),
        ({"end": math.inf}, "Schedule.end: inf, expected"),
        ({"kind": "constant", "warmup_steps": 5}, r"did you mean 'constant_with_warmup'\?"),
        ({"kind": "cosine", "end": 1e-6}, "Schedule.end: 1e-06 with kind 'cosine'; only linear and polynomial use it"),
        ({"kind": "linear", "power": 2.0}, "Schedule.power: 2.0 with kind 'linear'; only polynomial use it"),
        ({"kind": "linear", "cycles": 2.0}, "Schedule.cycles: 2.0 with kind 'linear'; only cosine and"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        Schedule(**settings)
