"""From dataclasses to command lines."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from ctx_jax.errors import InputError

Folder = Annotated[pathlib.Path, arg(metavar="DIR")]
OptionalPath = Annotated[pathlib.Path | None, arg(metavar="PATH")]


def parse(kind: type, name: str, argv: Sequence[str], *markers: Any) -> Any:
    """The words of a command line as a dataclass; unknown or malformed ones exit with 2."""
    return tyro.cli(kind, prog=f"ctx-jax {name}", args=list(argv), config=markers)


def command(kind: type, run: Callable[[Any], int], name: str) -> Callable[[Sequence[str]], int]:
    """A function of a dataclass as a function of the words that make one."""
    return lambda argv: run(parse(kind, name, argv, tyro.conf.FlagCreatePairsOff))


def parse_layers(words: str) -> str | list[int]:
    """`all`, `last`, or numbers with commas between."""
    if words in ("all", "last"):
        return words
    try:
        return [int(number) for number in words.split(",")]
    except ValueError as error:
        raise InputError(f"--layers: found {words!r}, expected all, last or numbers like 0,6") from error
