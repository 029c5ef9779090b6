"""`vla-spec ros demo`: the shipped policy on a simulated arm, all nodes as processes on real DDS."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.commands._options import FIRST_HELD_OUT_SEED, Out, SeedStart, Tasks, split, writable
from vla_spec.errors import BadConfig, MissingDependency

#: Of the group that this command is in.
GROUP_HELP = "ROS 2: the nodes at work, on this machine."
#: What is played if nothing else is said.
DEFAULT_TASKS = ("drawer-close", "button-press", "faucet-open", "plate-slide")
PARAMS = "metaworld.yaml"
#: Simulator, cameras, policy and actor each keep one busy.
CORES_FOR_REAL_TIME = 4
#: What of each node's report goes into the table: end of the status's name -> keys.
SHOWN = {
    ": planner": ("plans", "late", "p50_ms", "mode"),
    ": chunks": (
        "planning_p50_ms", "planning_p99_ms", "picture_to_chunk_p50_ms", "picture_to_chunk_p99_ms", "late_share",
    ),
    ": commands": ("period_error_p50_ms", "period_error_p99_ms", "period_error_max_ms"),
    ": actor": ("chunks", "commands.exact", "commands.relaxed", "commands.hold", "clamped", "skipped"),
    ": simulator": ("commands", "missing", "replaced", "period_error_p99_ms"),
    ": cameras": ("pictures", "draw_mean_ms"),
}  # fmt: skip


def command(
    context: typer.Context,
    tasks: Tasks = None,
    episodes: Annotated[int, typer.Option(min=1, help="Per task.")] = 2,
    seed_start: SeedStart = FIRST_HELD_OUT_SEED,
    mode: Annotated[str, typer.Option(help="Decoding mode.")] = "exact",
    time_scale: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            max=10,
            help="Simulated seconds per second. Default: 1, or 0.5 with fewer than 4 cores, where physics, drawing and "
            "the policy get in each other's way.",
        ),
    ] = None,
    params_file: Annotated[Path | None, typer.Option(help="Parameters of all nodes (YAML).")] = None,
    bag: Annotated[bool, typer.Option("--bag/--no-bag", help="Record everything as MCAP, for Foxglove.")] = True,
    out: Out = None,
) -> None:
    """Simulator, cameras, policy, actor and monitor as ROS 2 nodes: success, rates, latency, misses, a bag."""
    from vla_spec.results import environment, wilson_interval
    from vla_spec.trace import write_json

    try:
        from vla_spec.nodes._demo import run_demo
    except ImportError as error:
        if "rclpy" not in str(error) and "_msgs" not in str(error):
            raise
        raise MissingDependency("ROS 2", "make ros-demo, or source /opt/ros/<distribution>/setup.bash") from error
    if time_scale is None:
        time_scale = 1.0 if (os.cpu_count() or 1) >= CORES_FOR_REAL_TIME else 0.5
    names = split(tasks) or DEFAULT_TASKS
    seeds = range(seed_start, seed_start + episodes)
    console = Console()
    with writable(out, "ros-demo") as folder:
        result = run_demo(
            params_file or find_params(PARAMS), names, seeds, folder, console.print, {"mode": mode},
            {"time_scale": str(time_scale)}, {"command_rate_hz": str(80.0 * time_scale)}, bag,
        )  # fmt: skip
        solved = sum(outcome["success"] for outcome in result.outcomes)
        interval = wilson_interval(solved, len(result.outcomes))
        found: dict[str, Any] = {
            "format": 1, "kind": "ros-demo", "command": shlex.join(["vla-spec", *context.obj]),
            "success": solved, "episodes": len(result.outcomes), "success_ci95": interval, "outcomes": result.outcomes,
            "diagnostics": result.diagnostics, "exit_codes": result.exit_codes, "seconds": round(result.seconds, 2),
            "time_scale": time_scale, "mode": mode, "environment": environment(1),
        }  # fmt: skip
        write_json(folder / "results.json", found)
    _print(console, found, interval)
    console.print(f"{folder / 'results.json'}")
    if bag:
        console.print(f"{folder / 'demo.mcap'}  (open it in Foxglove)")


def find_params(name: str) -> Path:
    """A shipped parameter file: of the source tree, or where the package's data was installed.

    Raises:
        BadConfig: neither is there.
    """
    places = [
        Path(__file__).parents[2] / "launch" / "params" / name,
        Path(sys.prefix) / "share" / "vla_spec" / "params" / name,
    ]
    for place in places:
        if place.is_file():
            return place
    raise BadConfig(f"{name}: not in {' or '.join(str(place.parent) for place in places)}; give --params-file")


def _print(console: Console, found: dict[str, Any], interval: tuple[float, float] | None) -> None:
    low, high = (f"{100 * bound:.1f}" for bound in interval or (0.0, 0.0))
    console.print(
        f"solved {found['success']} of {found['episodes']} (95 % CI {low}–{high} %), mode {found['mode']}, "
        f"{found['time_scale']:g} simulated seconds per second"
    )
    table = Table(box=SIMPLE_HEAD)
    for heading in ("node", "level", "says", "figures"):
        table.add_column(heading)
    for name, values in sorted(found["diagnostics"].items()):
        keys = next((keys for end, keys in SHOWN.items() if name.endswith(end)), ())
        figures = ", ".join(f"{key} {values[key]}" for key in keys if key in values)
        table.add_row(name, values["level"], values["message"], figures)
    console.print(table)
    codes = {name: code for name, code in found["exit_codes"].items() if code}
    if codes:
        console.print(f"nodes that did not end cleanly: {json.dumps(codes)}")
