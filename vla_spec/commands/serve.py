"""`vla-spec serve`: plan for robots in other processes or on other machines."""

from __future__ import annotations

import queue
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from vla_spec.commands._options import (
    ConfigFile,
    Engine,
    ModelDir,
    Out,
    Set,
    Threads,
    needs,
    override_tree,
    resolve_modes,
    writable,
)
from vla_spec.errors import BadConfig

if TYPE_CHECKING:
    from vla_spec.serving.server import PlanServer

#: Nothing is late of itself on a server: each request brings its own deadline. The longest that may be said. [ms]
_ANY_DEADLINE_MS = 60_000.0


def command(
    context: typer.Context,
    bind: Annotated[str, typer.Option(help="tcp://HOST:PORT (port * = any free one) or ipc:///PATH.")] = (
        "tcp://127.0.0.1:5555"
    ),
    mode: Annotated[str, typer.Option(help="Decoding mode: a shipped name or a YAML file of your own.")] = "exact",
    model: ModelDir = None,
    engine: Engine = None,
    threads: Threads = None,
    config: ConfigFile = None,
    set_: Set = None,
    max_clients: Annotated[int, typer.Option(min=1, help="Clients at the same time; they take turns.")] = 4,
    control_period_ms: Annotated[
        float, typer.Option(help="Control period that the model was made for; clients with another are refused. [ms]")
    ] = 12.5,
    public: Annotated[bool, typer.Option("--public", help="Allow addresses that other machines can reach.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="With --public: without keys. Anyone may ask.")] = False,
    key: Annotated[Path | None, typer.Option(help="The server's NAME.key_secret, from `vla-spec keys`.")] = None,
    clients: Annotated[Path | None, typer.Option(help="Folder with the NAME.key of all clients that may come.")] = None,
    out: Out = None,
) -> None:
    """Plan for robots in other processes or on other machines, over ZeroMQ. Ends with Ctrl-C or SIGTERM."""
    needs("zmq", "serve", "serve")
    needs("msgpack", "serve", "serve")
    from vla_spec.realtime import locked_memory, thread_privileges
    from vla_spec.serving.keys import ServerKeys, read_clients, read_pair
    from vla_spec.serving.server import PlanServer, ServerOptions
    from vla_spec.serving.service import build_service

    if (key is None) != (clients is None):
        raise BadConfig("--key and --clients belong together; valid: both or neither")
    keys = None if key is None or clients is None else ServerKeys(read_pair(key), read_clients(clients))
    ServerOptions(bind, public, insecure).check_keys(keys)  # before the engine is built
    overrides = override_tree(model, engine, None, threads, _ANY_DEADLINE_MS, None, True)
    overrides["robot"] = "toy"  # robots are the clients' business
    (resolved,) = resolve_modes(mode, config, overrides, set_)
    with writable(out, "serve") as folder:
        service = build_service(resolved, max_clients, control_period_ms / 1e3)
        asked, tell = resolved.runtime.realtime, _printed_aside()
        io_priority = asked.planner_priority + 1 if asked is not None and asked.planner_priority else 0
        options = ServerOptions(bind, public, insecure, io_priority=io_priority)
        server = PlanServer(service.welcome, service.policies, options, keys, service.assemblies[0].clock.now_ns, tell)
        server.start()
        with ExitStack() as stack:
            stack.enter_context(_stopped_by_signals(server))
            how = "encrypted, known keys only" if keys else "no keys"
            typer.echo(f"listening on {server.address} ({how}), mode {resolved.mode}, model "
                       f"{service.welcome.model_hash[:12]}, up to {max_clients} clients")  # fmt: skip
            if asked is not None:
                grants = stack.enter_context(locked_memory("process", asked.lock_memory))
                grants += stack.enter_context(thread_privileges("planner", asked.planner_priority, asked.planner_cpus))
                for grant in (*server.grants, *grants):
                    typer.echo(f"{grant.what} {grant.asked}: {grant.reason or 'granted'}")
            server.run()

        from rich.console import Console

        from vla_spec.results import print_table, save
        from vla_spec.serving.summary import summary
        from vla_spec.trace import write_json

        results = save(summary(service, server.tally), folder, shlex.join(["vla-spec", *context.obj]))
        write_json(folder / "serving.json", server.tally.as_json())
        print_table(results, Console())
        typer.echo(folder / "results.json")


def _printed_aside() -> Callable[[str], None]:
    """A way to print that never waits: a terminal that was paused must not pause the server."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work() -> None:
        while True:
            typer.echo(lines.get())

    threading.Thread(target=work, name="vla_spec lines", daemon=True).start()
    return lines.put


@contextmanager
def _stopped_by_signals(server: PlanServer) -> Iterator[None]:
    """SIGINT and SIGTERM end the server in an orderly way."""

    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
