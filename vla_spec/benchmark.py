"""Every drafter with every rule on the same recorded observations and engine, autoregression included, interleaved.

Observations are recorded from closed-loop episodes. Each is decoded together with the chunk that autoregression had
planned at the observation before, so that drafters which start from the previous chunk get exactly what they would
have had on the robot, and all modes get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vla_spec import plugins
from vla_spec.assemble import Assembler, Assembly
from vla_spec.comparison import Comparison, compare, make_samples
from vla_spec.config import Config, as_tree, merge, mode_names, read_mode, resolve
from vla_spec.errors import BadConfig, BadModel, MissingDependency
from vla_spec.evaluation import (
    Plan,
    baseline_of,
    evaluate_assembled,
    figures_of,
    first_observation,
    make_row,
    record,
    series_of,
    task_names,
)
from vla_spec.progress import Reporter
from vla_spec.results import Results, Row, environment
from vla_spec.types import Observation

#: Value of ``closed_loop`` that picks the best exact and the best relaxed mode.
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to compare.

    Attributes:
        configs: one per mode; the baseline is added if it is not among them.
        tasks: None = all that the robot offers.
        seeds: of the episodes that observations are recorded in, and of the closed loop.
        num_observations: recorded observations that every mode decodes, spread evenly over the episodes.
        num_repeats: times that each is decoded.
        closed_loop: modes that also run in closed loop; `AUTO` = autoregression, the fastest exact and the fastest
            inexact one.
        max_steps: control steps of an episode.
    """

    configs: tuple[Config, ...]
    tasks: tuple[str, ...] | None
    seeds: range
    num_observations: int = 60
    num_repeats: int = 2
    closed_loop: tuple[str, ...] = (AUTO,)
    max_steps: int = 200


def grid(base: dict[str, Any]) -> tuple[Config, ...]:
    """Every drafter with every rule, sized as the shipped modes size that drafter; plain decoding with the exact rule.

    Args:
        base: lies on top of every mode (engine, model, runtime ...).

    Returns:
        Resolved configurations named ``drafter+rule``, autoregression first.
    """
    sized: dict[str, dict[str, Any]] = {}
    for name in mode_names():
        tree = read_mode(name)[1]
        drafter = tree.get("drafter", "none")
        drafter_name = drafter["name"] if isinstance(drafter, dict) else drafter
        if tree.get("rule") == "greedy" and tree.get("controller", {}).get("name") == "fixed":
            sized.setdefault(drafter_name, tree)
    configs = [resolve(merge(read_mode("autoregressive")[1], base), "autoregressive")]
    for drafter_name in plugins.names("drafter"):
        if drafter_name in ("none", "toy"):  # plain decoding is in already; the toy's own draws by dice
            continue
        tree = sized.get(drafter_name, {"drafter": drafter_name, "controller": {"name": "fixed"}})
        for rule in plugins.names("rule"):
            mode = merge({**tree, "rule": rule, "description": "", "source": ""}, base)
            configs.append(resolve(mode, f"{drafter_name}+{rule}"))
    return tuple(configs)


def benchmark(plan: BenchPlan, progress: Reporter) -> Results:
    """Record, compare, then run the interesting modes in closed loop.

    Modes whose parts can't be built (a drafter without weights, say) are left out and named in the notes; the baseline
    must be there.

    Raises:
        VlaSpecError: nothing can be compared.
    """
    baseline = baseline_of(plan.configs)
    configs = plan.configs if baseline in plan.configs else (baseline, *plan.configs)
    tasks = task_names(baseline.robot, plan.tasks)
    assembler = Assembler()
    example = first_observation(assembler, baseline.robot, tasks[0], plan.seeds[0])
    assemblies, notes = _assemble_all(assembler, configs, baseline, example, progress)
    reference = next(a for a in assemblies if a.config.mode == baseline.mode)
    recordings = record(assembler, reference, tasks, plan.seeds, plan.max_steps, plan.num_observations, progress)
    samples = make_samples(reference, recordings, plan.num_observations)
    compared = compare(assemblies, reference, samples, plan.num_repeats, progress)
    rows = {a.config.mode: _bench_row(a, compared[a.config.mode], compared[baseline.mode]) for a in assemblies}

    chosen = _closed_loop_modes(plan.closed_loop, rows, baseline.mode)
    scores: tuple[Any, ...] = ()
    episodes: tuple[dict[str, Any], ...] = ()
    if chosen:
        looped = [a for a in assemblies if a.config.mode in chosen]
        loop_plan = Plan(tuple(a.config for a in looped), plan.tasks, plan.seeds, plan.max_steps, 0, 0)
        loop = evaluate_assembled(assembler, looped, loop_plan, tasks, progress)
        scores, episodes = loop.scores, loop.episodes
        for row in loop.rows:
            rows[row.mode] = replace(
                rows[row.mode], episodes=row.episodes, success_rate=row.success_rate, success_ci95=row.success_ci95,
                hold_rate=row.hold_rate,
            )  # fmt: skip
    return Results(
        kind="bench",
        rows=tuple(rows.values()),
        seeds=tuple(plan.seeds),
        tasks=tuple(task or baseline.robot.name for task in tasks),
        model_hash=reference.engine.info.model_hash,
        series={a.config.mode: series_of(figures_of(a, compared[a.config.mode].plans)) for a in assemblies},
        scores=scores,
        episodes=episodes,
        configs={a.config.mode: as_tree(a.config) for a in assemblies},
        costs={a.config.mode: a.costs.as_json() for a in assemblies},
        notes=(
            f"{len(samples)} recorded observations, each decoded {plan.num_repeats} times by every mode in turn; "
            f"latencies, agreement and deviation are over these",
            *notes,
        ),
        environment=environment(baseline.num_threads),
    )


def _assemble_all(
    assembler: Assembler, configs: Sequence[Config], baseline: Config, example: Observation, progress: Reporter
) -> tuple[list[Assembly], list[str]]:
    progress.phase("building modes", len(configs))
    assemblies: list[Assembly] = []
    left_out: dict[str, list[str]] = {}
    for config in configs:
        try:
            assemblies.append(assembler.assemble(config, example))
        except (BadModel, MissingDependency, BadConfig) as error:
            if config is baseline:
                raise
            left_out.setdefault(str(error), []).append(config.mode)
        progress.step(config.mode)
    return assemblies, [f"left out: {', '.join(modes)}: {why}" for why, modes in left_out.items()]


def _bench_row(assembly: Assembly, own: Comparison, base: Comparison) -> Row:
    return make_row(
        assembly,
        figures_of(assembly, own.plans),
        figures_of(assembly, base.plans),
        own,
        num_episodes=0,
        num_successes=0,
        hold_rate=None,
    )  # fmt: skip


def _closed_loop_modes(wanted: tuple[str, ...], rows: dict[str, Row], baseline: str) -> set[str]:
    chosen = set(wanted) - {AUTO}
    unknown = sorted(chosen - set(rows))
    if unknown:
        raise BadConfig(f"--closed-loop: no mode named {unknown[0]!r} in this run; have {', '.join(sorted(rows))}")
    if AUTO in wanted:
        chosen.add(baseline)
        for is_exact in (True, False):
            fast = [r for r in rows.values() if r.is_exact is is_exact and r.mode != baseline and r.speedup_decode]
            if fast:
                chosen.add(max(fast, key=lambda r: r.speedup_decode or 0.0).mode)
    return chosen
