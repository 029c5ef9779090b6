"""Profiles without a measurement behind them: plans whose times are known to the nanosecond."""

from __future__ import annotations

import numpy as np

from vla_spec.ladder import Reason
from vla_spec.profiling.loop import Played, period_errors
from vla_spec.profiling.planning import Measured
from vla_spec.profiling.profile import ModeProfile, Profile
from vla_spec.profiling.profiler import condition_of, loop_of
from vla_spec.profiling.tracing_cost import TracingCost
from vla_spec.realtime import Grant, RealtimeRecord
from vla_spec.runtime import EpisodeResult
from vla_spec.trace import PlanRecord
from vla_spec.types import Provenance, Round, Rung

US, MS = 1_000, 1_000_000
#: Parts of `a_plan` beside its steps: encode, begin, prefill with judge and commit, gaps, tail.
ENCODE, BEGIN, PREFILL, JUDGE, COMMIT, GAP, TAIL = (n * US for n in (50, 10, 7000, 20, 30, 5, 100))
DRAFT, STEP = 300 * US, 3000 * US


def a_plan(chunk_id=0, start_ns=0, num_rounds=2, extra_ns=0, deadline_ms=20, rung=Rung.EXACT):
    """A prefill and ``num_rounds`` rounds; the last step takes ``extra_ns`` longer."""
    at = start_ns + ENCODE
    rounds = []
    for i in range(num_rounds + 1):
        first, forward = (DRAFT, STEP) if i else (BEGIN, PREFILL)
        forward += extra_ns if i == num_rounds else 0
        total = first + forward + JUDGE + COMMIT
        rounds.append(Round(4 if i else 0, 3 if i else 0, 0, first, forward, JUDGE, COMMIT, total, at))
        at += total + GAP
    ready = at + TAIL
    return PlanRecord(
        chunk_id=chunk_id, observation_step=4 * chunk_id, observation_stamp_ns=start_ns, start_ns=start_ns,
        ready_ns=ready, deadline_ns=start_ns + deadline_ms * MS, encode_ns=ENCODE, decode_ns=at - start_ns - ENCODE,
        tail_ns=TAIL, rung=rung, reason=Reason.NONE, num_steps=8, num_tokens=32, num_verified=32, rounds=tuple(rounds),
    )  # fmt: skip


def measured(extras_ns, deadline_ms=20):
    """One plan after the other, each longer by its extra."""
    found, at = [], 1_000 * MS
    for i, extra in enumerate(extras_ns):
        plan = a_plan(i, at, extra_ns=int(extra), deadline_ms=deadline_ms)
        found.append(Measured(plan, 15 * US, i % 2, 0))
        at = plan.ready_ns + MS
    return found


def some_extras(n, seed=0, scale_ms=1.0):
    return (np.random.default_rng(seed).gamma(2.0, scale_ms, n) * MS).astype(np.int64)


def played(num_steps=40, jitter_ns=100 * US, deadline_ms=20):
    """An episode of plans that are asked for every fourth step."""
    period = 12_500 * US
    plans = tuple(a_plan(i, 50 * MS * i, deadline_ms=deadline_ms) for i in range(num_steps // 4))
    acts = tuple((period * i + (jitter_ns if i % 2 else 0), period * i + 2 * MS) for i in range(num_steps))
    ids = np.repeat(np.arange(num_steps // 4), 4).astype(np.int32)
    lateness = np.array([0, jitter_ns] * num_steps, np.int64)[:num_steps]
    usage = np.zeros((num_steps, 4), np.int64)
    grants = (Grant("actor", "SCHED_FIFO", "priority 50", False, "EPERM: Operation not permitted"),)
    record = RealtimeRecord(period, lateness, usage, usage, grants)
    result = EpisodeResult(
        seed=0, success=True, num_steps=num_steps, plans=plans, observe_ns=np.zeros(len(plans), np.int64),
        delay_steps=np.ones(len(plans), np.int32), actions=np.zeros((num_steps, 4), np.float32),
        provenance=np.zeros(num_steps, np.uint8), chunk_ids=ids, counts=dict.fromkeys(Provenance, 0),
        rungs=dict.fromkeys(Rung, 0), slack_ns=np.zeros(num_steps, np.int64), num_late_steps=1, period_ns=period,
        measured_period_ns=float(period), realtime=record,
    )  # fmt: skip
    return Played(result, period_errors(result), np.full(num_steps // 4, 3 * MS, np.int64), ((0, MS),), acts)


A_COST = TracingCost(40, 14_010.0, 14_000.0, 8.0, (-20.0, 31.0), 0.06, (-0.14, 0.22), 5.0, 4.0, 3.0, 0.05, 0.09)


def a_mode(extras=None, loads=("idle",), has_loop=True, config=None, deadline_ms=20):
    """A mode whose conditions differ by their extras only."""
    extras = some_extras(200) if extras is None else np.array(extras, np.int64)
    conditions = {"cold": condition_of(measured([9 * MS, *extras[:4]], deadline_ms), 32)}
    conditions |= {load: condition_of(measured(extras + i * 2 * MS, deadline_ms), 32) for i, load in enumerate(loads)}
    return ModeProfile(
        engine="toy", drafter="ngram", rule="greedy", controller="fixed", is_exact=True, deadline_ms=deadline_ms,
        load_ms=80.0, first_ms=conditions["cold"].chunk.max_ms, conditions=conditions,
        loops={load: loop_of([played(deadline_ms=deadline_ms)], 32) for load in loads} if has_loop else {},
        tracing=A_COST, config=config or {"drafter": "ngram"},
    )  # fmt: skip


def a_profile(modes=None, **changes):
    modes = modes or {"exact": a_mode()}
    loads = {load: f"what {load} is" for mode in modes.values() for load in mode.conditions if load != "cold"}
    values = {
        "modes": modes, "late": "count", "model_hash": "abc123", "seeds": (10,), "tasks": ("push",),
        "num_observations": 5, "loads": loads,
        "environment": {"cpu": "A <fast> one", "cores": "2", "libraries": {"numpy": "2"}, "load_average": 0.1},
        "notes": ("a note",), "command": "vla-spec profile --tasks 'a & b'", "created": "2026-11-24T00:00:00+00:00",
    }  # fmt: skip
    return Profile(**(values | changes))
