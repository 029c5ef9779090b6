"""One way to run a node: a steady executor, a clean end, one sentence for an expected error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from vla_spec.clock import NS_PER_S, MonotonicClock
from vla_spec.errors import VlaSpecError

#: How long the executor waits for something to do before it looks whether the process was asked to end [s].
WAIT_S = 0.1


def wait_s(seconds: float) -> None:
    """Let the middleware work, at the end of a process only."""
    clock = MonotonicClock()
    clock.sleep_until_ns(clock.now_ns() + round(seconds * NS_PER_S))


def run_node(make: Callable[[], Node]) -> None:
    """Make and spin a node until SIGINT or SIGTERM; exits with 0, or with 2 and one sentence if it can't start.

    `SingleThreadedExecutor`: of rclpy's executors the one whose timers are steadiest. The signals are our own: rclpy's
    handlers shut the context down at once, and the last thing that a node publishes is a stop.
    """
    try:
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # rclpy has a class per way to be wrong; what is wrong are arguments or their files
        said = str(error).splitlines()[0].split(", at /")[0]
        print(f"error: {said}; valid: --ros-args with a parameter file that is YAML", file=sys.stderr)
        sys.exit(2)
    is_asked_to_end = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked_to_end
        is_asked_to_end = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    code, node = 0, None
    executor = SingleThreadedExecutor()
    try:
        node = make()
        executor.add_node(node)
        is_over: Any = getattr(node, "is_over", lambda: False)
        while not is_asked_to_end and rclpy.ok() and not is_over():
            executor.spin_once(timeout_sec=WAIT_S)
    except VlaSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    finally:
        if node is not None:
            finish: Any = getattr(node, "finish", None)
            if finish is not None:
                finish()
            executor.shutdown()
            node.destroy_node()
        rclpy.try_shutdown()
    sys.exit(code)
