"""The engine's scores are not finite: an overflow in half precision, a broken kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.injection import Call, Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Scores


@dataclass(frozen=True, slots=True)
class Options:
    """How often and where.

    Attributes:
        probability: of each plan.
        most_rounds: the prefill or one of the first so many rounds is hit.
    """

    probability: float = 0.01
    most_rounds: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and self.most_rounds >= 0):
            raise BadConfig(
                f"probability is {self.probability}, valid: 0..1; most_rounds is {self.most_rounds}, valid: 0 or more"
            )


@final
class NanLogits(Fault):
    """One number of one row, one whole row, or everything; NaN or infinite."""

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def scores(self, call: Call, scores: Scores) -> Scores:
        """A copy with something that is no number in it."""
        draws = self.draws
        if draws.uniform(call.plan, 0) >= self._options.probability:
            return scores
        if draws.below(self._options.most_rounds + 1, call.plan, 1) != call.round:
            return scores
        logits = scores.logits.copy()
        bad = (np.nan, np.inf, -np.inf)[draws.below(3, call.plan, 2)]
        row, column = draws.below(len(logits), call.plan, 3), draws.below(logits.shape[1], call.plan, 4)
        extent = draws.below(3, call.plan, 5)
        logits[(slice(None), row, (row, column))[extent]] = bad
        return Scores(logits, scores.features)


def build(options: Options, parts: Parts) -> NanLogits:
    """Needs the seed."""
    return NanLogits(options, Draws(parts.seed, "nan_logits"))
