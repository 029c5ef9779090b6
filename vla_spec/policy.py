"""Observation + deadline -> `ActionChunk`. Always an answer that says where it came from; trouble is a rung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from vla_spec.action_space import ActionSpace
from vla_spec.clock import NowNs
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.guard import GuardedDrafter
from vla_spec.interfaces import Adapter, ChunkHistory
from vla_spec.ladder import Ladder, Reason
from vla_spec.trace import PlanRecord, Trace
from vla_spec.types import (
    ActionChunk,
    Decoded,
    EngineInputs,
    Float32,
    Int32,
    Observation,
    Plan,
    Provenance,
    Rung,
    StopReason,
    UInt8,
)

_REASON_OF_STOP = {
    StopReason.COMPLETE: Reason.NONE,
    StopReason.DEADLINE: Reason.DEADLINE,
    StopReason.BAD_SCORES: Reason.BAD_SCORES,
    StopReason.NO_TIME: Reason.NO_TIME,
    StopReason.LEFT: Reason.LEFT,
}


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """Knobs of the answers that are less than a complete chunk.

    Attributes:
        min_steps: complete steps that the target must have seen before a cut decode is answered with its prefix and
            a draft tail; with fewer, the remainder of the last chunk is the better plan. 0 = a draft alone will do.
        max_tail_steps: unverified steps that are appended at most; 0 = none, the chunk just ends earlier.
        has_draft_tail: ask the drafter for the tokens that are missing, as many as it makes before the deadline by
            its speed in this chunk; False = only the previous chunk's.
        tail_slowdown: speed of a tail step relative to the step before, in (0, 1]. Small: creeps until the next plan;
            1 = trusts the guess.
        reserve_ns: taken off the deadline for what comes after the decode loop, the tail and the un-normaliser.
    """

    min_steps: int = 1
    max_tail_steps: int = 8
    has_draft_tail: bool = True
    tail_slowdown: float = 0.9
    reserve_ns: int = 300_000

    def __post_init__(self) -> None:
        if min(self.min_steps, self.max_tail_steps, self.reserve_ns) < 0 or not 0 < self.tail_slowdown <= 1:
            raise BadConfig(
                "policy: min_steps, max_tail_steps and reserve_ns must be 0 or more, tail_slowdown in (0, 1]; "
                f"got {self}"
            )


class _Answer(NamedTuple):
    """A candidate for the chunk: actions [h, A], provenance [h, A], the tokens behind them."""

    actions: Float32
    provenance: UInt8
    tokens: Int32
    rung: Rung


@final
class Policy:
    """Plans chunks. Not thread-safe: owned by the planner.

    The ladder, best first: all tokens exact; all verified, some relaxed; a verified prefix of whole steps plus an
    unverified tail (the drafter's tokens, then the previous chunk's), slowed down and bounded by limits; the remainder
    of the previous chunk; hold; stop.

    Args:
        adapter: observations to engine inputs, tokens to actions.
        decoder: THE loop. Its drafter gets wrapped, so that a crash of the drafter is plain decoding.
        space: what an action's numbers mean; bounds the tail and says what holding is.
        now_ns: the clock that deadlines refer to.
        ladder: counters and hysteresis; None = a new one with its defaults.
        trace: where each plan is recorded; None = a new one.
        options: knobs.
    """

    def __init__(
        self,
        adapter: Adapter,
        decoder: SpeculativeDecoder,
        space: ActionSpace,
        now_ns: NowNs,
        ladder: Ladder | None = None,
        trace: Trace | None = None,
        options: PolicyOptions | None = None,
    ) -> None:
        domain = adapter.domain
        if decoder.num_tokens != domain.num_tokens:
            raise BadConfig(f"decoder makes {decoder.num_tokens} tokens, the adapter's chunk has {domain.num_tokens}")
        self.adapter, self.decoder, self.space = adapter, decoder, space
        self.ladder, self.trace = ladder or Ladder(), trace or Trace()
        self.options = options or PolicyOptions()
        self.guard = GuardedDrafter(decoder.drafter, domain.vocab_size)
        decoder.drafter = self.guard
        self._domain, self._now_ns = domain, now_ns
        self._next_id = 0
        self._draft_ns_per_token = 0.0  # of the last chunk that drafted; 0 = none did yet, or drafting is free
        #: The last plan as measured; None before the first.
        self.last_record: PlanRecord | None = None
        #: The last exception that became a rung, for a post-mortem; None if there was none.
        self.last_error: Exception | None = None

    @property
    def horizon(self) -> int:
        """H, steps of a full chunk."""
        return self._domain.num_tokens // self._domain.tokens_per_step

    def reset(self) -> None:
        """A new episode: streaks start over; chunk ids and counters go on."""
        self.ladder.reset()

    def plan(self, observation: Observation, deadline_ns: int, history: ChunkHistory | None = None) -> ActionChunk:
        """Answer one observation.

        Args:
            observation: what the robot sees.
            deadline_ns: when the answer is due, on the policy's clock. Already past: no forward is spent.
            history: the previous chunk, how much of it lies before this observation, and how much behind it is
                going to be played meanwhile: the new chunk begins with that.

        Returns:
            1 to H actions. May be late; then ``is_late`` says so.
        """
        start_ns = self._now_ns()
        num_failures = self.guard.num_failures
        forced = self._forced(history)
        decoded, reason, encode_ns, decode_ns = self._decode(observation, deadline_ns, history, forced, start_ns)
        before_tail_ns = self._now_ns()
        answer: _Answer | None = None
        if decoded is not None:
            self._measure_drafter(decoded)
            answer = self._verified(decoded, deadline_ns, history, len(forced))
        if decoded is not None and answer is None and reason is Reason.NONE:
            reason = Reason.BAD_TOKENS
        if self.guard.num_failures > num_failures and reason in (Reason.NONE, Reason.DEADLINE):
            reason = Reason.DRAFTER_ERROR
        answer = answer or self._remainder(history) or self._hold(history)
        num_judged = 0 if decoded is None else max(0, len(decoded.tokens) - len(forced))
        rung, reason = self.ladder.settle(answer.rung, reason)
        if rung is not answer.rung:
            answer = self._hold(history)._replace(rung=rung)
        ready_ns = self._now_ns()
        chunk = ActionChunk(
            actions=answer.actions,
            provenance=answer.provenance,
            rung=rung,
            chunk_id=self._next_id,
            instruction=observation.instruction,
            observation_stamp_ns=observation.stamp_ns,
            observation_step=observation.step,
            start_ns=start_ns,
            ready_ns=ready_ns,
            deadline_ns=deadline_ns,
            tokens=answer.tokens,
            max_deviation=_max_deviation(decoded) if rung <= Rung.DRAFT_TAIL else 0.0,
        )
        self.last_record = PlanRecord(
            chunk_id=chunk.chunk_id,
            observation_step=observation.step,
            observation_stamp_ns=observation.stamp_ns,
            start_ns=start_ns,
            ready_ns=ready_ns,
            deadline_ns=deadline_ns,
            encode_ns=encode_ns,
            decode_ns=decode_ns,
            tail_ns=ready_ns - before_tail_ns,
            rung=rung,
            reason=reason,
            num_steps=len(answer.actions),
            num_tokens=len(answer.tokens),
            num_verified=num_judged if rung <= Rung.DRAFT_TAIL else 0,
            rounds=decoded.rounds if decoded is not None else (),
        )
        self.trace.record(self.last_record)
        self._next_id += 1
        return chunk

    def _decode(
        self, observation: Observation, deadline_ns: int, history: ChunkHistory | None, forced: Int32, start_ns: int
    ) -> tuple[Decoded | None, Reason, int, int]:
        """Encode and decode. Returns what was decoded (None = nothing), why not all, and both durations [ns]."""
        due_ns = deadline_ns - self.options.reserve_ns
        if due_ns <= start_ns:
            return None, Reason.DEADLINE_PAST, 0, 0
        inputs: EngineInputs
        try:
            if not np.isfinite(observation.state).all():
                raise FloatingPointError(f"state is not finite: {observation.state}")
            inputs = self.adapter.encode(observation)
        except Exception as error:  # what a sensor or a user sends is not ours to trust
            self.last_error = error
            return None, Reason.BAD_OBSERVATION, self._now_ns() - start_ns, 0
        encoded_ns = self._now_ns()
        if due_ns <= encoded_ns:
            return None, Reason.DEADLINE_PAST, encoded_ns - start_ns, 0
        try:
            decoded = self.decoder.decode(inputs, due_ns, history, forced)
        except Exception as error:  # a robot needs an answer whatever its engine does
            self.last_error = error
            return None, Reason.ENGINE_ERROR, encoded_ns - start_ns, self._now_ns() - encoded_ns
        return decoded, _REASON_OF_STOP[decoded.stop], encoded_ns - start_ns, self._now_ns() - encoded_ns

    def _measure_drafter(self, decoded: Decoded) -> None:
        """What a drafted token costs, from this chunk's rounds; unchanged if nothing was drafted."""
        num_drafted = sum(measured.num_drafted for measured in decoded.rounds)
        if num_drafted:
            drafting_ns = sum(measured.draft_ns for measured in decoded.rounds if measured.num_drafted)
            self._draft_ns_per_token = drafting_ns / num_drafted

    def _forced(self, history: ChunkHistory | None) -> Int32:
        """Tokens of the actions that are going to be played meanwhile, int32 [whole steps, at least one less than T].

        Where the arm plays a bounded action instead of what its tokens say, the tokens nearest to that action.
        """
        nothing: Int32 = np.empty(0, np.int32)
        if history is None or history.num_forced <= 0 or self.ladder.is_stopped:
            return nothing
        per_step = self._domain.tokens_per_step
        first = history.consumed // per_step
        end = min(first + history.num_forced // per_step, len(history.tokens) // per_step, first + self.horizon - 1)
        tokens = history.tokens[first * per_step : end * per_step]
        if history.actions is None or end <= first:
            return tokens
        told, played = self._actions(history.tokens), history.actions[first:end]
        if told is None or len(played) < end - first:
            return nothing
        if np.array_equal(told[first:end], played):
            return tokens
        encoded = self.adapter.tokenizer.encode(played)
        return encoded if len(encoded) == len(tokens) else nothing

    def _verified(
        self, decoded: Decoded, deadline_ns: int, history: ChunkHistory | None, num_forced: int
    ) -> _Answer | None:
        """What the target has seen, completed by a bounded tail. None: too little, or tokens that mean nothing.

        The ``num_forced`` tokens at its beginning are old news: they are in the answer, and the rung is about the rest.
        """
        per_step = self._domain.tokens_per_step
        num_verified = len(decoded.tokens) // per_step
        num_old = num_forced // per_step
        is_complete = decoded.stop is StopReason.COMPLETE
        if not len(decoded.tokens) or (not is_complete and num_verified - num_old < self.options.min_steps):
            return None
        tokens, provenance = decoded.tokens, decoded.provenance
        wants_tail = not is_complete and self.options.max_tail_steps > 0
        if wants_tail and self.options.has_draft_tail and decoded.stop in (StopReason.DEADLINE, StopReason.LEFT):
            drafted = self._drafted_tail(tokens, deadline_ns)
            tokens = np.concatenate((tokens, drafted))
            provenance = np.concatenate((provenance, np.full(len(drafted), Provenance.DRAFTED, np.uint8)))
        most_steps = num_verified + self.options.max_tail_steps if wants_tail else num_verified
        num_steps = min(len(tokens) // per_step, most_steps)
        tokens, provenance = tokens[: num_steps * per_step], provenance[: num_steps * per_step]
        actions = self._actions(tokens)
        if actions is None:
            return None
        per_row = self._per_row(provenance)
        if wants_tail and history is not None and num_steps < most_steps:
            # The previous chunk's step for the same moment: row i of this chunk is row consumed / per_step + i of that.
            previous = self._actions(history.tokens)
            first = history.consumed // per_step + num_steps
            if previous is not None and len(previous) > first:
                rest = previous[first : first + min(most_steps, self.horizon) - num_steps]
                of_rest = history.tokens[first * per_step : (first + len(rest)) * per_step]
                actions = np.concatenate((actions, rest))
                tokens = np.concatenate((tokens, of_rest)).astype(np.int32)
                per_row = np.concatenate((per_row, np.full(rest.shape, Provenance.TAIL, np.uint8)))
        if len(actions) <= num_old:
            return None
        if len(actions) > num_verified:
            before = actions[num_verified - 1] if num_verified else self._last_action(history)
            actions = actions.copy()
            actions[num_verified:] = self.space.bound(actions[num_verified:], before, self.options.tail_slowdown)
        weakest = Provenance(int(per_row[num_old:].max()))
        rung = {Provenance.EXACT: Rung.EXACT, Provenance.RELAXED: Rung.RELAXED}.get(weakest, Rung.DRAFT_TAIL)
        return _Answer(actions, per_row, tokens, rung)

    def _drafted_tail(self, tokens: Int32, deadline_ns: int) -> Int32:
        """The drafter's guess of what follows, int32 [<= T - m]: the first path of its tree, as far as time allows."""
        missing = self._domain.num_tokens - len(tokens)
        if self._draft_ns_per_token > 0:
            missing = min(missing, int((deadline_ns - self._now_ns()) / self._draft_ns_per_token))
        if missing <= 0:
            return np.empty(0, np.int32)
        draft = self.guard.propose(tokens, Plan(missing, missing), self.decoder.engine.features)
        path: list[int] = []
        for node in range(len(draft.tokens)):
            if draft.parents[node] == (path[-1] if path else -1):
                path.append(node)
        return draft.tokens[path[:missing]].astype(np.int32)

    def _remainder(self, history: ChunkHistory | None) -> _Answer | None:
        """The previous chunk from the new observation's step on, as bounded as it was; None if nothing is left."""
        if history is None:
            return None
        first = history.consumed // self._domain.tokens_per_step
        actions = self._played(history)
        if actions is None or len(actions) <= first:
            return None
        actions = actions[first:]
        tokens = history.tokens[first * self._domain.tokens_per_step :][: len(actions) * self._domain.tokens_per_step]
        return _Answer(actions, np.full(actions.shape, Provenance.TAIL, np.uint8), tokens.copy(), Rung.LAST_CHUNK)

    def _hold(self, history: ChunkHistory | None) -> _Answer:
        """H times the action that holds still, no tokens."""
        actions = np.tile(self.space.hold(self._last_action(history)), (self.horizon, 1))
        return _Answer(actions, np.full(actions.shape, Provenance.HOLD, np.uint8), np.empty(0, np.int32), Rung.HOLD)

    def _last_action(self, history: ChunkHistory | None) -> Float32 | None:
        """The previous chunk's action for the step before this observation; None if there is none."""
        if history is None or history.consumed < self._domain.tokens_per_step:
            return None
        actions = self._played(history)
        if actions is None or len(actions) == 0:
            return None
        row: Float32 = actions[min(history.consumed // self._domain.tokens_per_step, len(actions)) - 1]
        return row

    def _played(self, history: ChunkHistory) -> Float32 | None:
        """The previous chunk's actions as the arm plays them, float32 [h, A]; None if its tokens mean nothing."""
        return self._actions(history.tokens) if history.actions is None else history.actions

    def _actions(self, tokens: Int32) -> Float32 | None:
        """Whole steps, float32 [h, A]; None if the tokens mean no finite action."""
        try:
            actions = self.adapter.decode(tokens)
        except (VlaSpecError, ValueError, IndexError) as error:
            self.last_error = error
            return None
        if not np.isfinite(actions).all():
            self.last_error = FloatingPointError("actions are not finite")
            return None
        return actions

    def _per_row(self, provenance: UInt8) -> UInt8:
        """uint8 [h * tokens_per_step] -> [h, A]: token by token if each is one number, else the step's weakest."""
        rows = provenance.reshape(-1, self._domain.tokens_per_step)
        if rows.shape[1] == self.space.size:
            return rows.copy()
        return np.repeat(rows.max(axis=1, initial=0)[:, None], self.space.size, axis=1)


def _max_deviation(decoded: Decoded | None) -> float:
    return float(decoded.deviation.max(initial=0)) if decoded is not None else 0.0
