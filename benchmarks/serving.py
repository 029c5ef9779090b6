"""What the network costs: plans by a server in another process against the same plans in this one.

    python benchmarks/serving.py [--plans 600] [--out runs/serving]

For each kind of policy and picture a server process per transport is started: ``ipc``, ``tcp`` on the loopback, and
``tcp`` with CurveZMQ keys. Each observation is planned here and by each server in turn, so that a slow moment of the
machine falls on all of them; nobody plans meanwhile. Times are from handing an observation over to having its chunk:

  plan        in this process: `Policy.plan`
  round trip  by the server: `RemotePlanner.submit` to the chunk in the actor's hand
  added       round trip less the plan as the server measured it, pair by pair: messages, network, queue, wake-ups
  submit      what handing over costs the actor; poll: what looking for the chunk does, whether or not there is one

Writing a request as bytes, and reading and checking it, are timed apart.

With ``--stops N`` a server is stopped N times in the middle of its work (SIGSTOP: no goodbye, the connection stays
open, as with a pulled cable) and killed N times, and the time is measured until the client says `PLANNER_GONE`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from vla_spec.acceptance import greedy
from vla_spec.adapters.vla import PolicyConfig, VLAAdapter
from vla_spec.assemble import Assembler, action_space
from vla_spec.config import merge, read_mode, resolve
from vla_spec.controllers import fixed
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.drafters.none import NoDrafter
from vla_spec.engines import toy
from vla_spec.interfaces import ChunkHistory
from vla_spec.policy import Policy
from vla_spec.realtime import thread_privileges
from vla_spec.results import environment
from vla_spec.runtime import PlanRequest
from vla_spec.serving.client import ClientOptions, Link, RemotePlanner
from vla_spec.serving.keys import ClientKeys, ServerKeys, make_keys, read_pair, read_public
from vla_spec.serving.server import PlanServer, ServerOptions
from vla_spec.serving.service import build_service
from vla_spec.serving.wire import Ask, Sizes, Welcome, decode_request, encode
from vla_spec.tokenizers import uniform_bins
from vla_spec.trace import write_json
from vla_spec.types import Observation

FAR_NS = 3_600_000_000_000
#: name -> cameras and picture size of a toy policy; None = the shipped one.
KINDS = {"toy 3x96x96x3": (3, 96), "toy 2x224x224x3": (2, 224), "shipped 3x96x96x3": None}
TRANSPORTS = ("ipc", "tcp", "tcp, keys")
PATIENCE_S = 60.0
#: SCHED_FIFO priority of all that plans or carries messages; set by the command line, 0 = none.
PRIORITY = [0]


class Served(NamedTuple):
    """A policy, and what a server says about it."""

    policy: Policy
    welcome: Welcome


def built(kind: str, mode: str) -> Served:
    """The policy of this name, in this process."""
    pictures = KINDS[kind]
    if pictures is None:
        tree = merge(read_mode(mode)[1], {"robot": "toy", "runtime": {"clock": "real"}})
        service = build_service(resolve(tree, mode), 1, 0.0125, Assembler())
        return Served(service.policies[0], service.welcome)
    cameras, size = pictures
    config = PolicyConfig(
        image_size=size, num_cameras=cameras, state_size=4, horizon=8, action_size=4, max_words=8,
        vocabulary=("<pad>", "<unknown>", "close", "the", "drawer"), tokenizer={"name": "uniform_bins"},
        never_relaxed_dofs=(3,), groups=(0, 0, 0, 1), state_low=(-1.0,) * 4, state_high=(1.0,) * 4,
    )  # fmt: skip
    adapter = VLAAdapter(config, uniform_bins.build(uniform_bins.Options()))
    engine = toy.ToyEngine(toy.Options(), adapter.domain)
    rule, controller = greedy.build(greedy.Options(), None), fixed.build(fixed.Options(), None)
    num_tokens = adapter.domain.num_tokens
    decoder = SpeculativeDecoder(
        engine, NoDrafter(), rule, controller, num_tokens, time.monotonic_ns, np.random.default_rng(0)
    )
    policy = Policy(adapter, decoder, action_space(adapter.domain), time.monotonic_ns)
    sizes = Sizes((cameras, size, size, 3), 4, 8, 4, num_tokens, 4, adapter.domain.vocab_size)
    info = engine.info
    welcome = Welcome(
        "autoregressive", "toy", "none", "greedy", "fixed", info.precision, True, info.model_hash, 0.0125, sizes,
        policy.space, None,
    )  # fmt: skip
    return Served(policy, welcome)


def serve(kind: str, mode: str, bind: str, keys: Path | None, priority: int) -> None:
    """The server's process: prints its address, serves until it is told to end."""
    served = built(kind, mode)
    allowed = None
    if keys is not None:
        allowed = ServerKeys(read_pair(keys / "server.key_secret"), {read_public(keys / "client.key"): "client"})
    options = ServerOptions(bind, io_priority=priority + 1 if priority else 0)
    server = PlanServer(served.welcome, [served.policy], options, allowed, time.monotonic_ns)
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    server.start()
    print(server.address, flush=True)
    with thread_privileges("planner", priority, ()):
        server.run()


class Process:
    """A server in a process of its own, and a client of it."""

    def __init__(self, kind: str, mode: str, transport: str, folder: Path, **patience: float) -> None:
        bind = f"ipc://{folder}/{kind.split()[0]}{len(kind)}" if transport == "ipc" else "tcp://127.0.0.1:*"
        has_keys = "keys" in transport
        line = [sys.executable, __file__, "--serve", bind, "--kind", kind, "--mode", mode]
        line += ["--priority", str(PRIORITY[0])]
        self.process = subprocess.Popen(
            [*line, *(["--keys", str(folder)] if has_keys else [])], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        address = self.process.stdout.readline().strip()
        keys = None
        if has_keys:
            keys = ClientKeys(read_pair(folder / "client.key_secret"), read_public(folder / "server.key"))
        self.client = RemotePlanner(ClientOptions(address, io_priority=PRIORITY[0], **patience), keys=keys)
        self.client.connect(PATIENCE_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(PATIENCE_S)


def requests(welcome: Welcome, num: int) -> list[PlanRequest]:
    """Pictures of noise, as large as real ones and never twice the same; every second one has a history."""
    rng, sizes = np.random.default_rng(1), welcome.sizes
    made = []
    for number in range(num):
        images = rng.integers(0, 256, sizes.image_shape, np.uint8)
        state = np.array([0.0, 0.6, 0.2, 0.5], np.float32)
        seen = Observation(images, state, "close the drawer", 0, 4 * number)
        history = ChunkHistory(rng.integers(100, 156, sizes.num_tokens).astype(np.int32), 16) if number % 2 else None
        made.append(PlanRequest(seen, 0, history))
    return made


def measure(kind: str, mode: str, num_plans: int, num_warmup: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """One kind of policy: condition -> figure -> times [ns]."""
    here = built(kind, mode)
    pool = requests(here.welcome, 16)
    found: dict[str, dict[str, list[int]]] = {"here": {"plan": []}}
    with ExitStack() as stack:
        servers = {t: stack.enter_context(Process(kind, mode, t, folder)) for t in TRANSPORTS}
        for transport in TRANSPORTS:
            found[transport] = {name: [] for name in ("round trip", "plan", "added", "submit", "poll")}
        for i in range(num_warmup + num_plans):
            request = pool[i % len(pool)]
            order = ["here", *TRANSPORTS]
            for name in order[i % 4 :] + order[: i % 4]:
                start_ns = time.monotonic_ns()
                asked = request._replace(deadline_ns=start_ns + FAR_NS)
                if name == "here":
                    here.policy.plan(*asked)
                    times = {"plan": time.monotonic_ns() - start_ns}
                else:
                    times = by_server(servers[name].client, asked)
                if i >= num_warmup:
                    for figure, ns in times.items():
                        found[name][figure].append(ns)
    arrays = {name: {figure: np.array(ns) for figure, ns in of.items()} for name, of in found.items()}
    return {**arrays, "messages": codec(here.welcome)}


def by_server(client: RemotePlanner, request: PlanRequest) -> dict[str, int]:
    """One plan by a server."""
    start_ns = time.monotonic_ns()
    client.submit(request)
    submit_ns = time.monotonic_ns() - start_ns
    client.poll(start_ns)
    poll_ns = time.monotonic_ns() - start_ns - submit_ns
    assert client.wait(PATIENCE_S), client.trouble
    chunk = client.poll(time.monotonic_ns())
    took_ns = time.monotonic_ns() - start_ns
    assert chunk is not None
    timing = client.timings[-1]
    return {
        "round trip": took_ns, "plan": timing.plan_ns, "added": took_ns - timing.plan_ns, "submit": submit_ns,
        "poll": poll_ns,
    }  # fmt: skip


def codec(welcome: Welcome, num: int = 500) -> dict[str, np.ndarray]:
    """Writing a request as bytes, and reading and checking it [ns]."""
    request = requests(welcome, 2)[1]
    ask = Ask(1, 0, FAR_NS, 0, request.observation, request.history)
    frame, times = encode(ask), {"write": [], "read": []}
    for _ in range(num):
        start_ns = time.monotonic_ns()
        encode(ask)
        written_ns = time.monotonic_ns()
        decode_request(frame, welcome.sizes)
        times["write"].append(written_ns - start_ns)
        times["read"].append(time.monotonic_ns() - written_ns)
    return {name: np.array(ns) for name, ns in times.items()}


def losses(num: int, folder: Path) -> dict[str, np.ndarray]:
    """How long until a client notices that its server stopped, or was killed [ns]; default patience."""
    kind, found = "toy 3x96x96x3", {"stopped": [], "killed": []}
    with Process(kind, "exact", "tcp", folder) as server:
        for _ in range(num):
            os.kill(server.process.pid, signal.SIGSTOP)
            found["stopped"].append(until_gone(server.client))
            os.kill(server.process.pid, signal.SIGCONT)
            assert server.client.wait_for(Link.READY, PATIENCE_S) is Link.READY
    for _ in range(num):
        with Process(kind, "exact", "tcp", folder) as server:
            os.kill(server.process.pid, signal.SIGKILL)
            found["killed"].append(until_gone(server.client))
    return {name: np.array(ns) for name, ns in found.items()}


def until_gone(client: RemotePlanner) -> int:
    """Time until the client says so [ns]."""
    start_ns = time.monotonic_ns()
    assert client.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
    return time.monotonic_ns() - start_ns


def ms(ns: np.ndarray, q: float) -> float:
    """A quantile in ms."""
    return round(float(np.percentile(ns, q)) / 1e6, 4)


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--plans", type=int, default=600)
    arguments.add_argument("--warm-up", type=int, default=50)
    arguments.add_argument("--stops", type=int, default=0)
    arguments.add_argument("--mode", default="exact", help="of the shipped policy")
    arguments.add_argument("--kinds", default=",".join(KINDS))
    arguments.add_argument("--out", type=Path, default=Path("runs/serving"))
    arguments.add_argument("--priority", type=int, default=0, help="SCHED_FIFO for all that plans or carries messages")
    arguments.add_argument("--serve", help=argparse.SUPPRESS)
    arguments.add_argument("--kind", help=argparse.SUPPRESS)
    arguments.add_argument("--keys", type=Path, help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.serve:
        serve(asked.kind, asked.mode, asked.serve, asked.keys, asked.priority)
        return
    rows, console = [], Console(width=110)
    PRIORITY[0] = asked.priority
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        for grant in stack.enter_context(thread_privileges("here", asked.priority, ())):
            print(f"{grant.what} {grant.asked}: {grant.reason or 'granted'}", file=sys.stderr)
        folder = Path(name)
        for owner in ("server", "client"):
            make_keys(folder, owner)
        for kind in asked.kinds.split(","):
            found = measure(kind, asked.mode, asked.plans, asked.warm_up, folder)
            for condition, figures in found.items():
                quantiles = {
                    figure: {f"p{q:g}": ms(ns, q) for q in (50, 90, 99, 100)} | {"n": len(ns)}
                    for figure, ns in figures.items()
                }
                rows.append({"kind": kind, "condition": condition, "ms": quantiles})
            print(f"{kind}: done", file=sys.stderr)
        lost = losses(asked.stops, folder) if asked.stops else {}
    table = Table("policy, pictures", "where", "plan p50", "p99", "round trip p50", "p99", "added p50", "p99",
                  "submit p99", "poll p99")  # fmt: skip
    for row in rows:
        cells = [row["kind"], row["condition"]]
        for figure in ("plan", "round trip", "added"):
            of = row["ms"].get(figure)
            cells += ["-", "-"] if of is None else [f"{of['p50']:.2f}", f"{of['p99']:.2f}"]
        cells += [f"{row['ms'][f]['p99']:.3f}" if f in row["ms"] else "-" for f in ("submit", "poll")]
        if row["condition"] != "messages":
            table.add_row(*cells)
    console.print(table)
    for row in rows:
        if row["condition"] == "messages":
            console.print(f"{row['kind']}: a request {row['ms']}", highlight=False)
    of_losses = {name: {f"p{q:g}": ms(ns, q) for q in (0, 50, 100)} | {"n": len(ns)} for name, ns in lost.items()}
    for name, of in of_losses.items():
        console.print(f"server {name}: PLANNER_GONE after {of}", highlight=False)
    write_json(asked.out / "results.json", {
        "kind": "serving", "unit": "ms", "rows": rows, "until_gone": of_losses, "num_warm_up": asked.warm_up,
        "command": shlex.join(sys.argv), "environment": environment(1),
        "priority": asked.priority,
        "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
    })  # fmt: skip
    print(asked.out / "results.json")


if __name__ == "__main__":
    main()
