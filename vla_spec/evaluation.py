"""Closed loop over tasks, seeds and decoding modes, interleaved: success, latency and misses side by side.

Modes take turns on the same robot, task and seed, each time beginning with another one, so that a slow moment of the
machine falls on all of them. Warm-up plans and start-up measurements are in no number.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple, final

import numpy as np

from vla_spec import plugins, realtime
from vla_spec.actor_process import ActorProcess
from vla_spec.assemble import Assembler, Assembly
from vla_spec.comparison import WARMUP_PLANS, Comparison, Recording, Sample, compare, make_samples, plan_sample
from vla_spec.config import Choice, Config, as_options, as_tree, read_mode, resolve
from vla_spec.errors import BadConfig, UnknownOption
from vla_spec.metrics import MODEL_DRAFTERS, Figures, figures
from vla_spec.progress import Reporter
from vla_spec.results import Film, Results, Row, Series, TaskScore, environment, percentiles, wilson_interval
from vla_spec.runtime import EpisodeResult, EpisodicRobot, Mode, run_episode
from vla_spec.trace import PlanRecord
from vla_spec.types import Observation, UInt8
from vla_spec.wrapped_robot import WrappedRobot

#: The mode that speed-ups and agreement refer to.
BASELINE = "autoregressive"
#: Control steps of an episode where the robot's benchmark says nothing.
DEFAULT_MAX_STEPS = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        configs: one per mode; all with the same robot.
        tasks: None = all that the robot offers.
        seeds: of the episodes of each task.
        max_steps: control steps of an episode.
        num_pictures: episodes per mode that are kept as films.
        num_samples: recorded observations on which all modes are compared with autoregression; 0 = none.
    """

    configs: tuple[Config, ...]
    tasks: tuple[str, ...] | None
    seeds: range
    max_steps: int = DEFAULT_MAX_STEPS
    num_pictures: int = 0
    num_samples: int = 40


class Episode(NamedTuple):
    """One finished episode."""

    mode: str
    task: str
    result: EpisodeResult


@final
class ObservedRobot(WrappedRobot):
    """Wraps a robot and keeps what plans were made from."""

    def __init__(self, robot: EpisodicRobot) -> None:
        super().__init__(robot)
        #: Since the last reset.
        self.observations: list[Observation] = []

    def reset(self, seed: int) -> None:
        """Reset, and forget what was seen."""
        self.observations = []
        self.robot.reset(seed)

    def observe(self, now_ns: int) -> Observation:
        """Look, and keep it."""
        seen = self.robot.observe(now_ns)
        self.observations.append(seen)
        return seen


def evaluate(plan: Plan, progress: Reporter) -> Results:
    """Build the modes and run them.

    Raises:
        VlaSpecError: a part can't be built, a task does not exist, or modes that don't belong together.
    """
    first = plan.configs[0]
    if any(config.robot != first.robot for config in plan.configs):
        raise BadConfig("modes: all modes of one run need the same robot")
    if any(config.runtime.realtime != first.runtime.realtime for config in plan.configs):
        raise BadConfig("modes: all modes of one run need the same runtime.realtime, which is about the whole machine")
    tasks = task_names(first.robot, plan.tasks)
    assembler = Assembler()
    for config in plan.configs:  # cheap checks of all modes before the first expensive step
        assembler.adapter(config)
    example = first_observation(assembler, first.robot, tasks[0], plan.seeds[0])
    progress.phase("building modes", len(plan.configs))
    assemblies = []
    asked = first.runtime.realtime or realtime.RealtimeOptions(fifo_priority=0, planner_priority=0)
    # Costs are measured with the privileges that the planner is going to have.
    with realtime.thread_privileges("planner", asked.planner_priority, asked.planner_cpus):
        for config in plan.configs:
            assemblies.append(assembler.assemble(config, example))
            progress.step(config.mode)
    return evaluate_assembled(assembler, assemblies, plan, tasks, progress)


def evaluate_assembled(
    assembler: Assembler, assemblies: Sequence[Assembly], plan: Plan, tasks: Sequence[str | None], progress: Reporter
) -> Results:
    """Run the closed loop with modes that are built already."""
    config = assemblies[0].config
    example = first_observation(assembler, config.robot, tasks[0], plan.seeds[0])
    for assembly in assemblies:
        for _ in range(WARMUP_PLANS):
            plan_sample(assembly, Sample(example, None))
    episodes: list[Episode] = []
    recordings: list[Recording] = []
    films: list[Film] = []
    filmed = set(np.linspace(0, len(tasks) - 1, max(1, min(plan.num_pictures, len(tasks)))).astype(int).tolist())
    progress.phase("closed loop", len(tasks) * len(plan.seeds) * len(assemblies))
    for t, task in enumerate(tasks):
        robot = _open_robot(assembler, assemblies[0], task)
        name = task or config.robot.name
        try:
            for s, seed in enumerate(plan.seeds):
                first = (t + s) % len(assemblies)
                for assembly in (*assemblies[first:], *assemblies[:first]):
                    mode = assembly.config.mode
                    options = replace(assembly.runtime, max_steps=plan.max_steps)
                    if isinstance(robot, ActorProcess):
                        result = robot.run_episode(assembly.policy, assembly.clock, options, seed)
                    else:
                        result = run_episode(robot, assembly.policy, assembly.clock, options, seed)
                    episodes.append(Episode(mode, name, result))
                    if s == 0 and assembly is assemblies[0] and plan.num_samples:
                        recordings.append(Recording(name, seed, tuple(robot.observations)))
                    if s == 0 and t in filmed and plan.num_pictures:
                        films.append(_film(mode, name, seed, result, robot))
                    progress.step(f"{name} seed {seed} {mode}: {'success' if result.success else 'failure'}")
        finally:
            robot.close()
    compared, base = _compare(assembler, assemblies, recordings, plan, example, progress)
    return _results(assemblies, plan, tasks, episodes, compared, base, films)


def _open_robot(assembler: Assembler, assembly: Assembly, task: str | None) -> ObservedRobot | ActorProcess:
    """The robot of the closed loop: in this process, or in the actor's own if the configuration asks for one."""
    choice, asked = assembly.config.robot, assembly.runtime.realtime
    if asked is None or not asked.actor_process:
        return ObservedRobot(assembler.robot(choice, task))
    options = as_options(choice.options) | ({} if task is None else {"task": task})
    return ActorProcess(choice.name, options, assembly.domain, assembly.policy.space)


def record(
    assembler: Assembler,
    assembly: Assembly,
    tasks: Sequence[str | None],
    seeds: range,
    max_steps: int,
    num_observations: int,
    progress: Reporter,
) -> list[Recording]:
    """Run one mode in lock step and keep what it saw, until there is enough for that many observations."""
    recordings: list[Recording] = []
    progress.phase("recording", len(tasks))
    enough = max(1, -(-num_observations // len(tasks)))  # of each task, so that all tasks are in
    for task in tasks:
        robot = ObservedRobot(assembler.robot(assembly.config.robot, task))
        try:
            seen = 0
            for seed in seeds:
                options = replace(assembly.runtime, max_steps=max_steps, mode=Mode.LOCK_STEP, budget_ns=None)
                run_episode(robot, assembly.policy, assembly.clock, options, seed)
                recordings.append(Recording(task or "", seed, tuple(robot.observations)))
                seen += len(robot.observations)
                if seen >= enough:
                    break
        finally:
            robot.close()
        progress.step(task or "")
    return recordings


def task_names(robot: Choice, wanted: Sequence[str] | None) -> tuple[str | None, ...]:
    """Tasks to run: those that were asked for, or all; ``(None,)`` for a robot without tasks.

    A robot with tasks has an option ``task`` and, in its file, a mapping ``TASKS`` or, where they depend on its other
    options, a function ``tasks(options)``.

    Raises:
        UnknownOption: no such task; lists them all.
        BadConfig: the robot has no tasks.
    """
    names = vars(_robot_module(robot))
    offered: list[str] = list(names["tasks"](robot.options) if "tasks" in names else names.get("TASKS", ()))
    if not offered:
        if wanted:
            raise BadConfig(f"--tasks {','.join(wanted)}: robot {robot.name!r} has no tasks; leave the option out")
        return (None,)
    for task in wanted or ():
        if task not in offered:
            raise UnknownOption("task", task, offered, "--tasks")
    if wanted and len(set(wanted)) < len(wanted):
        raise BadConfig(f"--tasks {','.join(wanted)}: a task is named twice")
    return tuple(wanted or offered)


def episode_steps(robot: Choice) -> int:
    """Control steps of an episode: as the robot's benchmark has it (``max_steps(options)`` in its file), else 200."""
    limit = vars(_robot_module(robot)).get("max_steps")
    return int(limit(robot.options)) if limit else DEFAULT_MAX_STEPS


def _robot_module(robot: Choice) -> ModuleType:
    return importlib.import_module(f"vla_spec.{plugins.FOLDERS['robot']}.{robot.name}")


def baseline_of(configs: Sequence[Config]) -> Config:
    """The autoregressive mode among them, or one like the first with its drafter taken away."""
    for config in configs:
        if config.drafter.name == "none" and config.rule.name == "greedy":
            return config
    tree = {key: value for key, value in as_tree(configs[0]).items() if key not in ("drafter", "rule", "controller")}
    return resolve({**tree, **read_mode(BASELINE)[1], "mode": BASELINE, "source": ""})


def first_observation(assembler: Assembler, robot: Choice, task: str | None, seed: int) -> Observation:
    """What the robot sees at the start of an episode, for warm-up and start-up measurements."""
    built = assembler.robot(robot, task)
    try:
        built.reset(seed)
        return built.observe(0)
    finally:
        built.close()


def figures_of(assembly: Assembly, plans: Sequence[PlanRecord]) -> Figures:
    """Figures of one mode over these plans."""
    config = assembly.config
    return figures(
        plans,
        assembly.costs,
        assembly.domain.num_tokens,
        config.runtime.deadline_ms,
        config.drafter.name in MODEL_DRAFTERS,
    )


def series_of(own: Figures) -> Series:
    """The distributions behind a row."""
    return Series(percentiles(own.chunk_ms), percentiles(own.decode_ms), percentiles(own.slack_ms), own.accepted)


def make_row(
    assembly: Assembly,
    own: Figures,
    base: Figures | None,
    compared: Comparison | None,
    num_episodes: int,
    num_successes: int,
    hold_rate: float | None,
) -> Row:
    """One row.

    Args:
        assembly: the mode.
        own: its figures.
        base: autoregression's figures under the same conditions; None = unknown.
        compared: what it did on recorded observations; None = was not compared.
        num_episodes: in closed loop.
        num_successes: of these.
        hold_rate: share of control steps without a plan.
    """
    config = assembly.config
    chunk, decode = own.chunk_ms, own.decode_ms
    has_any, has_base = len(chunk) > 0, base is not None and len(base.chunk_ms) > 0 and len(chunk) > 0
    return Row(
        mode=config.mode,
        engine=config.engine.name,
        drafter=config.drafter.name,
        rule=config.rule.name,
        controller=config.controller.name,
        is_exact=assembly.rule.exact and assembly.engine.info.is_batch_invariant,
        episodes=num_episodes,
        success_rate=num_successes / num_episodes if num_episodes else None,
        success_ci95=wilson_interval(num_successes, num_episodes),
        chunks=len(chunk),
        chunk_ms_p50=_quantile(chunk, 50) if has_any else None,
        chunk_ms_p90=_quantile(chunk, 90) if has_any else None,
        chunk_ms_p99=_quantile(chunk, 99) if has_any else None,
        chunk_ms_max=_quantile(chunk, 100) if has_any else None,
        decode_ms_p50=_quantile(decode, 50) if has_any else None,
        decode_ms_p99=_quantile(decode, 99) if has_any else None,
        prefill_ms_p50=_rounded(own.prefill_ms_p50),
        tokens_per_forward=_rounded(own.tokens_per_forward),
        acceptance_length=_rounded(own.acceptance_length),
        forwards_per_chunk=_rounded(own.forwards_per_chunk),
        speedup_decode=_ratio(base.decode_ms, decode) if has_base and base else None,
        speedup_chunk=_ratio(base.chunk_ms, chunk) if has_base and base else None,
        limit_ratio=_rounded(compared.limit_ratio if compared else own.limit_ratio),
        host_overhead_ratio=_rounded(_host_ratio(own, compared)),
        deadline_ms=config.runtime.deadline_ms,
        deadline_miss_rate=_rounded(own.deadline_miss_rate),
        token_agreement=_rounded(compared.token_agreement) if compared else None,
        max_deviation=compared.max_deviation if compared else None,
        max_action_difference=compared.max_action_difference if compared else None,
        hold_rate=_rounded(hold_rate),
    )


def _compare(
    assembler: Assembler,
    assemblies: Sequence[Assembly],
    recordings: Sequence[Recording],
    plan: Plan,
    example: Observation,
    progress: Reporter,
) -> tuple[dict[str, Comparison], Assembly | None]:
    """All modes and the baseline on the same observations; empty if the plan asks for none."""
    if not plan.num_samples or not recordings:
        return {}, None
    config = baseline_of([assembly.config for assembly in assemblies])
    known = [assembly for assembly in assemblies if assembly.config == config]
    reference = known[0] if known else assembler.assemble(config, example)
    samples = make_samples(reference, recordings, plan.num_samples)
    everyone = assemblies if known else (reference, *assemblies)
    return compare(everyone, reference, samples, 1, progress), reference


def _results(
    assemblies: Sequence[Assembly],
    plan: Plan,
    tasks: Sequence[str | None],
    episodes: Sequence[Episode],
    compared: dict[str, Comparison],
    reference: Assembly | None,
    films: Sequence[Film],
) -> Results:
    own = {a.config.mode: [e for e in episodes if e.mode == a.config.mode] for a in assemblies}
    looped = {a.config.mode: figures_of(a, [p for e in own[a.config.mode] for p in e.result.plans]) for a in assemblies}
    # In lock step nothing cuts autoregression short, so its closed loop is a fair baseline; else the recorded one is.
    is_whole = all(a.runtime.mode is Mode.LOCK_STEP for a in assemblies)
    base_mode = reference.config.mode if reference else None
    rows = []
    for assembly in assemblies:
        mode = assembly.config.mode
        figure, base = looped[mode], looped.get(base_mode or "")
        results = [episode.result for episode in own[mode]]
        num_steps = sum(result.num_steps for result in results)
        row = make_row(
            assembly,
            figure,
            base if is_whole else None,
            compared.get(mode),
            num_episodes=len(results),
            num_successes=sum(result.success for result in results),
            hold_rate=sum(result.num_holds for result in results) / num_steps if num_steps else None,
        )
        if row.speedup_decode is None and reference is not None and base_mode in compared and mode in compared:
            fair, own_fair = (
                figures_of(reference, compared[base_mode].plans),
                figures_of(assembly, compared[mode].plans),
            )
            row = replace(
                row,
                speedup_decode=_ratio(fair.decode_ms, own_fair.decode_ms),
                speedup_chunk=_ratio(fair.chunk_ms, own_fair.chunk_ms),
            )
        rows.append(row)
    first = assemblies[0]
    clock = first.config.runtime.clock
    return Results(
        kind="run",
        rows=tuple(rows),
        seeds=tuple(plan.seeds),
        tasks=tuple(task or first.config.robot.name for task in tasks),
        model_hash=first.engine.info.model_hash,
        series={a.config.mode: series_of(looped[a.config.mode]) for a in assemblies},
        scores=tuple(_scores(episodes)),
        episodes=tuple(_episode_tree(episode) for episode in episodes),
        configs={a.config.mode: as_tree(a.config) for a in assemblies},
        costs={a.config.mode: a.costs.as_json() for a in assemblies},
        realtime={
            a.config.mode: realtime.report([e.result.realtime for e in own[a.config.mode] if e.result.realtime])
            for a in assemblies
            if clock == "real"
        },
        notes=_notes(clock, is_whole, max((len(c.plans) for c in compared.values()), default=0)),
        environment=environment(first.config.num_threads),
        films=tuple(films),
    )


def _notes(clock: str, is_whole: bool, num_samples: int) -> tuple[str, ...]:
    said = {
        "lockstep": "clock lockstep: physics waits for the planner; late = would have missed the deadline",
        "real": "clock real: physics goes on while the planner thinks; a late plan is cut and answered by the ladder",
        "virtual": "clock virtual: latencies are drawn from the cost table",
    }
    if not num_samples:
        return (said[clock],)
    of_samples = f"agreement and deviation are over {num_samples} recorded observations that every mode decodes"
    speed = "" if is_whole else "; so are speed-ups, without a deadline"
    return said[clock], of_samples + speed


def _scores(episodes: Sequence[Episode]) -> list[TaskScore]:
    keys = list(dict.fromkeys((episode.mode, episode.task) for episode in episodes))
    return [
        TaskScore(
            mode,
            task,
            sum((e.mode, e.task) == (mode, task) for e in episodes),
            sum(e.result.success for e in episodes if (e.mode, e.task) == (mode, task)),
        )
        for mode, task in keys
    ]


def _episode_tree(episode: Episode) -> dict[str, Any]:
    result = episode.result
    times = [plan.plan_ns / 1e6 for plan in result.plans]
    return {
        "mode": episode.mode,
        "task": episode.task,
        "seed": result.seed,
        "success": bool(result.success),
        "num_steps": result.num_steps,
        "num_plans": len(result.plans),
        "num_misses": int(result.num_misses),
        "num_holds": int(result.num_holds),
        "num_late_steps": int(result.num_late_steps),
        "chunk_ms_p50": round(float(np.median(times)), 4) if times else None,
        "delay_steps_mean": round(float(result.delay_steps.mean()), 3) if len(result.delay_steps) else None,
        "rungs": {rung.name: int(count) for rung, count in result.rungs.items() if count},
        "gaps": {gap.name: int(count) for gap, count in result.gaps.items() if count},
    }


def _film(mode: str, task: str, seed: int, result: EpisodeResult, robot: ObservedRobot | ActorProcess) -> Film:
    """The first two cameras side by side, as often as plans were made."""
    seen = robot.observations
    frames: UInt8 = np.stack([np.concatenate(list(o.images[:2]), axis=1) for o in seen])  # [n, h, 2 w, 3]
    steps = [o.step for o in seen]
    gap = float(np.mean(np.diff(steps))) if len(steps) > 1 else 1.0
    return Film(mode, task, seed, bool(result.success), frames, gap * robot.dt_s)


def _host_ratio(own: Figures, compared: Comparison | None) -> float | None:
    """Against forwards that were measured in turn with the plans, else against those at start-up."""
    forward_ns = float(np.median(compared.forward_ns)) if compared else 0.0
    if own.host_ns_p50 is None or not forward_ns:
        return own.host_overhead_ratio
    return own.host_ns_p50 / forward_ns


def _quantile(values: Any, q: int) -> float:
    return round(float(np.percentile(values, q)), 4)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _ratio(base: Any, own: Any) -> float | None:
    """Of medians; None if there is nothing to divide."""
    below = float(np.median(own)) if len(own) else 0.0
    return round(float(np.median(base)) / below, 4) if below > 0 and len(base) else None
