"""A plan is its stages and nothing else: they follow each other, and they add up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fake_policy import FakeAdapter, FakeController, FakeDrafter, FakeEngine, make_policy
from fake_profile import BEGIN, COMMIT, DRAFT, ENCODE, GAP, JUDGE, PREFILL, STEP, TAIL, US, a_plan

from vla_spec.clock import VirtualClock
from vla_spec.profiling.stages import BETWEEN, NO_ROUND, ROUND, STAGES, spans_of, stage_durations, stage_totals
from vla_spec.types import Observation


def test_a_plan_goes_through_its_stages_in_order():
    spans = spans_of(a_plan(num_rounds=1), hand_over_ns=15 * US)
    assert [span.stage for span in spans] == [
        "encode", "begin", "prefill", "judge", "commit", "draft", "step", "judge", "commit", "tail", "hand_over"
    ]  # fmt: skip
    assert [span.round for span in spans] == [NO_ROUND, 0, 0, 0, 0, 1, 1, 1, 1, NO_ROUND, NO_ROUND]
    assert [(s.num_drafted, s.num_accepted) for s in spans if s.stage == "step"] == [(4, 3)]
    for before, after in itertools.pairwise(spans):
        assert before.end_ns <= after.start_ns
    assert {span.stage for span in spans} == set(STAGES)


@pytest.mark.parametrize("num_rounds", [0, 1, 5])
def test_stages_and_what_lies_between_them_are_the_whole_plan(num_rounds):
    plan = a_plan(start_ns=777, num_rounds=num_rounds)
    totals = stage_totals(plan)
    assert sum(totals.values()) == plan.plan_ns
    assert totals == {
        "encode": ENCODE, "begin": BEGIN, "prefill": PREFILL, "draft": num_rounds * DRAFT, "step": num_rounds * STEP,
        "judge": (num_rounds + 1) * JUDGE, "commit": (num_rounds + 1) * COMMIT, "tail": TAIL,
        BETWEEN: (num_rounds + 1) * GAP,
    }  # fmt: skip


def test_durations_are_per_call():
    durations = stage_durations([a_plan(), a_plan(extra_ns=US)], [5, 6])
    assert durations["step"].tolist() == [STEP, STEP, STEP, STEP + US]
    assert durations["prefill"].tolist() == [PREFILL, PREFILL]
    assert durations["hand_over"].tolist() == [5, 6]
    assert durations[ROUND].tolist() == [DRAFT + STEP + JUDGE + COMMIT] * 3 + [DRAFT + STEP + US + JUDGE + COMMIT]


def test_stages_that_never_ran_are_left_out():
    plan = a_plan()._replace(encode_ns=0, rounds=())
    assert set(stage_durations([plan])) == {"tail"}
    assert sum(stage_totals(plan).values()) == plan.plan_ns
    assert stage_durations([]) == {}


def test_spans_of_a_real_plan_lie_where_the_clock_says():
    clock = VirtualClock(start_ns=5_000)
    engine = FakeEngine(clock, prefill_ns=700, step_ns=30)
    drafter = FakeDrafter(engine.tokens)
    policy = make_policy(clock, engine, drafter, FakeController(gamma=15), FakeAdapter(clock, encode_ns=40))
    observation = Observation(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(4, np.float32), "push", 5_000, 0)
    policy.plan(observation, 1_000_000)
    assert policy.last_record is not None
    spans = [(s.stage, s.start_ns, s.duration_ns) for s in spans_of(policy.last_record) if s.duration_ns]
    assert spans == [("encode", 5_000, 40), ("prefill", 5_040, 700), ("step", 5_740, 30), ("step", 5_770, 30)]
    assert sum(stage_totals(policy.last_record).values()) == 800
