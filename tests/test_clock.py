import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_spec.clock import MonotonicClock, RateKeeper, VirtualClock
from vla_spec.errors import BadConfig


def test_virtual_clock_moves_only_when_told():
    clock = VirtualClock(5)
    assert [clock.now_ns(), clock.now_ns()] == [5, 5]
    clock.advance(10)
    clock.sleep_until_ns(100)
    clock.sleep_until_ns(50)
    assert clock.now_ns() == 100
    with pytest.raises(BadConfig, match="never goes backwards"):
        clock.advance(-1)


def test_monotonic_clock_wakes_no_earlier_than_asked():
    clock = MonotonicClock()
    until = clock.now_ns() + 1_000_000
    clock.sleep_until_ns(until)
    assert clock.now_ns() >= until
    clock.sleep_until_ns(until - 1)  # the past: at once


def test_a_late_tick_does_not_shift_the_later_ones():
    clock = VirtualClock()
    keeper = RateKeeper(clock, 100)
    assert keeper.wait() == 0
    clock.advance(130)  # 30 late for tick 1
    assert (keeper.wait(), keeper.slack_ns, keeper.skip_count) == (100, -30, 0)
    assert keeper.lateness_ns == 30
    assert clock.now_ns() == 130
    assert (keeper.wait(), keeper.slack_ns, keeper.lateness_ns) == (200, 70, 0)
    assert clock.now_ns() == 200


def test_missed_ticks_are_dropped_and_counted():
    clock = VirtualClock()
    keeper = RateKeeper(clock, 100)
    keeper.wait()
    clock.advance(450)
    assert (keeper.wait(), keeper.skip_count) == (400, 3)  # 100, 200 and 300 are gone
    assert keeper.wait() == 500


def test_missed_ticks_are_run_with_catch_up():
    clock = VirtualClock()
    keeper = RateKeeper(clock, 100, catch_up=True)
    keeper.wait()
    clock.advance(350)
    assert [keeper.wait() for _ in range(4)] == [100, 200, 300, 400]
    assert keeper.skip_count == 2  # 100 and 200 began a whole period late
    assert clock.now_ns() == 400


def test_a_schedule_can_be_shifted():
    clock = VirtualClock()
    keeper = RateKeeper(clock, 100, catch_up=True)
    keeper.wait()
    clock.advance(250)
    keeper.shift(250)
    assert (keeper.wait(), keeper.slack_ns, keeper.skip_count) == (350, 100, 0)
    assert keeper.measured_period_ns == 100


def test_measured_period_is_the_mean_since_the_start_and_none_before_two_ticks():
    clock = VirtualClock()
    keeper = RateKeeper(clock, 100, start_ns=10)
    assert keeper.measured_period_ns is None
    keeper.wait()
    assert keeper.measured_period_ns is None
    clock.advance(250)
    keeper.wait()  # at 260
    assert keeper.measured_period_ns == 250
    keeper.wait()  # at 310
    assert keeper.measured_period_ns == 150


def test_period_must_be_positive():
    with pytest.raises(BadConfig, match="more than 0"):
        RateKeeper(VirtualClock(), 0)


@given(st.lists(st.integers(0, 500), max_size=30), st.booleans())
def test_ticks_stay_on_the_schedule_and_never_come_early(work, catch_up):
    clock = VirtualClock(7)
    keeper = RateKeeper(clock, 100, catch_up)
    before = -1
    for duration in work:
        scheduled = keeper.wait()
        assert (scheduled - 7) % 100 == 0
        assert before < scheduled <= clock.now_ns()
        assert catch_up or clock.now_ns() - scheduled < 100
        before = scheduled
        clock.advance(duration)
