"""`policy_node`: pictures, joint states and an instruction in, action chunks as trajectories out. A lifecycle node.

  configure   loads and verifies engines, reads or measures the cost table
  activate    warms up, starts planning
  deactivate  stops planning; the last thing it publishes is a decelerating stop
  cleanup     drops engines and buffers
  error       returns to unconfigured, whatever was half built is dropped; the same if planning fails while active

Callbacks only put messages into slots; a thread of its own plans (`PlanLoop`), so that no executor ever waits for a
plan. A change of decoding is built between two plans, because target and drafter share an engine. The health that is
published on ``status`` goes on in every state.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any, final

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_spec.assemble import Assembler, Assembly
from vla_spec.clock import NS_PER_S, MonotonicClock
from vla_spec.config import Config, merge, read_mode, resolve, set_key
from vla_spec.errors import VlaSpecError
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.nodes._follow import Follow, read_goal
from vla_spec.nodes._main import run_node, wait_s
from vla_spec.nodes._observation_slots import ObservationSlots
from vla_spec.nodes._parameters import Parameter, declare, qos_parameters, qos_profile
from vla_spec.nodes._plan_loop import PlanLoop, Planned
from vla_spec.nodes._qos import CHUNK, LATCHED
from vla_spec.types import Float32, Observation

SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
GOAL = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)

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
#: The planning thread looks as often whether a change of decoding is built [s].
RELOAD_POLL_S = 0.002
#: How often a goal is looked at [s], and how many looks lie between two feedbacks.
FOLLOW_S, LOOKS_PER_FEEDBACK = 0.1, 5
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
        self._slots: ObservationSlots | None = None
        self._loop: PlanLoop | None = None
        self._follow = Follow()
        self._num_looks = 0
        self._thread: threading.Thread | None = None
        self._stopping, self._reloading = threading.Event(), threading.Event()
        self._engine_lock = threading.Lock()  # whoever calls the engine holds it
        self._subscriptions_made: list[Any] = []
        self._publishers_made: list[Any] = []
        self._services_made: list[Any] = []
        self._timers_made: list[Any] = []
        self._counts = {"refused": 0, "incompatible_qos": 0, "clock_jumps": 0, "reloads": 0, "failures": 0}
        self._durations_ms: list[float] = []
        self._phase, self._failure = "unconfigured", ""
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._status = self.create_publisher(DiagnosticArray, "status", 10)
        self.create_timer(1.0, self._publish_status, clock=self._steady)
        self._trouble = self.create_guard_condition(self._on_trouble)
        self.add_on_set_parameters_callback(self._on_set)
        self._jump = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._on_jump,
        )

    # Transitions. Everything they make is dropped by on_cleanup and on_error alike.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load engines; make topics."""
        self._failure = ""
        result = self._transit("configure", self._configure)
        if result != TransitionCallbackReturn.SUCCESS:
            self._drop()
        return result

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Warm up, plan."""
        result = self._transit("activate", self._warm_up)
        if result != TransitionCallbackReturn.SUCCESS:
            return result
        self._stopping.clear()
        self._thread = threading.Thread(target=self._plan, name="vla_spec planner", daemon=True)
        super().on_activate(state)
        self._phase = "active"
        self._thread.start()
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Decelerate, hold."""
        self._end_goal("ABORTED", "policy_node was deactivated")
        self._end_planning()
        self._phase = "inactive"
        super().on_deactivate(state)
        return TransitionCallbackReturn.ERROR if self._failure else TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to nothing."""
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """The same, from any state."""
        self._end_planning()
        self._drop()
        self._phase = "finalized"
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured."""
        self._end_planning()
        self._drop()
        return TransitionCallbackReturn.SUCCESS

    def _transit(self, what: str, do: Callable[[], None]) -> TransitionCallbackReturn:
        """The user's errors are a FAILURE, the state stays; all others an ERROR. Both are logged: rclpy would not."""
        try:
            do()
        except VlaSpecError as error:
            self.get_logger().error(f"{what}: {error}")
            self._failure = str(error)
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # a driver or library that fails in its own way
            self.get_logger().error(f"{what}: {traceback.format_exc()}")
            self._failure = f"{what}: {type(error).__name__}: {error}"
            return TransitionCallbackReturn.ERROR
        self._failure = ""
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        self._assembler = Assembler()
        assembly = self._assembly = self._assemble(self._config(self._values))
        self._layout = self._make_layout(assembly)
        self._make_topics(assembly)
        info = assembly.engine.info
        self._phase = "inactive"
        self.get_logger().info(
            f"configured: mode {assembly.config.mode}, engine {info.name} {info.precision} on {info.provider}, "
            f"model {info.model_hash[:12]}"
        )

    def _warm_up(self) -> None:
        """Plans that nobody plays. The first one of an engine may take much longer."""
        assert self._assembly is not None
        example = self._assembly.adapter.example()
        for _ in range(int(self._values["warmup_plans"])):
            now_ns = self._monotonic.now_ns()
            self._assembly.policy.plan(example, now_ns + 10 * NS_PER_S)
        self._assembly.policy.reset()

    def _config(self, values: dict[str, Any]) -> Config:
        """What decodes, as the parameters say.

        Raises:
            VlaSpecError: a mode or a setting that does not exist.
        """
        name, tree = read_mode(str(values["mode"]))
        tree = {**tree, "model": values["model"], "num_threads": int(values["num_threads"])}
        for assignment in filter(None, values["overrides"]):
            tree = set_key(tree, assignment)
        runtime = {"clock": "real", "deadline_ms": float(values["deadline_ms"])}
        return resolve(merge(tree, {"runtime": runtime}), name)

    def _assemble(self, config: Config) -> Assembly:
        """Build it and measure its costs: calls the engine. Engines stay, everything else is made anew."""
        assert self._assembler is not None
        return self._assembler.assemble(config, self._assembler.adapter(config).example())

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

    def _make_topics(self, assembly: Assembly) -> None:
        values = self._values
        example: Observation = assembly.adapter.example()
        topics = [t for t in values["image_topics"] if t] or [f"image_{i}" for i in range(len(example.images))]
        slots = self._slots = ObservationSlots(
            len(topics), round(values["max_age_ms"] * 1e6), round(values["max_skew_ms"] * 1e6)
        )
        self._loop = PlanLoop(
            slots, lambda: int(self.get_clock().now().nanoseconds), self._monotonic.now_ns, self._layout.dt_s,
            int(values["execute_horizon"]),
        )  # fmt: skip
        self._state_names = [n for n in values["state_joints"] if n] or list(self._layout.joints)
        joints = self._layout.joints
        self._start_of: list[int] | None = None
        if set(joints) <= set(self._state_names):
            self._start_of = [self._state_names.index(name) for name in joints]
        else:
            self.get_logger().warning(
                "state_joints lacks some of joints: positions in trajectories count from the arm's pose at the "
                "observation; action_node plays them, a stock controller must not"
            )
        events = SubscriptionEventCallbacks(incompatible_qos=self._on_incompatible)

        def hear(kind: Any, topic: str, callback: Any, profile: Any) -> None:
            self._subscriptions_made.append(
                self.create_subscription(kind, topic, callback, profile, event_callbacks=events)
            )

        for i, topic in enumerate(topics):
            kind: Any = CompressedImage if topic.endswith("/compressed") else Image
            hear(kind, topic, lambda message, camera=i: self._on_image(camera, message), qos_profile(values, "image"))
        hear(JointState, "joint_states", self._on_joints, qos_profile(values, "joint_states"))
        hear(String, "instruction", self._on_instruction, qos_profile(values, "instruction"))
        hear(String, "follow", self._on_follow, GOAL)
        hear(Bool, "done", self._on_done, GOAL)
        profile = qos_profile(values, "trajectory")
        said = PublisherEventCallbacks(incompatible_qos=self._on_incompatible)

        def speak(kind: Any, topic: str) -> Any:
            publisher = self.create_lifecycle_publisher(kind, topic, profile, event_callbacks=said)
            self._publishers_made.append(publisher)
            return publisher

        self._trajectory, self._info = speak(JointTrajectory, "trajectory"), speak(String, "trajectory_info")
        self._numbers = speak(Float64MultiArray, "action_chunk") if values["publishes_actions"] else None
        self._feedback = self.create_publisher(String, "follow_feedback", LATCHED)
        self._publishers_made.append(self._feedback)
        self._services_made += [
            self.create_service(Trigger, "~/reset", self._on_reset),
            self.create_service(Trigger, "~/reload", self._on_reload),
            self.create_service(Trigger, "cancel_follow", self._on_cancel),
        ]
        self._timers_made.append(self.create_timer(FOLLOW_S, self._look_at_goal, clock=self._steady))

    def finish(self) -> None:
        """The process ends: stop first."""
        self._end_goal("ABORTED", "policy_node ends")
        if self._end_planning():
            wait_s(FLUSH_S)
        self._drop()

    # Messages in.

    def _on_image(self, camera: int, message: Any) -> None:
        assert self._slots is not None
        try:
            read = messages.read_compressed if isinstance(message, CompressedImage) else messages.read_image
            self._slots.put_image(camera, read(message), messages.stamp_ns(message.header.stamp))
        except VlaSpecError as error:
            self._refuse(error)

    def _on_joints(self, message: JointState) -> None:
        assert self._slots is not None
        try:
            state = messages.read_joints(message, self._state_names)
            self._slots.put_state(state, messages.stamp_ns(message.header.stamp))
        except VlaSpecError as error:
            self._refuse(error)

    def _on_instruction(self, message: String) -> None:
        assert self._slots is not None
        self._end_goal("ABORTED", "another instruction came", message.data)
        self._slots.put_instruction(message.data)

    def _refuse(self, error: Exception) -> None:
        self._counts["refused"] += 1
        self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    def _on_incompatible(self, event: Any) -> None:
        self._counts["incompatible_qos"] += event.total_count_change
        self.get_logger().warning(
            f"somebody on one of the topics wants another quality of service ({event.last_policy_kind})"
        )

    def _on_jump(self, jump: TimeJump) -> None:
        self._counts["clock_jumps"] += 1
        if self._loop is not None:
            self._loop.forget()

    # A goal: words to follow until done or timeout.

    def _on_follow(self, message: String) -> None:
        assert self._slots is not None
        try:
            goal = read_goal(message.data)
        except VlaSpecError as error:
            self._refuse(error)
            return
        now_ns = self._monotonic.now_ns()
        if self._phase != "active":
            refused = Follow()
            refused.start(goal, now_ns)
            self._feedback.publish(String(data=refused.end(now_ns, "ABORTED", f"policy_node is {self._phase}")))
            return
        self._end_goal("ABORTED", "another goal came", goal.instruction)
        self._follow.start(goal, now_ns)
        self._slots.put_instruction(goal.instruction)
        self._say_feedback("EXECUTING", "accepted")

    def _on_done(self, message: Bool) -> None:
        if message.data:
            self._end_goal("SUCCEEDED", "done")

    def _on_cancel(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self._follow.goal is not None
        response.message = "decelerating" if response.success else "there is no goal"
        self._end_goal("CANCELED", "on request")
        return response

    def _look_at_goal(self) -> None:
        if self._follow.goal is None:
            return
        if self._follow.is_timeout(self._monotonic.now_ns()):
            self._end_goal("ABORTED", "timeout")
            return
        self._num_looks += 1
        if self._num_looks % LOOKS_PER_FEEDBACK == 0:
            self._say_feedback("EXECUTING", "; ".join(self._slots.missing()) if self._slots is not None else "")

    def _say_feedback(self, status: str, said: str) -> None:
        previous = None if self._loop is None else self._loop.previous
        rung = "" if previous is None else previous.rung.name
        plans = 0 if self._loop is None else self._loop.counts["plans"]
        text = self._follow.feedback(self._monotonic.now_ns(), status, said, rung=rung, plans=plans)
        self._feedback.publish(String(data=text))

    def _end_goal(self, status: str, said: str, instruction: str = "") -> None:
        """What is followed from now on; nothing: the planner sends a decelerating stop. No effect without a goal."""
        if self._follow.goal is None or self._slots is None:
            return
        self._feedback.publish(String(data=self._follow.end(self._monotonic.now_ns(), status, said)))
        self._slots.put_instruction(instruction)

    # Changes while it plans.

    def _on_set(self, parameters: list[Any]) -> SetParametersResult:
        """A change of decoding: built now, refused now if it can't be, in use with the next chunk."""
        changed = {p.name: p.value for p in parameters if p.name in ("mode", "overrides", "deadline_ms")}
        wanted = {**self._values, **changed}
        try:
            if changed.keys() & {"mode", "overrides"}:
                self._reload(self._config(wanted))
        except VlaSpecError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:  # a driver or library that fails in its own way; what there is goes on
            self.get_logger().error(traceback.format_exc())
            return SetParametersResult(successful=False, reason=f"{type(error).__name__}: {error}")
        self._values = wanted
        return SetParametersResult(successful=True)

    def _on_reload(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """The files behind the parameters may have changed: mode, drafter, costs. The engine stays."""
        try:
            self._reload(self._config(self._values))
        except Exception as error:
            response.success, response.message = False, f"{type(error).__name__}: {error}"
            return response
        response.success, response.message = True, f"mode {self._values['mode']}, from the next chunk on"
        return response

    def _reload(self, config: Config) -> None:
        """Build between two plans; nothing to do before `configure`."""
        if self._assembly is None:
            return
        self._reloading.set()
        try:
            with self._engine_lock:
                self._assembly = self._assemble(config)
                self._counts["reloads"] += 1
        finally:
            self._reloading.clear()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self._loop is not None
        self._loop.forget()
        response.success, response.message = True, "what was observed and planned before now is forgotten"
        return response

    # The planning thread.

    def _plan(self) -> None:
        version = 0
        assert self._loop is not None
        assert self._slots is not None
        try:
            while not self._stopping.is_set():
                if self._reloading.is_set():  # locks are not fair: step aside until the other one had its turn
                    self._stopping.wait(RELOAD_POLL_S)
                    continue
                with self._engine_lock:
                    assert self._assembly is not None
                    budget_ns = round(self._values["deadline_ms"] * 1e6)
                    planned = self._loop.look(self._assembly, budget_ns, self._is_simulated())
                if planned is None:
                    version = self._slots.wait(version, POLL_S)
                elif not self._stopping.is_set():
                    self._durations_ms.append((planned.chunk.ready_ns - planned.chunk.start_ns) / 1e6)
                    self._publish(planned)
        except Exception as error:
            self.get_logger().error(f"planning: {traceback.format_exc()}")
            self._failure = f"planning: {type(error).__name__}: {error}"
            self._trouble.trigger()

    def _on_trouble(self) -> None:
        """The planning thread ended by an error: through `on_deactivate` and `on_error` to unconfigured."""
        if self._failure and self._phase == "active":
            self._counts["failures"] += 1
            self.trigger_deactivate()

    def _publish(self, planned: Planned) -> None:
        trajectory, info = messages.write_chunk(
            planned.chunk, self._layout, self._start(planned.state), str(self._values["frame_id"])
        )
        self._info.publish(info)  # first: who gets the trajectory has its provenance
        self._trajectory.publish(trajectory)
        if self._numbers is not None:
            self._numbers.publish(messages.write_actions(planned.chunk.actions, self._layout.joints))

    def _start(self, state: Float32 | None) -> list[float] | None:
        """Joint positions that the trajectory counts from, in its joints' order."""
        if state is None or self._start_of is None:
            return None
        return [float(state[place]) for place in self._start_of]

    def _end_planning(self) -> bool:
        """Wait for the plan that is being made, then publish a stop. True if there was something to stop."""
        if self._thread is None:
            return False
        self._stopping.set()
        assert self._slots is not None
        self._slots.wake()
        self._thread.join()
        self._thread = None
        assert self._loop is not None
        assert self._assembly is not None
        planned = self._loop.stop(self._assembly)
        if planned is not None:
            self._publish(planned)
        return planned is not None

    def _drop(self) -> None:
        """From the executor's thread only, as everything that makes or destroys entities."""
        for timer in self._timers_made:
            self.destroy_timer(timer)
        for service in self._services_made:
            self.destroy_service(service)
        for subscription in self._subscriptions_made:
            self.destroy_subscription(subscription)
        for publisher in self._publishers_made:
            self.destroy_lifecycle_publisher(publisher)
        for made in (self._timers_made, self._services_made, self._subscriptions_made, self._publishers_made):
            made.clear()
        self._slots = self._loop = self._assembly = self._assembler = None
        self._phase = "unconfigured"

    def _is_simulated(self) -> bool:
        return bool(self.get_clock().ros_time_is_active)

    def _publish_status(self) -> None:
        """What the monitor reads, once a second."""
        window, self._durations_ms = self._durations_ms, []
        values: dict[str, Any] = {"state": self._phase, **self._counts, "rate_hz": len(window)}
        if window:
            values |= {"p50_ms": round(float(np.median(window)), 3), "max_ms": round(max(window), 3)}
        level, said = DiagnosticStatus.OK, self._phase
        if self._slots is not None and self._loop is not None:
            counts = self._slots.counts
            values |= {
                **self._loop.counts,
                "clock_jumps": self._counts["clock_jumps"] + self._loop.counts["clock_jumps"],
            }
            values |= {f"rung.{rung.name.lower()}": count for rung, count in self._loop.rungs.items() if count}
            values |= {
                "images": counts.num_images, "stale": counts.num_stale, "skewed": counts.num_skewed,
                "future": counts.num_future, "unequal": counts.num_unequal, "backwards": counts.num_backwards,
            }  # fmt: skip
        if self._assembly is not None:
            values["mode"] = self._assembly.config.mode
            if self._assembly.policy.last_error is not None:
                values["last_error"] = str(self._assembly.policy.last_error)[:200]
        if self._failure:
            level, said = DiagnosticStatus.ERROR, self._failure[:200]
        elif self._phase == "active":
            level, said = self._health(bool(window))
        status = messages.write_status(f"{self.get_fully_qualified_name()}: planner", values, level, said)
        self._status.publish(messages.write_statuses([status], self.get_clock().now().nanoseconds))

    def _health(self, has_planned: bool) -> tuple[bytes, str]:
        """Level and sentence of a node that is active: what it waits for."""
        assert self._slots is not None
        if self._is_simulated() and self.get_clock().now().nanoseconds == 0:
            return DiagnosticStatus.WARN, "use_sim_time is true and nothing came on /clock"
        missing = self._slots.missing()
        if missing == ["no instruction"]:
            return DiagnosticStatus.OK, "no instruction: nothing to do"
        if missing:
            return DiagnosticStatus.WARN, ", ".join(missing)
        if not has_planned:
            return DiagnosticStatus.WARN, "no observation of the last second could be used (see stale, skewed, future)"
        return DiagnosticStatus.OK, "planning"


def main() -> None:
    """Entry point."""
    run_node(PolicyNode)


if __name__ == "__main__":
    main()
