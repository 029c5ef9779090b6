"""`policy_node` in this process on the real middleware: the wire, what it refuses, what it survives. Needs rclpy."""

import time

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.event_handler import PublisherEventCallbacks
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_world import ACTOR, JOINTS, POLICY, UNITS, Robot, World
from sensor_msgs.msg import Image
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from vla_spec.errors import BadConfig
from vla_spec.nodes import _messages as messages
from vla_spec.nodes import policy_node as module
from vla_spec.nodes.action_node import ActionNode
from vla_spec.nodes.policy_node import PolicyNode
from vla_spec.types import Provenance, Rung

pytestmark = pytest.mark.slow
DT_NS = 12_500_000


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def ok(result):
    return result.name == "SUCCESS"


def begin(world, words="go", **params):
    """A robot that says something, and a policy that is active and connected."""
    robot = world.add(Robot(world.context))
    node = world.make(PolicyNode, **{**POLICY, **params})
    assert ok(node.trigger_configure())
    assert ok(node.trigger_activate())
    robot.say(words)
    world.wait_for(lambda: robot.is_heard() and robot.count_publishers("trajectory"), "the policy to listen")
    return robot, node


def chunk_of(world, robot, words=None, what="a chunk"):
    """Show pictures until a chunk comes that obeys these words; the chunk's provenance."""
    seen, shown = len(robot.infos), [0.0]

    def is_there():
        if time.monotonic() - shown[0] > 0.03:
            robot.show()
            shown[0] = time.monotonic()
        return any(words in (None, info.instruction) for info in robot.infos[seen:])

    world.wait_for(is_there, what)
    return next(info for info in robot.infos[seen:] if words in (None, info.instruction))


def says(world, robot, name, condition, what):
    world.wait_for(lambda: name in robot.statuses and condition(*robot.statuses[name]), what)
    return robot.statuses[name]


def call(world, robot, name):
    client = robot.create_client(Trigger, name)
    world.wait_for(client.service_is_ready, name)
    future = client.call_async(Trigger.Request())
    world.wait_for(future.done, f"the answer of {name}")
    return future.result()


def test_a_chunk_says_when_each_joint_is_where_and_where_its_numbers_came_from(world):
    robot, _ = begin(world, publishes_actions=True)
    stamp = robot.show()
    world.wait_for(lambda: robot.chunks and robot.infos and robot.numbers, "a chunk")
    chunk, info = robot.chunks[0], robot.infos[0]
    assert messages.stamp_ns(chunk.header.stamp) == info.stamp_ns == stamp
    assert chunk.joint_names == JOINTS
    times = [p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in chunk.points]
    assert times == [(i + 1) * DT_NS for i in range(len(times))]
    assert info.rung is Rung.EXACT
    assert info.provenance.shape == (len(times), 4)
    assert (info.provenance == Provenance.EXACT).all()
    assert info.planning_ms > 0
    assert info.slack_ms > 0
    # Positions are where the arm was when it was seen, plus the increments; a switch is its own value.
    actions = np.array(robot.numbers[0].data).reshape(len(times), 4)
    places = np.array([p.positions for p in chunk.points])
    expected = robot.toy.state[:3] + np.cumsum(actions[:, :3] * UNITS[:3], 0)
    np.testing.assert_allclose(places[:, :3], expected, atol=1e-6)
    np.testing.assert_allclose(places[:, 3], actions[:, 3])
    speeds = np.array([p.velocities for p in chunk.points])
    np.testing.assert_allclose(speeds[:, :3], actions[:, :3] * UNITS[:3] / 0.0125, atol=1e-6)


def test_who_joins_late_gets_the_instruction(world):
    robot = world.add(Robot(world.context))
    robot.say("the goal")
    node = world.make(PolicyNode, **POLICY)
    assert ok(node.trigger_configure())
    assert ok(node.trigger_activate())
    world.wait_for(robot.is_heard, "the policy to listen")
    assert chunk_of(world, robot).instruction == "the goal"


def test_what_no_policy_can_use_is_refused_and_counted_while_the_loop_goes_on(world):
    robot, _ = begin(world)
    chunk_of(world, robot)
    now = robot.get_clock().now().nanoseconds
    robot.images[0].publish(Image(height=2, width=2, encoding="yuv422", step=4, data=bytes(8)))
    robot.show(state=[np.nan, 0, 0, 0], images=False)
    robot.images[1].publish(Image(height=9, width=9, encoding="rgb8", step=27, data=bytes(3)))
    says(world, robot, "planner", lambda *s: int(s[2].get("refused", 0)) >= 3, "three refusals")
    # One camera's picture of another size: no observation, and no end of the planning thread.
    other = messages.write_image(np.zeros((4, 4, 3), np.uint8), now, "")
    chunk_of(world, robot)
    robot.images[2].publish(other)
    assert chunk_of(world, robot).rung is Rung.EXACT


def test_other_quality_of_service_is_counted_and_reported(world):
    robot, _ = begin(world, **{"qos.image.reliability": "reliable"})
    other = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    robot.create_publisher(
        Image, "image_0", other, event_callbacks=PublisherEventCallbacks(use_default_callbacks=False)
    )
    level = says(world, robot, "planner", lambda *s: s[2].get("incompatible_qos") == "1", "the report")
    assert level[2]["state"] == "active"
    assert chunk_of(world, robot) is not None


def test_an_instruction_takes_effect_with_the_first_plan_that_begins_after_it(world):
    robot, _ = begin(world, words="go", execute_horizon=1000)
    chunk_of(world, robot, "go")
    robot.say("goal")
    changed = len(robot.infos)
    chunk_of(world, robot, "goal", "a chunk that obeys")
    assert [info.instruction for info in robot.infos[changed:]].count("go") <= 1  # the plan that was being made
    # No words: the arm is stopped, once.
    robot.say("")
    world.wait_for(lambda: robot.infos[-1].rung is Rung.STOP, "a stop")
    assert (robot.infos[-1].provenance == Provenance.HOLD).all()
    stopped = len(robot.infos)
    robot.show()
    says(world, robot, "planner", lambda *s: s[1] == "no instruction: nothing to do", "its report")
    assert len(robot.infos) == stopped


def test_changes_of_decoding_take_turns_with_plans(world, monkeypatch):
    """Target and drafter share an engine: whoever builds a drafter and measures it must not meet a plan."""
    inside, met = [], []

    def guarded(call):
        def wrapped(*args, **kwargs):
            met.append(bool(inside))
            inside.append(1)
            try:
                return call(*args, **kwargs)
            finally:
                inside.pop()

        return wrapped

    monkeypatch.setattr(module.Assembler, "assemble", guarded(module.Assembler.assemble))
    robot, node = begin(world, execute_horizon=1)
    node._assembly.policy.plan = guarded(node._assembly.policy.plan)
    chunk_of(world, robot)
    for mode in ("ngram", "autoregressive", "ngram"):
        robot.show()  # the planner has something to do meanwhile
        (result,) = node.set_parameters([Parameter("mode", value=mode)])
        assert result.successful, result.reason
        node._assembly.policy.plan = guarded(node._assembly.policy.plan)
        chunk_of(world, robot)
    assert not any(met)
    assert len(met) > 6
    assert node._assembly.config.mode == "ngram"
    for name, value, said in (
        ("mode", "wonderful", "wonderful"), ("overrides", ["drafter.wonderful=1"], "wonderful"), ("model", "x", "read"),
        ("deadline_ms", -1.0, "deadline_ms"),
    ):  # fmt: skip
        (result,) = node.set_parameters([Parameter(name, value=value)])
        assert not result.successful
        assert said in result.reason
    assert node.set_parameters([Parameter("deadline_ms", value=77.0)])[0].successful
    assert call(world, robot, "policy_node/reload").success
    assert chunk_of(world, robot).rung is Rung.EXACT


def test_an_error_while_planning_is_a_stop_and_an_error_state_and_can_be_left(world, monkeypatch):
    robot, node = begin(world)
    chunk_of(world, robot)

    def fail(*args):
        raise ZeroDivisionError("the driver is gone")

    monkeypatch.setattr(node._loop, "look", fail)
    robot.show()
    world.wait_for(lambda: robot.infos[-1].rung is Rung.STOP, "the stop")
    _, said, values = says(world, robot, "planner", lambda *s: s[0] == b"\x02", "the report")
    assert "the driver is gone" in said
    assert (values["state"], values["failures"]) == ("unconfigured", "1")
    assert robot.count_publishers("trajectory") == 0
    assert ok(node.trigger_configure())
    assert ok(node.trigger_activate())
    world.wait_for(robot.is_heard, "the policy to listen again")
    assert chunk_of(world, robot).rung is Rung.EXACT
    says(world, robot, "planner", lambda *s: s[0] == b"\x00", "the all-clear")


def test_transitions_there_and_back_leave_nothing_behind(world):
    robot, node = begin(world)
    for _ in range(3):
        chunk_of(world, robot)
        assert ok(node.trigger_deactivate())
        world.wait_for(lambda: robot.infos[-1].rung is Rung.STOP, "the stop")
        assert ok(node.trigger_cleanup())
        assert robot.count_publishers("trajectory") == 0
        assert ok(node.trigger_configure())
        assert ok(node.trigger_activate())
        world.wait_for(robot.is_heard, "the policy to listen")
    before = sum(1 for _ in node.timers), sum(1 for _ in node.subscriptions), sum(1 for _ in node.services)
    assert ok(node.trigger_deactivate())
    assert ok(node.trigger_cleanup())
    assert ok(node.trigger_configure())
    assert (sum(1 for _ in node.timers), sum(1 for _ in node.subscriptions), sum(1 for _ in node.services)) == before
    assert ok(node.trigger_shutdown())


def test_a_clock_that_jumps_back_begins_a_new_time(world):
    robot = world.add(Robot(world.context))
    node = world.make(PolicyNode, **{**POLICY, "use_sim_time": True, "max_age_ms": 100.0})
    assert ok(node.trigger_configure())
    assert ok(node.trigger_activate())
    says(world, robot, "planner", lambda *s: "nothing came on /clock" in s[1], "the report")
    robot.say("go")
    world.wait_for(robot.is_heard, "the policy to listen")

    def play(start_ns):
        """Time goes on until a chunk of it comes."""
        known, now = len(robot.infos), [start_ns]

        def is_there():
            robot.tell(now[0])
            robot.show(now[0])
            now[0] += DT_NS
            return any(start_ns <= info.stamp_ns <= now[0] for info in robot.infos[known:])

        world.wait_for(is_there, "a chunk of this time")

    play(50 * 10**9)
    play(2 * 10**9)
    _, _, values = says(world, robot, "planner", lambda *s: int(s[2].get("clock_jumps", 0)) >= 1, "the report")
    assert values["state"] == "active"


def test_two_robots_in_two_namespaces_do_not_hear_each_other(world):
    robots = {side: world.add(Robot(world.context, side, f"/{side}/clock")) for side in ("left", "right")}
    remaps = ("/clock:=clock",)
    policies = [world.make(PolicyNode, s, remaps, **{**POLICY, "use_sim_time": True}) for s in robots]
    actors = [world.make(ActionNode, s, remaps, **{**ACTOR, "use_sim_time": True}) for s in robots]
    for node in policies:
        assert ok(node.trigger_configure())
        assert ok(node.trigger_activate())
    world.wait_for(lambda: all(robot.is_heard() for robot in robots.values()), "both policies")
    robots["left"].say("go")
    robots["right"].say("goal")
    start, shown = time.monotonic_ns(), {"left": 0, "right": 0}
    offset = {"left": 10**9, "right": 500 * 10**9}

    def is_moving(*sides):
        for side in sides:
            now = (time.monotonic_ns() - start) // DT_NS * DT_NS + offset[side]  # two worlds, each with its own time
            if now > shown[side]:
                robots[side].tell(now)
                robots[side].show(now)
                shown[side] = now
        return all(robots[side].commands for side in sides)

    world.wait_for(lambda: is_moving("left"), "commands of the left one")
    assert not robots["right"].commands
    assert not robots["right"].infos
    world.wait_for(lambda: is_moving("left", "right"), "commands of both")
    assert {info.instruction for info in robots["left"].infos} == {"go"}
    assert {info.instruction for info in robots["right"].infos} == {"goal"}
    assert all(info.stamp_ns < 400 * 10**9 for info in robots["left"].infos)
    assert [n.get_fully_qualified_name() for n in actors] == ["/left/action_node", "/right/action_node"]


@pytest.mark.parametrize(("end", "status", "said"), [
    ("done", "SUCCEEDED", "done"), ("cancel", "CANCELED", "on request"), ("timeout", "ABORTED", "timeout"),
    ("words", "ABORTED", "another instruction came"), ("goal", "ABORTED", "another goal came"),
])  # fmt: skip
def test_a_goal_is_followed_until(world, end, status, said):
    robot, _ = begin(world, words="go")
    ask, done = robot.create_publisher(String, "follow", 10), robot.create_publisher(Bool, "done", 10)
    world.wait_for(lambda: ask.get_subscription_count() and done.get_subscription_count(), "the policy")
    timeout_s = 0.8 if end == "timeout" else 30
    ask.publish(String(data=f'{{"goal_id": "g1", "instruction": "to go", "timeout_s": {timeout_s}}}'))
    chunk_of(world, robot, "to go", "a chunk that follows the goal")
    world.wait_for(lambda: any(f["status"] == "EXECUTING" and f["rung"] for f in robot.feedback), "feedback")
    if end == "done":
        done.publish(Bool(data=True))
    elif end == "cancel":
        assert call(world, robot, "cancel_follow").success
    elif end == "words":
        robot.say("goal")
    elif end == "goal":
        ask.publish(String(data='{"goal_id": "g2", "instruction": "the"}'))
    world.wait_for(lambda: any(f["status"] == status for f in robot.feedback), "the end")
    last = next(f for f in robot.feedback if f["status"] == status)
    assert (last["goal_id"], last["says"]) == ("g1", said)
    if end in ("words", "goal"):
        chunk_of(world, robot, "goal" if end == "words" else "the", "a chunk that obeys the new words")
    else:
        world.wait_for(lambda: robot.infos[-1].rung is Rung.STOP, "the stop")
        assert not call(world, robot, "cancel_follow").success


def test_goals_are_refused_where_nobody_plans(world):
    robot, node = begin(world)
    ask = robot.create_publisher(String, "follow", 10)
    world.wait_for(ask.get_subscription_count, "the policy")
    assert ok(node.trigger_deactivate())
    ask.publish(String(data='{"goal_id": "g1", "instruction": "to go"}'))
    world.wait_for(lambda: robot.feedback, "the refusal")
    assert (robot.feedback[0]["status"], robot.feedback[0]["says"]) == ("ABORTED", "policy_node is inactive")
    ask.publish(String(data="push!"))
    says(world, robot, "planner", lambda *s: s[2]["refused"] == "1", "the count")


def test_a_model_that_is_not_there_leaves_the_node_unconfigured_and_says_so(world, tmp_path):
    robot = world.add(Robot(world.context))
    node = world.make(PolicyNode, model=str(tmp_path / "nothing"))
    assert node.trigger_configure().name == "FAILURE"
    level, said, values = says(world, robot, "planner", lambda *s: s[0] == b"\x02", "the report")
    assert "no such folder" in said
    assert (level, values["state"]) == (b"\x02", "unconfigured")
    for name, value in (("dt_s", -1.0), ("qos.image.reliability", "wonderful")):
        with pytest.raises(BadConfig, match=name):
            world.make(PolicyNode, **{name: value})
    node = world.make(PolicyNode, **{**POLICY, "joints": ["a"]})
    assert node.trigger_configure().name == "FAILURE"  # one name for four joints
    assert node._assembly is None
