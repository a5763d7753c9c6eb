"""Config files: Python files that define one `config`."""

import importlib.util
import pathlib
from typing import Any

from ctx_jax.errors import InputError, did_you_mean


def load_config(path: pathlib.Path) -> Any:
    """The `config` of a Python file."""
    from ctx_jax.experiment import Experiment

    if not path.is_file():
        near = (
            did_you_mean(path.name, [entry.name for entry in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        )
        raise InputError(f"{path}: no such config file{near}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}: {kind}{error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Experiment):
        raise InputError(f"{path}: `config` is {type(config).__name__}, expected ctx_jax.Experiment")
    return config
