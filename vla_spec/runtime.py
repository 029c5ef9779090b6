"""Planner and actor as step functions, and the loops that drive them: real time, virtual time, lock step.

The planner (slow, owns the engines) makes chunks; the actor (fast, owns the robot and its rate) plays them. They meet
in two mailboxes, so the actor never waits for the planner. The only module that sleeps.

  actor.look(now)   a plan is due: take an observation and hand it over      } once per
  actor.tick(now)   take finished chunks, send the command of this step      } control step
  planner.tick(now) answer the waiting observation                             whenever there is one
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType
from typing import NamedTuple, Protocol, final

import numpy as np
import numpy.typing as npt

from vla_spec.action_space import ActionSpace
from vla_spec.chunks import ChunkBuffer, ChunkOptions, Gap
from vla_spec.clock import NS_PER_S, Clock, NowNs, RateKeeper, VirtualClock
from vla_spec.delay import DelayEstimator
from vla_spec.errors import BadConfig, BadObservation
from vla_spec.interfaces import ChunkHistory, Robot
from vla_spec.policy import Policy
from vla_spec.realtime import (
    Grant,
    QuietInterpreter,
    RealtimeOptions,
    RealtimeRecord,
    UsageLog,
    locked_memory,
    thread_privileges,
)
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk, Command, Float32, Observation, Provenance, Rung, UInt8

#: A deadline that says "take your time" [ns].
NO_DEADLINE_NS = 3_600 * NS_PER_S
#: How long the planner's thread may take to end after it was asked to [s].
JOIN_TIMEOUT_S = 60.0


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
        realtime: what is asked of the operating system and the interpreter, real time only; None = nothing.
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
    realtime: RealtimeOptions | None = None

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


class PlannerLink(Protocol):
    """The planner as the actor sees it, in the same process or in another one. Nothing here blocks."""

    is_busy: bool  # from submit until the chunk was polled

    def reset(self) -> None:
        """A new episode starts."""

    def submit(self, request: PlanRequest) -> None:
        """Hand over an observation. One at a time: wait for its chunk before the next."""

    def poll(self, now_ns: int) -> ActionChunk | None:
        """The finished chunk, if it was ready by ``now_ns``."""


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

    def reset(self) -> None:
        """A new episode starts."""
        self.policy.reset()

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
        planner: PlannerLink,
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
        self.planner.reset()
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

        An observation of an earlier control step is planned for as what it is, and counted.

        Raises:
            BadObservation: a control step that has not been reached: the robot counts wrongly.
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
        is_overtaken = 0 <= observation.step < self.step  # whatever its stamp says: that may be wrong as well
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
        rungs: commands by rung; HOLD and STOP are the commands without a plan. gaps: these by their reason.
        slack_ns: int64 [num_steps], time that was left when the actor was ready for each step, negative = behind the
            clock; zeros where the clock is virtual.
        num_late_steps: steps that began a whole control period late or more.
        period_ns: control period on the clock, nominal; measured_period_ns: mean of what it was, None if not paced.
        realtime: how regular its ticks were and what was granted; None if not paced.
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
    realtime: RealtimeRecord | None = None
    gaps: dict[Gap, int] = field(default_factory=dict)

    @property
    def num_holds(self) -> int:
        """Commands without a plan, stops included."""
        return self.counts[Provenance.HOLD]

    @property
    def num_misses(self) -> int:
        """Plans that were ready after their deadline."""
        return sum(plan.slack_ns < 0 for plan in self.plans)


@final
class StepLog:
    """Per-step arrays of one episode, allocated before it begins."""

    def __init__(self, num_steps: int, action_size: int) -> None:
        self.num_steps = 0
        self.actions = np.zeros((num_steps, action_size), np.float32)
        self.provenance = np.zeros(num_steps, np.uint8)
        self.chunk_ids = np.zeros(num_steps, np.int32)
        self.slack_ns = np.zeros(num_steps, np.int64)
        self.lateness_ns = np.zeros(num_steps, np.int64)

    def add(self, command: Command, sent: Float32 | None, slack_ns: int, lateness_ns: int = 0) -> None:
        """One step: what was commanded and, if the robot says so, sent; when it could have begun, and began."""
        i = self.num_steps
        self.actions[i] = command.action if sent is None else sent
        self.provenance[i], self.chunk_ids[i] = command.provenance, command.chunk_id
        self.slack_ns[i], self.lateness_ns[i] = slack_ns, lateness_ns
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
    check_options(options, policy.horizon, clock)
    run = {Mode.LOCK_STEP: _run_lock_step, Mode.VIRTUAL: _run_virtual, Mode.REAL_TIME: _run_real_time}[options.mode]
    result = run(robot, policy, clock, options, seed)
    policy.trace.flush()
    return result


def check_options(options: RuntimeOptions, horizon: int, clock: Clock) -> None:
    """Refuse what can't be run.

    Args:
        options: of an episode.
        horizon: H, actions of a full chunk.
        clock: that the policy was built with.

    Raises:
        BadConfig: the mode and the clock don't fit, or ``execute_horizon`` is longer than a chunk.
    """
    if not 1 <= options.execute_horizon <= horizon:
        raise BadConfig(f"runtime.execute_horizon is {options.execute_horizon}; valid: 1..{horizon}, a chunk's steps")
    is_virtual = isinstance(clock, VirtualClock)
    if options.mode is Mode.VIRTUAL and not is_virtual:
        raise BadConfig("runtime.mode virtual needs a VirtualClock, the one that the policy was built with")
    if options.mode is Mode.REAL_TIME and is_virtual:
        raise BadConfig("runtime.mode real_time needs a clock that runs by itself, such as MonotonicClock")


def _run_lock_step(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int
) -> EpisodeResult:
    """The world waits while a plan is made, so each chunk is used from its first action on."""
    planner = Planner(policy)
    actor, log = _start(robot, policy, clock, options, seed, planner)
    while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
        if actor.look(clock.now_ns()):
            planner.tick(clock.now_ns())
        log.add(actor.tick(clock.now_ns()), actor.last_action, 0)
    return episode_result(actor, log, seed, robot.is_success, planner.records, step_period_ns(robot.dt_s, options))


def _run_virtual(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int
) -> EpisodeResult:
    """Steps lie on a fixed schedule; the clock is the planner's and runs ahead of them while it is charged.

    A plan depends on nothing but its observation, so it can be computed at once; its chunk waits in the mailbox until
    the schedule has reached the time at which it was ready.
    """
    period_ns = step_period_ns(robot.dt_s, options)
    planner = Planner(policy)
    start_ns = clock.now_ns()
    actor, log = _start(robot, policy, clock, options, seed, planner)
    if options.is_first_plan_free:
        actor.look(start_ns)
        planner.tick(start_ns)
        start_ns = clock.now_ns()
    while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
        now_ns = start_ns + log.num_steps * period_ns
        if actor.look(now_ns):
            clock.sleep_until_ns(now_ns)
            planner.tick(now_ns)
        log.add(actor.tick(now_ns), actor.last_action, 0)
    clock.sleep_until_ns(start_ns + log.num_steps * period_ns)
    return episode_result(actor, log, seed, robot.is_success, planner.records, period_ns)


def _run_real_time(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int
) -> EpisodeResult:
    """Steps follow the wall clock, the planner has a thread of its own."""
    period_ns = step_period_ns(robot.dt_s, options)
    planner = Planner(policy)
    actor, log = _start(robot, policy, clock, options, seed, planner)
    asked = options.realtime
    usage = UsageLog(options.max_steps)
    with ExitStack() as stack:
        grants = list(stack.enter_context(locked_memory("process", asked is not None and asked.lock_memory)))
        thread = stack.enter_context(_PlannerThread(planner, clock, asked, options.max_steps))
        quiet = stack.enter_context(QuietInterpreter(clock.now_ns))
        if options.is_first_plan_free:
            actor.look(clock.now_ns())
            thread.wait_until_idle()
        if asked is not None and asked.freeze_gc:
            grants.append(quiet.freeze("process"))
        if asked is not None:
            grants += stack.enter_context(thread_privileges("actor", asked.fifo_priority, asked.actor_cpus))
        keeper = play_paced(actor, log, robot, clock, options, period_ns, quiet, usage, thread.check)
    record = RealtimeRecord(
        period_ns,
        log.lateness_ns[: log.num_steps],
        usage.rows,
        thread.usage.rows[int(options.is_first_plan_free) :],
        (*grants, *thread.grants),
        quiet.num_collections,
        quiet.longest_ns,
    )
    return episode_result(actor, log, seed, robot.is_success, planner.records, period_ns, keeper, record)


def play_paced(
    actor: Actor,
    log: StepLog,
    robot: EpisodicRobot,
    clock: Clock,
    options: RuntimeOptions,
    period_ns: int,
    quiet: QuietInterpreter,
    usage: UsageLog,
    check: Callable[[], None],
) -> RateKeeper:
    """The actor's loop on the wall clock; steps that drawing made late are caught up with what was due at their time.

    Args:
        actor: has been reset.
        log: takes one row per step.
        robot: the actor's.
        clock: one that runs by itself.
        options: of the episode.
        period_ns: control period on the clock.
        quiet: garbage collection, in the time left before the next step if the options ask for it.
        usage: of the calling thread.
        check: called once per step; what it raises ends the loop.

    Returns:
        The schedule as it was kept.
    """
    is_collecting = options.realtime is not None and options.realtime.freeze_gc
    keeper = RateKeeper(clock, period_ns, catch_up=True)
    usage.begin()
    while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
        scheduled_ns = keeper.wait()
        check()
        if actor.look(scheduled_ns) and options.is_observing_free:
            keeper.shift(actor.observe_ns[-1])
        log.add(actor.tick(scheduled_ns), actor.last_action, keeper.slack_ns, keeper.lateness_ns)
        usage.tick()
        if is_collecting:
            quiet.collect_in(keeper.next_ns - clock.now_ns())
    return keeper


@final
class _PlannerThread:
    """Runs a planner's ticks beside the actor. What it raises is raised again in the actor's thread."""

    def __init__(self, planner: Planner, clock: Clock, asked: RealtimeOptions | None, max_plans: int) -> None:
        self._planner, self._clock, self._asked = planner, clock, asked
        self._error: BaseException | None = None
        self._is_idle = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vla_spec planner", daemon=True)
        #: Of the planner's thread; whole once the thread has ended.
        self.usage = UsageLog(max_plans + 1)
        self.grants: tuple[Grant, ...] = ()

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
        priority, cpus = (0, ()) if self._asked is None else (self._asked.planner_priority, self._asked.planner_cpus)
        try:
            with ExitStack() as stack:
                if self._asked is not None:
                    self.grants = stack.enter_context(thread_privileges("planner", priority, cpus))
                while self._planner.wait():
                    self.usage.begin()
                    self._planner.tick(self._clock.now_ns())
                    self.usage.tick()
                    self._is_idle.set()
        except BaseException as error:  # the actor's thread decides
            self._error = error
        finally:
            self._is_idle.set()


def step_period_ns(dt_s: float, options: RuntimeOptions) -> int:
    """One control step on the clock [ns]; only real time is stretched."""
    return round(round(dt_s * NS_PER_S) / (options.time_scale if options.mode is Mode.REAL_TIME else 1.0))


def make_actor(
    robot: Robot,
    planner: PlannerLink,
    space: ActionSpace,
    tokens_per_step: int,
    horizon: int,
    clock: Clock,
    options: RuntimeOptions,
) -> Actor:
    """An actor with a buffer of its own; an episode begins with its `Actor.reset`.

    Args:
        robot: where commands go.
        planner: where chunks come from.
        space: what an action's numbers mean.
        tokens_per_step: tokens of one action.
        horizon: H, actions of a full chunk.
        clock: to measure observing with.
        options: of the episode.
    """
    period_ns = step_period_ns(robot.dt_s, options)
    reserve = 0 if options.mode is Mode.LOCK_STEP else horizon - options.execute_horizon
    budget_ns, delay = options.budget_ns, 0
    if options.mode is Mode.LOCK_STEP:
        budget_ns = NO_DEADLINE_NS if budget_ns is None else budget_ns
    else:
        budget_ns = max(1, reserve) * period_ns if budget_ns is None else budget_ns
        delay = -(-budget_ns // period_ns)  # until one was measured: a plan takes as long as it may
    return Actor(
        robot,
        planner,
        ChunkBuffer(space, tokens_per_step, options.chunks),
        options.execute_horizon,
        budget_ns,
        reserve,
        DelayEstimator(initial=delay),
        now_ns=clock.now_ns,
        is_observing_free=options.is_observing_free and options.mode is Mode.REAL_TIME,
    )


def _start(
    robot: EpisodicRobot, policy: Policy, clock: Clock, options: RuntimeOptions, seed: int, planner: Planner
) -> tuple[Actor, StepLog]:
    per_step = policy.adapter.domain.tokens_per_step
    actor = make_actor(robot, planner, policy.space, per_step, policy.horizon, clock, options)
    actor.reset(seed, clock.now_ns())
    return actor, StepLog(options.max_steps, policy.space.size)


def episode_result(
    actor: Actor,
    log: StepLog,
    seed: int,
    success: bool,
    plans: Sequence[PlanRecord],
    period_ns: int,
    keeper: RateKeeper | None = None,
    realtime: RealtimeRecord | None = None,
) -> EpisodeResult:
    """What an episode came to; ``keeper`` and ``realtime`` only if its steps were paced."""
    n = log.num_steps
    return EpisodeResult(
        seed=seed,
        success=success,
        num_steps=n,
        plans=tuple(plans),
        observe_ns=np.array(actor.observe_ns, np.int64),
        delay_steps=np.array(actor.delays, np.int32),
        actions=log.actions[:n],
        provenance=log.provenance[:n],
        chunk_ids=log.chunk_ids[:n],
        counts=actor.buffer.counts,
        rungs=actor.buffer.rung_counts,
        slack_ns=log.slack_ns[:n],
        num_late_steps=0 if keeper is None else keeper.skip_count,
        period_ns=period_ns,
        measured_period_ns=None if keeper is None else keeper.measured_period_ns,
        realtime=realtime,
        gaps=actor.buffer.gap_counts,
    )
