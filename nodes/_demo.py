"""The demonstration: simulator, cameras, policy, actor and monitor as processes on real DDS; what came of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import String

from vla_spec.errors import NodeFailed
from vla_spec.nodes._lifecycle import transit
from vla_spec.nodes._processes import NodeProcesses
from vla_spec.nodes._qos import HEAR_LATCHED

#: A domain of its own, so that a demonstration never talks to a robot; ROS_DOMAIN_ID wins if it is set.
DEMO_DOMAIN = "88"
LEVELS = {
    DiagnosticStatus.OK: "OK", DiagnosticStatus.WARN: "WARN", DiagnosticStatus.ERROR: "ERROR",
    DiagnosticStatus.STALE: "STALE",
}  # fmt: skip


@dataclass(slots=True)
class DemoResult:
    """What was seen.

    Attributes:
        outcomes: one per episode: task, seed, success, steps.
        diagnostics: the last `/diagnostics`, by name: level, message, values.
        exit_codes: of the nodes at the end.
        seconds: wall time of the episodes.
    """

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)
    exit_codes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@final
class Observer(Node):
    """Hears what happens; drives the policy node's lifecycle."""

    def __init__(self, result: DemoResult) -> None:
        super().__init__("vla_spec_demo")
        self._result = result
        self._task_outcomes: list[dict[str, Any]] = []
        self.create_subscription(String, "episode", self._on_episode, HEAR_LATCHED)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_episode(self, message: String) -> None:
        said = json.loads(message.data)
        self._task_outcomes = said["outcomes"]

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._result.diagnostics[status.name] = {
                "level": LEVELS[status.level], "message": status.message, **{v.key: v.value for v in status.values},
            }  # fmt: skip

    def take_outcomes(self) -> list[dict[str, Any]]:
        """Of the task that was played, once."""
        outcomes, self._task_outcomes = self._task_outcomes, []
        return outcomes

    def transit(self, transition: int, executor: SingleThreadedExecutor, timeout_s: float) -> None:
        """One lifecycle transition of the policy node.

        Raises:
            NodeFailed: the node is not there, or the transition failed; its log says why.
        """
        if not transit(self, executor, "policy_node", transition, timeout_s):
            raise NodeFailed(f"policy_node: transition {transition} failed")


def run_demo(
    params_file: Path, tasks: Sequence[str], seeds: Sequence[int], out: Path, say: Callable[[str], None],
    policy_params: dict[str, str] | None = None, sim_params: dict[str, str] | None = None,
    monitor_params: dict[str, str] | None = None, bag: bool = True, timeout_s: float = 60.0,
) -> DemoResult:  # fmt: skip
    """Play ``seeds`` of each task. Logs go to ``out/logs``, the bag to ``out/demo.mcap``.

    Raises:
        NodeFailed: a node ended early or hangs; the message quotes the end of its log.
    """
    environment = {
        "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID", DEMO_DOMAIN),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST"),
    }
    os.environ.update(environment)
    result = DemoResult()
    rclpy.init()
    executor = SingleThreadedExecutor()
    observer = Observer(result)
    executor.add_node(observer)
    try:
        with NodeProcesses(out / "logs", environment) as nodes:
            nodes.start("policy_node", params_file, policy_params)
            nodes.start("action_node", params_file)
            recording = {"bag": str(out / "demo.mcap")} if bag else {}
            nodes.start("monitor_node", params_file, {**(monitor_params or {}), **recording})
            say("loading the policy")
            observer.transit(Transition.TRANSITION_CONFIGURE, executor, timeout_s)
            observer.transit(Transition.TRANSITION_ACTIVATE, executor, timeout_s)
            started_s = time.monotonic()
            for task in tasks:
                _play(nodes, observer, executor, params_file, task, seeds, sim_params or {}, timeout_s)
                outcomes = observer.take_outcomes()
                result.outcomes += outcomes
                say(f"{task}: {sum(o['success'] for o in outcomes)} of {len(outcomes)}")
            result.seconds = time.monotonic() - started_s
            until_s = time.monotonic() + 1.5  # one more round of diagnostics
            while time.monotonic() < until_s:
                executor.spin_once(timeout_sec=0.1)
            observer.transit(Transition.TRANSITION_DEACTIVATE, executor, timeout_s)
            result.exit_codes |= nodes.end_all(("monitor_node", "action_node", "policy_node"))
    finally:
        executor.shutdown()
        observer.destroy_node()
        rclpy.try_shutdown()
    return result


def _play(
    nodes: NodeProcesses, observer: Observer, executor: SingleThreadedExecutor, params_file: Path, task: str,
    seeds: Sequence[int], sim_params: dict[str, str], timeout_s: float,
) -> None:  # fmt: skip
    """All episodes of one task: the world begins, plays and ends; policy, actor and monitor stay."""
    names = ", ".join(f'"{seed}"' for seed in seeds)
    nodes.start("camera_node", params_file, {"task": task})
    sim = nodes.start("sim_node", params_file, {"task": task, "seeds": f"[{names}]", **sim_params})
    end_s = time.monotonic() + timeout_s * (1 + len(seeds))
    while sim.poll() is None:
        executor.spin_once(timeout_sec=0.1)
        dead = [name for name, process in nodes.running.items() if name != "sim_node" and process.poll() is not None]
        if dead or time.monotonic() > end_s:
            what = f"{dead[0]} ended" if dead else f"{task} takes longer than {timeout_s:g} s per episode"
            raise NodeFailed(f"{what}; the last lines of its log:\n{nodes.log(dead[0] if dead else 'sim_node')[-800:]}")
    executor.spin_once(timeout_sec=0.2)
    if nodes.end("sim_node") != 0:
        raise NodeFailed(f"sim_node failed:\n{nodes.log('sim_node')[-800:]}")
    nodes.end("camera_node")
