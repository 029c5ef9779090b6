"""How regular the actor's ticks are: alone, beside the planner in one interpreter, and in a process of its own.

    python benchmarks/actor_jitter.py [--rates 80,200] [--seconds 10] [--repeats 3] [--out runs/actor-jitter]

The shipped policy plans without a pause (execute_horizon 1) for a robot that costs next to nothing, so that what is
measured is the loop and not a simulator. Conditions take turns, so that a slow moment of the machine falls on all of
them. Jitter is the absolute difference between a period and the nominal one. Written: results.json, with every
condition's ticks pooled over the repeats, and a table on stdout.

`--pacing` compares ways to sleep until a time instead (an empty loop, no planner).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import itertools
import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.actor_process import ActorProcess
from vla_spec.assemble import Assembler
from vla_spec.calib.background_load import BackgroundLoad
from vla_spec.config import merge, read_mode, resolve
from vla_spec.realtime import RealtimeOptions, RealtimeRecord, cadence, report, thread_privileges
from vla_spec.results import environment
from vla_spec.robots import toy
from vla_spec.runtime import run_episode
from vla_spec.trace import write_json

WHERES = ("idle, own process", "planner in a thread", "planner in another process")
ROBOT = {"image_size": 96, "instruction": "open the drawer"}
SEED = 1


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rates", default="80,200", help="control rates [Hz]")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of each condition and repeat")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--mode", default="exact", help="decoding mode of the planner")
    arguments.add_argument("--loads", default="0,1", help="busy processes beside it")
    arguments.add_argument("--actor-cpus", default="", help="cores of the actor where privileges are asked for")
    arguments.add_argument("--planner-cpus", default="")
    arguments.add_argument("--out", type=Path, default=Path("runs/actor-jitter"))
    arguments.add_argument("--pacing", action="store_true")
    asked = arguments.parse_args()
    if asked.pacing:
        compare_pacing(asked.seconds)
        return
    rates = [float(rate) for rate in asked.rates.split(",")]
    loads = [int(load) for load in asked.loads.split(",")]
    privileged = RealtimeOptions(actor_cpus=cores(asked.actor_cpus), planner_cpus=cores(asked.planner_cpus))

    tree = {"runtime": {"clock": "real", "execute_horizon": 1, "deadline_ms": 1000.0}}
    config = resolve(merge(read_mode(asked.mode)[1], tree), asked.mode)
    assembler = Assembler()
    robots = {rate: {**ROBOT, "dt_s": 1 / rate} for rate in rates}
    example = toy.build(toy.Options(**robots[rates[0]])).observe(0)
    assembly = assembler.assemble(config, example)
    assembly.policy.plan(example, 1 << 62)  # the first plan warms up
    actors = {rate: ActorProcess("toy", robots[rate], assembly.domain, assembly.policy.space) for rate in rates}
    found: dict[tuple[float, int, bool, str], list[RealtimeRecord]] = {}
    plans: dict[tuple[float, int, bool, str], int] = {}
    conditions = list(itertools.product(rates, loads, (False, True), WHERES))
    try:
        for repeat in range(asked.repeats):
            for load in loads:
                with BackgroundLoad("busy" if load else "idle", load):
                    these = [c for c in conditions if c[1] == load]
                    for condition in these[repeat % len(these) :] + these[: repeat % len(these)]:
                        rate, _, is_privileged, where = condition
                        options = dataclasses.replace(
                            assembly.runtime,
                            max_steps=round(asked.seconds * rate),
                            stop_on_success=False,
                            realtime=privileged if is_privileged else None,
                        )
                        if where == WHERES[1]:
                            robot = toy.build(toy.Options(**robots[rate]))
                            result = run_episode(robot, assembly.policy, assembly.clock, options, SEED)
                        else:
                            policy = None if where == WHERES[0] else assembly.policy
                            result = actors[rate].run_episode(policy, assembly.clock, options, SEED)
                        found.setdefault(condition, []).append(result.realtime)
                        plans[condition] = plans.get(condition, 0) + len(result.plans)
                        print(f"{repeat + 1}/{asked.repeats} {condition}", file=sys.stderr)
    finally:
        for actor in actors.values():
            actor.close()
    rows = [
        {
            "rate_hz": rate, "load": load, "privileges": is_privileged, "where": where,
            "num_plans": plans[rate, load, is_privileged, where], **report(found[rate, load, is_privileged, where]),
        }
        for rate, load, is_privileged, where in conditions
    ]  # fmt: skip
    write_json(
        asked.out / "results.json",
        {
            "kind": "actor_jitter", "rows": rows, "command": shlex.join(sys.argv), "environment": environment(1),
            "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
            "load_average_now": os.getloadavg(),
        },
    )  # fmt: skip
    print_rows(rows)
    print(asked.out / "results.json")


def cores(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def print_rows(rows: list[dict]) -> None:
    table = Table(box=SIMPLE_HEAD, title="Actor's period: jitter [us]", title_justify="left")
    for name in ("Hz", "load", "privileges", "where", "plans", "p50", "p99", "p99.9", "max", "late p99", "faults/tick"):
        table.add_column(name, justify="right")
    for row in rows:
        jitter, late = row["cadence"]["jitter_us"], row["cadence"]["lateness_us"]
        faults = row["actor"]["minor_faults"]["total"] / row["actor"]["num_ticks"] if row["actor"] else 0
        table.add_row(
            f"{row['rate_hz']:g}", str(row["load"]), "yes" if row["privileges"] else "no", row["where"],
            str(row["num_plans"]), *(f"{jitter[name]:.0f}" for name in ("p50", "p99", "p99_9", "max")),
            f"{late['p99']:.0f}", f"{faults:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)


class TimeSpec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def compare_pacing(seconds: float, period_ns: int = 12_500_000) -> None:
    """`time.sleep` for what is left, `clock_nanosleep` with an absolute time, and the latter with a short spin."""
    nanosleep = ctypes.CDLL(None, use_errno=True).clock_nanosleep
    spec = TimeSpec()

    def relative(t_ns: int) -> None:
        while (left_ns := t_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)

    def absolute(t_ns: int) -> None:
        spec.seconds, spec.nanoseconds = divmod(t_ns, 1_000_000_000)
        while nanosleep(time.CLOCK_MONOTONIC, 1, ctypes.byref(spec), None):  # 1 = TIMER_ABSTIME; a signal wakes it
            pass

    def spin(t_ns: int) -> None:
        absolute(t_ns - 300_000)
        while time.monotonic_ns() < t_ns:
            pass

    ways = {"time.sleep": relative, "clock_nanosleep, absolute": absolute, "the same, last 0.3 ms spinning": spin}
    table = Table(box=SIMPLE_HEAD, title=f"Lateness of waking [us], {1e9 / period_ns:g} Hz", title_justify="left")
    for name in ("way", "SCHED_FIFO", "p50", "p99", "p99.9", "max", "jitter p99"):
        table.add_column(name, justify="right")
    late: dict[tuple[str, int], list[np.ndarray]] = {}
    for _, (way, priority) in itertools.product(range(4), itertools.product(ways, (0, 50))):
        with ExitStack() as stack:
            if priority:
                stack.enter_context(thread_privileges("actor", priority, ()))
            next_ns = time.monotonic_ns()
            taken = np.zeros(round(seconds * 1e9 / period_ns / 4), np.int64)
            for i in range(len(taken)):
                next_ns += period_ns
                ways[way](next_ns)
                taken[i] = time.monotonic_ns() - next_ns
        late.setdefault((way, priority), []).append(taken)
    for (way, priority), parts in late.items():
        found = cadence(parts)
        table.add_row(
            way, str(priority), *(f"{found.lateness_us[name]:.1f}" for name in ("p50", "p99", "p99_9", "max")),
            f"{found.jitter_us['p99']:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
