"""How far above its prediction may the next call come? The running law of ``log(measured / predicted)``.

Every residual was made before its call, so the law is that of real one-step predictions: what noise, drift and the
scale's own error add up to. Used as a conformal score: the probability of an overrun is the share of past residuals
beyond it (Vovk et al. 2005; Gibbs and Candes 2021, arXiv:2106.00170, for scores that drift).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import numpy as np
import numpy.typing as npt

#: Residuals are counted in bins of one per cent, from predictions twice too long to calls 90 times too long.
_WIDTH, _LOWEST, _NUM_EDGES = 0.01, -0.705, 521
#: The tail is fitted beyond the residual that this share exceeds, and to no more than this of each excess.
_TAIL_SHARE, _MOST_EXCESS = 0.03, 1.0
_LEAST_USUAL = 0.1
#: Past this weight all counts are scaled down, so that they stay finite for ever.
_HEAVY = 1e12

Float64 = npt.NDArray[np.float64]


def exceedance(quantiles: Mapping[float, float], least_spread: float) -> Float64:
    """Share of calls beyond each edge, by the quantiles of a cost table.

    Between stored quantiles the share falls log-linearly in the log of the cost. Beyond the largest one, which says
    nothing about rarer calls, it goes on as steeply as between the last two, but no more steeply than a spread of
    ``least_spread`` would have it: a Pareto tail. The largest of a sample, stored as quantile 1, counts as the one
    half-way between the one below it and 1, since the next call may well be longer.

    Args:
        quantiles: quantile -> cost, the median among them.
        least_spread: scale of an exponential law of log cost; 0 = trust a table without spread.

    Returns:
        float64 [edges], falling from 1.
    """
    edges = _LOWEST + _WIDTH * np.arange(_NUM_EDGES)
    median = quantiles[0.5]
    stored = sorted((q, math.log(max(ns, 1.0) / max(median, 1.0))) for q, ns in quantiles.items() if q >= 0.5)
    if len(stored) > 1 and stored[-1][0] >= 1.0:
        stored[-1] = (stored[-2][0] + 1.0) / 2, stored[-1][1]
    x = np.maximum.accumulate([log_ratio for _, log_ratio in stored])
    log_share = np.log([1.0 - q for q, _ in stored])
    scale = least_spread
    if len(x) > 1:
        scale = max(scale, float((x[-1] - x[-2]) / (log_share[-2] - log_share[-1])))
    below = np.where(edges < 0, 1.0, 0.0)
    inside = np.exp(np.interp(edges, x, log_share)) * (edges <= x[-1]) * (edges >= 0)
    beyond = np.exp(log_share[-1] - np.maximum(edges - x[-1], 0) / scale) if scale > 0 else np.zeros(_NUM_EDGES)
    share = below + np.where(edges <= x[-1], inside, beyond) * (edges >= 0)
    return np.minimum.accumulate(np.clip(share, 0.0, 1.0))


@final
class OverrunLaw:
    """Forgetting counts of residuals, and a fitted tail where counts are too few. Constant memory; O(1) Python work.

    ``P(residual > x)`` is the weighted share of residuals beyond x. Where few were seen, beyond the residual u that
    three in a hundred exceed, it is at least ``P(residual > u) * exp(-(x - u) / b)`` with b their mean excess over u,
    a Pareto tail of the ratio, but no more than if one more call had been beyond x, (n + 1) / (N + 1). Counting takes
    care of rare long calls that follow no law, the tail of those that were too rare to be seen.
    """

    def __init__(self, prior: Float64, prior_weight: float, memory: float) -> None:
        """Start from a table.

        Args:
            prior: see `exceedance`.
            prior_weight: how many calls it counts as.
            memory: calls after which a residual's weight has fallen to 1/e.
        """
        self._prior, self._growth = prior, math.exp(1.0 / memory)
        self._above = prior * prior_weight  # [edges] weighted number of residuals at or beyond
        self._total, self._weight = prior_weight, 1.0
        self._start = self._start_share = self._scale = 0.0
        #: Residuals beyond plus or minus this are unusual: twice what a tenth exceeds.
        self.usual = _LEAST_USUAL
        self.fit()

    def record(self, residual: float) -> None:
        """Count one residual."""
        num_below = min(max(int((residual - _LOWEST) / _WIDTH) + 1, 0), _NUM_EDGES)
        self._above[:num_below] += self._weight
        self._total += self._weight
        self._weight *= self._growth
        if self._weight > _HEAVY:
            self._above /= self._weight
            self._total /= self._weight
            self._weight = 1.0

    def relax(self, share: float) -> None:
        """Go back to the table by this share: for times in which nothing can be measured."""
        self._above += share * (self._total * self._prior - self._above)

    def fit(self) -> None:
        """Fit the tail again. Call now and then, not in every round."""
        first = min(self._first_edge(_TAIL_SHARE), _NUM_EDGES - 1)
        beyond = self._above[first : first + round(_MOST_EXCESS / _WIDTH)]
        self._start = _LOWEST + _WIDTH * first
        self._start_share = float(beyond[0]) / self._total
        self.usual = max(_LEAST_USUAL, 2.0 * (_LOWEST + _WIDTH * self._first_edge(0.1)))
        self._scale = _WIDTH * float(beyond.sum()) / float(beyond[0]) if beyond[0] > 0 else 0.0

    def probability(self, x: float) -> float:
        """That the next residual is beyond ``x``, to the width of a bin."""
        edge = int((x - _LOWEST) / _WIDTH + 0.500001)
        if edge < 1:
            return 1.0
        above = float(self._above[edge]) if edge < _NUM_EDGES else 0.0
        share = above / self._total
        if x > self._start and self._scale > 0:
            fitted = self._start_share * math.exp((self._start - x) / self._scale)
            share = max(share, min(fitted, (above + self._weight) / (self._total + self._weight)))
        return share

    def quantile(self, probability: float) -> float:
        """The least x that the next residual is beyond with no more than this probability, to the width of a bin."""
        x = _LOWEST + _WIDTH * (self._first_edge(probability) - 0.5)
        if self._scale > 0 and 0 < probability < self._start_share:
            fitted = self._start + self._scale * math.log(self._start_share / probability)
            enough = probability - self._weight / (self._total + self._weight)
            if fitted > x:
                capped = _LOWEST + _WIDTH * (self._first_edge(enough) - 0.5) if enough > 0 else math.inf
                x = min(fitted, max(x, capped))
        return x

    def _first_edge(self, share: float) -> int:
        """The first edge that no more than this share of residuals is at or beyond."""
        return _NUM_EDGES - int(self._above[::-1].searchsorted(share * self._total, side="right"))
