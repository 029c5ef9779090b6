"""What every deadline controller promises, whatever it is told about rounds."""

import numpy as np

from vla_spec.interfaces import DeadlineController
from vla_spec.types import Plan, Round

MS = 1_000_000


def test_has_the_interface(controller):
    assert isinstance(controller.thing, DeadlineController)


def test_no_round_starts_after_the_deadline(controller):
    controller.thing.begin(1 << 60)
    controller.thing.record(Round(0, 0, 0, 0, 5 * MS, 0, 0, 5 * MS))
    assert controller.thing.plan(0, 20) is None
    assert controller.thing.plan(-5 * MS, 20) is None


def test_plans_stay_within_bounds_whatever_was_measured(controller):
    rng = np.random.default_rng(0)
    num_tokens = controller.parts.domain.num_tokens
    for _ in range(60):
        controller.thing.begin(1 << 60)
        controller.thing.record(Round(0, 0, 0, 0, 5 * MS, 0, 0, 5 * MS))
        left = num_tokens - 1
        while left > 0:
            plan = controller.thing.plan(int(rng.integers(-MS, 100 * MS)), left)
            if plan is None:
                break
            assert isinstance(plan, Plan)
            assert plan.gamma >= 0
            assert plan.depth >= 0
            assert plan.top_k >= 1
            assert 0.0 <= plan.tolerance <= 1.0
            drafted = int(rng.integers(0, min(plan.gamma, max(left - 1, 0)) + 1))
            accepted = int(rng.integers(0, min(drafted, plan.depth) + 1))
            took = int(rng.integers(1, 10 * MS))
            controller.thing.record(Round(drafted, accepted, 0, took // 4, took // 2, 0, took // 4, took))
            left -= accepted + 1


def test_with_much_time_it_plans_to_the_end_of_the_chunk(controller):
    controller.thing.begin(1 << 60)
    controller.thing.record(Round(0, 0, 0, 0, 5 * MS, 0, 0, 5 * MS))
    for left in range(30, 0, -1):
        assert controller.thing.plan(3600 * 1000 * MS, left) is not None
