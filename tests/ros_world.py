"""ROS in this process: a context and a domain of its own, nodes of ours, a robot's sensors, and ears. Needs rclpy."""

import json
import os
import time

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from vla_spec.errors import BadObservation
from vla_spec.nodes import _messages as messages
from vla_spec.robots.toy import ToyRobot

TIMEOUT_S = 20.0
#: Below the ports that Linux hands out to others, and never the demonstration's 88.
DOMAIN = 51 + os.getpid() % 37
LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
JOINTS = ["tcp_x", "tcp_y", "tcp_z", "gripper"]
UNITS = [0.01, 0.01, 0.01, 1.0]
POLICY = {
    "mode": "autoregressive", "overrides": ["engine=toy"], "joints": JOINTS, "units": UNITS, "max_age_ms": 1000.0,
    "deadline_ms": 1000.0, "warmup_plans": 1,
}  # fmt: skip
ACTOR = {
    "rate_hz": 80.0, "joints": JOINTS, "kinds": ["delta", "delta", "delta", "switch"], "units": UNITS,
    "low": [-1.0] * 4, "high": [1.0] * 4, "dry_run": False, "qos.trajectory.liveliness_s": 0.0,
}  # fmt: skip


class World:
    """One executor, spun by the test whenever it waits for something; it never sleeps."""

    def __init__(self):
        before = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE")
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        self.context = Context()
        rclpy.init(context=self.context, domain_id=DOMAIN)
        if before is None:
            del os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"]
        self.executor = SingleThreadedExecutor(context=self.context)
        self.nodes = []

    def make(self, kind, namespace="", remaps=(), **params):
        """A node of ours; parameters by name, dots as they are."""
        given = [Parameter(name, value=value) for name, value in params.items()]
        cli = [word for remap in remaps for word in ("-r", remap)]
        node = kind(
            context=self.context, namespace=namespace, parameter_overrides=given,
            cli_args=["--ros-args", *cli] if cli else None,
        )  # fmt: skip
        return self.add(node)

    def add(self, node):
        self.executor.add_node(node)
        self.nodes.append(node)
        return node

    def wait_for(self, condition, what, timeout_s=TIMEOUT_S):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
            self.executor.spin_once(timeout_sec=0.02)

    def remove(self, node):
        """End a node as its process would."""
        self.nodes.remove(node)
        self.executor.remove_node(node)
        finish = getattr(node, "finish", None)
        if finish is not None:
            finish()
        node.destroy_node()

    def close(self):
        for node in list(self.nodes):
            self.remove(node)
        self.executor.shutdown()
        rclpy.shutdown(context=self.context)


class Robot(Node):
    """Three cameras and joint states of a toy arm, on the wall clock or on a `/clock` that the test sets."""

    def __init__(self, context, namespace="", clock_topic="/clock"):
        super().__init__("robot", context=context, namespace=namespace)
        self.toy = ToyRobot()
        self.images = [self.create_publisher(messages.Image, f"image_{i}", 1) for i in range(3)]
        self.joints = self.create_publisher(messages.JointState, "joint_states", 1)
        self.words = self.create_publisher(String, "instruction", LATCHED)
        self.time = self.create_publisher(Clock, clock_topic, 1)
        self.commands, self.chunks, self.infos, self.numbers, self.statuses = [], [], [], [], {}
        self.feedback = []
        self.create_subscription(Float64MultiArray, "command", self._on_command, 100)
        self.create_subscription(JointTrajectory, "trajectory", self.chunks.append, 100)
        self.create_subscription(String, "trajectory_info", self._on_info, 100)
        self.create_subscription(Float64MultiArray, "action_chunk", self.numbers.append, 100)
        self.create_subscription(String, "follow_feedback", lambda m: self.feedback.append(json.loads(m.data)), LATCHED)
        self.create_subscription(DiagnosticArray, "status", self._on_status, 10)

    def _on_command(self, message):
        self.commands.append(np.array(message.data))

    def _on_info(self, message):
        try:
            self.infos.append(messages.read_info(message))
        except BadObservation:
            return  # a test's own

    def _on_status(self, message):
        for status in message.status:
            values = {v.key: v.value for v in status.values}
            self.statuses[status.name.rsplit(": ", 1)[1]] = (status.level, status.message, values)

    def say(self, words):
        self.words.publish(String(data=words))

    def tell(self, time_ns):
        """Simulated time."""
        self.time.publish(Clock(clock=messages.to_stamp(time_ns)))

    def show(self, time_ns=None, images=True, state=None):
        """What the arm's sensors say now."""
        stamp = self.get_clock().now().nanoseconds if time_ns is None else time_ns
        values = self.toy.state if state is None else np.array(state, np.float64)
        self.joints.publish(messages.write_joints(JOINTS, values, stamp))
        for publisher, pixels in zip(self.images, self.toy.render(), strict=True):
            if images:
                publisher.publish(messages.write_image(pixels, stamp, ""))
        return stamp

    def is_heard(self):
        """Whether somebody listens to all sensors."""
        return all(p.get_subscription_count() for p in (*self.images, self.joints))
