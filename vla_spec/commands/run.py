"""`vla-spec run`: closed loop in the simulator."""

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
    RealTime,
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
    writable,
)


def command(
    context: typer.Context,
    modes: Modes = "",
    tasks: Tasks = None,
    episodes: Episodes = 2,
    seed_start: SeedStart = FIRST_HELD_OUT_SEED,
    out: Out = None,
    model: ModelDir = None,
    engine: Engine = None,
    robot: Robot = None,
    threads: Threads = None,
    deadline_ms: Deadline = None,
    execute_horizon: Horizon = None,
    real_time: RealTime = None,
    config: ConfigFile = None,
    set_: Set = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Control steps of an episode at most.")] = 200,
    pictures: Annotated[int, typer.Option(min=0, help="Episodes per mode that the report shows moving.")] = 3,
    report: Report = True,
) -> None:
    """Closed loop in the simulator: success, latency and deadline misses of each decoding mode, side by side."""
    overrides = override_tree(model, engine, robot, threads, deadline_ms, execute_horizon, real_time)
    configs = resolve_modes(modes, config, overrides, set_)

    from vla_spec.evaluation import Plan, evaluate
    from vla_spec.progress import LiveProgress

    plan = Plan(
        configs=configs, tasks=split(tasks), seeds=range(seed_start, seed_start + episodes), max_steps=max_steps,
        num_pictures=pictures if report else 0,
    )  # fmt: skip
    with writable(out, "run") as folder, LiveProgress() as progress:
        results = evaluate(plan, progress)
    finish(results, folder, report, context.obj)
