"""`action_node`: plays chunks at the control rate. Its own process; never waits for the planner; always has a command.

Trajectories are aligned by their stamps and counted in control steps, as everywhere (`ChunkBuffer`): what the delay has
used up is skipped, unverified rows are bounded, and when nothing is left the arm holds, then stops. Commands outside
the limits are clamped; a chunk that is far outside is refused as a whole.

A planner that is silent for too long, shows no sign of life or misses its deadline, a clock that is set or stands
still, and a request to hold all end the same way: a decelerating stop from the last command, then standing, until the
next chunk. The watchdog is on the steady clock whatever the node's time is.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, final

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import UNVERIFIED, ChunkBuffer, ChunkOptions, HandOver
from vla_spec.clock import NS_PER_S
from vla_spec.errors import BadConfig, BadObservation, VlaSpecError
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.nodes._clock_watch import ClockWatch
from vla_spec.nodes._main import run_node, wait_s
from vla_spec.nodes._parameters import Parameter, declare, qos_parameters, qos_profile
from vla_spec.nodes._qos import CHUNK
from vla_spec.nodes._tick_statistics import TickStatistics
from vla_spec.types import Float32, Provenance, Rung

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
              choices=(HandOver.REPLACE.value, HandOver.TEMPORAL_ENSEMBLE.value)),
    Parameter("is_shifted_by_holds", True, "steps in which the arm held consume no action"),
    Parameter("planner_timeout_s", 0.4, "no trajectory for so long: the planner counts as gone [s]", 0.01, 3600.0),
    Parameter("clock_timeout_s", 1.0, "simulated time that stands still for so long is an error [s]", 0.01, 3600.0),
    Parameter("max_age_s", 1.0, "a trajectory whose observation is older is refused [s]", 0.001, 3600.0),
    Parameter("dry_run", True, "compute and report commands, send none"),
    *qos_parameters("trajectory", CHUNK),
    *qos_parameters("command", COMMAND),
)  # fmt: skip
#: Control steps by which the count may differ from what the clock says before it is put right.
MAX_DRIFT = 1.5
#: A trajectory of so much later than now is of another clock [ns].
MAX_FUTURE_NS = 100_000_000
#: Provenance lines that are kept until their trajectories come.
NUM_INFOS = 8
#: The watchdog looks as often, and commands as often where simulated time stands still [s].
WATCH_S = 0.02


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
        self._centre, self._half = (self._space.high + self._space.low) / 2, (self._space.high - self._space.low) / 2
        # An arm that stands while it waits for its first chunk has used up nothing of it.
        self._is_patient = values["is_shifted_by_holds"] and DofKind.VELOCITY not in self._space.kinds
        self._epoch_ns: int | None = None  # ROS time of control step 0; None = nothing was commanded yet
        self._not_before_ns = 0  # chunks of older observations are refused
        self._trajectory: JointTrajectory | None = None
        self._is_patience_over = False  # the trajectory waited for its provenance once
        self._infos: dict[int, messages.ChunkInfo] = {}  # by stamp, oldest first
        self._is_held = self._is_stalled = False
        self._gone = "no chunk came yet"  # why the planner counts as gone; empty = it does not
        self._heard_ns = self._ticked_ns = time.monotonic_ns()
        self._heard_at_ns = 0  # the same on ROS's clock
        self._newest_step = 0  # of the chunk that the buffer took last
        self._sent: Float32 | None = None
        self._sent_before: Float32 | None = None
        self._counts = {
            "chunks": 0, "refused": 0, "clamped": 0, "without_provenance": 0, "planner_gone": 0, "liveliness_lost": 0,
            "deadline_missed": 0, "incompatible_qos": 0, "clock_jumps": 0, "clock_stalls": 0, "skipped": 0, "waited": 0,
        }  # fmt: skip
        profile = qos_profile(values, "trajectory")
        events = SubscriptionEventCallbacks(
            deadline=self._on_deadline, liveliness=self._on_liveliness, incompatible_qos=self._on_incompatible
        )
        self.create_subscription(JointTrajectory, "trajectory", self._on_trajectory, profile, event_callbacks=events)
        self.create_subscription(
            String, "trajectory_info", self._on_info, profile,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=self._on_incompatible),
        )  # fmt: skip
        self._command = self.create_publisher(
            Float64MultiArray, "command", qos_profile(values, "command"),
            event_callbacks=PublisherEventCallbacks(incompatible_qos=self._on_incompatible),
        )  # fmt: skip
        self._status = self.create_publisher(DiagnosticArray, "status", 10)
        self.create_service(Trigger, "hold", self._on_hold)
        self.create_service(Trigger, "resume", self._on_resume)
        self.create_service(Trigger, "reset", self._on_reset)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._ticks = TickStatistics(self._period_ns)
        self._clock_watch = ClockWatch()
        self._is_clock_simulated = bool(self.get_parameter("use_sim_time").value)
        # Simulated time paces the control steps of a simulated robot, the steady clock those of a real one, whatever
        # happens to the system's date. The watchdog is on the steady clock always: simulated time may just stop.
        pace = self.get_clock() if self._is_clock_simulated else steady
        self.create_timer(self._period_ns / NS_PER_S, self._tick, clock=pace)
        self.create_timer(min(WATCH_S, values["planner_timeout_s"] / 4), self._watch, clock=steady)
        self.create_timer(1.0, self._publish_status, clock=steady)
        self._jump = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._on_jump,
        )
        if values["dry_run"]:
            self.get_logger().warning("dry run: commands are computed and reported, none is sent")

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    # Chunks in.

    def _on_trajectory(self, message: JointTrajectory) -> None:
        self._trajectory, self._is_patience_over = message, False

    def _on_info(self, message: String) -> None:
        try:
            info = messages.read_info(message)
        except BadObservation as error:
            self._refuse(error)
            return
        self._infos.pop(info.stamp_ns, None)
        self._infos[info.stamp_ns] = info
        while len(self._infos) > NUM_INFOS:
            del self._infos[next(iter(self._infos))]

    def _refuse(self, error: Exception) -> None:
        self._counts["refused"] += 1
        self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _take(self, now_ns: int) -> None:
        """Hand the newest trajectory to the buffer, with its provenance if that came."""
        trajectory = self._trajectory
        if trajectory is None:
            return
        stamp_ns = messages.stamp_ns(trajectory.header.stamp)
        info = self._infos.get(stamp_ns)
        if info is None and self._infos and not self._is_patience_over:
            # Two topics: the one that was sent first may come second. One tick is enough for that.
            self._is_patience_over = True
            return
        self._trajectory = None
        try:
            self._check_time(stamp_ns, now_ns)
            epoch_ns = self._epoch_ns
            if epoch_ns is None:
                epoch_ns = now_ns if self._is_patient else stamp_ns
            step = 0 if self._epoch_ns is None else round((stamp_ns - epoch_ns) / self._period_ns)
            chunk = messages.read_chunk(trajectory, info, self._layout, step)
            if (np.abs(chunk.actions - self._centre) > self._half * self._values["reject_factor"]).any():
                raise BadConfig(f"chunk {chunk.chunk_id}: an action is far outside the limits, refused as a whole")
        except VlaSpecError as error:
            self._refuse(error)
            return
        self._epoch_ns = epoch_ns
        self._heard_ns, self._heard_at_ns, self._gone = time.monotonic_ns(), now_ns, ""
        self._counts["chunks"] += 1
        self._counts["without_provenance"] += info is None
        self._counts["clamped"] += int((self._space.clip(chunk.actions) != chunk.actions).any(1).sum())
        if not self._is_held and self._buffer.put(chunk):
            self._newest_step = step

    def _check_time(self, stamp_ns: int, now_ns: int) -> None:
        """Refuse what is not of now; what of a chunk is over is the buffer's business.

        Raises:
            BadObservation: from before the last resume, reset or jump of time, too old, or ahead of our clock.
        """
        valid = "an observation of now; do the clocks of both machines agree?"
        if stamp_ns < self._not_before_ns:
            raise BadObservation("trajectory's stamp", "from before a resume, a reset or a jump of time", "later")
        if stamp_ns - now_ns > MAX_FUTURE_NS:
            raise BadObservation("trajectory's stamp", f"{(stamp_ns - now_ns) / 1e9:.3f} s ahead", valid)
        if now_ns - stamp_ns > self._values["max_age_s"] * NS_PER_S:
            raise BadObservation("trajectory's stamp", f"{(now_ns - stamp_ns) / 1e9:.3f} s old", valid)

    # Commands out.

    def _tick(self) -> None:
        steady_ns, now_ns = time.monotonic_ns(), self._now_ns()
        self._ticked_ns = steady_ns
        if self._is_stalled:
            self._is_stalled = False
            self._anchor(now_ns)
        # On the clock that paces: simulated time may run at another speed than the wall clock.
        self._ticks.begin(now_ns if self._is_clock_simulated else steady_ns)
        if not self._is_clock_simulated and self._clock_watch.has_jumped(now_ns, steady_ns):
            self._jumped()
        self._take(now_ns)
        if self._epoch_ns is None or (self._sent is None and self._buffer.newest is None):
            return  # nothing was ever commanded: there is nothing to hold that would not be a motion
        step = self._next_step(now_ns)
        if step is not None:
            self._send(step)

    def _send(self, step: int) -> None:
        command = self._buffer.command(step)
        wanted = command.action
        if command.provenance in UNVERIFIED and self._sent is not None:
            wanted = self._space.limit_change(wanted, self._sent)
        action = self._space.clip(wanted)
        self._sent_before, self._sent = self._sent, action
        if not self._values["dry_run"]:
            self._command.publish(messages.write_actions(action, self._layout.joints))

    def _next_step(self, now_ns: int) -> int | None:
        """The control step of this tick: one more than the last, unless time says that it is off by more than one.

        Behind: steps are skipped. Ahead: None, this tick is left out, so that no step is ever played twice.
        """
        assert self._epoch_ns is not None
        expected = (now_ns - self._epoch_ns) / self._period_ns
        step = self._buffer.next_step
        if expected - step > MAX_DRIFT:
            self._counts["skipped"] += round(expected) - step
            return round(expected)
        if step - expected > MAX_DRIFT:
            self._counts["waited"] += 1
            return None
        return step

    def _stop(self) -> None:
        """What was planned is void: decelerate from the last command, then stand, until the next chunk."""
        newest = self._buffer.newest
        if self._epoch_ns is None or newest is None:
            return
        # As old as what it replaces: a chunk that is newer than that takes over, however long it took to plan.
        num_rows = self._buffer.next_step - self._newest_step + self._space.stop_steps
        rows = np.tile(self._space.hold(self._sent), (max(num_rows, self._space.stop_steps), 1))
        stop = replace(
            newest,
            observation_step=self._newest_step,
            actions=rows,
            provenance=np.full(rows.shape, Provenance.HOLD, np.uint8),
            rung=Rung.STOP,
            chunk_id=-1,
            tokens=np.empty(0, np.int32),
        )
        self._buffer.put(stop)

    def _lose(self, why: str) -> None:
        """The planner counts as gone until its next trajectory."""
        if not self._gone:
            self._gone = why
            self.get_logger().warning(f"{why}: decelerating, then holding")
            self._stop()

    def _anchor(self, now_ns: int) -> None:
        """Time is another one: the next control step is now."""
        self._trajectory = None
        self._infos.clear()
        self._not_before_ns = now_ns
        self._heard_at_ns = now_ns
        if self._epoch_ns is not None:
            self._epoch_ns = now_ns - self._buffer.next_step * self._period_ns

    def _watch(self) -> None:
        """On the steady clock: is the planner there, does time go on?

        How long the planner is silent counts in the world's time, which may be slower or faster than ours.
        """
        steady_ns = time.monotonic_ns()
        silent_ns = self._now_ns() - self._heard_at_ns if self._is_clock_simulated else steady_ns - self._heard_ns
        if not self._gone and silent_ns > self._values["planner_timeout_s"] * NS_PER_S:
            self._counts["planner_gone"] += 1
            self._lose("no trajectory from the planner")
        timeout_ns = self._values["clock_timeout_s"] * NS_PER_S
        if not self._is_clock_simulated or steady_ns - self._ticked_ns <= timeout_ns:
            return
        if not self._is_stalled:
            self._is_stalled = True
            self._counts["clock_stalls"] += self._sent is not None
            self._stop()
        if self._sent is not None:
            self._send(self._buffer.next_step)

    # Trouble.

    def _on_deadline(self, event: Any) -> None:
        self._counts["deadline_missed"] += event.total_count_change
        self._lose("the planner missed the topic's deadline")

    def _on_liveliness(self, event: Any) -> None:
        if event.alive_count_change < 0 and event.alive_count == 0:
            self._counts["liveliness_lost"] += 1
            self._lose("the planner shows no sign of life")

    def _on_incompatible(self, event: Any) -> None:
        self._counts["incompatible_qos"] += event.total_count_change
        self.get_logger().warning(
            f"somebody on one of the topics wants another quality of service ({event.last_policy_kind})"
        )

    def _on_jump(self, jump: TimeJump) -> None:
        self._is_clock_simulated = bool(self.get_clock().ros_time_is_active)
        self._clock_watch.forget()
        self._jumped()

    def _jumped(self) -> None:
        self._counts["clock_jumps"] += 1
        self._stop()
        self._anchor(self._now_ns())

    def _on_hold(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self._is_held:
            self._is_held = True
            self._stop()
        response.success, response.message = True, "decelerating, then holding until resume"
        return response

    def _on_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._is_held = False
        self._not_before_ns = self._now_ns()
        response.success, response.message = True, "playing chunks again, beginning with the next observation"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """A new episode: the arm was put somewhere else, and nothing is sent until there is a plan for it."""
        now_ns = self._now_ns()
        self._epoch_ns = self._sent = self._sent_before = None
        self._gone = self._gone or "no chunk came yet"
        self._buffer.reset()
        self._newest_step = 0
        self._anchor(now_ns)
        response.success, response.message = True, "chunks before now are forgotten, silent until the next one"
        return response

    def finish(self) -> None:
        """The process ends: the arm is left with a decelerating stop as its last commands."""
        if self._sent is None or self._values["dry_run"]:
            return
        last, before = self._sent, self._sent_before
        for i in range(self._space.stop_steps):
            action = self._space.stop(last, i, before)
            self._command.publish(messages.write_actions(action, self._layout.joints))
            wait_s(self._period_ns / NS_PER_S)

    def _publish_status(self) -> None:
        """What the monitor reads, once a second."""
        buffer = self._buffer
        values: dict[str, Any] = {**self._counts, **self._ticks.summary()}
        values |= {f"commands.{kind.name.lower()}": count for kind, count in buffer.counts.items()}
        values |= {f"rung.{rung.name.lower()}": count for rung, count in buffer.rung_counts.items()}
        values |= {"stale_chunks": buffer.num_stale, "out_of_order": buffer.num_out_of_order}
        values["dry_run"] = self._values["dry_run"]
        level, said = DiagnosticStatus.OK, "playing"
        if self._is_stalled:
            level, said = DiagnosticStatus.ERROR, "simulated time stands still, holding"
            if self._sent is None:
                level, said = DiagnosticStatus.WARN, "use_sim_time is true and nothing comes on /clock"
        elif self._is_held:
            said = "held on request"
        elif self._epoch_ns is None:
            said = "waiting for the first chunk"
        elif self._gone:
            level, said = DiagnosticStatus.ERROR, f"planner gone, holding ({self._gone})"
        elif buffer.holds_in_a_row:
            level, said = DiagnosticStatus.WARN, "holding"
        status = messages.write_status(f"{self.get_fully_qualified_name()}: actor", values, level, said)
        self._status.publish(messages.write_statuses([status], self._now_ns()))


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
    if len(high) != len(low) or (changes is not None and len(changes) != len(joints)):
        raise BadConfig(
            f"action_node: {len(high)} high and {values['max_change']} as max_change for {len(joints)} joints; valid: "
            f"one number for each"
        )
    space = ActionSpace.from_limits(low, high, max_change=changes, stop_steps=values["stop_steps"])
    return layout, ActionSpace(space.low, space.high, kinds, space.max_change, space.rest, space.stop_steps)


def main() -> None:
    """Entry point."""
    run_node(ActionNode)


if __name__ == "__main__":
    main()
