"""Lifecycle transitions of a managed node, asked from outside, such that a lost answer is no failure."""

from __future__ import annotations

from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from vla_spec.clock import NS_PER_S, MonotonicClock
from vla_spec.errors import NodeFailed

#: Transition -> the state that it leads to.
GOALS = {
    Transition.TRANSITION_CONFIGURE: "inactive", Transition.TRANSITION_ACTIVATE: "active",
    Transition.TRANSITION_DEACTIVATE: "inactive", Transition.TRANSITION_CLEANUP: "unconfigured",
}  # fmt: skip
#: A question that is not answered within this time is asked again [s].
PATIENCE_S = 0.5
SPIN_S = 0.02


def transit(node: Node, executor: SingleThreadedExecutor, managed: str, transition: int, timeout_s: float) -> bool:
    """One transition of the node ``managed``; spins ``executor``, which has ``node``. False if it was refused.

    A service counts as ready when its server is seen: that may be before the server sees where to send answers, and for
    some seconds after the server was killed. So the node is asked for its state first, again and again; and again if
    the transition itself is not answered, because then it may have been made all the same.

    Raises:
        NodeFailed: the node is not there, or does not answer in time.
    """
    clock = MonotonicClock()
    end_ns = clock.now_ns() + round(timeout_s * NS_PER_S)
    change = node.create_client(ChangeState, f"{managed}/change_state")
    ask = node.create_client(GetState, f"{managed}/get_state")
    made: Any = None

    def is_made() -> bool:
        return made is not None and made.done()

    def state() -> str | None:
        """The state that the node says it is in; None = the transition was answered meanwhile."""
        questions: list[Any] = []
        asked_ns = 0
        while not is_made():
            for question in questions:
                if question.done():
                    return str(question.result().current_state.label)
            now_ns = clock.now_ns()
            if now_ns > end_ns:
                raise NodeFailed(f"{managed} does not answer within {timeout_s:g} s; is it running, in this domain?")
            if ask.service_is_ready() and now_ns - asked_ns > PATIENCE_S * NS_PER_S:
                questions.append(ask.call_async(GetState.Request()))
                asked_ns = now_ns
            executor.spin_once(timeout_sec=SPIN_S)
        return None

    request = ChangeState.Request()
    request.transition.id = transition
    try:
        before = state()
        made = change.call_async(request)
        while True:
            until_ns = clock.now_ns() + round(PATIENCE_S * NS_PER_S)
            while not is_made() and clock.now_ns() < until_ns:
                executor.spin_once(timeout_sec=SPIN_S)
            # A managed node answers nothing during a transition: what it says now is about afterwards.
            now = None if is_made() else state()
            if now is None:
                return bool(made.result().success)
            if now == GOALS.get(transition):
                return True
            if now == before:
                made = change.call_async(request)  # the question was lost, or the transition failed: ask once more
    finally:
        node.destroy_client(change)
        node.destroy_client(ask)
