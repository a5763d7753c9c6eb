"""Races between processes of a few lines: order, comparison of outputs, deaths; the table and the JSON of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ctx_jax.benchmark import report
from ctx_jax.benchmark.bench import bench
from ctx_jax.benchmark.race import WARM_UP, cores_for, race
from ctx_jax.benchmark.work import Shape, rows


@pytest.fixture
def work(subject, tmp_path):
    return rows(subject, Shape(3, 5), tmp_path)


def test_everybody_runs_in_turn(subject, work, setting, make_peer, log, tmp_path):
    rounds = []
    found = race(subject, work, "float32", [make_peer("one"), make_peer("two")], setting, tmp_path, done=rounds.append)
    # First each alone: for the clock, and for the output.
    started = [name for name in ("ours", "one", "two") for _ in range(2)]
    assert log() == started + ["ours", "one", "two"] * (WARM_UP + setting.repeats)
    assert rounds == [1] * setting.repeats
    ours, *others = found.rows
    assert (ours.status, ours.ratio, ours.difference) == ("measured", None, None)
    for row in (ours, *others):
        assert row.figures.runs == setting.repeats
        assert 0 < row.figures.median_s <= row.figures.p95_s <= row.figures.p99_s < row.start_s
        assert row.peak_bytes > 1 << 20
    for row in others:
        assert row.difference == 0
        assert row.ratio == pytest.approx(row.figures.median_s / ours.figures.median_s)
    assert found.peak.source == "said here"
    assert found.floor.compute_seconds == work.matrix_flops / 1e9
    assert not report.failed([found])


MEETING = """
import time

alone = load


def load(folder, options):
    (pathlib.Path(folder) / "{name} is here").touch()
    end = time.monotonic() + 20
    while not (pathlib.Path(folder) / "{other} is here").exists():
        if time.monotonic() > end:
            sys.exit("nobody came")
        time.sleep(0.01)
    return alone(folder, options)
"""


def test_with_cores_for_all_peers_start_at_once(subject, work, setting, make_peer, tmp_path):
    """Each of two waits for the other before it has loaded; somebody is told who has started."""
    peers, said = [make_peer("one"), make_peer("two", runs=2)], []
    for peer, other in zip(peers, ("two", "one"), strict=True):
        peer.file.write_text(peer.file.read_text() + MEETING.format(name=peer.name, other=other))
    ours, one, two = race(subject, work, "float32", peers, replace(setting, threads=8), tmp_path, say=said.append).rows
    assert (ours.status, one.status, two.status) == ("measured", "measured", "failed")
    assert said[0].startswith("tiny: ours had its first result after ")
    assert sorted(line.split(" after ")[0] for line in said[1:]) == [
        f"tiny: {x} had its first result" for x in ("one", "two")
    ]


def test_other_outputs_have_no_ratio(subject, work, setting, make_peer, log, tmp_path):
    found = race(subject, work, "float32", [make_peer("other", scale=1.01), make_peer("same")], setting, tmp_path)
    _, other, same = found.rows
    assert other.status == "differs"
    assert other.difference == pytest.approx(0.01, rel=1e-4)
    assert "outputs differ by 1.0e-02, expected 0.0001" in other.note
    assert other.ratio is other.figures is None
    assert same.ratio > 0
    assert log().count("other") == 2
    assert report.failed([found])
    # In bfloat16 that is near enough.
    (_, other) = race(subject, work, "bfloat16", [make_peer("other", scale=1.01)], setting, tmp_path).rows
    assert other.ratio > 0


def test_means_of_rows_are_compared_as_they_are(subject, setting, make_peer, tmp_path):
    work = rows(subject, Shape(3, 5), tmp_path, "mean")
    assert work.mask is None
    found = race(subject, work, "float32", [make_peer("other", scale=1.01), make_peer("same")], setting, tmp_path)
    assert np.load(tmp_path / "ours.npy").shape == (3, 8), "one vector a row"
    _, other, same = found.rows
    assert (other.status, same.status, same.difference) == ("differs", "measured", 0)
    assert report.title(found) == "3 × 5, float32, mean of each row"


@pytest.mark.parametrize("runs", [0, 1, 4, WARM_UP + 4])
def test_who_dies_is_out_and_the_others_go_on(runs, subject, work, setting, make_peer, tmp_path):
    found = race(subject, work, "float32", [make_peer("weak", runs=runs), make_peer("same")], setting, tmp_path)
    ours, weak, same = found.rows
    assert weak.status == "failed"
    assert "ended with exit code 1" in weak.note
    assert "no more runs" in weak.note
    assert ours.figures.runs == same.figures.runs == setting.repeats
    assert report.failed([found])


def test_without_us_the_others_have_figures(subject, work, setting, make_peer, tmp_path):
    import dataclasses

    weak = dataclasses.replace(setting, ours=make_peer("ours", runs=0))
    found = race(subject, work, "float32", [make_peer("same")], weak, tmp_path)
    assert [row.status for row in found.rows] == ["failed", "measured"]
    assert found.rows[1].ratio is found.peak is found.floor is None
    assert any("failed" in line for line in report.lines(found))


def test_another_device_has_no_ratio(subject, work, setting, make_peer, tmp_path):
    found = race(subject, work, "float32", [make_peer("far", device="gpu")], setting, tmp_path)
    assert found.rows[1].ratio is None
    assert found.rows[1].note == "ran on the gpu, ours on the cpu"


def test_tables_and_json(subject, setting, make_peer):
    peers = [
        make_peer("same"),
        make_peer("other", scale=2.0),
        make_peer("only-texts", unable={"ids": "takes texts only"}),
        make_peer("narrow", unable={"bfloat16": "has no bfloat16"}),
    ]
    missing = [make_peer("absent", needs=("nowhere",))]
    shapes = [Shape(1, 16), Shape(2, 8)]
    found = list(bench([subject], shapes, ["float32", "bfloat16"], peers, missing, setting))
    assert [report.title(one) for one in found] == [
        "1 × 16, float32, all vectors", "2 × 8, float32, all vectors",
        "1 × 16, bfloat16, all vectors", "2 × 8, bfloat16, all vectors",
    ]  # fmt: skip
    record = json.loads(json.dumps(report.as_json(found, setting, ["ctx-jax", "bench"])))
    assert record["machine"]["threads"] == 1
    assert record["machine"]["processor"]
    for one, told in zip(found, record["races"], strict=True):
        shown = [*report.head(one), *report.lines(one)]
        assert all(len(line) <= 120 for line in shown), shown
        assert any(line.startswith("  roofline") for line in shown)
        assert told["pool"] is None
        by_name = {row["who"]: row for row in told["rows"]}
        assert by_name["absent"]["note"] == "not installed"
        assert by_name["only-texts"]["note"] == "takes texts only"
        assert by_name["other"]["status"] == "differs"
        assert by_name["narrow"]["status"] == ("left out" if told["dtype"] == "bfloat16" else "measured")
        figures = by_name["same"]["figures"]
        assert figures["tokens_per_s"] == pytest.approx(16 / figures["median_s"])
        assert figures["sentences_per_s"] == pytest.approx(told["shape"]["batch"] / figures["median_s"])
        assert figures["flops_per_s"] == pytest.approx(told["matrix_flops"] / figures["median_s"])
        assert figures["share_of_peak"] == pytest.approx(figures["flops_per_s"] / 1e9)
        (line,) = [line for line in shown if line.startswith("  same")]
        assert line.split()[1].replace(",", "") == f"{1000 * figures['median_s']:.{_digits(figures['median_s'])}f}"
        assert line.split()[-1] == f"{by_name['same']['ratio']:.2f}"


def _digits(seconds):
    return max(0, 2 - max(0, math.floor(math.log10(1000 * seconds))))


def test_cores():
    import os

    available = sorted(os.sched_getaffinity(0))
    assert list(cores_for(None)) == available
    assert list(cores_for(1)) == available[-1:]
