"""Splits of a corpus that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ctx_jax.atlas.records import Examples


class Splits(Mapping[str, Examples]):
    """`train`, `dev`, `test` → what is read, once, when it is first asked for, and kept.

    Args:
      readers: one for each split.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Examples]]):
        self._readers = dict(readers)
        self._read: dict[str, Examples] = {}

    def __getitem__(self, split: str) -> Examples:
        if split not in self._read:
            self._read[split] = self._readers[split]()
        return self._read[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, split: object) -> bool:
        """Without reading it, as Mapping's own would."""
        return split in self._readers

    def __repr__(self) -> str:
        return f"Splits({', '.join(self._readers)})"
