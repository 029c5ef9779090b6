"""THE loop: draft, verify, judge, commit, until the chunk is whole or time is up. Start reading here.

Source: Leviathan et al. 2023, arXiv:2211.17192 (draft and verify); Miao et al. 2023, arXiv:2305.09781 (token trees);
Black et al. 2025, arXiv:2506.07339 (a chunk begins with what is played meanwhile; exact with autoregressive tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vla_spec.interfaces import AcceptanceRule, ChunkHistory, DeadlineController, Drafter, Engine, ScoreObserver
from vla_spec.types import (
    EMPTY_DRAFT,
    Committed,
    Decoded,
    EngineInputs,
    Float32,
    Int32,
    Provenance,
    Round,
    Scores,
    StopReason,
    Verdict,
)


class SpeculativeDecoder:
    """Decodes one chunk of ``num_tokens`` tokens. Not thread-safe; call from the planner only.

    Each round the target scores the last token together with the draft in one forward, so that the row before each
    drafted token judges it. An empty draft is plain autoregressive decoding: neither the prefill nor gamma = 0 is a
    special case.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        rule: AcceptanceRule,
        controller: DeadlineController,
        num_tokens: int,
        now_ns: Callable[[], int],
        rng: np.random.Generator,
    ) -> None:
        self.engine, self.rule, self.controller = engine, rule, controller
        self.drafter = drafter
        self.num_tokens, self._now_ns, self._rng = num_tokens, now_ns, rng
        width = engine.max_step
        self._step_tokens = np.zeros(width, np.int32)  # the last token, then the draft
        self._step_parents = np.full(width, -1, np.int32)
        self._step_path = np.zeros(width, np.int32)
        self._tokens = np.zeros(num_tokens + width, np.int32)
        self._deviation = np.zeros(num_tokens + width, np.float32)
        self._provenance = np.zeros(num_tokens + width, np.uint8)

    @property
    def drafter(self) -> Drafter:
        """May be exchanged, or wrapped, between two chunks."""
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._observe = drafter.observe if isinstance(drafter, ScoreObserver) else None

    def decode(
        self,
        inputs: EngineInputs,
        deadline_ns: int,
        history: ChunkHistory | None = None,
        forced: Int32 | None = None,
    ) -> Decoded:
        """Decode until the chunk is whole or the controller stops.

        Args:
            inputs: what the adapter made of the observation.
            deadline_ns: on the clock that was given to the constructor.
            history: the previous chunk, for drafters that start from it.
            forced: int32 [n], n < T, how the chunk begins whatever the target thinks of it; None or empty = freely.
                These tokens are not judged: their provenance is TAIL and their deviation 0. What follows them is
                the target's choice given them, and labelled as ever.

        Returns:
            The forced tokens, if any, and at least one more, unless the first scores were not finite or there was no
            time for them.
        """
        assert forced is None or len(forced) < self.num_tokens, f"{len(forced)} of {self.num_tokens} tokens forced"
        engine, controller, now_ns = self.engine, self.controller, self._now_ns
        rounds: list[Round] = []
        tokens, m, tolerance, draft = self._tokens, 0, 1.0, EMPTY_DRAFT
        is_uncommitted, num_forced = False, 0

        start = now_ns()
        if not controller.begin(deadline_ns - start, history):
            return self._result(0, rounds, StopReason.NO_TIME)
        self.drafter.begin(inputs, history)
        drafted = now_ns()
        scores = engine.prefill(inputs)
        scored = now_ns()
        if forced is not None and len(forced):
            if not _is_finite(scores.logits):
                return self._result(0, rounds, StopReason.BAD_SCORES)
            rounds.append(Round(0, 0, 0, drafted - start, scored - drafted, 0, 0, scored - start, start))
            controller.record(rounds[-1])
            start = drafted = now_ns()
            if controller.plan(deadline_ns - start, self.num_tokens - len(forced)) is None:
                return self._result(0, rounds, StopReason.DEADLINE)
            scores, m = self._force(forced), len(forced)
            num_forced, scored = m, now_ns()
        while True:
            if not _is_finite(scores.logits):
                return self._result(m, rounds, StopReason.BAD_SCORES)
            verdict = self.rule.judge(draft, scores, Committed(tokens[:m], self._deviation[:m]), self._rng, tolerance)
            if self._observe is not None:
                self._observe(draft, scores)
            m = self._append(m, draft.tokens, verdict)
            num_relaxed = int(np.count_nonzero(verdict.relaxed))
            judged = now_ns()
            if is_uncommitted:
                engine.commit(self._path_with_root(verdict.path))
            done = now_ns()
            rounds.append(
                Round(len(draft.tokens), len(verdict.path), num_relaxed,
                      drafted - start, scored - drafted, judged - scored, done - judged, done - start, start,
                      num_forced)
            )  # fmt: skip
            if not num_forced:  # a round of a size that nobody planned teaches nothing
                controller.record(rounds[-1])
            num_forced = 0
            if m >= self.num_tokens:
                return self._result(self.num_tokens, rounds, StopReason.COMPLETE)

            start = now_ns()
            plan = controller.plan(deadline_ns - start, self.num_tokens - m)
            if plan is None:
                return self._result(m, rounds, StopReason.DEADLINE)
            if plan.gamma < 0:  # LEAVE_REST
                return self._result(m, rounds, StopReason.LEFT)
            tolerance = plan.tolerance
            # A bonus token always follows the path, so a path longer than this would be thrown away.
            room = min(plan.gamma, engine.max_step - 1), min(plan.depth, self.num_tokens - m - 1)
            draft = EMPTY_DRAFT
            if min(room) > 0:
                limits = plan._replace(gamma=room[0], depth=room[1])
                draft = self.drafter.propose(tokens[:m], limits, engine.features)
            n = 1 + len(draft.tokens)
            self._step_tokens[0] = tokens[m - 1]
            self._step_tokens[1:n] = draft.tokens
            np.add(draft.parents, 1, out=self._step_parents[1:n])
            drafted = now_ns()
            scores = engine.step(self._step_tokens[:n], self._step_parents[:n])
            is_uncommitted, scored = True, now_ns()

    def _force(self, forced: Int32) -> Scores:
        """Begin the chunk with these tokens: one forward if the engine takes so many. Returns the row behind them."""
        m, width = len(forced), self.engine.max_step
        self._tokens[:m], self._deviation[:m], self._provenance[:m] = forced, 0.0, Provenance.TAIL
        for first in range(0, m, width):
            n = min(width, m - first)
            scores = self.engine.step(self._tokens[first : first + n], np.arange(-1, n - 1, dtype=np.int32))
            last = scores.logits[-1:].copy()  # the commit may reuse the buffer
            self.engine.commit(np.arange(n, dtype=np.int32))
        return Scores(last)

    def _path_with_root(self, path: Int32) -> Int32:
        """Nodes of the step: the last token is node 0, drafted node i is node i + 1."""
        np.add(path, 1, out=self._step_path[1 : len(path) + 1])
        return self._step_path[: len(path) + 1]

    def _append(self, m: int, drafted: Int32, verdict: Verdict) -> int:
        """Write the accepted tokens and the one that follows; returns the new length."""
        end = m + len(verdict.path)
        self._tokens[m:end] = drafted[verdict.path]
        self._deviation[m:end] = verdict.deviation
        self._provenance[m:end] = verdict.relaxed  # False = Provenance.EXACT, True = Provenance.RELAXED
        self._tokens[end], self._deviation[end], self._provenance[end] = verdict.next_token, 0.0, Provenance.EXACT
        return end + 1

    def _result(self, m: int, rounds: list[Round], stop: StopReason) -> Decoded:
        return Decoded(
            self._tokens[:m].copy(), self._provenance[:m].copy(), self._deviation[:m].copy(), tuple(rounds), stop
        )


def _is_finite(logits: Float32) -> bool:
    """No NaN or infinity. One pass in nearly all cases: a sum is finite only if all of its terms are."""
    return math.isfinite(logits.sum()) or bool(np.isfinite(logits).all())
