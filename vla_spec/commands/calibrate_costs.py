"""`vla-spec calibrate costs`: what engine, drafter and adapter cost on this machine, idle and under load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vla_spec.commands._options import (
    FIRST_HELD_OUT_SEED,
    ConfigFile,
    Engine,
    ModelDir,
    Modes,
    Robot,
    Set,
    Threads,
    override_tree,
    resolve_modes,
    split,
    writable,
)
from vla_spec.errors import BadConfig

GROUP_HELP = "Fit what depends on this machine or this policy, and write it down."


def command(
    context: typer.Context,
    modes: Modes = "",
    calls: Annotated[int, typer.Option(min=2, help="Measured calls of each kind; p99.9 needs 1000.")] = 1000,
    warm_up: Annotated[int, typer.Option(min=1, help="Calls of each kind before these, kept apart.")] = 10,
    load: Annotated[
        str, typer.Option(help="Loads to measure under, comma-separated: idle, busy (cores), memory (bandwidth).")
    ] = "idle,busy",
    load_processes: Annotated[int, typer.Option(min=1, help="Processes of a load; each keeps a core busy.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="File to write, *.costs.json. Default: in runs/<date and time>-calibrate.")
    ] = None,
    model: ModelDir = None,
    engine: Engine = None,
    robot: Robot = None,
    threads: Threads = None,
    config: ConfigFile = None,
    set_: Set = None,
) -> None:
    """Cost tables of decoding modes on this machine, for `runtime.costs`: prefill, steps, drafts, encode, decode."""
    from vla_spec.calib.cost_file import SUFFIX, write_cost_file
    from vla_spec.calib.cost_measurement import CalibrationOptions, calibrate_costs
    from vla_spec.calib.cost_report import print_costs
    from vla_spec.progress import LiveProgress

    if out is not None and not out.name.endswith(SUFFIX):
        raise BadConfig(f"--out {out}: valid: a file name that ends in {SUFFIX}")
    overrides = override_tree(model, engine, robot, threads, None, None, None)
    configs = resolve_modes(modes or ("" if config else "exact"), config, overrides, set_)
    options = CalibrationOptions(calls, warm_up, split(load) or (), load_processes)
    line = shlex.join(["vla-spec", *context.obj])
    with writable(out.parent if out else None, "calibrate") as folder:
        path = folder / (out.name if out else f"machine{SUFFIX}")
        with LiveProgress() as progress:
            file = calibrate_costs(configs, options, FIRST_HELD_OUT_SEED, line, progress)
        write_cost_file(path, file)
    print_costs(file, Console())
    typer.echo(path)
