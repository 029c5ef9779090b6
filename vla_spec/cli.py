"""The command line, `vla-spec`. Thin: options in, one call, tables out. One handler turns every error into one line.

Heavy imports happen inside the commands, so that `--version` and `--help` are instant and need nothing but the core.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vla_spec import __version__
from vla_spec.errors import BadConfig, Interrupted, VlaSpecError

if TYPE_CHECKING:
    from vla_spec.config import Config
    from vla_spec.results import Results

#: Exit code of a fault of ours, as sysexits.h has it.
EXIT_BUG = 70
DEFAULT_MODES = "autoregressive,exact,relaxed"
#: Evaluation never uses a seed that training saw; collection uses small ones.
FIRST_HELD_OUT_SEED = 10_000

app = typer.Typer(
    name="vla-spec", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Modes = Annotated[str, typer.Option(help="Decoding modes, comma-separated: shipped names or YAML files of your own.")]
Tasks = Annotated[str | None, typer.Option(help="Tasks, comma-separated. Default: all that the robot offers.")]
Episodes = Annotated[int, typer.Option(min=1, help="Episodes per task (and per mode).")]
SeedStart = Annotated[int, typer.Option(min=0, help="Seed of the first episode; the next ones count up.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write to. Default: runs/<date and time>.")]
ModelDir = Annotated[Path | None, typer.Option("--model", help="Folder with the model's files.")]
Engine = Annotated[str | None, typer.Option(help="Engine plugin.")]
Robot = Annotated[str | None, typer.Option(help="Robot plugin.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads inside one engine call.")]
Deadline = Annotated[float | None, typer.Option(help="Time from start of planning until the chunk is due. [ms]")]
Horizon = Annotated[int | None, typer.Option("--execute-horizon", help="Control steps played before the next plan.")]
RealTime = Annotated[
    bool | None,
    typer.Option("--real-time/--lockstep", help="Physics goes on while the planner thinks, or waits for it."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML under all modes; without --modes, the mode.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE on top of every mode; may be repeated.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html beside results.json.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"vla-spec {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. Works anywhere on the line.")] = False,
) -> None:
    """Deadline-aware speculative decoding of robot policies."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
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
    overrides = _overrides(model, engine, robot, threads, deadline_ms, execute_horizon, real_time)
    configs = _configs(modes, config, overrides, set_)

    from vla_spec.evaluation import Plan, evaluate
    from vla_spec.progress import LiveProgress

    plan = Plan(
        configs=configs, tasks=_split(tasks), seeds=range(seed_start, seed_start + episodes), max_steps=max_steps,
        num_pictures=pictures if report else 0,
    )  # fmt: skip
    with _writable(out, "run") as folder, LiveProgress() as progress:
        results = evaluate(plan, progress)
    _finish(results, folder, report, context.obj)


@app.command()
def bench(
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

    overrides = _overrides(model, engine, robot, threads, deadline_ms, execute_horizon, None)
    configs = _configs(modes, config, overrides, set_) if modes or config else grid(_with_sets(overrides, set_))
    plan = BenchPlan(
        configs=configs, tasks=_split(tasks), seeds=range(seed_start, seed_start + episodes),
        num_observations=observations, num_repeats=repeats,
        closed_loop=() if closed_loop == "none" else _split(closed_loop) or (),
    )  # fmt: skip
    with _writable(out, "bench") as folder, LiveProgress() as progress:
        results = benchmark(plan, progress)
    _finish(results, folder, report, context.obj)


@app.command()
def collect(
    out: Annotated[Path, typer.Option(help="Folder of demonstrations; what is there already is kept.")] = Path(
        "data/demonstrations"
    ),
    tasks: Tasks = None,
    episodes: Episodes = 100,
    seed_start: SeedStart = 0,
    processes: Annotated[int, typer.Option(min=1, help="Simulators side by side.")] = 2,
    policy: Annotated[
        Path | None, typer.Option(help="Model folder that drives part of each episode; the expert labels (DAgger).")
    ] = None,
) -> None:
    """Record the scripted experts in the simulator. Resumes where it was stopped."""
    _check_training_seeds(seed_start, episodes)

    from vla_spec.progress import LiveProgress
    from vla_spec.recipe import collect_demonstrations

    with LiveProgress() as progress:
        collect_demonstrations(
            out, _split(tasks), range(seed_start, seed_start + episodes), processes, policy, progress
        )


@app.command()
def train(
    data: Annotated[list[Path] | None, typer.Option(help="Folder of demonstrations; may be repeated.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Written often; training resumes from it.")] = Path(
        "data/policy.safetensors"
    ),
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint of an earlier, smaller policy, grown without changing its output.")
    ] = None,
    set_: Set = None,
) -> None:
    """Train the policy on demonstrations. Resumes from the checkpoint."""
    from vla_spec.recipe import train_policy

    train_policy(data or [Path("data/demonstrations")], checkpoint, set_ or [], typer.echo, start_from)


@app.command()
def distill(
    data: Annotated[list[Path] | None, typer.Option(help="Folder of demonstrations; may be repeated.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="The trained policy.")] = Path("data/policy.safetensors"),
    out: Annotated[Path, typer.Option(help="Folder of the drafters' checkpoints; resumes from them.")] = Path(
        "data/drafters"
    ),
    drafters: Annotated[str | None, typer.Option(help="Which, comma-separated. Default: all.")] = None,
    set_: Set = None,
) -> None:
    """Train the drafters on the policy's own outputs. Resumes."""
    from vla_spec.recipe import distill_drafters

    distill_drafters(data or [Path("data/demonstrations")], checkpoint, out, _split(drafters), set_ or [], typer.echo)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="The trained policy.")] = Path("data/policy.safetensors"),
    drafters: Annotated[Path, typer.Option(help="Folder of the drafters' checkpoints.")] = Path("data/drafters"),
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("models/metaworld"),
) -> None:
    """Write the model folder that engines load: safetensors, ONNX, policy.json and golden inputs."""
    from vla_spec.recipe import export_model

    export_model(checkpoint, drafters, out, typer.echo)


@app.command()
def doctor(
    model: ModelDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Try OpenGL by drawing a picture.")] = True,
) -> None:
    """What this machine has, and what is missing for what."""
    from vla_spec.config import DEFAULT_MODEL, find_model
    from vla_spec.doctor import LIBRARIES, diagnose

    found = diagnose(find_model(model or DEFAULT_MODEL), draw)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    console = Console()
    table = Table("machine", "", title="What is here", title_justify="left")
    for name, text in found.machine.items():
        table.add_row(name, text)
    table.add_row("OpenGL", ", ".join(f"{name}: {state}" for name, state in found.gl.items()))
    table.add_row("ONNX Runtime", ", ".join(found.providers) or "not installed")
    table.add_row("ROS 2", found.ros or "not found")
    table.add_row("TensorRT", found.tensorrt or "not found")
    installed = [f"{name} {version}" for name, version in found.libraries.items() if version]
    table.add_row("libraries", ", ".join(installed))
    absent = [f"{name} ({LIBRARIES[name]})" for name, version in found.libraries.items() if not version]
    table.add_row("not installed", ", ".join(absent) or "-")
    console.print(table)
    table = Table("for", "state", "to get it", title="What works here", title_justify="left")
    for purpose in found.purposes:
        state = "[green]ready[/]" if purpose.is_ready else f"[yellow]missing: {', '.join(purpose.missing)}[/]"
        table.add_row(purpose.what, state, purpose.fix)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Errors of the user are one red line on stderr and the error's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in given
    options = [item for item in given if item != "--debug"]
    try:
        code = app(args=options, prog_name="vla-spec", standalone_mode=False, obj=given)
    except (KeyboardInterrupt, Interrupted, typer.Abort):
        code = Interrupted.exit_code
    except VlaSpecError as error:
        code = _report_error(str(error), error.exit_code, is_debug)
    except typer.Exit as done:
        code = done.exit_code
    except typer.TyperException as error:
        code = _report_error(error.format_message(), error.exit_code, is_debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away, as `head` does: not worth a word
        code = 0
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {error} (see where with --debug)"
        code = _report_error(text, EXIT_BUG, is_debug)
    if code == Interrupted.exit_code:  # by whichever way: typer turns Ctrl-C into a plain exit code
        _report_error("stopped on request; what was written is whole", code, is_debug=False)
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(message: str, code: int, is_debug: bool) -> int:
    console = Console(stderr=True)
    if is_debug:
        console.print_exception()
    one_line = " ".join(message.split())
    console.print(f"error: {one_line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


def _overrides(
    model: Path | None, engine: str | None, robot: str | None, threads: int | None, deadline_ms: float | None,
    execute_horizon: int | None, real_time: bool | None,
) -> dict[str, Any]:  # fmt: skip
    """Command-line options as a configuration tree that lies on top of every mode."""
    runtime = {
        "deadline_ms": deadline_ms,
        "execute_horizon": execute_horizon,
        "clock": None if real_time is None else "real" if real_time else "lockstep",
    }
    tree: dict[str, Any] = {"model": model, "engine": engine, "robot": robot, "num_threads": threads}
    tree["runtime"] = {key: value for key, value in runtime.items() if value is not None} or None
    return {key: value for key, value in tree.items() if value is not None}


def _with_sets(tree: dict[str, Any], sets: list[str] | None) -> dict[str, Any]:
    from vla_spec.config import set_key

    for assignment in sets or []:
        tree = set_key(tree, assignment)
    return tree


def _configs(modes: str, file: Path | None, overrides: dict[str, Any], sets: list[str] | None) -> tuple[Config, ...]:
    """One resolved configuration per mode: the file, then the mode on top, then the command line."""
    from vla_spec.config import merge, read_mode, read_tree, resolve

    base = read_tree(file) if file is not None else {}
    names = _split(modes) or (() if file is not None else _split(DEFAULT_MODES)) or ()
    trees = [read_mode(name) for name in names] or [(file.stem if file else "custom", {})]
    if len({name for name, _ in trees}) < len(trees):
        raise BadConfig(f"modes: {modes!r} names a mode twice")
    return tuple(resolve(_with_sets(merge(merge(base, tree), overrides), sets), name) for name, tree in trees)


def _split(text: str | None) -> tuple[str, ...] | None:
    """``a,b`` to names; None or nothing = not given."""
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    return names or None


def _check_training_seeds(first: int, count: int) -> None:
    if first + count > FIRST_HELD_OUT_SEED:
        raise BadConfig(
            f"--seed-start {first} --episodes {count}: seeds from {FIRST_HELD_OUT_SEED} on are kept for evaluation; "
            f"valid: seed-start + episodes at most {FIRST_HELD_OUT_SEED}"
        )


@contextlib.contextmanager
def _writable(out: Path | None, kind: str) -> Iterator[Path]:
    """The run's folder, made before the work begins; taken away again if nothing came to be in it."""
    from vla_spec.results import run_folder

    folder = run_folder(out, kind)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only succeeds when it is empty
        raise


def _finish(results: Results, folder: Path, with_report: bool, arguments: Sequence[str]) -> None:
    """Save, draw and print the results of a run that was called with these arguments."""
    from vla_spec.results import print_table, save

    results = save(results, folder, shlex.join(["vla-spec", *arguments]))
    written = [folder / "results.json"]
    if with_report:
        from vla_spec.report import write_report

        written.append(write_report(results, folder))
    print_table(results, Console())
    for path in written:
        typer.echo(path)


if __name__ == "__main__":
    main()
