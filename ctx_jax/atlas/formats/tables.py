"""What tables of lines have in common: two files with a line each for the same thing, and numbers in columns."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator

from ctx_jax.atlas.formats.files import wrong

# Number and text of each line, and the name of the file that errors give.
File = tuple[str | os.PathLike, Iterable[tuple[int, str]]]


def paired(first: File, second: File) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    """The lines of two files side by side.

    Raises:
      InputError: one that has more lines; blank ones at the end are none.
    """
    sides = [_without_blank_end(lines) for _, lines in (first, second)]
    while True:
        one, two = (next(side, None) for side in sides)
        if one is None and two is None:
            return
        if one is None or two is None:
            (longer, number), shorter = (
                ((first[0], one[0]), second[0]) if two is None else ((second[0], two[0]), first[0])
            )
            raise wrong(longer, number, f"{os.fspath(shorter)} ends before", "as many lines in both")
        yield one, two


def _without_blank_end(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    blank: list[tuple[int, str]] = []
    for line in lines:
        if line[1].strip():
            yield from blank
            blank = []
            yield line
        else:
            blank.append(line)


def index(text: str, length: int) -> int | None:
    """A place in a sequence of this length, from 0; None where the text is no such number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < length else None


def score(text: str, lowest: float, highest: float) -> float | None:
    """A number within bounds; None where the text is no such number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and lowest <= value <= highest else None
