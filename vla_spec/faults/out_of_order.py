"""Observations overtake each other: an old one, with its true stamp and control step, comes after a newer one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import PAST_OBSERVATIONS, Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@dataclass(frozen=True, slots=True)
class Options:
    """How often and how old.

    Attributes:
        probability: of each plan.
        most_back: an observation of one of so many plans before comes; at most 8.
    """

    probability: float = 0.01
    most_back: int = 3

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 1 <= self.most_back <= PAST_OBSERVATIONS):
            raise BadConfig(
                f"probability is {self.probability}, valid: 0..1; "
                f"most_back is {self.most_back}, valid: 1..{PAST_OBSERVATIONS}"
            )


@final
class OutOfOrder(Fault):
    """The old observation is whole and says truly when it was taken."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """One that was made before."""
        back = 1 + self.draws.below(self._options.most_back, plan, 1)
        if back <= len(past) and self.draws.uniform(plan, 0) < self._options.probability:
            return past[-back]
        return seen


def build(options: Options, parts: Parts) -> OutOfOrder:
    """Needs the seed."""
    return OutOfOrder(options, Draws(parts.seed, "out_of_order"))
