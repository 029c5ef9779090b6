"""Which action is due at control step s; hand-over from old chunk to new; and what to send when there is none.

Action i of a chunk belongs to control step ``observation_step + i``. The delay of a plan is therefore the number of
actions that were really consumed meanwhile, not an estimate in seconds: steps in which the arm stood still for want of
a plan consumed none and shift what comes behind them. Not thread-safe: owned by the actor.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import final

import numpy as np

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.types import ActionChunk, Command, Float32, Provenance, Rung

RUNG_OF_PROVENANCE = {
    Provenance.EXACT: Rung.EXACT,
    Provenance.RELAXED: Rung.RELAXED,
    Provenance.DRAFTED: Rung.DRAFT_TAIL,
    Provenance.TAIL: Rung.LAST_CHUNK,
    Provenance.HOLD: Rung.HOLD,
}


class HandOver(Enum):
    """How a new chunk takes over from the one that is being played.

    REPLACE: at once. Reacts fastest; two plans that disagree make a jump.
    TEMPORAL_ENSEMBLE: each step is the weighted mean of all chunks that cover it, weights ``exp(-m * i)`` with i = 0
        the oldest (Zhao et al. 2023, arXiv:2304.13705, section IV-B). Smooth, but the mean of two different plans can
        be neither of them.
    FROZEN_PREFIX: the actions that will be executed while inference runs are fixed when it starts, the new chunk is
        made to begin with them, and takes over behind them. No jump, since the new plan continues the old one; reacts
        later by the steps that are frozen (real-time chunking, Black et al. 2025, arXiv:2506.07339, which guides a
        flow policy; with autoregressive tokens the beginning is exact).
    """

    REPLACE = "replace"
    TEMPORAL_ENSEMBLE = "temporal_ensemble"
    FROZEN_PREFIX = "frozen_prefix"


class Gap(IntEnum):
    """Why a command has no plan behind it."""

    STARTING = 0  # no chunk came yet
    RAN_OUT = 1  # all chunks are used up, and the next one is not there
    PLANNED = 2  # the plan itself says hold, or stop


#: No target has seen these as an answer to the newest observation: their change from step to step is limited.
UNVERIFIED = frozenset({Provenance.DRAFTED, Provenance.TAIL})
#: Separate runs of holds that are remembered; more of them than control steps in a chunk are of no use.
MAX_HOLD_RUNS = 64


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """Knobs of a `ChunkBuffer`.

    Attributes:
        hand_over: see `HandOver`.
        ensemble_decay: m >= 0 of the ensemble's weights, per chunk. 0 = plain mean; large = the oldest plan decides.
        max_chunks: chunks that are kept, at least 1.
        max_holds: holds in a row before the decelerating stop. Small: stops at each hiccup; large: a robot without a
            plan stands on its last command for that long.
        is_shifted_by_holds: a chunk is played from the first action that was not consumed: steps since its observation
            in which the robot held do not count, since the arm did not move on. A planner that is slower than a chunk
            is long then makes the robot stop and go. False = steps count whatever happened in them, for a world that
            moves by itself: after a stall the chunk is entered ahead of the arm's pose. Without effect on a robot
            with velocities, which go on during a hold.
    """

    hand_over: HandOver = HandOver.REPLACE
    ensemble_decay: float = 0.01
    max_chunks: int = 4
    max_holds: int = 8
    is_shifted_by_holds: bool = True

    def __post_init__(self) -> None:
        if self.ensemble_decay < 0 or self.max_chunks < 1 or self.max_holds < 0:
            raise BadConfig(
                f"chunks: ensemble_decay is {self.ensemble_decay}, valid: 0 or more; max_chunks is {self.max_chunks}, "
                f"valid: 1 or more; max_holds is {self.max_holds}, valid: 0 or more"
            )


@final
class ChunkBuffer:
    """Plays chunks. `command` always answers; call it from the actor only; it never blocks.

    Vocabulary: a *remainder* is the rest of an older chunk that still covers a step which the newest one does not; a
    *hold* is a command without a plan; a *stop* is what holds turn into when there are too many in a row.

    Args:
        space: what the action's numbers mean.
        tokens_per_step: tokens of one action.
        options: knobs.
    """

    def __init__(self, space: ActionSpace, tokens_per_step: int, options: ChunkOptions | None = None) -> None:
        self.space, self.tokens_per_step = space, tokens_per_step
        self.options = options or ChunkOptions()
        self._is_shifted = self.options.is_shifted_by_holds and DofKind.VELOCITY not in space.kinds
        self._switches = space.mask(DofKind.SWITCH)
        self._chunks: deque[ActionChunk] = deque(maxlen=self.options.max_chunks)  # by observation step, oldest first
        #: Counters since construction. Chunks: accepted, refused because no action of theirs lies ahead, refused
        #: because a newer observation is already being played (or they belong to the episode before).
        #: And of those accepted, how many were shifted by holds.
        self.num_accepted = self.num_stale = self.num_out_of_order = self.num_shifted = 0
        self._commands_by_provenance = np.zeros(len(Provenance), np.int64)
        self._commands_by_rung = np.zeros(len(Rung), np.int64)
        self._commands_by_gap = np.zeros(len(Gap), np.int64)
        self.reset()

    def reset(self, now_ns: int | None = None) -> None:
        """A new episode: forget all chunks. Later chunks whose observation is older than ``now_ns`` are refused."""
        self._chunks.clear()
        self._newest_step = 0  # the newest chunk's observation as it was given, before any shift by holds
        self._source: ActionChunk | None = None  # newest chunk that has tokens
        self._next_step = 0  # every step before it has been played
        self._last: Float32 | None = None
        self._before_last: Float32 | None = None
        self._holds_in_a_row = self._stop_steps = 0
        self._held: deque[tuple[int, int]] = deque(maxlen=MAX_HOLD_RUNS)  # runs of holds: first step, first behind
        self._stop_from: Float32 | None = None
        self._stop_before: Float32 | None = None
        self._frozen: list[tuple[int, ActionChunk]] = []  # (first step behind it, chunk), ascending
        self._epoch_ns = now_ns

    @property
    def newest(self) -> ActionChunk | None:
        """The chunk that was accepted last; None before the first."""
        return self._chunks[-1] if self._chunks else None

    @property
    def next_step(self) -> int:
        """The first control step that has not been played."""
        return self._next_step

    @property
    def holds_in_a_row(self) -> int:
        """Commands without a plan since the last one with a plan."""
        return self._holds_in_a_row

    @property
    def counts(self) -> dict[Provenance, int]:
        """Commands by provenance. Window: since construction, all episodes."""
        return {kind: int(self._commands_by_provenance[kind]) for kind in Provenance}

    @property
    def rung_counts(self) -> dict[Rung, int]:
        """Commands by rung of the ladder. Window: since construction, all episodes."""
        return {rung: int(self._commands_by_rung[rung]) for rung in Rung}

    @property
    def gap_counts(self) -> dict[Gap, int]:
        """Commands without a plan by the reason. Window: since construction, all episodes."""
        return {gap: int(self._commands_by_gap[gap]) for gap in Gap}

    def consumed_since(self, step: int) -> int:
        """Actions that were played from control step ``step`` on; holds of an arm that stood still are none."""
        num_held = 0
        if self._is_shifted:
            num_held = sum(max(0, end - max(first, step)) for first, end in self._held)
        return max(0, self._next_step - step) - num_held

    def steps_left(self, step: int) -> int:
        """Actions from ``step`` on that the newest chunk still has; 0 without a chunk."""
        chunk = self.newest
        return 0 if chunk is None else max(0, _end(chunk) - max(step, chunk.observation_step))

    def put(self, chunk: ActionChunk) -> bool:
        """Take over a finished chunk, late or not. False (and counted) if nothing of it can be played any more."""
        newest = self.newest
        if self._epoch_ns is not None and chunk.observation_stamp_ns < self._epoch_ns:
            self.num_out_of_order += 1
            return False
        if newest is not None and chunk.observation_step < self._newest_step:
            self.num_out_of_order += 1
            return False
        observation_step = chunk.observation_step
        num_held = self._next_step - observation_step - self.consumed_since(observation_step)
        if num_held > 0:
            chunk = replace(chunk, observation_step=chunk.observation_step + num_held)
            self.num_shifted += 1
        if _end(chunk) <= self._next_step:
            self.num_stale += 1
            return False
        if newest is not None and (chunk.instruction != newest.instruction or chunk.rung is Rung.STOP):
            # Another order, or a stop: no remainder and no average of what was wanted before.
            self._chunks.clear()
            self._frozen.clear()
        self._chunks.append(chunk)
        self._newest_step = observation_step
        if len(chunk.tokens):
            self._source = chunk
        self.num_accepted += 1
        return True

    def freeze(self, step: int, num_steps: int, instruction: str | None = None) -> int:
        """Inference starts at ``step`` and is expected to last ``num_steps``: what is due until then stays.

        Does something in mode FROZEN_PREFIX only. A chunk that comes later than expected is aligned by its steps as
        always, so a wrong estimate costs smoothness and never correctness.

        Args:
            step: control step of the new observation.
            num_steps: expected delay in control steps.
            instruction: the order of the new plan; None = the same.

        Returns:
            How many actions from ``step`` on are fixed: never more than the newest chunk has left. 0 where the new
            plan has nothing to continue: it obeys another order, or the arm holds, or stops.
        """
        newest = self.newest
        if self.options.hand_over is not HandOver.FROZEN_PREFIX or newest is None or newest is not self._source:
            return 0
        if self._holds_in_a_row or newest.rung >= Rung.HOLD or instruction not in (None, newest.instruction):
            return 0
        fixed = min(num_steps, self.steps_left(step))
        if fixed <= 0:
            return 0
        if not self._frozen or self._frozen[-1][0] < step + fixed:
            self._frozen.append((step + fixed, newest))
        return fixed

    def history(self, step: int, instruction: str | None = None, num_frozen: int = 0) -> ChunkHistory | None:
        """The previous chunk as it concerns a plan whose observation is taken at ``step``.

        Args:
            step: control step of the new observation.
            instruction: the order of the new plan; a chunk that obeys another one is no history. None = any.
            num_frozen: what `freeze` returned for the same plan.

        Returns:
            The newest chunk's tokens and how many of them lie before ``step`` (all, if it is used up); None if no
            chunk had tokens, or the observation is older than the chunk's.
        """
        chunk = self._source
        if chunk is None or (instruction is not None and chunk.instruction != instruction):
            return None
        if step < chunk.observation_step:  # an observation that was overtaken: no row of the chunk is about its step
            return None
        consumed = (step - chunk.observation_step) * self.tokens_per_step
        consumed = min(consumed, len(chunk.tokens))
        return ChunkHistory(chunk.tokens, consumed, num_frozen * self.tokens_per_step, chunk.actions)

    def command(self, step: int) -> Command:
        """What to send at control step ``step``. Never None, never an action of the past.

        Newest chunk; else the remainder of an older one; else hold; after ``max_holds`` in a row the decelerating
        stop. Unverified actions differ from the command before them by at most the space's ``max_change``. Steps may
        be skipped but not repeated.
        """
        assert step >= self._next_step, f"control step {step} was played already, next is {self._next_step}"
        self._next_step = step + 1
        command = self._planned(step)
        if command is None or command.provenance is Provenance.HOLD:
            command = self._without_plan(command)
        else:
            if command.provenance in UNVERIFIED and self._last is not None:
                # What it followed in its chunk need not be what was played before it.
                command = command._replace(action=self.space.limit_change(command.action, self._last))
            self._holds_in_a_row = self._stop_steps = 0
            self._stop_from = self._stop_before = None
            self._commands_by_rung[RUNG_OF_PROVENANCE[command.provenance]] += 1
        self._commands_by_provenance[command.provenance] += 1
        self._before_last, self._last = self._last, command.action.copy()
        return command

    def _planned(self, step: int) -> Command | None:
        """From the chunks, None if none of them covers the step."""
        newest = self.newest
        if newest is None:
            return None
        while self._frozen and self._frozen[0][0] <= step:
            del self._frozen[0]
        if self._frozen and _covers(self._frozen[0][1], step):
            return self._row(self._frozen[0][1], step, False)
        covering = [chunk for chunk in self._chunks if _covers(chunk, step)]
        if not covering:
            return None
        best = covering[-1]
        command = self._row(best, step, best is not newest)
        if self.options.hand_over is HandOver.TEMPORAL_ENSEMBLE and command.provenance is not Provenance.HOLD:
            return self._ensemble(covering, step, command)
        return command

    def _row(self, chunk: ActionChunk, step: int, is_remainder: bool) -> Command:
        index = step - chunk.observation_step
        weakest = Provenance(int(chunk.provenance[index].max()))
        if is_remainder:
            weakest = max(weakest, Provenance.TAIL)
        return Command(self.space.clip(chunk.actions[index]), weakest, chunk.chunk_id, index)

    def _ensemble(self, chunks: list[ActionChunk], step: int, newest: Command) -> Command:
        """Weighted mean of the rows for one step; switches come from the newest chunk, they have no mean."""
        rows, weakest = [], newest.provenance
        for chunk in chunks:
            row = step - chunk.observation_step
            provenance = Provenance(int(chunk.provenance[row].max()))
            if provenance is not Provenance.HOLD:
                rows.append(chunk.actions[row])
                weakest = max(weakest, provenance)
        weights = np.exp(-self.options.ensemble_decay * np.arange(len(rows)))  # [n], oldest first
        mean = (weights / weights.sum()) @ np.stack(rows)  # [A]
        action = self.space.clip(np.where(self._switches, newest.action, mean))
        return newest._replace(action=action, provenance=weakest)

    def _without_plan(self, planned: Command | None) -> Command:
        """Hold, or the next step of the decelerating stop."""
        step, newest = self._next_step - 1, self.newest
        self._holds_in_a_row += 1
        if self._held and self._held[-1][1] == step:
            self._held[-1] = (self._held[-1][0], step + 1)
        else:
            self._held.append((step, step + 1))
        gap = Gap.PLANNED if planned is not None else Gap.STARTING if newest is None else Gap.RAN_OUT
        self._commands_by_gap[gap] += 1
        is_stop = self._holds_in_a_row > self.options.max_holds or (
            planned is not None and newest is not None and newest.rung is Rung.STOP
        )
        if is_stop:
            if self._stop_steps == 0:
                self._stop_from, self._stop_before = self._last, self._before_last
            action = self.space.stop(self._stop_from, self._stop_steps, self._stop_before)
            self._stop_steps += 1
        else:
            action = self.space.hold(self._last)
        self._commands_by_rung[Rung.STOP if is_stop else Rung.HOLD] += 1
        chunk_id, row = (-1, -1) if planned is None else (planned.chunk_id, planned.row)
        return Command(action, Provenance.HOLD, chunk_id, row)


def _end(chunk: ActionChunk) -> int:
    """The first control step behind a chunk."""
    return chunk.observation_step + len(chunk.actions)


def _covers(chunk: ActionChunk, step: int) -> bool:
    return chunk.observation_step <= step < _end(chunk)
