"""What every deadline controller promises, whatever it is told about rounds."""

import numpy as np
import pytest

from vla_spec.interfaces import ChunkHistory, DeadlineController
from vla_spec.types import LEAVE_REST, Plan, Round

MS = 1_000_000
AGES = 1 << 60
#: Times left that nobody should be asked about, and some that are just odd [ns].
ODD_TIMES = (-AGES, -5 * MS, -1, 0, 1, 100_000, 100_001, 3 * MS, AGES)


def prefill(ns=5 * MS):
    return Round(0, 0, 0, 0, ns, 0, 0, ns)


def check(plan, controller):
    assert plan is None or isinstance(plan, Plan)
    if plan is None or plan == LEAVE_REST:
        return
    assert 0 <= plan.depth <= plan.gamma
    assert plan.top_k >= 1
    assert 0.0 <= plan.tolerance <= 1.0
    assert plan.gamma < 1000


def test_has_the_interface(controller):
    assert isinstance(controller.thing, DeadlineController)


def test_nothing_starts_after_the_deadline(controller):
    assert not controller.thing.begin(0)
    assert not controller.thing.begin(-5 * MS)
    controller.thing.begin(AGES)
    controller.thing.record(prefill())
    assert controller.thing.plan(0, 20) is None
    assert controller.thing.plan(-5 * MS, 20) is None


def test_a_chunk_with_much_time_begins_whatever_came_before(controller):
    """Late, refused and cut chunks do not add up to a controller that has given up."""
    thing = controller.thing
    for _ in range(50):
        thing.begin(1)
        if thing.begin(20 * MS):
            thing.record(prefill(500 * MS))
            thing.plan(-480 * MS, 31)
    assert any(thing.begin(1000 * MS) for _ in range(10))


def test_plans_stay_within_bounds_whatever_was_measured(controller):
    rng = np.random.default_rng(0)
    num_tokens = controller.parts.domain.num_tokens
    for _ in range(60):
        controller.thing.begin(AGES)
        controller.thing.record(prefill())
        left = num_tokens - 1
        while left > 0:
            plan = controller.thing.plan(int(rng.integers(-MS, 100 * MS)), left)
            check(plan, controller)
            if plan is None or plan == LEAVE_REST:
                break
            drafted = int(rng.integers(0, min(plan.gamma, max(left - 1, 0)) + 1))
            accepted = int(rng.integers(0, min(drafted, plan.depth) + 1))
            took = int(rng.integers(1, 10 * MS))
            controller.thing.record(Round(drafted, accepted, 0, took // 4, took // 2, 0, took // 4, took))
            left -= accepted + 1


@pytest.mark.parametrize("took", [0, 1, 10**18])
def test_raises_nothing_whatever_time_is_left_and_whatever_a_round_took(controller, took):
    rng = np.random.default_rng(1)
    num_tokens = controller.parts.domain.num_tokens
    history = ChunkHistory(np.zeros(num_tokens, np.int32), num_tokens // 2)
    for remaining in ODD_TIMES * 3:
        begun = controller.thing.begin(remaining, history if rng.random() < 0.5 else None)
        assert isinstance(begun, bool)
        if begun:
            controller.thing.record(prefill(took))
        for left in rng.integers(1, num_tokens + 1, 6).tolist():
            for later in ODD_TIMES:
                check(controller.thing.plan(later, left), controller)
            plan = controller.thing.plan(50 * MS, left)
            if plan is not None and plan != LEAVE_REST and rng.random() < 0.7:
                drafted = min(plan.gamma, left)
                controller.thing.record(Round(drafted, min(drafted, plan.depth), 0, took, took, took, took, 4 * took))


def test_with_much_time_it_plans_to_the_end_of_the_chunk(controller):
    controller.thing.begin(AGES)
    controller.thing.record(prefill())
    for left in range(30, 0, -1):
        assert controller.thing.plan(3600 * 1000 * MS, left) is not None
