"""A drafter that can't hurt: whatever it raises or makes up, the decode goes on without its draft."""

from __future__ import annotations

from typing import final

import numpy as np

from vla_spec.interfaces import ChunkHistory, Drafter, ScoreObserver
from vla_spec.types import EMPTY_DRAFT, Draft, EngineInputs, Int32, Plan, Scores


@final
class GuardedDrafter:
    """Wraps a drafter. After an exception or a malformed draft it is silent for the rest of the chunk.

    An empty draft is plain decoding, so a broken drafter costs time and never exactness. After ``max_failures`` chunks
    in a row that it spoiled it is left alone for ``rest_chunks`` chunks before it is tried again.

    Knobs: ``max_failures`` small: one hiccup costs many slow chunks; large: a drafter that is broken for good wastes
    its time again and again. ``rest_chunks`` in chunks.
    """

    def __init__(self, drafter: Drafter, vocab_size: int, max_failures: int = 3, rest_chunks: int = 32) -> None:
        self.drafter = drafter
        self._observe = drafter.observe if isinstance(drafter, ScoreObserver) else None
        self._vocab_size, self._max_failures, self._rest_chunks = vocab_size, max_failures, rest_chunks
        self._in_a_row = self._resting = 0
        self._is_silent = self._has_failed = False
        #: Failures since construction, and the last one for a post-mortem.
        self.num_failures = 0
        self.last_error: Exception | None = None

    def begin(self, inputs: EngineInputs, history: ChunkHistory | None) -> None:
        """A new chunk starts."""
        self._in_a_row = self._in_a_row + 1 if self._has_failed else 0
        self._has_failed = False
        if self._in_a_row >= self._max_failures:
            self._in_a_row, self._resting = 0, self._rest_chunks
        self._is_silent = self._resting > 0
        if self._is_silent:
            self._resting -= 1
            return
        try:
            self.drafter.begin(inputs, history)
        except Exception as error:  # any fault of a drafter is expected trouble
            self._fail(error)

    def propose(self, prefix: Int32, plan: Plan, features: object | None) -> Draft:
        """The wrapped drafter's draft, or an empty one."""
        if self._is_silent:
            return EMPTY_DRAFT
        try:
            draft = self.drafter.propose(prefix, plan, features)
            fault = self._fault(draft, plan)
        except Exception as error:  # any fault of a drafter is expected trouble
            self._fail(error)
            return EMPTY_DRAFT
        if fault:
            self._fail(ValueError(fault))
            return EMPTY_DRAFT
        return draft

    def observe(self, draft: Draft, scores: Scores) -> None:
        """Pass on what the target said, if the wrapped drafter wants to know; an exception there is its failure."""
        if self._observe is None or self._is_silent:
            return
        try:
            self._observe(draft, scores)
        except Exception as error:  # any fault of a drafter is expected trouble
            self._fail(error)

    def _fault(self, draft: Draft, plan: Plan) -> str:
        """What is wrong with a draft's shape; empty = nothing. A few comparisons on at most gamma numbers."""
        tokens, parents = draft.tokens, draft.parents
        if len(tokens) > plan.gamma or len(tokens) != len(parents):
            return f"{len(tokens)} tokens and {len(parents)} parents drafted; valid: as many, at most {plan.gamma}"
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            return f"token ids {tokens.min()}..{tokens.max()} drafted; valid: 0..{self._vocab_size - 1}"
        if len(tokens) and ((parents >= np.arange(len(parents))).any() or parents.min() < -1):
            return "a parent does not come before its child"
        return ""

    def _fail(self, error: Exception) -> None:
        self.num_failures += 1
        self.last_error = error
        self._is_silent = self._has_failed = True
