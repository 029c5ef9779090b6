"""`action_node` in this process on the real middleware: what it plays, and what makes it decelerate. Needs rclpy."""

import itertools
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.duration import Duration
from rclpy.event_handler import PublisherEventCallbacks
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_world import ACTOR, JOINTS, UNITS, Robot, World
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_spec.action_space import DofKind
from vla_spec.nodes import _messages as messages
from vla_spec.nodes import action_node as module
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.nodes.action_node import ActionNode
from vla_spec.types import ActionChunk, Provenance, Rung

pytestmark = pytest.mark.slow
DT_NS = 12_500_000
KINDS = {kind.name.lower(): kind for kind in DofKind}


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


class Planner:
    """Publishes chunks whose numbers the test chooses."""

    def __init__(self, world, robot, kinds=None, profile=1, has_info=True):
        kinds = kinds or ACTOR["kinds"]
        self.layout = ActionLayout(tuple(JOINTS), tuple(KINDS[kind] for kind in kinds), tuple(UNITS), 0.0125)
        self.robot, self.num_sent = robot, 0
        events = PublisherEventCallbacks(use_default_callbacks=False)
        self.trajectory = robot.create_publisher(JointTrajectory, "trajectory", profile, event_callbacks=events)
        self.info = robot.create_publisher(String, "trajectory_info", 1) if has_info else None
        world.wait_for(
            lambda: self.trajectory.get_subscription_count() > 1 or profile != 1, "the actor to listen"
        )  # fmt: skip
        world.wait_for(lambda: robot.count_publishers("command"), "the actor to speak")

    def send(self, actions, stamp_ns=None, is_verified=True):
        """Float rows [h, 4]; returns the stamp."""
        actions = np.array(actions, np.float32)
        stamp = self.robot.get_clock().now().nanoseconds if stamp_ns is None else stamp_ns
        provenance = np.full(actions.shape, Provenance.EXACT if is_verified else Provenance.DRAFTED, np.uint8)
        rung = Rung.EXACT if is_verified else Rung.DRAFT_TAIL
        chunk = ActionChunk(actions, provenance, rung, self.num_sent, "go", stamp, 0, 0, 0, 0, np.zeros(0, np.int32))
        self.num_sent += 1
        trajectory, info = messages.write_chunk(chunk, self.layout, [0.0] * 4)
        if self.info is not None:
            self.info.publish(info)
        self.trajectory.publish(trajectory)
        return stamp


def begin(world, profile=1, has_info=True, **params):
    robot = world.add(Robot(world.context))
    node = world.make(ActionNode, **{**ACTOR, **params})
    return robot, node, Planner(world, robot, params.get("kinds"), profile, has_info)


def rows(value, num_rows=200):
    return np.tile(np.array([value, 0.0, 0.0, 1.0]), (num_rows, 1))


def ramp(num_rows):
    """Row i says so in its first number, in thousandths."""
    made = rows(0.0, num_rows)
    made[:, 0] = np.arange(num_rows) / 1000
    return made


def status(world, robot, condition, what):
    world.wait_for(lambda: "actor" in robot.statuses and condition(*robot.statuses["actor"]), what)
    return robot.statuses["actor"]


def wait_until_it_stands(world, robot, what):
    """A decelerating stop from full speed: each command slower than the one before, to zero."""
    start = len(robot.commands)
    world.wait_for(lambda: len(robot.commands) > start and robot.commands[-1][0] == 0, what)
    speeds = [command[0] for command in robot.commands[start:]]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(speeds)), speeds
    assert any(0 < speed < 1 for speed in speeds), speeds
    assert robot.commands[-1][3] == 1  # the gripper stays as it was


def call(world, robot, name):
    client = robot.create_client(Trigger, name)
    world.wait_for(client.service_is_ready, name)
    future = client.call_async(Trigger.Request())
    world.wait_for(future.done, f"the answer of {name}")
    assert future.result().success


def test_an_arm_that_waited_begins_with_the_first_row_and_misses_none(world):
    robot, node, planner = begin(world)
    planner.send(ramp(24), robot.get_clock().now().nanoseconds - 8 * DT_NS)
    world.wait_for(lambda: len(robot.commands) >= 24, "commands")
    told = [round(1000 * command[0]) for command in robot.commands[:24]]
    assert told[:2] == [0, 1]
    assert told == sorted(set(told))
    assert node._counts["without_provenance"] == 0


def test_a_new_chunk_is_entered_where_its_observation_lies(world):
    robot, _, planner = begin(world)
    planner.send(rows(0.5))
    world.wait_for(lambda: len(robot.commands) > 10, "commands")
    stamp = planner.send(ramp(100))
    known = len(robot.commands)
    world.wait_for(lambda: any(command[0] != 0.5 for command in robot.commands[known:]), "the new chunk")
    now = robot.get_clock().now().nanoseconds
    row = round(1000 * next(command[0] for command in robot.commands[known:] if command[0] != np.float32(0.5)))
    assert 0 <= row <= (now - stamp) / DT_NS + 2


@pytest.mark.parametrize("loss", ["silence", "deadline", "liveliness"])
def test_a_planner_that_is_lost_is_a_decelerating_stop_in_the_middle_of_its_chunk(world, loss):
    quick = {"planner_timeout_s": 0.4 if loss == "silence" else 60.0}
    profile, has_profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE), loss != "silence"
    if loss == "deadline":
        quick["qos.trajectory.deadline_s"], profile.deadline = 0.3, Duration(seconds=0.2)
    if loss == "liveliness":
        quick["qos.trajectory.liveliness_s"], profile.liveliness_lease_duration = 0.5, Duration(seconds=0.3)
    robot, node, planner = begin(world, profile if has_profile else 1, not has_profile, **quick)
    world.wait_for(lambda: planner.trajectory.get_subscription_count(), "the actor")
    planner.send(rows(1.0, 1000))
    world.wait_for(lambda: robot.commands and robot.commands[-1][0] == 1.0, "full speed")
    if loss == "liveliness":
        robot.destroy_publisher(planner.trajectory)
    wait_until_it_stands(world, robot, "the stop")
    assert len(robot.commands) < 1000  # the chunk would have gone on
    name = {"silence": "planner_gone", "deadline": "deadline_missed", "liveliness": "liveliness_lost"}[loss]
    assert node._counts[name] >= 1
    level, said, _ = status(world, robot, lambda *s: s[1].startswith("planner gone"), "the report")
    assert level == b"\x02"
    assert {"silence": "no trajectory", "deadline": "deadline", "liveliness": "sign of life"}[loss] in said
    if loss == "liveliness":
        planner = Planner(world, robot, profile=profile, has_info=False)
        world.wait_for(lambda: planner.trajectory.get_subscription_count(), "the actor")
    planner.send(rows(0.5))  # it comes back: nobody else is restarted
    world.wait_for(lambda: robot.commands[-1][0] > 0.2, "motion")


def test_a_planner_that_is_slower_than_the_timeout_stops_and_goes(world):
    """Its chunk was observed before the stop; it is played all the same, or it would never be."""
    robot, _, planner = begin(world, planner_timeout_s=0.05)
    for i in range(3):
        stamp = robot.get_clock().now().nanoseconds
        known = len(robot.commands)
        world.wait_for(lambda known=known, i=i: i == 0 or len(robot.commands) > known + 20, "a long plan")
        planner.send(rows(1.0, 16), stamp)
        world.wait_for(lambda: robot.commands and robot.commands[-1][0] == 1.0, "motion")
        world.wait_for(lambda: robot.commands[-1][0] == 0.0, "a stand")


def test_a_chunk_without_provenance_is_played_but_bounded(world):
    robot, node, planner = begin(world, has_info=False)
    planner.send(rows(0.0))
    world.wait_for(lambda: len(robot.commands) > 5, "commands")
    planner.send(rows(1.0))
    known = len(robot.commands)
    world.wait_for(lambda: robot.commands[-1][0] == 1.0, "full speed")
    speeds = [command[0] for command in robot.commands[known - 1 :]]
    assert max(np.diff(speeds)) <= 0.5 + 1e-6  # a quarter of the range per step
    assert node._counts["without_provenance"] == 2


def test_what_is_not_of_now_or_not_of_this_arm_is_refused(world):
    robot, node, planner = begin(world)
    now = robot.get_clock().now().nanoseconds
    for stamp, said in ((now - 10 * 10**9, "old"), (now + 10 * 10**9, "ahead")):
        planner.send(rows(1.0), stamp)
        count = node._counts["refused"]
        world.wait_for(lambda count=count: node._counts["refused"] > count, said)
    planner.info.publish(String(data='{"stamp_ns": 1, "provenance": [[-1]], "rung": "EXACT"}'))
    world.wait_for(lambda: node._counts["refused"] == 3, "the refusal of the provenance")
    level, said, _ = status(world, robot, lambda *s: s[2]["refused"] == "3", "the report")
    assert (level, said) == (b"\x00", "waiting for the first chunk")
    assert not robot.commands
    planner.send(rows(1.0))
    world.wait_for(lambda: robot.commands, "a chunk that is all right")


@pytest.mark.parametrize("kind", ["position", "velocity", "delta"])
def test_hold_decelerates_whatever_a_joint_is_told_and_resume_waits_for_a_new_observation(world, kind):
    """A position is held where it was sent, never sent to zero; a velocity is brought to zero, never left as it was."""
    robot, _, planner = begin(world, kinds=[kind] * 3 + ["switch"])
    planner.send(rows(0.8))
    world.wait_for(lambda: len(robot.commands) > 5 and robot.commands[-1][0] == np.float32(0.8), "motion")
    call(world, robot, "hold")
    known = len(robot.commands)
    world.wait_for(lambda: len(robot.commands) > known + 24, "commands while held")
    planner.send(rows(0.3))  # while held, nothing is played
    world.wait_for(lambda: len(robot.commands) > known + 34, "commands while held")
    assert robot.commands[-1][0] == (np.float32(0.8) if kind == "position" else 0.0)
    before = robot.get_clock().now().nanoseconds
    call(world, robot, "resume")
    planner.send(rows(0.3), before)
    status(world, robot, lambda *s: s[2]["refused"] == "1", "the refusal of an old observation")
    planner.send(rows(0.3))
    world.wait_for(lambda: robot.commands[-1][0] == np.float32(0.3), "motion again")


def test_reset_is_silence_until_the_next_chunk(world):
    robot, node, planner = begin(world)
    planner.send(rows(1.0))
    world.wait_for(lambda: len(robot.commands) > 5, "motion")
    call(world, robot, "reset")
    known, ticks = len(robot.commands), node._ticks.num_ticks
    world.wait_for(lambda: node._ticks.num_ticks > ticks + 10, "ticks")
    assert len(robot.commands) <= known + 2  # those that were on their way
    planner.send(ramp(24))
    known = len(robot.commands)
    world.wait_for(lambda: len(robot.commands) > known, "motion")
    assert robot.commands[known][0] == 0.0  # the first row


def test_a_date_that_is_set_is_a_stop_and_then_business_as_usual(world, monkeypatch):
    """NTP steps the system's clock: nobody tells, so it is seen. The control rate is on the steady clock."""
    robot, node, planner = begin(world)
    planner.send(rows(1.0))
    world.wait_for(lambda: len(robot.commands) > 5, "motion")
    real = node._now_ns
    monkeypatch.setattr(node, "_now_ns", lambda: real() - 3600 * 10**9)
    wait_until_it_stands(world, robot, "the stop")
    assert node._counts["clock_jumps"] == 1
    planner.send(rows(0.5), node._now_ns())
    world.wait_for(lambda: robot.commands[-1][0] == 0.5, "motion in the new time")
    assert node._counts["clock_jumps"] == 1


def test_simulated_time_may_jump_back_or_stand_still(world, monkeypatch):
    robot, node, planner = begin(world, use_sim_time=True, clock_timeout_s=0.4)
    status(world, robot, lambda *s: "nothing comes on /clock" in s[1], "the report")
    assert not robot.commands

    class Time:
        now, last = 0, 0.0

    def goes_on():
        if time.monotonic() - Time.last > 0.0125:
            Time.now, Time.last = Time.now + DT_NS, time.monotonic()
            robot.tell(Time.now)

    def until(condition, what):
        world.wait_for(lambda: goes_on() or condition(), what)

    Time.now = 90 * 10**9
    until(lambda: node._now_ns() >= Time.now - DT_NS, "the time")
    planner.send(rows(1.0), Time.now)
    until(lambda: len(robot.commands) > 5, "motion")
    Time.now = 5 * 10**9
    start = len(robot.commands)
    until(lambda: robot.commands[-1][0] == 0, "a stand after the jump")
    assert any(0 < command[0] < 1 for command in robot.commands[start:])
    assert node._counts["clock_jumps"] == 1
    planner.send(rows(0.5), Time.now)
    until(lambda: robot.commands[-1][0] == 0.5, "motion in the new time")
    # The simulator dies: no tick comes any more, but the watchdog is on another clock.
    wait_until_it_stands_from_half(world, robot)
    _, said, _ = status(world, robot, lambda *s: s[0] == b"\x02", "the report")
    assert "stands still" in said or "planner gone" in said
    assert node._counts["clock_stalls"] == 1
    Time.now += DT_NS
    until(lambda: not node._is_stalled, "time to go on")
    planner.send(rows(0.5), Time.now + DT_NS)
    until(lambda: robot.commands[-1][0] == 0.5, "motion when time goes on")


def wait_until_it_stands_from_half(world, robot):
    start = len(robot.commands)
    world.wait_for(lambda: len(robot.commands) > start + 8 and robot.commands[-1][0] == 0, "commands without time")
    assert any(0 < command[0] < 0.5 for command in robot.commands[start:])


def test_the_end_of_the_process_is_a_decelerating_stop(world):
    robot, node, planner = begin(world)
    planner.send(rows(1.0))
    world.wait_for(lambda: robot.commands and robot.commands[-1][0] == 1.0, "motion")
    world.remove(node)
    wait_until_it_stands(world, robot, "the stop")


def test_a_dry_run_says_what_it_would_do_and_sends_nothing(world):
    robot, _, planner = begin(world, dry_run=True)
    planner.send(rows(1.0, 24))
    _, _, values = status(world, robot, lambda *s: int(s[2]["commands.exact"]) >= 20, "the report")
    assert values["dry_run"] == "True"
    assert not robot.commands


@pytest.mark.parametrize(
    "wrong",
    [{"low": [-1.0]}, {"high": [1.0]}, {"max_change": [0.1]}, {"kinds": ["delta", "delta", "delta", "wonderful"]},
     {"units": [1.0]}, {"low": [2.0] * 4}, {"joints": ["a", "a", "b", "c"]}, {"hand_over": "wonderful"}],
)  # fmt: skip
def test_parameters_that_contradict_each_other_are_refused(world, wrong):
    with pytest.raises(module.BadConfig, match=r"valid|must be"):
        world.make(ActionNode, **{**ACTOR, **wrong})


def test_commands_keep_their_limits_when_a_chunk_does_not(world):
    """A little outside: clamped and counted; far outside: refused as a whole."""
    robot, node, planner = begin(world)
    planner.send(rows(1.6, 24))
    world.wait_for(lambda: len(robot.commands) > 24, "commands")
    assert max(np.abs(robot.commands).ravel()) == 1.0
    assert node._counts["clamped"] == 24
    planner.send(rows(50.0))
    world.wait_for(lambda: node._counts["refused"] == 1, "the refusal")
    known = len(robot.commands)
    world.wait_for(lambda: len(robot.commands) > known + 8, "commands")
    assert robot.commands[-1][0] == 0.0
