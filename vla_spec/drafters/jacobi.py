"""Draft the last Jacobi iterate: what the target itself predicted, in the last verify, for the positions ahead.

Source: Santilli et al. 2023, arXiv:2305.10427 (Jacobi decoding); Song et al. 2025 (PD-VLA), arXiv:2503.02310 (on whole
action chunks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan, Scores


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing to set; the window is the plan's gamma."""


@final
class JacobiDrafter:
    """``iterate[m + i] <- argmax(row i of the last verify)`` for every position of the window, accepted or not.

    A verify of the iterate is one Jacobi iteration, and an exact greedy rule accepts its prefix that has converged.
    Positions that no iteration has reached start from the previous chunk's remainder, else from the previous control
    step's action, else from the middle bin. Costs one argmax over the verified rows; needs no model.

    It asks for scores (`ScoreObserver`): a drafter that is wrapped must pass `observe` on.
    """

    def __init__(self, vocab_size: int, num_tokens: int, tokens_per_step: int) -> None:
        self._stride, self._middle = tokens_per_step, vocab_size // 2
        self._iterate = np.zeros(num_tokens, np.int32)  # [T]
        self._known = 0  # positions before this one hold a guess
        self._drafted_from = 0  # chunk position of the last draft's first token

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """The first guess: the previous chunk's remainder."""
        remainder = EMPTY_DRAFT.tokens if history is None else history.tokens[max(history.consumed, 0) :]
        self._known = min(len(remainder), len(self._iterate))
        self._iterate[: self._known] = remainder[: self._known]

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The iterate's next window, as a chain."""
        iterate, m, stride = self._iterate, len(prefix), self._stride
        end = min(m + max(min(plan.gamma, plan.depth), 0), len(iterate))
        iterate[:m] = prefix[: len(iterate)]
        known = max(self._known, m)
        if known < end:  # guesses that are made anew each time: a later action step may be known by then
            before = iterate[known - stride : known] if known >= stride else np.full(stride, self._middle, np.int32)
            iterate[known:end] = np.resize(before, end - known)
        self._drafted_from = m
        return Draft.chain(iterate[m:end].copy())

    def observe(self, draft: Draft, scores: Scores) -> None:
        """Take the target's own predictions: row i is about chunk position ``m + i``."""
        if not len(draft.tokens):
            return
        end = min(self._drafted_from + len(scores.logits), len(self._iterate))
        self._iterate[self._drafted_from : end] = scores.logits[: end - self._drafted_from].argmax(1)
        self._known = max(self._known, end)


def build(options: Options, parts: Parts) -> JacobiDrafter:
    """Needs the size of a chunk and of an action."""
    domain = parts.domain
    return JacobiDrafter(domain.vocab_size, domain.num_tokens, domain.tokens_per_step)
