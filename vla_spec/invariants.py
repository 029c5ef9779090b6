"""What must hold at every control step and for every plan, worked out a second time from outside.

The checker trusts neither the labels nor the counters of what it watches: it asks the engine, without faults, what it
would have chosen, and keeps its own account of chunks, orders and time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import HandOver
from vla_spec.config import Choice
from vla_spec.interfaces import ActionTokenizer, Adapter, Engine
from vla_spec.ladder import Reason
from vla_spec.policy import Policy
from vla_spec.runtime import Actor
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Command, Float32, Int32, Observation, Provenance, Rung, TokenDomain

#: What is checked, and what a violation of it means.
INVARIANTS = {
    "answer": "each control step has one command of finite numbers, and each observation has its chunk",
    "exception": "nothing is raised out of looking, planning or acting",
    "limits": "no action lies outside the action space's limits, as commanded and as sent",
    "change": "an unverified command differs from the one before by at most max_change, switches aside",
    "provenance": "EXACT is the undisturbed engine's greedy choice, RELAXED lies within its tolerance, TAIL comes from "
    "an older chunk, HOLD has no plan behind it; commands carry the numbers and the label of their chunk's row",
    "instruction": "a command obeys the current order or comes from a chunk that was observed before it changed",
    "clock": "virtual time never runs backwards, and a plan lasts as long as its calls",
    "counters": "counters of chunks, commands, rungs, reasons and traces add up",
}
#: Logits of one token in forwards of different size differ by their rounding, 1.7e-5 at most on ONNX Runtime (15,500
#: tokens of the shipped policy): two tokens nearer than this are both the target's choice, and counted as ties.
TIE = 1e-4
#: Violations that are described in full; later ones are only counted.
MAX_EXAMPLES = 20
#: Chunks that may still be played from; older ones are forgotten.
KEPT_CHUNKS = 32
_RUNG_OF_WEAKEST = {
    Provenance.EXACT: Rung.EXACT,
    Provenance.RELAXED: Rung.RELAXED,
    Provenance.DRAFTED: Rung.DRAFT_TAIL,
    Provenance.TAIL: Rung.DRAFT_TAIL,
}
#: Rules whose labels can be recomputed token by token. The others draw, and are exact in law only.
CHECKED_RULES = ("greedy", "relaxed_bins", "relaxed_physical")


class Violation(NamedTuple):
    """One broken invariant. tick: control step of the run."""

    tick: int
    invariant: str
    what: str


class _Known(NamedTuple):
    """A chunk with what the checker found out about it."""

    chunk: ActionChunk  # as it is played: a buffer may move it by steps in which the arm held
    observed_at: int  # control step of its observation
    is_exact: npt.NDArray[np.bool_]  # [h] all tokens of the row are the undisturbed engine's own choice
    is_verified: npt.NDArray[np.bool_]  # [h] all tokens of the row were seen by the engine, and pass


@final
class Checker:
    """Watches one mode's run. Not thread-safe.

    Args:
        policy: that plans; only read.
        engine: the undisturbed target; its cache is overwritten between plans.
        rule: the acceptance rule and its options.
        now_ns: the virtual clock.
    """

    def __init__(self, policy: Policy, engine: Engine, rule: Choice, now_ns: Callable[[], int]) -> None:
        self._policy, self._engine, self._now_ns = policy, engine, now_ns
        self._adapter: Adapter = policy.adapter
        self._domain: TokenDomain = policy.adapter.domain
        self._space: ActionSpace = policy.space
        self._switches = policy.space.mask(DofKind.SWITCH)
        self._is_checked_rule = rule.name in CHECKED_RULES
        self._tolerance = _Tolerance(rule, self._domain, policy.adapter.tokenizer)
        self.counts = dict.fromkeys(INVARIANTS, 0)
        #: The first violations in full.
        self.examples: list[Violation] = []
        #: Tokens that were compared with the undisturbed engine.
        self.num_tokens_checked = self.num_ties = 0
        self._tick = 0
        self._num_plans = 0
        self._latest_ns = now_ns()

    def begin_episode(self, actor: Actor) -> None:
        """A new episode: chunks of the one before are nobody's any more."""
        buffer = actor.buffer
        self._actor, self._buffer = actor, buffer
        self._known: dict[int, _Known] = {}
        self._accepted: deque[_Known] = deque(maxlen=buffer.options.max_chunks)
        self._source: ActionChunk | None = None
        self._num_accepted = self._num_delivered = self._num_commands = 0
        self._previous: Float32 | None = None
        self._in_flight: int | None = None

    def begin_tick(self, tick: int) -> None:
        """A control step of the run begins."""
        self._tick = tick

    def failed(self, where: str, error: Exception) -> None:
        """Something was raised that should not have been, and the control step was left without a command."""
        self._violate("exception", f"{where}: {type(error).__name__}: {error}")
        self._violate("answer", "no command was sent")

    def asked(self, chunk: ActionChunk | None) -> None:
        """An observation was handed over, and this came of it."""
        if chunk is None:
            self._violate("answer", "an observation was handed over and no chunk was planned")

    def received(self) -> None:
        """After the actor had a chance to take over a chunk: keep the books."""
        buffer = self._buffer
        delivered = buffer.num_accepted + buffer.num_stale + buffer.num_out_of_order
        if delivered > self._num_delivered:
            self._in_flight = None
        if delivered not in (self._num_delivered, self._num_delivered + 1):
            self._violate("counters", f"{delivered - self._num_delivered} chunks were delivered at once")
        self._num_delivered = delivered
        if buffer.num_accepted == self._num_accepted:
            return
        self._num_accepted = buffer.num_accepted
        chunk = buffer.newest
        known = None if chunk is None else self._known.get(chunk.chunk_id)
        if chunk is None or known is None:
            self._violate("provenance", "a chunk was accepted that nobody planned")
            return
        before = self._accepted[-1].chunk if self._accepted else None
        if before is not None and (before.instruction != chunk.instruction or chunk.rung is Rung.STOP):
            self._accepted.clear()
        if chunk.observation_step != known.chunk.observation_step and not buffer.options.is_shifted_by_holds:
            self._violate("provenance", f"chunk {chunk.chunk_id} was moved to another control step")
        known = known._replace(chunk=chunk)  # its control step as it is played
        self._known[chunk.chunk_id] = known
        self._accepted.append(known)
        if len(chunk.tokens):
            self._source = chunk

    # One plan.

    def planned(self, given: Observation, chunk: ActionChunk, record: PlanRecord, charged_ns: int) -> None:
        """Check one plan.

        Args:
            given: the observation that the robot handed out.
            chunk: the answer.
            record: what the policy says about it.
            charged_ns: what the calls of this plan took, as the clock was charged.
        """
        self._num_plans += 1
        if self._in_flight is not None:
            self._violate("answer", f"chunk {self._in_flight} never arrived")
        self._in_flight = chunk.chunk_id
        self._check_form(given, chunk)
        self._check_time(chunk, record, charged_ns)
        self._check_record(chunk, record)
        known = self._check_rows(given, chunk, _num_forced(record) // self._domain.tokens_per_step)
        self._known[chunk.chunk_id] = known
        self._known.pop(chunk.chunk_id - KEPT_CHUNKS, None)

    def _check_form(self, given: Observation, chunk: ActionChunk) -> None:
        actions, size = chunk.actions, self._space.size
        if actions.ndim != 2 or actions.shape[1] != size or not 1 <= len(actions) <= self._policy.horizon:
            self._violate("answer", f"chunk {chunk.chunk_id} has actions of shape {actions.shape}")
        elif not np.isfinite(actions).all():
            self._violate("answer", f"chunk {chunk.chunk_id} has actions that are not finite")
        elif not self._is_within_limits(actions):
            self._violate("limits", f"chunk {chunk.chunk_id} has actions outside the limits")
        if chunk.provenance.shape != actions.shape:
            self._violate("provenance", f"chunk {chunk.chunk_id} labels {chunk.provenance.shape} of {actions.shape}")
        if chunk.instruction != given.instruction:
            self._violate("instruction", f"chunk {chunk.chunk_id} obeys {chunk.instruction!r}")

    def _check_time(self, chunk: ActionChunk, record: PlanRecord, charged_ns: int) -> None:
        self._check_clock()
        if not chunk.start_ns <= chunk.ready_ns <= self._now_ns():
            self._violate("clock", f"chunk {chunk.chunk_id} was ready before it was begun, or is not ready yet")
        if chunk.ready_ns - chunk.start_ns != charged_ns:
            self._violate(
                "clock", f"chunk {chunk.chunk_id} took {chunk.ready_ns - chunk.start_ns} ns, its calls {charged_ns} ns"
            )
        if chunk.observation_stamp_ns > chunk.start_ns:
            self._violate("clock", f"chunk {chunk.chunk_id} was planned before its observation was made")
        spent = sum(measured.total_ns for measured in record.rounds)
        if spent > record.ready_ns - record.start_ns:
            self._violate("clock", f"rounds of chunk {chunk.chunk_id} took {spent} ns, longer than the plan")

    def _check_record(self, chunk: ActionChunk, record: PlanRecord) -> None:
        policy = self._policy
        same = record.chunk_id == chunk.chunk_id == self._num_plans - 1 and record.rung is chunk.rung
        if not same or record.num_steps != len(chunk.actions) or record.num_tokens != len(chunk.tokens):
            self._violate("counters", f"the record of chunk {chunk.chunk_id} is about something else")
        if sum(policy.ladder.counts.values()) != self._num_plans or policy.trace.total_plans != self._num_plans:
            self._violate("counters", f"ladder or trace have not counted {self._num_plans} plans")
        if sum(policy.ladder.reasons.values()) != self._num_plans:
            self._violate("counters", f"reasons don't add up to {self._num_plans} plans")
        if record.rounds and record.rung <= Rung.DRAFT_TAIL:
            gained, most = _num_yielded(record), self._domain.num_tokens - _num_forced(record)
            if min(gained, most) != record.num_verified:
                self._violate("counters", f"chunk {chunk.chunk_id}: {gained} tokens gained, {record.num_verified} said")

    def _check_rows(self, given: Observation, chunk: ActionChunk, num_given: int) -> _Known:
        """Provenance of each row, recomputed; the first ``num_given`` ones were given and say nothing of the rung."""
        h, per_step = len(chunk.actions), self._domain.tokens_per_step
        is_exact, is_verified = np.zeros(h, np.bool_), np.zeros(h, np.bool_)
        known = _Known(chunk, chunk.observation_step, is_exact, is_verified)
        if chunk.rung >= Rung.HOLD:
            self._check_hold(chunk)
            return known
        if len(chunk.tokens) != h * per_step or chunk.provenance.shape[0] != h:
            self._violate("provenance", f"chunk {chunk.chunk_id} has {h} rows and {len(chunk.tokens)} tokens")
            return known
        rows = chunk.provenance.max(axis=1)  # [h] weakest of each row
        weakest = Provenance(int(rows[num_given if chunk.rung <= Rung.DRAFT_TAIL else 0 :].max()))
        expected = Rung.LAST_CHUNK if chunk.rung is Rung.LAST_CHUNK else _RUNG_OF_WEAKEST.get(weakest, Rung.HOLD)
        if chunk.rung is not expected or (chunk.rung is Rung.LAST_CHUNK and (rows != Provenance.TAIL).any()):
            self._violate(
                "provenance", f"chunk {chunk.chunk_id} is on rung {chunk.rung.name}, its rows {rows.tolist()}"
            )
        labels = self._labels(chunk)  # [m]
        if self._is_checked_rule and (labels <= Provenance.RELAXED).any():
            self._check_verified(given, chunk, labels)
        decoded = self._adapter.decode(chunk.tokens)
        is_equal = (decoded == chunk.actions).all(axis=1)  # [h]
        for i in range(h):
            if rows[i] <= Provenance.RELAXED:
                is_verified[i], is_exact[i] = True, rows[i] == Provenance.EXACT
                if not is_equal[i]:
                    self._violate("provenance", f"chunk {chunk.chunk_id} row {i}: not the action of its tokens")
            elif rows[i] == Provenance.TAIL:
                is_verified[i] = self._check_tail(chunk, i) and bool(is_equal[i])
            elif chunk.rung is not Rung.DRAFT_TAIL:
                self._violate("provenance", f"chunk {chunk.chunk_id} row {i}: drafted on rung {chunk.rung.name}")
            if rows[i] > Provenance.RELAXED and i and not is_verified[i]:
                self._check_change(chunk.actions[i], chunk.actions[i - 1], f"chunk {chunk.chunk_id} row {i}")
        return known

    def _labels(self, chunk: ActionChunk) -> npt.NDArray[np.uint8]:
        """uint8 [m], one per token; a model with more tokens than numbers per step has one label per row."""
        if chunk.provenance.shape[1] == self._domain.tokens_per_step:
            return chunk.provenance.reshape(-1)
        return np.repeat(chunk.provenance.max(axis=1), self._domain.tokens_per_step)

    def _check_verified(self, given: Observation, chunk: ActionChunk, labels: npt.NDArray[np.uint8]) -> None:
        """Feed the tokens to the undisturbed engine, all at once, and compare its choices with the labels."""
        seen = np.flatnonzero(labels <= Provenance.RELAXED)
        n = int(seen[-1]) + 1
        logits = self._logits(given, chunk.tokens[:n])
        choices = logits.argmax(1).astype(np.int32)
        tokens = chunk.tokens[:n]
        self.num_tokens_checked += len(seen)
        differs = (labels[:n] == Provenance.EXACT) & (tokens != choices)
        is_tie = differs & (logits.max(1) - logits[np.arange(n), tokens] <= TIE)
        self.num_ties += int(is_tie.sum())
        wrong = differs & ~is_tie
        if wrong.any():
            at = int(wrong.argmax())
            self._violate(
                "provenance",
                f"chunk {chunk.chunk_id} token {at} is {tokens[at]} and called EXACT; the engine chooses {choices[at]}",
            )
        relaxed = labels[:n] == Provenance.RELAXED
        if relaxed.any():
            fault = self._tolerance.fault(tokens, choices, relaxed)
            if fault:
                self._violate("provenance", f"chunk {chunk.chunk_id}: {fault}")

    def _logits(self, given: Observation, tokens: Int32) -> Float32:
        """What the undisturbed engine says about each position, given the tokens before it; float32 [n, V]."""
        engine = self._engine
        logits = [engine.prefill(self._adapter.encode(given)).logits.copy()]
        for first in range(0, len(tokens) - 1, engine.max_step):
            fed = tokens[first : min(first + engine.max_step, len(tokens) - 1)]
            logits.append(engine.step(fed, np.arange(-1, len(fed) - 1, dtype=np.int32)).logits.copy())
            engine.commit(np.arange(len(fed), dtype=np.int32))
        return np.concatenate(logits)[: len(tokens)]

    def _check_tail(self, chunk: ActionChunk, row: int) -> bool:
        """A row that is said to be an older chunk's. Returns whether it was verified there."""
        source = self._source
        if source is None or source.chunk_id >= chunk.chunk_id:
            self._violate("provenance", f"chunk {chunk.chunk_id} row {row} is TAIL and there is no older chunk")
            return False
        if source.instruction != chunk.instruction:
            self._violate("instruction", f"chunk {chunk.chunk_id} row {row} is the remainder of another order")
        per_step = self._domain.tokens_per_step
        at = chunk.observation_step + row - source.observation_step
        same = source.tokens[at * per_step : (at + 1) * per_step] if at >= 0 else source.tokens[:0]
        own = chunk.tokens[row * per_step : (row + 1) * per_step]
        older = self._known.get(source.chunk_id)
        if len(same) == per_step and (own != same).any():
            # A beginning that was given is what the arm plays meanwhile, which may be bounded and not what was decoded.
            played = self._adapter.tokenizer.encode(source.actions[at : at + 1])
            if np.array_equal(own, played):
                return False
        if len(same) < per_step or (own != same).any():
            self._violate("provenance", f"chunk {chunk.chunk_id} row {row} is not row {at} of chunk {source.chunk_id}")
            return False
        return older is not None and at < len(older.is_verified) and bool(older.is_verified[at])

    def _check_hold(self, chunk: ActionChunk) -> None:
        if len(chunk.tokens) or (chunk.provenance != Provenance.HOLD).any():
            self._violate("provenance", f"chunk {chunk.chunk_id} is on rung {chunk.rung.name} and has a plan")

    # One command.

    def played(self, now_ns: int, command: object, sent: Float32 | None, order: str, ordered_at: int) -> None:
        """Check one control step.

        Args:
            now_ns: its time on the schedule.
            command: what the buffer gave.
            sent: what the robot says that it did.
            order: the instruction that holds.
            ordered_at: control step of the episode from which it holds.
        """
        self._check_clock()
        if not isinstance(command, Command) or not self._is_action(command.action):
            self._violate("answer", f"the command is {command!r}"[:200])
            return
        for name, action in (("command", command.action), ("sent action", sent)):
            if action is None or not self._is_action(action) or not self._is_within_limits(action):
                self._violate("limits", f"the {name} is {None if action is None else action.tolist()}")
        step = self._actor.step - 1
        if command.provenance is Provenance.HOLD:
            self._check_held(command, step)
        else:
            self._check_played(command, step, order, ordered_at)
        self._num_commands += 1
        buffer = self._buffer
        if not sum(buffer.counts.values()) == sum(buffer.rung_counts.values()) == self._num_commands:
            self._violate("counters", f"commands don't add up to {self._num_commands}")
        self._previous = command.action.copy()

    def _check_played(self, command: Command, step: int, order: str, ordered_at: int) -> None:
        known = self._known.get(command.chunk_id)
        in_play = any(accepted.chunk.chunk_id == command.chunk_id for accepted in self._accepted)
        if known is None or not (in_play or self._is_frozen):
            self._violate("provenance", f"the command comes from chunk {command.chunk_id}, which is not in play")
            return
        chunk, row = known.chunk, command.row
        where = f"row {row} of chunk {chunk.chunk_id} at step {step}"
        if not 0 <= row < len(chunk.actions) or chunk.observation_step + row != step:
            self._violate("provenance", f"{where}: an action of another step")
            return
        planned, weakest = self._planned(known, row, step)
        if command.provenance not in (weakest, max(weakest, Provenance.TAIL)):
            self._violate("provenance", f"{where}: called {command.provenance.name}, is {weakest.name}")
        is_newest = bool(self._accepted) and self._accepted[-1].chunk.chunk_id == chunk.chunk_id
        if not is_newest and command.provenance < Provenance.TAIL and not self._is_frozen:
            self._violate("provenance", f"{where}: an older chunk's action, called {command.provenance.name}")
        is_good = known.is_exact if command.provenance is Provenance.EXACT else known.is_verified
        if command.provenance <= Provenance.RELAXED and not is_good[row]:
            self._violate("provenance", f"{where}: called {command.provenance.name} and is not")
        if command.provenance in (Provenance.DRAFTED, Provenance.TAIL) and self._previous is not None:
            self._check_change(command.action, self._previous, where)
            reach = np.where(self._switches, np.inf, self._space.max_change)
            planned = self._space.clip(np.clip(planned, self._previous - reach, self._previous + reach))
        if not np.allclose(command.action, planned, rtol=0, atol=1e-6):
            self._violate("provenance", f"{where}: other numbers than the chunk's")
        if chunk.instruction != order and known.observed_at >= ordered_at:
            self._violate("instruction", f"{where}: obeys {chunk.instruction!r}, the order is {order!r}")
        newest = self._accepted[-1] if self._accepted else known
        if newest.chunk.instruction == order and newest.observed_at >= ordered_at and chunk.instruction != order:
            self._violate("instruction", f"{where}: obeys {chunk.instruction!r} although a newer chunk obeys {order!r}")

    def _planned(self, known: _Known, row: int, step: int) -> tuple[Float32, Provenance]:
        """What the chunks say about a step, and the weakest that they say it with."""
        rows, options = [(known.chunk, row)], self._buffer.options
        if options.hand_over is HandOver.TEMPORAL_ENSEMBLE:
            rows = [(other.chunk, step - other.chunk.observation_step) for other in self._accepted]
            rows = [(chunk, i) for chunk, i in rows if 0 <= i < len(chunk.actions)]
            rows = [(chunk, i) for chunk, i in rows if chunk.provenance[i].max() < Provenance.HOLD]
        weakest = max(Provenance(int(chunk.provenance[i].max())) for chunk, i in rows)
        weights = np.exp(-options.ensemble_decay * np.arange(len(rows)))
        mean = np.average([chunk.actions[i] for chunk, i in rows], axis=0, weights=weights)
        mean[self._switches] = known.chunk.actions[row][self._switches]
        return self._space.clip(mean.astype(np.float32)), weakest

    def _check_held(self, command: Command, step: int) -> None:
        """A hold or a stop: nothing to play, and no motion that speeds up."""
        if self._accepted:
            known = self._accepted[-1]
            row = step - known.chunk.observation_step
            if 0 <= row < len(known.chunk.actions) and known.chunk.provenance[row].max() < Provenance.HOLD:
                self._violate("provenance", f"a hold at step {step}; chunk {known.chunk.chunk_id} has a plan for it")
        previous = self._space.rest if self._previous is None else self._previous
        moving = self._space.mask(DofKind.DELTA, DofKind.VELOCITY)
        if (np.abs(command.action[moving]) > np.abs(previous[moving]) + 1e-6).any():
            self._violate("provenance", f"a hold at step {step} that speeds up: {command.action.tolist()}")
        if (command.action[self._switches] != previous[self._switches]).any():
            self._violate("provenance", f"a hold at step {step} that switches: {command.action.tolist()}")

    def end_episode(self) -> None:
        """Nothing may be missing: the last plan may still be under way, and no other."""
        if self._num_delivered > self._num_plans:
            self._violate("counters", f"{self._num_delivered} chunks were delivered, {self._num_plans} planned")

    # What several of them need.

    @property
    def _is_frozen(self) -> bool:
        return self._buffer.options.hand_over is HandOver.FROZEN_PREFIX

    def _is_action(self, action: object) -> bool:
        if not isinstance(action, np.ndarray) or action.shape != (self._space.size,):
            return False
        return bool(np.isfinite(action).all())

    def _is_within_limits(self, actions: Float32) -> bool:
        return bool((actions >= self._space.low).all() and (actions <= self._space.high).all())

    def _check_change(self, action: Float32, before: Float32, where: str) -> None:
        change = np.abs(action - before)[~self._switches]
        most = self._space.max_change[~self._switches]
        if (change > most + 1e-5).any():
            self._violate("change", f"{where}: an unverified change of {change.max():.3f}, at most {most.max():.3f}")

    def _check_clock(self) -> None:
        now_ns = self._now_ns()
        if now_ns < self._latest_ns:
            self._violate("clock", f"{now_ns} ns after {self._latest_ns} ns")
        self._latest_ns = max(self._latest_ns, now_ns)

    def _violate(self, invariant: str, what: str) -> None:
        self.counts[invariant] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(Violation(self._tick, invariant, what))


@final
class _Tolerance:
    """The acceptance rule's limits, worked out from its options without the rule."""

    def __init__(self, rule: Choice, domain: TokenDomain, tokenizer: ActionTokenizer) -> None:
        self._rule, self._domain, self._tokenizer = rule, domain, tokenizer

    def fault(self, tokens: Int32, choices: Int32, relaxed: npt.NDArray[np.bool_]) -> str:
        """What is wrong with these relaxed tokens; empty = nothing. All [n]."""
        options, n = self._rule.options, len(tokens)
        if self._rule.name == "greedy":
            return f"token {int(relaxed.argmax())} is called RELAXED under an exact rule"
        switched = relaxed & self._domain.never_relaxed[:n] & (tokens != choices)
        if options.respect_never_relaxed and switched.any():
            return f"token {int(switched.argmax())} is a switch and relaxed"
        if self._rule.name == "relaxed_bins":
            far = relaxed & (np.abs(tokens - choices) > options.max_bins)
            return f"token {int(far.argmax())} is more than {options.max_bins} bins off" if far.any() else ""
        return self._physical_fault(tokens, choices, relaxed)

    def _physical_fault(self, tokens: Int32, choices: Int32, relaxed: npt.NDArray[np.bool_]) -> str:
        options, domain, tokenizer = self._rule.options, self._domain, self._tokenizer
        n, num_dofs = len(tokens), domain.tokens_per_step
        position = np.arange(n, dtype=np.int32)
        off = np.where(relaxed, tokenizer.distance(tokens, choices, position), 0).astype(np.float64)
        still = tokenizer.encode(np.zeros((1, num_dofs), np.float32))[position % num_dofs]
        reach = tokenizer.distance(choices, still, position).astype(np.float64)
        cap = np.broadcast_to(np.asarray(options.cap, np.float64), num_dofs)[position % num_dofs]
        slack = 1e-2 * float(domain.unit_per_bin.min())
        far = relaxed & (off > cap + options.relative * reach + slack)
        if far.any():
            at = int(far.argmax())
            return f"token {at} is {off[at]:.6g} off, more than its cap"
        budget = np.broadcast_to(np.asarray(options.budget, np.float64), num_dofs)[position % num_dofs]
        for group in np.unique(domain.group[:n][relaxed]):
            of_group = domain.group[:n] == group
            if off[of_group].sum() > budget[of_group].max() + slack:
                return f"group {group} has spent {off[of_group].sum():.6g}, more than its budget"
        return ""


def _num_yielded(record: PlanRecord) -> int:
    """Tokens that a plan decoded, from its rounds: one more than each accepted; before a given beginning none."""
    gained = sum(measured.num_accepted + 1 for measured in record.rounds)
    return gained - 1 if _num_forced(record) else gained


def _num_forced(record: PlanRecord) -> int:
    """Tokens of a plan that were given to begin with."""
    return sum(measured.num_forced for measured in record.rounds)


def is_decodable(record: PlanRecord) -> bool:
    """Observation and engine were in order, so that only time stood between the plan and a whole chunk."""
    return record.reason not in _BROKEN


_BROKEN = frozenset({Reason.BAD_OBSERVATION, Reason.BAD_SCORES, Reason.BAD_TOKENS, Reason.ENGINE_ERROR})
