"""Draft as much as pays off and still fits before the deadline, by measured costs and observed acceptance.

Source: the throughput model of Leviathan et al. 2023, arXiv:2211.17192, section 3.3, with costs measured per length
instead of one ratio, and a hard limit on time.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import Plan, Round


@dataclass(frozen=True, slots=True)
class Options:
    """Deadline-aware draft length.

    Attributes:
        max_gamma: most nodes to draft; the measured table and the engine's ``max_step`` limit it further.
        depth: longest path, None = no limit of its own.
        top_k: nodes drafted per depth, 1 = a chain; gamma is a multiple of it.
        tolerance: scale in [0, 1] of the rule's own tolerance.
        margin_ns: kept free before the deadline, for decoding actions and handing them over. [ns]
        window: rounds that the correction looks back. [rounds]
        warmup: first rounds of the run that the correction leaves out. [rounds]
        quantile: of measured / predicted cost in the window, that predictions are scaled by; higher = fewer misses
            and fewer tokens.
        prior: acceptance assumed at every depth before anything was seen.
        prior_weight: how many observations the prior counts as.
        forget: factor on the weight of what was seen at a depth, each time that it is seen again; 1 = never forget.
        forget_untried: the same for every round in which a depth is not tried, which takes it back to the prior, so
            that it is tried again some day; smaller tries hopeless drafts more often.
    """

    max_gamma: int = 16
    depth: int | None = None
    top_k: int = 1
    tolerance: float = 1.0
    margin_ns: int = 500_000
    window: int = 64
    warmup: int = 8
    quantile: float = 0.9
    prior: float = 0.7
    prior_weight: float = 4.0
    forget: float = 0.98
    forget_untried: float = 0.998

    def __post_init__(self) -> None:
        if self.max_gamma < 0 or self.top_k < 1 or (self.depth is not None and self.depth < 0):
            raise BadConfig(
                f"need max_gamma >= 0, depth >= 0, top_k >= 1, got {self.max_gamma}, {self.depth}, {self.top_k}"
            )
        if self.margin_ns < 0 or self.window < 1 or self.warmup < 0 or self.prior_weight <= 0:
            raise BadConfig(
                f"need margin_ns >= 0, window >= 1, warmup >= 0, prior_weight > 0, got {self.margin_ns}, "
                f"{self.window}, {self.warmup}, {self.prior_weight}"
            )
        for name, value in (("tolerance", self.tolerance), ("quantile", self.quantile), ("prior", self.prior)):
            if not 0.0 <= value <= 1.0:
                raise BadConfig(f"{name} must be in [0, 1], got {value}")
        for name, factor in (("forget", self.forget), ("forget_untried", self.forget_untried)):
            if not 0.0 < factor <= 1.0:
                raise BadConfig(f"{name} must be in (0, 1], got {factor}")


@final
class DeadlineController:
    """Maximises ``E[tokens(gamma)] / cost_ns(gamma)`` over every gamma whose round ends before the deadline.

    ``E[tokens] = 1 + sum over d of prod over j <= d of acceptance[j]``, where ``acceptance[j]`` is the share of rounds
    that accepted draft depth j among those that accepted j - 1; older rounds weigh less. ``cost_ns(gamma)`` is the
    table's drafting cost plus that of a step of gamma + 1 tokens, times the ``quantile`` of measured / predicted over
    the last ``window`` rounds (1 while there are none). Prefill rounds count neither for costs nor for acceptance.

    A chunk in which no round fitted drops the oldest quarter of that window: a stall must not end drafting for good.
    """

    def __init__(self, options: Options, cost_ns: Mapping[str, Any] | None, max_step: int | None = None) -> None:
        """Read a cost table.

        Args:
            options: see `Options`.
            cost_ns: ``{"draft": {gamma: ns}, "step": {n: ns}}``, medians measured at start-up; n counts the tokens of
                the step, 1 = plain decoding. Lengths in between are interpolated, none is extrapolated.
            max_step: most tokens of one step of the target, None = as in the table.
        """
        if not cost_ns or not cost_ns.get("step"):
            raise BadConfig("the deadline controller needs a measured cost table; calibrate, or use controller: fixed")
        step = _sorted_costs(cost_ns["step"], 1.0)
        draft = {0: 0.0} | _sorted_costs(cost_ns.get("draft") or {})
        longest = min(options.max_gamma, max(step) - 1, math.inf if max_step is None else max_step - 1)
        if len(draft) > 1:  # a drafter without measured cost is a free one
            longest = min(longest, max(draft))
        gammas = np.arange(max(int(longest), 0) + 1)
        self._predicted_ns: list[float] = (
            np.interp(gammas, list(draft), list(draft.values()))
            + np.interp(gammas + 1, list(step), list(step.values()))
        ).tolist()
        self._options = options
        self._hits = np.zeros(len(gammas))  # [depth] accepted at this depth, in forgetting counts
        self._tries = np.zeros(len(gammas))  # [depth] reached and judged
        self._ratios: deque[float] = deque()  # measured / predicted, oldest first
        self._sorted_ratios: list[float] = []
        self._num_warm = 0
        self._is_prefill = True
        self._num_rounds = 1  # since `begin`, prefill left out
        self._depth = 0

    @property
    def correction(self) -> float:
        """What predictions are scaled by: the quantile of measured / predicted over the window, 1.0 if it is empty."""
        if not self._sorted_ratios:
            return 1.0
        index = math.ceil(self._options.quantile * len(self._sorted_ratios)) - 1
        return self._sorted_ratios[max(index, 0)]

    def begin(self, remaining_ns: int, history: ChunkHistory | None = None) -> bool:
        """A new chunk starts; what was learned stays."""
        if self._num_rounds == 0:
            for _ in range(-(-len(self._ratios) // 4)):
                self._forget_oldest()
        self._is_prefill, self._num_rounds = True, 0
        return remaining_ns > 0

    def plan(self, remaining_ns: int, tokens_left: int) -> Plan | None:
        """The gamma with the most expected tokens per ns that fits, None if not even the cheapest round does."""
        options = self._options
        budget_ns = (remaining_ns - options.margin_ns) / self.correction
        acceptance = (self._hits + options.prior * options.prior_weight) / (self._tries + options.prior_weight)
        chances: list[float] = acceptance.tolist()
        longest_path = max(min(tokens_left - 1, options.max_gamma if options.depth is None else options.depth), 0)
        best, best_rate = -1, 0.0
        expected, reach = 1.0, 1.0
        for depth, cost in enumerate(self._predicted_ns[:: options.top_k][: longest_path + 1]):
            if depth:
                reach *= chances[depth - 1]
                expected += reach
            if cost <= budget_ns and expected > best_rate * cost:
                best, best_rate = depth, expected / cost
        if best < 0:
            return None
        self._depth = best
        return Plan(best * options.top_k, best, options.top_k, options.tolerance)

    def record(self, measured: Round) -> None:
        """Learn costs and acceptance from a finished round."""
        if self._is_prefill:
            self._is_prefill = False
            return
        self._num_rounds += 1
        drafted, accepted = measured.num_drafted, measured.num_accepted
        num_tried = min(accepted + 1, drafted, self._depth)  # depths that were judged
        for counts in (self._hits, self._tries):
            counts[:num_tried] *= self._options.forget
            counts[num_tried:] *= self._options.forget_untried
        self._hits[:accepted] += 1.0
        self._tries[:num_tried] += 1.0
        self._num_warm += 1
        if self._num_warm > self._options.warmup:
            predicted_ns = self._predicted_ns[min(drafted, len(self._predicted_ns) - 1)]
            if len(self._ratios) == self._options.window:
                self._forget_oldest()
            ratio = max(measured.total_ns, 1) / predicted_ns
            self._ratios.append(ratio)
            insort(self._sorted_ratios, ratio)

    def _forget_oldest(self) -> None:
        del self._sorted_ratios[bisect_left(self._sorted_ratios, self._ratios.popleft())]


def _sorted_costs(table: Mapping[Any, Any], least: float = 0.0) -> dict[int, float]:
    """Lengths ascending; JSON turns them into strings.

    Raises:
        BadConfig: a cost below ``least`` or not finite.
    """
    costs = {int(length): float(ns) for length, ns in table.items()}
    for length, ns in costs.items():
        if not (math.isfinite(ns) and ns >= least) or length < 0:
            raise BadConfig(f"cost table: {ns} ns at length {length}; costs are finite and at least {least}")
    return dict(sorted(costs.items()))


def build(options: Options, parts: Parts) -> DeadlineController:
    """Needs the cost table, and the target for its longest step."""
    costs = None if parts.costs is None else parts.costs.medians()
    return DeadlineController(options, costs, None if parts.target is None else parts.target.max_step)
