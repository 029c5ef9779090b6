"""All nodes as processes on real DDS, with the toy policy and the toy arm: closed loop, killed planner, clean ends.

Every wait is for an event, with a timeout. Needs rclpy.
"""

import json
import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from vla_spec.nodes._lifecycle import transit
from vla_spec.nodes._processes import NodeProcesses

pytestmark = pytest.mark.slow
TIMEOUT_S = 20.0
DOMAIN = str(1 + os.getpid() % 50)
LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
PARAMETERS = """
/**:
  ros__parameters: {use_sim_time: true}
/**/policy_node:
  ros__parameters:
    mode: autoregressive
    overrides: ["engine=toy"]
    joints: [tcp_x, tcp_y, tcp_z, gripper]
    units: [0.01, 0.01, 0.01, 1.0]
    max_age_ms: 400.0
    deadline_ms: 1000.0
/**/action_node:
  ros__parameters:
    rate_hz: 80.0
    joints: [tcp_x, tcp_y, tcp_z, gripper]
    kinds: [delta, delta, delta, switch]
    units: [0.01, 0.01, 0.01, 1.0]
    low: [-1.0, -1.0, -1.0, -1.0]
    high: [1.0, 1.0, 1.0, 1.0]
    dry_run: false
/**/sim_node:
  ros__parameters: {robot: toy, task: "", seeds: ["5"], max_steps: 100000, joints: [tcp_x, tcp_y, tcp_z, gripper]}
/**/camera_node:
  ros__parameters: {robot: toy, task: "", rate_hz: 40.0}
/**/monitor_node:
  ros__parameters: {stale_after_s: 1.5}
"""


class Ear(Node):
    """Hears everything; spins only when a test waits for something."""

    def __init__(self):
        super().__init__("ear")
        self.commands, self.chunks, self.infos, self.statuses = [], [], [], {}
        self.create_subscription(Float64MultiArray, "command", self._on_command, 50)
        self.create_subscription(JointTrajectory, "trajectory", self.chunks.append, 10)
        self.create_subscription(String, "trajectory_info", lambda m: self.infos.append(json.loads(m.data)), 10)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.executor_ = SingleThreadedExecutor()
        self.executor_.add_node(self)

    def _on_command(self, message):
        self.commands.append((time.monotonic(), np.array(message.data)))

    def _on_diagnostics(self, message):
        for status in message.status:
            values = {v.key: v.value for v in status.values}
            self.statuses[status.name] = (status.level, status.message, values)

    def wait_for(self, condition, what, timeout_s=TIMEOUT_S):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
            self.executor_.spin_once(timeout_sec=0.05)

    def transit(self, transition):
        return transit(self, self.executor_, "policy_node", transition, TIMEOUT_S)


@pytest.fixture(scope="module")
def params_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ros") / "toy.yaml"
    path.write_text(PARAMETERS)
    return path


@pytest.fixture(scope="module")
def environment():
    return {"ROS_DOMAIN_ID": DOMAIN, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}


@pytest.fixture
def nodes(tmp_path, environment):
    with NodeProcesses(tmp_path / "logs", environment) as running:
        yield running


@pytest.fixture
def ear(environment):
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    rclpy.init()
    node = Ear()
    yield node
    node.executor_.shutdown()
    node.destroy_node()
    rclpy.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def start(nodes, ear, params_file, names=("action_node", "sim_node", "camera_node")):
    nodes.start("policy_node", params_file)
    for name in names:
        nodes.start(name, params_file)
    assert ear.transit(Transition.TRANSITION_CONFIGURE), nodes.log("policy_node")
    assert ear.transit(Transition.TRANSITION_ACTIVATE), nodes.log("policy_node")


def actor_says(ear):
    return next((status for name, status in ear.statuses.items() if name.endswith(": actor")), (None, "", {}))


def test_the_loop_closes_the_planner_dies_and_comes_back(nodes, ear, params_file, tmp_path):
    nodes.start("monitor_node", params_file, {"bag": str(tmp_path / "all.mcap")})
    start(nodes, ear, params_file)
    ear.wait_for(lambda: len(ear.commands) > 80 and len(ear.chunks) > 5 and len(ear.infos) > 5, "commands and chunks")

    # On the wire: stamps are the observation's, every chunk has its provenance, nothing leaves the limits.
    stamps = {c.header.stamp.sec * 10**9 + c.header.stamp.nanosec for c in ear.chunks}
    known = {info["stamp_ns"]: info for info in ear.infos}
    both = stamps & set(known)
    assert len(both) >= 4
    assert {known[stamp]["rung"] for stamp in both} == {"EXACT"}
    assert all((np.abs(action) <= 1).all() for _, action in ear.commands)
    assert any(np.abs(action[:3]).max() > 0.1 for _, action in ear.commands)

    # SIGKILL of the planner: the arm stands still, and says so.
    os.kill(nodes.running["policy_node"].pid, signal.SIGKILL)
    killed = time.monotonic()
    ear.wait_for(lambda: time.monotonic() > killed + 0.5 and len(ear.commands) > 0, "half a second")
    ear.commands.clear()
    ear.wait_for(lambda: len(ear.commands) > 20, "commands without a planner")
    assert all((action[:3] == 0).all() for _, action in ear.commands)
    ear.wait_for(lambda: actor_says(ear)[1].startswith("planner gone, holding"), "the actor's report")
    assert actor_says(ear)[0] == b"\x02"
    ear.wait_for(
        lambda: any(level == b"\x03" for name, (level, _, _) in ear.statuses.items() if "policy_node" in name),
        "the planner to be stale",
    )

    # A new one takes over without anybody else being restarted.
    nodes.running.pop("policy_node").wait()
    nodes.start("policy_node", params_file)
    assert ear.transit(Transition.TRANSITION_CONFIGURE)
    assert ear.transit(Transition.TRANSITION_ACTIVATE)
    ear.commands.clear()
    ear.wait_for(lambda: any(np.abs(a[:3]).max() > 0.1 for _, a in ear.commands), "motion after the restart")
    assert all((np.abs(action) <= 1).all() for _, action in ear.commands)

    # SIGTERM ends everything with 0; the bag is whole.
    codes = {name: nodes.end(name, signal.SIGTERM) for name in list(nodes.running)}
    assert set(codes) == {"policy_node", "action_node", "monitor_node", "sim_node", "camera_node"}
    assert set(codes.values()) == {0}, codes
    pytest.importorskip("mcap")
    from mcap.reader import make_reader

    with (tmp_path / "all.mcap").open("rb") as file:
        counts = make_reader(file).get_summary().statistics.channel_message_counts
        assert sum(counts.values()) > 100
    # A replay ends with its bag, or when it is asked to.
    replay = nodes.start("replay_node", None, {"bag": str(tmp_path / "all.mcap"), "rate": "0.1"})
    ear.wait_for(lambda: ear.count_publishers("image_0"), "the replay")
    assert replay.poll() is None
    assert nodes.end("replay_node", signal.SIGTERM) == 0


def test_ctrl_c_ends_every_node_with_0(nodes, ear, params_file):
    """Also a policy node that was never configured, and an actor that never heard a chunk."""
    names = ("policy_node", "action_node", "sim_node", "camera_node", "monitor_node")
    for name in names:
        nodes.start(name, params_file)
    ear.wait_for(lambda: {n.split(":")[0].strip("/") for n in ear.statuses} >= set(names), "a report of each")
    for name in names:
        nodes.running[name].send_signal(signal.SIGINT)
    assert {name: nodes.running[name].wait(TIMEOUT_S) for name in names} == dict.fromkeys(names, 0)


def test_bad_parameters_end_a_node_with_one_sentence(tmp_path, environment):
    broken, misspelt = tmp_path / "broken.yaml", tmp_path / "misspelt.yaml"
    broken.write_text("/**:\n  ros__parameters: {rate_hz: [1.0\n")
    misspelt.write_text("/**:\n  ros__parameters: {rate_hz: 0.0, stop_stepps: 3}\n")
    cases = [
        ("action_node", None, {"joints": "[a, b]", "kinds": "[delta, wonderful]"}, "valid: a name and one of delta"),
        ("sim_node", None, {"robot": "nothing"}, "nothing"),
        ("policy_node", None, {"execute_horizon": "0"}, "execute_horizon"),
        ("action_node", broken, {}, "parameter file"),
        ("action_node", misspelt, {}, "rate_hz"),
        ("replay_node", None, {"bag": str(misspelt)}, "no readable MCAP"),
    ]
    groups = [NodeProcesses(tmp_path / str(i), environment) for i in range(len(cases))]
    try:
        processes = [
            group.start(node, file, params) for group, (node, file, params, _) in zip(groups, cases, strict=True)
        ]
        for process, group, (node, _, _, said) in zip(processes, groups, cases, strict=True):
            assert process.wait(TIMEOUT_S) == 2, (node, group.log(node))
            assert said in group.log(node)
            assert "Traceback" not in group.log(node)
    finally:
        for group in groups:
            group.end_all()
