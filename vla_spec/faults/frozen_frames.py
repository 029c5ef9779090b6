"""The cameras freeze: the same pictures for several plans in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import PAST_OBSERVATIONS, Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@dataclass(frozen=True, slots=True)
class Options:
    """How often and how long.

    Attributes:
        probability: of a freeze to begin, each plan.
        duration: plans that get the picture at which it began; at most 8.
    """

    probability: float = 0.005
    duration: int = 5

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 1 <= self.duration <= PAST_OBSERVATIONS):
            raise BadConfig(
                f"probability is {self.probability}, valid: 0..1; "
                f"duration is {self.duration}, valid: 1..{PAST_OBSERVATIONS}"
            )


@final
class FrozenFrames(Fault):
    """State, order and stamp go on."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """The pictures of the plan at which the freeze began."""
        for back in range(self._options.duration, 0, -1):
            if back <= len(past) and self.draws.uniform(plan - back) < self._options.probability:
                return replace(seen, images=past[-back].images)
        return seen


def build(options: Options, parts: Parts) -> FrozenFrames:
    """Needs the seed."""
    return FrozenFrames(options, Draws(parts.seed, "frozen_frames"))
