"""LIBERO by its scripted expert: success per task, and what physics, pictures and a reset cost.

    python benchmarks/libero_expert.py [--suite libero_object] [--tasks 0,5] [--states 3] [--out runs/libero-expert]

Needs the extra [libero]. Pictures are drawn every ``--render-every`` control steps, so that success runs stay short;
what the expert does depends on none. Each call is timed twice: on the wall, and in processor time of this process,
which is what it takes on a machine that does nothing else. Writes ``libero_expert.json``.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.errors import UnknownOption
from vla_spec.results import environment, wilson_interval
from vla_spec.robots import libero
from vla_spec.trace import write_json

#: Calls of each kind that are left out of the timings.
WARM_UP = 3
MS = 1e3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--suite", default="libero_object", choices=("libero_object", "libero_10", "libero_90"))
    arguments.add_argument("--tasks", default="", help="numbers in the suite, or names; default: all")
    arguments.add_argument("--states", type=int, default=3, help="initial states per task")
    arguments.add_argument("--cameras", default="agentview,wrist")
    arguments.add_argument("--image-size", type=int, default=224)
    arguments.add_argument("--render-every", type=int, default=20)
    arguments.add_argument("--out", type=Path, default=Path("runs/libero-expert"))
    asked = arguments.parse_args()
    options = libero.Options(suite=asked.suite, cameras=tuple(asked.cameras.split(",")), image_size=asked.image_size)
    offered = libero.tasks(options)
    names = [offered[int(name)] if name.isdecimal() else name for name in asked.tasks.split(",") if name] or offered
    for name in names:
        if name not in offered:
            raise UnknownOption("task", name, offered, "--tasks")

    took: dict[str, list[tuple[float, float]]] = {"reset": [], "step": [], "pictures": [], "observe": [], "expert": []}
    rows = []
    for name in names:
        started = time.perf_counter()
        robot = libero.build(replace(options, task=name))
        opened = time.perf_counter() - started
        steps = []
        for state in range(asked.states):
            _timed(took["reset"], robot.reset, state)
            while robot.step < libero.max_steps(options) and not robot.is_success:
                if robot.step % asked.render_every == 0:
                    _timed(took["observe"], robot.observe, 0)
                    _timed(took["pictures"], robot.render)
                _timed(took["step"], robot.act, _timed(took["expert"], robot.expert_action), 0)
            steps.append(robot.step if robot.is_success else None)
        robot.close()
        rows.append({"task": name, "open_s": round(opened, 2), "steps": steps})
        print(f"{name}: {steps}", flush=True)

    wins = sum(step is not None for row in rows for step in row["steps"])
    tries = len(rows) * asked.states
    low, high = wilson_interval(wins, tries) or (0.0, 1.0)
    timings = {name: _summary(values[WARM_UP:]) for name, values in took.items()}
    result = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": environment(1),
        "suite": asked.suite,
        "cameras": options.cameras,
        "image_size": options.image_size,
        "tasks": rows,
        "success": {"wins": wins, "tries": tries, "low": round(low, 3), "high": round(high, 3)},
        "warm_up_calls": WARM_UP,
        "timings_ms": timings,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "libero_expert.json", result)
    table = Table("", "n", "p50 ms", "p99 ms", "max ms", "cpu p50 ms", "cpu p99 ms", box=SIMPLE_HEAD)
    for name, row in timings.items():
        table.add_row(name, *(str(row[key]) for key in ("n", "p50", "p99", "max", "cpu_p50", "cpu_p99")))
    Console().print(f"expert: {wins} of {tries} ({low:.0%} .. {high:.0%})", table)


def _timed(values: list[tuple[float, float]], call, *arguments):
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call(*arguments)
    values.append((MS * (time.perf_counter() - start), MS * (time.process_time() - cpu_start)))
    return result


def _summary(values: list[tuple[float, float]]) -> dict[str, float | None]:
    if not values:
        return {"n": 0, "p50": None, "p99": None, "max": None, "cpu_p50": None, "cpu_p99": None}
    wall, cpu = np.array(values).T
    found = {"p50": np.percentile(wall, 50), "p99": np.percentile(wall, 99), "max": wall.max()}
    found |= {"cpu_p50": np.percentile(cpu, 50), "cpu_p99": np.percentile(cpu, 99)}
    return {"n": len(values), **{name: round(float(value), 2) for name, value in found.items()}}


if __name__ == "__main__":
    main()
