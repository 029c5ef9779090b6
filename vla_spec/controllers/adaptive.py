"""Lengthen the draft while nearly all of it is accepted, shorten it while little is, with hysteresis in between.

Source: the dynamic draft length of Gante 2023 (assisted generation), with a moving average instead of single rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import Plan, Round


@dataclass(frozen=True, slots=True)
class Options:
    """Acceptance-adaptive draft length.

    Attributes:
        gamma: the first draft length.
        min_gamma, max_gamma: its limits; at least 1, or nothing more would be learned.
        raise_at: lengthen by one when the average accepted length is above this share of gamma.
        lower_at: shorten by one when it is below this share of gamma; the gap up to ``raise_at`` is the hysteresis.
        weight: of a new round in the moving average, in (0, 1]; larger follows faster and trembles more.
        patience: rounds between two changes. [rounds]
        depth: longest path, None = gamma.
        top_k: children per node, 1 = a chain.
        tolerance: scale in [0, 1] of the rule's own tolerance.
    """

    gamma: int = 4
    min_gamma: int = 1
    max_gamma: int = 16
    raise_at: float = 0.8
    lower_at: float = 0.5
    weight: float = 0.2
    patience: int = 3
    depth: int | None = None
    top_k: int = 1
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_gamma <= self.gamma <= self.max_gamma:
            raise BadConfig(
                f"need 1 <= min_gamma <= gamma <= max_gamma, got {self.min_gamma}, {self.gamma}, {self.max_gamma}"
            )
        if not 0.0 <= self.lower_at < self.raise_at <= 1.0:
            raise BadConfig(f"need 0 <= lower_at < raise_at <= 1, got {self.lower_at} and {self.raise_at}")
        if not 0.0 < self.weight <= 1.0 or not 0.0 <= self.tolerance <= 1.0:
            raise BadConfig(f"need weight in (0, 1] and tolerance in [0, 1], got {self.weight} and {self.tolerance}")
        if self.patience < 1 or self.top_k < 1 or (self.depth is not None and self.depth < 1):
            raise BadConfig(
                f"need patience >= 1, top_k >= 1, depth >= 1, got {self.patience}, {self.top_k}, {self.depth}"
            )


@final
class AdaptiveController:
    """``mean <- mean + weight * (accepted - mean)``; compared with gamma after each round, see `Options`.

    A draft that was cut short by the chunk's end and accepted whole says only "at least this much": it can raise the
    average, not lower it. The draft length survives from chunk to chunk. Knows no costs: use `deadline` where drafting
    is not cheap. Stops only when the deadline has passed.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._gamma = options.gamma
        self._mean = (options.raise_at + options.lower_at) / 2 * self._longest  # in the dead band: no change at first
        self._since_change = 0
        self._room = self._longest  # longest path that could be accepted this round

    @property
    def _longest(self) -> int:
        """Longest path that the current plan allows."""
        return self._gamma if self._options.depth is None else min(self._gamma, self._options.depth)

    def begin(self, remaining_ns: int, history: ChunkHistory | None = None) -> bool:
        """What was learned stays."""
        return remaining_ns > 0

    def plan(self, remaining_ns: int, tokens_left: int) -> Plan | None:
        """The current draft length, None once the deadline has passed."""
        if remaining_ns <= 0:
            return None
        self._room = min(self._longest, max(tokens_left - 1, 0))
        return Plan(self._gamma, self._longest, self._options.top_k, self._options.tolerance)

    def record(self, measured: Round) -> None:
        """Average, then change gamma by at most one."""
        drafted, accepted = measured.num_drafted, measured.num_accepted
        if drafted == 0:
            return
        is_censored = accepted == min(drafted, self._room) < self._longest
        if not is_censored or accepted > self._mean:
            self._mean += self._options.weight * (accepted - self._mean)
        self._since_change += 1
        if self._since_change < self._options.patience:
            return
        if self._mean > self._options.raise_at * self._longest and self._gamma < self._options.max_gamma:
            self._gamma, self._since_change = self._gamma + 1, 0
        elif self._mean < self._options.lower_at * self._longest and self._gamma > self._options.min_gamma:
            self._gamma, self._since_change = self._gamma - 1, 0


def build(options: Options, parts: Parts) -> AdaptiveController:
    """Needs no part."""
    return AdaptiveController(options)
