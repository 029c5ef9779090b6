"""The seam between chunks: how far the command jumps where a new chunk takes over, for each kind of hand-over.

    python benchmarks/hand_over.py [--tasks drawer-close,...] [--episodes 3] [--out runs/hand-over]

Meta-World on a virtual clock: latencies are drawn from a stated cost table (`COSTS_MS` and its spread, times
``--slow``), so that kinds differ by nothing but the hand-over and a run repeats exactly. A seam is a control step
whose chunk is another than the step before; its jump is the largest change of the three translations, in millimetres
per control step. ``inside`` is the same where the chunk stays. Jumps are those of episodes that every kind solved: an
arm that stands still makes none.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shlex
import sys
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.assemble import Assembler
from vla_spec.chunks import ChunkOptions, HandOver
from vla_spec.config import merge, read_mode, resolve
from vla_spec.costs import Costs
from vla_spec.evaluation import first_observation
from vla_spec.results import environment, number, wilson_interval
from vla_spec.runtime import EpisodeResult, run_episode
from vla_spec.trace import write_json
from vla_spec.types import Provenance

MM_PER_UNIT = 10.0  # an action of 1 is a centimetre
#: Medians of the shipped policy on the idle two-core machine [ms], and the spread that is given to all of them.
COSTS_MS = {
    "prefill": 7.5,
    "step": {1: 2.1, 8: 3.3, 16: 4.8, 32: 8.1},
    "draft": {1: 0.4, 31: 0.6},
}
SPREAD = {0.1: 0.95, 0.5: 1.0, 0.9: 1.15, 0.99: 1.5, 1.0: 2.0}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tasks", default="drawer-close,button-press,faucet-open,push")
    arguments.add_argument("--episodes", type=int, default=3)
    arguments.add_argument("--seed-start", type=int, default=10_000)
    arguments.add_argument("--max-steps", type=int, default=150)
    arguments.add_argument("--mode", default="exact")
    arguments.add_argument("--slow", type=float, default=1.0, help="factor on all latencies")
    arguments.add_argument("--out", type=Path, default=Path("runs/hand-over"))
    asked = arguments.parse_args()
    tasks = asked.tasks.split(",")

    tree = {"runtime": {"clock": "virtual", "deadline_ms": 200.0 * asked.slow}}
    config = resolve(merge(read_mode(asked.mode)[1], tree), asked.mode)
    assembler = Assembler()
    example = first_observation(assembler, config.robot, tasks[0], asked.seed_start)
    costs = stated_costs(asked.slow)
    found: dict[str, list[EpisodeResult]] = {kind.value: [] for kind in HandOver}
    for task in tasks:
        robot = assembler.robot(config.robot, task)
        for seed in range(asked.seed_start, asked.seed_start + asked.episodes):
            for kind in HandOver:
                # Built anew each time: every episode draws the same latencies.
                assembly = assembler.assemble(config, example, costs)
                options = dataclasses.replace(
                    assembly.runtime, max_steps=asked.max_steps, chunks=ChunkOptions(hand_over=kind)
                )
                result = run_episode(robot, assembly.policy, assembly.clock, options, seed)
                found[kind.value].append(result)
                print(f"{task} {seed} {kind.value}: {'success' if result.success else 'failure'}", file=sys.stderr)
        robot.close()
    solved = [all(results[i].success for results in found.values()) for i in range(len(tasks) * asked.episodes)]
    rows = [
        {
            "hand_over": kind,
            "successes_by_task": {
                task: sum(result.success for result in results[t * asked.episodes : (t + 1) * asked.episodes])
                for t, task in enumerate(tasks)
            },
            **figures(results, solved),
        }
        for kind, results in found.items()
    ]
    write_json(
        asked.out / "results.json",
        {
            "kind": "hand_over", "rows": rows, "tasks": tasks, "costs": costs.as_json(),
            "command": shlex.join(sys.argv), "environment": environment(1),
            "created": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
        },
    )  # fmt: skip
    table = Table(box=SIMPLE_HEAD, title="Jump of the command [mm per control step]", title_justify="left")
    for name in ("hand-over", "success", "delay", "seams", "p50", "p90", "p99", "max", "inside p50", "p99", "max"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["hand_over"], f"{row['successes']}/{row['episodes']}", f"{row['delay_steps_mean']:.2f}",
            str(row["num_seams"]), *(number(row["seam_mm"][q], 2) for q in ("p50", "p90", "p99", "max")),
            *(number(row["inside_mm"][q], 2) for q in ("p50", "p99", "max")),
        )  # fmt: skip
    Console(width=140).print(table)
    print(asked.out / "results.json")


def stated_costs(factor: float) -> Costs:
    """`COSTS_MS` with `SPREAD`, times a factor."""

    def spread(ms: float) -> dict[float, float]:
        return {q: ms * 1e6 * share * factor for q, share in SPREAD.items()}

    return Costs(
        spread(COSTS_MS["prefill"]),
        {size: spread(ms) for size, ms in COSTS_MS["step"].items()},
        {size: spread(ms) for size, ms in COSTS_MS["draft"].items()},
    )


def figures(results: list[EpisodeResult], solved: list[bool]) -> dict:
    """Successes of all episodes, jumps of those that every kind solved; commands without a plan are left out."""
    seams, inside = [np.empty(0)], [np.empty(0)]
    for result in (result for result, is_solved in zip(results, solved, strict=True) if is_solved):
        jump = np.abs(np.diff(result.actions[:, :3], axis=0)).max(axis=1) * MM_PER_UNIT
        is_planned = result.provenance != Provenance.HOLD
        counts = is_planned[1:] & is_planned[:-1]
        is_seam = result.chunk_ids[1:] != result.chunk_ids[:-1]
        seams.append(jump[counts & is_seam])
        inside.append(jump[counts & ~is_seam])
    successes = sum(result.success for result in results)
    return {
        "episodes": len(results), "episodes_with_jumps": sum(solved), "successes": successes,
        "success_ci95": wilson_interval(successes, len(results)),
        "num_seams": sum(map(len, seams)), "seam_mm": quantiles(seams), "inside_mm": quantiles(inside),
        "delay_steps_mean": float(np.concatenate([result.delay_steps[1:] for result in results]).mean()),
        "num_steps_mean": float(np.mean([result.num_steps for result in results])),
        "num_holds": sum(result.num_holds for result in results),
    }  # fmt: skip


def quantiles(parts: list[np.ndarray]) -> dict[str, float | None]:
    values = np.concatenate(parts)
    levels = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    if not len(values):
        return dict.fromkeys(levels)
    return {name: round(float(np.percentile(values, level)), 4) for name, level in levels.items()}


if __name__ == "__main__":
    main()
