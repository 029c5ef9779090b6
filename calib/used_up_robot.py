"""A robot whose every action is off by as much as a tolerance allows: what it permits, whatever the drafter."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.assemble import Assembly
from vla_spec.interfaces import AcceptanceRule
from vla_spec.runtime import EpisodicRobot
from vla_spec.types import Committed, Draft, Float32, Scores, TokenDomain, Verdict
from vla_spec.wrapped_robot import WrappedRobot

Floats = npt.NDArray[np.float64]


class Tolerance(NamedTuple):
    """One point of the grid: numbers per degree of freedom in physical units, and the relative share."""

    cap: tuple[float, ...]
    budget: tuple[float, ...]
    relative: float


@final
class UsedUpRobot(WrappedRobot):
    """Wraps a robot; every action is moved as far as a tolerance allows, in the same direction all episode long.

    Per degree of freedom by ``cap + relative * |action|``, a sign each, scaled down so that a group's sum stays within
    its budget. Switches are left alone. The direction follows from the seed of the reset.
    """

    def __init__(
        self, robot: EpisodicRobot, tolerance: Tolerance, domain: TokenDomain, physical_per_action: Float32
    ) -> None:
        super().__init__(robot)
        self._unit = physical_per_action.astype(np.float64)
        per_step = domain.tokens_per_step
        self._moves = ~domain.never_relaxed[:per_step]
        self._cap, self._budget = np.array(tolerance.cap), np.array(tolerance.budget)
        self._relative = tolerance.relative
        self._groups = [np.flatnonzero(domain.group[:per_step] == g) for g in np.unique(domain.group[:per_step])]
        self._direction = np.zeros(per_step)
        #: Scale of the tolerance, as a controller sets it; the caller's to change between two actions. [0..1]
        self.scale = 1.0

    def reset(self, seed: int) -> None:
        """Reset, and draw a direction."""
        self._direction = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], len(self._direction))
        self.robot.reset(seed)

    def offset(self, action: Float32) -> Floats:
        """float64 [A], physical: how far this action is moved."""
        wanted = (self._cap + self._relative * np.abs(action * self._unit)) * self.scale * self._moves  # [A]
        for group in self._groups:
            total, most = wanted[group].sum(), self._budget[group[0]] * self.scale
            if total > most:
                wanted[group] *= most / total
        return wanted * self._direction

    def act(self, action: Float32, now_ns: int) -> Float32:
        """The moved action, within the robot's limits."""
        moved = (action + self.offset(action) / self._unit).astype(np.float32)
        return self.robot.act(np.clip(moved, self.action_low, self.action_high), now_ns)


@final
class OverheardRule:
    """A rule that judges as another one does, and tells the robot which tolerance the controller asked for."""

    def __init__(self, rule: AcceptanceRule) -> None:
        self._rule = rule
        self.robot: UsedUpRobot | None = None

    @property
    def exact(self) -> bool:
        """The wrapped rule's."""
        return self._rule.exact

    def judge(
        self,
        draft: Draft,
        scores: Scores,
        committed: Committed,
        rng: np.random.Generator,
        tolerance: float = 1.0,
    ) -> Verdict:
        """The wrapped rule's verdict."""
        if self.robot is not None:
            self.robot.scale = tolerance
        return self._rule.judge(draft, scores, committed, rng, tolerance)


def physical_per_action(assembly: Assembly) -> Float32:
    """float32 [A]: what one unit of an action is in the tokenizer's physical unit, from two tokens of each axis."""
    per_step = assembly.domain.tokens_per_step
    tokenizer = assembly.adapter.tokenizer
    low, high = np.zeros(per_step, np.int32), np.full(per_step, assembly.domain.vocab_size - 1, np.int32)
    width = np.abs(tokenizer.decode(high) - tokenizer.decode(low))[0]  # [A]
    return np.asarray(tokenizer.distance(low, high, np.arange(per_step, dtype=np.int32)) / width, np.float32)
