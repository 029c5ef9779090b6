"""How likely is a drafted token to be accepted? By chunk position and by draft depth, learnt from rounds.

Both matter: a gripper seldom moves, a chunk's first step is the newest, and drafts get worse or better with depth. The
rate of rejection of each pair of position and depth is shrunk towards that of its position, and that towards the rate
of all (partial pooling, as in empirical Bayes), so that pairs that were never tried are guessed from their position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@final
class SurvivalModel:
    """Forgetting counts of tokens that were judged and rejected. Constant memory.

    A drafter that offers less than it was asked for fails where it ends: what counts is what a longer plan gives.
    """

    def __init__(
        self,
        num_tokens: int,
        relative: Sequence[float],
        longest: int,
        prior: float,
        prior_weight: float,
        forget: float,
    ) -> None:
        """Start from the prior.

        Args:
            num_tokens: T.
            relative: per kind of draft (chains, trees, tolerances), how its rejections are assumed to compare with
                those of the first kind while little is known of it.
            longest: deepest draft.
            prior: acceptance at every position and depth.
            prior_weight: observations that each level of the pooling counts as.
            forget: factor on all that was seen, per round; what is not tried any more returns to the prior.
        """
        self._failure, self._weight, self._forget = 1.0 - prior, prior_weight, forget
        self._relative = np.array(relative)[:, None]  # [kinds, 1]
        kinds, width = len(relative), num_tokens + longest
        cells, positions = kinds * num_tokens * longest, kinds * width
        self._counts = np.zeros((2, cells + positions))  # rejected, judged
        self._cells = self._counts[:, :cells].reshape(2, kinds, num_tokens, longest)  # by start m and depth - 1
        self._positions = self._counts[:, cells:].reshape(2, kinds, width)
        self._rate = np.empty((kinds, width))  # of rejection by position, pooled
        self.refresh()

    def record(self, m: int, kind: int, asked: int, accepted: int) -> None:
        """Learn from one round.

        Args:
            m: tokens decoded before it, the chunk position of the draft's first token.
            kind: of the draft.
            asked: depth that was asked for.
            accepted: tokens accepted, no more than ``asked``.
        """
        self.fade()
        judged = min(accepted + 1, asked)
        self._cells[1, kind, m, :judged] += 1.0
        self._positions[1, kind, m : m + judged] += 1.0
        if accepted < asked:
            self._cells[0, kind, m, accepted] += 1.0
            self._positions[0, kind, m + accepted] += 1.0

    def fade(self) -> None:
        """A round without a draft: what was seen gets older."""
        self._counts *= self._forget

    def refresh(self) -> None:
        """Pool again. Call now and then, not in every round."""
        weight, (rejected, judged) = self._weight, self._positions
        level = (rejected[0].sum() + weight * self._failure) / (judged[0].sum() + weight)
        first = (rejected[0] + weight * level) / (judged[0] + weight)  # [T + longest]
        self._rate = (rejected + weight * self._relative * first) / (judged + weight)
        self._rate[0] = first

    def survival(self, m: int, kind: int, longest: int) -> Float64:
        """``P(accepted >= d)`` for d = 0 .. longest of a draft that starts at position m, float64 [longest + 1]."""
        weight, (rejected, judged) = self._weight, self._cells[:, kind, m, :longest]
        alive = np.ones(longest + 1)
        rate = (rejected + weight * self._rate[kind, m : m + longest]) / (judged + weight)
        np.cumprod(1.0 - rate, out=alive[1:])
        return alive
