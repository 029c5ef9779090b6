"""`action_node`: plays chunks at the control rate. Its own process; never waits for the planner; always has a command.

Trajectories are aligned by their stamps and counted in control steps, as everywhere (`ChunkBuffer`): what the delay has
used up is skipped, unverified rows are bounded, and when nothing is left the arm holds, then stops. Commands outside
the limits are clamped; a chunk that is far outside is refused as a whole. The watchdog is on the steady clock whatever
the node's time is.
"""

from __future__ import annotations

import time
from typing import Any, final

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import ChunkBuffer, ChunkOptions, HandOver
from vla_spec.clock import NS_PER_S
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.nodes._main import run_node, wait_s
from vla_spec.nodes._parameters import Parameter, declare, qos_parameters, qos_profile
from vla_spec.nodes._tick_statistics import TickStatistics
from vla_spec.types import Float32

CHUNK = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, liveliness_lease_duration=Duration(seconds=0.5))
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)

PARAMETERS = (
    Parameter("rate_hz", 100.0, "control rate; its period must be the one that the policy was trained for", 1.0, 2e3),
    Parameter("joints", [""], "joint names, as the trajectories have them"),
    Parameter("kinds", [""], "per joint: delta, position, velocity or switch"),
    Parameter("units", [0.0], "joint units per action unit, one per joint"),
    Parameter("low", [0.0], "least action per joint"),
    Parameter("high", [0.0], "largest action per joint"),
    Parameter("max_change", [0.0], "largest change of an unverified action per step; [0.0] = a quarter of the range"),
    Parameter("reject_factor", 2.0, "a chunk with an action outside this many times the range is refused", 1.0, 1e6),
    Parameter("stop_steps", 8, "control steps of a decelerating stop", 1, 10000),
    Parameter("max_holds", 8, "holds in a row before the decelerating stop", 0, 100000),
    Parameter("hand_over", HandOver.REPLACE.value, "how a new chunk takes over",
              choices=tuple(h.value for h in HandOver)),
    Parameter("is_shifted_by_holds", True, "steps in which the arm held consume no action"),
    Parameter("planner_timeout_s", 0.5, "no trajectory for so long: the planner counts as gone [s]", 0.01, 3600.0),
    Parameter("dry_run", True, "compute and report commands, send none"),
    *qos_parameters("trajectory", CHUNK),
    *qos_parameters("command", COMMAND),
)  # fmt: skip
#: Control steps by which the count may differ from what the clock says before it is put right.
MAX_DRIFT = 1.5


@final
class ActionNode(Node):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("action_node", **kwargs)
        values = self._values = declare(self, PARAMETERS)
        self._layout, self._space = layout_and_space(values)
        self._period_ns = round(NS_PER_S / values["rate_hz"])
        options = ChunkOptions(
            hand_over=HandOver(values["hand_over"]), max_holds=values["max_holds"],
            is_shifted_by_holds=values["is_shifted_by_holds"],
        )  # fmt: skip
        self._buffer = ChunkBuffer(self._space, self._layout.size, options)
        self._epoch_ns: int | None = None  # ROS time of control step 0
        self._trajectory: JointTrajectory | None = None
        self._infos: list[String] = []
        self._is_held = False
        self._last_heard_ns = 0
        self._counts = {
            "chunks": 0, "refused": 0, "clamped": 0, "planner_gone": 0, "liveliness_lost": 0, "deadline_missed": 0,
                "incompatible_qos": 0, "clock_jumps": 0, "skipped": 0, "waited": 0,
        }  # fmt: skip
        self._is_gone = True
        profile = qos_profile(values, "trajectory")
        events = SubscriptionEventCallbacks(
            deadline=self._on_deadline, liveliness=self._on_liveliness, incompatible_qos=self._on_incompatible
        )
        self.create_subscription(JointTrajectory, "trajectory", self._on_trajectory, profile, event_callbacks=events)
        self.create_subscription(String, "trajectory_info", self._on_info, profile, event_callbacks=events)
        self._command = self.create_publisher(Float64MultiArray, "command", qos_profile(values, "command"))
        self._status = self.create_publisher(DiagnosticArray, "status", 10)
        self.create_service(Trigger, "hold", self._on_hold)
        self.create_service(Trigger, "resume", self._on_resume)
        self.create_service(Trigger, "reset", self._on_reset)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._ticks = TickStatistics(self._period_ns)
        self._sent: Float32 | None = None
        self._is_clock_simulated = self.get_parameter("use_sim_time").value
        # Simulated time paces the control steps of a simulated robot, the steady clock those of a real one, whatever
        # happens to the system's date. The watchdog is on the steady clock always: simulated time may just stop.
        pace = self.get_clock() if self._is_clock_simulated else steady
        self.create_timer(self._period_ns / NS_PER_S, self._tick, clock=pace)
        self.create_timer(min(0.05, values["planner_timeout_s"] / 4), self._watch, clock=steady)
        self.create_timer(1.0, self._publish_status, clock=steady)
        self._jump = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._on_jump,
        )
        if values["dry_run"]:
            self.get_logger().warning("dry run: commands are computed and reported, none is sent")

    # Chunks in.

    def _on_trajectory(self, message: JointTrajectory) -> None:
        self._trajectory = message

    def _on_info(self, message: String) -> None:
        self._infos = [*self._infos[-3:], message]

    def _take(self) -> None:
        """Hand the newest trajectory to the buffer, with its provenance if that came."""
        trajectory, self._trajectory = self._trajectory, None
        if trajectory is None:
            return
        try:
            stamp = messages.stamp_ns(trajectory.header.stamp)
            info = next((i for i in reversed(self._infos) if messages.read_info(i)["stamp_ns"] == stamp), None)
            if self._epoch_ns is None:
                self._epoch_ns = stamp
            step = round((stamp - self._epoch_ns) / self._period_ns)
            chunk = messages.read_chunk(trajectory, info, self._layout, step)
            centre, half = (self._space.high + self._space.low) / 2, (self._space.high - self._space.low) / 2
            if (np.abs(chunk.actions - centre) > half * self._values["reject_factor"]).any():
                raise BadConfig(f"chunk {chunk.chunk_id}: an action is far outside the limits, refused as a whole")
        except VlaSpecError as error:
            self._counts["refused"] += 1
            self.get_logger().warning(str(error), throttle_duration_sec=1.0)
            return
        self._last_heard_ns = time.monotonic_ns()
        self._is_gone = False
        self._counts["chunks"] += 1
        self._buffer.put(chunk)

    # Commands out.

    def _tick(self) -> None:
        # On the clock that paces: simulated time may run at another speed than the wall clock.
        self._ticks.begin(self.get_clock().now().nanoseconds if self._is_clock_simulated else time.monotonic_ns())
        self._take()
        if self._epoch_ns is None:
            return  # nothing was ever commanded: there is nothing to hold that would not be a motion
        if self._is_held:
            command = self._space.hold(self._sent)
        elif (step := self._next_step()) is None:
            return
        else:
            command = self._buffer.command(step).action
        action = self._space.clip(command)
        self._counts["clamped"] += bool((action != command).any())
        self._sent = action
        if not self._values["dry_run"]:
            self._command.publish(messages.write_actions(action, self._layout.joints))

    def _next_step(self) -> int | None:
        """The control step of this tick: one more than the last, unless time says that it is off by more than one.

        Behind: steps are skipped. Ahead: None, this tick is left out, so that no step is ever played twice.
        """
        assert self._epoch_ns is not None
        expected = (self.get_clock().now().nanoseconds - self._epoch_ns) / self._period_ns
        step = self._buffer.next_step
        if expected - step > MAX_DRIFT:
            self._counts["skipped"] += round(expected) - step
            return round(expected)
        if step - expected > MAX_DRIFT:
            self._counts["waited"] += 1
            return None
        return step

    def _watch(self) -> None:
        """On the steady clock: say so when the planner is gone. The buffer holds and stops by itself."""
        silent_ns = time.monotonic_ns() - self._last_heard_ns
        if not self._is_gone and silent_ns > self._values["planner_timeout_s"] * NS_PER_S:
            self._is_gone = True
            self._counts["planner_gone"] += 1
            self.get_logger().warning("no trajectory from the planner: holding")

    # Trouble.

    def _on_deadline(self, event: Any) -> None:
        self._counts["deadline_missed"] += event.total_count_change

    def _on_liveliness(self, event: Any) -> None:
        if event.alive_count_change < 0 and event.alive_count == 0:
            self._counts["liveliness_lost"] += 1
            self.get_logger().warning("the planner shows no sign of life")

    def _on_incompatible(self, event: Any) -> None:
        self._counts["incompatible_qos"] += 1
        self.get_logger().warning(f"a publisher offers another quality of service ({event.last_policy_kind})")

    def _on_jump(self, jump: TimeJump) -> None:
        self._counts["clock_jumps"] += 1
        self._forget()

    def _forget(self) -> None:
        self._trajectory, self._epoch_ns = None, None
        self._buffer.reset(self.get_clock().now().nanoseconds)

    def _on_hold(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._is_held = True
        response.success, response.message = True, "holding until resume"
        return response

    def _on_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._is_held = False
        self._forget()
        response.success, response.message = True, "playing chunks again, beginning with the next one"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._forget()
        response.success, response.message = True, "chunks before now are forgotten"
        return response

    def finish(self) -> None:
        """The process ends: the arm is left with a decelerating stop as its last commands."""
        if self._epoch_ns is None or self._sent is None or self._values["dry_run"]:
            return
        last = self._sent
        for i in range(self._space.stop_steps):
            action = self._space.stop(last, i)
            self._command.publish(messages.write_actions(action, self._layout.joints))
            wait_s(self._period_ns / NS_PER_S)

    def _publish_status(self) -> None:
        """What the monitor reads, once a second."""
        buffer = self._buffer
        values: dict[str, Any] = {**self._counts, **self._ticks.summary()}
        values |= {f"commands.{kind.name.lower()}": count for kind, count in buffer.counts.items()}
        values |= {f"rung.{rung.name.lower()}": count for rung, count in buffer.rung_counts.items()}
        values |= {"stale_chunks": buffer.num_stale, "out_of_order": buffer.num_out_of_order}
        level, said = DiagnosticStatus.OK, "playing"
        if self._is_held:
            said = "held on request"
        elif self._epoch_ns is None:
            said = "waiting for the first chunk"
        elif self._is_gone:
            level, said = DiagnosticStatus.ERROR, "planner gone, holding"
        elif buffer.holds_in_a_row:
            level, said = DiagnosticStatus.WARN, "holding"
        status = DiagnosticStatus(
            name=f"{self.get_fully_qualified_name()}: actor", hardware_id="vla_spec", level=level, message=said,
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )  # fmt: skip
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._status.publish(message)


def layout_and_space(values: dict[str, Any]) -> tuple[ActionLayout, ActionSpace]:
    """From parameters.

    Raises:
        BadConfig: lengths that differ, an unknown kind, limits that contradict each other.
    """
    joints = tuple(n for n in values["joints"] if n)
    names = {kind.name.lower(): kind for kind in DofKind}
    wrong = [kind for kind in values["kinds"] if kind not in names]
    if not joints or wrong:
        raise BadConfig(
            f"action_node: joints are {list(joints)}, kinds {values['kinds']}; valid: a name and one of "
            f"{', '.join(names)} for each joint"
        )
    kinds = tuple(names[kind] for kind in values["kinds"])
    layout = ActionLayout(joints, kinds, tuple(values["units"]), 1.0 / values["rate_hz"])
    low, high = (np.array(values[name], np.float32) for name in ("low", "high"))
    if len(low) != len(joints):
        raise BadConfig(f"action_node: {len(low)} limits for {len(joints)} joints; valid: one low and high for each")
    changes = None if list(values["max_change"]) == [0.0] else np.array(values["max_change"], np.float32)
    space = ActionSpace.from_limits(low, high, max_change=changes, stop_steps=values["stop_steps"])
    return layout, ActionSpace(space.low, space.high, kinds, space.max_change, space.rest, space.stop_steps)


def main() -> None:
    """Entry point."""
    run_node(ActionNode)


if __name__ == "__main__":
    main()
