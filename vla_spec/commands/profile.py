"""`vla-spec profile`: where the time of a plan goes, how it is spread, and whether that is good enough."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vla_spec.commands._options import (
    DEFAULT_MODES,
    FIRST_HELD_OUT_SEED,
    ConfigFile,
    Deadline,
    Engine,
    Episodes,
    Horizon,
    ModelDir,
    Modes,
    Out,
    Report,
    Robot,
    SeedStart,
    Set,
    Tasks,
    Threads,
    override_tree,
    resolve_modes,
    split,
    writable,
)
from vla_spec.errors import BadConfig

if TYPE_CHECKING:
    from vla_spec.profiling.comparison import ProfileComparison
    from vla_spec.profiling.constraints import Check, Constraint
    from vla_spec.profiling.profile import Profile

DEFAULT_PLANS = 200
BOTH = "idle,busy"


def command(
    context: typer.Context,
    modes: Modes = DEFAULT_MODES,
    tasks: Tasks = None,
    episodes: Episodes = 1,
    seed_start: SeedStart = FIRST_HELD_OUT_SEED,
    out: Out = None,
    model: ModelDir = None,
    engine: Engine = None,
    robot: Robot = None,
    threads: Threads = None,
    deadline_ms: Deadline = None,
    execute_horizon: Horizon = None,
    config: ConfigFile = None,
    set_: Set = None,
    plans: Annotated[
        int | None, typer.Option(min=1, help=f"Plans of each mode under each load. Default: {DEFAULT_PLANS}.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Instead of --plans: time for all modes together under each load. [s]")
    ] = None,
    load: Annotated[
        str, typer.Option(help="What else runs: idle, busy, memory, several with commas, or both = idle,busy.")
    ] = "idle",
    load_processes: Annotated[int, typer.Option(min=1, help="Processes that load the machine, where it is.")] = 1,
    late: Annotated[
        str,
        typer.Option(help="count: decode whole chunks and count the late ones; cut: give every plan its deadline."),
    ] = "count",
    observations: Annotated[int, typer.Option(min=1, help="Recorded observations, planned over and over.")] = 40,
    cold_plans: Annotated[int, typer.Option(min=0, help="First plans of a new session; 0 = no cold start.")] = 5,
    tracing_pairs: Annotated[
        int, typer.Option(min=0, help="Plans with and without the trace, to see what tracing costs; 0 = not measured.")
    ] = 40,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="Also play the closed loop in real time: jitter, slack, hand-over.")
    ] = False,
    realtime: Annotated[
        bool,
        typer.Option(
            "--realtime",
            help="Like --real-time, and asks for scheduler, cores, locked memory, quiet garbage collection and a "
            "process for the actor; in detail with --set runtime.realtime.fifo_priority=50 and so on.",
        ),
    ] = False,
    max_steps: Annotated[int, typer.Option(min=1, help="Control steps of an episode.")] = 200,
    slowest: Annotated[
        int, typer.Option(min=1, help="Slowest plans of each mode and load in slowest.trace.json.")
    ] = 10,
    constraints: Annotated[
        Path | None, typer.Option(help="Limits such as chunk_p99_ms <= 80; exit code 3 if one is violated.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="profile.json of an earlier run; exit code 4 if this one is slower.")
    ] = None,
    regression_percent: Annotated[
        float, typer.Option(min=0, help="Smaller changes are no regression, however certain. [%]")
    ] = 10.0,
    from_: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Judge this profile.json instead of measuring; several are merged into one."),
    ] = None,
    report: Report = True,
) -> None:
    """Latency of plans by stage and percentile: cold, warm and loaded; limits and comparisons with exit codes.

    Writes profile.json, profile.html, slowest.trace.json (for ui.perfetto.dev) and results.json. Exit codes beyond
    the usual: 3 = a constraint is violated, 4 = slower than the profile that --compare names.
    """
    from vla_spec.profiling import constraints as limits
    from vla_spec.profiling import profile as profiles

    wanted = limits.read(constraints) if constraints is not None else ()
    old = profiles.read(compare, "--compare") if compare is not None else None
    if from_:
        _judge(context, from_, wanted, old, regression_percent, out, report)
        return
    if plans is not None and seconds is not None:
        raise BadConfig("--plans and --seconds: give one of them, not both")

    from vla_spec.profiling.planning import Amount
    from vla_spec.profiling.profiler import ProfilePlan

    overrides = override_tree(model, engine, robot, threads, deadline_ms, execute_horizon, True if realtime else None)
    if realtime:
        overrides["runtime"]["realtime"] = {}
    real_time = real_time or realtime
    amount = Amount(None, seconds) if seconds is not None else Amount(plans or DEFAULT_PLANS)
    plan = ProfilePlan(
        configs=resolve_modes(modes, config, overrides, set_),
        tasks=split(tasks),
        seeds=range(seed_start, seed_start + episodes),
        amount=amount,
        loads=split(BOTH if load == "both" else load) or (),
        late=late,
        num_observations=observations,
        cold_plans=cold_plans,
        tracing_pairs=tracing_pairs,
        has_loop=real_time,
        max_steps=max_steps,
        load_processes=load_processes,
        num_slowest=slowest,
    )
    limits.check_measurable(
        wanted, [item.mode for item in plan.configs], plan.conditions, real_time, tracing_pairs > 0, amount.plans
    )
    if old is not None:
        _check_comparable(old, plan.late, [item.mode for item in plan.configs], plan.loads)

    from vla_spec.profiling.chrome_trace import chrome_trace
    from vla_spec.profiling.page import check_libraries
    from vla_spec.profiling.profiler import profile
    from vla_spec.progress import LiveProgress
    from vla_spec.results import save
    from vla_spec.trace import write_json

    if report:
        check_libraries()  # before the work, not after it
    with writable(out, "profile") as folder:
        with LiveProgress() as progress:
            profiled = profile(plan, progress)
        results = save(profiled.results, folder, shlex.join(["vla-spec", *context.obj]))
        made = profiles.stamped(profiled.profile, results.command, results.created)
        facts = {"command": results.command, "created": results.created, "machine": str(made.environment.get("cpu"))}
        write_json(folder / "slowest.trace.json", chrome_trace(profiled.groups, facts))
    _finish(made, wanted, old, regression_percent, folder, report, ("results.json", "slowest.trace.json"))


def _judge(
    context: typer.Context, paths: list[Path], wanted: tuple[Constraint, ...], old: Profile | None,
    regression_percent: float, out: Path | None, report: bool,
) -> None:  # fmt: skip
    """Check and compare profiles that exist; write only where the user says so."""
    from functools import reduce

    from vla_spec.profiling import constraints as limits
    from vla_spec.profiling import profile as profiles

    made = reduce(profiles.merge, (profiles.read(path, "--from") for path in paths))
    names = list(dict.fromkeys(name for mode in made.modes.values() for name in mode.conditions))
    has_loop = any(mode.loops for mode in made.modes.values())
    limits.check_measurable(wanted, list(made.modes), names, has_loop, True, None)
    if out is None:
        _finish(made, wanted, old, regression_percent, None, report, ())
        return
    with writable(out, "profile") as folder:
        made = profiles.stamped(made, shlex.join(["vla-spec", *context.obj]), made.created)
        _finish(made, wanted, old, regression_percent, folder, report, ())


def _finish(
    made: Profile, wanted: tuple[Constraint, ...], old: Profile | None, regression_percent: float,
    folder: Path | None, report: bool, written: tuple[str, ...],
) -> None:  # fmt: skip
    """Judge, write, print; then say by the exit code how it went."""
    from dataclasses import replace

    from rich.console import Console

    from vla_spec.profiling import comparison
    from vla_spec.profiling import constraints as limits
    from vla_spec.profiling import profile as profiles
    from vla_spec.profiling.page import write_page
    from vla_spec.profiling.tables import print_tables

    checks: tuple[Check, ...] = limits.check_all(wanted, made)
    compared: ProfileComparison | None = None
    if old is not None:
        compared = comparison.compare(old, made, regression_percent)
    if folder is not None:
        told = compared.as_json() if compared is not None else None
        made = replace(made, checks=tuple(check.as_json() for check in checks), comparison=told)
        profiles.save(made, folder / "profile.json")
        written = ("profile.json", *written)
        if report:
            written = (write_page(made, checks, compared, folder).name, *written)
    print_tables(made, checks, compared, Console())
    for name in written:
        typer.echo(folder / name if folder is not None else name)
    limits.raise_if_violated(checks)
    if compared is not None:
        comparison.raise_if_regressed(compared)


def _check_comparable(old: Profile, late: str, modes: list[str], loads: tuple[str, ...]) -> None:
    """Refuse, before anything is measured, an old profile that this run will have nothing in common with."""
    from vla_spec.profiling.comparison import check_same_treatment

    check_same_treatment(old, late)
    have = {(mode, load) for mode, own in old.modes.items() for load in own.conditions}
    if not have & {(mode, load) for mode in modes for load in loads}:
        names = ", ".join(sorted({f"{mode} ({load})" for mode, load in have if load != "cold"}))
        raise BadConfig(f"--compare: the old profile has none of these modes under these loads; it has {names}")
