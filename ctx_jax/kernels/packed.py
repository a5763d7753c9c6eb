"""Query, key and value as one array, as kernels read it: [B, T, G · 3 · C].

G groups of heads lie side by side; a group's C columns of queries are followed by those of its keys and of its values,
and hold its heads one after the other. So heads can be divided over devices, and nothing is transposed on the way.
"""

from __future__ import annotations

from typing import NamedTuple

LANES = 128
"""Values of a line of a TPU's register; rows that kernels take are a multiple of so many tokens."""


class Heads(NamedTuple):
    """How heads lie in a packed array.

    Attributes:
      count: H.
      width: K.
      together: heads of a group.
    """

    count: int
    width: int
    together: int

    @property
    def columns(self) -> int:
        """C, of a group's queries."""
        return self.together * self.width


def heads_of(count: int, width: int) -> Heads:
    """As many heads in a group as fill the lanes, where they do; else one."""
    together = LANES // width if LANES % width == 0 else 1
    return Heads(count, width, together if count % together == 0 else 1)
