"""`vla-spec calibrate tolerance`: how far a drafted token may be from the target's choice, in metres, fitted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vla_spec.commands._options import (
    ConfigFile,
    Engine,
    Horizon,
    ModelDir,
    Robot,
    SeedStart,
    Set,
    Tasks,
    Threads,
    check_training_seeds,
    override_tree,
    resolve_modes,
    split,
    writable,
)
from vla_spec.errors import BadConfig

GROUP_HELP = "Fit what depends on this machine or this policy, and write it down."


def command(
    context: typer.Context,
    mode: Annotated[
        str, typer.Option(help="Mode with rule relaxed_physical; its cap, budget and relative share keep proportions.")
    ] = "relaxed",
    caps: Annotated[
        str, typer.Option(help="Caps per token to try, comma-separated, in the tokenizer's unit. [m, rad]")
    ] = "0.00015,0.0003,0.0006,0.0009,0.0012,0.0096",
    tasks: Tasks = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per task and tolerance.")] = 9,
    seed_start: SeedStart = 9000,
    out: Annotated[
        Path | None, typer.Option(help="File to write, *.json. Default: in runs/<date and time>-tolerance.")
    ] = None,
    ways: Annotated[
        str, typer.Option(help="How the tolerance is used in closed loop: drafted (as decoded), used_up (all of it).")
    ] = "drafted,used_up",
    margin: Annotated[float, typer.Option(help="Success that may be lost against exact decoding. [0..1]")] = 0.1,
    confidence: Annotated[float, typer.Option(help="Of the one-sided bound. [0..1]")] = 0.95,
    max_steps: Annotated[int, typer.Option(min=1, help="Control steps of an episode at most.")] = 200,
    observations: Annotated[int, typer.Option(min=1, help="Recorded observations that every tolerance decodes.")] = 30,
    model: ModelDir = None,
    engine: Engine = None,
    robot: Robot = None,
    threads: Threads = None,
    execute_horizon: Horizon = None,
    config: ConfigFile = None,
    set_: Set = None,
) -> None:
    """The largest tolerance whose success is not worse than exact decoding's; resumes where it was stopped.

    Writes the tolerance for `rule: {name: relaxed_physical, fitted: FILE}`, every episode in FILE.episodes.jsonl beside
    it, and the curve as an SVG. Default tasks: those of the robot that need precision.
    """
    check_training_seeds(seed_start, episodes)
    overrides = override_tree(model, engine, robot, threads, None, execute_horizon, False)
    configs = resolve_modes(mode, config, overrides, set_)
    if len(configs) != 1:
        raise BadConfig(f"--mode {mode}: valid: one mode")
    if out is not None and out.suffix != ".json":
        raise BadConfig(f"--out {out}: valid: a file name that ends in .json")

    import datetime
    from dataclasses import replace

    from vla_spec.calib.non_inferiority import episodes_needed
    from vla_spec.calib.tolerance import TolerancePlan, fit_tolerance
    from vla_spec.calib.tolerance_report import print_fit, write_plot
    from vla_spec.errors import MissingDependency
    from vla_spec.progress import LiveProgress
    from vla_spec.trace import write_json

    plan = TolerancePlan(
        config=configs[0], caps=_numbers(caps), tasks=split(tasks), seeds=range(seed_start, seed_start + episodes),
        ways=split(ways) or (), max_steps=max_steps, num_observations=observations, margin=margin,
        confidence=confidence,
    )  # fmt: skip
    with writable(None if out is None else out.parent, "tolerance") as folder, LiveProgress() as progress:
        path = folder / "tolerance.json" if out is None else out
        fit = fit_tolerance(plan, path.with_suffix(".episodes.jsonl"), progress)
    created = datetime.datetime.now().astimezone().isoformat("T", "seconds")
    evidence = {"command": shlex.join(["vla-spec", *context.obj]), "created": created, **fit.fitted.evidence}
    fit = replace(fit, fitted=replace(fit.fitted, evidence=evidence))
    write_json(path, fit.fitted.as_json())
    print_fit(fit, Console())
    needed = episodes_needed(margin, confidence)
    if fit.closed_loop[0].episodes < needed:
        typer.echo(
            f"note: {fit.closed_loop[0].episodes} episodes; even without a failure {needed} are needed for a margin of "
            f"{100 * margin:g} %; run again with more --episodes, those that are known are kept"
        )
    written = [path]
    try:
        write_plot(fit, path.with_suffix(".svg"))
        written.append(path.with_suffix(".svg"))
    except MissingDependency as error:
        typer.echo(f"note: no plot; {error}")
    for one in written:
        typer.echo(one)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in split(text) or ())
    except ValueError:
        raise BadConfig(f"--caps {text}: valid: numbers, comma-separated, as in 0.0003,0.001") from None
