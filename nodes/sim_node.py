"""`sim_node`: a simulated robot as ROS sees a real one: cameras, joint states, `/clock`, commands in, outcomes.

Physics advances by one control step per control period of the wall clock (times ``time_scale``), whatever anybody does:
a command that came since the last step is applied once, without one the robot holds. The pictures are drawn by
`camera_node`, a process of its own, as a robot's cameras are: it gets what moves on the topic ``physics``.
"""

from __future__ import annotations

import json
import time
from typing import Any, cast, final

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import Trigger

from vla_spec.assemble import Assembler
from vla_spec.clock import NS_PER_S
from vla_spec.config import resolve_choice
from vla_spec.errors import BadObservation
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._main import run_node, wait_s
from vla_spec.nodes._parameters import Parameter, declare, qos_parameters, qos_profile
from vla_spec.nodes._qos import LATCHED
from vla_spec.nodes._tick_statistics import TickStatistics

SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)

PARAMETERS = (
    Parameter("robot", "metaworld", "robot plugin"),
    Parameter("task", "drawer-close", "task; empty = the robot has none"),
    Parameter("seeds", ["10000"], "seeds of the episodes, one after the other; then the node ends"),
    Parameter("max_steps", 200, "control steps of an episode at most", 1, 1000000),
    Parameter("time_scale", 1.0, "simulated seconds per second", 0.01, 100.0),
    Parameter("joints", [""], "names of the state's numbers in joint_states; empty = joint_0, joint_1, ..."),
    Parameter("is_waiting", True, "an episode begins when the first command comes"),
    Parameter("publishes_clock", True, "publish /clock; the node is then everybody's time"),
    *qos_parameters("physics", SENSOR),
    *qos_parameters("joint_states", SENSOR),
    *qos_parameters("command", SENSOR),
)  # fmt: skip
#: How long an episode waits for actor and planner to forget the one before [ns].
RESET_TIMEOUT_NS = 1_000_000_000
#: What the middleware is given to send the last messages before the process ends [s].
FLUSH_S = 0.1


@final
class SimNode(Node):
    """See the module. The node's own timer is the world's time, so it never uses simulated time itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("sim_node", **kwargs)
        self.set_parameters([RosParameter("use_sim_time", value=False)])
        values = self._values = declare(self, PARAMETERS)
        choice = resolve_choice("robot", values["robot"])
        self._robot = cast(Any, Assembler().robot(choice, values["task"] or None))
        self._period_ns = round(self._robot.dt_s * NS_PER_S)
        self._seeds = [int(seed) for seed in values["seeds"]]
        self._time_ns = self._period_ns  # zero means "no time yet" in ROS
        self._command: Any = None
        self._last: Any = None  # what was applied last in this episode
        self._answers: list[Any] | None = None  # of those that were asked to forget the episode before
        self._outcomes: list[dict[str, Any]] = []
        self._counts = {"commands": 0, "replaced": 0, "missing": 0, "refused": 0, "before_reset": 0}
        self._is_over = False
        self._clock_publisher = self.create_publisher(ClockMessage, "/clock", 1) if values["publishes_clock"] else None
        self._physics = self.create_publisher(Float64MultiArray, "physics", qos_profile(values, "physics"))
        self._joints = self.create_publisher(JointState, "joint_states", qos_profile(values, "joint_states"))
        self._instruction = self.create_publisher(String, "instruction", LATCHED)
        self._episode = self.create_publisher(String, "episode", LATCHED)
        self._done = self.create_publisher(Bool, "done", 10)
        self._status = self.create_publisher(DiagnosticArray, "status", 10)
        self._resets = [self.create_client(Trigger, name) for name in ("reset", "policy_node/reset")]
        self.create_subscription(Float64MultiArray, "command", self._on_command, qos_profile(values, "command"))
        self.create_service(Trigger, "reset_episode", self._on_reset)
        self._ticks = TickStatistics(round(self._period_ns / values["time_scale"]))
        self._begin(self._seeds.pop(0))
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # the system's date may be set
        self._timer = self.create_timer(self._period_ns / NS_PER_S / values["time_scale"], self._tick, clock=steady)
        self._status_timer = self.create_timer(1.0, self._publish_status, clock=steady)

    def is_over(self) -> bool:
        """All episodes are played."""
        return self._is_over

    def _begin(self, seed: int) -> None:
        self._seed = seed
        self._robot.reset(seed)
        self._steps, self._command, self._last = 0, None, None
        self._is_begun, self._answers, self._asked_ns = False, None, 0
        self._instruction.publish(String(data=self._robot.instruction))
        self._say("begins")
        self._show()

    def _on_command(self, message: Float64MultiArray) -> None:
        try:
            action = messages.read_action(message, len(self._robot.action_low))
        except BadObservation as error:
            self._counts["refused"] += 1
            self.get_logger().warning(str(error), throttle_duration_sec=1.0)
            return
        if not self._is_fresh():
            self._counts["before_reset"] += 1
            return
        self._counts["commands"] += 1
        self._counts["replaced"] += self._command is not None
        self._command = action

    def _is_fresh(self) -> bool:
        """Whether a command is for this episode.

        The first one of an episode may be for the world before it. So actor and planner, if they are ours, are asked to
        forget that, and until they answered nothing that they say counts.
        """
        if self._answers is None:
            self._answers = [c.call_async(Trigger.Request()) for c in self._resets if c.service_is_ready()]
            self._asked_ns = time.monotonic_ns()
        if all(answer.done() for answer in self._answers):
            is_first, self._answers = bool(self._answers), []
            return not is_first  # this one may have been on its way
        if time.monotonic_ns() - self._asked_ns > RESET_TIMEOUT_NS:
            self.get_logger().warning("no answer to reset: the episode begins all the same")
            self._answers = []
        return False

    def _tick(self) -> None:
        """One control step of the world."""
        self._ticks.begin(time.monotonic_ns())
        self._time_ns += self._period_ns
        if self._command is not None:
            self._is_begun = True
        if self._is_begun or not self._values["is_waiting"]:
            action, self._command = self._command, None
            if action is None:
                self._counts["missing"] += 1
                action = self._rest()
            self._robot.act(action, self._time_ns)
            self._last = action
            self._steps += 1
        self._publish_time()
        if self._robot.is_success or self._steps >= self._values["max_steps"]:
            self._end()
            return
        self._show()

    def _rest(self) -> Any:
        """Stand still: no increments, switches as they were."""
        action = np.zeros_like(self._robot.action_low)
        if self._last is not None:
            action[-1] = self._last[-1]
        return action

    def _show(self) -> None:
        """The arm's own state, and what the cameras need to draw."""
        state = self._robot.state
        names = [n for n in self._values["joints"] if n] or [f"joint_{i}" for i in range(len(state))]
        self._joints.publish(messages.write_joints(names, state, self._time_ns))
        self._physics.publish(Float64MultiArray(data=[self._time_ns, self._seed, *self._robot.physics.tolist()]))

    def _end(self) -> None:
        self._outcomes.append(
            {"task": self._values["task"], "seed": self._seed, "success": bool(self._robot.is_success),
             "steps": self._steps}
        )  # fmt: skip
        self._say("ended")
        if self._robot.is_success:
            self._done.publish(Bool(data=True))
        if self._seeds:
            self._begin(self._seeds.pop(0))
        else:
            self._is_over = True

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._begin(self._seed)
        response.success, response.message = True, f"episode of seed {self._seed} begins again"
        return response

    def _say(self, what: str) -> None:
        said = {"what": what, "task": self._values["task"], "seed": self._seed, "time_ns": self._time_ns,
                "outcomes": self._outcomes, "left": len(self._seeds), **self._counts}  # fmt: skip
        self._episode.publish(String(data=json.dumps(said)))

    def _publish_time(self) -> None:
        if self._clock_publisher is not None:
            self._clock_publisher.publish(ClockMessage(clock=messages.to_stamp(self._time_ns)))

    def _publish_status(self) -> None:
        values = {**self._counts, **self._ticks.summary(), "episodes": len(self._outcomes)}
        status = messages.write_status(f"{self.get_fully_qualified_name()}: simulator", values)
        self._status.publish(messages.write_statuses([status], self._time_ns))

    def finish(self) -> None:
        """The process ends: actor and planner need not hold and wait for a world that is gone."""
        for client in self._resets:
            if client.service_is_ready():
                client.call_async(Trigger.Request())
        wait_s(FLUSH_S)
        close = getattr(self._robot, "close", None)
        if close is not None:
            close()


def main() -> None:
    """Entry point."""
    run_node(SimNode)


if __name__ == "__main__":
    main()
