"""`monitor_node`: one picture of health on `/diagnostics`, once a second, and optionally a bag of everything.

Each node says on `status` what it counts; what only an observer sees is measured here: rates of topics, the regularity
of commands, the time from a picture to its chunk. Levels follow from thresholds in parameters: WARN beyond one, ERROR
where the arm has no plan, STALE where a node says nothing any more.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, final

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, qos_profile_sensor_data
from std_msgs.msg import Float64MultiArray, String

from vla_spec.errors import BadObservation
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._bag import Bag
from vla_spec.nodes._main import run_node
from vla_spec.nodes._parameters import Parameter, declare
from vla_spec.nodes._qos import HEAR_LATCHED
from vla_spec.nodes._tick_statistics import TickStatistics
from vla_spec.types import Rung

PARAMETERS = (
    Parameter("period_error_p99_ms", 2.0, "WARN if commands are more irregular than this, p99 [ms]", 0.01, 1e4),
    Parameter("planning_p99_ms", 60.0, "WARN if planning takes longer than this, p99 [ms]", 0.01, 1e6),
    Parameter("miss_share", 0.01, "WARN if a larger share of chunks was late", 0.0, 1.0),
    Parameter("stale_after_s", 3.0, "STALE if a node said nothing for so long [s]", 0.1, 3600.0),
    Parameter("command_rate_hz", 80.0, "nominal rate of commands", 0.1, 1e4),
    Parameter("bag", "", "MCAP file to record into; empty = none"),
    Parameter("bag_topics", [""], "topics to record; empty = all that exist when the node starts and later"),
)
#: No command for so long: nobody was asked to move [ns].
PAUSE_NS = 500_000_000
#: Chunks that statistics look back on.
WINDOW = 512
OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE,
)  # fmt: skip


@final
class MonitorNode(Node):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("monitor_node", **kwargs)
        self._values = declare(self, PARAMETERS)
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._heard: dict[str, tuple[int, DiagnosticStatus]] = {}
        self._planning_ms: deque[float] = deque(maxlen=WINDOW)
        self._age_ms: deque[float] = deque(maxlen=WINDOW)
        self._is_late: deque[bool] = deque(maxlen=WINDOW)
        self._rungs: dict[str, int] = {}
        self._commands = TickStatistics(round(1e9 / self._values["command_rate_hz"]), pause_ns=PAUSE_NS)
        self._num_refused = 0
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(DiagnosticArray, "status", self._on_status, 10)
        self.create_subscription(String, "trajectory_info", self._on_info, 10)
        self.create_subscription(Float64MultiArray, "command", self._on_command, 10, raw=True)
        self._bag = Bag(Path(self._values["bag"])) if self._values["bag"] else None
        self._recorded: set[str] = set()
        self.create_timer(1.0, self._publish, clock=self._steady)
        if self._bag is not None:
            self.create_timer(0.5, self._record_new_topics, clock=self._steady)

    def _on_status(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._heard[status.name] = time.monotonic_ns(), status

    def _on_info(self, message: String) -> None:
        try:
            info = messages.read_info(message)
        except BadObservation as error:
            self._num_refused += 1
            self.get_logger().warning(str(error), throttle_duration_sec=1.0)
            return
        self._planning_ms.append(info.planning_ms)
        self._is_late.append(info.slack_ms < 0)
        if info.rung is not Rung.STOP:  # a stop has the stamp of its own moment, no picture's
            self._age_ms.append((self.get_clock().now().nanoseconds - info.stamp_ns) / 1e6)
        self._rungs[info.rung.name] = self._rungs.get(info.rung.name, 0) + 1

    def _on_command(self, message: bytes) -> None:
        self._commands.begin(time.monotonic_ns())

    def _own(self) -> list[DiagnosticStatus]:
        """What is measured here."""
        values: dict[str, Any] = {"chunks": sum(self._rungs.values()), "refused": self._num_refused}
        values |= {f"rung.{name.lower()}": count for name, count in self._rungs.items()}
        level, said = OK, "chunks in time"
        if self._planning_ms:
            for name, window in (("planning", self._planning_ms), ("picture_to_chunk", self._age_ms)):
                if not window:
                    continue
                p50, p99 = np.percentile(window, (50, 99))
                values |= {f"{name}_p50_ms": round(float(p50), 3), f"{name}_p99_ms": round(float(p99), 3)}
            values["late_share"] = round(float(np.mean(self._is_late)), 4)
            if values["planning_p99_ms"] > self._values["planning_p99_ms"]:
                level, said = WARN, f"planning takes {values['planning_p99_ms']} ms, p99"
            if values["late_share"] > self._values["miss_share"]:
                level, said = WARN, f"{values['late_share']:.1%} of chunks are late"
        else:
            said = "no chunk yet"
        commands = self._commands.summary()
        command_level, command_said = OK, "commands are regular"
        if commands.get("period_error_p99_ms", 0.0) > self._values["period_error_p99_ms"]:
            command_level, command_said = WARN, f"period error {commands['period_error_p99_ms']} ms, p99"
        name = self.get_fully_qualified_name()
        return [
            messages.write_status(f"{name}: chunks", values, level, said),
            messages.write_status(f"{name}: commands", commands, command_level, command_said),
        ]

    def _publish(self) -> None:
        now_ns = time.monotonic_ns()
        said = []
        for heard_ns, status in self._heard.values():
            if now_ns - heard_ns > self._values["stale_after_s"] * 1e9:
                status.level, status.message = STALE, "says nothing any more"
            said.append(status)
        now_ns = self.get_clock().now().nanoseconds
        self._diagnostics.publish(messages.write_statuses([*said, *self._own()], now_ns))

    def _record_new_topics(self) -> None:
        """Subscribe to what is not recorded yet, with the quality of service of its first publisher."""
        assert self._bag is not None
        wanted = {t for t in self._values["bag_topics"] if t}
        for topic, types in self.get_topic_names_and_types():
            if topic in self._recorded or (wanted and topic not in wanted) or topic.startswith("/_"):
                continue
            publishers = self.get_publishers_info_by_topic(topic)
            if not publishers:
                continue
            kind = messages.type_named(types[0])
            if kind is None:
                continue
            try:
                self._bag.add_topic(topic, types[0])
            except OSError as error:  # a type whose definition was not installed with it
                self._recorded.add(topic)
                self.get_logger().warning(f"{topic} is not recorded: no definition of {types[0]} ({error})")
                continue
            is_latched = publishers[0].qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
            profile = HEAR_LATCHED if is_latched else qos_profile_sensor_data
            self.create_subscription(
                kind, topic, lambda data, topic=topic: self._record(topic, data), profile, raw=True
            )
            self._recorded.add(topic)

    def _record(self, topic: str, data: bytes) -> None:
        if self._bag is not None:
            self._bag.write(topic, data, time.time_ns())

    def finish(self) -> None:
        """Close the bag."""
        if self._bag is not None:
            self._bag.close()
            self._bag = None


def main() -> None:
    """Entry point."""
    run_node(MonitorNode)


if __name__ == "__main__":
    main()
