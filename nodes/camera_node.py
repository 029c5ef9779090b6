"""`camera_node`: draws what the simulated world looks like, in a process of its own, as a robot's cameras do.

It has the same world as `sim_node`, reset with the same seed, and is told what moves. A picture has the stamp of the
moment that it shows, not of the moment at which it was ready.
"""

from __future__ import annotations

import time
from typing import Any, cast, final

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Float64MultiArray

from vla_spec.assemble import Assembler
from vla_spec.config import resolve_choice
from vla_spec.errors import BadConfig, BadObservation
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._main import run_node
from vla_spec.nodes._parameters import Parameter, declare, qos_parameters, qos_profile

SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)

PARAMETERS = (
    Parameter("robot", "metaworld", "robot plugin, as of sim_node"),
    Parameter("task", "drawer-close", "task, as of sim_node; empty = the robot has none"),
    Parameter(
        "rate_hz", 20.0, "most pictures per camera and simulated second; 0 = as many as can be drawn", 0.0, 1000.0
    ),
    *qos_parameters("image", SENSOR),
    *qos_parameters("physics", SENSOR),
)


@final
class CameraNode(Node):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("camera_node", **kwargs)
        values = declare(self, PARAMETERS)
        choice = resolve_choice("robot", values["robot"])
        self._robot = cast(Any, Assembler().robot(choice, values["task"] or None))
        if not hasattr(self._robot, "show"):
            raise BadConfig(f"camera_node: robot {choice.name} can't show another one's state; valid: metaworld")
        self._least_ns = round(1e9 / values["rate_hz"]) if values["rate_hz"] > 0 else 0
        self._seed: int | None = None
        self._shown_ns = 0
        self._counts = {"pictures": 0, "refused": 0, "draw_ns": 0}
        profile = qos_profile(values, "image")
        self._publishers_of = [
            self.create_publisher(Image, f"image_{i}", profile) for i in range(self._robot.num_cameras)
        ]
        self._status = self.create_publisher(DiagnosticArray, "status", 10)
        self.create_subscription(Float64MultiArray, "physics", self._on_physics, qos_profile(values, "physics"))
        self.create_timer(1.0, self._publish_status, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _on_physics(self, message: Float64MultiArray) -> None:
        data = np.array(message.data, np.float64)
        if len(data) < 2 or not np.isfinite(data[:2]).all():
            self._refuse(BadObservation("physics", f"{len(data)} numbers", "time, seed, state"))
            return
        time_ns, seed = int(data[0]), int(data[1])
        if seed == self._seed and 0 <= time_ns - self._shown_ns < self._least_ns:
            return
        started_ns = time.monotonic_ns()
        try:
            if seed != self._seed:
                self._robot.reset(seed)
                self._seed = seed
            self._robot.show(data[2:])
        except BadObservation as error:
            self._refuse(error)
            return
        pictures = self._robot.render()
        self._shown_ns = time_ns
        self._counts["pictures"] += 1
        self._counts["draw_ns"] += time.monotonic_ns() - started_ns
        for i, (publisher, pixels) in enumerate(zip(self._publishers_of, pictures, strict=True)):
            publisher.publish(messages.write_image(pixels, time_ns, f"camera_{i}"))

    def _refuse(self, error: Exception) -> None:
        self._counts["refused"] += 1
        self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _publish_status(self) -> None:
        counts = dict(self._counts)
        drawn = counts.pop("draw_ns") / max(counts["pictures"], 1) / 1e6
        values = {**counts, "draw_mean_ms": round(drawn, 3)}
        status = messages.write_status(f"{self.get_fully_qualified_name()}: cameras", values)
        self._status.publish(messages.write_statuses([status], self.get_clock().now().nanoseconds))

    def finish(self) -> None:
        """The process ends."""
        self._robot.close()


def main() -> None:
    """Entry point."""
    run_node(CameraNode)


if __name__ == "__main__":
    main()
