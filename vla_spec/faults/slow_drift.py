"""The machine becomes slower and faster again over minutes: room temperature, a filling memory, a background job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How far and how fast.

    Attributes:
        amplitude: largest slow-down as a share of the time; 0 = no fault.
        period: plans from one fastest moment to the next.
    """

    amplitude: float = 0.25
    period: int = 1500

    def __post_init__(self) -> None:
        if not (0 <= self.amplitude < 100 and self.period >= 2):
            raise BadConfig(f"amplitude is {self.amplitude}, valid: 0..100; period is {self.period}, valid: 2 or more")


@final
class SlowDrift(Fault):
    """``1 + amplitude * (1 - cos(2 pi plan / period)) / 2``, begun at a phase that the seed picks."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def slowdown(self, plan: int) -> float:
        """One period of a raised cosine."""
        turn = plan / self._options.period + self.draws.uniform(0)
        return 1 + self._options.amplitude * (1 - math.cos(2 * math.pi * turn)) / 2


def build(options: Options, parts: Parts) -> SlowDrift:
    """Needs the seed."""
    return SlowDrift(options, Draws(parts.seed, "slow_drift"))
