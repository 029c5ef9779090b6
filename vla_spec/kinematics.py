"""How the arm moves, worked out from action tokens: speed, path length, mean radius, how much a plan was revised.

Translation only: the relaxable degrees of freedom of one action, in their physical unit per control step. Pure
functions of arrays; the controller `kinematic` and the drafter `hybrid` are built on them.
Sources: KERV, arXiv:2603.01581 (variability of corrections); HeiSD, arXiv:2603.17573 (path length and mean radius).
"""

from __future__ import annotations

from collections import deque
from typing import final

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ActionTokenizer, ChunkHistory
from vla_spec.types import Int32, TokenDomain

Floats = npt.NDArray[np.float64]


@final
class Motion:
    """Action tokens to increments in physical units, [h, M]; M = degrees of freedom that are no switches.

    Args:
        domain: which degrees of freedom are switches.
        tokenizer: its distance is the physical unit.
        is_delta: actions are increments; False = they are positions, and their differences are the increments.
    """

    def __init__(self, domain: TokenDomain, tokenizer: ActionTokenizer, is_delta: bool = True) -> None:
        per_step = domain.tokens_per_step
        moving = np.flatnonzero(~domain.never_relaxed[:per_step])
        if not len(moving):
            raise BadConfig("kinematics: every degree of freedom is a switch; nothing moves that could be fast or slow")
        tokens = np.arange(domain.vocab_size, dtype=np.int32)
        still = tokenizer.encode(np.zeros((1, per_step), np.float32))  # [A]
        self._place = np.empty((len(moving), domain.vocab_size))  # [M, V] where each token lies on its axis
        for row, dof in enumerate(moving.tolist()):
            at = np.full_like(tokens, dof)
            sign = np.sign(tokens - int(still[dof]))
            self._place[row] = sign * tokenizer.distance(tokens, np.full_like(tokens, still[dof]), at)
        self._moving, self._per_step, self._is_delta = moving, per_step, is_delta

    @property
    def num_dofs(self) -> int:
        """M."""
        return len(self._moving)

    def increments(self, tokens: Int32) -> Floats:
        """int32 [m] -> float64 [m // A, M] per control step; one row less where actions are positions."""
        whole = tokens[: len(tokens) // self._per_step * self._per_step].reshape(-1, self._per_step)
        places: Floats = self._place[np.arange(self.num_dofs), whole[:, self._moving]]  # [h, M]
        return places if self._is_delta else np.diff(places, axis=0)


@final
class PlayedSteps:
    """What the arm was sent since the motion began, from one chunk's history to the next.

    A chunk without history begins a new motion: everything before is forgotten. A history whose chunk is the one of the
    time before (no newer chunk came) adds only the steps that were played since.
    """

    def __init__(self, motion: Motion, tokens_per_step: int, window: int) -> None:
        self._motion, self._per_step = motion, tokens_per_step
        self._window: deque[Floats] = deque(maxlen=window)
        self._tokens: Int32 | None = None  # of the newest chunk
        self._increments: Floats = np.zeros((0, motion.num_dofs))
        self._rest: Floats | None = None  # its increments behind the newest observation
        self._done = 0  # steps of it that were played
        #: Steps since the motion began; and how far the last two plans differ where they overlap, None = unknown.
        self.num_steps = 0
        self.revision: float | None = None

    def update(self, history: ChunkHistory | None) -> None:
        """A new chunk begins."""
        if history is None:
            self._forget()
            return
        done = min(max(history.consumed, 0), len(history.tokens)) // self._per_step
        is_same = self._tokens is not None and done >= self._done and np.array_equal(history.tokens, self._tokens)
        if not is_same:
            increments = self._motion.increments(history.tokens)
            if self._rest is not None:
                self.revision = revision(self._rest, increments)
            self._tokens, self._increments, self._done = history.tokens.copy(), increments, 0
        self._window.extend(self._increments[self._done : done])
        self.num_steps += done - self._done
        self._done = done
        self._rest = self._increments[done:]

    @property
    def increments(self) -> Floats:
        """float64 [<= window, M], oldest first."""
        return np.array(self._window, np.float64).reshape(-1, self._motion.num_dofs)

    @property
    def planned(self) -> Floats:
        """float64 [h, M]: what the newest chunk planned from now on; its last step if nothing is left of it."""
        first = min(self._done, max(len(self._increments) - 1, 0))
        return np.asarray(self._increments[first:], np.float64)

    def _forget(self) -> None:
        self._window.clear()
        self._tokens = self._rest = self.revision = None
        self._increments = np.zeros((0, self._motion.num_dofs))
        self._done = self.num_steps = 0


def speeds(increments: Floats) -> Floats:
    """float64 [h]: length of each increment, per control step."""
    return np.asarray(np.sqrt((increments * increments).sum(axis=1)), np.float64)


def path_length(increments: Floats) -> float:
    """D of HeiSD: the way that was gone, sum of the increments' lengths."""
    return float(speeds(increments).sum())


def mean_radius(increments: Floats) -> float:
    """R of HeiSD: mean distance of the window's positions from their centre, in the plane that fits them best.

    Large = straight and far; small = curled up, or hardly moving. 0 for an empty window.
    """
    positions = np.concatenate((np.zeros((1, increments.shape[1])), np.cumsum(increments, axis=0)))
    centred = positions - positions.mean(axis=0)
    if positions.shape[1] > 2:  # two principal axes span the plane; fewer dimensions are one already
        axes = np.linalg.svd(centred, full_matrices=False)[2][:2]  # [<= 2, M]
        centred = centred @ axes.T
    return float(np.sqrt((centred * centred).sum(axis=1)).mean())


def boundary(increments: Floats, radius: float, length: float, radius_share: float = 0.5) -> float:
    """F of HeiSD, in [0, 1]: large = fast and straight, small = slow and curved.

    ``share * min(R / radius, 1) + (1 - share) * min(D / length, 1)``; ``radius`` and ``length`` are what R and D are
    clipped at (the paper normalises each suite from 0 to its 95th percentile), in the increments' unit.
    """
    of_radius = min(mean_radius(increments) / radius, 1.0)
    of_length = min(path_length(increments) / length, 1.0)
    return radius_share * of_radius + (1.0 - radius_share) * of_length


def straightness(increments: Floats) -> float:
    """Distance between the ends / way that was gone, in [0, 1]; 1 = straight, 0 = back where it began or no motion."""
    length = path_length(increments)
    return float(np.sqrt((increments.sum(axis=0) ** 2).sum()) / length) if length > 0 else 0.0


def revision(before: Floats, after: Floats) -> float:
    """Sum over steps of the L1 distance between two plans for the same steps, as far as both reach.

    With the older plan as the erroneous action and the newer as the correct one: K_var of KERV, arXiv:2603.01581.
    """
    n = min(len(before), len(after))
    return float(np.abs(before[:n] - after[:n]).sum())
