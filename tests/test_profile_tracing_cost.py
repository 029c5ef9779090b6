"""What tracing costs is measured with and without it, on the same observations, in turns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_profile import COMMIT, DRAFT, JUDGE, MS, STEP, US, Measured, a_plan

from vla_spec.profiling.tracing_cost import measure_tracing, summarise, time_record, time_stamps
from vla_spec.progress import Silent
from vla_spec.trace import Trace


def test_differences_are_taken_pair_by_pair():
    without = np.array([10, 30, 20, 50], np.int64) * MS
    cost = summarise(without + 4 * US, without, [6 * US] * 4, [3 * US] * 4, [a_plan(num_rounds=5)] * 4)
    assert (cost.pairs, cost.plan_without_us, cost.difference_us) == (4, 25_000, 4)
    assert cost.difference_ci95_us == (4, 4)
    assert cost.difference_percent_of_plan == pytest.approx(100 * 4 / 25_000)
    round_us = (DRAFT + STEP + JUDGE + COMMIT) / US
    assert cost.rounds == 6
    assert cost.percent_of_round == pytest.approx(100 * 1 / round_us, abs=1e-4)
    assert cost.percent_of_round_with_stamps == pytest.approx(100 * 1.5 / round_us, abs=1e-4)


def test_noise_widens_the_interval_around_nothing():
    noise = (np.random.default_rng(0).normal(0, 1, (2, 60)) * MS).astype(np.int64)
    cost = summarise(20 * MS + noise[0], 20 * MS + noise[1], [1], [1], [a_plan()])
    low, high = cost.difference_ci95_us
    assert low < 0 < high
    assert 100 < high - low < 2000


def test_a_plan_without_rounds_has_no_share_of_a_round():
    plan = a_plan()._replace(rounds=())
    cost = summarise(np.array([5]), np.array([5]), [1], [1], [plan])
    assert cost.percent_of_round is cost.percent_of_round_with_stamps is None


def test_arms_take_turns_and_the_switch_is_put_back():
    trace, seen = Trace(), []
    times = iter(range(0, 10**9, 1000))
    assembly = SimpleNamespace(policy=SimpleNamespace(trace=trace), clock=SimpleNamespace(now_ns=lambda: next(times)))

    def plan(sample):
        seen.append((sample, trace.is_enabled))
        return Measured(a_plan(extra_ns=10 * US if trace.is_enabled else 0), 0, 0, 0)

    cost = measure_tracing(SimpleNamespace(assembly=assembly, plan=plan), ["a", "b"], 3, Silent())
    assert seen == [("a", False), ("a", True), ("b", True), ("b", False), ("a", False), ("a", True)]
    assert trace.is_enabled
    assert cost.difference_us == 10
    assert trace.total_plans == 0  # this fake policy does not record by itself


def test_calls_are_timed_by_the_clock_that_is_given():
    times = iter(range(0, 10**9, 7))
    assert time_record(a_plan(), lambda: next(times)) == 7
    # Three rounds of five readings, and the one that ends it.
    assert time_stamps(a_plan(num_rounds=2), lambda: next(times)) == 7 * (3 * 5 + 1)
