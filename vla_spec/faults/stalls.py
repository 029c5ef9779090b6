"""A call hangs for longer than a whole plan may take: a driver reset, a swapped-out page, a debugger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Call, CallKind, Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How often, where, and how long.

    Attributes:
        probability: of each plan.
        most_rounds: the stall hits the prefill or one of the first so many steps.
        least_ms, most_ms: how long it lasts, uniform. [ms]
    """

    probability: float = 0.005
    most_rounds: int = 3
    least_ms: float = 60.0
    most_ms: float = 300.0

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and self.most_rounds >= 0 and 0 < self.least_ms <= self.most_ms):
            raise BadConfig(f"need probability in 0..1, most_rounds >= 0, 0 < least_ms <= most_ms; got {self}")


@final
class Stalls(Fault):
    """Nothing that was measured before says when: plans that it strikes count as infeasible."""

    is_foreseeable = False

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def call_ns(self, call: Call, ns: float) -> float:
        """Longer by the stall, in the one call that it hits."""
        if call.kind not in (CallKind.PREFILL, CallKind.STEP):
            return ns
        options, draws = self._options, self.draws
        if call.round > options.most_rounds or draws.uniform(call.plan, 0) >= options.probability:
            return ns
        if draws.below(options.most_rounds + 1, call.plan, 1) != call.round:
            return ns
        return ns + 1e6 * (options.least_ms + draws.uniform(call.plan, 2) * (options.most_ms - options.least_ms))


def build(options: Options, parts: Parts) -> Stalls:
    """Needs the seed."""
    return Stalls(options, Draws(parts.seed, "stalls"))
