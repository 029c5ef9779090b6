"""The ladder of answers: which rung a plan may be given on, how often each was, and why. Hysteresis included.

Going down is immediate, since it is the safe direction; coming back takes several good plans in a row, so that a
robot on the edge does not stutter between moving and stopping.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.types import Rung


class Reason(IntEnum):
    """Why a plan is not what it could be. A number, so that it fits into a trace."""

    NONE = 0
    DEADLINE = 1  # time ran out while decoding
    DEADLINE_PAST = 2  # it was too late before decoding began
    BAD_OBSERVATION = 3  # NaN in the state, pictures of the wrong size, an instruction that says nothing
    BAD_SCORES = 4  # NaN or infinity in the logits
    BAD_TOKENS = 5  # tokens that mean no action
    ENGINE_ERROR = 6  # the engine, rule or controller raised
    RECOVERING = 7  # a usable plan, but not yet enough of them after a stop
    DRAFTER_ERROR = 8  # the drafter raised or made up tokens: a slow plan, if it is cut, and no wrong one
    NO_TIME = 9  # a prefill alone would have been late, so none was started
    LEFT = 10  # on purpose: the controller left the rest of the chunk to the drafter


@dataclass(frozen=True, slots=True)
class LadderOptions:
    """Knobs of the hysteresis, all counted in plans.

    Attributes:
        max_holds: HOLD answers in a row that become a STOP with the next one.
        recover_after: usable plans in a row that end a STOP. 1 = at once; large = stands still for longer.
        worsen_after: plans in a row on a worse rung before `Ladder.level` follows.
        improve_after: plans in a row on a better rung before `Ladder.level` follows.
    """

    max_holds: int = 3
    recover_after: int = 2
    worsen_after: int = 3
    improve_after: int = 10

    def __post_init__(self) -> None:
        for name, least in (("max_holds", 0), ("recover_after", 1), ("worsen_after", 1), ("improve_after", 1)):
            if getattr(self, name) < least:
                raise BadConfig(f"ladder.{name} is {getattr(self, name)}; valid: {least} or more")


@final
class Ladder:
    """Counts answers and applies hysteresis. Owned by the planner; reading counters from elsewhere is fine."""

    def __init__(self, options: LadderOptions | None = None) -> None:
        self.options = options or LadderOptions()
        self._rungs = np.zeros(len(Rung), np.int64)
        self._reasons = np.zeros(len(Reason), np.int64)
        self.reset()

    def reset(self) -> None:
        """A new episode: streaks and level start over, counters go on."""
        self.is_stopped = False
        #: What the last plans amount to, for diagnostics: moves only after several plans that agree.
        self.level = Rung.EXACT
        self._holds = self._good = self._worse = self._better = 0
        self._worst_since = Rung.EXACT
        self._best_since = Rung.STOP

    @property
    def counts(self) -> dict[Rung, int]:
        """Answers by rung. Window: since construction."""
        return {rung: int(self._rungs[rung]) for rung in Rung}

    @property
    def reasons(self) -> dict[Reason, int]:
        """Answers by reason, after `settle`. Window: since construction."""
        return {reason: int(self._reasons[reason]) for reason in Reason}

    def settle(self, rung: Rung, reason: Reason) -> tuple[Rung, Reason]:
        """The rung that a plan is to be answered on, given the one that it reached.

        Worse than asked for in two cases: a HOLD after ``max_holds`` of them is a STOP, and after a STOP the first
        ``recover_after - 1`` usable plans are still answered with STOP (reason RECOVERING).
        """
        if rung >= Rung.HOLD:
            self._good = 0
            self._holds += 1
            if self.is_stopped or rung is Rung.STOP or self._holds > self.options.max_holds:
                rung, self.is_stopped = Rung.STOP, True
        else:
            self._holds = 0
            self._good += 1
            if self.is_stopped and self._good < self.options.recover_after:
                rung, reason = Rung.STOP, Reason.RECOVERING
            else:
                self.is_stopped = False
        self._rungs[rung] += 1
        self._reasons[reason] += 1
        self._follow(rung)
        return rung, reason

    def _follow(self, rung: Rung) -> None:
        """Move `level`: down to the mildest of a bad streak, up to the worst of a good one."""
        if rung > self.level:
            self._better, self._worst_since = 0, Rung.EXACT
            self._worse += 1
            self._best_since = min(self._best_since, rung)
            if self._worse >= self.options.worsen_after:
                self.level, self._worse, self._best_since = self._best_since, 0, Rung.STOP
        elif rung < self.level:
            self._worse, self._best_since = 0, Rung.STOP
            self._better += 1
            self._worst_since = max(self._worst_since, rung)
            if self._better >= self.options.improve_after:
                self.level, self._better, self._worst_since = self._worst_since, 0, Rung.EXACT
        else:
            self._worse = self._better = 0
            self._best_since, self._worst_since = Rung.STOP, Rung.EXACT
