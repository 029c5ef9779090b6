"""Times of the real-time loop, from what a robot saw of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vla_spec.profiling.loop import TimedRobot, period_errors, waits


def test_a_period_error_is_the_time_between_commands_minus_the_period():
    acts = [(0, 5), (12, 15), (25, 26), (33, 40)]
    assert period_errors(acts, [], 12).tolist() == [0, 1, -4]


def test_time_in_which_the_world_stood_still_does_not_count():
    acts = [(0, 5), (112, 115), (124, 126), (236, 240)]
    free = [(6, 106), (130, 200), (210, 240)]
    # 100 within the first gap; 70 and the 26 of the last one that lie before the fourth command.
    assert period_errors(acts, free, 12).tolist() == [0, 0, 236 - 124 - 70 - 26 - 12]


def test_a_chunk_waits_from_ready_to_its_first_command():
    plans = [SimpleNamespace(chunk_id=7, ready_ns=100), SimpleNamespace(chunk_id=8, ready_ns=130),
             SimpleNamespace(chunk_id=9, ready_ns=900)]  # fmt: skip
    result = SimpleNamespace(plans=plans, chunk_ids=np.array([-1, 7, 7, 8, 8], np.int32))
    acts = [(90, 91), (110, 111), (120, 121), (160, 161), (170, 171)]
    assert waits(result, acts, []).tolist() == [10, 30]
    assert waits(result, acts, [(140, 155)]).tolist() == [10, 15]


def test_a_timed_robot_is_the_robot_with_a_watch():
    times = iter(range(0, 1000, 10))

    class Robot:
        action_low, action_high, dt_s, is_success = -1, 1, 0.0125, True
        seed = closed = None

        def reset(self, seed):
            self.seed = seed

        def observe(self, now_ns):
            return ("seen", now_ns)

        def act(self, action, now_ns):
            return action + 1

        def close(self):
            self.closed = True

    robot = Robot()
    timed = TimedRobot(robot, lambda: next(times))
    timed.reset(3)
    assert timed.observe(5) == ("seen", 5)
    assert timed.act(1, 6) == 2
    assert (timed.observes, timed.acts) == ([(0, 10)], [(20, 30)])
    assert (timed.action_low, timed.action_high, timed.dt_s, timed.is_success, robot.seed) == (-1, 1, 0.0125, True, 3)
    timed.reset(4)
    assert timed.observes == timed.acts == []
    timed.close()
    assert robot.closed


def test_two_commands_make_one_period():
    assert len(period_errors([(0, 1)], [], 5)) == 0
    with pytest.raises(StopIteration):
        next(iter(period_errors([], [], 5)))
