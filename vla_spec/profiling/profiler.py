"""Measure what `vla-spec profile` reports: cold start, recorded observations, real-time loop, load, tracing itself."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vla_spec import realtime
from vla_spec.assemble import Assembler, Assembly
from vla_spec.calib.background_load import BackgroundLoad
from vla_spec.comparison import WARMUP_PLANS, Sample, make_samples
from vla_spec.config import Config, as_tree
from vla_spec.doctor import num_cores
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.evaluation import (
    baseline_of,
    figures_of,
    first_observation,
    make_row,
    record,
    series_of,
    task_names,
)
from vla_spec.profiling.chrome_trace import Group, SlowPlan, around, slowest
from vla_spec.profiling.histograms import Distribution, distribution
from vla_spec.profiling.loop import Played, open_robot, play
from vla_spec.profiling.planning import NS_PER_MS, Amount, Bench, Measured, plan_all, quiet, warm_up
from vla_spec.profiling.profile import (
    MAX_SERIES,
    Bar,
    Condition,
    Loop,
    ModeProfile,
    Profile,
    Series,
    Waterfall,
)
from vla_spec.profiling.stages import spans_of, stage_durations, stage_totals
from vla_spec.profiling.tracing_cost import TracingCost, measure_tracing
from vla_spec.progress import Reporter
from vla_spec.results import Results, environment, wilson_interval
from vla_spec.types import Observation

#: What becomes of plans that take longer than their deadline.
LATE = ("count", "cut")
#: Load average from which on a machine does not count as idle.
MOST_LOAD_AVERAGE = 0.5
#: Drawn stage by stage: one typical plan and this many of the slowest.
NUM_SLOWEST_DRAWN = 3
#: Tasks that observations are recorded in if none are named; evenly spread over those offered.
NUM_DEFAULT_TASKS = 3


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """What to profile.

    Attributes:
        configs: one per mode; all with the same robot.
        tasks: that observations are recorded in, and that the loop plays. None = a few that the robot offers.
        seeds: of the episodes.
        amount: plans per mode and warm condition.
        loads: conditions beside cold, in the order of measuring; see `background_load.KINDS`.
        late: ``count`` = whole chunks are decoded and the late ones counted; ``cut`` = plans get their deadline.
        num_observations: recorded observations that are planned over and over.
        cold_plans: first plans of a new session; 0 = no cold start.
        tracing_pairs: plans with and without trace; 0 = not measured.
        has_loop: play the closed loop in real time, too. max_steps: control steps of one of its episodes.
        load_processes: that load the machine, where it is loaded.
        num_slowest: plans per mode and condition in the file for Perfetto.
    """

    configs: tuple[Config, ...]
    tasks: tuple[str, ...] | None
    seeds: range
    amount: Amount = field(default_factory=Amount)
    loads: tuple[str, ...] = ("idle",)
    late: str = "count"
    num_observations: int = 40
    cold_plans: int = 5
    tracing_pairs: int = 40
    has_loop: bool = False
    max_steps: int = 200
    load_processes: int = 1
    num_slowest: int = 10

    def __post_init__(self) -> None:
        for config in self.configs:
            if config.runtime.clock == "virtual":
                raise BadConfig(
                    f"mode {config.mode}: runtime.clock is virtual, its time is drawn from a table; valid for a "
                    f"profile: lockstep or real"
                )
        if self.late not in LATE:
            raise BadConfig(f"--late is {self.late!r}; valid: {' or '.join(LATE)}")
        if any(config.robot != self.configs[0].robot for config in self.configs):
            raise BadConfig("modes: all modes of one profile need the same robot")
        if any(config.runtime.realtime != self.configs[0].runtime.realtime for config in self.configs):
            raise BadConfig("modes: all modes of one profile need the same runtime.realtime")
        for load in self.loads:
            BackgroundLoad(load, self.load_processes)  # says what is wrong with it
        if not self.loads or len(set(self.loads)) < len(self.loads):
            raise BadConfig(f"--load {','.join(self.loads)!r}: name at least one load, and each only once")
        if self.has_loop and self.max_steps < 2:
            raise BadConfig(f"--max-steps is {self.max_steps}; valid for --real-time: 2 or more, a period has two ends")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names in `CONDITIONS` that will be measured, in order."""
        return (("cold",) if self.cold_plans else ()) + self.loads


class Profiled(NamedTuple):
    """The profile, the same run's rows for results.json, and the slowest plans for Perfetto."""

    profile: Profile
    results: Results
    groups: tuple[Group, ...]


class _Cold(NamedTuple):
    """A new session: how long it took to make, and its first plans."""

    load_ns: int
    plans: list[Measured]


def profile(plan: ProfilePlan, progress: Reporter) -> Profiled:
    """Record observations, then measure one thing after the other, modes in turn within each.

    Raises:
        VlaSpecError: a mode can't be built, a task does not exist, or there is nothing to plan.
    """
    first = plan.configs[0]
    disturbance = _disturbance()
    tasks = _tasks(first, plan.tasks)
    assembler = Assembler()
    example = first_observation(assembler, first.robot, tasks[0], plan.seeds[0])
    progress.phase("building modes", len(plan.configs))
    assemblies = []
    asked = first.runtime.realtime or realtime.RealtimeOptions(fifo_priority=0, planner_priority=0)
    with realtime.thread_privileges("planner", asked.planner_priority, asked.planner_cpus):  # costs as in the loop
        for config in plan.configs:
            assemblies.append(assembler.assemble(config, example))
            progress.step(config.mode)
    samples = _samples(assembler, assemblies, tasks, plan, progress)
    benches = [_bench(assembly, plan) for assembly in assemblies]

    cold = {a.config.mode: _cold(a, samples, example, plan, progress) for a in assemblies} if plan.cold_plans else {}
    found: dict[str, dict[str, list[Measured]]] = {a.config.mode: {} for a in assemblies}
    played: dict[str, dict[str, list[Played]]] = {a.config.mode: {} for a in assemblies}
    tracing: dict[str, TracingCost] = {}
    loads = {}
    for load in plan.loads:
        background = BackgroundLoad(load, plan.load_processes)
        loads[load] = background.description
        with background:
            warm_up(benches, samples, WARMUP_PLANS)
            progress.phase(f"planning, {load}", plan.amount.plans or 0)
            now_ns = assemblies[0].clock.now_ns
            for mode, measured in plan_all(benches, samples, plan.amount, now_ns, progress).items():
                found[mode][load] = measured
            if plan.tracing_pairs and not tracing:
                progress.phase("with and without trace", plan.tracing_pairs * len(benches))
                for bench in benches:
                    cost = measure_tracing(bench, samples, plan.tracing_pairs, progress)
                    tracing[bench.assembly.config.mode] = cost
            if plan.has_loop:
                for mode, episodes in _loops(assembler, assemblies, tasks, plan, load, progress).items():
                    played[mode][load] = episodes

    modes = {}
    for assembly in assemblies:
        mode, num_tokens = assembly.config.mode, assembly.domain.num_tokens
        conditions = {"cold": condition_of(cold[mode].plans, num_tokens)} if mode in cold else {}
        conditions |= {load: condition_of(measured, num_tokens) for load, measured in found[mode].items()}
        modes[mode] = ModeProfile(
            engine=assembly.config.engine.name,
            drafter=assembly.config.drafter.name,
            rule=assembly.config.rule.name,
            controller=assembly.config.controller.name,
            is_exact=assembly.rule.exact and assembly.engine.info.is_batch_invariant,
            deadline_ms=assembly.config.runtime.deadline_ms,
            load_ms=round(cold[mode].load_ns / NS_PER_MS, 4) if mode in cold else None,
            first_ms=round(cold[mode].plans[0].plan.plan_ns / NS_PER_MS, 4) if mode in cold else None,
            conditions=conditions,
            loops={load: loop_of(episodes, num_tokens) for load, episodes in played[mode].items()},
            tracing=tracing.get(mode),
            config=as_tree(assembly.config),
        )
    made = Profile(
        modes=modes,
        late=plan.late,
        model_hash=assemblies[0].engine.info.model_hash,
        seeds=tuple(plan.seeds),
        tasks=tuple(task or first.robot.name for task in tasks),
        num_observations=len(samples),
        loads=loads,
        environment=environment(first.num_threads),
        notes=(*disturbance, *_notes(plan, assemblies)),
    )
    return Profiled(made, _results(made, plan, assemblies, found, played), _groups(plan, found, played))


def condition_of(measured: Sequence[Measured], num_tokens: int) -> Condition:
    """Everything that is reported about plans of recorded observations; at least one plan of ``num_tokens`` tokens."""
    plans = [item.plan for item in measured]
    first_ns = plans[0].start_ns
    misses = sum(plan.slack_ns < 0 for plan in plans)
    interval = wilson_interval(misses, len(plans))
    decoded = [plan for plan in plans if plan.rounds]
    totals = [stage_totals(plan) for plan in plans]
    stages = stage_durations(plans, [item.hand_over_ns for item in measured])
    assert interval is not None, "no plans"
    return Condition(
        plans=len(plans),
        seconds=round((plans[-1].ready_ns - first_ns) / 1e9, 4),
        chunk=_certain([plan.plan_ns for plan in plans]),
        slack=_certain([plan.slack_ns for plan in plans]),
        misses=misses,
        miss_rate=misses / len(plans),
        miss_ci95=interval,
        incomplete=sum(plan.num_verified < num_tokens for plan in plans),
        forwards_per_chunk=round(float(np.mean([len(p.rounds) for p in decoded])), 4) if decoded else None,
        stages={stage: _certain(durations) for stage, durations in stages.items()},
        stage_ms={stage: round(float(np.mean([t[stage] for t in totals])) / NS_PER_MS, 5) for stage in totals[0]},
        rungs=_counts(plan.rung.name for plan in plans),
        reasons=_counts(plan.reason.name for plan in plans),
        switches=sum(item.num_switches for item in measured),
        faults=sum(item.num_faults for item in measured),
        series=Series(
            tuple(round((plan.start_ns - first_ns) / NS_PER_MS, 3) for plan in plans[:MAX_SERIES]),
            tuple(round(plan.plan_ns / 1e3) for plan in plans[:MAX_SERIES]),
            tuple(round(plan.slack_ns / 1e3) for plan in plans[:MAX_SERIES]),
            tuple(len(plan.rounds) for plan in plans[:MAX_SERIES]),
        ),
        waterfalls=_waterfalls(measured, first_ns),
    )


def loop_of(episodes: Sequence[Played], num_tokens: int) -> Loop:
    """Everything that is reported about real-time episodes; at least one step and one plan of ``num_tokens`` tokens."""
    plans = [plan for episode in episodes for plan in episode.result.plans]
    errors = np.concatenate([episode.period_error_ns for episode in episodes])
    waits = np.concatenate([episode.wait_ns for episode in episodes])
    observes = np.concatenate([episode.result.observe_ns for episode in episodes])
    records = [episode.result.realtime for episode in episodes if episode.result.realtime is not None]
    misses = sum(plan.slack_ns < 0 for plan in plans)
    interval = wilson_interval(misses, len(plans))
    assert interval is not None, "no plans"
    return Loop(
        episodes=len(episodes),
        successes=sum(bool(episode.result.success) for episode in episodes),
        steps=sum(episode.result.num_steps for episode in episodes),
        period_ms=round(episodes[0].result.period_ns / NS_PER_MS, 4),
        late_steps=sum(int(episode.result.num_late_steps) for episode in episodes),
        hold_steps=sum(int(episode.result.num_holds) for episode in episodes),
        plans=len(plans),
        misses=misses,
        miss_rate=misses / len(plans),
        miss_ci95=interval,
        incomplete=sum(plan.num_verified < num_tokens for plan in plans),
        chunk=_certain([plan.plan_ns for plan in plans]),
        slack=_certain([plan.slack_ns for plan in plans]),
        period_error=_certain(errors),
        jitter=_certain(np.abs(errors)),
        wait=distribution(waits),
        observe=distribution(observes),
        rungs=_counts(plan.rung.name for plan in plans),
        realtime=realtime.report(records),
    )


def _tasks(config: Config, wanted: tuple[str, ...] | None) -> tuple[str | None, ...]:
    offered = task_names(config.robot, wanted)
    if wanted or len(offered) <= NUM_DEFAULT_TASKS:
        return offered
    spread = np.linspace(0, len(offered) - 1, NUM_DEFAULT_TASKS).astype(int)
    return tuple(offered[i] for i in spread)


def _samples(
    assembler: Assembler, assemblies: Sequence[Assembly], tasks: Sequence[str | None], plan: ProfilePlan,
    progress: Reporter,
) -> list[Sample]:  # fmt: skip
    """Recorded by autoregression if it is among the modes, else by the first one."""
    baseline = baseline_of(plan.configs)
    reference = next((a for a in assemblies if a.config == baseline), assemblies[0])
    recordings = record(assembler, reference, tasks, plan.seeds, plan.max_steps, plan.num_observations, progress)
    samples = make_samples(reference, recordings, plan.num_observations)
    if not samples:
        raise VlaSpecError("profile: nothing was observed in the recorded episodes; name other --tasks or --seed-start")
    return samples


def _bench(assembly: Assembly, plan: ProfilePlan) -> Bench:
    return Bench(assembly, round(assembly.config.runtime.deadline_ms * NS_PER_MS), plan.late == "cut")


def _cold(
    assembly: Assembly, samples: Sequence[Sample], example: Observation, plan: ProfilePlan, progress: Reporter
) -> _Cold:
    """Make the mode once more, with the costs that are known already so that measuring them warms nothing up."""
    config = assembly.config
    progress.phase(f"cold, {config.mode}", 1)
    now_ns = assembly.clock.now_ns
    with quiet():
        begin_ns = now_ns()
        bench = _bench(Assembler().assemble(config, example, assembly.costs), plan)
        load_ns = now_ns() - begin_ns
        plans = [bench.plan(samples[i % len(samples)]) for i in range(plan.cold_plans)]
    progress.step()
    return _Cold(load_ns, plans)


def _loops(
    assembler: Assembler, assemblies: Sequence[Assembly], tasks: Sequence[str | None], plan: ProfilePlan, load: str,
    progress: Reporter,
) -> dict[str, list[Played]]:  # fmt: skip
    """Every task and seed by every mode, each time beginning with another one."""
    progress.phase(f"real time, {load}", len(tasks) * len(plan.seeds) * len(assemblies))
    played: dict[str, list[Played]] = {a.config.mode: [] for a in assemblies}
    for t, task in enumerate(tasks):
        robot = open_robot(assembler, assemblies[0], task)
        try:
            for s, seed in enumerate(plan.seeds):
                first = (t + s) % len(assemblies)
                for assembly in (*assemblies[first:], *assemblies[:first]):
                    mode = assembly.config.mode
                    budget_ns = round(assembly.config.runtime.deadline_ms * NS_PER_MS)
                    played[mode].append(play(assembly, robot, seed, budget_ns, plan.max_steps))
                    progress.step(f"{task or ''} seed {seed} {mode}")
        finally:
            robot.close()
    return played


def _results(
    made: Profile, plan: ProfilePlan, assemblies: Sequence[Assembly], found: dict[str, dict[str, list[Measured]]],
    played: dict[str, dict[str, list[Played]]],
) -> Results:  # fmt: skip
    """One row per mode, from the first warm condition."""
    load = plan.loads[0]
    figures = {a.config.mode: figures_of(a, [item.plan for item in found[a.config.mode][load]]) for a in assemblies}
    base = next((a for a in assemblies if a.config == baseline_of(plan.configs)), None)
    rows = []
    for assembly in assemblies:
        mode = assembly.config.mode
        episodes = [episode.result for episode in played[mode].get(load, [])]
        num_steps = sum(result.num_steps for result in episodes)
        rows.append(
            make_row(
                assembly,
                figures[mode],
                figures[base.config.mode] if base is not None and plan.late == "count" else None,
                None,
                num_episodes=len(episodes),
                num_successes=sum(bool(result.success) for result in episodes),
                hold_rate=sum(result.num_holds for result in episodes) / num_steps if num_steps else None,
            )
        )
    return Results(
        kind="profile",
        rows=tuple(rows),
        seeds=made.seeds,
        tasks=made.tasks,
        model_hash=made.model_hash,
        series={mode: series_of(own) for mode, own in figures.items()},
        configs={a.config.mode: as_tree(a.config) for a in assemblies},
        costs={a.config.mode: a.costs.as_json() for a in assemblies},
        notes=(f"latencies of condition {load}; everything else is in profile.json", *made.notes),
        environment=made.environment,
        realtime={mode: own.loops[load].realtime for mode, own in made.modes.items() if load in own.loops},
    )


def _groups(
    plan: ProfilePlan, found: dict[str, dict[str, list[Measured]]], played: dict[str, dict[str, list[Played]]]
) -> tuple[Group, ...]:
    groups = []
    for mode in found:
        for load, measured in found[mode].items():
            groups.append(
                Group(f"{mode}, recorded, {load}", slowest([SlowPlan(*m) for m in measured], plan.num_slowest))
            )
        for load, episodes in played[mode].items():
            chosen = slowest([SlowPlan(p) for e in episodes for p in e.result.plans], plan.num_slowest)
            margin_ns = 2 * episodes[0].result.period_ns
            acts = around([call for e in episodes for call in e.acts], chosen, margin_ns)
            observes = around([call for e in episodes for call in e.observes], chosen, margin_ns)
            groups.append(Group(f"{mode}, real time, {load}", chosen, acts, observes))
    return tuple(groups)


def _waterfalls(measured: Sequence[Measured], first_ns: int) -> tuple[Waterfall, ...]:
    """The plan nearest to the median, then the slowest ones."""
    times = np.array([item.plan.plan_ns for item in measured])
    typical = int(np.abs(times - np.median(times)).argmin())
    longest = np.argsort(-times, kind="stable")[:NUM_SLOWEST_DRAWN].tolist()
    labels = [("typical", typical), *((f"slowest {rank}", i) for rank, i in enumerate(longest, 1))]
    return tuple(_waterfall(label, measured[i], first_ns) for label, i in labels)


def _waterfall(label: str, item: Measured, first_ns: int) -> Waterfall:
    plan = item.plan
    bars = tuple(
        Bar(
            span.stage, round((span.start_ns - plan.start_ns) / 1e3, 3), round(span.duration_ns / 1e3, 3), span.round,
            span.num_drafted, span.num_accepted,
        )
        for span in spans_of(plan, item.hand_over_ns)
    )  # fmt: skip
    return Waterfall(
        label, round(plan.plan_ns / NS_PER_MS, 4), round((plan.start_ns - first_ns) / NS_PER_MS, 3), plan.rung.name,
        plan.reason.name, item.num_switches, item.num_faults, bars,
    )  # fmt: skip


def _notes(plan: ProfilePlan, assemblies: Sequence[Assembly]) -> tuple[str, ...]:
    if plan.late == "cut":
        said = "late cut: every plan was given its deadline, so a chunk's time ends where it was cut"
    else:
        said = "late count: chunks were decoded whole without a deadline; late = longer than the mode's deadline_ms"
    notes = [said, "garbage collection was off during plans, as in the real-time loop, and run between them"]
    adapting = [a.config.mode for a in assemblies if a.config.controller.name == "deadline"]
    if adapting and plan.late == "count":
        names = ", ".join(adapting)
        notes.append(
            f"{names}: the controller plans by the time left and was given none; --late cut shows what it does"
        )
    return tuple(notes)


def _disturbance() -> tuple[str, ...]:
    """A note if the machine is at work before the measurement begins."""
    if sys.platform == "win32":
        return ()
    load = os.getloadavg()[0]
    if load < MOST_LOAD_AVERAGE:
        return ()
    return (
        f"the load average was {load:.1f} on {num_cores()} cores before the measurement began: something else was "
        f"running, so idle was not idle",
    )


def _certain(values: Sequence[int] | np.ndarray) -> Distribution:
    found = distribution(np.asarray(values, np.int64))
    assert found is not None, "no values"
    return found


def _counts(names: Iterator[str]) -> dict[str, int]:
    return dict(Counter(names))
