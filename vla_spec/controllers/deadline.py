"""Verify as many tokens as the time left allows, and be late no more often than was agreed.

A round is started only if the probability that it overruns the time left fits into what the chunk may still risk; among
the rounds that do, the one is taken that is worth most by a table of expected tokens over tokens decoded and time left.
Sources: the expected yield of a draft is Leviathan et al. 2023, arXiv:2211.17192, section 3.3, with costs per size
instead of one ratio; the correction of the risk by observed misses is that of Gibbs and Candes 2021, arXiv:2106.00170.
docs/deadline-controller.md explains the whole, with figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.controllers._lookahead import NOTHING, Lookahead
from vla_spec.controllers._overrun_law import OverrunLaw, exceedance
from vla_spec.controllers._survival import SurvivalModel
from vla_spec.costs import Costs, Quantiles
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import Plan, Round

#: Time bins per plain round, and in all: plans that have more time than this are made as if they had just this.
BINS_PER_ROUND, NUM_BINS = 12, 288
#: A whole chunk is worth so many tokens more; a plain round's time, when the chunk is whole, so many.
BONUS, HURRY = 1.0, 0.02
#: A tolerance is wide enough if it leaves less than this of the chunk to be expected unverified. [tokens]
SHORTFALL = 0.5
#: How often a depth of a tree is assumed to fail where one of a chain does, until that was seen.
TREE_FAILURE = 0.5
#: One call changes the device's speed as if it had taken no more than twice as long, or half as long, as predicted.
MOST_SURPRISE = math.log(2.0)
#: Limits of the device's speed, as logarithms of the factor on costs.
FASTEST, SLOWEST = math.log(1 / 16), math.log(64.0)
#: Calls longer than predicted by more than this factor are stalls: stopping earlier is no remedy.
STALL = math.log(4.0)
#: A prefill more likely to be late than so many times the bound is not started.
HOPELESS = 10.0
#: Divisor of the risk by observed misses: at first, least and most, as logarithms. It begins below one because most
#: rounds are started with more time than the risk asks for, so that a tenth of the risk comes true, or less.
FIRST_CAUTION, LEAST_CAUTION, MOST_CAUTION = math.log(1 / 4), math.log(1 / 8), math.log(100.0)
#: Chunks in a row in which nothing could be tried, after which what was learnt fades, and by how much in each.
STARVED, THAW = 16, 0.03
#: Weights of a round in what changes slowly: how drafts and host compare with steps, and what drafters offer.
SLOW_GAIN, OFFER_GAIN = 0.01, 0.02
#: Nothing is ever tried that would need the device to be more than this much faster than the table says.
LEAST_PROMISE = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """A bound on late chunks, and what to choose from.

    Attributes:
        max_late: share of chunks that may be late because of a round that should not have been started, in (0, 1].
        aim: share of it that misses are steered to; the rest is for changes that could not be foreseen. In (0, 1].
        max_gamma: most nodes to draft; the cost table and the engine's ``max_step`` limit it further.
        depth: longest path, None = no limit of its own.
        top_k: nodes per depth of a tree, whose gamma is a multiple of it; 1 = chains only. Above 1 both are tried.
        tolerance: largest scale in [0, 1] of the rule's own tolerance.
        least_tolerance: what is used while the chunk is expected to be whole in time without more; None = always
            ``tolerance``.
        margin_ns: kept free before the deadline. The policy takes its own reserve off before. [ns]
        gain: weight of a new call in the device's speed, in (0, 1]; larger follows faster, and predicts less exactly.
        jump: the same for a call that took unusually long, or short, directly after another one of that sort: a device
            that has become slower is noticed at the second call, and one spike alone does not count as that.
        memory: rounds after which an overrun has lost two thirds of its weight in the law of overruns. [rounds]
        warmup: first rounds of a run, and first prefills, whose times count for nothing.
        spread: relative spread assumed at least for costs beyond the table's largest quantile, until enough calls were
            seen. 0 = trust the table.
        prior_rounds: how many rounds the table's law counts as. [rounds]
        step_up: what the logarithm of the risk of a round falls by after a miss; taken back slowly without misses.
        patience: chunks in a row without time for a prefill after which one is tried nevertheless; doubles up to
            ``1 / max_late`` chunks while that fails.
        prior: acceptance assumed at every position and depth before anything was seen.
        prior_weight: how many observations the prior counts as.
        forget: factor on the weight of what was seen of acceptance, per round. What is not tried any more returns to
            the prior, so that it is tried again some day.
    """

    max_late: float = 1e-3
    aim: float = 0.5
    max_gamma: int = 16
    depth: int | None = None
    top_k: int = 1
    tolerance: float = 1.0
    least_tolerance: float | None = None
    margin_ns: int = 100_000
    gain: float = 0.15
    jump: float = 0.5
    memory: float = 3000.0
    warmup: int = 8
    spread: float = 0.05
    prior_rounds: float = 100.0
    step_up: float = 0.7
    patience: int = 4
    prior: float = 0.7
    prior_weight: float = 4.0
    forget: float = 0.998

    def __post_init__(self) -> None:
        if self.max_gamma < 0 or self.top_k < 1 or (self.depth is not None and self.depth < 0):
            raise BadConfig(
                f"need max_gamma >= 0, depth >= 0, top_k >= 1, got {self.max_gamma}, {self.depth}, {self.top_k}"
            )
        least = self.tolerance if self.least_tolerance is None else self.least_tolerance
        if not 0.0 <= least <= self.tolerance <= 1.0:
            raise BadConfig(
                f"need 0 <= least_tolerance <= tolerance <= 1, got {self.least_tolerance} and {self.tolerance}"
            )
        for name in ("margin_ns", "warmup", "spread", "step_up"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadConfig(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("memory", "prior_rounds", "patience", "prior_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadConfig(f"{name} must be more than 0, got {getattr(self, name)}")
        if not 0.0 <= self.prior <= 1.0:
            raise BadConfig(f"prior must be in [0, 1], got {self.prior}")
        for name in ("max_late", "aim", "gain", "jump", "forget"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise BadConfig(f"{name} must be in (0, 1], got {getattr(self, name)}")


class _Kind:
    """Chains, or trees, at one tolerance: consecutive actions of depth 0, 1, ... (trees begin at depth 0 as well)."""

    __slots__ = ("first", "longest", "top_k")

    def __init__(self, first: int, longest: int, top_k: int) -> None:
        self.first, self.longest, self.top_k = first, longest, top_k


@final
class DeadlineController:
    """Predict, bound the risk, look ahead, and learn from each round.

    A round is predicted to take ``s * (d * draft[gamma] + step[n] + h)``: table medians, slow corrections d of drafts
    and h for the host, and the device's speed s, which follows the last few calls. ``OverrunLaw`` knows how far
    predictions were exceeded. A round is started if ``P(residual > log(time left / prediction)) <= r``, stalls left
    out, with ``r = aim * max_late / c``: after each chunk, caution c is raised if a round was late, and else lowered a
    little, so that in the long run no more than ``aim * max_late`` of the chunks are. Rounds behind which there is time
    for another one have next to no risk, so that a chunk's is that of its last round or two.

    Among the rounds that may be started `Lookahead` says which one is worth most, by acceptance per position and depth.

    Not thread-safe. Constant memory. Never raises after construction.
    """

    def __init__(
        self,
        options: Options,
        costs: Costs | None,
        num_tokens: int,
        max_step: int | None = None,
        has_tree: bool = True,
    ) -> None:
        """Read a cost table and fill the first look-ahead.

        Args:
            options: see `Options`.
            costs: of target and drafter.
            num_tokens: T.
            max_step: most tokens of one step of the target, None = as in the table.
            has_tree: the target takes branching drafts.

        Raises:
            BadConfig: no cost table, or costs that are not finite or below 1 ns.
        """
        if costs is None or not costs.step or 0.5 not in costs.prefill:
            raise BadConfig("the deadline controller needs a measured cost table; calibrate, or use controller: fixed")
        _check(costs)
        self._options, self._num_tokens = options, max(num_tokens, 1)
        longest = min(options.max_gamma, max(costs.step) - 1, math.inf if max_step is None else max_step - 1)
        if max(costs.draft, default=0) > 0:  # a drafter without measured cost is a free one
            longest = min(longest, max(costs.draft))
        most_nodes = max(int(longest), 0)
        deepest = max(min(most_nodes, self._num_tokens - 2), 0)
        if options.depth is not None:
            deepest = min(deepest, options.depth)

        widths = (1,) if options.top_k == 1 or not has_tree else (1, options.top_k)
        self._kinds: list[_Kind] = []
        for width in widths:
            first = sum(kind.longest + 1 for kind in self._kinds)
            self._kinds.append(_Kind(first, min(deepest, most_nodes // width), width))
        shapes = [(depth, kind.top_k) for kind in self._kinds for depth in range(kind.longest + 1)]
        if len(shapes) >= NOTHING:
            raise BadConfig(f"max_gamma is {options.max_gamma}; valid: so that there are fewer than {NOTHING} drafts")
        self._gammas = np.array([depth * width for depth, width in shapes])  # [actions]
        self._kind_of = [i for i, kind in enumerate(self._kinds) for _ in range(kind.longest + 1)]
        tolerances = [options.tolerance]
        if options.least_tolerance is not None and options.least_tolerance < options.tolerance:
            tolerances.insert(0, options.least_tolerance)
        self._plans = [
            [Plan(depth * width, depth, width if depth else 1, tolerance) for depth, width in shapes]
            for tolerance in tolerances
        ]

        nodes = np.arange(most_nodes + 1)
        self._draft_ns = np.array([costs.draft_quantile_ns(n, 0.5) if n else 0.0 for n in nodes.tolist()])
        self._step_ns = np.array([costs.step_ns(n + 1) for n in nodes.tolist()])
        self._drafted_ns, self._stepped_ns = self._draft_ns.tolist(), self._step_ns.tolist()
        self._prefill_ns = max(costs.prefill_ns, 1.0)
        of_rounds = exceedance(_round_quantiles(costs, most_nodes), options.spread)
        of_prefills = exceedance(costs.prefill, options.spread)
        self._law = OverrunLaw(of_rounds, options.prior_rounds, options.memory)
        self._prefill_law = OverrunLaw(of_prefills, options.prior_rounds, options.memory)
        relative = [1.0 if kind.top_k == 1 else TREE_FAILURE for _ in tolerances for kind in self._kinds]
        self._survival = SurvivalModel(
            self._num_tokens, relative, max(deepest, 1), options.prior, options.prior_weight, options.forget
        )
        self._offered = np.ones(most_nodes + 1)  # [n] share of rounds, asked for n nodes or more, that got them
        bin_ns = max(float(self._step_ns[0]) / BINS_PER_ROUND, 1.0)
        self._bins_per_ns = 1.0 / bin_ns
        self._lookaheads = [
            Lookahead(self._num_tokens, bin_ns, NUM_BINS, BONUS, HURRY / BINS_PER_ROUND) for _ in tolerances
        ]

        self._log_speed, self._speed = 0.0, 1.0  # s
        self._last_surprise = 0  # -1 = unusually short, 1 = unusually long
        self._draft_bias = self._prefill_bias = 1.0
        self._host_ns = 0.0
        self._log_caution = FIRST_CAUTION
        self._risk = options.aim * options.max_late * math.exp(-FIRST_CAUTION)
        self._num_rounds_seen = self._num_prefills_seen = 0
        self._num_refused, self._num_starved, self._patience = 0, 0, options.patience
        self._is_prefill, self._was_begun, self._is_probe, self._has_missed = True, False, False, False
        self._num_rounds = 0  # of this chunk, the prefill left out
        self._given_ns, self._left_ns = 0.0, 0.0  # time left when the prefill, and when the last round, was started
        self._action, self._level, self._m = 0, 0, 1  # of the last plan
        self._prefill_risk = 0.0
        self._need = 0.0  # time left / predicted time from which a round is started; 0 = not yet known for this chunk
        self._row = 0
        self._refresh()
        for row in range(self._num_tokens - 1, 0, -1):
            self._update_row(row)

    # ---- what it is told ------------------------------------------------------------------------------------------

    def begin(self, remaining_ns: int, history: ChunkHistory | None = None) -> bool:
        """A new chunk: settle the last one, then ask whether a prefill fits."""
        options = self._options
        self._settle()
        left_ns = self._given_ns = remaining_ns - options.margin_ns
        self._is_prefill, self._is_probe, self._was_begun = True, False, left_ns > 0
        self._num_rounds, self._has_missed, self._need = 0, False, 0.0
        if left_ns <= 0:
            return False
        self._refresh()
        self._row = self._row - 1 if self._row > 1 else self._num_tokens - 1
        self._update_row(self._row)
        x = math.log(left_ns / (self._prefill_ns * self._prefill_bias * self._speed))
        self._prefill_risk = self._prefill_law.probability(x)
        if self._prefill_risk <= HOPELESS * options.max_late:
            return True
        self._num_refused += 1
        if self._num_refused > STARVED:
            self._prefill_law.relax(THAW)
        # While nothing is started nothing is measured, and what is known gets old: try again, ever less often.
        if self._num_refused < self._patience or left_ns < LEAST_PROMISE * self._prefill_ns:
            return False
        self._num_refused, self._is_probe = 0, True
        self._patience = max(self._patience, min(2 * self._patience, round(1 / options.max_late)))
        return True

    def plan(self, remaining_ns: int, tokens_left: int) -> Plan | None:
        """One look into the table, then as much less as the risk asks for."""
        left_ns = remaining_ns - self._options.margin_ns
        if left_ns <= 0:
            return None
        if self._need == 0.0:
            self._need = self._needed(left_ns)
        m = min(max(self._num_tokens - tokens_left, 1), self._num_tokens - 1)
        if m < 1:  # chunks of one token
            return None
        device_ns = left_ns / self._speed
        index = min(int(device_ns * self._bins_per_ns), NUM_BINS - 1)
        level = 0
        while level < len(self._lookaheads) - 1 and (
            self._lookaheads[level].value(m, index) < tokens_left + BONUS - SHORTFALL
        ):
            level += 1
        action = self._lookaheads[level].choice(m, index)
        if action == NOTHING:
            action = max(min(self._kinds[0].longest, tokens_left - 1), 0)
        costs, most_ns = self._cost_ns, device_ns / self._need
        if costs[action] > most_ns:
            first = self._kinds[self._kind_of[action]].first
            while action > first and costs[action] > most_ns:
                action -= 1
            if costs[action] > most_ns:
                action = 0
                if costs[0] > most_ns:
                    return None
        self._action, self._level, self._m, self._left_ns = action, level, m, left_ns
        return self._plans[level][action]

    def record(self, measured: Round) -> None:
        """Learn times and acceptance from a finished round."""
        total_ns = max(measured.total_ns, 1)
        if self._is_prefill:
            self._is_prefill = False
            self._record_prefill(total_ns)
            return
        self._num_rounds += 1
        drafted, accepted, options = measured.num_drafted, measured.num_accepted, self._options
        gamma, depth, _, _ = self._plans[self._level][self._action]
        if depth > 0:
            kind = self._level * len(self._kinds) + self._kind_of[self._action]
            self._survival.record(self._m, kind, depth, min(accepted, depth))
            self._offered[1 : gamma + 1] *= 1.0 - OFFER_GAIN
            self._offered[1 : min(drafted, gamma) + 1] += OFFER_GAIN
        else:
            self._survival.fade()
        self._num_rounds_seen += 1
        if self._num_rounds_seen <= options.warmup:
            return
        size = min(drafted, len(self._stepped_ns) - 1)
        draft_ns, step_ns = self._draft_bias * self._drafted_ns[gamma], self._stepped_ns[size]
        residual = math.log(total_ns / ((draft_ns + step_ns + self._host_ns) * self._speed))
        # A call longer than all of the chunk's time would have been late whenever it was started: counted as a risk of
        # being late, a few of them outweigh any bound, and nothing is started any more.
        if residual < STALL or total_ns <= self._given_ns:
            self._law.record(residual)
        if residual < STALL:
            self._has_missed |= total_ns > self._left_ns
        if -MOST_SURPRISE < residual < MOST_SURPRISE:
            weight = max(SLOW_GAIN, 1 / (2 + self._num_rounds_seen - options.warmup))
            speed = max(measured.step_ns / step_ns, 1e-3)  # of this step; drafts and host are relative to steps
            if draft_ns > 0:
                self._draft_bias *= 1.0 + weight * _clip(measured.draft_ns / (draft_ns * speed) - 1.0)
            host_ns = min((measured.judge_ns + measured.commit_ns) / speed, step_ns)
            self._host_ns += weight * (host_ns - self._host_ns)
        self._follow(residual)

    # ---- what it makes of it --------------------------------------------------------------------------------------

    @property
    def correction(self) -> float:
        """What predictions are scaled by at the moment; 1 = as in the table."""
        return self._speed

    @property
    def caution(self) -> float:
        """What the risk of a round is divided by because of observed misses; at first 1/4."""
        return math.exp(self._log_caution)

    def overrun_probability(self, gamma: int, remaining_ns: int) -> float:
        """That a round with a chain of so many tokens, started now, ends after the time left."""
        left_ns = remaining_ns - self._options.margin_ns
        if left_ns <= 0:
            return 1.0
        cost_ns = self._cost_ns[min(gamma, self._kinds[0].longest)]
        return self._law.probability(math.log(left_ns / (cost_ns * self._speed)))

    def _record_prefill(self, total_ns: int) -> None:
        self._num_prefills_seen += 1
        if total_ns <= self._given_ns:
            self._num_refused, self._patience = 0, self._options.patience
        if self._num_prefills_seen <= self._options.warmup:
            return
        residual = math.log(total_ns / (self._prefill_ns * self._prefill_bias * self._speed))
        if residual < STALL or total_ns <= self._given_ns:
            self._prefill_law.record(residual)
        if self._is_probe and residual < 0:  # what was known of the device was too old
            self._log_speed = max(self._log_speed + residual, FASTEST)
            self._speed = math.exp(self._log_speed)
            return
        self._prefill_bias *= 1.0 + SLOW_GAIN * _clip(residual)
        self._follow(residual)

    def _follow(self, residual: float) -> None:
        """Move the device's speed towards what was measured; one stall alone must not change it much."""
        gain, usual = self._options.gain, self._law.usual
        surprise = (residual > usual) - (residual < -usual)
        if surprise and surprise == self._last_surprise:
            gain = max(gain, self._options.jump)
        self._last_surprise = surprise
        moved = self._log_speed + gain * min(max(residual, -MOST_SURPRISE), MOST_SURPRISE)
        self._log_speed = min(max(moved, FASTEST), SLOWEST)
        self._speed = math.exp(self._log_speed)

    def _settle(self) -> None:
        """The last chunk is over: correct the caution by whether it missed, or fade if nothing could be tried."""
        if not self._was_begun:
            return
        target = self._options.aim * self._options.max_late
        if self._num_rounds > 0:
            self._num_starved = 0
            moved = self._log_caution + self._options.step_up * ((1.0 if self._has_missed else 0.0) - target)
            self._log_caution = min(max(moved, LEAST_CAUTION), MOST_CAUTION)
        else:
            self._num_starved += 1
            if self._num_starved > STARVED:
                self._law.relax(THAW)
                self._log_caution += THAW * (FIRST_CAUTION - self._log_caution)
        self._risk = target * math.exp(-self._log_caution)

    def _needed(self, left_ns: float) -> float:
        """Time left / predicted time from which a round is started in this chunk.

        What is added to the risk is the share of calls that would be late with all of the chunk's time, ``left_ns``.
        """
        x = math.log(left_ns / (self._cost_ns[0] * self._speed))
        risk = max(self._risk - self._prefill_risk, self._risk / 2)
        return math.exp(self._law.quantile(risk + self._law.probability(max(x, STALL))))

    def _refresh(self) -> None:
        """Everything that follows slowly, once per chunk."""
        self._law.fit()
        self._prefill_law.fit()
        self._survival.refresh()
        round_ns = self._draft_bias * self._draft_ns[self._gammas] + self._host_ns
        self._cost_ns = (round_ns + self._step_ns[self._gammas]).tolist()
        # A drafter may offer less than it was asked for: its drafts are verified at the size that they have.
        offered = np.cumsum(self._offered) - 1.0
        self._mean_ns = (round_ns + np.interp(offered, np.arange(len(offered)), self._step_ns)[self._gammas]).tolist()

    def _update_row(self, m: int) -> None:
        """Look ahead again from m decoded tokens."""
        if m < 1:
            return
        needed = math.exp(self._law.quantile(self._risk))
        needs = [needed * cost_ns for cost_ns in self._cost_ns]
        room = self._num_tokens - m - 1
        for level, lookahead in enumerate(self._lookaheads):
            kinds = [
                (kind.first, self._survival.survival(m, level * len(self._kinds) + i, min(kind.longest, room)))
                for i, kind in enumerate(self._kinds)
            ]
            lookahead.update(m, kinds, self._mean_ns, needs)


def _clip(change: float) -> float:
    return min(max(change, -1.0), 1.0)


def _check(costs: Costs) -> None:
    """Raises BadConfig for costs that nothing can be divided by."""
    for what, cost, least in (
        ("prefill", costs.prefill, 1.0),
        *((f"step {n}", cost, 1.0) for n, cost in costs.step.items()),
        *((f"draft {n}", cost, 0.0) for n, cost in costs.draft.items()),
    ):
        for q, ns in cost.items():
            if not (math.isfinite(ns) and ns >= least):
                raise BadConfig(f"cost table: {ns} ns for {what} at quantile {q}; valid: finite, {least} or more")


def _round_quantiles(costs: Costs, most_nodes: int) -> Quantiles:
    """The shape of a round's law: cost / median, averaged over sizes; slow drafts are taken to meet slow steps."""
    sizes = sorted({0, most_nodes // 2, most_nodes})
    stored = sorted({q for cost in costs.step.values() for q in cost} | {0.5})

    def round_ns(n: int, q: float) -> float:
        return costs.step_quantile_ns(n + 1, q) + (costs.draft_quantile_ns(n, q) if n else 0.0)

    return {q: float(np.mean([round_ns(n, q) / round_ns(n, 0.5) for n in sizes])) * 1e6 for q in stored}


def build(options: Options, parts: Parts) -> DeadlineController:
    """Needs the cost table, the domain for the chunk's length, and the target for its longest step and trees."""
    target = parts.target
    return DeadlineController(
        options,
        parts.costs,
        parts.domain.num_tokens,
        None if target is None else target.max_step,
        target is None or target.info.has_tree_mask,
    )
