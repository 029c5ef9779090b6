"""What `monitor_node` recorded, `replay_node` plays, and the policy answers as it did; health and bags. Needs rclpy."""

import time

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("mcap")

from mcap.reader import make_reader
from ros_world import POLICY, Robot, World

from vla_spec.errors import BadConfig
from vla_spec.nodes.monitor_node import MonitorNode
from vla_spec.nodes.policy_node import PolicyNode
from vla_spec.nodes.replay_node import ReplayNode

pytestmark = pytest.mark.slow
DT_NS = 12_500_000
SENSORS = {"/image_0", "/image_1", "/image_2", "/joint_states", "/instruction", "/clock"}


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def start_policy(world):
    node = world.make(PolicyNode, **{**POLICY, "use_sim_time": True, "execute_horizon": 1})
    assert node.trigger_configure().name == "SUCCESS"
    assert node.trigger_activate().name == "SUCCESS"
    return node


def test_a_bag_that_was_recorded_is_played_and_answered(world, tmp_path):
    robot = world.add(Robot(world.context))
    robot.say("go")
    policy = start_policy(world)
    monitor = world.make(MonitorNode, bag=str(tmp_path / "run.mcap"), use_sim_time=True)
    world.wait_for(robot.is_heard, "the policy")
    last = [0, 0.0]

    def is_recorded(num_chunks):
        if time.monotonic() - last[1] > 0.0125:
            last[:] = last[0] + DT_NS, time.monotonic()
            robot.tell(last[0])
            robot.show(last[0])
        return len(robot.infos) > num_chunks and monitor._recorded >= SENSORS | {"/trajectory", "/trajectory_info"}

    world.wait_for(lambda: is_recorded(0), "all topics to be recorded")
    first = len(robot.infos)
    world.wait_for(lambda: is_recorded(first + 12), "chunks to be recorded")
    answers = {info.stamp_ns: info for info in robot.infos[first:]}
    world.remove(policy)
    world.remove(monitor)
    world.remove(robot)
    with (tmp_path / "run.mcap").open("rb") as file:
        summary = make_reader(file).get_summary()
        counts = {summary.channels[k].topic: n for k, n in summary.statistics.channel_message_counts.items()}
        assert {s.encoding for s in summary.schemas.values()} == {"ros2msg"}
    assert all(counts.get(topic, 0) > 0 for topic in SENSORS)

    ear = Robot(world.context)  # only listens: its own publishers say nothing
    world.add(ear)
    start_policy(world)
    world.wait_for(ear.is_heard, "the policy")
    replay = world.make(ReplayNode, bag=str(tmp_path / "run.mcap"), rate=0.5)
    world.wait_for(lambda: replay.is_over() and len(ear.infos) > 3, "answers to the bag")
    same = [info for info in ear.infos if info.stamp_ns in answers]
    assert same  # pictures that were planned for both times
    assert {info.instruction for info in ear.infos} == {"go"}
    assert replay.num_played > 50
    assert min(info.stamp_ns for info in ear.infos) < last[0]


def test_a_damaged_bag_is_one_sentence(world, tmp_path):
    path = tmp_path / "run.mcap"
    robot = world.add(Robot(world.context))
    monitor = world.make(MonitorNode, bag=str(path))
    world.wait_for(lambda: robot.joints.get_subscription_count(), "the recorder")
    robot.show()
    world.wait_for(lambda: monitor._bag.num_messages > 5, "messages")
    world.remove(monitor)
    whole = path.read_bytes()
    third = len(whole) // 3
    for broken in (whole[:40], whole[: 2 * third], b"", whole[:third] + bytes(third) + whole[2 * third :]):
        path.write_bytes(broken)
        with pytest.raises(BadConfig, match=r"replay_node: .*"):
            world.make(ReplayNode, bag=str(path), topics=["*"])
    with pytest.raises(BadConfig, match="MCAP file"):
        world.make(ReplayNode, bag=str(tmp_path))


def test_diagnostics_follow_thresholds(world):
    """OK, WARN by a threshold, ERROR as a node says, STALE when it says nothing any more."""
    from diagnostic_msgs.msg import DiagnosticArray

    robot = world.add(Robot(world.context))
    seen = {}
    robot.create_subscription(
        DiagnosticArray, "/diagnostics", lambda m: seen.update({s.name: (s.level, s.message) for s in m.status}), 10
    )
    policy = world.make(PolicyNode, **POLICY)
    world.make(MonitorNode, planning_p99_ms=0.011, stale_after_s=1.2)
    assert policy.trigger_configure().name == "SUCCESS"
    assert policy.trigger_activate().name == "SUCCESS"
    robot.say("go")
    world.wait_for(robot.is_heard, "the policy")
    shown = [0.0]

    def is_warned():
        if time.monotonic() - shown[0] > 0.05:
            robot.show()
            shown[0] = time.monotonic()
        return seen.get("/monitor_node: chunks", (b"", ""))[0] == b"\x01"

    world.wait_for(is_warned, "the warning")
    assert "planning takes" in seen["/monitor_node: chunks"][1]
    world.wait_for(lambda: seen.get("/policy_node: planner", (b"", ""))[0] == b"\x00", "OK of the planner")
    world.remove(policy)
    world.wait_for(lambda: seen["/policy_node: planner"][0] == b"\x03", "STALE")
