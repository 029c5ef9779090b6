"""A ZeroMQ context whose own threads may go before others: on a busy machine a message waits for them at each hop."""

from __future__ import annotations

import os
import threading

import zmq

from vla_spec.realtime import Grant, thread_privileges


def io_context(role: str, priority: int) -> tuple[zmq.Context[zmq.Socket[bytes]], tuple[Grant, ...]]:
    """A context, and what came of asking for a priority.

    ZeroMQ aborts the process if it is not granted what it was told to ask for, so another thread tries first.

    Args:
        role: for the report.
        priority: of its threads under SCHED_FIFO; 0 = not asked for.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    if not priority:
        return context, ()
    found: list[Grant] = []

    def attempt() -> None:
        with thread_privileges(role, priority, ()) as grants:
            found.extend(grant for grant in grants if grant.what == "SCHED_FIFO")

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if all(grant.is_granted for grant in found):
        context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_FIFO)
        context.set(zmq.THREAD_PRIORITY, priority)
    return context, tuple(found)
