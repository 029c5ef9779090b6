"""What commands share: options with their help, options to configurations, a run's folder, saving and printing."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vla_spec.errors import BadConfig, MissingDependency

if TYPE_CHECKING:
    from vla_spec.config import Config
    from vla_spec.results import Results

DEFAULT_MODES = "autoregressive,exact,relaxed"
#: Evaluation never uses a seed that training saw; collection uses small ones.
FIRST_HELD_OUT_SEED = 10_000

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


def override_tree(
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


def with_sets(tree: dict[str, Any], sets: list[str] | None) -> dict[str, Any]:
    """The tree with each ``KEY=VALUE`` of --set on top."""
    from vla_spec.config import set_key

    for assignment in sets or []:
        tree = set_key(tree, assignment)
    return tree


def resolve_modes(
    modes: str, file: Path | None, overrides: dict[str, Any], sets: list[str] | None
) -> tuple[Config, ...]:
    """One resolved configuration per mode: the file, then the mode on top, then the command line."""
    from vla_spec.config import merge, read_mode, read_tree, resolve

    base = read_tree(file) if file is not None else {}
    names = split(modes) or (() if file is not None else split(DEFAULT_MODES)) or ()
    trees = [read_mode(name) for name in names] or [(file.stem if file else "custom", {})]
    if len({name for name, _ in trees}) < len(trees):
        raise BadConfig(f"modes: {modes!r} names a mode twice")
    return tuple(resolve(with_sets(merge(merge(base, tree), overrides), sets), name) for name, tree in trees)


def split(text: str | None) -> tuple[str, ...] | None:
    """``a,b`` to names; None or nothing = not given."""
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    return names or None


def check_training_seeds(first: int, count: int) -> None:
    """Refuse seeds that are kept for evaluation.

    Raises:
        BadConfig: a seed from `FIRST_HELD_OUT_SEED` on.
    """
    if first + count > FIRST_HELD_OUT_SEED:
        raise BadConfig(
            f"--seed-start {first} --episodes {count}: seeds from {FIRST_HELD_OUT_SEED} on are kept for evaluation; "
            f"valid: seed-start + episodes at most {FIRST_HELD_OUT_SEED}"
        )


@contextlib.contextmanager
def writable(out: Path | None, kind: str) -> Iterator[Path]:
    """The run's folder, made before the work begins; taken away again if nothing came to be in it."""
    from vla_spec.results import run_folder

    folder = run_folder(out, kind)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only succeeds when it is empty
        raise


def finish(results: Results, folder: Path, with_report: bool, arguments: Sequence[str]) -> None:
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


def needs(library: str, command: str, extra: str) -> None:
    """Refuse a command whose library is not installed.

    Raises:
        MissingDependency: says which extra brings it.
    """
    if importlib.util.find_spec(library) is None:
        raise MissingDependency(f"{library}, which `vla-spec {command}` needs,", f"pip install 'vla_spec[{extra}]'")
