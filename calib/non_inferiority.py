"""Is a success rate no worse than another one, by a stated margin, on the same episodes? Paired intervals.

Source: Newcombe 1998, doi:10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C, method 10 (difference
of paired proportions from Wilson's score intervals); the margin as in non-inferiority trials.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from vla_spec.results import wilson_interval


class Pairs(NamedTuple):
    """Episodes that were run both ways, by outcome: (new way, reference)."""

    both: int
    only_new: int
    only_reference: int
    neither: int

    @property
    def total(self) -> int:
        """Episodes."""
        return sum(self)

    @property
    def difference(self) -> float:
        """Success rate of the new way minus that of the reference."""
        return (self.only_new - self.only_reference) / self.total if self.total else 0.0

    @staticmethod
    def of(new: list[bool], reference: list[bool]) -> Pairs:
        """Count outcomes; both in the same order."""
        pairs = list(zip(new, reference, strict=True))
        return Pairs(
            pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True)),
            pairs.count((False, False)),
        )  # fmt: skip


def one_sided_z(confidence: float) -> float:
    """Normal quantile of a one-sided bound; 1.645 for 0.95."""
    return NormalDist().inv_cdf(confidence)


def lower_bound(pairs: Pairs, confidence: float = 0.95) -> float:
    """One-sided lower confidence bound of the difference of success rates, in [-1, 1]; -1 without episodes."""
    n = pairs.total
    if n == 0:
        return -1.0
    z = one_sided_z(confidence)
    new, reference = pairs.both + pairs.only_new, pairs.both + pairs.only_reference
    own, other = wilson_interval(new, n, z), wilson_interval(reference, n, z)
    assert own is not None, f"{n=}"
    assert other is not None, f"{n=}"
    below, above = new / n - own[0], other[1] - reference / n
    square = below**2 - 2 * _correlation(pairs) * below * above + above**2
    return max(-1.0, pairs.difference - math.sqrt(max(square, 0.0)))


def is_not_worse(pairs: Pairs, margin: float, confidence: float = 0.95) -> bool:
    """The lower bound lies above minus the margin: worse by more than that is ruled out at this confidence."""
    return lower_bound(pairs, confidence) > -margin


def episodes_needed(margin: float, confidence: float = 0.95) -> int:
    """The least number of episodes with which even a way without any failure can be found not to be worse."""
    z2 = one_sided_z(confidence) ** 2
    return math.floor(z2 * (1 - margin) / margin) + 1


def _correlation(pairs: Pairs) -> float:
    """Newcombe's phi, with his correction for continuity where it is positive; 0 where a margin is empty."""
    a, b, c, d = pairs
    product = (a + b) * (c + d) * (a + c) * (b + d)
    if product == 0:
        return 0.0
    excess: float = a * d - b * c
    if excess > 0:
        excess = max(excess - pairs.total / 2, 0)
    return excess / math.sqrt(product)
