"""EAGLE-2's dynamic tree: grow the best leaves level by level, keep the best nodes of all levels.

Source: Li et al. 2024, arXiv:2406.16858.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.types import Bool, Draft, Float32, Int32


class Frontier(NamedTuple):
    """The leaves that are expanded next."""

    tokens: Int32  # [f]
    rows: npt.NDArray[np.intp]  # [f], which row of the last scores each one grew from
    ancestors: Bool  # [f, rows expanded so far]


@final
class DynamicTree:
    """Nodes with the log-probability of their paths.

    Args:
        width: leaves that are expanded per level, and children of each.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._tokens: list[Int32] = []
        self._scores: list[npt.NDArray[np.float64]] = []
        self._parents: list[Int32] = []
        self._count = 0  # nodes of all levels
        self._expanded = np.full(1, -1)  # node number of each row of the last scores; the root first
        self._score = np.zeros(1)
        self._ancestors = np.zeros((1, 0), bool)

    def grow(self, logits: Float32) -> None:
        """Add a level: children of the leaves that were expanded, one row of logits [f, V] each."""
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
        best = np.argsort(-shifted, 1, kind="stable")[:, : self._width]  # [f, width]
        self._tokens.append(best.astype(np.int32).ravel())
        self._scores.append((self._score[:, None] + np.take_along_axis(shifted, best, 1)).ravel())
        self._parents.append(np.repeat(self._expanded, best.shape[1]).astype(np.int32))
        self._count += best.size

    def frontier(self) -> Frontier:
        """The best leaves of the newest level; the next `grow` gets their scores."""
        tokens, scores = self._tokens[-1], self._scores[-1]
        chosen = np.sort(np.argsort(-scores, kind="stable")[: self._width])
        rows = chosen // (len(tokens) // len(self._expanded))
        ancestors = self._ancestors[rows]
        if self._ancestors.shape[1] or len(self._tokens) > 1:
            own = np.eye(len(self._expanded), dtype=bool)[rows]
            ancestors = np.concatenate((ancestors, own), 1)
        self._expanded = self._count - len(tokens) + chosen
        self._score, self._ancestors = scores[chosen], ancestors
        return Frontier(tokens[chosen], rows, ancestors)

    @property
    def best_leaf(self) -> float:
        """Log-probability of the best path that ends in the newest level."""
        return float(self._scores[-1].max())

    def draft(self, gamma: int, floor: float) -> Draft:
        """The best nodes: at most ``gamma``, none whose path is less probable than e^floor; the best one always.

        A parent is at least as probable as its children, so what is kept is a tree.
        """
        tokens, parents = np.concatenate(self._tokens), np.concatenate(self._parents)
        scores = np.concatenate(self._scores)
        order = np.argsort(-scores, kind="stable")[:gamma]
        kept = np.sort(order[(scores[order] >= floor) | (np.arange(len(order)) == 0)])
        number = np.full(len(tokens) + 1, -1, np.int32)  # the last entry stands for parent -1
        number[kept] = np.arange(len(kept))
        return Draft(tokens[kept], number[parents[kept]])
