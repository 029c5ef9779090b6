"""Another process takes its share of the processor for a while, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How often, how long, and how much.

    Attributes:
        probability: of a burst to begin, each plan.
        duration: plans that it lasts.
        factor: on the time of every call meanwhile, 1 or more.
    """

    probability: float = 0.005
    duration: int = 15
    factor: float = 1.6

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and self.duration >= 1 and 1 <= self.factor < 1000):
            raise BadConfig(f"need probability in 0..1, duration >= 1, 1 <= factor < 1000; got {self}")


@final
class Contention(Fault):
    """Bursts that overlap are one longer burst."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def slowdown(self, plan: int) -> float:
        """The factor, during a burst."""
        for begin in range(max(0, plan - self._options.duration + 1), plan + 1):
            if self.draws.uniform(begin) < self._options.probability:
                return self._options.factor
        return 1.0


def build(options: Options, parts: Parts) -> Contention:
    """Needs the seed."""
    return Contention(options, Draws(parts.seed, "contention"))
