"""A planner somewhere else, as the actor sees it: hand over an observation, look for the chunk, never wait.

A thread of its own owns the socket. What goes wrong is a value: the actor sees `Link.PLANNER_GONE`, plays what it has,
holds and comes to rest as it does without any planner; the thread keeps knocking, and once the server is back the next
observation is planned, without a new client. Only `connect`, before anything moves, raises.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, final

import zmq
from zmq.utils.monitor import recv_monitor_message

from vla_spec.clock import NS_PER_S, MonotonicClock, NowNs
from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.realtime import Grant, thread_privileges
from vla_spec.runtime import PlanRequest
from vla_spec.serving.io_context import io_context
from vla_spec.serving.keys import ClientKeys
from vla_spec.serving.network_time import NetworkTime
from vla_spec.serving.wire import (
    MAX_REPLY_BYTES,
    MAX_TEXT_BYTES,
    Answer,
    Ask,
    BadMessage,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Request,
    Sizes,
    Unknown,
    Welcome,
    WrongVersion,
    decode_reply,
    encode,
)
from vla_spec.trace import PlanRecord
from vla_spec.types import ActionChunk

NS_PER_MS = 1_000_000
#: Plans that are kept for whoever wants to look (2 to 10 kB each), and timings of plans.
_KEPT_RECORDS, _KEPT_TIMINGS = 4096, 10_000
#: Most that a message may take of what is left, so that no deadline is so far in the future that it is refused [ns].
_MOST_REMAINING_NS = 10**14
_EVENTS: dict[int, str] = {
    zmq.Event.CONNECT_RETRIED: "nobody listens there",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the server does not know this client's key",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "no common protocol: keys on one side only, or another service",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: wrong keys, or keys on one side only",
    zmq.Event.DISCONNECTED: "the connection was closed",
    zmq.Event.HANDSHAKE_SUCCEEDED: "connected, but no answer",
}


class PlannerGone(VlaSpecError):
    """A planner that is needed now and does not answer, or does not fit."""

    exit_code = 69  # as sysexits.h has it: unavailable


class Link(Enum):
    """How it stands between client and server."""

    CONNECTING = "connecting"  # no welcome yet
    READY = "ready"
    PLANNER_GONE = "planner_gone"  # was there, and does not answer any more; the client keeps trying
    REFUSED = "refused"  # does not fit, `RemotePlanner.trouble` says what; trying again is no use
    CLOSED = "closed"  # `RemotePlanner.close` was called


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How to connect, and how patient to be.

    Attributes:
        connect: ``tcp://HOST:PORT`` or ``ipc:///path``.
        name: for the server's log.
        heartbeat_ms: a silent connection is asked for a sign of life so often. [ms]
        gone_after_ms: a question that was not answered for so long means that the server is gone. It is noticed
            ``heartbeat_ms + gone_after_ms`` after the server's last answer, at the latest. Small: a slow network looks
            like a dead server; large: the robot is told late, and holds when its chunk is used up. [ms]
        retry_ms: time between two attempts to come back. [ms]
        io_priority: of all threads that carry messages, under SCHED_FIFO if it is granted; 0 = not asked for. Below the
            actor's.
    """

    connect: str
    name: str = ""
    heartbeat_ms: float = 100.0
    gone_after_ms: float = 300.0
    retry_ms: float = 100.0
    io_priority: int = 0

    def __post_init__(self) -> None:
        scheme, mark, rest = self.connect.partition("://")
        if not mark or not rest or scheme not in ("tcp", "ipc"):
            raise BadConfig(f"planner address {self.connect!r}; valid: tcp://HOST:PORT or ipc:///PATH")
        for name in ("heartbeat_ms", "gone_after_ms", "retry_ms"):
            if not getattr(self, name) > 0:
                raise BadConfig(f"{name} is {getattr(self, name)}; valid: more than 0")
        if not 0 <= self.io_priority <= 99:
            raise BadConfig(f"io_priority is {self.io_priority}; valid: 1..99, or 0 for none")


class RemoteTiming(NamedTuple):
    """Where the time of one answer went [ns]; durations only, each by one clock.

    round_trip_ns: from `submit` to the chunk's arrival, by the client's clock. held_ns: the server's part, of which
    queue_ns before planning began and plan_ns of planning. network_ns: the rest, messages' encoding included.
    """

    round_trip_ns: int
    network_ns: int
    held_ns: int
    queue_ns: int
    plan_ns: int


class _Submitted(NamedTuple):
    number: int
    episode: int
    request: PlanRequest
    sent_ns: int


class _Outcome(NamedTuple):
    """chunk None = there is not going to be one."""

    number: int
    chunk: ActionChunk | None


@final
class RemotePlanner:
    """The actor's end of a planner on a server; a `vla_spec.runtime.PlannerLink`.

    `submit`, `poll`, `reset` and `wait` belong to the actor's thread. `poll` must be called now and then, as the actor
    does each control step; nothing but `connect` and `wait` blocks.

    A chunk's times are this side's: ``start_ns`` is when it was asked for, ``ready_ns`` when it arrived, so its slack
    is what the actor has; `timings` say what the server did meanwhile.

    Args:
        options: where, and how patient.
        hello: what the server has to fit; its name is taken from the options.
        keys: CurveZMQ keys, if the server has any.
        now_ns: the actor's clock.
    """

    def __init__(
        self,
        options: ClientOptions,
        hello: Hello | None = None,
        keys: ClientKeys | None = None,
        now_ns: NowNs | None = None,
    ) -> None:
        self.options, self._keys, self._now_ns = options, keys, now_ns or MonotonicClock().now_ns
        self._hello = replace(hello or Hello(), client=options.name, token=secrets.token_bytes(16))
        #: From submit until the chunk was polled or is known not to come, and always while the server is not there:
        #: then nothing is asked for, and the actor need not draw pictures for nobody. Written by the actor only.
        self.is_busy = True
        #: One entry per chunk that arrived, times as in the chunk; the last 4096, and the last 10,000.
        self.records: deque[PlanRecord] = deque(maxlen=_KEPT_RECORDS)
        self.timings: deque[RemoteTiming] = deque(maxlen=_KEPT_TIMINGS)
        #: How often the server was lost; observations without a chunk: lost on the way or with the server, overtaken
        #: by a newer one, too large for the protocol; messages of the server that were refused.
        self.num_gone = self.num_lost = self.num_overtaken = self.num_unsent = self.num_bad = 0
        #: What is known about why there is no connection, and why the last one ended, for people; empty = nothing is.
        self.trouble = self.loss = ""
        #: What serves; None before the first welcome.
        self.welcome: Welcome | None = None
        self.link = Link.CONNECTING
        self.network = NetworkTime()
        self._outbox: queue.SimpleQueue[_Submitted] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._held: ActionChunk | None = None
        self._is_waiting = False
        self._number = self._episode = 0
        self._changed = threading.Condition()
        self._is_stopping = False
        # Of the socket's thread:
        self._asked: _Submitted | None = None
        self._ping_ns: int | None = None  # since when an answer is due; None = none is
        self._heard_ns = self._knocked_ns = 0
        self._is_probing = self._is_idle_there = False
        self._sizes: Sizes | None = None
        self._context, grants = io_context("messages", options.io_priority)
        #: What was asked for the threads that carry messages, and what came of it.
        self.grants: tuple[Grant, ...] = grants
        self._wake_out, self._wake_in = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://submitted")
        self._wake_out.connect("inproc://submitted")
        self._poller = zmq.Poller()
        self._poller.register(self._wake_in, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="vla_spec remote planner", daemon=True)
        self._thread.start()

    # --- the actor's thread ---

    def connect(self, timeout_s: float = 5.0) -> Welcome:
        """Wait for the server, before anything moves.

        Raises:
            PlannerGone: no answer in time, or one that says what does not fit.
        """
        self.wait_for((Link.READY, Link.REFUSED, Link.CLOSED), timeout_s)
        if self.link is Link.REFUSED:
            raise PlannerGone(f"planner at {self.options.connect}: {self.trouble}")
        if self.link is not Link.READY or self.welcome is None:
            why = self.trouble or "no answer"
            raise PlannerGone(
                f"planner at {self.options.connect}: not there within {timeout_s:g} s ({why}); "
                "`vla-spec serve` starts one"
            )
        self.is_busy = False
        return self.welcome

    def wait_for(self, links: Link | Collection[Link], timeout_s: float) -> Link:
        """Block until it stands so, or so long. Returns how it stands. For waiting to start, not for the actor."""
        wanted = {links} if isinstance(links, Link) else set(links)
        with self._changed:
            self._changed.wait_for(lambda: self.link in wanted, timeout_s)
            return self.link

    def reset(self) -> None:
        """A new episode starts; a chunk that is still under way belongs to the old one and is not going to be seen."""
        self._episode += 1
        self._number += 1
        self._held, self._is_waiting = None, False
        self.is_busy = self.link is not Link.READY

    def submit(self, request: PlanRequest) -> None:
        """Hand over an observation. Before the last one's chunk came: this one takes its place."""
        self._number += 1
        self._is_waiting = self.is_busy = True
        self._held = None
        if self._is_stopping:
            self._is_waiting = False
            return
        self._outbox.put(_Submitted(self._number, self._episode, request, self._now_ns()))
        with contextlib.suppress(zmq.Again):  # then it is awake anyway
            self._wake_out.send(b"", zmq.NOBLOCK)

    def poll(self, now_ns: int) -> ActionChunk | None:
        """The chunk for the last observation, if it arrived by ``now_ns``; never blocks."""
        while self._take(0.0):
            pass
        self.is_busy = self._is_waiting or self.link is not Link.READY
        if self._held is None or self._held.ready_ns > now_ns:
            return None
        chunk, self._held, self._is_waiting = self._held, None, False
        self.is_busy = self.link is not Link.READY
        return chunk

    def wait(self, timeout_s: float) -> bool:
        """Block until the chunk for the last observation is there, for a world that waits too.

        Returns:
            False: it is not going to come, or did not in time.
        """
        deadline_ns = self._now_ns() + int(timeout_s * NS_PER_S)
        while self._held is None and self._is_waiting:
            if not self._take((deadline_ns - self._now_ns()) / NS_PER_S):
                return False
        return self._held is not None

    def _take(self, timeout_s: float) -> bool:
        """One outcome out of the mailbox; False = there is none, even after so long."""
        try:
            outcome = self._outcomes.get(timeout_s > 0, max(0.0, timeout_s))
        except queue.Empty:
            return False
        if outcome.number == self._number:
            self._held = outcome.chunk
            self._is_waiting = outcome.chunk is not None
        return True

    def close(self) -> None:
        """Say goodbye and end the thread."""
        if self._is_stopping:
            return
        self._is_stopping = True
        with contextlib.suppress(zmq.Again):
            self._wake_out.send(b"", zmq.NOBLOCK)
        self._thread.join()
        self._settle(Link.CLOSED, "")
        self._wake_out.close(0)
        self._context.term()

    # --- the socket's thread ---

    def _run(self) -> None:
        try:
            with thread_privileges("messages", self.options.io_priority, ()):
                self._serve()
        except BaseException as error:  # a fault of ours; the actor goes on without a planner
            self._lose()
            self._settle(Link.REFUSED, f"internal error: {type(error).__name__}: {error}")
            raise

    def _serve(self) -> None:
        self._open()
        try:
            while not self._is_stopping:
                ready = dict(self._poller.poll(self._timeout_ms()))
                if self._wake_in in ready:
                    with contextlib.suppress(zmq.Again):
                        while True:
                            self._wake_in.recv(zmq.NOBLOCK)
                    self._send_newest()
                if self._socket in ready:
                    while self._receive():
                        pass
                if self._monitor in ready:  # of the socket that was polled, or, if it was replaced, the new one's
                    self._watch()
                self._tend(self._now_ns())
            if self.link is Link.READY:
                self._send(Bye())
        finally:
            self._lose()
            self._close(linger_ms=200)
            self._wake_in.close(0)

    def _open(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a server that is not there
        socket.setsockopt(zmq.SNDHWM, 8)
        socket.setsockopt(zmq.RCVHWM, 64)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, max(1, int(self.options.retry_ms / 2)))
        socket.setsockopt(zmq.IPV6, int("[" in self.options.connect))
        if self._keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.own.secret)
        self._monitor = socket.get_monitor_socket(sum(_EVENTS))
        try:
            socket.connect(self.options.connect)
        except zmq.ZMQError as error:
            self._settle(Link.REFUSED, f"not an address that can be connected to ({error.strerror})")
        self._socket = socket
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _close(self, linger_ms: int = 0) -> None:
        self._poller.unregister(self._socket)
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)

    def _timeout_ms(self) -> int:
        if self.link is Link.REFUSED:
            return 1000
        return max(1, int(min(self.options.retry_ms, self.options.heartbeat_ms, self.options.gone_after_ms) / 2))

    def _send(self, message: Request) -> bool:
        """False: nobody is there to take it."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _send_newest(self) -> None:
        waiting: list[_Submitted] = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._outbox.get_nowait())
        if not waiting:
            return
        self.num_overtaken += len(waiting) - 1 + (self._asked is not None)
        self._asked = newest = waiting[-1]
        if self.link is not Link.READY or self._sizes is None:
            self._lose()
            return
        seen, history = newest.request.observation, newest.request.history
        if not _fits(newest.request, self._sizes):
            # Another size than agreed about, or a sentence beyond the protocol's limit: the server would refuse it.
            self.num_unsent += 1
            self._lose()
            return
        ask = Ask(
            id=newest.number,
            episode=newest.episode,
            remaining_ns=max(-_MOST_REMAINING_NS, min(newest.request.deadline_ns - newest.sent_ns, _MOST_REMAINING_NS)),
            network_ns=self.network.expected_ns,
            observation=seen,
            history=history,
        )
        self._is_idle_there = False
        if not self._send(ask):
            self._lose()

    def _receive(self) -> bool:
        """Handle one message; False = there is none."""
        try:
            frame = self._socket.recv(zmq.NOBLOCK)
            is_more = self._socket.getsockopt(zmq.RCVMORE)
            while self._socket.getsockopt(zmq.RCVMORE):
                self._socket.recv(zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        now_ns = self._now_ns()
        try:
            if is_more:
                raise BadMessage("message of several frames; valid: one")
            reply = decode_reply(frame, self._sizes)
        except WrongVersion as error:
            self.num_bad += 1
            self._settle(Link.REFUSED, f"speaks another {error}")
            return True
        except BadMessage as error:
            self.num_bad += 1
            self.trouble = f"an answer makes no sense: {error}"
            return True
        self._heard_ns = now_ns
        if isinstance(reply, Pong):
            self._hear_pong(reply, now_ns)
        elif isinstance(reply, Answer):
            self._hear_answer(reply, now_ns)
        elif isinstance(reply, Welcome):
            self._hear_welcome(reply, now_ns)
        elif isinstance(reply, Refused):
            self.trouble = reply.message
            self._lose()
            if reply.is_final:
                self._settle(Link.REFUSED, reply.message)
        elif isinstance(reply, Unknown):
            if self.link is Link.READY or self._is_probing:  # restarted faster than it was missed
                self._go("the server was restarted")
        else:
            self._go("the server said goodbye")
        return True

    def _hear_welcome(self, welcome: Welcome, now_ns: int) -> None:
        if self.link is Link.READY or self._is_probing:
            return  # the answer to a second knock
        self.welcome, self._sizes = welcome, welcome.sizes
        # From now on only the same will do: the actor's buffers were made for it.
        self._hello = replace(
            self._hello, model_hash=welcome.model_hash, image_shape=welcome.sizes.image_shape,
            state_size=welcome.sizes.state_size, action_size=welcome.sizes.action_size,
        )  # fmt: skip
        self.network.forget()
        self._is_probing = True
        size = welcome.sizes.max_request_bytes - MAX_TEXT_BYTES
        self._ping_ns = now_ns
        self._send(Ping(now_ns, size))  # as long as a request, so that the first deadline is right already

    def _hear_pong(self, pong: Pong, now_ns: int) -> None:
        self._ping_ns, self._is_idle_there = None, pong.busy_ns == 0
        if self._is_probing:
            self._is_probing = False
            self.network.record(now_ns - pong.sent_ns, 0)
            self._settle(Link.READY, "")

    def _hear_answer(self, answer: Answer, now_ns: int) -> None:
        asked = self._asked
        if asked is None or answer.id != asked.number or answer.chunk is None or answer.record is None:
            return  # about an observation that is no longer waited for
        self._asked = None
        round_trip_ns = now_ns - asked.sent_ns
        network_ns = self.network.record(round_trip_ns, answer.held_ns)
        plan_ns = answer.chunk.ready_ns - answer.chunk.start_ns
        self.timings.append(RemoteTiming(round_trip_ns, network_ns, answer.held_ns, answer.queue_ns, plan_ns))
        seen = asked.request.observation
        chunk = replace(
            answer.chunk, start_ns=asked.sent_ns, ready_ns=now_ns, deadline_ns=asked.request.deadline_ns,
            instruction=seen.instruction, observation_stamp_ns=seen.stamp_ns, observation_step=seen.step,
        )  # fmt: skip
        record = answer.record._replace(
            start_ns=asked.sent_ns, ready_ns=now_ns, deadline_ns=asked.request.deadline_ns,
            observation_stamp_ns=seen.stamp_ns, observation_step=seen.step,
        )  # fmt: skip
        self.records.append(record)
        self._outcomes.put(_Outcome(asked.number, chunk))

    def _watch(self) -> None:
        """What the transport has to say: why a connection does not come, and that it broke."""
        is_lost = False
        while self._monitor.poll(0):
            kind = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
            if self.link is Link.READY or self._is_probing:
                is_lost = is_lost or kind == zmq.EVENT_DISCONNECTED
            elif kind in _EVENTS and not (kind == zmq.EVENT_DISCONNECTED and self.trouble):
                self.trouble = _EVENTS[kind]
        if is_lost:
            while self._receive():  # what came before it broke
                pass
            if self.link is Link.READY or self._is_probing:
                self._go("the connection was closed")

    def _tend(self, now_ns: int) -> None:
        """Knock, ask for a sign of life, notice that there is none."""
        options = self.options
        if self.link is Link.REFUSED:
            return
        if self._ping_ns is not None and now_ns - self._ping_ns > options.gone_after_ms * NS_PER_MS:
            self._go(f"no sign of life for {options.gone_after_ms:g} ms")
        if self.link is Link.READY:
            if self._ping_ns is None and now_ns - self._heard_ns > options.heartbeat_ms * NS_PER_MS:
                self._ping_ns = now_ns
                self._send(Ping(now_ns))
            asked = self._asked
            if asked is not None and self._is_idle_there:
                overdue_ns = now_ns - max(asked.sent_ns, asked.request.deadline_ns)
                if overdue_ns > options.gone_after_ms * NS_PER_MS:
                    self._lose()  # the server lives and does nothing: the request or its answer did not arrive
        elif not self._is_probing and now_ns - self._knocked_ns > options.retry_ms * NS_PER_MS:
            self._knocked_ns = now_ns
            self._send(self._hello)

    def _go(self, why: str) -> None:
        """The server is gone: forget the connection with all that is under way in it, and knock again."""
        was_ready = self.link is Link.READY
        self._lose()
        self._ping_ns, self._is_probing = None, False
        self._close()
        self._open()
        self._knocked_ns = self._now_ns()
        if was_ready:
            self.num_gone += 1
            self.loss = why
            self._settle(Link.PLANNER_GONE, why)

    def _lose(self) -> None:
        """The observation in hand is not going to be answered."""
        if self._asked is not None:
            self.num_lost += 1
            self._outcomes.put(_Outcome(self._asked.number, None))
            self._asked = None

    def _settle(self, link: Link, trouble: str) -> None:
        with self._changed:
            self.link, self.trouble = link, trouble
            self._changed.notify_all()


def _fits(request: PlanRequest, sizes: Sizes) -> bool:
    """The server would take it."""
    seen, history = request.observation, request.history
    is_whole = seen.images.shape == sizes.image_shape and seen.images.dtype.str == "|u1"
    is_whole = is_whole and seen.state.shape == (sizes.state_size,) and seen.step >= 0
    if history is not None:
        is_whole = is_whole and len(history.tokens) <= sizes.num_tokens
    try:
        return is_whole and len(seen.instruction.encode()) <= MAX_TEXT_BYTES
    except UnicodeEncodeError:  # half a character
        return False
