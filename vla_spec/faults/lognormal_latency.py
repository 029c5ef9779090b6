"""Each call's time is scattered by a log-normal factor: the ordinary jitter of a shared machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Call, Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How wide.

    Attributes:
        sigma: standard deviation of the factor's logarithm; 0 = no fault. 0.15: 1 % of calls take 42 % longer.
    """

    sigma: float = 0.15

    def __post_init__(self) -> None:
        if not (0 <= self.sigma <= 2):
            raise BadConfig(f"sigma is {self.sigma}; valid: 0..2")


@final
class LognormalLatency(Fault):
    """The factor's median is 1. The draw belongs to the round, so a slow round is slow for every draft length."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def call_ns(self, call: Call, ns: float) -> float:
        """Times ``exp(sigma * z)``."""
        if self._options.sigma == 0:
            return ns
        return ns * math.exp(self._options.sigma * self.draws.normal(call.plan, call.round, int(call.kind)))


def build(options: Options, parts: Parts) -> LognormalLatency:
    """Needs the seed."""
    return LognormalLatency(options, Draws(parts.seed, "lognormal_latency"))
