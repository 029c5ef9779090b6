"""The closed loop in real time: how regular the control period is, how long a chunk waits, what came late."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.assemble import Assembly
from vla_spec.clock import NowNs
from vla_spec.runtime import EpisodeResult, EpisodicRobot, Mode, run_episode
from vla_spec.types import Float32, Observation

#: (begin, end) of one call [ns].
Interval = tuple[int, int]


@final
class TimedRobot:
    """Wraps a robot and keeps when it was looked through and when it was moved."""

    def __init__(self, robot: EpisodicRobot, now_ns: NowNs) -> None:
        self.robot, self._now_ns = robot, now_ns
        #: Since the last reset.
        self.observes: list[Interval] = []
        self.acts: list[Interval] = []

    @property
    def action_low(self) -> Float32:
        """The wrapped robot's."""
        return self.robot.action_low

    @property
    def action_high(self) -> Float32:
        """The wrapped robot's."""
        return self.robot.action_high

    @property
    def dt_s(self) -> float:
        """The wrapped robot's."""
        return self.robot.dt_s

    @property
    def is_success(self) -> bool:
        """The wrapped robot's."""
        return self.robot.is_success

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

    def close(self) -> None:
        """The wrapped robot's."""
        self.robot.close()


class Played(NamedTuple):
    """One real-time episode with its times.

    Attributes:
        result: of the episode.
        period_error_ns: int64 [steps - 1], time between two commands minus the nominal period; positive = late.
        wait_ns: int64 [chunks that were played], from a chunk's being ready until its first command goes out.
        observes, acts: calls of the robot.
    """

    result: EpisodeResult
    period_error_ns: npt.NDArray[np.int64]
    wait_ns: npt.NDArray[np.int64]
    observes: tuple[Interval, ...]
    acts: tuple[Interval, ...]


def play(assembly: Assembly, robot: EpisodicRobot, seed: int, budget_ns: int, max_steps: int) -> Played:
    """Play one episode in real time, to its last step even if the task is solved before.

    Args:
        assembly: a mode on a real clock.
        robot: left open.
        seed: of the episode.
        budget_ns: time for a plan, from its observation on.
        max_steps: control steps.
    """
    timed = TimedRobot(robot, assembly.clock.now_ns)
    options = replace(
        assembly.runtime, mode=Mode.REAL_TIME, budget_ns=budget_ns, max_steps=max_steps, stop_on_success=False
    )
    result = run_episode(timed, assembly.policy, assembly.clock, options, seed)
    free = timed.observes if options.is_observing_free else []
    return Played(
        result,
        period_errors(timed.acts, free, result.period_ns),
        waits(result, timed.acts, free),
        tuple(timed.observes),
        tuple(timed.acts),
    )


def period_errors(acts: Sequence[Interval], free: Sequence[Interval], period_ns: int) -> npt.NDArray[np.int64]:
    """Time between commands minus the period, int64 [len(acts) - 1].

    Args:
        acts: when commands went out.
        free: intervals in which the simulated world stood still; they don't count.
        period_ns: nominal.
    """
    begins = np.array([begin for begin, _ in acts], np.int64)
    stood = np.array([_overlap(free, *pair) for pair in itertools.pairwise(begins.tolist())], np.int64)
    return np.diff(begins) - stood - period_ns


def waits(result: EpisodeResult, acts: Sequence[Interval], free: Sequence[Interval]) -> npt.NDArray[np.int64]:
    """From ready to the first command, int64 [chunks that were played].

    A chunk whose first command went out earlier than it was ready by the actor's clock does not exist: the first plan
    of an episode may be waited for, which counts as well.
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
