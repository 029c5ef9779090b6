"""A camera frame is lost: the pictures are those of the plan before, everything else is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from vla_spec.injection import Chance, Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@dataclass(frozen=True, slots=True)
class Options(Chance):
    """How often.

    Attributes:
        probability: of each plan.
    """

    probability: float = 0.02


@final
class DroppedFrames(Fault):
    """Nothing tells the planner: the stamp is the new one, as many drivers do it."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """The pictures before these."""
        if past and self.draws.uniform(plan) < self._options.probability:
            return replace(seen, images=past[-1].images)
        return seen


def build(options: Options, parts: Parts) -> DroppedFrames:
    """Needs the seed."""
    return DroppedFrames(options, Draws(parts.seed, "dropped_frames"))
