"""JAX's coordination service, as far as it is used here: the one file that uses what JAX has not made public.

That is `jax._src.distributed.global_state`, whose client is the way to the key-value store, and
`jax._src.clusters.ClusterEnv`. Both are the same in jax 0.10 to 0.12; where they are not, `Store` says what is missing.
"""

from __future__ import annotations

from typing import Any

import jax

from ctx_jax.errors import InputError

_PREFIX = "ctx_jax/"
_forgotten: list[Any] = []


class Store:
    """The key-value store of JAX's coordination service, as far as it is used here."""

    def __init__(self) -> None:
        self._client = _state().client
        for name in ("key_value_set", "key_value_dir_get", "wait_at_barrier"):
            if not hasattr(self._client, name):
                raise RuntimeError(
                    f"jax {jax.__version__}: its coordination client has no {name}, which ctx_jax.hosts needs and jax"
                    " 0.10 to 0.12 have; --hosts cannot be used with it"
                )

    def set(self, key: str, value: str) -> None:
        self._client.key_value_set(_PREFIX + key, value, allow_overwrite=True)

    def set_first(self, key: str, value: str) -> None:
        """Sets what nobody has set before."""
        try:
            self._client.key_value_set(_PREFIX + key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def read(self) -> dict[str, str]:
        """All that was set."""
        return {key.removeprefix(_PREFIX): value for key, value in self._client.key_value_dir_get(_PREFIX)}

    def barrier(self, name: str, seconds: float) -> None:
        self._client.wait_at_barrier(_PREFIX + name, int(1000 * seconds))


def detect(seconds: float) -> tuple[str, int, int, Any]:
    """Coordinator, number of processes, this one's id and its devices, as JAX finds them."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(seconds))
    except Exception as error:
        raise InputError(f"--hosts.auto: {type(error).__name__}: {error}") from error
    if None in found[:3]:
        raise InputError(
            "--hosts.auto: found no Cloud TPU, Slurm, Open MPI or Kubernetes here; expected one of them, or"
            " --hosts.coordinator, --hosts.num-processes and --hosts.process-id"
        )
    return found


def _state() -> Any:
    from jax._src import distributed

    return distributed.global_state


def forget() -> None:
    """Keeps JAX from waiting, when Python ends, for processes that do not come any more."""
    state = _state()
    _forgotten.append((state.client, state.service))  # to be destroyed is to wait, too
    state.client = state.service = None
