"""What the ROS graph costs: a picture's way to the policy, picture to chunk, the commands' rate, a killed planner.

    python benchmarks/ros_graph.py [--parts pictures,chunks,words,kills] [--repeats 2] [--out runs/ros-graph]

All on real DDS between processes of one machine, with the shipped policy. Needs rclpy, the simulator for one still
picture, and the model folder. Times across processes are on CLOCK_MONOTONIC, which they share.

- pictures: 224 x 224 x 3, 30 Hz, from this process to `put_image` inside policy_node's own subscription callback.
- chunks: three pictures and the joint states leave this process; the trajectory arrives here. Beside it the same plans
  in this process without ROS, at the same pace, taking turns. And how regular action_node's commands are meanwhile, by
  its own ticks and as they arrive here.
- words: another instruction leaves this process; the first provenance line of a chunk that obeys it arrives. Pictures
  come at 20 Hz.
- kills: SIGKILL of policy_node while the arm moves, until the first command of the lasting stand; then a new
  policy_node, until the arm moves again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from vla_spec.assemble import Assembler
from vla_spec.config import merge, read_mode, resolve
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._demo import DemoResult, Observer
from vla_spec.nodes._main import run_node
from vla_spec.nodes._processes import NodeProcesses
from vla_spec.nodes.policy_node import PolicyNode
from vla_spec.results import environment
from vla_spec.trace import write_json

WARM_UP = 30
JOINTS = ["tcp_x", "tcp_y", "tcp_z", "gripper"]
SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TIMEOUT_S = 60.0
PARAMS = """
/**/policy_node:
  ros__parameters:
    {model: %s, mode: %s, joints: [tcp_x, tcp_y, tcp_z, gripper], units: [0.01, 0.01, 0.01, 1.0], dt_s: 0.0125,
     execute_horizon: 1, deadline_ms: 1000.0, max_age_ms: 1000.0}
/**/action_node:
  ros__parameters:
    {rate_hz: 80.0, joints: [tcp_x, tcp_y, tcp_z, gripper], kinds: [delta, delta, delta, switch], dry_run: false,
     units: [0.01, 0.01, 0.01, 1.0], low: [-1.0, -1.0, -1.0, -1.0], high: [1.0, 1.0, 1.0, 1.0]}
"""


def main() -> None:
    if "--child" in sys.argv:
        child(sys.argv[sys.argv.index("--child") + 1 :])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="pictures,chunks,words,kills")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=300, help="of each repeat")
    parser.add_argument("--chunks", type=int, default=150, help="of each repeat, with and without ROS")
    parser.add_argument("--words", type=int, default=20, help="of each repeat")
    parser.add_argument("--kills", type=int, default=4, help="of each repeat")
    parser.add_argument("--mode", default="exact")
    parser.add_argument("--model", default="models/metaworld")
    parser.add_argument("--out", type=Path, default=Path("runs/ros-graph"))
    asked = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", "89")
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    asked.out.mkdir(parents=True, exist_ok=True)
    params = asked.out / "params.yaml"
    params.write_text(PARAMS % (Path(asked.model).resolve(), asked.mode))
    rclpy.init()
    observation = still_picture()
    found: dict[str, list[float]] = {}
    load = [os.getloadavg()[0]]
    try:
        for repeat in range(asked.repeats):
            if "pictures" in asked.parts:
                pictures(asked, found)
            if set(asked.parts.split(",")) & {"chunks", "words", "kills"}:
                graph(asked, params, observation, found, repeat)
            load.append(os.getloadavg()[0])
    finally:
        rclpy.try_shutdown()
    rows = {name: summary(values) for name, values in found.items()}
    result = {
        "format": 1, "kind": "ros-graph", "command": shlex.join(["python", *sys.argv]), "rows": rows,
        "date": datetime.date.today().isoformat(), "load_average": load, "warm_up": WARM_UP,
        "environment": environment(1),
    }  # fmt: skip
    write_json(asked.out / "results.json", result)
    table = Table(box=SIMPLE_HEAD)
    for heading in ("what", "n", "p50", "p99", "max"):
        table.add_column(heading, justify="right" if heading != "what" else "left")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:g}" for key in ("n", "p50", "p99", "max")))
    console = Console()
    console.print(table)
    console.print(f"load average {', '.join(f'{value:.1f}' for value in load)}; {asked.out / 'results.json'}")


def summary(values: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return {"n": len(values), "p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(values), 3)}


def still_picture():
    """One observation of the simulated arm."""
    from vla_spec.robots import metaworld

    robot = metaworld.build(metaworld.Options(task="drawer-close"), None)  # type: ignore[arg-type]
    robot.reset(10000)
    seen = robot.observe(0)
    robot.close()
    return seen


class Driver(Node):
    """A robot's sensors, and ears for what comes of them."""

    def __init__(self) -> None:
        super().__init__("driver")
        self.images = [self.create_publisher(Image, f"image_{i}", SENSOR) for i in range(3)]
        self.joints = self.create_publisher(JointState, "joint_states", SENSOR)
        self.words = self.create_publisher(String, "instruction", LATCHED)
        self.chunks: list[tuple[int, int]] = []  # stamp, arrival on the monotonic clock
        self.planning: list[float] = []
        self.obeyed = ""
        self.due = 0  # when the next pictures are
        self.commands: list[tuple[int, bool]] = []  # arrival, does the arm move
        self.ticks: dict[str, str] = {}
        self.sent: dict[int, int] = {}
        self.create_subscription(JointTrajectory, "trajectory", self._on_trajectory, 1)
        self.create_subscription(String, "trajectory_info", self._on_info, 1)
        self.create_subscription(Float64MultiArray, "command", self._on_command, 50)
        self.create_subscription(DiagnosticArray, "status", self._on_status, 10)
        self.spinner = SingleThreadedExecutor()
        self.spinner.add_node(self)

    def _on_trajectory(self, message: JointTrajectory) -> None:
        self.chunks.append((messages.stamp_ns(message.header.stamp), time.monotonic_ns()))

    def _on_info(self, message: String) -> None:
        info = messages.read_info(message)
        self.planning.append(info.planning_ms)
        self.obeyed = info.instruction

    def _on_command(self, message: Float64MultiArray) -> None:
        self.commands.append((time.monotonic_ns(), bool(np.abs(message.data[:3]).max() > 1e-3)))

    def _on_status(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.endswith(": actor"):
                self.ticks = {v.key: v.value for v in status.values}

    def show(self, seen) -> None:
        stamp = self.get_clock().now().nanoseconds
        self.sent[stamp] = time.monotonic_ns()
        self.joints.publish(messages.write_joints(JOINTS, seen.state, stamp))
        for publisher, pixels in zip(self.images, seen.images, strict=True):
            publisher.publish(messages.write_image(pixels, stamp, ""))

    def until(self, condition, what: str, seen=None, period_ns: int = 50_000_000) -> None:
        """Spin, and show pictures at their pace, until a condition holds."""
        end = time.monotonic_ns() + round(TIMEOUT_S * 1e9)
        while not condition():
            now = time.monotonic_ns()
            if now > end:
                raise TimeoutError(f"waited {TIMEOUT_S:g} s for {what}")
            if seen is not None and now >= self.due:
                self.show(seen)
                self.due = max(self.due + period_ns, now)
            left_s = 0.01 if seen is None else max(0.0, min(0.01, (self.due - time.monotonic_ns()) / 1e9))
            self.spinner.spin_once(timeout_sec=left_s)


def pictures(asked: argparse.Namespace, found: dict[str, list[float]]) -> None:
    """A process of its own is the policy; this one is the camera."""
    result = asked.out / "pictures.json"
    result.unlink(missing_ok=True)
    driver = Driver()
    with Child(asked, result) as process:
        driver.until(lambda: driver.images[0].get_subscription_count(), "policy_node")
        pixels = np.random.default_rng(1).integers(0, 255, (224, 224, 3), dtype=np.uint8)
        period_ns, start = round(1e9 / 30), time.monotonic_ns()
        building = []
        for i in range(asked.pictures + WARM_UP):
            due = start + i * period_ns
            driver.until(lambda due=due: time.monotonic_ns() >= due, "the next picture")
            begun = time.monotonic_ns()
            driver.images[0].publish(messages.write_image(pixels, time.monotonic_ns(), ""))
            building.append((time.monotonic_ns() - begun) / 1e6)
        driver.until(lambda: True, "nothing")
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT_S)
    got = json.loads(result.read_text())
    found.setdefault("picture to put_image (ms)", []).extend(got[WARM_UP:])
    found.setdefault("of that: message made and published (ms)", []).extend(building[WARM_UP:])
    print(f"{len(got)} of {asked.pictures + WARM_UP} pictures arrived")
    driver.destroy_node()


class Child:
    """This program again, as the policy node with a stop-watch in it."""

    def __init__(self, asked: argparse.Namespace, result: Path) -> None:
        import subprocess

        command = [sys.executable, __file__, "--child", asked.model, str(result)]
        self.process = subprocess.Popen(command, env={**os.environ})

    def __enter__(self):
        return self.process

    def __exit__(self, *args) -> None:
        self.process.kill()
        self.process.wait()


def child(arguments: list[str]) -> None:
    model, result = arguments
    times: list[float] = []

    def make() -> PolicyNode:
        node = PolicyNode(parameter_overrides=[Parameter("model", value=model)])
        node.trigger_configure()
        node.trigger_activate()
        put = node._slots.put_image

        def timed(camera, image, stamp_ns):
            put(camera, image, stamp_ns)
            times.append((time.monotonic_ns() - stamp_ns) / 1e6)

        node._slots.put_image = timed
        return node

    try:
        run_node(make)
    finally:
        Path(result).write_text(json.dumps(times))


def graph(asked: argparse.Namespace, params: Path, seen, found: dict[str, list[float]], repeat: int) -> None:
    driver, spinner = Driver(), SingleThreadedExecutor()
    observer = Observer(DemoResult())
    spinner.add_node(observer)

    def begin() -> None:
        nodes.start("policy_node", params)
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            observer.transit(transition, spinner, TIMEOUT_S)

    with NodeProcesses(asked.out / f"logs-{repeat}") as nodes:
        nodes.start("action_node", params)
        begin()
        driver.words.publish(String(data=seen.instruction))
        driver.until(lambda: len(driver.chunks) > WARM_UP, "chunks", seen)
        if "chunks" in asked.parts:
            chunks(asked, driver, seen, found)
        for i in range(asked.words if "words" in asked.parts else 0):
            moment = time.monotonic_ns() + 200_000_000 + i * 7_000_000  # another moment of the plan each time
            driver.until(lambda moment=moment: time.monotonic_ns() >= moment, "the moment", seen)
            words = seen.instruction if driver.obeyed != seen.instruction else "the " + seen.instruction
            said = time.monotonic_ns()
            driver.words.publish(String(data=words))
            driver.until(lambda words=words: driver.obeyed == words, "a chunk that obeys", seen)
            found.setdefault("instruction to the first chunk that obeys (ms)", []).append(
                (time.monotonic_ns() - said) / 1e6
            )
        driver.words.publish(String(data=seen.instruction))
        for i in range(asked.kills if "kills" in asked.parts else 0):
            driver.until(lambda: driver.commands and driver.commands[-1][1], "motion", seen)
            moment = time.monotonic_ns() + i * 7_000_000  # another moment of the plan each time
            driver.until(lambda moment=moment: time.monotonic_ns() >= moment, "the moment", seen)
            process = nodes.running.pop("policy_node")
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic_ns()
            driver.commands.clear()
            driver.until(lambda killed=killed: time.monotonic_ns() > killed + 1_000_000_000, "a stand", seen)
            process.wait()
            moving = [at for at, is_moving in driver.commands if is_moving]
            after = [at for at, _ in driver.commands if at > max(moving, default=killed)]
            found.setdefault("SIGKILL to stand (ms)", []).append((after[0] - killed) / 1e6)
            restarted = time.monotonic_ns()
            begin()
            driver.commands.clear()
            driver.until(lambda: any(m for _, m in driver.commands), "motion again", seen)
            first = next(at for at, is_moving in driver.commands if is_moving)
            found.setdefault("new policy_node to motion (ms)", []).append((first - restarted) / 1e6)
        codes = nodes.end_all()
        if any(codes.values()):
            raise SystemExit(f"nodes did not end cleanly: {codes}")
    spinner.shutdown()
    observer.destroy_node()
    driver.spinner.shutdown()
    driver.destroy_node()


def chunks(asked: argparse.Namespace, driver: Driver, seen, found: dict[str, list[float]]) -> None:
    """With ROS and without, in turns of 50 plans at 20 Hz."""
    name, tree = read_mode(asked.mode)
    runtime = {"clock": "real", "deadline_ms": 1000.0}
    config = resolve(merge({**tree, "model": asked.model, "num_threads": 1}, {"runtime": runtime}), name)
    assembler = Assembler()
    assembly = assembler.assemble(config, seen)
    intervals: list[float] = []
    for turn in range(-1, (asked.chunks + 49) // 50):
        settled = time.monotonic_ns() + 300_000_000  # what is on its way from the turn before arrives
        driver.until(lambda settled=settled: time.monotonic_ns() > settled, "a moment", seen)
        driver.chunks.clear()
        driver.planning.clear()
        driver.commands.clear()
        driver.until(lambda: len(driver.chunks) >= 50, "chunks", seen)
        ages = [(arrived - driver.sent[stamp]) / 1e6 for stamp, arrived in driver.chunks]
        arrivals = [at for at, _ in driver.commands]
        own: list[float] = []
        start, previous = time.monotonic_ns(), None
        for i in range(50):
            due = start + i * 50_000_000
            driver.until(lambda due=due: time.monotonic_ns() >= due, "the next plan")
            begun = time.monotonic_ns()
            chunk = assembly.policy.plan(seen, begun + 1_000_000_000, history_of(previous, assembly))
            own.append((time.monotonic_ns() - begun) / 1e6)
            previous = chunk
        if turn < 0:
            continue  # warm-up
        found.setdefault("picture to chunk, through ROS (ms)", []).extend(ages)
        found.setdefault("of that: planning, in policy_node (ms)", []).extend(driver.planning)
        found.setdefault("the same plan without ROS (ms)", []).extend(own)
        intervals += (np.abs(np.diff(arrivals) / 1e6 - 12.5)).tolist()
    found.setdefault("commands: period error on arrival (ms)", []).extend(intervals)
    driver.ticks.clear()
    driver.until(lambda: driver.ticks, "a report of the actor", seen)
    for key in ("p50", "p99", "max"):
        value = float(driver.ticks[f"period_error_{key}_ms"])
        found.setdefault(f"commands: period error of the node's ticks, {key} of its last 1024 (ms)", []).append(value)


def history_of(chunk, assembly):
    """As far into the chunk as one plan at 20 Hz is."""
    from vla_spec.interfaces import ChunkHistory

    if chunk is None:
        return None
    return ChunkHistory(chunk.tokens, min(4 * assembly.domain.tokens_per_step, len(chunk.tokens)), 0, chunk.actions)


if __name__ == "__main__":
    main()
