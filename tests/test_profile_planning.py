"""Recorded observations are planned in turns, under the deadline that was asked for, and nothing counts twice."""

from __future__ import annotations

import gc

import pytest

from vla_spec.assemble import Assembler
from vla_spec.comparison import Sample
from vla_spec.config import resolve
from vla_spec.errors import BadConfig
from vla_spec.ladder import Reason
from vla_spec.profiling.planning import Amount, Bench, plan_all, quiet, warm_up
from vla_spec.progress import Silent
from vla_spec.types import Rung


def assembly(mode="m", **tree):
    config = resolve({"engine": "toy", "robot": "toy", **tree}, mode)
    assembler = Assembler()
    return assembler.assemble(config, assembler_observation(assembler, config))


def assembler_observation(assembler, config):
    robot = assembler.robot(config.robot, None)
    robot.reset(0)
    return robot.observe(0)


@pytest.fixture(scope="module")
def pair():
    return assembly("one"), assembly("two", drafter="jacobi", controller={"name": "fixed", "gamma": 4})


@pytest.fixture(scope="module")
def samples():
    assembler = Assembler()
    config = resolve({"engine": "toy", "robot": "toy"})
    return [Sample(assembler_observation(assembler, config), None)] * 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"plans": 3, "seconds": 1.0}, "not both"),
        ({"plans": None, "seconds": None}, "not neither"),
        ({"plans": 0}, "--plans is 0"),
        ({"plans": None, "seconds": -1.0}, "--seconds is -1"),
        ({"plans": None, "seconds": float("inf")}, "--seconds is inf"),
        ({"plans": None, "seconds": float("nan")}, "--seconds is nan"),
    ],
)
def test_an_amount_is_plans_or_seconds(arguments, word):
    with pytest.raises(BadConfig, match=word):
        Amount(**arguments)


def test_every_mode_plans_as_often_and_the_turns_rotate(pair, samples):
    benches = [Bench(a, 10**12, is_cut=False) for a in pair]
    found = plan_all(benches, samples, Amount(4), pair[0].clock.now_ns, Silent())
    assert {mode: len(measured) for mode, measured in found.items()} == {"one": 4, "two": 4}
    order = sorted((m.plan.start_ns, mode) for mode, measured in found.items() for m in measured)
    assert [mode for _, mode in order] == ["one", "two", "two", "one", "one", "two", "two", "one"]
    assert all(m.hand_over_ns > 0 for measured in found.values() for m in measured)


def test_seconds_end_at_a_whole_turn(pair, samples):
    times = iter(range(0, 10**12, 10**9))  # each look at the clock is a second later
    benches = [Bench(a, 10**12, is_cut=False) for a in pair]
    found = plan_all(benches, samples, Amount(None, 2.5), lambda: next(times), Silent())
    assert {len(measured) for measured in found.values()} == {3}


def test_late_plans_are_counted_and_whole(pair, samples):
    bench = Bench(pair[0], 1_000, is_cut=False)
    plan = bench.plan(samples[0]).plan
    assert plan.slack_ns == 1_000 - plan.plan_ns < 0
    assert (plan.rung, plan.reason, plan.num_verified) == (Rung.EXACT, Reason.NONE, pair[0].domain.num_tokens)


def test_or_cut(pair, samples):
    plan = Bench(pair[0], 1_000, is_cut=True).plan(samples[0]).plan
    assert plan.reason is Reason.DEADLINE_PAST
    assert plan.num_verified == 0
    assert plan.deadline_ns == plan.observation_stamp_ns + 1_000


def test_warm_up_is_left_out(pair, samples):
    bench = Bench(pair[0], 10**12, is_cut=False)
    before = pair[0].policy.trace.total_plans
    warm_up([bench], samples, 5)
    assert pair[0].policy.trace.total_plans == before + 5
    assert len(plan_all([bench], samples, Amount(2), pair[0].clock.now_ns, Silent())["one"]) == 2


def test_no_garbage_is_collected_meanwhile_and_all_is_as_before_afterwards():
    with quiet():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert gc.isenabled()
