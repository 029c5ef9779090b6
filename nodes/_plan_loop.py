"""What `policy_node`'s planning thread does, one look at a time: whether a plan is due, its deadline, its past.

No ROS in here. Other threads may only call `forget`; what they see is in `counts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, final

import numpy as np

from vla_spec.assemble import Assembly
from vla_spec.clock import NS_PER_S, NowNs
from vla_spec.interfaces import ChunkHistory
from vla_spec.nodes._clock_watch import ClockRate, ClockWatch
from vla_spec.nodes._observation_slots import ObservationSlots
from vla_spec.types import ActionChunk, Float32, Observation, Provenance, Rung


class Planned(NamedTuple):
    """A chunk, and the arm's state at its observation, float32 [S]."""

    chunk: ActionChunk
    state: Float32 | None


@final
class PlanLoop:
    """See the module.

    A plan is due when the chunk before is played as far as ``execute_horizon``, obeys other words, or was no fresh plan
    at all; and when there is a picture that the chunk before has not seen. Without words to follow the arm is told to
    stop, once.

    Args:
        slots: where observations come from.
        now_ns: the clock of the stamps; it may be set, or be simulated.
        steady_ns: the clock of deadlines, the policy's.
        dt_s: control period [s].
        execute_horizon: control steps between the observations of two plans, at least.
    """

    def __init__(
        self, slots: ObservationSlots, now_ns: NowNs, steady_ns: NowNs, dt_s: float, execute_horizon: int
    ) -> None:
        self._slots, self._now_ns, self._steady_ns = slots, now_ns, steady_ns
        self._dt_ns, self._horizon = round(dt_s * NS_PER_S), execute_horizon
        self._clock, self._rate = ClockWatch(), ClockRate()
        self._wanted_generation = self._generation = 0
        self._previous: ActionChunk | None = None
        self._first_ns = 0  # stamp of control step 0
        #: Since construction. ``discarded``: the time or the episode that a plan was for was over when it was ready.
        self.counts = {"plans": 0, "late": 0, "discarded": 0, "clock_jumps": 0, "stops": 0}
        self.rungs = {rung: 0 for rung in Rung}

    @property
    def previous(self) -> ActionChunk | None:
        """The chunk that the arm plays, as far as the planner knows."""
        return self._previous if self._generation == self._wanted_generation else None

    def forget(self) -> None:
        """Time jumped, or an episode began: begin anew, and drop the plan that is being made. From any thread."""
        self._wanted_generation += 1
        self._slots.clear()

    def look(self, assembly: Assembly, budget_ns: int, is_simulated: bool) -> Planned | None:
        """Plan, if a plan is due and there is something to plan for; None otherwise, at once.

        Args:
            assembly: plans with it.
            budget_ns: deadline, counted from the observation's stamp on its clock.
            is_simulated: time is simulated: whoever simulates it says when it jumps.
        """
        now_ns, rate = self._now_ns(), 1.0
        if is_simulated:
            self._clock.forget()
            rate = self._rate.look(now_ns, self._steady_ns())
        elif self._clock.has_jumped(now_ns, self._steady_ns()):
            self.counts["clock_jumps"] += 1
            self.forget()
        generation = self._wanted_generation
        if generation != self._generation:
            self._generation, self._previous = generation, None
        instruction, previous = self._slots.instruction, self._previous
        if previous is not None and not instruction:
            return self.stop(assembly)
        not_before_ns = 0
        if previous is not None:
            not_before_ns = previous.observation_stamp_ns + 1
            if previous.instruction == instruction and previous.rung <= Rung.DRAFT_TAIL:
                not_before_ns = previous.observation_stamp_ns + self._horizon * self._dt_ns
        observation = self._slots.look(now_ns, not_before_ns, 0)
        if observation is None:
            return None
        if previous is None:
            self._first_ns = observation.stamp_ns
            assembly.policy.reset()
        step = round((observation.stamp_ns - self._first_ns) / self._dt_ns)
        observation = replace(observation, step=step)
        # How old the observation is by its own clock; what is left of the time is counted on the steady one, on which a
        # simulated world may be slower or faster.
        age_ns = max(0, now_ns - observation.stamp_ns)
        deadline_ns = self._steady_ns() + round((budget_ns - age_ns) / rate)
        chunk = assembly.policy.plan(observation, deadline_ns, self._history(assembly, observation))
        if generation != self._wanted_generation:
            self.counts["discarded"] += 1
            return None
        self.counts["plans"] += 1
        self.counts["late"] += chunk.is_late
        self.rungs[chunk.rung] += 1
        self._previous = chunk
        return Planned(chunk, observation.state)

    def stop(self, assembly: Assembly) -> Planned | None:
        """A decelerating stop from what the arm plays now; None if it plays nothing, or stops already.

        From the planning thread, or when that has ended.
        """
        last, self._previous = self.previous, None
        if last is None or last.rung is Rung.STOP:
            return None
        self.counts["stops"] += 1
        space, now_ns = assembly.policy.space, self._now_ns()
        row = min(len(last.actions) - 1, max(0, (now_ns - last.observation_stamp_ns) // self._dt_ns))
        before = last.actions[row - 1] if row else None
        actions: Float32 = np.stack([space.stop(last.actions[row], i, before) for i in range(space.stop_steps)])
        chunk = replace(
            last, actions=actions, provenance=np.full(actions.shape, Provenance.HOLD, np.uint8), rung=Rung.STOP,
            chunk_id=last.chunk_id + 1, instruction=self._slots.instruction, observation_stamp_ns=now_ns,
            tokens=np.empty(0, np.int32),
        )  # fmt: skip
        return Planned(chunk, self._slots.newest_state)

    def _history(self, assembly: Assembly, observation: Observation) -> ChunkHistory | None:
        """The chunk before, as it concerns this observation; None if it obeys other words or has no tokens."""
        previous = self._previous
        if previous is None or previous.instruction != observation.instruction or not len(previous.tokens):
            return None
        per_step = assembly.domain.tokens_per_step
        consumed = min((observation.step - previous.observation_step) * per_step, len(previous.tokens))
        return ChunkHistory(previous.tokens, consumed, 0, previous.actions)
