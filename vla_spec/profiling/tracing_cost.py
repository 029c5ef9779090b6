"""What measuring costs the measured: plans with and without the trace side by side, and the trace's own calls timed.

Two answers to one question. The difference of plans with and without is what a user would feel, but its noise is the
plan's own; the time of the calls themselves is known to a fraction of a microsecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_spec.clock import NowNs
from vla_spec.comparison import Sample
from vla_spec.profiling.planning import Bench, quiet
from vla_spec.progress import Reporter
from vla_spec.trace import PlanRecord, Trace
from vla_spec.types import Round

#: Clock readings of one round: begin, drafted, scored, judged, done.
STAMPS_PER_ROUND = 5
#: Draws of the interval of the median difference, and its level.
NUM_DRAWS, LEVEL = 2000, 0.95


@dataclass(frozen=True, slots=True)
class TracingCost:
    """Of one mode. Medians over plans; percentages refer to the median round behind the prefill, or to the plan.

    Attributes:
        pairs: plans of the same observation with and without the trace, one right after the other, in turns first.
        plan_with_us, plan_without_us: medians of the two arms.
        difference_us: median of with minus without over the pairs.
        difference_ci95_us: bootstrap interval of it.
        difference_percent_of_plan, difference_ci95_percent_of_plan: the same as shares of ``plan_without_us``.
        record_us: `Trace.record` of one plan with all of its rounds; this is what switching the trace off saves.
        stamps_us: reading the clock and making the `Round` values of one plan; controllers plan by these, so they are
            there with or without a trace.
        rounds: of one plan, prefill included.
        percent_of_round: record_us / rounds, as a share of the median round. None = no round behind a prefill.
        percent_of_round_with_stamps: record_us + stamps_us the same way.
    """

    pairs: int
    plan_with_us: float
    plan_without_us: float
    difference_us: float
    difference_ci95_us: tuple[float, float]
    difference_percent_of_plan: float
    difference_ci95_percent_of_plan: tuple[float, float]
    record_us: float
    stamps_us: float
    rounds: float
    percent_of_round: float | None
    percent_of_round_with_stamps: float | None


def measure_tracing(bench: Bench, samples: Sequence[Sample], num_pairs: int, progress: Reporter) -> TracingCost:
    """Plan samples with and without the trace, interleaved, in one process.

    Args:
        bench: one mode, warmed up; its trace gets the plans of one arm.
        samples: at least one.
        num_pairs: at least one.
        progress: told about each pair.
    """
    trace, now_ns = bench.assembly.policy.trace, bench.assembly.clock.now_ns
    taken: dict[bool, list[int]] = {True: [], False: []}
    record_ns, stamps_ns, plans = [], [], []
    was_enabled = trace.is_enabled
    try:
        with quiet():
            for pair in range(num_pairs):
                sample = samples[pair % len(samples)]
                for is_traced in (True, False) if pair % 2 else (False, True):
                    trace.is_enabled = is_traced
                    plan = bench.plan(sample).plan
                    taken[is_traced].append(plan.plan_ns)
                plans.append(plan)
                record_ns.append(time_record(plan, now_ns))
                stamps_ns.append(time_stamps(plan, now_ns))
                progress.step()
    finally:
        trace.is_enabled = was_enabled
    return summarise(np.array(taken[True]), np.array(taken[False]), record_ns, stamps_ns, plans)


def time_record(plan: PlanRecord, now_ns: NowNs) -> int:
    """What `Trace.record` takes for this plan [ns], the second of two calls."""
    scratch = Trace(num_plans=2, num_rounds=2 * max(1, len(plan.rounds)))
    scratch.record(plan)
    begin_ns = now_ns()
    scratch.record(plan)
    return now_ns() - begin_ns


def time_stamps(plan: PlanRecord, now_ns: NowNs) -> int:
    """What the clock readings and the `Round` values of this plan take [ns]."""
    begin_ns = now_ns()
    for measured in plan.rounds:
        for _ in range(STAMPS_PER_ROUND):
            now_ns()
        Round(*measured)
    return now_ns() - begin_ns


def summarise(
    with_ns: npt.NDArray[np.int64],
    without_ns: npt.NDArray[np.int64],
    record_ns: Sequence[int],
    stamps_ns: Sequence[int],
    plans: Sequence[PlanRecord],
) -> TracingCost:
    """Figures of the pairs; pure.

    Args:
        with_ns: int64 [pairs], plan times with the trace.
        without_ns: int64 [pairs], without it.
        record_ns: of `time_record`, one per pair.
        stamps_ns: of `time_stamps`, one per pair.
        plans: one per pair, for their rounds.
    """
    difference_us = (with_ns - without_ns) / 1e3
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(difference_us), (NUM_DRAWS, len(difference_us)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.median(difference_us[drawn], axis=1), (tail, 1 - tail)).tolist()
    without_us = float(np.median(without_ns)) / 1e3
    rounds = float(np.mean([len(plan.rounds) for plan in plans]))
    behind_us = [measured.total_ns / 1e3 for plan in plans for measured in plan.rounds[1:]]
    record_us, stamps_us = float(np.median(record_ns)) / 1e3, float(np.median(stamps_ns)) / 1e3

    def of_plan(us: float) -> float:
        return round(100 * us / without_us, 4) if without_us else 0.0

    def of_round(us: float) -> float | None:
        if not behind_us or not rounds:
            return None
        return round(100 * us / rounds / float(np.median(behind_us)), 4)

    return TracingCost(
        pairs=len(difference_us),
        plan_with_us=round(float(np.median(with_ns)) / 1e3, 3),
        plan_without_us=round(without_us, 3),
        difference_us=round(float(np.median(difference_us)), 3),
        difference_ci95_us=(round(low, 3), round(high, 3)),
        difference_percent_of_plan=of_plan(float(np.median(difference_us))),
        difference_ci95_percent_of_plan=(of_plan(low), of_plan(high)),
        record_us=round(record_us, 3),
        stamps_us=round(stamps_us, 3),
        rounds=round(rounds, 3),
        percent_of_round=of_round(record_us),
        percent_of_round_with_stamps=of_round(record_us + stamps_us),
    )
