import numpy as np
import pytest
from fake_policy import SPACE, FakeController, FakeDrafter, FakeEngine, make_policy

from vla_spec.clock import VirtualClock
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.ladder import Ladder, LadderOptions, Reason
from vla_spec.types import Observation, Provenance, Rung


def settle(ladder, *rungs):
    return [ladder.settle(rung, Reason.NONE)[0] for rung in rungs]


def test_usable_rungs_are_answered_as_they_are():
    ladder = Ladder()
    rungs = [Rung.EXACT, Rung.DRAFT_TAIL, Rung.LAST_CHUNK, Rung.RELAXED]
    assert settle(ladder, *rungs) == rungs
    assert list(ladder.counts.values()) == [1, 1, 1, 1, 0, 0]


def test_too_many_holds_in_a_row_are_a_stop():
    ladder = Ladder(LadderOptions(max_holds=2))
    assert settle(ladder, *[Rung.HOLD] * 4) == [Rung.HOLD, Rung.HOLD, Rung.STOP, Rung.STOP]


def test_holds_that_are_not_in_a_row_are_no_stop():
    ladder = Ladder(LadderOptions(max_holds=1))
    assert settle(ladder, Rung.HOLD, Rung.EXACT, Rung.HOLD, Rung.EXACT)[2] is Rung.HOLD
    assert not ladder.is_stopped


def test_a_stop_ends_after_several_usable_plans_in_a_row():
    ladder = Ladder(LadderOptions(max_holds=0, recover_after=3))
    assert settle(ladder, Rung.HOLD) == [Rung.STOP]
    assert ladder.settle(Rung.EXACT, Reason.NONE) == (Rung.STOP, Reason.RECOVERING)
    assert settle(ladder, Rung.EXACT, Rung.HOLD) == [Rung.STOP, Rung.STOP]  # the streak is broken
    assert settle(ladder, Rung.EXACT, Rung.EXACT, Rung.EXACT) == [Rung.STOP, Rung.STOP, Rung.EXACT]
    assert ladder.reasons[Reason.RECOVERING] == 4


def test_reset_forgets_streaks_and_keeps_counters():
    ladder = Ladder(LadderOptions(max_holds=0))
    settle(ladder, Rung.HOLD)
    ladder.reset()
    assert settle(ladder, Rung.EXACT) == [Rung.EXACT]
    assert ladder.counts[Rung.STOP] == 1


def test_level_follows_only_several_plans_that_agree():
    ladder = Ladder(LadderOptions(worsen_after=2, improve_after=3))
    settle(ladder, Rung.LAST_CHUNK, Rung.EXACT, Rung.LAST_CHUNK)
    assert ladder.level is Rung.EXACT
    settle(ladder, Rung.DRAFT_TAIL)
    assert ladder.level is Rung.DRAFT_TAIL  # the mildest of the two bad ones
    settle(ladder, Rung.EXACT, Rung.EXACT, Rung.DRAFT_TAIL)
    assert ladder.level is Rung.DRAFT_TAIL
    settle(ladder, Rung.EXACT, Rung.RELAXED, Rung.EXACT)
    assert ladder.level is Rung.RELAXED  # the worst of the three good ones


def test_options_say_what_is_valid():
    with pytest.raises(BadConfig, match=r"ladder\.recover_after is 0; valid: 1 or more"):
        LadderOptions(recover_after=0)


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_below_the_target_has_a_reason_and_every_plan_one_counter(seed):
    """Observations, engine, drafter and time fail at random; each plan says why it is no better than it is."""
    rng = np.random.default_rng(seed)
    clock = VirtualClock(10_000)

    class Faulty(FakeEngine):
        def prefill(self, inputs):
            self.nan_at = rng.choice([None, None, 0, 9])
            self.error_at = rng.choice([None, None, None, 13])
            return super().prefill(inputs)

    drafter = FakeDrafter(np.arange(32, dtype=np.int32) + 100)
    policy = make_policy(clock, Faulty(clock, prefill_ns=50, step_ns=5), drafter, FakeController(gamma=3))
    history, before = None, np.zeros(4, np.float32)
    for step in range(300):
        words = "go" if rng.random() < 0.9 else ""
        observation = Observation(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(4, np.float32), words, 0, step)
        chunk = policy.plan(observation, clock.now_ns() + int(rng.integers(-5, 200)), history)
        record = policy.last_record
        assert record.rung is chunk.rung
        if chunk.rung >= Rung.DRAFT_TAIL:
            assert record.reason is not Reason.NONE
        assert np.isfinite(chunk.actions).all()
        unverified = chunk.provenance.max(axis=1) == Provenance.DRAFTED
        rows = np.concatenate((before[None], chunk.actions))
        change = abs(np.diff(rows[:, :3], axis=0)).max(axis=1)
        first_is_free = unverified & (np.arange(len(unverified)) == 0)
        assert (change[unverified & ~first_is_free] <= SPACE.max_change[0] + 1e-6).all()
        if len(chunk.tokens):
            history = ChunkHistory(chunk.tokens, min(4 * int(rng.integers(1, 9)), len(chunk.tokens)), 0, chunk.actions)
        before = chunk.actions[-1]
    assert sum(policy.ladder.counts.values()) == sum(policy.ladder.reasons.values()) == 300
    assert all(policy.ladder.counts[rung] for rung in (Rung.EXACT, Rung.DRAFT_TAIL, Rung.LAST_CHUNK))
    seen = {reason for reason, count in policy.ladder.reasons.items() if count}
    assert seen >= {Reason.DEADLINE, Reason.BAD_OBSERVATION, Reason.BAD_SCORES, Reason.ENGINE_ERROR}


def test_a_prefill_that_does_not_fit_is_the_last_chunks_remainder_with_its_reason():
    class NoTime(FakeController):
        def begin(self, remaining_ns, history=None):
            return False

    clock = VirtualClock(1000)
    engine = FakeEngine(clock)
    policy = make_policy(clock, engine, controller=NoTime())
    observation = Observation(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(4, np.float32), "go", 0, 8)
    tokens = np.arange(32, dtype=np.int32)
    chunk = policy.plan(observation, 10**9, ChunkHistory(tokens, 8, 8))
    assert (chunk.rung, policy.last_record.reason) == (Rung.LAST_CHUNK, Reason.NO_TIME)
    assert chunk.tokens.tolist() == tokens[8:].tolist()
    assert engine.num_prefills == 0
    assert policy.ladder.reasons[Reason.NO_TIME] == 1
    assert policy.plan(observation, 10**9).rung is Rung.HOLD
