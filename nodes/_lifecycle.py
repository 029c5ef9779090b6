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
#: How long an answer may take before the node is asked where it stands [s].
PATIENCE_S = 2.0


def transit(node: Node, executor: SingleThreadedExecutor, managed: str, transition: int, timeout_s: float) -> bool:
    """One transition of the node ``managed``; spins ``executor``, which has ``node``. False if it was refused.

    A service counts as ready when its server is seen, which may be before the server sees the client's reader: the
    transition is then made and its answer lost. So a node that is silent is asked for its state, and one that has not
    moved is asked again.

    Raises:
        NodeFailed: the node is not there, or does not answer in time.
    """
    clock = MonotonicClock()
    end_ns = clock.now_ns() + round(timeout_s * NS_PER_S)
    change = node.create_client(ChangeState, f"{managed}/change_state")
    ask = node.create_client(GetState, f"{managed}/get_state")

    def until(is_done: Any, patience_s: float) -> bool:
        until_ns = min(end_ns, clock.now_ns() + round(patience_s * NS_PER_S))
        while not is_done() and clock.now_ns() < until_ns:
            executor.spin_once(timeout_sec=0.05)
        return bool(is_done())

    try:
        if not until(lambda: change.service_is_ready() and ask.service_is_ready(), timeout_s):
            raise NodeFailed(f"{managed} does not answer; is it running, in this domain and namespace?")
        request = ChangeState.Request()
        request.transition.id = transition
        answer = change.call_async(request)
        while clock.now_ns() < end_ns:
            if until(answer.done, PATIENCE_S):
                return bool(answer.result().success)
            # The executor of a managed node is busy during a transition: whatever it answers is about afterwards.
            state = ask.call_async(GetState.Request())
            if not until(lambda: answer.done() or state.done(), timeout_s) or answer.done():
                continue
            if state.result().current_state.label == GOALS.get(transition):
                return True
            answer = change.call_async(request)
        raise NodeFailed(f"{managed}: transition {transition} takes longer than {timeout_s:g} s")
    finally:
        node.destroy_client(change)
        node.destroy_client(ask)
