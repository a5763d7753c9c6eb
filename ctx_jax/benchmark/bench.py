"""All models, types and shapes, one race after the other."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from ctx_jax.benchmark.peers import PEERS, Peer
from ctx_jax.benchmark.process import importable
from ctx_jax.benchmark.race import Race, Row, Setting, race
from ctx_jax.benchmark.subjects import Subject
from ctx_jax.benchmark.work import Pool, Shape, Work, rows, texts
from ctx_jax.errors import InputError, did_you_mean


def find_peers(names: Sequence[str] | None, python: str) -> tuple[list[Peer], list[Peer]]:
    """Peers by name, those that a Python has and those that it has not; None is all.

    Raises:
      InputError: a name is unknown, some were asked for and none of them is there, or there is no such Python.
    """
    for name in names or ():
        if name not in PEERS:
            raise InputError(f"--peers: found {name!r}{did_you_mean(name, PEERS)}, expected some of {', '.join(PEERS)}")
    wanted = [PEERS[name] for name in dict.fromkeys(PEERS if names is None else names)]
    there = importable(python, {module for peer in wanted for module in peer.needs})
    found = [peer for peer in wanted if there.issuperset(peer.needs)]
    missing = [peer for peer in wanted if peer not in found]
    if names and not found:
        raise InputError(
            f"--peers: found none of {', '.join(names)} in {python}, expected at least one; pip install"
            ' "ctx-jax[bench]" brings them all, and --peer-python names another Python'
        )
    return found, missing


def bench(
    subjects: Sequence[Subject],
    work: Sequence[Shape] | Sequence[str],
    dtypes: Sequence[str],
    peers: Sequence[Peer],
    missing: Sequence[Peer],
    setting: Setting,
    *,
    pool: Pool | None = None,
    show_progress: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[Race]:
    """Races, each as soon as it is run: by type, then by shape, then by model.

    Args:
      subjects: models.
      work: shapes of rows, or texts.
      dtypes: of the computation.
      peers: who runs beside us.
      missing: who would, but is not installed; has a row all the same.
      setting: of all runs.
      pool: of the vectors of rows, before they are fetched; texts are pooled anyway.
      show_progress: a bar on standard error, with the time left.
      say: is told who has started, in words.

    Raises:
      InputError: a model cannot do the work; before anything is run.
    """
    shapes = [shape for shape in work if isinstance(shape, Shape)]
    lines = [line for line in work if not isinstance(line, Shape)]
    with tempfile.TemporaryDirectory() as name:
        planned = []
        for number, shape in enumerate(shapes or [None]):
            for subject in subjects:
                folder = pathlib.Path(name) / f"{number}-{len(planned)}"
                folder.mkdir()
                what = rows(subject, shape, folder, pool) if shape else texts(subject, lines, folder)
                planned.append((subject, what))
        total = len(planned) * len(dtypes) * setting.repeats
        with tqdm(total=total, disable=not show_progress, unit="round") as bar:
            for dtype in dtypes:
                for subject, what in planned:
                    bar.set_description(f"{subject.name} {dtype}")
                    able, left_out = _able(subject, what, dtype, peers, missing)
                    where, done = what.inputs.parent, bar.update
                    yield race(subject, what, dtype, able, setting, where, left_out=left_out, done=done, say=say)


def _able(
    subject: Subject, work: Work, dtype: str, peers: Sequence[Peer], missing: Sequence[Peer]
) -> tuple[list[Peer], list[Row]]:
    """Peers that can do the work, and rows of those that cannot."""
    kind = "texts" if work.shape is None else "ids"
    alone = subject.alone or (subject.alone_with_texts if kind == "texts" else None)
    if alone is not None:
        return [], [Row("peers", "left out", alone)] if peers else []
    able, left_out = [], [Row(peer.name, "left out", "not installed") for peer in missing]
    for peer in peers:
        reasons = [peer.unable[what] for what in (kind, dtype) if what in peer.unable]
        if reasons:
            left_out.append(Row(peer.name, "left out", reasons[0]))
        else:
            able.append(peer)
    return able, left_out
