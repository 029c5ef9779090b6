"""`vla-spec run`: closed loop in the simulator."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
    needs,
    override_tree,
    resolve_modes,
    split,
    with_sets,
    writable,
)
from vla_spec.errors import BadConfig

Realtime = Annotated[
    bool,
    typer.Option(
        "--realtime",
        help="Real time, as on a robot: like --real-time, and asks for scheduler, cores, locked memory, quiet garbage "
        "collection and a process for the actor. The options below imply nothing without it.",
    ),
]
FifoPriority = Annotated[int | None, typer.Option(help="SCHED_FIFO priority of the actor; 0 = none. Default: 50.")]
PlannerPriority = Annotated[int | None, typer.Option(help="The same of the planner, below it. Default: 40.")]
ActorCpus = Annotated[str | None, typer.Option(help="Cores of the actor, comma-separated. Default: all.")]
PlannerCpus = Annotated[str | None, typer.Option(help="Cores of the planner, comma-separated. Default: all.")]
LockMemory = Annotated[bool | None, typer.Option("--lock-memory/--no-lock-memory", help="mlockall. Default: yes.")]
FreezeGc = Annotated[
    bool | None,
    typer.Option("--freeze-gc/--no-freeze-gc", help="gc.freeze after warm-up, collect in slack. Default: yes."),
]
ActorProcess = Annotated[
    bool | None,
    typer.Option("--actor-process/--actor-thread", help="The actor in a process of its own, or beside the planner."),
]
Load = Annotated[int, typer.Option(min=0, help="Other processes that keep a core busy each during the closed loop.")]
Planner = Annotated[
    str | None,
    typer.Option(help="Address of a `vla-spec serve` that plans instead of this process, such as tcp://HOST:5555."),
]
PlannerKey = Annotated[Path | None, typer.Option(help="With --planner: this client's NAME.key_secret.")]
PlannerServerKey = Annotated[Path | None, typer.Option(help="With --planner: the server's NAME.key.")]
LoadCpus = Annotated[str | None, typer.Option(help="Cores of these processes, comma-separated. Default: all.")]


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
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Control steps of an episode at most. Default: the robot's benchmark's, else 200."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Episodes per mode that the report shows moving.")] = 3,
    report: Report = True,
    realtime: Realtime = False,
    fifo_priority: FifoPriority = None,
    planner_priority: PlannerPriority = None,
    actor_cpus: ActorCpus = None,
    planner_cpus: PlannerCpus = None,
    lock_memory: LockMemory = None,
    freeze_gc: FreezeGc = None,
    actor_process: ActorProcess = None,
    load: Load = 0,
    load_cpus: LoadCpus = None,
    planner: Planner = None,
    planner_key: PlannerKey = None,
    planner_server_key: PlannerServerKey = None,
) -> None:
    """Closed loop in the simulator: success, latency and deadline misses of each decoding mode, side by side."""
    asked = {
        "fifo_priority": fifo_priority, "planner_priority": planner_priority,
        "actor_cpus": _cores(actor_cpus, "--actor-cpus"), "planner_cpus": _cores(planner_cpus, "--planner-cpus"),
        "lock_memory": lock_memory, "freeze_gc": freeze_gc, "actor_process": actor_process,
    }  # fmt: skip
    asked = {key: value for key, value in asked.items() if value is not None}
    if asked and not realtime:
        raise BadConfig(f"--{next(iter(asked)).replace('_', '-')}: valid with --realtime only")
    if realtime and real_time is False:
        raise BadConfig("--realtime and --lockstep exclude each other")
    overrides = override_tree(
        model, engine, robot, threads, deadline_ms, execute_horizon, True if realtime else real_time
    )
    if realtime:
        overrides["runtime"]["realtime"] = asked
    if planner is None and (planner_key or planner_server_key):
        raise BadConfig("--planner-key and --planner-server-key: valid with --planner only")
    if planner is not None:
        of_server = {"--modes": modes, "--model": model, "--engine": engine, "--threads": threads, "--load": load}
        for name, value in of_server.items():
            if value:
                raise BadConfig(f"{name} {value}: the server at {planner} decides; valid without --planner")
        _run_remotely(
            context, planner, planner_key, planner_server_key, config, overrides, set_, split(tasks),
            range(seed_start, seed_start + episodes), max_steps, out, report,
        )  # fmt: skip
        return
    configs = resolve_modes(modes, config, overrides, set_)
    load_cores = _cores(load_cpus, "--load-cpus")
    if load_cores is not None and not load:
        raise BadConfig("--load-cpus: valid with --load only")

    from vla_spec.evaluation import Plan, episode_steps, evaluate
    from vla_spec.progress import LiveProgress

    plan = Plan(
        configs=configs, tasks=split(tasks), seeds=range(seed_start, seed_start + episodes),
        max_steps=max_steps or episode_steps(configs[0].robot), num_pictures=pictures if report else 0,
    )  # fmt: skip
    with writable(out, "run") as folder, _loaded(load, load_cores) as note, LiveProgress() as progress:
        results = evaluate(plan, progress)
    finish(replace(results, notes=(*results.notes, *note)), folder, report, context.obj)
    from vla_spec.realtime_table import print_realtime

    print_realtime(results.realtime, Console())


def _run_remotely(
    context: typer.Context, address: str, key: Path | None, server_key: Path | None, file: Path | None,
    overrides: dict[str, Any], sets: list[str] | None, tasks: tuple[str, ...] | None, seeds: range,
    max_steps: int | None, out: Path | None, report: bool,
) -> None:  # fmt: skip
    """The same closed loop; only the planner is somewhere else."""
    needs("zmq", "run --planner", "serve")
    needs("msgpack", "run --planner", "serve")
    from vla_spec.config import merge, read_tree, resolve
    from vla_spec.evaluation import episode_steps, task_names
    from vla_spec.progress import LiveProgress
    from vla_spec.serving.closed_loop import RemotePlan, evaluate_remote
    from vla_spec.serving.keys import ClientKeys, read_pair, read_public

    if (key is None) != (server_key is None):
        raise BadConfig("--planner-key and --planner-server-key belong together; valid: both or neither")
    keys = None if key is None or server_key is None else ClientKeys(read_pair(key), read_public(server_key))
    tree = merge(read_tree(file) if file is not None else {}, {**overrides, "engine": "toy"})
    resolved = resolve(with_sets(tree, sets), "remote")
    steps = max_steps or episode_steps(resolved.robot)
    plan = RemotePlan(resolved, task_names(resolved.robot, tasks), seeds, steps, address, keys)
    with writable(out, "run") as folder, LiveProgress() as progress:
        results = evaluate_remote(plan, progress)
    finish(results, folder, report, context.obj)


def _cores(text: str | None, where: str) -> tuple[int, ...] | None:
    """``0,1`` to numbers; None = not given."""
    names = split(text)
    if names is None:
        return None
    if not all(name.isdecimal() for name in names):
        raise BadConfig(f"{where} {text!r}: expected numbers of cores, comma-separated, as in 0,1")
    return tuple(int(name) for name in names)


@contextlib.contextmanager
def _loaded(num_processes: int, cores: tuple[int, ...] | None) -> Iterator[tuple[str, ...]]:
    """Keep the machine busy meanwhile; yields what to say about it."""
    if not num_processes:
        yield ()
        return
    from vla_spec.calib.background_load import BackgroundLoad

    with BackgroundLoad("busy", num_processes) as load:
        if cores is not None:
            for pid in load.pids:
                _pin(pid, cores)
        where = "" if cores is None else f" on core{'s' if len(cores) > 1 else ''} {','.join(map(str, cores))}"
        yield (f"the machine is loaded throughout by {load.description}{where}",)


def _pin(pid: int, cores: tuple[int, ...]) -> None:
    setter: Any = getattr(os, "sched_setaffinity", None)
    try:
        if setter is None:
            raise OSError(None, "this system has no such call")
        setter(pid, cores)
    except OSError as error:
        raise BadConfig(
            f"--load-cpus {','.join(map(str, cores))}: {error.strerror}; valid: cores of this machine"
        ) from None
