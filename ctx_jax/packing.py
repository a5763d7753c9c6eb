"""Which examples share a row."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def pack(lengths: Int[np.ndarray, "E"], length: int, per_row: int) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "E"]]:
    """Best fit: each example joins the row with the least room that still holds it, else begins one.

    Args:
      lengths: of the examples, at least 1 and at most `length`; from the longest to the shortest they fit best.
      length: of a row.
      per_row: examples of a row, at most.

    Returns:
      `rows` and `order`: row r holds the examples `order[rows[r] : rows[r + 1]]`, end to end.
    """
    if per_row == 1:
        return np.arange(len(lengths) + 1, dtype=np.int64), np.arange(len(lengths), dtype=np.int64)
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set when some open row has room for exactly r tokens
    for example, size in enumerate(lengths.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(example)
        if len(rows[row]) < per_row and room > size:
            by_room[room - size].append(row)
            rooms |= 1 << (room - size)
    order = np.array([example for row in rows for example in row], np.int64)
    return np.cumsum([0, *map(len, rows)], dtype=np.int64), order
