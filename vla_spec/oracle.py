"""The most tokens that could have been verified before a deadline, by somebody who knew the future.

A yardstick for controllers, never used while a robot moves: it plays one chunk in hindsight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadConfig

#: ``(round, size) -> ns``: what a call of this size would take in this round; rounds count from 0 behind the prefill.
CallNs = Callable[[int, int], float]


class BestChunk(NamedTuple):
    """The best that one chunk could have been.

    Attributes:
        num_tokens: verified tokens before the deadline; 0 = not even the prefill was in time.
        finish_ns: the earliest moment at which so many are verified, counted from the start of the prefill. [ns]
        gammas: the draft lengths that get there, round by round.
    """

    num_tokens: int
    finish_ns: float
    gammas: tuple[int, ...]


def accepted_runs(matches: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Agreement per position -> accepted tokens per start, for drafts that do not depend on where they start.

    Args:
        matches: bool [T]; the drafted token at this chunk position is the one that the target takes.

    Returns:
        int64 [T]: entry m is how many tokens of a long draft that starts at position m are accepted.
    """
    agrees = np.asarray(matches, bool)
    runs = np.zeros(len(agrees), np.int64)
    run = 0
    for position in range(len(agrees) - 1, -1, -1):
        run = run + 1 if agrees[position] else 0
        runs[position] = run
    return runs


def best_chunk(
    prefill_ns: float,
    step_ns: CallNs,
    draft_ns: CallNs,
    accepted: Sequence[int] | npt.NDArray[np.integer],
    budget_ns: float,
    num_tokens: int,
    max_step: int,
) -> BestChunk:
    """The most tokens in the budget, and among these the earliest, by dynamic programming over rounds and lengths.

    What it knows, and no controller can: what every call will take in every round at every size, and how much of
    every draft will be accepted. What binds it as it binds a controller: the prefill comes first and gives one token;
    each round drafts gamma >= 0 tokens, steps over gamma + 1, and gains ``min(gamma, accepted) + 1``; a round that
    ends after the budget gives nothing. It may stop at any time, so it is never late.

    Exact for chain drafts and rules whose verdict depends on the position alone: greedy verification of a
    deterministic drafter, where every controller walks along the same target tokens. With an error budget that is
    spent along the way the verdict depends on the rounds before, and this is an estimate. A call's time belongs to the
    round's number, not to the moment of its start. Cost: O(rounds * T * gamma), about a millisecond.

    Args:
        prefill_ns: of this chunk. [ns]
        step_ns: ``(round, tokens of the step) -> ns``; what else a round costs (judging, host) belongs in here.
        draft_ns: ``(round, gamma) -> ns`` for gamma >= 1; drafting nothing is free.
        accepted: int [T]; entry m is how many tokens of a long draft are accepted when m tokens are decoded, m >= 1.
            Entry 0 is not used: the first token comes from the prefill.
        budget_ns: from the start of the prefill to the deadline. [ns]
        num_tokens: T.
        max_step: most tokens of one step, so that gamma < max_step.

    Raises:
        BadConfig: sizes below 1, or not one acceptance per position.
    """
    if num_tokens < 1 or max_step < 1 or len(accepted) < num_tokens:
        raise BadConfig(
            f"oracle: num_tokens is {num_tokens}, max_step {max_step}, len(accepted) {len(accepted)}; valid: 1 or "
            "more, and one acceptance per position"
        )
    if prefill_ns > budget_ns:
        return BestChunk(0, 0.0, ())
    # A draft past the chunk's last token but one gains nothing: a bonus token always follows.
    usable = np.minimum(np.asarray(accepted[:num_tokens], np.int64), num_tokens - 1 - np.arange(num_tokens))
    longest = min(max_step - 1, num_tokens - 1)
    earliest = np.full(num_tokens + 1, np.inf)  # [m] reached after exactly this many rounds
    earliest[1] = prefill_ns
    best_m, best_ns, best_round = 1, float(prefill_ns), 0
    choices: list[npt.NDArray[np.int64]] = []  # [round][m] the gamma that led to m
    gains: list[npt.NDArray[np.int64]] = []  # [round][m] tokens that it gained
    while (started := np.flatnonzero(np.isfinite(earliest[:num_tokens]))).size:  # a whole chunk needs no round more
        index = len(choices)
        cost = np.array([step_ns(index, g + 1) + (draft_ns(index, g) if g else 0.0) for g in range(longest + 1)])
        if earliest[started].min() + cost.min() > budget_ns:
            break
        # Drafting more than what is accepted is pointless unless longer calls happen to be faster.
        cheapest = [g + int(cost[g:].argmin()) for g in range(longest + 1)]
        after = np.full(num_tokens + 1, np.inf)
        choice = np.zeros(num_tokens + 1, np.int64)
        gain = np.zeros(num_tokens + 1, np.int64)
        for gained in range(min(longest, int(usable[started].max())) + 1):
            from_m = started[usable[started] >= gained]
            gamma = np.where(usable[from_m] == gained, cheapest[gained], gained)
            to_m = from_m + gained + 1
            reached = earliest[from_m] + cost[gamma]
            better = (reached < after[to_m]) & (reached <= budget_ns)
            to_m = to_m[better]
            after[to_m], choice[to_m], gain[to_m] = reached[better], gamma[better], gained + 1
        choices.append(choice)
        gains.append(gain)
        earliest = after
        reachable = np.flatnonzero(np.isfinite(after))
        if not len(reachable):
            break
        m = int(reachable[-1])
        if m > best_m or (m == best_m and after[m] < best_ns):
            best_m, best_ns, best_round = m, float(after[m]), len(choices)
    gammas, m = [], best_m
    for index in range(best_round - 1, -1, -1):
        gammas.append(int(choices[index][m]))
        m -= int(gains[index][m])
    return BestChunk(best_m, best_ns, tuple(reversed(gammas)))


def best_tokens(
    prefill_ns: float,
    step_ns: CallNs,
    draft_ns: CallNs,
    accepted: Sequence[int] | npt.NDArray[np.integer],
    budget_ns: float,
    num_tokens: int,
    max_step: int,
) -> int:
    """How many tokens `best_chunk` verifies in time; same arguments."""
    return best_chunk(prefill_ns, step_ns, draft_ns, accepted, budget_ns, num_tokens, max_step).num_tokens


def expected_tokens(
    prefill_ns: float,
    step_ns: CallNs,
    draft_ns: CallNs,
    survival: npt.ArrayLike,
    budget_ns: float,
    num_tokens: int,
    max_step: int,
    bin_ns: float,
) -> float:
    """Tokens expected by somebody who knows every latency, but of acceptance only its law, as a controller may.

    The best policy by dynamic programming over rounds, tokens decoded and time: in each round it chooses a length by
    what was accepted so far and by what all calls will take. The difference to `best_tokens` is what cannot be had
    without knowing the target's answers; the difference to a controller is what its clock costs.

    Args:
        prefill_ns: of this chunk. [ns]
        step_ns: ``(round, tokens of the step) -> ns``, host included.
        draft_ns: ``(round, gamma) -> ns`` for gamma >= 1.
        survival: float [T, >= gammas + 1]; entry [m, d] is P(at least d tokens of a draft are accepted), when m tokens
            are decoded and the draft is longer.
        budget_ns: from the start of the prefill to the deadline. [ns]
        num_tokens: T.
        max_step: most tokens of one step.
        bin_ns: resolution of time; calls are rounded to whole bins, so that errors cancel over rounds. [ns]

    Raises:
        BadConfig: sizes below 1, or no survival for each position and length.
    """
    alive = np.asarray(survival, float)
    longest = min(max_step - 1, num_tokens - 2)
    if num_tokens < 1 or max_step < 1 or alive.ndim != 2 or len(alive) < num_tokens or alive.shape[1] <= longest:
        raise BadConfig(
            f"oracle: num_tokens is {num_tokens}, max_step {max_step}, survival {alive.shape}; valid: 1 or more, and "
            "one probability per position and length"
        )
    if prefill_ns > budget_ns:
        return 0.0
    num_bins = int((budget_ns - prefill_ns) / bin_ns) + 1
    costs: list[list[int]] = []  # [round][gamma] in bins
    spent = 0.0
    while spent < num_bins and len(costs) < num_tokens - 1:
        index = len(costs)
        row = [step_ns(index, g + 1) + (draft_ns(index, g) if g else 0.0) for g in range(max(longest, 0) + 1)]
        costs.append([int(ns / bin_ns + 0.5) for ns in row])
        spent += max(min(costs[-1]), 1)
    # value[m, t]: tokens still to come with t bins left, before round number `index`.
    value = np.zeros((num_tokens + 1, num_bins))
    for row_bins in reversed(costs):
        best = np.zeros_like(value)
        # expected[m, t] of a draft of so many tokens, before its time is taken off; longer drafts add to it.
        expected = np.zeros_like(value)
        expected[1:num_tokens] = 1.0 + value[2:]
        for gamma, bins in enumerate(row_bins):
            last = num_tokens - gamma  # a draft of gamma from m needs m + gamma + 1 <= T
            if gamma:
                gained = 1.0 + value[gamma + 2 :] - value[gamma + 1 : -1]  # [m = 1 .. T - gamma - 1]
                expected[1:last] += alive[1:last, gamma, None] * gained
            if bins < num_bins:
                target = best[1:last, bins:]
                np.maximum(target, expected[1:last, : num_bins - bins], out=target)
        value = best
    return 1.0 + float(value[1, -1]) if num_tokens > 1 else 1.0
