"""The closed loop in real time: how regular the control period is, how long a chunk waits, what came late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.actor_process import ActorProcess
from vla_spec.assemble import Assembler, Assembly
from vla_spec.clock import NowNs
from vla_spec.config import as_options
from vla_spec.runtime import EpisodeResult, EpisodicRobot, Mode, run_episode
from vla_spec.types import Float32, Observation
from vla_spec.wrapped_robot import WrappedRobot

#: (begin, end) of one call [ns].
Interval = tuple[int, int]


@final
class TimedRobot(WrappedRobot):
    """Wraps a robot and keeps when it was looked through and when it was moved."""

    def __init__(self, robot: EpisodicRobot, now_ns: NowNs) -> None:
        super().__init__(robot)
        self._now_ns = now_ns
        #: Since the last reset.
        self.observes: list[Interval] = []
        self.acts: list[Interval] = []

    def reset(self, seed: int) -> None:
        """Reset, and forget what was measured."""
        self.observes, self.acts = [], []
        self.robot.reset(seed)

    def observe(self, now_ns: int) -> Observation:
        """Look, and keep how long it took."""
        begin_ns = self._now_ns()
        seen = self.robot.observe(now_ns)
        self.observes.append((begin_ns, self._now_ns()))
        return seen

    def act(self, action: Float32, now_ns: int) -> Float32:
        """Move, and keep when."""
        begin_ns = self._now_ns()
        sent = self.robot.act(action, now_ns)
        self.acts.append((begin_ns, self._now_ns()))
        return sent


class Played(NamedTuple):
    """One real-time episode with its times.

    Attributes:
        result: of the episode.
        period_error_ns: int64 [steps - 1], time between the beginnings of two control steps minus the nominal period.
        wait_ns: int64 [chunks that were played], from a chunk's being ready until its first command goes out; empty
            where the actor has a process of its own, whose calls are not seen here.
        observes, acts: calls of the robot; empty likewise.
    """

    result: EpisodeResult
    period_error_ns: npt.NDArray[np.int64]
    wait_ns: npt.NDArray[np.int64]
    observes: tuple[Interval, ...]
    acts: tuple[Interval, ...]


def open_robot(assembler: Assembler, assembly: Assembly, task: str | None) -> TimedRobot | ActorProcess:
    """The robot of the loop: in this process, or in the actor's own if the configuration asks for one. Close it."""
    choice, asked = assembly.config.robot, assembly.runtime.realtime
    if asked is None or not asked.actor_process:
        return TimedRobot(assembler.robot(choice, task), assembly.clock.now_ns)
    options = as_options(choice.options) | ({} if task is None else {"task": task})
    return ActorProcess(choice.name, options, assembly.domain, assembly.policy.space)


def play(assembly: Assembly, robot: TimedRobot | ActorProcess, seed: int, budget_ns: int, max_steps: int) -> Played:
    """Play one episode in real time, to its last step even if the task is solved before.

    Args:
        assembly: a mode on a real clock.
        robot: left open.
        seed: of the episode.
        budget_ns: time for a plan, from its observation on.
        max_steps: control steps.
    """
    options = replace(
        assembly.runtime, mode=Mode.REAL_TIME, budget_ns=budget_ns, max_steps=max_steps, stop_on_success=False
    )
    if isinstance(robot, ActorProcess):
        result = robot.run_episode(assembly.policy, assembly.clock, options, seed)
        return Played(result, period_errors(result), np.empty(0, np.int64), (), ())
    result = run_episode(robot, assembly.policy, assembly.clock, options, seed)
    free = robot.observes if options.is_observing_free else []
    waited_ns = waits(result, robot.acts, free)
    return Played(result, period_errors(result), waited_ns, tuple(robot.observes), tuple(robot.acts))


def period_errors(result: EpisodeResult) -> npt.NDArray[np.int64]:
    """Time between two control steps minus the period, int64 [steps - 1].

    The schedule is absolute, so it is how much later one step was than the one before it. Time in which the simulated
    world stood still moves the schedule and is in none of them.
    """
    assert result.realtime is not None, "an episode in real time"
    return np.diff(result.realtime.lateness_ns)


def waits(result: EpisodeResult, acts: Sequence[Interval], free: Sequence[Interval]) -> npt.NDArray[np.int64]:
    """From ready to the first command, int64 [chunks that were played].

    Args:
        result: of the episode.
        acts: when commands went out.
        free: intervals in which the simulated world stood still; they don't count.
    """
    ready_ns = {plan.chunk_id: plan.ready_ns for plan in result.plans}
    found = []
    for chunk_id, step in zip(*np.unique(result.chunk_ids, return_index=True), strict=True):
        if int(chunk_id) in ready_ns:
            begin_ns, end_ns = ready_ns[int(chunk_id)], acts[int(step)][0]
            found.append(end_ns - begin_ns - _overlap(free, begin_ns, end_ns))
    return np.array(found, np.int64)


def _overlap(intervals: Sequence[Interval], begin_ns: int, end_ns: int) -> int:
    return sum(max(0, min(end, end_ns) - max(begin, begin_ns)) for begin, end in intervals)
