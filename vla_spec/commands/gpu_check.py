"""`vla-spec gpu check`: all that only a machine with a GPU can say about an engine."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vla_spec.commands._options import (
    FIRST_HELD_OUT_SEED,
    ConfigFile,
    Episodes,
    ModelDir,
    Modes,
    Out,
    Robot,
    Set,
    Tasks,
    Threads,
    override_tree,
    resolve_modes,
    split,
    writable,
)
from vla_spec.errors import BadConfig, MissingDependency, NoDevice

if TYPE_CHECKING:
    from vla_spec.engines._trt.cuda import Device
    from vla_spec.gpu_check import Outcome

GROUP_HELP = "What needs an NVIDIA GPU."
#: Exit code if a step fails. Without a GPU it is `NoDevice`'s.
FAILED = 1


def command(
    context: typer.Context,
    modes: Modes = "autoregressive,exact",
    model: ModelDir = None,
    tasks: Tasks = None,
    episodes: Episodes = 1,
    robot: Robot = None,
    out: Out = None,
    calls: Annotated[int, typer.Option(min=2, help="Timed calls of each kind.")] = 300,
    warm_up: Annotated[int, typer.Option(min=1, help="Calls of each kind before these.")] = 30,
    observations: Annotated[int, typer.Option(min=1, help="Observations to compare with ONNX Runtime on.")] = 8,
    plans: Annotated[int, typer.Option(min=1, help="Plans of each mode in the profile.")] = 100,
    max_steps: Annotated[int, typer.Option(min=2, help="Control steps of an episode at most.")] = 200,
    skip: Annotated[
        str | None,
        typer.Option(help="Leave out, comma-separated: build load verify tiers graphs cache streams loop profile."),
    ] = None,
    threads: Threads = None,
    config: ConfigFile = None,
    set_: Set = None,
) -> None:
    """Build, verify and time the TensorRT engine on this machine's GPU; closed loop and profile with it.

    Options of the engine by --set engine.NAME=VALUE. Writes results.json and report.md. Exit code 1: a step failed;
    69: there is no GPU, no driver or no TensorRT here.
    """
    from vla_spec.assemble import Assembler
    from vla_spec.clock import MonotonicClock
    from vla_spec.engines import tensorrt
    from vla_spec.gpu_check import CheckPlan, GpuCheck
    from vla_spec.progress import LiveProgress

    configs = resolve_modes(modes, config, override_tree(model, "tensorrt", robot, threads, None, None, None), set_)
    options: Any = configs[0].engine.options
    if configs[0].engine.name != "tensorrt":
        raise BadConfig(f"engine {configs[0].engine.name}: not on a GPU; valid for a GPU check: tensorrt")
    model_dir = Assembler().model_dir(configs[0])
    assert model_dir is not None
    plan = CheckPlan(
        model_dir, options, configs, split(skip) or (), calls, warm_up, observations, split(tasks),
        range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + episodes), max_steps, plans,
    )  # fmt: skip
    try:
        machine = tensorrt.this_machine(options.library)
        machine.cuda.use(options.device)
        device = machine.cuda.device(options.device)
    except (NoDevice, MissingDependency) as error:
        raise NoDevice(f"gpu check: nothing was run, this machine can't: {error}") from error
    library = f"{machine.library.backend} {machine.library.version}"
    told = shlex.join(["vla-spec", *context.obj])
    with writable(out, "gpu-check") as folder, LiveProgress() as progress:
        results: dict[str, Any] = {}

        def write(outcomes: Sequence[Outcome]) -> None:
            results.update(_results(outcomes, device, library, str(model_dir), options.precision, told, threads or 1))
            _write(results, folder)

        check = GpuCheck(plan, machine, folder, MonotonicClock().now_ns, progress)
        try:
            outcomes = check.run(write)
        finally:
            check.close()
    _print(outcomes, results["verdict"])
    for name in ("report.md", "results.json"):
        typer.echo(folder / name)
    if results["verdict"] == "fail":
        raise typer.Exit(FAILED)


def _results(
    outcomes: Sequence[Outcome], device: Device, library: str, model: str, precision: str, told: str, num_threads: int
) -> dict[str, Any]:  # fmt: skip
    from vla_spec import __version__
    from vla_spec.engines._trt.cuda import cuda_version
    from vla_spec.gpu_check import FORMAT, MEANING, STEPS
    from vla_spec.results import environment

    kinds = [one.outcome for one in outcomes]
    verdict = next((kind for kind in ("fail", "warn") if kind in kinds), "pass")
    if verdict != "fail" and len(kinds) < len(STEPS):
        verdict = "unfinished"
    gpu = {
        **device._asdict(), "sm": device.sm, "driver": cuda_version(device.driver),
        "runtime": cuda_version(device.runtime), "capability": "{}.{}".format(*device.capability),
    }  # fmt: skip
    return {
        "format": FORMAT, "vla_spec": __version__, "command": told,
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"), "verdict": verdict, "gpu": gpu,
        "library": library, "model": model, "precision": precision, "steps": [one._asdict() for one in outcomes],
        "machine": environment(num_threads), "meaning": MEANING,
    }  # fmt: skip


def _write(results: dict[str, Any], folder: Path) -> None:
    """After every step, so that what was measured survives whatever comes."""
    from vla_spec.gpu_report import render
    from vla_spec.results import write_text
    from vla_spec.trace import write_json

    write_json(folder / "results.json", results)
    write_text(folder / "report.md", render(results))


def _print(outcomes: Sequence[Outcome], verdict: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=f"GPU check: {verdict}", title_justify="left")
    for name in ("step", "outcome", "s", ""):
        table.add_column(name, justify="right" if name == "s" else "left")
    colours = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}
    for one in outcomes:
        colour = colours[one.outcome]
        table.add_row(one.step, f"[{colour}]{one.outcome}[/]", f"{one.seconds:.1f}", one.message)
    Console().print(table)
