"""JSON that says nothing twice."""

from __future__ import annotations

import json
from typing import Any

from ctx_jax.errors import InputError
from ctx_jax.interop.files.tensors import short


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = set()
        again = next(name for name, _ in pairs if name in names or names.add(name))
        raise ValueError(f"{short.repr(again)} stands there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


_JSON = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_no_number)


def parse_json(text: bytes, where: str) -> Any:
    """The value of a text in which no name stands twice. Raises InputError; `where` begins the message."""
    try:
        return _JSON.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be read ({error}), expected JSON") from error
