"""The deadline controller against every fixed draft length, the adaptive one and two oracles, on the same traces.

    python benchmarks/deadline_controllers.py [--chunks 4000] [--worlds all] [--deadlines-ms 18,24,32,45] [--out FILE]

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
from vla_spec.oracle import best_tokens
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
    """Up to 1.6 times slower and back, once in 2,000 chunks."""
    phase = 2 * np.pi * np.arange(shape[0]) / 2000
    return np.broadcast_to(1.3 - 0.3 * np.cos(phase)[:, None], shape)


def _thermal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """From one call to the next 1.5 times slower, for a third of every 3,000 chunks."""
    chunk = np.arange(shape[0]) % 3000
    return np.broadcast_to(np.where((chunk >= 1000) & (chunk < 2000), 1.5, 1.0)[:, None], shape)


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


def main() -> None:
    pass


if __name__ == "__main__":
    main()
