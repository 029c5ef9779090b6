"""`policy_node`: pictures, joint states and an instruction in, action chunks as trajectories out. A lifecycle node.

  configure   loads and verifies engines, reads or measures the cost table
  activate    warms up, starts planning
  deactivate  stops planning; the last thing it publishes is a decelerating stop
  cleanup     drops engines and buffers
  error       returns to unconfigured, whatever was half built is dropped

Callbacks only put messages into slots; a thread of its own plans, so that no executor ever waits for a forward.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, final

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from vla_spec.assemble import Assembler, Assembly
from vla_spec.clock import NS_PER_S, MonotonicClock
from vla_spec.config import merge, read_mode, resolve, set_key
from vla_spec.errors import BadObservation, VlaSpecError
from vla_spec.interfaces import ChunkHistory
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.nodes._main import run_node, wait_s
from vla_spec.nodes._observation_slots import ObservationSlots
from vla_spec.nodes._parameters import Parameter, declare, qos_parameters, qos_profile
from vla_spec.types import ActionChunk, Observation, Provenance, Rung

SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
CHUNK = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, liveliness_lease_duration=Duration(seconds=0.5))

PARAMETERS = (
    Parameter("model", "models/metaworld", "model folder"),
    Parameter("mode", "exact", "decoding mode; a change takes effect with the next chunk", is_fixed=False),
    Parameter(
        "overrides", [""], "settings on top of the mode, as in drafter.min_confidence=0.2; takes effect with the next "
        "chunk", is_fixed=False,
    ),
    Parameter("image_topics", [""], "topics of the cameras in the policy's order; a name that ends in /compressed is a "
              "CompressedImage; empty = image_0, image_1, ..."),
    Parameter("joints", [""], "joint names in the order of the policy's action; empty = joint_0, joint_1, ..."),
    Parameter("state_joints", [""], "names in joint_states that are the policy's state, in its order; empty = joints"),
    Parameter("units", [0.0], "joint units per action unit, one per joint; [0.0] = the model's own"),
    Parameter("dt_s", 0.0125, "control period that the policy was trained for [s]", 0.0001, 10.0),
    Parameter("execute_horizon", 4, "control steps of a chunk that are played before the next plan begins", 1, 1000),
    Parameter("deadline_ms", 60.0, "time until a chunk is due, from its observation's stamp [ms]", 0.1, 60000.0,
              is_fixed=False),
    Parameter("max_age_ms", 200.0, "an observation older than this is skipped and counted [ms]", 1.0, 60000.0),
    Parameter("max_skew_ms", 50.0, "most time between pictures of one observation [ms]", 0.0, 60000.0),
    Parameter("num_threads", 1, "threads inside one engine call", 1, 1024),
    Parameter("warmup_plans", 5, "plans before the first that counts", 0, 1000),
    Parameter("publishes_actions", False, "also publish chunks as labelled numbers, topic action_chunk"),
    Parameter("frame_id", "", "frame of the trajectories"),
    *qos_parameters("image", SENSOR),
    *qos_parameters("joint_states", SENSOR),
    *qos_parameters("instruction", LATCHED),
    *qos_parameters("trajectory", CHUNK),
)  # fmt: skip
#: How long one wait of the planning thread lasts; it looks at its stop flag as often [s].
POLL_S = 0.2
#: What the middleware is given to send the last message before the process ends [s].
FLUSH_S = 0.05


@final
class PolicyNode(LifecycleNode):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("policy_node", **kwargs)
        self._values = declare(self, PARAMETERS)
        self._monotonic = MonotonicClock()
        self._assembler: Assembler | None = None
        self._assembly: Assembly | None = None
        self._wanted: Assembly | None = None  # takes over with the next chunk
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._entities: list[Any] = []
        self._counts = {"refused": 0, "plans": 0, "late": 0, "incompatible_qos": 0, "clock_jumps": 0}
        self._durations_ms: list[float] = []
        self._last: ActionChunk | None = None
        self.add_on_set_parameters_callback(self._on_set)
        self._jump = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._on_jump,
        )

    # Transitions. Everything they make is dropped by on_cleanup and on_error alike.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load engines; make topics."""
        try:
            self._assembler = Assembler()
            self._assembly = self._assemble(str(self._values["mode"]), list(self._values["overrides"]))
            self._layout = self._make_layout(self._assembly)
        except VlaSpecError as error:
            self.get_logger().error(str(error))
            self._drop()
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # a driver or library that fails in its own way
            self.get_logger().error(f"configure: {type(error).__name__}: {error}")
            self._drop()
            return TransitionCallbackReturn.ERROR
        self._make_topics()
        info = self._assembly.engine.info
        self.get_logger().info(
            f"configured: mode {self._assembly.config.mode}, engine {info.name} {info.precision} on {info.provider}, "
            f"model {info.model_hash[:12]}"
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Warm up, plan."""
        assert self._assembly is not None
        example = self._assembly.adapter.example()
        for _ in range(int(self._values["warmup_plans"])):
            now_ns = self._monotonic.now_ns()
            self._assembly.policy.plan(replace(example, stamp_ns=now_ns), now_ns + 10 * NS_PER_S)
        self._assembly.policy.reset()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._plan, name="vla_spec planner", daemon=True)
        super().on_activate(state)
        self._thread.start()
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Decelerate, hold."""
        self._end_planning()
        if self._last is not None and self._last.rung is not Rung.STOP:
            self._publish(self._stop_chunk(self._last), None)
        self._last = None
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to nothing."""
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """The same, from any state."""
        if self._thread is not None:
            self.on_deactivate(state)
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured."""
        self._end_planning()
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def _assemble(self, mode: str, overrides: list[str]) -> Assembly:
        assert self._assembler is not None
        name, tree = read_mode(mode)
        tree = {**tree, "model": self._values["model"], "num_threads": int(self._values["num_threads"])}
        for assignment in filter(None, overrides):
            tree = set_key(tree, assignment)
        runtime = {"clock": "real", "deadline_ms": float(self._values["deadline_ms"])}
        config = resolve(merge(tree, {"runtime": runtime}), name)
        adapter = self._assembler.adapter(config)
        costs = self._assembly.costs if self._assembly is not None and not config.runtime.costs else None
        return self._assembler.assemble(config, adapter.example(), costs)

    def _make_layout(self, assembly: Assembly) -> ActionLayout:
        space = assembly.policy.space
        names = [n for n in self._values["joints"] if n] or [f"joint_{i}" for i in range(space.size)]
        units = list(self._values["units"])
        if units == [0.0]:
            domain = assembly.domain
            step = assembly.adapter.tokenizer.decode(np.zeros(domain.tokens_per_step, np.int32))
            next_ = assembly.adapter.tokenizer.decode(np.ones(domain.tokens_per_step, np.int32))
            bins = np.abs(next_ - step)[0].astype(np.float64)
            units = (domain.unit_per_bin[: domain.tokens_per_step].astype(np.float64) / bins).round(9).tolist()
        return ActionLayout(tuple(names), space.kinds, tuple(units), float(self._values["dt_s"]))

    def _make_topics(self) -> None:
        assert self._assembly is not None
        values = self._values
        example: Observation = self._assembly.adapter.example()
        topics = [t for t in values["image_topics"] if t] or [f"image_{i}" for i in range(len(example.images))]
        self._slots = ObservationSlots(
            len(topics), round(values["max_age_ms"] * 1e6), round(values["max_skew_ms"] * 1e6)
        )
        self._state_names = [n for n in values["state_joints"] if n] or list(self._layout.joints)
        events = SubscriptionEventCallbacks(incompatible_qos=self._on_incompatible)
        for i, topic in enumerate(topics):
            kind: Any = CompressedImage if topic.endswith("/compressed") else Image
            self._entities.append(
                self.create_subscription(
                    kind, topic, lambda message, camera=i: self._on_image(camera, message),
                    qos_profile(values, "image"), event_callbacks=events,
                )
            )  # fmt: skip
        self._entities.append(
            self.create_subscription(
                JointState, "joint_states", self._on_joints, qos_profile(values, "joint_states"), event_callbacks=events
            )
        )
        self._entities.append(
            self.create_subscription(
                String, "instruction", self._on_instruction, qos_profile(values, "instruction"), event_callbacks=events
            )
        )
        profile = qos_profile(values, "trajectory")
        self._trajectory = self.create_lifecycle_publisher(JointTrajectory, "trajectory", profile)
        self._info = self.create_lifecycle_publisher(String, "trajectory_info", profile)
        self._numbers = (
            self.create_lifecycle_publisher(Float64MultiArray, "action_chunk", profile)
            if values["publishes_actions"]
            else None
        )
        self._status = self.create_publisher(DiagnosticArray, "status", 10)
        self._status_timer = self.create_timer(1.0, self._publish_status, clock=rclpy.clock.Clock(
            clock_type=rclpy.clock.ClockType.STEADY_TIME))  # fmt: skip

    def finish(self) -> None:
        """The process ends: stop first."""
        if self._thread is not None:
            self._end_planning()
            if self._last is not None and self._last.rung is not Rung.STOP:
                self._publish(self._stop_chunk(self._last), None)
                wait_s(FLUSH_S)
        self._drop()

    # Messages in.

    def _on_image(self, camera: int, message: Any) -> None:
        try:
            read = messages.read_compressed if isinstance(message, CompressedImage) else messages.read_image
            self._slots.put_image(camera, read(message), messages.stamp_ns(message.header.stamp))
        except VlaSpecError as error:
            self._refuse(error)

    def _on_joints(self, message: JointState) -> None:
        try:
            state = messages.read_joints(message, self._state_names)
            self._slots.put_state(state, messages.stamp_ns(message.header.stamp))
        except BadObservation as error:
            self._refuse(error)

    def _on_instruction(self, message: String) -> None:
        self._slots.put_instruction(message.data)

    def _refuse(self, error: Exception) -> None:
        self._counts["refused"] += 1
        self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _on_incompatible(self, event: Any) -> None:
        self._counts["incompatible_qos"] += 1
        self.get_logger().warning(f"a publisher offers another quality of service ({event.last_policy_kind})")

    def _on_jump(self, jump: TimeJump) -> None:
        self._counts["clock_jumps"] += 1
        if self._entities:
            self._slots.clear()
        self._last = None

    def _on_set(self, parameters: list[Any]) -> SetParametersResult:
        """A change of decoding: built now, refused now if it can't be, in use with the next chunk."""
        changed = {p.name: p.value for p in parameters if p.name in ("mode", "overrides", "deadline_ms")}
        if not changed:
            return SetParametersResult(successful=True)
        before = dict(self._values)
        self._values |= changed
        if self._assembly is not None:
            try:
                self._wanted = self._assemble(str(self._values["mode"]), list(self._values["overrides"]))
            except VlaSpecError as error:
                self._values = before
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    # The planning thread.

    def _plan(self) -> None:
        version, epoch_ns = 0, 0
        previous: ActionChunk | None = None
        while not self._stopping.is_set():
            if self._wanted is not None:
                self._assembly, self._wanted = self._wanted, None
            assembly = self._assembly
            assert assembly is not None
            now_ns = self.get_clock().now().nanoseconds
            dt_ns = round(self._layout.dt_s * NS_PER_S)
            previous = previous if self._last is not None else None
            due_ns = 0
            if previous is not None and previous.instruction == self._slots.instruction:
                due_ns = previous.observation_stamp_ns + int(self._values["execute_horizon"]) * dt_ns
            observation = self._slots.look(now_ns, due_ns, 0)
            if observation is None or (previous is not None and observation.stamp_ns <= previous.observation_stamp_ns):
                version = self._slots.wait(version, POLL_S)
                continue
            if previous is None:
                epoch_ns = observation.stamp_ns
                assembly.policy.reset()
            step = round((observation.stamp_ns - epoch_ns) / dt_ns)
            observation = replace(observation, step=step)
            history = None
            if previous is not None and previous.instruction == observation.instruction and len(previous.tokens):
                per_step = assembly.domain.tokens_per_step
                consumed = min((step - previous.observation_step) * per_step, len(previous.tokens))
                history = ChunkHistory(previous.tokens, consumed, 0, previous.actions)
            age_ns = max(0, now_ns - observation.stamp_ns)
            deadline_ns = self._monotonic.now_ns() + round(self._values["deadline_ms"] * 1e6) - age_ns
            chunk = assembly.policy.plan(observation, deadline_ns, history)
            self._counts["plans"] += 1
            self._counts["late"] += chunk.is_late
            self._durations_ms.append((chunk.ready_ns - chunk.start_ns) / 1e6)
            previous = self._last = chunk
            if not self._stopping.is_set():
                self._publish(chunk, observation)

    def _publish(self, chunk: ActionChunk, observation: Observation | None) -> None:
        start = None
        if observation is not None and len(self._state_names) >= self._layout.size:
            start = observation.state[: self._layout.size].tolist()
        trajectory, info = messages.write_chunk(chunk, self._layout, start, str(self._values["frame_id"]))
        self._info.publish(info)  # first: who gets the trajectory has its provenance
        self._trajectory.publish(trajectory)
        if self._numbers is not None:
            self._numbers.publish(messages.write_actions(chunk.actions, self._layout.joints))

    def _stop_chunk(self, last: ActionChunk) -> ActionChunk:
        """From what was played last to a stand, over the space's own number of steps."""
        assert self._assembly is not None
        space = self._assembly.policy.space
        now_ns = self.get_clock().now().nanoseconds
        row = min(
            len(last.actions) - 1, max(0, round((now_ns - last.observation_stamp_ns) / NS_PER_S / self._layout.dt_s))
        )
        before = last.actions[row - 1] if row else None
        actions = np.stack([space.stop(last.actions[row], i, before) for i in range(space.stop_steps)])
        return replace(
            last, actions=actions, provenance=np.full(actions.shape, Provenance.HOLD, np.uint8), rung=Rung.STOP,
            chunk_id=last.chunk_id + 1, observation_stamp_ns=now_ns, tokens=np.empty(0, np.int32),
        )  # fmt: skip

    def _end_planning(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._slots.wake()
            self._thread.join()
            self._thread = None

    def _drop(self) -> None:
        for entity in self._entities:
            self.destroy_subscription(entity)
        for name in ("_trajectory", "_info", "_numbers"):
            publisher = getattr(self, name, None)
            if publisher is not None:
                self.destroy_lifecycle_publisher(publisher)
                setattr(self, name, None)
        if getattr(self, "_status_timer", None) is not None:
            self.destroy_timer(self._status_timer)
            self.destroy_publisher(self._status)
            self._status_timer = None
        self._entities = []
        self._assembly = self._assembler = self._wanted = None

    def _publish_status(self) -> None:
        """What the monitor reads, once a second."""
        window, self._durations_ms = self._durations_ms, []
        values: dict[str, Any] = {**self._counts, "rate_hz": len(window)}
        if window:
            values |= {"p50_ms": round(float(np.median(window)), 3), "max_ms": round(max(window), 3)}
        slots = self._slots.counts
        values |= {"stale": slots.num_stale, "skewed": slots.num_skewed, "images": slots.num_images}
        if self._assembly is not None:
            values["mode"] = self._assembly.config.mode
        status = DiagnosticStatus(
            name=f"{self.get_fully_qualified_name()}: planner", hardware_id="vla_spec", level=DiagnosticStatus.OK,
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )  # fmt: skip
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._status.publish(message)


def main() -> None:
    """Entry point."""
    run_node(PolicyNode)


if __name__ == "__main__":
    main()
