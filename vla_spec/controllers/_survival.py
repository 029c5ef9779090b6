"""How likely is a drafted token to be accepted? By chunk position and by draft depth, learnt from rounds.

``P(rejected at depth d | accepted before) = position[m + d - 1] * depth[d]``: a position is hard or easy wherever a
draft starts (a gripper seldom moves, a chunk's first step is the newest), and drafts get worse or better with depth.
The multiplicative failure model of survival analysis, fitted online by observed over expected failures.
"""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@final
class SurvivalModel:
    """Forgetting counts of failures and of exposure. Constant memory.

    A drafter that offers less than it was asked for fails where it ends: what counts is what a longer plan gives.
    """

    def __init__(
        self, num_tokens: int, num_kinds: int, longest: int, prior: float, prior_weight: float, forget: float
    ) -> None:
        """Start from the prior.

        Args:
            num_tokens: T.
            num_kinds: kinds of drafts with depths of their own (chains, trees, tolerances); positions are shared.
            longest: deepest draft.
            prior: acceptance at every position and depth.
            prior_weight: observations that it counts as.
            forget: factor on all that was seen, per round; what is not tried any more returns to the prior.
        """
        self._failure, self._weight, self._forget = 1.0 - prior, prior_weight, forget
        width = num_tokens + longest
        self._counts = np.zeros((2, width + num_kinds * longest))  # failures, exposure
        self._of_position = self._counts[:, :width]  # [2, T + longest]
        self._of_depth = self._counts[:, width:].reshape(2, num_kinds, longest)
        self._position = np.full(width, self._failure)
        self._depth = np.ones((num_kinds, longest))

    def record(self, m: int, kind: int, asked: int, accepted: int) -> None:
        """Learn from one round.

        Args:
            m: tokens decoded before it, the chunk position of the draft's first token.
            kind: of the draft.
            asked: depth that was asked for.
            accepted: tokens accepted, no more than ``asked``.
        """
        self._counts *= self._forget
        judged = min(accepted + 1, asked)
        self._of_position[1, m : m + judged] += self._depth[kind, :judged]
        self._of_depth[1, kind, :judged] += self._position[m : m + judged]
        if accepted < asked:
            self._of_position[0, m + accepted] += 1.0
            self._of_depth[0, kind, accepted] += 1.0

    def refresh(self) -> None:
        """Turn counts into rates. Call now and then, not in every round."""
        weight = self._weight
        self._position = (self._of_position[0] + weight * self._failure) / (self._of_position[1] + weight)
        weight *= max(self._failure, 0.05)  # in expected failures
        exposure = self._of_depth[1] + weight
        depth = (self._of_depth[0] + weight) / exposure
        # A common factor could wander between positions and depths: the first kind's depths are 1 on average.
        self._depth = depth * (exposure[0].sum() / (exposure[0] @ depth[0]))

    def survival(self, m: int, kind: int, longest: int) -> Float64:
        """``P(accepted >= d)`` for d = 0 .. longest of a draft that starts at position m, float64 [longest + 1]."""
        alive = np.ones(longest + 1)
        rejected = self._position[m : m + longest] * self._depth[kind, :longest]
        np.cumprod(np.maximum(1.0 - rejected, 0.0), out=alive[1:])
        return alive
