"""`vla-spec stress`: everything goes wrong at once, on a virtual clock."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from rich.console import Console

from vla_spec.commands._options import (
    ConfigFile,
    ModelDir,
    Out,
    Report,
    Set,
    Tasks,
    Threads,
    override_tree,
    resolve_modes,
    split,
    with_sets,
    writable,
)
from vla_spec.errors import BadConfig

#: Exit code of a run in which an invariant was broken, or a fault that was asked for did not strike.
EXIT_BROKEN = 1


def command(
    context: typer.Context,
    ticks: Annotated[int, typer.Option(min=1, help="Control steps of each mode.")] = 10_000,
    faults: Annotated[str, typer.Option(help="Faults, comma-separated; or all, or none.")] = "all",
    fault: Annotated[
        list[str] | None, typer.Option(help="FAULT.OPTION=VALUE, as in spikes.probability=0.01; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random; the same seed repeats the run exactly.")] = 0,
    out: Out = None,
    modes: Annotated[str, typer.Option(help="Decoding modes, comma-separated: shipped names or YAML files.")] = (
        "deadline,autoregressive"
    ),
    fixed: Annotated[
        str, typer.Option(help="Fixed draft lengths to compare with, comma-separated; each is a mode. Empty = none.")
    ] = "4,8,16",
    engine: Annotated[str, typer.Option(help="Engine plugin.")] = "toy",
    robot: Annotated[str, typer.Option(help="Robot plugin.")] = "toy",
    tasks: Tasks = None,
    deadline_ms: Annotated[float, typer.Option(help="Time from an observation until its chunk is due. [ms]")] = 60.0,
    period_ms: Annotated[
        float | None, typer.Option(help="Control period, for robots that let it be set; default: the robot's. [ms]")
    ] = None,
    episode_ticks: Annotated[int, typer.Option(min=1, help="Control steps of an episode at most.")] = 500,
    oracle_every: Annotated[int, typer.Option(min=0, help="Ask the oracle about every n-th plan; 0 = never.")] = 1,
    reaction_plans: Annotated[
        int, typer.Option(min=0, help="A change of regime in the last so many plans makes a plan infeasible.")
    ] = 0,
    model: ModelDir = None,
    threads: Threads = None,
    execute_horizon: Annotated[
        int, typer.Option(min=1, help="Control steps played before the next plan; a chunk has 8, a plan lasts 5.")
    ] = 3,
    config: ConfigFile = None,
    set_: Set = None,
    report: Report = True,
) -> None:
    """Faults and latencies on a virtual clock: is there always an answer, is it what it says, and is it in time?"""
    from vla_spec import stress
    from vla_spec.progress import LiveProgress
    from vla_spec.stress_report import print_stress, write_stress_report

    overrides = override_tree(model, engine, robot, threads, deadline_ms, execute_horizon, None)
    if period_ms is not None:
        overrides["robot"] = {"name": robot, "dt_s": period_ms / 1e3}
    configs = resolve_modes(modes, config, overrides, set_) if modes or config else ()
    configs = (*configs, *_fixed_modes(fixed, overrides, set_))
    plan = stress.StressPlan(
        configs=tuple(stress.virtual(mode) for mode in configs),
        faults=stress.fault_options(faults, fault or ()),
        num_ticks=ticks,
        seed=seed,
        tasks=split(tasks),
        episode_ticks=episode_ticks,
        oracle_every=oracle_every,
        reaction_plans=reaction_plans,
    )
    with writable(out, "stress") as folder, LiveProgress() as progress:
        results = stress.stress(plan, progress)
    results = stress.save(results, folder, shlex.join(["vla-spec", *context.obj]))
    print_stress(results, Console())
    if report:
        typer.echo(write_stress_report(results, folder))
    typer.echo(folder / "results.json")
    if results.num_violations:
        typer.secho(f"{results.num_violations} violations: {folder / 'results.json'} has them", fg="red", err=True)
    if results.never_fired:
        names = "; ".join(f"{row.mode}: {', '.join(row.never_fired)}" for row in results.rows if row.never_fired)
        typer.secho(
            f"never struck, so nothing was proved: {names} (more --ticks, or a higher --fault)", fg="red", err=True
        )
    if results.num_violations or results.never_fired:
        raise typer.Exit(EXIT_BROKEN)


def _fixed_modes(lengths: str, overrides: dict[str, Any], sets: list[str] | None) -> list[Any]:
    """One mode per fixed draft length, with the drafter of the mode ``deadline``."""
    from vla_spec.config import merge, read_mode, resolve

    configs = []
    for text in split(lengths) or ():
        if not text.isdigit():
            raise BadConfig(f"--fixed {lengths!r}: {text!r} is no draft length; valid: whole numbers from 0")
        tree = {"drafter": read_mode("deadline")[1]["drafter"], "controller": {"name": "fixed", "gamma": int(text)}}
        kept = [assignment for assignment in sets or [] if not assignment.startswith("controller.")]
        configs.append(resolve(with_sets(merge(tree, overrides), kept), f"fixed-{text}"))
    return configs
