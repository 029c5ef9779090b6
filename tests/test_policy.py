import numpy as np
import pytest
from fake_policy import (
    SPACE,
    TOKENIZER,
    A,
    FakeAdapter,
    FakeController,
    FakeDrafter,
    FakeEngine,
    H,
    T,
    make_policy,
)

from vla_spec.clock import VirtualClock
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.ladder import Ladder, LadderOptions, Reason
from vla_spec.policy import Policy, PolicyOptions
from vla_spec.types import EMPTY_DRAFT, Draft, Observation, Plan, Provenance, Rung

LATER = 10**12
PLANNED = np.arange(T, dtype=np.int32) + 100  # what the fake engine says
OLD = np.arange(T, dtype=np.int32) + 50
IMAGES = np.zeros((3, 8, 8, 3), np.uint8)


@pytest.fixture
def clock():
    return VirtualClock(1000)


def observe(step=0, instruction="go", state=(0, 0, 0, 0)):
    return Observation(IMAGES, np.array(state, np.float32), instruction, 900, step)


def reason(policy):
    return policy.last_record.reason


def test_a_complete_decode_is_the_best_rung(clock):
    policy = make_policy(clock, FakeEngine(clock, prefill_ns=5, step_ns=2))
    chunk = policy.plan(observe(step=7), 2000)
    assert (chunk.rung, reason(policy)) == (Rung.EXACT, Reason.NONE)
    assert chunk.tokens.tolist() == PLANNED.tolist()
    np.testing.assert_array_equal(chunk.actions, TOKENIZER.decode(PLANNED))
    assert (chunk.provenance == Provenance.EXACT).all()
    assert chunk.provenance.shape == (H, A)
    assert (chunk.observation_step, chunk.observation_stamp_ns, chunk.start_ns) == (7, 900, 1000)
    assert chunk.ready_ns == 1000 + 5 + 31 * 2
    assert (chunk.slack_ns, chunk.is_late) == (2000 - 1067, False)
    assert (policy.last_record.num_verified, len(policy.last_record.rounds)) == (T, T)


def test_chunk_ids_count_up(clock):
    policy = make_policy(clock)
    assert [policy.plan(observe(), LATER).chunk_id for _ in range(3)] == [0, 1, 2]


def test_a_complete_decode_with_a_relaxed_token_says_so(clock):
    policy = make_policy(clock)
    inner = policy.decoder.decode

    def decode(*args):
        decoded = inner(*args)
        decoded.provenance[5] = Provenance.RELAXED
        decoded.deviation[5] = 3
        return decoded

    policy.decoder.decode = decode
    chunk = policy.plan(observe(), LATER)
    assert (chunk.rung, chunk.max_deviation) == (Rung.RELAXED, 3)
    assert chunk.provenance[1].tolist() == [0, 1, 0, 0]


def test_a_late_chunk_says_that_it_is_late(clock):
    policy = make_policy(clock, FakeEngine(clock, step_ns=100))
    policy.decoder.controller.plan = lambda remaining_ns, tokens_left: FakeController().plan(1, tokens_left)
    chunk = policy.plan(observe(), 1500)
    assert (chunk.rung, chunk.slack_ns, chunk.is_late) == (Rung.EXACT, 1500 - 4100, True)


def cut(clock, num_tokens, drafter=None, options=None, **more):
    """A policy whose decode ends after ``num_tokens``."""
    return make_policy(
        clock, drafter=drafter, controller=FakeController(stop_at=T - num_tokens), options=options, **more
    )


def test_a_cut_decode_is_a_verified_prefix_and_the_drafters_tail(clock):
    drafter = FakeDrafter(PLANNED)
    policy = cut(clock, 10, drafter)
    chunk = policy.plan(observe(), LATER)
    assert (chunk.rung, reason(policy)) == (Rung.DRAFT_TAIL, Reason.DEADLINE)
    assert drafter.num_calls == 1  # once, for all that was missing
    assert chunk.provenance.reshape(-1).tolist() == [Provenance.EXACT] * 10 + [Provenance.DRAFTED] * 22
    plan = TOKENIZER.decode(PLANNED)
    np.testing.assert_array_equal(chunk.actions[:2], plan[:2])
    np.testing.assert_array_equal(chunk.actions[2:], SPACE.bound(plan[2:], plan[1], 0.9))
    assert chunk.tokens.tolist() == PLANNED.tolist()


def test_without_a_draft_the_tail_is_the_previous_chunk_for_the_same_steps(clock):
    policy = cut(clock, 10)
    chunk = policy.plan(observe(step=12), LATER, ChunkHistory(OLD, 3 * A))  # 5 steps are left of it
    assert chunk.rung is Rung.DRAFT_TAIL
    assert chunk.actions.shape == (5, A)  # 2 verified, then its steps 2, 3, 4
    assert chunk.provenance[:, 0].tolist() == [0, 0, 3, 3, 3]
    expected = SPACE.bound(TOKENIZER.decode(OLD)[5:8], chunk.actions[1], 0.9)
    np.testing.assert_array_equal(chunk.actions[2:], expected)
    assert chunk.tokens.tolist() == [*PLANNED[:8], *OLD[20:32]]


def test_a_slow_drafter_is_asked_for_no_more_than_fits_before_the_deadline(clock):
    class Slow(FakeDrafter):
        def propose(self, prefix, plan, features):
            clock.advance(10 * plan.gamma)
            return super().propose(prefix, plan, features)

    def late(remaining_ns, tokens_left):
        return None if remaining_ns < 100 else Plan(3, 3)

    # 30 ns for 3 tokens and 50 ns for a step: two rounds, 9 tokens. 99 ns + reserve are left, at 10 ns a token.
    for reserve, steps, slack in ((0, 4, 9), (200, 8, 69)):
        start = clock.now_ns()
        controller = FakeController()
        controller.plan = late
        options = PolicyOptions(reserve_ns=reserve)
        policy = make_policy(clock, FakeEngine(clock, step_ns=50), Slow(PLANNED), controller, options=options)
        chunk = policy.plan(observe(), start + 2 * 80 + 99 + reserve)
        assert (policy.last_record.num_verified, len(chunk.actions), chunk.slack_ns) == (9, steps, slack)


def test_a_short_draft_is_completed_from_the_previous_chunk(clock):
    class Short(FakeDrafter):
        def propose(self, prefix, plan, features):
            return Draft.chain(PLANNED[len(prefix) : len(prefix) + 3])

    chunk = cut(clock, 10, Short()).plan(observe(), LATER, ChunkHistory(OLD, 2 * A))
    assert chunk.provenance[:, 3].tolist() == [0, 0, 2, 3, 3, 3]
    assert chunk.provenance[2].tolist() == [0, 0, 2, 2]


def test_a_tail_follows_the_first_path_of_a_tree(clock):
    class Tree(FakeDrafter):
        def propose(self, prefix, plan, features):
            return Draft(np.array([1, 2, 3, 4], np.int32), np.array([-1, -1, 0, 2], np.int32))

    policy = cut(clock, 5, Tree(), PolicyOptions(reserve_ns=0))
    assert policy.plan(observe(), LATER).tokens.tolist() == [*PLANNED[:5], 1, 3, 4]


def test_only_complete_steps_are_answered(clock):
    chunk = cut(clock, 11).plan(observe(), LATER)
    assert (chunk.actions.shape, len(chunk.tokens), chunk.rung) == ((2, A), 8, Rung.EXACT)


def test_the_tail_can_be_shortened_or_forbidden(clock):
    for most, steps in ((0, 2), (1, 3), (8, 8)):
        policy = cut(clock, 8, FakeDrafter(PLANNED), PolicyOptions(reserve_ns=0, max_tail_steps=most))
        assert len(policy.plan(observe(), LATER).actions) == steps


def test_too_few_verified_steps_are_worth_less_than_the_last_chunk(clock):
    options = PolicyOptions(reserve_ns=0, min_steps=3)
    policy = cut(clock, 11, FakeDrafter(PLANNED), options)
    chunk = policy.plan(observe(), LATER, ChunkHistory(OLD, 6 * A))
    assert (chunk.rung, reason(policy)) == (Rung.LAST_CHUNK, Reason.DEADLINE)
    np.testing.assert_array_equal(chunk.actions, TOKENIZER.decode(OLD)[6:])
    assert (chunk.provenance == Provenance.TAIL).all()
    assert chunk.tokens.tolist() == OLD[24:].tolist()


def test_with_no_minimum_a_draft_alone_will_do(clock):
    options = PolicyOptions(reserve_ns=0, min_steps=0)
    chunk = cut(clock, 1, FakeDrafter(PLANNED), options).plan(observe(), LATER)
    assert (chunk.rung, len(chunk.actions)) == (Rung.DRAFT_TAIL, H)
    assert chunk.provenance[0].tolist() == [0, 2, 2, 2]


def test_no_plan_and_no_history_is_a_hold(clock):
    chunk = cut(clock, 1).plan(observe(), LATER)
    assert (chunk.rung, len(chunk.tokens)) == (Rung.HOLD, 0)
    assert (chunk.actions == 0).all()
    assert (chunk.provenance == Provenance.HOLD).all()


def test_a_hold_keeps_the_gripper_of_the_last_action(clock):
    chunk = cut(clock, 1).plan(observe(), LATER, ChunkHistory(OLD, T))  # used up
    gripper = TOKENIZER.decode(OLD)[-1, 3]
    assert chunk.rung is Rung.HOLD
    assert chunk.actions[0].tolist() == [0, 0, 0, gripper]


def test_a_deadline_in_the_past_costs_no_forward(clock):
    engine = FakeEngine(clock)
    policy = make_policy(clock, engine)
    chunk = policy.plan(observe(), 1000, ChunkHistory(OLD, 0))
    assert (chunk.rung, reason(policy), engine.num_prefills) == (Rung.LAST_CHUNK, Reason.DEADLINE_PAST, 0)
    chunk = make_policy(clock, engine, adapter=FakeAdapter(clock, encode_ns=50)).plan(observe(), 1040)
    assert (chunk.rung, engine.num_prefills) == (Rung.HOLD, 0)


def test_the_reserve_is_taken_off_the_deadline(clock):
    policy = make_policy(clock, FakeEngine(clock, step_ns=10), options=PolicyOptions(reserve_ns=100))
    chunk = policy.plan(observe(), 1200)  # 100 ns: prefill is free, 10 steps fit
    assert (policy.last_record.num_verified, chunk.slack_ns) == (11, 100)


@pytest.mark.parametrize(
    "observation", [observe(state=(0, np.nan, 0, 0)), observe(state=(np.inf, 0, 0, 0)), observe(instruction="")]
)
def test_a_bad_observation_is_a_rung_with_a_reason(clock, observation):
    policy = make_policy(clock)
    assert policy.plan(observation, LATER, ChunkHistory(OLD, 4)).rung is Rung.LAST_CHUNK
    assert reason(policy) is Reason.BAD_OBSERVATION
    assert policy.ladder.reasons[Reason.BAD_OBSERVATION] == 1
    assert policy.last_error is not None


def test_nan_logits_keep_what_was_verified_before_them(clock):
    policy = make_policy(clock, FakeEngine(clock, nan_at=9), FakeDrafter(PLANNED))
    chunk = policy.plan(observe(), LATER)
    assert (reason(policy), len(chunk.actions), chunk.rung) == (Reason.BAD_SCORES, 2, Rung.EXACT)
    policy = make_policy(clock, FakeEngine(clock, nan_at=0))
    assert (policy.plan(observe(), LATER).rung, reason(policy)) == (Rung.HOLD, Reason.BAD_SCORES)


def test_an_engine_that_raises_is_a_rung_with_a_reason(clock):
    policy = make_policy(clock, FakeEngine(clock, error_at=9))
    assert policy.plan(observe(), LATER, ChunkHistory(OLD, 4)).rung is Rung.LAST_CHUNK
    assert reason(policy) is Reason.ENGINE_ERROR
    assert str(policy.last_error) == "engine fell over"


def test_a_drafter_that_raises_costs_time_and_no_exactness(clock):
    policy = make_policy(
        clock, drafter=FakeDrafter(error=RuntimeError("drafter fell over")), controller=FakeController(gamma=4)
    )
    chunk = policy.plan(observe(), LATER)
    assert (chunk.rung, chunk.tokens.tolist()) == (Rung.EXACT, PLANNED.tolist())
    assert policy.guard.num_failures == 1  # asked once, then left alone for the chunk
    assert reason(policy) is Reason.DRAFTER_ERROR


@pytest.mark.parametrize(
    "draft",
    [
        Draft.chain(np.array([256], np.int32)),
        Draft.chain(np.array([-1], np.int32)),
        Draft.chain(np.arange(9, dtype=np.int32)),
        Draft(np.array([1, 2], np.int32), np.array([-1, 1], np.int32)),
        Draft(np.array([1, 2], np.int32), np.array([-1], np.int32)),
        Draft(np.array([1, 2], np.int32), np.array([-2, 0], np.int32)),
    ],
)
def test_a_malformed_draft_is_no_draft(clock, draft):
    class Malformed(FakeDrafter):
        def propose(self, prefix, plan, features):
            return draft

    policy = make_policy(clock, drafter=Malformed(), controller=FakeController(gamma=4))
    assert policy.plan(observe(), LATER).tokens.tolist() == PLANNED.tolist()
    assert policy.guard.num_failures == 1


def test_a_drafter_that_keeps_failing_is_left_alone_for_a_while(clock):
    drafter = FakeDrafter(error=RuntimeError("no"))
    policy = make_policy(clock, drafter=drafter, controller=FakeController(gamma=4))
    for _ in range(40):
        policy.plan(observe(), LATER)
    assert drafter.num_calls == 6  # chunks 0..2, rest for 32 chunks, 35..37, rest


def test_a_draft_is_passed_on_untouched(clock):
    policy = make_policy(clock)
    assert policy.guard.propose(PLANNED[:1], FakeController(gamma=4).plan(1, 9), None) is EMPTY_DRAFT


def test_actions_that_are_not_finite_are_no_plan(clock):
    class Broken(FakeAdapter):
        def decode(self, tokens):
            return np.full((len(tokens) // A, A), np.nan, np.float32)

    policy = make_policy(clock, adapter=Broken())
    assert (policy.plan(observe(), LATER).rung, reason(policy)) == (Rung.HOLD, Reason.BAD_TOKENS)


def test_holds_become_a_stop_and_recovery_takes_several_good_plans(clock):
    ladder = Ladder(LadderOptions(max_holds=1, recover_after=2))
    policy = make_policy(clock, ladder=ladder)
    bad, good = observe(instruction=""), observe()
    rungs = [policy.plan(o, LATER).rung for o in (bad, bad, bad, good, good)]
    assert rungs == [Rung.HOLD, Rung.STOP, Rung.STOP, Rung.STOP, Rung.EXACT]
    assert policy.ladder.reasons[Reason.RECOVERING] == 1


def test_every_plan_is_traced(clock):
    policy = make_policy(clock)
    for instruction in ("go", "", "go"):
        policy.plan(observe(instruction=instruction), LATER)
    rows = policy.trace.plans()
    assert rows["reason"].tolist() == [0, Reason.BAD_OBSERVATION, 0]
    assert rows["num_tokens"].tolist() == [T, 0, T]
    assert policy.trace.total_rounds == 2 * T


def test_options_and_sizes_are_checked_at_the_start(clock):
    with pytest.raises(BadConfig, match="tail_slowdown"):
        PolicyOptions(tail_slowdown=0)
    policy = make_policy(clock)
    policy.decoder.num_tokens = 3
    with pytest.raises(BadConfig, match="decoder makes 3 tokens"):
        Policy(FakeAdapter(), policy.decoder, SPACE, clock.now_ns)
