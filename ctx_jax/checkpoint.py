"""Checkpoints that are either whole or not there: asynchronous, sharded, and checked down to the last bit.

Orbax writes the arrays and makes a save atomic: a folder gets its name when it is complete. It does not notice when a
file changes afterwards, for the arrays' bytes carry no checksum. So beside the arrays lies a description of every leaf
(shape, type, checksum), with a checksum of its own. The leaves' checksums are taken on the devices, where the arrays
are: no file is read twice, no host needs another host's shards, and what is checked after restoring are the very values
that training goes on with.

On disk a step is `<folder>/<step>/state`, Orbax's own format, and `<folder>/<step>/about/metadata`, JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.hosts import on_first_process
from ctx_jax.leaves import checksums, describe_leaves, kind_of, named_leaves

# Orbax takes up to half a second to import: functions that need it import it themselves.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp
    from etils import epath

log = logging.getLogger("ctx_jax.checkpoint")

_FORMAT = 1
_ASIDE = ".replaced"


class Restored(NamedTuple):
    """What a checkpoint held: the arrays in the structure and shardings asked for, and what was saved beside them."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: a folder each, the newest few kept, and the best.

    `with Checkpoints(folder) as checkpoints:` waits at the end for what is still being written. Looking and restoring
    change nothing on disk; what a killed process left half-written is cleared away by the next one's first save.

    Several processes (jax.distributed) call every method together, on a folder that all of them see.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep_last: int = 3, keep_best: int = 0, asynchronous: bool = True
    ):
        """Nothing is read or written yet.

        Args:
          folder: is made by the first save.
          keep_last: how many of the newest to keep.
          keep_best: how many of those with the lowest score to keep besides, however old.
          asynchronous: return from `save` as soon as the arrays are off the devices, and write in the background.
        """
        if keep_last < 1:
            raise InputError(f"Checkpoints.keep_last: {keep_last}, expected at least 1")
        if keep_best < 0:
            raise InputError(f"Checkpoints.keep_best: {keep_best}, expected at least 0")
        from etils import epath

        self.folder = epath.Path(folder).resolve()
        self.keep_best = keep_best
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._manager: ocp.CheckpointManager | None = None
        # Step that was restored or saved last: what the folder holds beyond it belongs to what was turned back from.
        self._current: int | None = None
        self._scores: dict[int, float | None] = {}

    def save(
        self, step: int, state: Any, metadata: dict[str, Any], *, score: float | None = None, wait: bool = False
    ) -> None:
        """Saves a step. Waits for the save before it; the state may be donated as soon as this returns.

        After an older checkpoint was restored, the first save removes the later ones. A step that is there already is
        left alone if its content is the same, else replaced.

        Args:
          step: after the steps in the folder, or at least the one restored or saved last.
          state: pytree of jax.Array, sharded or not; of PRNG keys their numbers (jax.random.key_data).
          metadata: anything that JSON can hold.
          score: how good this very state is, lower is better; without one it is never among the best.
          wait: return only when everything is on disk.

        Raises:
          InputError: a leaf or the metadata cannot be saved, or the step would overwrite what was not restored.
          OSError: this save, or the one before it, was not written: disk full, no permission, …
        """
        import orbax.checkpoint as ocp

        self.wait()
        existing = self.steps()
        first = self._current if self._current is not None else max(existing, default=-1) + 1
        if step < first:
            found = f"{self.folder} holds step {max(existing, default=self._current)}"
            raise InputError(f"{found}: cannot save step {step}, expected at least {first} (or to restore before)")
        leaves = named_leaves(state)
        about = _describe(leaves, metadata, score)
        if step in existing and self._holds(step, about):
            return
        with self._writing(step):
            if self._manager is None:
                on_first_process(self._put_back)
            replaced = self._set_aside(step) if step in existing else None
            manager = self._open()
            for other in existing:
                if other > first and other != step:
                    log.warning("%s: removed, the run goes on from step %d", self._path(other), first)
                    manager.delete(other)
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), about=ocp.args.JsonSave(about))
            self._scores[step] = score
            manager.save(step, args=items, force=True)
            self._current = step
            if wait or replaced is not None:
                manager.wait_until_finished()
        if replaced is not None:
            on_first_process(replaced.rmtree)

    def restore(self, like: Any, step: int | None = None, *, partial: bool = False) -> Restored | None:
        """The newest checkpoint that is whole, or that of `step`; None where there is none at all.

        A damaged one is passed over for the one before it, with a warning in the log `ctx_jax.checkpoint`.

        Args:
          like: pytree of jax.ShapeDtypeStruct with shardings, or of arrays: the structure, shapes, types and
            shardings to restore. Shardings and number of devices need not be those of the save. Leaves without a
            sharding go to the first device.
          step: this one and no other.
          partial: `like` may be a part of what was saved: the parameters without the optimizer's moments.

        Raises:
          InputError: `like` does not fit what was saved; there is no such step; it, or every one, is damaged.
        """
        self.wait()
        existing = self.steps()
        if step is not None:
            self._require(step, existing)
        damages = []
        for candidate in reversed(existing) if step is None else [step]:
            path = self._path(candidate)
            try:
                about = _read_about(path)
                state = _read_arrays(path, about, like, partial)
            except _DamagedError as damage:
                log.warning("%s: damaged, passed over: %s", path, damage)
                damages.append(f"step {candidate}: {damage}")
            else:
                self._current = candidate
                return Restored(candidate, state, about["metadata"])
        if damages:
            raise InputError(f"{self.folder}: no usable checkpoint, tried {'; '.join(damages)}")
        return None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first; whether they are undamaged shows when they are read."""
        import orbax.checkpoint as ocp

        if not self.folder.exists():
            return []
        complete = {found.step for found in ocp.step.standard_name_format().find_all(self.folder)}
        return sorted(complete | {int(path.stem) for path in self.folder.glob(f"*{_ASIDE}")})

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step.

        Raises:
          InputError: there is no such step, or it is damaged.
        """
        return self._about(step)["metadata"]

    def best(self) -> int | None:
        """The step with the lowest score; None where none has one."""
        return min((step for step in self.steps() if self._score(step) is not None), key=self._score, default=None)

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          OSError: what was being written could not be.
        """
        if self._manager is not None:
            with self._writing(self._current):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        self.wait()
        self._drop()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, step: int) -> epath.Path:
        path, aside = self.folder / str(step), self.folder / f"{step}{_ASIDE}"
        return aside if not path.exists() and aside.exists() else path

    def _require(self, step: int, existing: list[int]) -> None:
        if step not in existing:
            expected = f"one of {', '.join(map(str, existing))}" if existing else "a folder with checkpoints"
            raise InputError(f"{self.folder}: no step {step}, expected {expected}")

    def _about(self, step: int) -> dict[str, Any]:
        self._require(step, self.steps())
        try:
            return _read_about(self._path(step))
        except _DamagedError as damage:
            raise InputError(f"{self._path(step)}: damaged: {damage}") from damage

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            try:
                self._scores[step] = _read_about(self._path(step)).get("score")
            except _DamagedError:
                self._scores[step] = None
        return self._scores[step]

    def _holds(self, step: int, about: dict[str, Any]) -> bool:
        try:
            return _crc32(_read_about(self._path(step))) == about["crc32"]
        except _DamagedError:
            return False

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(self._keep_last, self.keep_best, self._score),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=self._asynchronous,
                lightweight_initialize=True,  # else a damaged step can keep the folder from being opened
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _put_back(self) -> None:
        """Clears up after a process that was killed while it replaced a step."""
        for aside in self.folder.glob(f"*{_ASIDE}"):
            path = self.folder / aside.stem
            if path.exists():
                aside.rmtree()
            else:
                aside.rename(path)

    def _set_aside(self, step: int) -> epath.Path:
        """Renames a step that is about to be replaced: until the new one is complete it goes on counting."""
        aside = self.folder / f"{step}{_ASIDE}"
        self._drop()  # it would go on taking the step for being there
        on_first_process(lambda: (self.folder / str(step)).rename(aside))
        return aside

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Orbax counts a failed step among those to keep: start afresh from what is on disk.
            self._drop()
            raise OSError(f"{self.folder}: step {step} was not written: {_brief(error)}") from error

    def _drop(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # what failed has been reported
                manager.close()


class _NewestAndBest(NamedTuple):
    """Orbax's policy of which steps stay. Its own BestN knows no score of what an earlier process saved."""

    newest: int
    best: int
    score: Callable[[int], float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = sorted((step for step in steps if self.score(step) is not None), key=self.score)[: self.best]
        return [step in steps[-self.newest :] or step in best for step in steps]


def save_weights(folder: str | os.PathLike[str], params: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes the weights of a finished run, in the format of a checkpoint of step 0.

    Args:
      folder: new or empty.
      params: nested dict of jax.Array.
      metadata: anything that JSON can hold, such as the model's config.

    Raises:
      InputError: the folder holds weights already, or the params are no nested dict of arrays.
      OSError: they were not written.
    """
    checkpoints = Checkpoints(folder, keep_last=1, asynchronous=False)
    if existing := checkpoints.steps():
        raise InputError(f"{checkpoints.folder}: holds step {existing[-1]} already, expected a new folder")
    for path, _ in jax.tree_util.tree_leaves_with_path(params):  # else `like` would be needed to load them
        keys = [getattr(key, "key", key) for key in path]
        if not keys or not all(isinstance(key, str) and key and "/" not in key for key in keys):
            raise InputError(f"params: found a leaf under {keys}, expected a nested dict, and keys without '/'")
    with checkpoints:
        checkpoints.save(0, params, metadata)


def load_weights(folder: str | os.PathLike[str], like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Weights and metadata that `save_weights` wrote.

    Args:
      folder: where they are.
      like: as for `Checkpoints.restore`; None: the nested dict as it was saved, on the first device.

    Raises:
      InputError: there are none, they are damaged, or `like` does not fit.
    """
    checkpoints = Checkpoints(folder)
    if like is None:
        from flax.traverse_util import unflatten_dict  # takes a third of a second

        leaves = checkpoints._about(0)["leaves"].items()
        shapes = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves}
        like = unflatten_dict(shapes, sep="/")
    restored = checkpoints.restore(like, 0)
    return restored.state, restored.metadata


class _DamagedError(Exception):
    """What is on disk is not what was saved."""


def _everywhere(succeeded: bool) -> bool:
    """Whether it succeeded on every process: all must agree on the checkpoint that they go on from."""
    if jax.process_count() == 1:
        return succeeded
    return bool(np.all(multihost_utils.process_allgather(np.array(succeeded))))


def _cause(error: BaseException) -> BaseException:
    return _cause(error.__cause__) if error.__cause__ else error


def _brief(error: BaseException) -> str:
    """One line of an error: TensorStore's run over pages, with the cause at the end."""
    error = _cause(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else f'{text[:200]} … {text[-200:]}'}"


def _describe(leaves: dict[str, jax.Array], metadata: dict[str, Any], score: float | None) -> dict[str, Any]:
    described = describe_leaves(leaves)
    try:
        text = json.dumps({"format": _FORMAT, "metadata": metadata, "score": score, "leaves": described})
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata of a checkpoint: {error}, expected what JSON can hold") from error
    content = json.loads(text)
    return {"content": content, "crc32": _crc32(content)}


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _read_about(path: epath.Path) -> dict[str, Any]:
    """The description of a step, checked."""
    try:
        about = json.loads((path / "about" / "metadata").read_text())
        content, crc32 = about["content"], about["crc32"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"about/metadata: {_brief(error)}") from error
    if crc32 != _crc32(content):
        raise _DamagedError("about/metadata: the checksum does not match")
    if content["format"] != _FORMAT:
        raise InputError(f"{path}: found format {content['format']}, expected {_FORMAT}")
    return content


def _read_arrays(path: epath.Path, about: dict[str, Any], like: Any, partial: bool) -> Any:
    """The arrays of a step in the structure of `like`, checked."""
    import orbax.checkpoint as ocp

    wanted = named_leaves(like)
    saved = {name: leaf for name, leaf in about["leaves"].items() if name in wanted or not partial}
    _require_fit(path, saved, wanted)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
        for name, leaf in wanted.items()
    }
    how = ocp.checkpoint_utils.construct_restore_args(targets)
    damage = ""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(path / "state", args=ocp.args.PyTreeRestore(targets, how, partial_restore=partial))
    except Exception as error:
        if isinstance(_cause(error), (MemoryError, PermissionError, jax.errors.JaxRuntimeError)):
            raise  # says nothing about the files
        damage = _brief(error)
    if not _everywhere(not damage):
        raise _DamagedError(f"state: {damage or 'another process could not read it'}")
    found = checksums(arrays)
    for name, leaf in saved.items():
        if leaf["checksum"] != found[name]:
            raise _DamagedError(f"leaf {name}: the checksum does not match")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _require_fit(path: epath.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise InputError(f"{path}: leaf {name}: not found{did_you_mean(name, saved)}, expected {kind_of(leaf)}")
        if (found := {key: saved[name][key] for key in ("shape", "dtype")}) != kind_of(leaf):
            raise InputError(f"{path}: leaf {name}: found {found}, expected {kind_of(leaf)}")
    for name in sorted(saved.keys() - wanted.keys()):
        raise InputError(f"{path}: leaf {name}: found{did_you_mean(name, wanted)}, expected no such leaf")
