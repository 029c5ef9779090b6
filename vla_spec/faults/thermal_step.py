"""The machine gets too hot, lowers its clock at once, and stays slow until it has cooled down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts


@dataclass(frozen=True, slots=True)
class Options:
    """How often, how long, and how slow.

    Attributes:
        period: plans from one throttling to the next.
        hot: plans that each one lasts, fewer than ``period``.
        factor: on the time of every call meanwhile, 1 or more.
    """

    period: int = 400
    hot: int = 120
    factor: float = 1.4

    def __post_init__(self) -> None:
        if not (0 < self.hot < self.period and 1 <= self.factor < 1000):
            raise BadConfig(f"need 0 < hot < period and 1 <= factor < 1000; got {self}")


@final
class ThermalStep(Fault):
    """Each period has its hot plans at a place that the seed picks."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def slowdown(self, plan: int) -> float:
        """The factor, while hot."""
        number, at = divmod(plan, self._options.period)
        begin = self.draws.below(self._options.period - self._options.hot + 1, number)
        return self._options.factor if begin <= at < begin + self._options.hot else 1.0


def build(options: Options, parts: Parts) -> ThermalStep:
    """Needs the seed."""
    return ThermalStep(options, Draws(parts.seed, "thermal_step"))
