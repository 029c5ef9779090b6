"""Everything goes wrong at once, on a virtual clock: does the arm always get an answer, and is the answer what it says?

The real decoder, policy, ladder, planner, actor and chunk buffer run with an engine, a drafter and a robot that fail as
`vla_spec/faults/` says. `vla_spec/invariants.py` checks each control step and each plan from outside. All modes meet
the same weather, and an oracle says in hindsight what could have been verified in time. Repeats bit for bit from a
seed. docs/stress.md says what the numbers mean.
"""

from __future__ import annotations

import datetime
import traceback
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import yaml

from vla_spec import __version__, config, plugins
from vla_spec.assemble import Assembler, Assembly
from vla_spec.chunks import HandOver
from vla_spec.clock import NS_PER_S, VirtualClock
from vla_spec.config import Config
from vla_spec.costs import Costs
from vla_spec.drafters import toy as toy_drafter
from vla_spec.drafters.toy import ToyDrafter
from vla_spec.engines.toy import ToyEngine
from vla_spec.errors import BadConfig, UnknownOption
from vla_spec.evaluation import first_observation, task_names
from vla_spec.guard import GuardedDrafter
from vla_spec.injection import Call, CallKind, Fault, FaultyRobot, Injector, Weather
from vla_spec.interfaces import ChunkHistory
from vla_spec.invariants import INVARIANTS, Checker, is_decodable
from vla_spec.metrics import MODEL_DRAFTERS
from vla_spec.oracle import best_tokens
from vla_spec.progress import Reporter
from vla_spec.results import FORMAT, RUNS_DIR, environment, percentiles, point_latest_to, wilson_interval, write_text
from vla_spec.runtime import Actor, EpisodicRobot, Planner, make_actor
from vla_spec.trace import PlanRecord, write_json
from vla_spec.types import Int32, Observation, Plan

NS_PER_MS = 1e6
#: What calls of the shipped policy take on the two-core machine of docs/stress.md, medians [ms]: the shape of the
#: undisturbed machine where no cost table is given.
PREFILL_MS = 7.5
STEP_MS = {1: 2.1, 8: 3.3, 16: 4.8, 32: 8.1}
DRAFT_MS = {1: 0.3, 31: 0.6}
#: Quantile -> share of the median: how much a call of the undisturbed machine varies. A stated shape, not a measured.
SPREAD = {0.0: 0.93, 0.1: 0.96, 0.5: 1.0, 0.9: 1.05, 0.99: 1.15, 0.999: 1.35, 1.0: 1.6}
#: Rounds behind the prefill in which an unforeseeable fault counts against a plan's feasibility.
FORESIGHT_ROUNDS = 8
#: A slow-down by more than this is a change of regime.
REGIME_CHANGE = 1.1
#: Progress is told this often. [control steps]
REPORT_EVERY = 1000

MEANING = {
    "ticks": "control steps of the actor",
    "plans": "planning ticks: observations that were answered",
    "deadline_miss_rate": "share of all plans that were ready after their deadline",
    "feasible_plans": "plans whose drawn latencies leave room for the prefill and one plain step, without a stall in "
    "their calls; observation and engine in order (docs/stress.md)",
    "late_feasible_rate": "share of feasible plans that were ready after their deadline",
    "late_feasible_ci95": "Wilson score interval of it",
    "complete_rate": "share of comparable plans whose whole chunk was verified before the deadline",
    "comparable_plans": "plans with observation, engine and drafter in order",
    "verified_tokens_per_chunk": "tokens verified in rounds that ended before the deadline, mean over comparable plans",
    "oracle_tokens_per_chunk": "most tokens that could have been verified by then, knowing each call's latency "
    "and every draft's acceptance, mean over the comparable plans that it was worked out for; autoregression is held "
    "against somebody who drafts as the other modes do (toy engine only)",
    "oracle_complete_rate": "share of these plans whose whole chunk the oracle verifies in time",
    "oracle_ratio": "verified tokens / the oracle's, over the same plans",
    "success_rate": "share of episodes of a robot with tasks; each is played to its end, so that ticks may be exceeded",
    "steps_to_success": "mean control steps of the episodes that were solved",
    "hold_rate": "share of control steps without a plan",
    "violations": "broken invariants; each is a fault of the runtime",
    "never_fired": "faults that were asked for and did not strike once: the check could not have failed",
}


@dataclass(frozen=True, slots=True)
class StressPlan:
    """What to run.

    Attributes:
        configs: one per mode, all with the same robot and engine; see `virtual`.
        faults: name -> options of the faults that are switched on.
        num_ticks: control steps of each mode; a few more with a robot that has tasks, whose episodes are played to
            their end.
        seed: of everything random: weather, faults, episodes.
        tasks: None = all that the robot offers.
        episode_ticks: control steps of an episode at most; robots with tasks also end theirs at success.
        oracle_every: the oracle is asked about every n-th comparable plan; 0 = never. Its work is most of the time.
        reaction_plans: a change of regime that is at most so many plans old makes a plan infeasible: the controller
            could not have noticed it. 1 = only the plan in which it happens; 0 = no such excuse.
        costs: of the undisturbed machine; None = `default_costs`, or the configuration's own table.
    """

    configs: tuple[Config, ...]
    faults: Mapping[str, Mapping[str, Any]]
    num_ticks: int
    seed: int = 0
    tasks: tuple[str, ...] | None = None
    episode_ticks: int = 500
    oracle_every: int = 1
    reaction_plans: int = 0
    costs: Costs | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_ticks", 1), ("episode_ticks", 1), ("oracle_every", 0), ("reaction_plans", 0)):
            if getattr(self, name) < least:
                raise BadConfig(f"stress: {name} is {getattr(self, name)}; valid: {least} or more")


@dataclass(frozen=True, slots=True)
class StressRow:
    """One decoding mode; see `MEANING`. None = nothing to divide by, or not worked out."""

    mode: str
    engine: str
    drafter: str
    rule: str
    controller: str
    deadline_ms: float
    period_ms: float
    ticks: int
    plans: int
    deadline_miss_rate: float | None
    feasible_plans: int
    late_feasible: int
    late_feasible_rate: float | None
    late_feasible_ci95: tuple[float, float] | None
    comparable_plans: int
    complete_rate: float | None
    verified_tokens_per_chunk: float | None
    oracle_tokens_per_chunk: float | None
    oracle_complete_rate: float | None
    oracle_ratio: float | None
    slack_ms_p50: float | None
    slack_ms_min: float | None
    hold_rate: float | None
    episodes: int
    success_rate: float | None
    success_ci95: tuple[float, float] | None
    steps_to_success: float | None
    violations: int
    never_fired: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Details:
    """Counters of one mode.

    Attributes:
        violations: by invariant.
        examples: the first violations in full.
        tokens_checked: tokens that were compared with the undisturbed engine.
        ties: of these, tokens that are not its choice by less than the rounding of forwards of different size.
        fired: how often each fault struck.
        late_feasible_by_fault: late feasible plans that a fault had struck, by fault; a plan may count several times.
        plan_rungs, reasons: plans; command_rungs: control steps.
        chunks: accepted, stale, out_of_order and shifted, as the chunk buffer counted them.
        slack_ms: percentiles 0, 1, ... 100 of the time left at the answer, all plans.
    """

    violations: dict[str, int]
    examples: tuple[dict[str, Any], ...]
    tokens_checked: int
    ties: int
    fired: dict[str, int]
    late_feasible_by_fault: dict[str, int]
    plan_rungs: dict[str, int]
    reasons: dict[str, int]
    command_rungs: dict[str, int]
    chunks: dict[str, int]
    slack_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StressResults:
    """One run; results.json but for command and time."""

    rows: tuple[StressRow, ...]
    details: dict[str, Details]
    faults: dict[str, dict[str, Any]]
    seed: int
    tasks: tuple[str, ...]
    model_hash: str
    configs: dict[str, dict[str, Any]]
    costs: dict[str, Any]
    notes: tuple[str, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    created: str = ""

    @property
    def num_violations(self) -> int:
        """Of all modes."""
        return sum(row.violations for row in self.rows)

    @property
    def never_fired(self) -> tuple[str, ...]:
        """``mode: fault`` for each fault that did not strike."""
        return tuple(f"{row.mode}: {name}" for row in self.rows for name in row.never_fired)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "vla_spec": __version__,
            "kind": "stress",
            **asdict(self),
            "invariants": INVARIANTS,
            "meaning": MEANING,
        }


class _Outcome(NamedTuple):
    """One plan, judged in hindsight. oracle: -1 = not worked out."""

    slack_ns: int
    is_feasible: bool
    is_comparable: bool
    is_complete: bool
    num_in_time: int
    oracle: int


def default_costs() -> Costs:
    """The undisturbed machine: the shipped policy's shape, with a stated spread."""

    def spread(ms: float) -> dict[float, float]:
        return {q: ms * NS_PER_MS * share for q, share in SPREAD.items()}

    return Costs(
        spread(PREFILL_MS),
        {n: spread(ms) for n, ms in STEP_MS.items()},
        {n: spread(ms) for n, ms in DRAFT_MS.items()},
    )


def virtual(mode: Config) -> Config:
    """A mode on the virtual clock; with the toy engine, drafters that need weights become the toy's own."""
    tree = config.as_tree(mode)
    tree["runtime"] = {**tree["runtime"], "clock": "virtual"}
    if mode.engine.name == "toy" and mode.drafter.name in MODEL_DRAFTERS:
        tree["drafter"] = "toy"
    return config.resolve(tree, mode.mode)


def fault_options(names: str, settings: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Faults to switch on, with all of their options.

    Args:
        names: comma-separated, or ``all``, or ``none``.
        settings: ``fault.option=value`` on top of the defaults; naming a fault switches it on.

    Raises:
        UnknownOption: a fault or option that does not exist.
        BadConfig: a value out of range.
    """
    known = plugins.names("fault")
    wanted = (
        known if names == "all" else [part.strip() for part in names.split(",") if part.strip() not in ("", "none")]
    )
    tree: dict[str, Any] = {name: {} for name in wanted}
    for setting in settings:
        tree = config.set_key(tree, setting)
    chosen: dict[str, dict[str, Any]] = {}
    for name, values in tree.items():
        if name not in known:
            raise UnknownOption("fault", name, known, "--faults")
        plugin = config.load_plugin("fault", name, "--faults")
        chosen[name] = config.as_options(config.build_options(plugin.options, values, name))
    return dict(sorted(chosen.items()))


def stress(plan: StressPlan, progress: Reporter) -> StressResults:
    """Run all modes.

    Raises:
        VlaSpecError: a part can't be built, or modes that don't belong together.
    """
    first = plan.configs[0]
    if any(mode.robot != first.robot or mode.engine != first.engine for mode in plan.configs):
        raise BadConfig("modes: all modes of one stress run need the same robot and the same engine")
    tasks = task_names(first.robot, plan.tasks)
    assembler = Assembler()
    example = first_observation(assembler, first.robot, tasks[0], plan.seed)
    progress.phase("stress", len(plan.configs) * -(-plan.num_ticks // REPORT_EVERY))
    rows, details, tables = [], {}, {}
    model_hash = ""
    for mode in plan.configs:
        stated = plan.costs or (default_costs() if mode.runtime.costs is None else None)
        assembly = assembler.assemble(mode, example, stated)
        run = _ModeRun(plan, assembly, assembler, tasks)
        run.play(progress)
        rows.append(run.row())
        details[mode.mode] = run.details()
        tables[mode.mode] = assembly.costs.as_json()
        model_hash = assembly.engine.info.model_hash
    return StressResults(
        rows=tuple(rows),
        details=details,
        faults={name: dict(values) for name, values in plan.faults.items()},
        seed=plan.seed,
        tasks=tuple(task or first.robot.name for task in tasks),
        model_hash=model_hash,
        configs={mode.mode: config.as_tree(mode) for mode in plan.configs},
        costs=tables,
        notes=_notes(plan),
        environment=environment(first.num_threads),
    )


def save(results: StressResults, folder: Path, command: str) -> StressResults:
    """Write results.json, costs.json and the resolved configurations, atomically; point ``latest`` beside it to it."""
    created = datetime.datetime.now().astimezone().isoformat("T", "seconds")
    stamped = replace(results, command=command, created=created)
    write_text(folder / "configs.yaml", yaml.safe_dump(stamped.configs, sort_keys=False))
    write_json(folder / "costs.json", stamped.costs)
    write_json(folder / "results.json", stamped.as_json())
    if folder.parent.name == RUNS_DIR.name:
        point_latest_to(folder)
    return stamped


@final
class _ModeRun:
    """One mode from the first control step to the last."""

    def __init__(self, plan: StressPlan, assembly: Assembly, assembler: Assembler, tasks: Sequence[str | None]) -> None:
        assert isinstance(assembly.clock, VirtualClock), f"{assembly.config.runtime.clock=}; see `virtual`"
        self._plan, self._assembly, self._assembler, self._tasks = plan, assembly, assembler, tasks
        self._clock, self._policy = assembly.clock, assembly.policy
        parts = plugins.Parts(assembly.domain, assembly.adapter.tokenizer, seed=plan.seed)
        self._faults: dict[str, Fault] = {}
        for name, values in plan.faults.items():
            plugin = config.load_plugin("fault", name)
            self._faults[name] = plugin.build(config.build_options(plugin.options, values, name), parts)
        weather = Weather(assembly.costs, list(self._faults.values()), plan.seed, assembly.engine.max_step)
        self._injector = Injector(self._faults, weather, self._clock)
        self._policy.adapter = assembly.adapter  # encoding is no call that faults know of: it takes no time here
        decoder = self._policy.decoder
        decoder.engine = self._injector.wrap_engine(assembly.engine)
        self._policy.guard = GuardedDrafter(self._injector.wrap_drafter(assembly.drafter), assembly.domain.vocab_size)
        decoder.drafter = self._policy.guard
        self._checker = Checker(self._policy, assembly.engine, assembly.config.rule, self._clock.now_ns)
        # What autoregression is measured by: somebody who drafts as the other modes do.
        self._stand_in: ToyDrafter | None = None
        if assembly.config.drafter.name == "none" and isinstance(assembly.engine, ToyEngine):
            toy_parts = replace(parts, target=assembly.engine, seed=assembly.config.seed)
            self._stand_in = toy_drafter.build(toy_drafter.Options(), toy_parts)
        self._outcomes: list[_Outcome] = []
        self._slowdowns: deque[float] = deque(maxlen=max(1, plan.reaction_plans))
        self._reasons: Counter[str] = Counter()
        self._plan_rungs: Counter[str] = Counter()
        self._command_rungs: Counter[str] = Counter()
        self._chunks: Counter[str] = Counter()
        self._late_by_fault: Counter[str] = Counter()
        self._names = {fault: name for name, fault in self._faults.items()}
        self._num_ticks = self._num_comparable = self._period_ns = 0
        self._num_episodes = self._num_scored = self._num_successes = self._num_solving_ticks = 0

    def play(self, progress: Reporter) -> None:
        """All control steps, task by task, episode by episode."""
        for i, task in enumerate(self._tasks):
            built = self._assembler.robot(self._assembly.config.robot, task)
            robot = FaultyRobot(built, self._injector, _sentences(built, task))
            until = self._plan.num_ticks * (i + 1) // len(self._tasks)
            try:
                while self._num_ticks < until:
                    self._episode(robot, until, task is not None, progress)
            finally:
                robot.close()

    def _episode(self, robot: FaultyRobot, until: int, is_scored: bool, progress: Reporter) -> None:
        """Same steps as `runtime.run_episode` in virtual time, with a look over their shoulder at each."""
        plan, clock, policy, runtime = self._plan, self._clock, self._policy, self._assembly.runtime
        period_ns = self._period_ns = round(robot.dt_s * NS_PER_S)
        planner = Planner(policy)
        per_step = self._assembly.domain.tokens_per_step
        actor = make_actor(robot, planner, policy.space, per_step, policy.horizon, clock, runtime)
        buffer = actor.buffer
        start_ns = clock.now_ns()
        actor.reset(plan.seed + self._num_episodes, start_ns)
        checker = self._checker
        checker.begin_episode(actor)
        is_over = False
        while not is_over:
            now_ns = start_ns + actor.step * period_ns
            is_sound = self._tick(robot, actor, planner, now_ns)
            self._num_ticks += 1
            if self._num_ticks % REPORT_EVERY == 0:
                progress.step(f"{self._assembly.config.mode}: {sum(checker.counts.values())} violations")
            is_solved = is_scored and robot.is_success
            # A scored episode is played to its end, or failures would be cut off more often than successes.
            is_out_of_ticks = self._num_ticks >= until and not is_scored
            is_over = not is_sound or is_solved or is_out_of_ticks or actor.step >= plan.episode_ticks
        checker.end_episode()
        clock.sleep_until_ns(start_ns + actor.step * period_ns)
        self._num_episodes += 1
        if is_scored:
            self._num_scored += 1
            self._num_successes += is_solved
            self._num_solving_ticks += actor.step if is_solved else 0
        self._command_rungs.update({rung.name: count for rung, count in buffer.rung_counts.items()})
        for name in ("accepted", "stale", "out_of_order", "shifted"):
            self._chunks[name] += getattr(buffer, f"num_{name}")

    def _tick(self, robot: FaultyRobot, actor: Actor, planner: Planner, now_ns: int) -> bool:
        """One control step. False: something was raised, and the episode can't go on."""
        checker = self._checker
        checker.begin_tick(self._num_ticks)
        robot.order(self._num_ticks)
        where = "looking"
        try:
            has_looked = actor.look(now_ns)
            checker.received()
            if has_looked:
                where = "planning"
                self._clock.sleep_until_ns(now_ns)
                chunk = planner.tick(now_ns)
                checker.asked(chunk)
                if chunk is not None and robot.given is not None:
                    record = planner.records[-1]
                    checker.planned(robot.given, chunk, record, self._injector.charged_ns)
                    self._judge(actor, robot.given, record)
            where = "acting"
            command = actor.tick(now_ns)
            checker.received()
        except Exception as error:
            checker.failed(f"{where} ({_place(error)})", error)
            return False
        assert robot.instruction is not None
        checker.played(now_ns, command, actor.last_action, robot.instruction, robot.ordered_at)
        return True

    def _judge(self, actor: Actor, given: Observation, record: PlanRecord) -> None:
        """Feasibility and the oracle, in hindsight."""
        injector, weather, k = self._injector, self._injector.weather, self._injector.plan
        self._reasons[record.reason.name] += 1
        self._plan_rungs[record.rung.name] += 1
        slowdown = weather.slowdown(k)
        before = min(self._slowdowns, default=slowdown)
        self._slowdowns.append(slowdown)
        budget_ns = record.deadline_ns - record.start_ns
        least_ns = weather.call_ns(Call(k, 0, CallKind.PREFILL, 0), slowdown)
        least_ns += weather.call_ns(Call(k, 1, CallKind.STEP, 1), slowdown)
        is_feasible = (
            is_decodable(record)
            and least_ns <= budget_ns
            and not weather.is_struck_unforeseeably(k, FORESIGHT_ROUNDS)
            and (self._plan.reaction_plans == 0 or slowdown <= REGIME_CHANGE * before)
        )
        num_tokens = self._assembly.domain.num_tokens
        in_time = min(_verified_in_time(record), num_tokens)
        is_comparable = is_decodable(record) and not any(fault.needs_drafter for fault in injector.struck)
        is_complete = in_time == num_tokens
        best = -1
        if is_comparable:
            every = self._plan.oracle_every
            if every and self._num_comparable % every == 0 and self._has_oracle:
                history = actor.buffer.history(record.observation_step, given.instruction)
                best = num_tokens if is_complete else self._oracle(given, history, slowdown, budget_ns)
            self._num_comparable += 1
        if is_feasible and record.slack_ns < 0:
            self._late_by_fault.update(self._names[fault] for fault in injector.struck)
        self._outcomes.append(_Outcome(record.slack_ns, is_feasible, is_comparable, is_complete, in_time, best))

    def _oracle(self, given: Observation, history: ChunkHistory | None, slowdown: float, budget_ns: int) -> int:
        """Most tokens that could have been verified."""
        accepted = self._accepted(given, history)
        weather, k = self._injector.weather, self._injector.plan
        num_tokens, max_step = self._assembly.domain.num_tokens, self._assembly.engine.max_step
        prefill_ns = weather.call_ns(Call(k, 0, CallKind.PREFILL, 0), slowdown)

        def step_ns(index: int, size: int) -> int:
            return weather.call_ns(Call(k, index + 1, CallKind.STEP, size), slowdown)

        def draft_ns(index: int, gamma: int) -> int:
            return weather.call_ns(Call(k, index + 1, CallKind.DRAFT, gamma), slowdown)

        # Whoever always drafts just what will be accepted is done in time nearly always; only else search for better.
        m, ns, index = 1, prefill_ns, 0
        while m < num_tokens and ns <= budget_ns:
            gamma = min(int(accepted[m]), num_tokens - m - 1, max_step - 1)
            ns += step_ns(index, gamma + 1) + (draft_ns(index, gamma) if gamma else 0)
            m, index = m + gamma + 1, index + 1
        if m >= num_tokens and ns <= budget_ns:
            return num_tokens
        return best_tokens(prefill_ns, step_ns, draft_ns, accepted, budget_ns, num_tokens, max_step)

    @property
    def _has_oracle(self) -> bool:
        """The verdict depends on the position alone, no token is given beforehand, and somebody drafts."""
        if self._assembly.config.drafter.name == "none" and self._stand_in is None:
            return False
        is_forced = self._assembly.runtime.chunks.hand_over is HandOver.FROZEN_PREFIX
        return self._assembly.config.rule.name == "greedy" and not is_forced

    def _accepted(self, given: Observation, history: ChunkHistory | None) -> np.ndarray[Any, np.dtype[np.int64]]:
        """What is accepted of a long draft at each position; int64 [T]."""
        assembly = self._assembly
        if isinstance(assembly.drafter, ToyDrafter):
            return assembly.drafter.accepted()
        if self._stand_in is not None:
            return self._stand_in.accepted(self._num_comparable)
        return _accepted_by_trial(assembly, given, history)

    def row(self) -> StressRow:
        """The row of this mode."""
        assembly, outcomes, counts = self._assembly, self._outcomes, self._checker.counts
        feasible = [o for o in outcomes if o.is_feasible]
        comparable = [o for o in outcomes if o.is_comparable]
        judged = [o for o in comparable if o.oracle >= 0]
        late = sum(o.slack_ns < 0 for o in feasible)
        of_oracle = sum(o.oracle for o in judged)
        slack_ms = np.array([o.slack_ns for o in outcomes]) / NS_PER_MS
        mode = assembly.config
        held = self._command_rungs["HOLD"] + self._command_rungs["STOP"]
        played = sum(self._command_rungs.values())
        scored = self._num_scored
        return StressRow(
            mode=mode.mode,
            engine=mode.engine.name,
            drafter=mode.drafter.name,
            rule=mode.rule.name,
            controller=mode.controller.name,
            deadline_ms=mode.runtime.deadline_ms,
            period_ms=self._period_ns / NS_PER_MS,
            ticks=self._num_ticks,
            plans=len(outcomes),
            deadline_miss_rate=_ratio(sum(o.slack_ns < 0 for o in outcomes), len(outcomes)),
            feasible_plans=len(feasible),
            late_feasible=late,
            late_feasible_rate=_ratio(late, len(feasible)),
            late_feasible_ci95=wilson_interval(late, len(feasible)),
            comparable_plans=len(comparable),
            complete_rate=_ratio(sum(o.is_complete for o in comparable), len(comparable)),
            verified_tokens_per_chunk=_ratio(sum(o.num_in_time for o in comparable), len(comparable)),
            oracle_tokens_per_chunk=_ratio(of_oracle, len(judged)),
            oracle_complete_rate=_ratio(sum(o.oracle == assembly.domain.num_tokens for o in judged), len(judged)),
            oracle_ratio=_ratio(sum(o.num_in_time for o in judged), of_oracle),
            slack_ms_p50=round(float(np.median(slack_ms)), 4) if len(slack_ms) else None,
            slack_ms_min=round(float(slack_ms.min()), 4) if len(slack_ms) else None,
            hold_rate=_ratio(held, played),
            episodes=self._num_episodes,
            success_rate=_ratio(self._num_successes, scored),
            success_ci95=wilson_interval(self._num_successes, scored),
            steps_to_success=_ratio(self._num_solving_ticks, self._num_successes),
            violations=sum(counts.values()),
            never_fired=tuple(name for name, fault in self._faults.items() if self._should_have_fired(fault)),
        )

    def _should_have_fired(self, fault: Fault) -> bool:
        is_possible = not (fault.needs_drafter and self._assembly.config.drafter.name == "none")
        return is_possible and fault.fired == 0

    def details(self) -> Details:
        """The counters of this mode."""
        checker = self._checker
        slack_ms = [o.slack_ns / NS_PER_MS for o in self._outcomes]
        return Details(
            violations=dict(checker.counts),
            examples=tuple(violation._asdict() for violation in checker.examples),
            tokens_checked=checker.num_tokens_checked,
            ties=checker.num_ties,
            fired={name: fault.fired for name, fault in self._faults.items()},
            late_feasible_by_fault=dict(sorted(self._late_by_fault.items())),
            plan_rungs=dict(sorted(self._plan_rungs.items())),
            reasons=dict(sorted(self._reasons.items())),
            command_rungs={name: count for name, count in self._command_rungs.items() if count},
            chunks=dict(self._chunks),
            slack_ms=percentiles(slack_ms),
        )


def _verified_in_time(record: PlanRecord) -> int:
    """Tokens of the rounds that ended before the deadline."""
    num_tokens = 0
    for measured in record.rounds:
        if measured.start_ns + measured.total_ns > record.deadline_ns:
            break
        num_tokens += measured.num_accepted + 1
    return num_tokens


def _accepted_by_trial(
    assembly: Assembly, given: Observation, history: ChunkHistory | None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Decode the chunk plainly and ask the undisturbed drafter at every position; int64 [T]."""
    engine, drafter, num_tokens = assembly.engine, assembly.drafter, assembly.domain.num_tokens
    inputs = assembly.adapter.encode(given)
    drafter.begin(inputs, history)
    scores = engine.prefill(inputs)
    tokens: list[int] = []
    drafts: list[Int32] = []
    longest = engine.max_step - 1
    for m in range(1, num_tokens + 1):
        tokens.append(int(scores.logits[-1].argmax()))
        limit = min(longest, num_tokens - m)
        prefix = np.array(tokens, np.int32)
        draft = drafter.propose(prefix, Plan(limit, limit), engine.features) if limit else None
        drafts.append(np.empty(0, np.int32) if draft is None else draft.tokens.copy())
        scores = engine.step(prefix[-1:], np.full(1, -1, np.int32))
        engine.commit(np.zeros(1, np.int32))
    chunk = np.array(tokens, np.int32)
    accepted = np.zeros(num_tokens, np.int64)
    for m, drafted in enumerate(drafts, 1):
        if m < num_tokens:
            same = drafted == chunk[m : m + len(drafted)]
            accepted[m] = len(same) if same.all() else int(same.argmin())
    return accepted


def _sentences(robot: EpisodicRobot, task: str | None) -> tuple[str, ...]:
    """Orders that mean the robot's task, its own first."""
    own = str(getattr(robot, "instruction", ""))
    from vla_spec.robots._metaworld_tasks import TASKS

    if task not in TASKS:  # a robot that has no other words for it
        words = own.split()
        return own, " ".join(reversed(words)), " ".join(words[1:] + words[:1])
    return own, *(sentence for sentence in TASKS[task].phrasings if sentence != own)


def _place(error: BaseException) -> str:
    """File and line at which something was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _notes(plan: StressPlan) -> tuple[str, ...]:
    notes = ["clock virtual: every latency is injected, none is measured; the same seed repeats all figures"]
    if any(mode.engine.name == "toy" for mode in plan.configs):
        notes.append("engine toy: drafters that need weights are replaced by the toy's own, which errs by seeded dice")
    return tuple(notes)
