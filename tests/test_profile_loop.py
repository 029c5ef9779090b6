"""Times of the real-time loop, from what a robot saw of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from vla_spec.actor_process import ActorProcess
from vla_spec.assemble import Assembler
from vla_spec.config import resolve
from vla_spec.profiling.loop import TimedRobot, open_robot, period_errors, play, waits
from vla_spec.profiling.profiler import loop_of

#: Asks for nothing but the process.
QUIET = {"fifo_priority": 0, "planner_priority": 0, "lock_memory": False, "freeze_gc": False}


def test_a_period_error_is_how_much_later_one_step_is_than_the_one_before():
    result = SimpleNamespace(realtime=SimpleNamespace(lateness_ns=np.array([0, 5, 3, 3, 40], np.int64)))
    assert period_errors(result).tolist() == [5, -2, 0, 37]


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


def test_the_actor_gets_a_process_of_its_own_if_the_configuration_asks_for_one():
    tree = {"engine": "toy", "robot": "toy", "runtime": {"clock": "real", "realtime": QUIET}}
    config = resolve(tree)
    assembler = Assembler()
    example = assembler.robot(config.robot, None)
    example.reset(0)
    assembly = assembler.assemble(config, example.observe(0))
    robot = open_robot(assembler, assembly, None)
    try:
        assert isinstance(robot, ActorProcess)
        played = play(assembly, robot, 0, 50_000_000, 6)
    finally:
        robot.close()
    assert played.result.num_steps == 6
    assert len(played.period_error_ns) == 5
    assert played.result.realtime.is_own_process
    assert len(played.wait_ns) == len(played.acts) == 0
    loop = loop_of([played], assembly.domain.num_tokens)
    assert loop.wait is None
    assert loop.realtime["is_own_process"]
    assert loop.plans >= 1


def test_without_it_the_actor_is_watched():
    config = resolve({"engine": "toy", "robot": "toy"})
    assembler = Assembler()
    example = assembler.robot(config.robot, None)
    example.reset(0)
    assembly = assembler.assemble(config, example.observe(0))
    robot = open_robot(assembler, assembly, None)
    played = play(assembly, robot, 0, 50_000_000, 6)
    robot.close()
    assert len(played.acts) == 6
    assert len(played.wait_ns) >= 1
    assert (played.wait_ns >= 0).all()
    assert loop_of([played], assembly.domain.num_tokens).wait is not None
