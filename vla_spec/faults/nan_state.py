"""A number of the robot's own state is NaN or infinite: a sensor that is not there yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np

from vla_spec.injection import Chance as Options
from vla_spec.injection import Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Observation


@final
class NanState(Fault):
    """One number of the state, which the seed picks."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def observe(self, plan: int, seen: Observation, past: Sequence[Observation]) -> Observation:
        """A state that is not finite."""
        if self.draws.uniform(plan, 0) >= self._options.probability:
            return seen
        state = seen.state.copy()
        state[self.draws.below(len(state), plan, 1)] = (np.nan, np.inf, -np.inf)[self.draws.below(3, plan, 2)]
        return replace(seen, state=state)


def build(options: Options, parts: Parts) -> NanState:
    """Needs the seed."""
    return NanState(options, Draws(parts.seed, "nan_state"))
