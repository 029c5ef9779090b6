"""The deadline controller against every fixed draft length, the adaptive one and two oracles, on the same traces.

    python benchmarks/deadline_controllers.py [--chunks 4000] [--worlds all] [--deadlines-ms 20,26,32,40] [--out FILE]

A virtual clock and recorded acceptance: chunks are drawn in runs of consecutive ones from `acceptance.json` (block-head
drafts of the shipped policy, exact verification), and calls take what the shipped policy takes on a two-core machine,
times a disturbance that is drawn once per chunk and call, the same for all controllers. docs/deadline-controller.md
says what the numbers mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from vla_spec import plugins
from vla_spec.costs import Costs
from vla_spec.interfaces import DeadlineController
from vla_spec.oracle import best_tokens, expected_tokens
from vla_spec.plugins import Parts
from vla_spec.results import environment, wilson_interval
from vla_spec.trace import write_json
from vla_spec.types import Round, TokenDomain

MS = 1e6
#: Medians of the shipped policy, ONNX Runtime, one thread [ms].
PREFILL_MS, STEP_MS, DRAFT_MS = 7.5, {1: 2.1, 2: 2.3, 4: 2.6, 8: 3.3, 16: 4.8, 32: 8.1}, {1: 0.4, 31: 0.6}
#: Of judging and committing, each round [ms].
HOST_MS = 0.1
#: Spread of the undisturbed machine, as the table states it: standard deviation of the log.
IDLE_SPREAD = 0.03
QUANTILES = {0.1: -1.2816, 0.5: 0.0, 0.9: 1.2816, 0.99: 2.3263, 0.999: 3.0902}
MAX_STEP, MOST_ROUNDS, NUM_TOKENS = 32, 31, 32
MAX_LATE = 1e-3
FIXED = tuple(range(17))
WARM_UP = 100  # chunks at the start of each trace that count for nobody


class World(NamedTuple):
    """Disturbances. factor, extra_ms: float64 [chunks, calls], call 0 is the prefill: time * factor + extra.

    regime: float64 [chunks, calls], the part of the factor that an ideal observer knows; noise: of the rest, float64
    [many, 2] draws of (factor, extra) for the feasibility of the bound.
    """

    factor: np.ndarray
    extra_ms: np.ndarray
    regime: np.ndarray
    noise: np.ndarray


def _log_normal(spread: float) -> Callable[[np.random.Generator, tuple[int, ...]], tuple[np.ndarray, np.ndarray]]:
    return lambda rng, shape: (rng.lognormal(0.0, spread, shape), np.zeros(shape))


def _constant(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(shape), np.zeros(shape)


def _spikes(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One call in a hundred takes two to four times as long."""
    is_spike = rng.random(shape) < 0.01
    return rng.lognormal(0.0, IDLE_SPREAD, shape) * np.where(is_spike, rng.uniform(2, 4, shape), 1.0), np.zeros(shape)


def _stalls(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One call in ten thousand stops for 50 to 200 ms."""
    is_stall = rng.random(shape) < 1e-4
    return rng.lognormal(0.0, IDLE_SPREAD, shape), np.where(is_stall, rng.uniform(50, 200, shape), 0.0)


def _steady(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.ones(shape)


def _drift(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Up to 1.6 times slower and back, every 2,000 chunks."""
    phase = 2 * np.pi * np.arange(shape[0]) / 2000
    return np.broadcast_to(1.3 - 0.3 * np.cos(phase)[:, None], shape)


def _thermal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """From one chunk to the next 1.5 times slower, for half of every 2,000 chunks."""
    chunk = np.arange(shape[0]) % 2000
    return np.broadcast_to(np.where((chunk >= 500) & (chunk < 1500), 1.5, 1.0)[:, None], shape)


def _contention(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Another process comes and goes: 1.6 times slower for twenty calls in a hundred, on average."""
    calls = 8  # of a chunk: the process goes on while the robot acts on the chunk
    state = np.empty((shape[0], shape[1]), bool)
    is_busy = False
    draws = rng.random(shape)
    for chunk in range(shape[0]):
        row, chance = state[chunk], draws[chunk].tolist()
        for call in range(calls):
            is_busy = chance[call] >= 0.05 if is_busy else chance[call] < 0.0125
            row[call] = is_busy
        row[calls:] = is_busy
    return np.where(state, 1.6, 1.0)


WORLDS: dict[str, tuple[Any, Any]] = {
    "constant": (_steady, _constant),
    "log-normal": (_steady, _log_normal(0.1)),
    "spikes": (_steady, _spikes),
    "stalls": (_steady, _stalls),
    "drift": (_drift, _log_normal(IDLE_SPREAD)),
    "thermal": (_thermal, _log_normal(IDLE_SPREAD)),
    "contention": (_contention, _log_normal(0.05)),
}


def make_world(name: str, num_chunks: int, seed: int) -> World:
    regime_of, noise_of = WORLDS[name]
    rng = np.random.default_rng([seed, sorted(WORLDS).index(name)])
    shape = num_chunks, 1 + MOST_ROUNDS
    regime = regime_of(rng, shape)
    factor, extra = noise_of(rng, shape)
    noise = np.stack(noise_of(rng, (400_000, 2)), axis=-1)
    return World(regime * factor, extra, regime, noise)


def infeasibility(world: World, budget_ms: float) -> np.ndarray:
    """P(prefill + one plain round > budget) for every chunk, by somebody who knows the regime. float64 [chunks]."""
    regime = world.regime[:, :2].max(axis=1)
    calls = np.array([PREFILL_MS, STEP_MS[1] + HOST_MS])
    chance = np.empty(len(regime))
    for level in np.unique(np.round(regime, 2)):
        took = (world.noise[..., 0] * calls * level + world.noise[..., 1]).sum(axis=1)
        chance[np.round(regime, 2) == level] = (took > budget_ms).mean()
    return chance


@dataclass(frozen=True)
class Trace:
    """What the drafts of each chunk are worth. accepted, offered: int [chunks][T]."""

    accepted: list[list[int]]
    offered: list[list[int]]
    survival: np.ndarray  # [T, T] P(accepted >= d | m), over the trace


def make_trace(path: Path, num_chunks: int, confidence: str | None, seed: int) -> Trace:
    """Runs of 8 consecutive recorded chunks of one task, drawn with replacement."""
    chunks = json.loads(path.read_text(encoding="utf-8"))["chunks"]
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < num_chunks:
        first = int(rng.integers(len(chunks)))
        task = chunks[first]["task"]
        order += [i for i in range(first, min(first + 8, len(chunks))) if chunks[i]["task"] == task]
    accepted = [chunks[i]["accepted"] for i in order[:num_chunks]]
    whole = [[NUM_TOKENS] * NUM_TOKENS] * num_chunks
    offered = whole if confidence is None else [chunks[i]["offered"][confidence] for i in order[:num_chunks]]
    got = np.minimum(accepted, offered)
    survival = (got[:, :, None] >= np.arange(NUM_TOKENS)).mean(axis=0)
    return Trace(accepted, offered, survival)


STEP = np.interp(np.arange(NUM_TOKENS + 1), list(STEP_MS), list(STEP_MS.values())).tolist()
DRAFT = [0.0, *np.interp(np.arange(1, NUM_TOKENS + 1), list(DRAFT_MS), list(DRAFT_MS.values())).tolist()]


def cost_table() -> Costs:
    """As calibrated on the undisturbed machine."""

    def spread(ms: float) -> dict[float, float]:
        return {q: ms * MS * math.exp(IDLE_SPREAD * z) for q, z in QUANTILES.items()}

    return Costs(
        spread(PREFILL_MS), {n: spread(ms) for n, ms in STEP_MS.items()}, {n: spread(ms) for n, ms in DRAFT_MS.items()}
    )


class Outcome(NamedTuple):
    """Of one controller on one trace. float [chunks] each."""

    in_time: np.ndarray  # tokens verified in rounds that ended before the deadline
    is_late: np.ndarray
    is_complete: np.ndarray
    is_refused: np.ndarray


def play(controller: DeadlineController, trace: Trace, world: World, budget_ms: float) -> Outcome:
    """The decode loop in virtual time, without an engine."""
    num_chunks = len(trace.accepted)
    in_time, late, complete, refused = (np.zeros(num_chunks) for _ in range(4))
    budget_ns = round(budget_ms * MS)
    for chunk in range(num_chunks):
        factors, extras = world.factor[chunk].tolist(), world.extra_ms[chunk].tolist()
        accepted, offered = trace.accepted[chunk], trace.offered[chunk]
        if not controller.begin(budget_ns):
            refused[chunk] = 1
            continue
        now_ns = round((PREFILL_MS * factors[0] + extras[0]) * MS)
        controller.record(Round(0, 0, 0, 0, now_ns, 0, 0, now_ns))
        if now_ns > budget_ns:
            late[chunk] = 1
            continue
        m, call = 1, 1
        while m < NUM_TOKENS:
            plan = controller.plan(budget_ns - now_ns, NUM_TOKENS - m)
            if plan is None:
                break
            gamma = min(plan.gamma, plan.depth, NUM_TOKENS - m - 1)
            drafted = min(gamma, offered[m]) if gamma > 0 else 0
            gained = min(drafted, accepted[m])
            draft_ns = int(DRAFT[max(gamma, 0)] * factors[call] * MS)
            host_ns = int(HOST_MS * factors[call] * MS)
            step_ns = int((STEP[drafted + 1] * factors[call] + extras[call]) * MS)
            total_ns = draft_ns + step_ns + host_ns
            now_ns += total_ns
            controller.record(Round(drafted, gained, 0, draft_ns, step_ns, host_ns, 0, total_ns))
            if now_ns > budget_ns:
                late[chunk] = 1
                break
            m, call = m + gained + 1, call + 1
        in_time[chunk], complete[chunk] = m, m >= NUM_TOKENS
    return Outcome(in_time, late, complete, refused)


def oracles(trace: Trace, world: World, budget_ms: float, which: range) -> tuple[np.ndarray, np.ndarray]:
    """Of some chunks: tokens of who knows everything, and expected of who knows latencies and the law of acceptance."""
    all_known, latency_known = [], []
    for chunk in which:
        factor, extra = world.factor[chunk].tolist(), world.extra_ms[chunk].tolist()

        def step_ms(index: int, n: int, factor: list[float] = factor, extra: list[float] = extra) -> float:
            return (STEP[n] + HOST_MS) * factor[index + 1] + extra[index + 1]

        def draft_ms(index: int, gamma: int, factor: list[float] = factor) -> float:
            return DRAFT[gamma] * factor[index + 1]

        case = PREFILL_MS * factor[0] + extra[0], step_ms, draft_ms
        all_known.append(best_tokens(*case, trace.accepted[chunk], budget_ms, NUM_TOKENS, MAX_STEP))
        latency_known.append(expected_tokens(*case, trace.survival, budget_ms, NUM_TOKENS, 17, 0.1))
    return np.array(all_known), np.array(latency_known)


def figures(outcome: Outcome, is_feasible: np.ndarray, which: range, best: tuple[np.ndarray, np.ndarray]) -> dict:
    counted = slice(WARM_UP, None)
    late, feasible = outcome.is_late[counted], is_feasible[counted]
    num_late, num_feasible = int(late[feasible].sum()), int(feasible.sum())
    of_sample = float(outcome.in_time[list(which)].sum())
    return {
        "late_rate": float(late.mean()),
        "late_feasible": num_late,
        "feasible_chunks": num_feasible,
        "late_feasible_rate": num_late / num_feasible if num_feasible else None,
        "late_feasible_ci95": wilson_interval(num_late, num_feasible),
        "tokens_by_deadline": float(outcome.in_time[counted].mean()),
        "tokens_in_chunks_on_time": float((outcome.in_time * (1 - outcome.is_late))[counted].mean()),
        "complete_rate": float((outcome.is_complete * (1 - outcome.is_late))[counted].mean()),
        "refused_rate": float(outcome.is_refused[counted].mean()),
        "of_oracle": of_sample / float(best[0].sum()) if best[0].sum() else None,
        "of_latency_oracle": of_sample / float(best[1].sum()) if best[1].sum() else None,
    }


def build(name: str, parts: Parts, **options: Any) -> DeadlineController:
    plugin = plugins.load("controller", name)
    controller: DeadlineController = plugin.build(plugin.options(**options), parts)
    return controller


class Timed:
    """A controller with a stopwatch at each method."""

    def __init__(self, controller: DeadlineController) -> None:
        self._controller = controller
        self.ns: dict[str, list[int]] = {"begin": [], "plan": [], "record": []}

    def begin(self, remaining_ns: int, history: object = None) -> bool:
        start = time.perf_counter_ns()
        answer = self._controller.begin(remaining_ns)
        self.ns["begin"].append(time.perf_counter_ns() - start)
        return answer

    def plan(self, remaining_ns: int, tokens_left: int) -> Any:
        start = time.perf_counter_ns()
        answer = self._controller.plan(remaining_ns, tokens_left)
        self.ns["plan"].append(time.perf_counter_ns() - start)
        return answer

    def record(self, measured: Round) -> None:
        start = time.perf_counter_ns()
        self._controller.record(measured)
        self.ns["record"].append(time.perf_counter_ns() - start)


def overhead(parts: Parts, trace: Trace, world: World, budget_ms: float) -> dict[str, dict[str, float]]:
    """What the deadline controller itself takes, wall clock [us]; the first tenth is left out."""
    timed = Timed(build("deadline", parts, max_late=MAX_LATE))
    play(timed, trace, world, budget_ms)
    return {
        method: {
            "n": len(ns) - len(ns) // 10,
            **{f"p{q}": float(np.percentile(ns[len(ns) // 10 :], q)) / 1e3 for q in (50, 90, 99)},
        }
        for method, ns in timed.ns.items()
    }


def compare(
    trace: Trace, world: World, budget_ms: float, parts: Parts, fixed: Sequence[int], num_oracle: int
) -> dict[str, dict]:
    """All controllers on one trace: name -> figures."""
    num_chunks = len(trace.accepted)
    is_feasible = infeasibility(world, budget_ms) <= MAX_LATE
    which = range(WARM_UP, num_chunks, max(1, (num_chunks - WARM_UP) // num_oracle))
    best = oracles(trace, world, budget_ms, which)
    controllers = {
        "deadline": lambda: build("deadline", parts, max_late=MAX_LATE),
        "adaptive": lambda: build("adaptive", parts),
        **{f"fixed {gamma}": (lambda gamma=gamma: build("fixed", parts, gamma=gamma)) for gamma in fixed},
    }
    rows = {
        name: figures(play(make(), trace, world, budget_ms), is_feasible, which, best)
        for name, make in controllers.items()
    }
    rows["oracle"] = {
        "tokens_by_deadline": float(best[0].mean()),
        "complete_rate": float((best[0] == NUM_TOKENS).mean()),
    }
    rows["latency oracle"] = {"tokens_by_deadline": float(best[1].mean())}
    return rows


def best_fixed(rows: dict[str, dict], key: str) -> str:
    return max((name for name in rows if name.startswith("fixed")), key=lambda name: rows[name][key])


def table(title: str, cells: list[tuple[str, float, dict[str, dict]]]) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in (
        "world", "deadline\nms", "late of\nfeasible", "late\nof all", "tokens by\ndeadline", "whole\nchunks",
        "of\noracle", "of latency\noracle", "tokens in\nchunks on time", "best fixed of\nthese, tokens",
        "best fixed by\ndeadline, tokens, late", "adaptive\ntokens, late",
    ):  # fmt: skip
        shown.add_column(column, justify="left" if column == "world" else "right")
    for world, budget_ms, rows in cells:
        ours, adaptive = rows["deadline"], rows["adaptive"]
        on_time, by_deadline = best_fixed(rows, "tokens_in_chunks_on_time"), best_fixed(rows, "tokens_by_deadline")
        rate = ours["late_feasible_rate"]
        late = "infeasible" if rate is None else f"{1e3 * rate:.2f} e-3 ({ours['late_feasible']})"
        shown.add_row(
            world, f"{budget_ms:g}", late, f"{1e3 * ours['late_rate']:.2f} e-3", f"{ours['tokens_by_deadline']:.2f}",
            f"{ours['complete_rate']:.0%}", f"{ours['of_oracle']:.3f}", f"{ours['of_latency_oracle']:.3f}",
            f"{ours['tokens_in_chunks_on_time']:.2f}",
            f"{rows[on_time]['tokens_in_chunks_on_time']:.2f} ({on_time[6:]})",
            f"{rows[by_deadline]['tokens_by_deadline']:.2f} ({by_deadline[6:]}), "
            f"{rows[by_deadline]['late_rate']:.0%}",
            f"{adaptive['tokens_by_deadline']:.2f}, {adaptive['late_rate']:.0%}",
        )  # fmt: skip
    return shown


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--chunks", type=int, default=4000)
    arguments.add_argument("--worlds", default="all", help=f"of {', '.join(WORLDS)}")
    arguments.add_argument("--deadlines-ms", default="20,26,32,40")
    arguments.add_argument(
        "--drafters",
        default="obedient,confident",
        help="obedient: offers what it is asked for; confident: stops at 15 %% confidence",
    )
    arguments.add_argument("--fixed", default=",".join(map(str, FIXED)))
    arguments.add_argument("--oracle-chunks", type=int, default=300, help="chunks that the oracles are asked about")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--acceptance", type=Path, default=Path(__file__).with_name("acceptance.json"))
    arguments.add_argument("--out", type=Path, default=Path("runs/deadline-controllers.json"))
    asked = arguments.parse_args()

    worlds = list(WORLDS) if asked.worlds == "all" else asked.worlds.split(",")
    deadlines = [float(ms) for ms in asked.deadlines_ms.split(",")]
    fixed = [int(gamma) for gamma in asked.fixed.split(",")]
    domain = TokenDomain(
        256, NUM_TOKENS, 4, np.zeros(NUM_TOKENS, np.int32), np.zeros(NUM_TOKENS, bool), np.ones(NUM_TOKENS, np.float32)
    )
    parts = Parts(domain, None, costs=cost_table())  # type: ignore[arg-type]
    console = Console(width=200)
    results: dict[str, Any] = {
        "command": f"benchmarks/deadline_controllers.py --chunks {asked.chunks} --worlds {asked.worlds} --deadlines-ms "
        f"{asked.deadlines_ms} --drafters {asked.drafters} --fixed {asked.fixed} --seed {asked.seed}",
        "date": datetime.date.today().isoformat(),
        "machine": environment(1),
        "max_late": MAX_LATE,
        "cells": [],
    }
    for drafter in asked.drafters.split(","):
        confidence = {"obedient": None, "confident": "0.15"}[drafter]
        trace = make_trace(asked.acceptance, asked.chunks, confidence, asked.seed)
        cells = []
        for name in worlds:
            world = make_world(name, asked.chunks, asked.seed)
            for budget_ms in deadlines:
                rows = compare(trace, world, budget_ms, parts, fixed, asked.oracle_chunks)
                cells.append((name, budget_ms, rows))
                results["cells"].append(
                    {"drafter": drafter, "world": name, "deadline_ms": budget_ms, "controllers": rows}
                )
            console.print(f"{drafter}: {name} done")
        console.print(table(f"{drafter} drafter, {asked.chunks - WARM_UP} chunks per line", cells))
    trace = make_trace(asked.acceptance, min(asked.chunks, 2000), None, asked.seed)
    spent = overhead(parts, trace, make_world("log-normal", len(trace.accepted), asked.seed), 32.0)
    results["overhead_us"] = spent
    for method, quantiles in spent.items():
        console.print(
            f"{method}: " + ", ".join(f"{q} {us:.1f} us" if q != "n" else f"n {us}" for q, us in quantiles.items())
        )
    write_json(asked.out, results)
    console.print(f"{asked.out}")


if __name__ == "__main__":
    main()
