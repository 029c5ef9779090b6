"""`vla-spec bench`: drafters and rules side by side on recorded observations."""

from __future__ import annotations

from typing import Annotated

import typer

from vla_spec.commands._options import (
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
    finish,
    override_tree,
    resolve_modes,
    split,
    with_sets,
    writable,
)


def command(
    context: typer.Context,
    modes: Modes = "",
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
    observations: Annotated[int, typer.Option(min=1, help="Recorded observations that every mode decodes.")] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each observation is decoded.")] = 2,
    closed_loop: Annotated[
        str,
        typer.Option(help="Modes that also run in closed loop; auto = the fastest exact and inexact one; or none."),
    ] = "auto",
    report: Report = True,
) -> None:
    """Every drafter with every rule on the same recorded observations and engine, autoregression included."""
    from vla_spec.benchmark import BenchPlan, benchmark, grid
    from vla_spec.progress import LiveProgress

    overrides = override_tree(model, engine, robot, threads, deadline_ms, execute_horizon, None)
    configs = resolve_modes(modes, config, overrides, set_) if modes or config else grid(with_sets(overrides, set_))
    plan = BenchPlan(
        configs=configs, tasks=split(tasks), seeds=range(seed_start, seed_start + episodes),
        num_observations=observations, num_repeats=repeats,
        closed_loop=() if closed_loop == "none" else split(closed_loop) or (),
    )  # fmt: skip
    with writable(out, "bench") as folder, LiveProgress() as progress:
        results = benchmark(plan, progress)
    finish(results, folder, report, context.obj)
