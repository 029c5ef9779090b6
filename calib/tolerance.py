"""Fit a tolerance in physical units: what it does to actions and speed, and when it begins to cost success.

Open loop (`tolerance_replay`): recorded observations are decoded with every tolerance and compared with exact decoding.
Closed loop, in lock step: the same tasks and seeds with exact decoding and, for every tolerance, in two ways:

- drafted: real relaxed decoding with the mode's drafter. What that drafter makes of the tolerance, and no more: a good
  one rarely uses it up.
- used up: exact decoding, and every action moved as far as the tolerance allows, in a direction that stays the same for
  the whole episode. What the tolerance itself permits, whatever the drafter.

The fitted tolerance is the largest whose success is not worse than exact's by more than the margin (a one-sided bound
of the paired difference), with all smaller ones likewise. Every finished episode is kept in a log, so that a run that
was stopped goes on, and one with more seeds only adds to it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.acceptance._fitted import FittedTolerance
from vla_spec.acceptance.relaxed_physical import Options as RuleOptions
from vla_spec.assemble import Assembler, Assembly
from vla_spec.calib.episode_log import EpisodeKey, EpisodeLog
from vla_spec.calib.non_inferiority import Pairs, is_not_worse, lower_bound
from vla_spec.calib.tolerance_replay import OpenLoopRow, open_loop_rows
from vla_spec.calib.used_up_robot import OverheardRule, Tolerance, UsedUpRobot, physical_per_action
from vla_spec.comparison import make_samples
from vla_spec.config import Choice, Config, as_tree, load_plugin
from vla_spec.errors import BadConfig
from vla_spec.evaluation import first_observation, record, task_names
from vla_spec.progress import Reporter
from vla_spec.results import environment, wilson_interval
from vla_spec.runtime import EpisodicRobot, Mode, run_episode

Floats = npt.NDArray[np.float64]
WAYS = ("drafted", "used_up")
EXACT = "exact"
NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class TolerancePlan:
    """What to try.

    Attributes:
        config: a mode with rule `relaxed_physical`; the proportions of its cap, budget and relative share are kept.
        caps: caps to try, ascending. [m, rad]
        tasks: None = the robot's precise tasks, or all.
        seeds: of the episodes of each task.
        ways: see the module.
        max_steps: control steps of an episode.
        num_observations: recorded observations of the open loop.
        num_repeats: times that each is decoded.
        margin: of success that may be lost. [0..1]
        confidence: of the one-sided bound. [0..1]
    """

    config: Config
    caps: tuple[float, ...]
    tasks: tuple[str, ...] | None
    seeds: range
    ways: tuple[str, ...] = WAYS
    max_steps: int = 200
    num_observations: int = 30
    num_repeats: int = 2
    margin: float = 0.1
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.config.rule.name != "relaxed_physical" or self.config.rule.options.fitted is not None:
            raise BadConfig(
                f"mode {self.config.mode!r}: rule is {self.config.rule.name}; fitting needs relaxed_physical with cap "
                f"and budget stated, whose proportions are kept"
            )
        if not self.caps or min(self.caps) <= 0 or list(self.caps) != sorted(set(self.caps)):
            raise BadConfig(f"--caps {self.caps}: valid: ascending numbers above 0, in metres or radians")
        if not 0 < self.margin < 1 or not 0.5 < self.confidence < 1:
            raise BadConfig(
                f"need a margin in (0, 1) and a confidence in (0.5, 1), got {self.margin}, {self.confidence}"
            )
        if not self.ways or set(self.ways) - set(WAYS):
            raise BadConfig(f"--ways {','.join(self.ways)}: valid: {', '.join(WAYS)}")


@dataclass(frozen=True, slots=True)
class ClosedLoopRow:
    """One tolerance, used in one way, over all episodes that exact decoding was also run on.

    Attributes:
        way: `exact`, `drafted` or `used_up`.
        cap: 0 = exact.
        episodes, successes: and the 95 % Wilson interval of their ratio.
        by_task: task -> [successes, episodes].
        difference, lower_bound: of success from exact's, and its one-sided bound; None for exact itself.
        is_not_worse: the bound lies above minus the margin; None for exact.
        steps_mean: control steps of the episodes, failures at their full length.
        chunk_ms_p50: median of the episodes' medians.
    """

    way: str
    cap: float
    episodes: int
    successes: int
    success_ci95: tuple[float, float] | None
    by_task: dict[str, tuple[int, int]]
    difference: float | None
    lower_bound: float | None
    is_not_worse: bool | None
    steps_mean: float
    chunk_ms_p50: float | None

    @property
    def success_rate(self) -> float | None:
        """None without episodes."""
        return self.successes / self.episodes if self.episodes else None


@dataclass(frozen=True, slots=True)
class ToleranceFit:
    """What was found.

    Attributes:
        fitted: for `relaxed_physical`; caps of 0 if not even the smallest tolerance is good enough.
        grid: what was tried, ascending.
        open_loop, closed_loop: the curves, exact first.
    """

    fitted: FittedTolerance
    grid: tuple[Tolerance, ...]
    open_loop: tuple[OpenLoopRow, ...]
    closed_loop: tuple[ClosedLoopRow, ...]


def make_grid(options: RuleOptions, caps: Sequence[float], num_dofs: int) -> tuple[Tolerance, ...]:
    """Tolerances in the proportions of a rule's options, the largest cap of each as given.

    Raises:
        BadConfig: the rule's own cap is 0, so that it has no proportions.
    """
    largest = max(options.cap)
    if largest <= 0:
        raise BadConfig("rule.cap is 0; fitting keeps the proportions of a tolerance that is not")

    def scaled(numbers: tuple[float, ...], factor: float) -> tuple[float, ...]:
        return tuple(float(n) for n in np.broadcast_to(np.asarray(numbers), num_dofs) * factor)

    return tuple(
        Tolerance(
            scaled(options.cap, cap / largest), scaled(options.budget, cap / largest),
            min(1.0, options.relative * cap / largest),
        )
        for cap in caps
    )  # fmt: skip


def fit_tolerance(plan: TolerancePlan, log_path: Path, progress: Reporter) -> ToleranceFit:
    """Run both loops and fit.

    Args:
        plan: what to try.
        log_path: one line of JSON per finished episode; what is there already is not run again.
        progress: told about every episode.

    Raises:
        BadConfig: a log of another model or mode.
        VlaSpecError: a part can't be built.
    """
    config = replace(plan.config, runtime=replace(plan.config.runtime, clock="lockstep"))
    tasks = precise_tasks(config.robot) if plan.tasks is None else task_names(config.robot, plan.tasks)
    assembler = Assembler()
    example = first_observation(assembler, config.robot, tasks[0], plan.seeds[0])
    domain = assembler.adapter(config).domain
    grid = make_grid(config.rule.options, plan.caps, domain.tokens_per_step)
    progress.phase("building modes", 1 + len(grid))
    exact = assembler.assemble(_with_rule(config, Choice("greedy", load_plugin("rule", "greedy").options())), example)
    progress.step(EXACT)
    relaxed = []
    for tolerance in grid:
        options = replace(config.rule.options, cap=tolerance.cap, budget=tolerance.budget, relative=tolerance.relative)
        relaxed.append(assembler.assemble(_with_rule(config, Choice("relaxed_physical", options)), example))
        progress.step(f"cap {max(tolerance.cap):g}")

    log = EpisodeLog(log_path, _settings(exact, config, plan.max_steps))
    run_closed_loop(assembler, exact, relaxed, grid, tasks, plan, log, progress)
    closed_loop = closed_loop_rows(log.episodes, plan, tasks, config.robot.name)
    recordings = record(assembler, exact, tasks, plan.seeds, plan.max_steps, plan.num_observations, progress)
    samples = make_samples(exact, recordings, plan.num_observations)
    open_loop = open_loop_rows(exact, relaxed, plan.caps, samples, plan.num_repeats, progress)

    chosen = choose(closed_loop, plan.caps, plan.ways)
    nothing = (0.0,) * domain.tokens_per_step
    best = Tolerance(nothing, nothing, 0.0) if chosen is None else grid[plan.caps.index(chosen)]
    switch = domain.never_relaxed[: domain.tokens_per_step]
    cap = tuple(0.0 if is_switch else number for number, is_switch in zip(best.cap, switch, strict=True))
    evidence = {
        "unit": "physical unit of the tokenizer per degree of freedom and control step",
        "chosen_cap": chosen,
        "margin": plan.margin,
        "confidence": plan.confidence,
        "ways": list(plan.ways),
        "tasks": [task or config.robot.name for task in tasks],
        "seeds": list(plan.seeds),
        "max_steps": plan.max_steps,
        "execute_horizon": config.runtime.execute_horizon,
        "groups": domain.group[: domain.tokens_per_step].tolist(),
        "mode": as_tree(config),
        "grid": [tolerance._asdict() for tolerance in grid],
        "open_loop": [_plain(row) for row in open_loop],
        "closed_loop": [_plain(row) for row in closed_loop],
        "environment": environment(config.num_threads),
    }
    fitted = FittedTolerance(exact.engine.info.model_hash, cap, best.budget, best.relative, evidence)
    return ToleranceFit(fitted, grid, open_loop, closed_loop)


def precise_tasks(robot: Choice) -> tuple[str | None, ...]:
    """The robot's tasks that are marked as needing precision; all of them if none is marked."""
    import importlib

    from vla_spec import plugins

    module = importlib.import_module(f"vla_spec.{plugins.FOLDERS['robot']}.{robot.name}")
    marked = [n for n, task in vars(module).get("TASKS", {}).items() if getattr(task, "needs_precision", False)]
    return task_names(robot, marked or None)


def choose(rows: Iterable[ClosedLoopRow], caps: Sequence[float], ways: Sequence[str]) -> float | None:
    """The largest cap that is not worse in every way, with all smaller ones likewise; None = not even the smallest."""
    is_good = {(row.way, row.cap): bool(row.is_not_worse) for row in rows}
    good = list(itertools.takewhile(lambda cap: all(is_good.get((way, cap), False) for way in ways), caps))
    return good[-1] if good else None


def run_closed_loop(
    assembler: Assembler,
    exact: Assembly,
    relaxed: Sequence[Assembly],
    grid: Sequence[Tolerance],
    tasks: Sequence[str | None],
    plan: TolerancePlan,
    log: EpisodeLog,
    progress: Reporter,
) -> None:
    """Every task and seed with exact decoding and every tolerance in every way, in turn; known episodes are not run."""
    config = exact.config
    unit = physical_per_action(exact)
    overheard = OverheardRule(exact.policy.decoder.rule)
    exact.policy.decoder.rule = overheard
    runs: list[tuple[str, float, Assembly, Tolerance | None]] = [(EXACT, 0.0, exact, None)]
    for cap, point, assembly in zip(plan.caps, grid, relaxed, strict=True):
        if "drafted" in plan.ways:
            runs.append(("drafted", cap, assembly, None))
        if "used_up" in plan.ways:
            runs.append(("used_up", cap, exact, point))
    progress.phase("closed loop", len(tasks) * len(plan.seeds) * len(runs))
    robots: dict[str | None, EpisodicRobot] = {}
    try:
        # Seeds outside, so that what a stopped run leaves behind is about all tasks.
        for turn, (seed, task) in enumerate(itertools.product(plan.seeds, tasks)):
            name = task or config.robot.name
            for way, cap, assembly, tolerance in (*runs[turn % len(runs) :], *runs[: turn % len(runs)]):
                key = EpisodeKey(name, seed, way, cap)
                if key not in log.episodes:
                    if task not in robots:
                        robots[task] = assembler.robot(config.robot, task)
                    played = robots[task]
                    overheard.robot = None
                    if tolerance is not None:
                        played = overheard.robot = UsedUpRobot(played, tolerance, exact.domain, unit)
                    log.add(key, _episode(assembly, played, seed, plan.max_steps))
                progress.step(f"{name} seed {seed} {way} {cap:g}")
    finally:
        for robot in robots.values():
            robot.close()
    overheard.robot = None


def closed_loop_rows(
    episodes: dict[EpisodeKey, dict[str, Any]], plan: TolerancePlan, tasks: Sequence[str | None], robot: str
) -> tuple[ClosedLoopRow, ...]:
    """Exact first, then way by way, caps ascending; each over the plan's episodes that are known both ways."""
    names = [task or robot for task in tasks]
    rows = []
    for way, cap in [(EXACT, 0.0), *itertools.product(plan.ways, plan.caps)]:
        own, reference = [], []
        for name, seed in itertools.product(names, plan.seeds):
            one, other = (episodes.get(EpisodeKey(name, seed, w, c)) for w, c in ((way, cap), (EXACT, 0.0)))
            if one is not None and other is not None:
                own.append(one)
                reference.append(other)
        pairs = Pairs.of([bool(e["success"]) for e in own], [bool(e["success"]) for e in reference])
        successes = pairs.both + pairs.only_new
        by_task = {
            name: (sum(bool(e["success"]) for e in own if e["task"] == name), sum(e["task"] == name for e in own))
            for name in names
        }
        times = [e["chunk_ms_p50"] for e in own if e["chunk_ms_p50"] is not None]
        bound = None if way == EXACT else lower_bound(pairs, plan.confidence)
        rows.append(
            ClosedLoopRow(
                way=way, cap=cap, episodes=len(own), successes=successes,
                success_ci95=wilson_interval(successes, len(own)), by_task=by_task,
                difference=None if way == EXACT else pairs.difference, lower_bound=bound,
                is_not_worse=None if way == EXACT else is_not_worse(pairs, plan.margin, plan.confidence),
                steps_mean=float(np.mean([e["num_steps"] for e in own])) if own else 0.0,
                chunk_ms_p50=float(np.median(times)) if times else None,
            )
        )  # fmt: skip
    return tuple(rows)


def _episode(assembly: Assembly, robot: EpisodicRobot, seed: int, max_steps: int) -> dict[str, Any]:
    options = replace(assembly.runtime, mode=Mode.LOCK_STEP, budget_ns=None, max_steps=max_steps)
    result = run_episode(robot, assembly.policy, assembly.clock, options, seed)
    times = [plan.plan_ns / NS_PER_MS for plan in result.plans]
    rounds = [measured for plan in result.plans for measured in plan.rounds]
    return {
        "success": bool(result.success),
        "num_steps": result.num_steps,
        "num_plans": len(result.plans),
        "num_forwards": len(rounds),
        "num_relaxed": sum(measured.num_relaxed for measured in rounds),
        "chunk_ms_p50": round(float(np.median(times)), 3) if times else None,
    }


def _with_rule(config: Config, rule: Choice) -> Config:
    return replace(config, rule=rule)


def _settings(exact: Assembly, config: Config, max_steps: int) -> dict[str, Any]:
    """What must be equal for two episodes to be comparable, as JSON would give it back."""
    tree = as_tree(config)
    kept = {key: tree[key] for key in ("drafter", "rule", "controller", "robot", "engine", "seed")}
    runtime = {key: tree["runtime"][key] for key in ("execute_horizon", "hand_over")}
    settings = {
        "kind": "episodes of a tolerance sweep",
        "model_hash": exact.engine.info.model_hash,
        "max_steps": max_steps,
        **kept,
        "runtime": runtime,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _plain(row: OpenLoopRow | ClosedLoopRow) -> dict[str, Any]:
    """Plain values, numbers to six significant digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, tuple | list):
            return [rounded(item) for item in value]
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return value

    return {name: rounded(getattr(row, name)) for name in row.__dataclass_fields__}
