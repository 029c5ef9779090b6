"""Stamps that are wrong while the content is right: a clock that was set, or that two machines don't share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@dataclass(frozen=True, slots=True)
class Options:
    """How often and how far.

    Attributes:
        probability: of each plan.
        most_ms: largest shift into the past or into the future, uniform. [ms]
    """

    probability: float = 0.01
    most_ms: float = 200.0

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and self.most_ms > 0):
            raise BadConfig(
                f"probability is {self.probability}, valid: 0..1; most_ms is {self.most_ms}, valid: more than 0"
            )


@final
class StaleStamps(Fault):
    """Only the stamp is touched; the control step is right."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """Another stamp."""
        if self.draws.uniform(plan, 0) >= self._options.probability:
            return seen
        shift_ns = int((2 * self.draws.uniform(plan, 1) - 1) * self._options.most_ms * 1e6)
        return replace(seen, stamp_ns=seen.stamp_ns + shift_ns)


def build(options: Options, parts: Parts) -> StaleStamps:
    """Needs the seed."""
    return StaleStamps(options, Draws(parts.seed, "stale_stamps"))
