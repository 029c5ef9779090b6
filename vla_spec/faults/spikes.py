"""Now and then one call takes several times as long: an interrupt, a page fault, another process's turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Call, Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How often, and how bad.

    Attributes:
        probability: of each call.
        factor: on the time of a call that is hit, 1 or more.
    """

    probability: float = 0.002
    factor: float = 3.0

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 1 <= self.factor < 1000):
            raise BadConfig(f"probability is {self.probability}, valid: 0..1; factor is {self.factor}, valid: 1..1000")


@final
class Spikes(Fault):
    """Calls are hit independently of each other."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def call_ns(self, call: Call, ns: float) -> float:
        """Longer, if hit."""
        if self.draws.uniform(call.plan, call.round, int(call.kind)) < self._options.probability:
            return ns * self._options.factor
        return ns


def build(options: Options, parts: Parts) -> Spikes:
    """Needs the seed."""
    return Spikes(options, Draws(parts.seed, "spikes"))
