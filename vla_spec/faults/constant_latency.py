"""Every call takes longer by the same factor: a machine slower than the one that was calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How much slower.

    Attributes:
        factor: on the time of every call, 1 or more; 1 = no fault.
    """

    factor: float = 1.1

    def __post_init__(self) -> None:
        if not (1 <= self.factor < 1000):
            raise BadConfig(f"factor is {self.factor}; valid: 1..1000")


@final
class ConstantLatency(Fault):
    """Fires in every plan."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def slowdown(self, plan: int) -> float:
        """Always the same."""
        return self._options.factor


def build(options: Options, parts: Parts) -> ConstantLatency:
    """Needs the seed."""
    return ConstantLatency(options, Draws(parts.seed, "constant_latency"))
