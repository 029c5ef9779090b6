"""A wrapped drafter still hears what the target said, and can't hurt when it listens."""

import numpy as np
import pytest
from fake_policy import FakeController, FakeDrafter, FakeEngine, T, make_policy

from vla_spec.clock import VirtualClock
from vla_spec.guard import GuardedDrafter
from vla_spec.interfaces import ScoreObserver
from vla_spec.ladder import Reason
from vla_spec.types import EMPTY_DRAFT, Observation, Plan, Rung, Scores
from vla_spec.virtual_costs import ChargedDrafter, CostTable

LATER = 10**12
PLANNED = np.arange(T, dtype=np.int32) + 100  # what the fake engine says
SCORES = Scores(np.zeros((1, 256), np.float32))


class Listener(FakeDrafter):
    """Remembers how many rows it heard about each draft; raises at the call that it is told to raise at."""

    def __init__(self, tokens=None, error_at=None):
        super().__init__(tokens)
        self.heard, self.error_at = [], error_at

    def observe(self, draft, scores):
        if len(self.heard) == self.error_at:
            raise RuntimeError("drafter fell over while it listened")
        self.heard.append((len(draft.tokens), len(scores.logits)))


def charged(drafter, clock):
    return ChargedDrafter(drafter, CostTable(0, {}, {4: 7}), clock, np.random.default_rng(0))


def guarded(drafter, clock):
    return GuardedDrafter(drafter, 256)


def both(drafter, clock):
    return guarded(charged(drafter, clock), clock)


def seen():
    return Observation(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(4, np.float32), "go", 0, 0)


@pytest.mark.parametrize("wrap", [guarded, charged, both])
def test_wrappers_pass_on_what_the_target_said_free_of_charge(wrap):
    clock, inner = VirtualClock(), Listener()
    wrapped = wrap(inner, clock)
    assert isinstance(wrapped, ScoreObserver)
    wrapped.begin({}, None)
    wrapped.observe(EMPTY_DRAFT, SCORES)
    assert inner.heard == [(0, 1)]
    assert clock.now_ns() == 0


@pytest.mark.parametrize("wrap", [guarded, charged, both])
def test_a_wrapped_drafter_that_does_not_listen_is_not_told(wrap):
    wrapped = wrap(FakeDrafter(), VirtualClock())
    wrapped.begin({}, None)
    wrapped.observe(EMPTY_DRAFT, SCORES)
    assert wrapped.propose(PLANNED[:1], Plan(4, 4), None) is EMPTY_DRAFT


def test_a_policy_tells_its_drafter_about_every_round():
    """A prefill, then rounds of a bonus token after four that were drafted."""
    clock = VirtualClock()
    drafter = Listener(PLANNED)
    policy = make_policy(clock, drafter=drafter, controller=FakeController(gamma=4))
    chunk = policy.plan(seen(), LATER)
    assert chunk.tokens.tolist() == PLANNED.tolist()
    assert drafter.heard == [(0, 1)] + [(4, 5)] * 6 + [(0, 1)]


def test_a_drafter_that_is_exchanged_later_is_told_in_place_of_the_first():
    clock = VirtualClock()
    first, second = Listener(PLANNED), Listener(PLANNED)
    policy = make_policy(clock, drafter=first, controller=FakeController(gamma=4))
    policy.decoder.drafter = second
    policy.plan(seen(), LATER)
    assert first.heard == []
    assert len(second.heard) == 8
    policy.decoder.drafter = FakeDrafter(PLANNED)
    assert policy.plan(seen(), LATER).rung is Rung.EXACT
    assert len(second.heard) == 8


@pytest.mark.parametrize("error_at", [0, 1, 3])
def test_a_fault_while_listening_is_a_fault_of_the_drafter_and_not_of_the_loop(error_at):
    clock = VirtualClock()
    drafter = Listener(PLANNED, error_at)
    engine = FakeEngine(clock)
    policy = make_policy(clock, engine, drafter, FakeController(gamma=4))
    chunk = policy.plan(seen(), LATER)
    assert (chunk.rung, chunk.tokens.tolist()) == (Rung.EXACT, PLANNED.tolist())
    assert policy.last_record.reason is Reason.DRAFTER_ERROR
    assert policy.guard.num_failures == 1
    assert str(policy.guard.last_error) == "drafter fell over while it listened"
    assert drafter.num_calls == error_at  # silent for the rest of the chunk: no draft, and no word to it
    assert len(drafter.heard) == error_at


def test_a_drafter_that_rests_is_not_told():
    drafter = Listener(PLANNED, error_at=0)
    guard = GuardedDrafter(drafter, 256, max_failures=1, rest_chunks=2)
    for _ in range(2):
        guard.begin({}, None)
        guard.observe(EMPTY_DRAFT, SCORES)
    assert guard.num_failures == 1
    drafter.error_at = None
    guard.begin({}, None)
    guard.observe(EMPTY_DRAFT, SCORES)
    assert drafter.heard == []
    guard.begin({}, None)
    guard.observe(EMPTY_DRAFT, SCORES)
    assert drafter.heard == [(0, 1)]
