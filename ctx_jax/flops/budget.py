"""Holding a model to a number of FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from ctx_jax.errors import InputError


@dataclass(frozen=True)
class FlopBudget:
    """What the encoder's forward pass over one row may cost."""

    forward_flops: float | None = None
    """FLOP (not MAC) in matrix products; None states no budget."""
    length: int = 512
    """Tokens of the row; for ELMo, words."""

    def __post_init__(self) -> None:
        if self.forward_flops is not None and not self.forward_flops > 0:
            raise InputError(f"FlopBudget.forward_flops is {self.forward_flops}, expected above 0, or None")
        if self.length < 1:
            raise InputError(f"FlopBudget.length is {self.length}, expected at least 1")

    def verdict(self, forward_flops: int) -> Verdict | None:
        """How a forward pass over `length` tokens stands to the budget; None when none is stated."""
        if self.forward_flops is None:
            return None
        return Verdict(forward_flops, self.forward_flops, self.length)


@dataclass(frozen=True)
class Verdict:
    """A forward pass beside its budget, both in FLOP for one row of `length` tokens."""

    forward_flops: int
    budget_flops: float
    length: int

    @property
    def within(self) -> bool:
        """Whether the model keeps to it."""
        return self.forward_flops <= self.budget_flops

    @property
    def share(self) -> float:
        """1 is exactly on the budget."""
        return self.forward_flops / self.budget_flops

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{'within' if self.within else 'OVER'} budget: {self.forward_flops / 1e9:.2f} of"
            f" {self.budget_flops / 1e9:.2f} GFLOP forward at {self.length} tokens ({self.share:.1%})"
        )

    def as_dict(self) -> dict[str, float | int | bool]:
        """For JSON."""
        return {
            "forward_flops": self.forward_flops,
            "budget_flops": self.budget_flops,
            "length": self.length,
            "share": self.share,
            "within": self.within,
        }
