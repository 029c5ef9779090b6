"""Episodes whose planner is a server: the same actor, buffer and loop as without one, and the same results.

What `vla_spec.runtime.run_episode` does with a policy in this process, `run_remote_episode` does with a
`RemotePlanner`: the actor does not see the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vla_spec import realtime
from vla_spec.assemble import Assembler, runtime_options
from vla_spec.clock import Clock, MonotonicClock
from vla_spec.config import Config, as_tree
from vla_spec.costs import Costs
from vla_spec.errors import BadConfig
from vla_spec.metrics import MODEL_DRAFTERS, Figures, figures
from vla_spec.progress import Reporter
from vla_spec.realtime import QuietInterpreter, RealtimeRecord, UsageLog, locked_memory, thread_privileges
from vla_spec.results import Results, Row, Series, TaskScore, environment, percentiles, wilson_interval
from vla_spec.runtime import (
    EpisodeResult,
    EpisodicRobot,
    Mode,
    RuntimeOptions,
    StepLog,
    check_options,
    episode_result,
    make_actor,
    play_paced,
    step_period_ns,
)
from vla_spec.serving.client import ClientOptions, Link, PlannerGone, RemotePlanner
from vla_spec.serving.keys import ClientKeys
from vla_spec.serving.wire import Hello, Welcome
from vla_spec.trace import PlanRecord
from vla_spec.types import Observation

#: How long a world that waits for its planner waits before it gives up [s].
PATIENCE_S = 30.0
_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class RemotePlan:
    """What to run, as `vla_spec.evaluation.Plan`.

    Attributes:
        config: robot and runtime; engine and drafter are the server's business.
        tasks: names, ``(None,)`` for a robot without tasks.
        seeds: of the episodes of each task.
        max_steps: control steps of an episode.
        address: of the server.
        keys: None = the server has none.
    """

    config: Config
    tasks: tuple[str | None, ...]
    seeds: range
    max_steps: int
    address: str
    keys: ClientKeys | None = None


def run_remote_episode(
    robot: EpisodicRobot,
    planner: RemotePlanner,
    clock: Clock,
    options: RuntimeOptions,
    seed: int = 0,
    patience_s: float = PATIENCE_S,
) -> EpisodeResult:
    """Run one episode in lock step or in real time.

    In real time a server that goes away is no error: the arm plays what it has, holds, stops, and goes on with the
    first chunk after the server came back. In lock step the world waits for it.

    Args:
        robot: reset with ``seed``, not closed.
        planner: connected.
        clock: the planner's, a real one.
        options: knobs; ``realtime.actor_process`` means nothing here, since the planner has a process anyway.
        seed: of the robot's reset.
        patience_s: how long a world that waits does so. [s]

    Raises:
        BadConfig: mode virtual, or ``execute_horizon`` is longer than a chunk.
        PlannerGone: it is not there when the episode begins, or, in lock step, any more.
    """
    welcome = planner.welcome
    if welcome is None:
        raise PlannerGone(f"planner at {planner.options.connect}: not connected; valid: after connect()")
    check_options(options, welcome.sizes.horizon, clock)
    if options.mode is Mode.VIRTUAL:
        raise BadConfig("runtime.mode is virtual; valid with a planner on a server: real_time, lock_step")
    sizes, period_ns = welcome.sizes, step_period_ns(robot.dt_s, options)
    actor = make_actor(robot, planner, welcome.space, sizes.tokens_per_step, sizes.horizon, clock, options)
    _await_server(planner, patience_s)
    begin_ns = clock.now_ns()
    actor.reset(seed, begin_ns)
    log = StepLog(options.max_steps, welcome.space.size)
    if options.mode is Mode.LOCK_STEP:
        while log.num_steps < options.max_steps and not (options.stop_on_success and robot.is_success):
            _await_server(planner, patience_s)
            if actor.look(clock.now_ns()) and not planner.wait(patience_s):
                raise PlannerGone(f"planner at {planner.options.connect}: {planner.trouble or 'no answer in time'}")
            log.add(actor.tick(clock.now_ns()), actor.last_action, 0)
        plans = _plans_since(planner, begin_ns)
        return episode_result(actor, log, seed, robot.is_success, plans, period_ns)
    asked, usage = options.realtime, UsageLog(options.max_steps)
    with ExitStack() as stack:
        grants = list(planner.grants)
        grants += stack.enter_context(locked_memory("process", asked is not None and asked.lock_memory))
        quiet = stack.enter_context(QuietInterpreter(clock.now_ns))
        if options.is_first_plan_free:
            actor.look(clock.now_ns())
            planner.wait(patience_s)
        if asked is not None:
            if asked.freeze_gc:
                grants.append(quiet.freeze("process"))
            grants += stack.enter_context(thread_privileges("actor", asked.fifo_priority, asked.actor_cpus))
        keeper = play_paced(actor, log, robot, clock, options, period_ns, quiet, usage, lambda: None)
    record = RealtimeRecord(
        period_ns, log.lateness_ns[: log.num_steps], usage.rows, np.zeros_like(usage.rows[:0]), tuple(grants),
        quiet.num_collections, quiet.longest_ns,
    )  # fmt: skip
    plans = _plans_since(planner, begin_ns)
    return episode_result(actor, log, seed, robot.is_success, plans, period_ns, keeper, record)


def _plans_since(planner: RemotePlanner, begin_ns: int) -> list[PlanRecord]:
    """Of this episode: a chunk of the one before may have come late."""
    return [record for record in list(planner.records) if record.start_ns >= begin_ns]


def _await_server(planner: RemotePlanner, patience_s: float) -> None:
    if planner.wait_for((Link.READY, Link.REFUSED, Link.CLOSED), patience_s) is not Link.READY:
        raise PlannerGone(f"planner at {planner.options.connect}: {planner.link.value}, {planner.trouble}")


def evaluate_remote(plan: RemotePlan, progress: Reporter) -> Results:
    """Closed loop over tasks and seeds with the planner on a server.

    Raises:
        VlaSpecError: the robot can't be built, or the server is not there or does not fit it.
    """
    config, clock, assembler = plan.config, MonotonicClock(), Assembler()
    options = replace(runtime_options(config), max_steps=plan.max_steps)
    asked = options.realtime
    io_priority = 0 if asked is None else asked.planner_priority  # in the planner's place: below the actor
    results: list[tuple[str, EpisodeResult]] = []
    planner: RemotePlanner | None = None
    try:
        progress.phase("closed loop", len(plan.tasks) * len(plan.seeds))
        for task in plan.tasks:
            robot, name = assembler.robot(config.robot, task), task or config.robot.name
            try:
                if planner is None:
                    robot.reset(plan.seeds[0])
                    planner = RemotePlanner(
                        ClientOptions(plan.address, f"vla-spec run {config.robot.name}", io_priority=io_priority),
                        hello_of(robot, robot.observe(clock.now_ns())), plan.keys, clock.now_ns,
                    )  # fmt: skip
                    planner.connect()
                for seed in plan.seeds:
                    result = run_remote_episode(robot, planner, clock, options, seed)
                    results.append((name, result))
                    progress.step(f"{name} seed {seed}: {'success' if result.success else 'failure'}")
            finally:
                robot.close()
        assert planner is not None, "no tasks"
        return _results(plan, planner, results)
    finally:
        if planner is not None:
            planner.close()


def hello_of(robot: EpisodicRobot, seen: Observation) -> Hello:
    """What a server has to fit to plan for this robot."""
    return Hello(
        image_shape=seen.images.shape,
        state_size=len(seen.state),
        action_size=len(robot.action_low),
        dt_s=robot.dt_s,
    )


def _results(plan: RemotePlan, planner: RemotePlanner, episodes: Sequence[tuple[str, EpisodeResult]]) -> Results:
    config, welcome = plan.config, planner.welcome
    assert welcome is not None, "episodes were run without a server"
    plans = [record for _, result in episodes for record in result.plans]
    own = figures(
        plans, welcome.costs or Costs.constant(1.0, {1: 1.0}), welcome.sizes.num_tokens, config.runtime.deadline_ms,
        welcome.drafter in MODEL_DRAFTERS,
    )  # fmt: skip
    names = list(dict.fromkeys(name for name, _ in episodes))
    network_ms = [timing.network_ns / _NS_PER_MS for timing in planner.timings]
    took = percentiles(network_ms)
    notes = (
        f"planned by the server at {plan.address}, mode {welcome.mode}, engine {welcome.engine}; chunk times are from "
        "handing an observation over to having its chunk, network and queue included",
        f"network and messages p50 {took[50]:.2f}, p99 {took[99]:.2f} ms of {len(network_ms)} chunks; the server was "
        f"lost {planner.num_gone} times, {planner.num_lost} observations with it",
    ) if took else (f"the server at {plan.address} made no chunk",)  # fmt: skip
    row = _row(config, welcome, own, [result for _, result in episodes])
    return Results(
        kind="run",
        rows=(row,),
        seeds=tuple(plan.seeds),
        tasks=tuple(names),
        model_hash=welcome.model_hash,
        series={row.mode: Series(percentiles(own.chunk_ms), percentiles(own.decode_ms), percentiles(own.slack_ms),
                                 own.accepted)},
        scores=tuple(
            TaskScore(row.mode, name, sum(n == name for n, _ in episodes),
                      sum(r.success for n, r in episodes if n == name))
            for name in names
        ),
        configs={row.mode: as_tree(config)},
        costs={} if welcome.costs is None else {row.mode: welcome.costs.as_json()},
        realtime={row.mode: realtime.report([r.realtime for _, r in episodes if r.realtime])}
        if config.runtime.clock == "real" else {},
        notes=notes,
        environment=environment(config.num_threads),
    )  # fmt: skip


def _row(config: Config, welcome: Welcome, own: Figures, results: Sequence[EpisodeResult]) -> Row:
    """The row of `vla_spec.evaluation.make_row`, with the server's names; limits and host share are not known here."""
    num_steps = sum(result.num_steps for result in results)
    num_successes = sum(result.success for result in results)

    def quantile(values: npt.NDArray[np.float64], q: float) -> float | None:
        return round(float(np.percentile(values, q)), 4) if len(values) else None

    return Row(
        mode=f"{welcome.mode} (remote)",
        engine=welcome.engine,
        drafter=welcome.drafter,
        rule=welcome.rule,
        controller=welcome.controller,
        is_exact=welcome.is_exact,
        episodes=len(results),
        success_rate=num_successes / len(results),
        success_ci95=wilson_interval(num_successes, len(results)),
        chunks=len(own.chunk_ms),
        chunk_ms_p50=quantile(own.chunk_ms, 50),
        chunk_ms_p90=quantile(own.chunk_ms, 90),
        chunk_ms_p99=quantile(own.chunk_ms, 99),
        chunk_ms_max=quantile(own.chunk_ms, 100),
        decode_ms_p50=quantile(own.decode_ms, 50),
        decode_ms_p99=quantile(own.decode_ms, 99),
        prefill_ms_p50=own.prefill_ms_p50,
        tokens_per_forward=own.tokens_per_forward,
        acceptance_length=own.acceptance_length,
        forwards_per_chunk=own.forwards_per_chunk,
        speedup_decode=None,
        speedup_chunk=None,
        limit_ratio=None,
        host_overhead_ratio=None,
        deadline_ms=config.runtime.deadline_ms,
        deadline_miss_rate=own.deadline_miss_rate,
        token_agreement=None,
        max_deviation=None,
        hold_rate=sum(result.num_holds for result in results) / num_steps if num_steps else None,
    )
