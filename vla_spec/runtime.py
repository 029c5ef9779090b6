"""Planner and actor as step functions, and the loops that drive them: real time, virtual time, lock step.

The planner (slow, owns the engines) makes chunks; the actor (fast, owns the robot and its rate) plays them. They meet
in two mailboxes, so the actor never waits for the planner. The only module that sleeps.

  actor.look(now)   a plan is due: take an observation and hand it over      } once per
  actor.tick(now)   take finished chunks, send the command of this step      } control step
  planner.tick(now) answer the waiting observation                             whenever there is one
"""

from __future__ import annotations

import gc
import queue
import sys
import threading
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType
from typing import NamedTuple, Protocol, final

import numpy as np
import numpy.typing as npt

from vla_spec.chunks import ChunkBuffer, ChunkOptions
from vla_spec.clock import NS_PER_S, Clock, NowNs, RateKeeper, VirtualClock
from vla_spec.delay import DelayEstimator
from vla_spec.errors import BadConfig, BadObservation
from vla_spec.interfaces import ChunkHistory, Robot
from vla_spec.policy import Policy
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Command, Float32, Observation, Provenance, Rung, UInt8

#: A deadline that says "take your time" [ns].
NO_DEADLINE_NS = 3_600 * NS_PER_S
#: How long the planner's thread may take to end after it was asked to [s].
JOIN_TIMEOUT_S = 60.0
#: Threads hand over the interpreter this often in real time [s]; Python's own 5 ms are most of a control period.
SWITCH_INTERVAL_S = 0.0005


class EpisodicRobot(Robot, Protocol):
    """A robot whose episodes can be scored: simulators and replays."""

    @property
    def is_success(self) -> bool:
        """The task was solved at some step since the reset."""


class Mode(Enum):
    """How planning and acting share time.

    LOCK_STEP: plan, play ``execute_horizon`` steps, plan again; the world waits. As fast as possible, for success
        rates without the influence of latency.
    VIRTUAL: control steps follow a virtual clock, and a plan comes into use when the time that its engine calls were
        charged has passed (`vla_spec.virtual_costs`). One thread; repeats bit for bit from a seed.
    REAL_TIME: physics advances with the wall clock whether or not the planner is late; the planner has its own thread.
    """

    LOCK_STEP = "lock_step"
    VIRTUAL = "virtual"
    REAL_TIME = "real_time"


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """Knobs of an episode.

    Attributes:
        mode: see `Mode`.
        execute_horizon: steps of a chunk that are played before the next plan starts, 1..H. Small: reacts quickly and
            plans often; large: the chunk runs out while the next one is planned.
        max_steps: the episode's length in control steps.
        budget_ns: time for one plan, from its observation. None = until the chunk that is being played has run out,
            ``H - execute_horizon`` control periods (at least one); in lock step: no deadline.
        time_scale: simulated seconds per second of the clock, real time only. 1 = real time, 0.5 = half as fast, so
            that a slow machine can stand for a faster one.
        is_first_plan_free: the robot waits for the first chunk before step 0; False = it holds meanwhile.
        is_observing_free: the simulated world stands still while its pictures are drawn, real time only. False = the
            drawing is taken out of the plan's time, like a slow camera.
        stop_on_success: end the episode there.
        chunks: hand-over and holding.
    """

    mode: Mode = Mode.LOCK_STEP
    execute_horizon: int = 4
    max_steps: int = 150
    budget_ns: int | None = None
    time_scale: float = 1.0
    is_first_plan_free: bool = True
    is_observing_free: bool = False
    stop_on_success: bool = True
    chunks: ChunkOptions = field(default_factory=ChunkOptions)

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("execute_horizon", self.execute_horizon >= 1, "1 or more"),
            ("max_steps", self.max_steps >= 1, "1 or more"),
            ("budget_ns", self.budget_ns is None or self.budget_ns > 0, "more than 0"),
            ("time_scale", self.time_scale > 0, "more than 0"),
        ):
            if not value:
                raise BadConfig(f"runtime.{name} is {getattr(self, name)}; valid: {valid}")


class PlanRequest(NamedTuple):
    """What the actor hands to the planner."""

    observation: Observation
    deadline_ns: int
    history: ChunkHistory | None


@final
class Planner:
    """Answers one observation per tick. `tick` and `wait` belong to the planner's thread, the rest to the actor's."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        #: One entry per plan since construction.
        self.records: list[PlanRecord] = []
        self._requests: queue.SimpleQueue[PlanRequest | None] = queue.SimpleQueue()
        self._next: PlanRequest | None = None
        self._chunks: queue.SimpleQueue[ActionChunk] = queue.SimpleQueue()
        self._held: ActionChunk | None = None
        self.is_busy = False  # written by the actor only: from submit until the chunk was polled

    def submit(self, request: PlanRequest) -> None:
        """Hand over an observation. One at a time: wait for its chunk before the next."""
        assert not self.is_busy, f"observation of step {request.observation.step} handed over while planning"
        self.is_busy = True
        self._requests.put(request)

    def tick(self, now_ns: int) -> ActionChunk | None:
        """Plan if there is an observation; None = there was none. ``now_ns``: the planner starts no earlier."""
        if self._next is None:
            try:
                self._next = self._requests.get_nowait()
            except queue.Empty:
                return None
        request, self._next = self._next, None
        if request is None or request.observation.stamp_ns > now_ns:
            self._next = request
            return None
        chunk = self.policy.plan(*request)
        if self.policy.last_record is not None:
            self.records.append(self.policy.last_record)
        self._chunks.put(chunk)
        return chunk

    def wait(self) -> bool:
        """Block until there is an observation; False = `close` was called."""
        if self._next is None:
            self._next = self._requests.get()
        return self._next is not None

    def close(self) -> None:
        """Let `wait` return False once everything before is done."""
        self._requests.put(None)

    def poll(self, now_ns: int) -> ActionChunk | None:
        """The finished chunk, if it was ready by ``now_ns``; never blocks."""
        if self._held is None:
            try:
                self._held = self._chunks.get_nowait()
            except queue.Empty:
                return None
        if self._held.ready_ns > now_ns:
            return None
        chunk, self._held, self.is_busy = self._held, None, False
        return chunk


@final
class Actor:
    """Plays chunks on a robot, one control step per tick. Owned by the thread that made the robot; never blocks.

    Args:
        robot: where commands go; it counts its own control steps from `reset` on.
        planner: where chunks come from.
        buffer: which action is due.
        execute_horizon: steps of a chunk to play before the next plan is asked for.
        budget_ns: time that a plan is given from its observation on.
        reserve_steps: also ask for a plan when the chunk has no more than so many steps left (a chunk that came late
            or short has fewer). 0 = only `execute_horizon` counts.
        delay: how many actions are consumed while a plan is made, for a frozen prefix.
        now_ns: a clock to measure observing with; None = not measured.
        is_observing_free: the time of observing is added to the plan's deadline.
    """

    def __init__(
        self,
        robot: Robot,
        planner: Planner,
        buffer: ChunkBuffer,
        execute_horizon: int,
        budget_ns: int,
        reserve_steps: int = 0,
        delay: DelayEstimator | None = None,
        now_ns: NowNs | None = None,
        is_observing_free: bool = False,
    ) -> None:
        self.robot, self.planner, self.buffer = robot, planner, buffer
        self.delay = delay or DelayEstimator()
        self._execute_horizon, self._budget_ns, self._reserve_steps = execute_horizon, budget_ns, reserve_steps
        self._now_ns, self._is_observing_free = now_ns, is_observing_free
        self.step = 0
        #: Observations since construction whose stamp lay in the future, and those that were older than their step.
        self.num_future_stamps = self.num_overtaken = 0
        #: Control steps between observation and arrival, holds included, one entry per chunk that came.
        self.delays: list[int] = []
        #: How long each observation took [ns].
        self.observe_ns: list[int] = []
        self.last_action: Float32 | None = None  # as the robot says that it was sent

    def reset(self, seed: int, now_ns: int) -> None:
        """Start an episode."""
        self.robot.reset(seed)
        self.buffer.reset(now_ns)
        self.planner.policy.reset()
        self.step, self.delays, self.observe_ns, self.last_action = 0, [], [], None

    @property
    def is_plan_due(self) -> bool:
        """The planner is free, and the chunk at hand is used up as far as it should be, or is no plan at all."""
        if self.planner.is_busy:
            return False
        chunk = self.buffer.newest
        if chunk is None or chunk.rung >= Rung.LAST_CHUNK:
            return True
        played = self.step - chunk.observation_step
        return played >= self._execute_horizon or self.buffer.steps_left(self.step) <= self._reserve_steps

    def look(self, now_ns: int) -> bool:
        """If a plan is due, observe (this may render) and hand over. True if so.

        An observation of an earlier control step, with an earlier stamp, is planned for as what it is.

        Raises:
            BadObservation: a control step that is not the actor's own, with a new stamp: the robot counts wrongly.
        """
        self._receive(now_ns)
        if not self.is_plan_due:
            return False
        before_ns = 0 if self._now_ns is None else self._now_ns()
        observation = self.robot.observe(now_ns)
        self.observe_ns.append(0 if self._now_ns is None else self._now_ns() - before_ns)
        if observation.stamp_ns > now_ns:
            # Another clock's stamp. Nothing can be seen before it happens, and waiting for that moment is no answer.
            observation = replace(observation, stamp_ns=now_ns)
            self.num_future_stamps += 1
        is_overtaken = observation.step < self.step and observation.stamp_ns < now_ns
        if observation.step != self.step and not is_overtaken:
            raise BadObservation("step", str(observation.step), f"{self.step}, the control steps since the reset")
        num_frozen = 0
        if is_overtaken:  # an old picture that says so: its chunk is aligned with its own step
            self.num_overtaken += 1
        else:
            expected = self.delay.steps(self.buffer.steps_left(self.step))
            num_frozen = self.buffer.freeze(self.step, expected, observation.instruction)
        history = self.buffer.history(observation.step, observation.instruction, num_frozen)
        free_ns = self.observe_ns[-1] if self._is_observing_free else 0
        self.planner.submit(PlanRequest(observation, now_ns + free_ns + self._budget_ns, history))
        return True

    def tick(self, now_ns: int) -> Command:
        """Do one control step: take over a finished chunk, send the command that is due."""
        self._receive(now_ns)
        command = self.buffer.command(self.step)
        self.last_action = self.robot.act(command.action, now_ns)
        self.step += 1
        return command

    def _receive(self, now_ns: int) -> None:
        chunk = self.planner.poll(now_ns)
        if chunk is not None:
            self.delays.append(self.step - chunk.observation_step)
            self.delay.record(self.buffer.consumed_since(chunk.observation_step))
            self.buffer.put(chunk)


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """One episode. Window of everything: this episode.

    Attributes:
        seed: of the reset.
        success: the task was solved.
        num_steps: control steps that were played.
        plans: one entry per planning tick; a plan that was still running at the end is included if it was finished.
        observe_ns: int64 [observations], how long each took, drawing included; zeros where the clock is virtual.
        delay_steps: int32 [chunks], control steps between observation and arrival.
        actions: float32 [num_steps, A], as sent.
        provenance: uint8 [num_steps], values of `Provenance`, the weakest of each command.
        chunk_ids: int32 [num_steps], -1 = no chunk behind the command.
        counts: commands by provenance.
        rungs: commands by rung; HOLD and STOP are the commands without a plan.
        slack_ns: int64 [num_steps], time that was left when the actor was ready for each step, negative = behind the
            clock; zeros where the clock is virtual.
        num_late_steps: steps that began a whole control period late or more.
        period_ns: control period on the clock, nominal; measured_period_ns: mean of what it was, None if not paced.
    """

    seed: int
    success: bool
    num_steps: int
    plans: tuple[PlanRecord, ...]
    observe_ns: npt.NDArray[np.int64]
    delay_steps: npt.NDArray[np.int32]
    actions: Float32
    provenance: UInt8
    chunk_ids: npt.NDArray[np.int32]
    counts: dict[Provenance, int]
    rungs: dict[Rung, int]
    slack_ns: npt.NDArray[np.int64]
    num_late_steps: int
    period_ns: int
    measured_period_ns: float | None

    @property
    def num_holds(self) -> int:
        """Commands without a plan, stops included."""
        return self.counts[Provenance.HOLD]

    @property
    def num_misses(self) -> int:
        """Plans that were ready after their deadline."""
        return sum(plan.slack_ns < 0 for plan in self.plans)


@final
class _Log:
    """Per-step arrays of one episode, allocated before it begins."""

    def __init__(self, num_steps: int, action_size: int) -> None:
        self.num_steps = 0
        self.actions = np.zeros((num_steps, action_size), np.float32)
        self.provenance = np.zeros(num_steps, np.uint8)
        self.chunk_ids = np.zeros(num_steps, np.int32)
        self.slack_ns = np.zeros(num_steps, np.int64)

    def add(self, command: Command, sent: Float32 | None, slack_ns: int) -> None:
        i = self.num_steps
        self.actions[i] = command.action if sent is None else sent
        self.provenance[i], self.chunk_ids[i], self.slack_ns[i] = command.provenance, command.chunk_id, slack_ns
        self.num_steps += 1


def run_episode(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions | None = None, seed: int = 0
) -> EpisodeResult:
    """Run one episode. Call it from the thread that made the robot (an OpenGL context belongs to its maker).

    Args:
        robot: reset with ``seed``; left as it is at the end, not closed.
        policy: plans; its decoder and its engines' charges use ``clock``.
        clock: the clock that the policy was built with. VIRTUAL needs a `VirtualClock`; REAL_TIME a real one.
        options: knobs.
        seed: the same seed gives the same episode in LOCK_STEP and VIRTUAL, as far as the engine does.

    Raises:
        BadConfig: the mode and the clock don't fit, or ``execute_horizon`` is longer than a chunk.
    """
    options = options or RuntimeOptions()
    if not 1 <= options.execute_horizon <= policy.horizon:
        raise BadConfig(
            f"runtime.execute_horizon is {options.execute_horizon}; valid: 1..{policy.horizon}, a chunk's steps"
        )
    is_virtual = isinstance(clock, VirtualClock)
    if options.mode is Mode.VIRTUAL and not is_virtual:
        raise BadConfig("runtime.mode virtual needs a VirtualClock, the one that the policy was built with")
    if options.mode is Mode.REAL_TIME and is_virtual:
        raise BadConfig("runtime.mode real_time needs a clock that runs by itself, such as MonotonicClock")
    run = {Mode.LOCK_STEP: _run_lock_step, Mode.VIRTUAL: _run_virtual, Mode.REAL_TIME: _run_real_time}[options.mode]
    result = run(robot, policy, clock, options, seed)
    policy.trace.flush()
    return result


def _run_lock_step(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int
) -> EpisodeResult:
    """The world waits while a plan is made, so each chunk is used from its first action on."""
    budget_ns = NO_DEADLINE_NS if options.budget_ns is None else options.budget_ns
    actor, log = _start(robot, policy, options, seed, budget_ns, 0, clock)
    while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
        if actor.look(clock.now_ns()):
            actor.planner.tick(clock.now_ns())
        log.add(actor.tick(clock.now_ns()), actor.last_action, 0)
    return _result(actor, log, seed, robot.is_success, 0, _period_ns(robot), None)


def _run_virtual(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int
) -> EpisodeResult:
    """Steps lie on a fixed schedule; the clock is the planner's and runs ahead of them while it is charged.

    A plan depends on nothing but its observation, so it can be computed at once; its chunk waits in the mailbox until
    the schedule has reached the time at which it was ready.
    """
    period_ns = _period_ns(robot)
    reserve = policy.horizon - options.execute_horizon
    budget_ns = max(1, reserve) * period_ns if options.budget_ns is None else options.budget_ns
    start_ns = clock.now_ns()
    actor, log = _start(robot, policy, options, seed, budget_ns, reserve, clock)
    if options.is_first_plan_free:
        actor.look(start_ns)
        actor.planner.tick(start_ns)
        start_ns = clock.now_ns()
    while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
        now_ns = start_ns + log.num_steps * period_ns
        if actor.look(now_ns):
            clock.sleep_until_ns(now_ns)
            actor.planner.tick(now_ns)
        log.add(actor.tick(now_ns), actor.last_action, 0)
    clock.sleep_until_ns(start_ns + log.num_steps * period_ns)
    return _result(actor, log, seed, robot.is_success, 0, period_ns, None)


def _run_real_time(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int
) -> EpisodeResult:
    """Steps follow the wall clock; steps that rendering made late are caught up with what was due at their time."""
    period_ns = round(_period_ns(robot) / options.time_scale)
    reserve = policy.horizon - options.execute_horizon
    budget_ns = max(1, reserve) * period_ns if options.budget_ns is None else options.budget_ns
    actor, log = _start(robot, policy, options, seed, budget_ns, reserve, clock)
    with _PlannerThread(actor.planner, clock) as thread, _QuietInterpreter():
        if options.is_first_plan_free:
            actor.look(clock.now_ns())
            thread.wait_until_idle()
        keeper = RateKeeper(clock, period_ns, catch_up=True)
        while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
            scheduled_ns = keeper.wait()
            thread.check()
            if actor.look(scheduled_ns) and options.is_observing_free:
                keeper.shift(actor.observe_ns[-1])
            log.add(actor.tick(scheduled_ns), actor.last_action, keeper.slack_ns)
    late = keeper.skip_count
    return _result(actor, log, seed, robot.is_success, late, period_ns, keeper.measured_period_ns)


@final
class _PlannerThread:
    """Runs a planner's ticks beside the actor. What it raises is raised again in the actor's thread."""

    def __init__(self, planner: Planner, clock: Clock) -> None:
        self._planner, self._clock = planner, clock
        self._error: BaseException | None = None
        self._is_idle = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vla_spec planner", daemon=True)

    def __enter__(self) -> _PlannerThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._planner.close()
        self._thread.join(JOIN_TIMEOUT_S)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what the planner raised, if anything."""
        if self._error is not None:
            raise self._error

    def wait_until_idle(self) -> None:
        """Block until the first plan is made."""
        self._is_idle.wait()
        self.check()

    def _run(self) -> None:
        try:
            while self._planner.wait():
                self._planner.tick(self._clock.now_ns())
                self._is_idle.set()
        except BaseException as error:  # the actor's thread decides
            self._error = error
        finally:
            self._is_idle.set()


@final
class _QuietInterpreter:
    """While active: no garbage collection pauses, and threads hand over within half a millisecond."""

    def __enter__(self) -> None:
        self._was_collecting, self._interval_s = gc.isenabled(), sys.getswitchinterval()
        gc.collect()
        gc.disable()
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.setswitchinterval(self._interval_s)
        if self._was_collecting:
            gc.enable()


def _start(
    robot: EpisodicRobot,
    policy: Policy,
    options: RuntimeOptions,
    seed: int,
    budget_ns: int,
    reserve_steps: int,
    clock: Clock,
) -> tuple[Actor, _Log]:
    buffer = ChunkBuffer(policy.space, policy.adapter.domain.tokens_per_step, options.chunks)
    # Until a delay was measured: a plan takes as long as it may.
    initial = 0 if options.mode is Mode.LOCK_STEP else -(-budget_ns // round(_period_ns(robot) / options.time_scale))
    actor = Actor(
        robot,
        Planner(policy),
        buffer,
        options.execute_horizon,
        budget_ns,
        reserve_steps,
        DelayEstimator(initial=initial),
        now_ns=clock.now_ns,
        is_observing_free=options.is_observing_free and options.mode is Mode.REAL_TIME,
    )
    actor.reset(seed, clock.now_ns())
    return actor, _Log(options.max_steps, policy.space.size)


def _result(
    actor: Actor, log: _Log, seed: int, success: bool, num_late: int, period_ns: int, measured_ns: float | None
) -> EpisodeResult:
    n = log.num_steps
    return EpisodeResult(
        seed=seed,
        success=success,
        num_steps=n,
        plans=tuple(actor.planner.records),
        observe_ns=np.array(actor.observe_ns, np.int64),
        delay_steps=np.array(actor.delays, np.int32),
        actions=log.actions[:n],
        provenance=log.provenance[:n],
        chunk_ids=log.chunk_ids[:n],
        counts=actor.buffer.counts,
        rungs=actor.buffer.rung_counts,
        slack_ns=log.slack_ns[:n],
        num_late_steps=num_late,
        period_ns=period_ns,
        measured_period_ns=measured_ns,
    )


def _period_ns(robot: Robot) -> int:
    return round(robot.dt_s * NS_PER_S)
