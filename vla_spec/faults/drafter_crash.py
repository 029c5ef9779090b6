"""The drafter raises, or proposes tokens and trees that can't be: the guard has to catch both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.injection import Call, CallKind, Draws, Fault
from vla_spec.plugins import Parts
from vla_spec.types import Draft


@dataclass(frozen=True, slots=True)
class Options:
    """How often and where.

    Attributes:
        probability: of each plan.
        most_rounds: the draft of one of the first so many rounds is hit, 1 or more.
    """

    probability: float = 0.01
    most_rounds: int = 2

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and self.most_rounds >= 1):
            raise BadConfig(
                f"probability is {self.probability}, valid: 0..1; most_rounds is {self.most_rounds}, valid: 1 or more"
            )


@final
class DrafterCrash(Fault):
    """An exception, a token id out of range, a parent behind its child, or more nodes than were asked for."""

    needs_drafter = True

    def __init__(self, options: Options, draws: Draws) -> None:
        super().__init__(draws)
        self._options = options

    def before(self, call: Call) -> None:
        """Raise, if this is the draft and the kind."""
        if self._kind(call) == 0:
            raise RuntimeError("injected drafter fault")

    def draft(self, call: Call, draft: Draft) -> Draft:
        """A draft that can't be."""
        kind = self._kind(call)
        if kind == 1:
            return Draft.chain(np.array([-7], np.int32))
        if kind == 2:
            return Draft(np.zeros(2, np.int32), np.array([1, -1], np.int32))
        if kind == 3:
            return Draft.chain(np.zeros(call.size + 1, np.int32))
        return draft

    def _kind(self, call: Call) -> int:
        """0..3, or -1 = leave it alone."""
        draws = self.draws
        if call.kind is not CallKind.DRAFT or draws.uniform(call.plan, 0) >= self._options.probability:
            return -1
        if 1 + draws.below(self._options.most_rounds, call.plan, 1) != call.round:
            return -1
        return draws.below(4, call.plan, 2)


def build(options: Options, parts: Parts) -> DrafterCrash:
    """Needs the seed."""
    return DrafterCrash(options, Draws(parts.seed, "drafter_crash"))
