import pytest

from vla_spec.errors import BadConfig
from vla_spec.ladder import Ladder, LadderOptions, Reason
from vla_spec.types import Rung


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
