"""The planner as a server: many clients, one engine. A thread listens, the calling thread plans.

The listening thread owns the socket and never waits for a plan, so clients hear that the server lives while it plans,
a newer observation replaces a waiting one at once, and whoever can't be served in time is told so at once, by the
ladder's own answer, instead of being queued. ROUTER and DEALER sockets: a peer that vanishes leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple, final

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from vla_spec.clock import NowNs
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.drafters import none
from vla_spec.errors import BadConfig
from vla_spec.policy import Policy
from vla_spec.realtime import Grant, thread_privileges
from vla_spec.serving.io_context import io_context
from vla_spec.serving.keys import ServerKeys
from vla_spec.serving.tally import Tally
from vla_spec.serving.turns import Job, Turns
from vla_spec.serving.wire import (
    Answer,
    Ask,
    BadMessage,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Reply,
    Unknown,
    Welcome,
    WrongVersion,
    decode_request,
    encode,
)
from vla_spec.trace import PlanRecord, Trace
from vla_spec.types import ActionChunk

log = logging.getLogger(__name__)

NS_PER_MS = 1_000_000
#: Messages that are read before answers are sent again: a flood of one client delays nobody for long.
_MESSAGES_PER_TURN = 32
#: Whom the authenticator asks about keys (rfc.zeromq.org/spec/27).
_ZAP_DOMAIN = "vla_spec"
#: Clients that were turned away and are not written down again.
_MOST_REMEMBERED = 1000
_NEVER_NS = -(2**62)
#: Longest sleep of the listening thread [ms].
_IDLE_MS = 100
#: Last plans whose median is what a plan is expected to take.
_TYPICAL_OF = 32


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to listen.

    Attributes:
        bind: ``tcp://127.0.0.1:5555`` (port ``*`` = any free one) or ``ipc:///path``.
        is_public: allow addresses that other machines can reach.
        is_insecure: allow them without keys: anyone who reaches the port can ask for plans, and read them.
        silent_after_ms: a client that was not heard for so long is forgotten, and its place given away. [ms]
        io_priority: of all threads that carry messages, under SCHED_FIFO if it is granted; 0 = not asked for. Above the
            planning thread's, or a plan delays the answer to another client's ping.
    """

    bind: str = "tcp://127.0.0.1:5555"
    is_public: bool = False
    is_insecure: bool = False
    silent_after_ms: float = 5000.0
    io_priority: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.io_priority <= 99:
            raise BadConfig(f"io_priority is {self.io_priority}; valid: 1..99, or 0 for none")
        if not self.silent_after_ms > 0:
            raise BadConfig(f"silent_after_ms is {self.silent_after_ms}; valid: more than 0")
        if not self.is_local and not self.is_public:
            raise BadConfig(f"--bind {self.bind}: other machines can reach it; valid: 127.0.0.1, or add --public")

    @property
    def is_local(self) -> bool:
        """Only this machine can reach it.

        Raises:
            BadConfig: no address of a kind that is served.
        """
        scheme, mark, rest = self.bind.partition("://")
        if not mark or not rest or scheme not in ("tcp", "ipc"):
            raise BadConfig(f"--bind {self.bind}; valid: tcp://HOST:PORT or ipc:///PATH")
        if scheme == "ipc":
            return True
        host, mark, port = rest.rpartition(":")
        if not mark or not (port == "*" or (port.isdecimal() and int(port) < 65_536)):
            raise BadConfig(f"--bind {self.bind}; valid: tcp://HOST:PORT with a port of 1..65535, or * for a free one")
        host = host.strip("[]")
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def check_keys(self, keys: ServerKeys | None) -> None:
        """Refuse an open port without keys.

        Raises:
            BadConfig: reachable from other machines, no keys, and not said that this is meant.
        """
        if keys is None and not self.is_local and not self.is_insecure:
            raise BadConfig(
                f"--bind {self.bind}: open to other machines without keys; valid: --key FILE --clients FOLDER "
                "(`vla-spec keys` makes them), or --insecure"
            )


class _Seat(NamedTuple):
    """What a client is given: a policy of its own, engine shared, and another one that answers without the engine."""

    policy: Policy
    late: Policy


@dataclass(slots=True)
class _Session:
    """A client that said hello."""

    name: str
    token: bytes
    seat: _Seat
    heard_ns: int
    episode: int | None = None
    newest_id: int = -1
    next_chunk_id: int = 0


class _Planned(NamedTuple):
    """A finished plan, on its way from the planning thread to the listening one."""

    job: Job
    chunk: ActionChunk
    record: PlanRecord


@final
class PlanServer:
    """Serves plans. `start` binds and listens, `run` plans in the calling thread until `stop`, `close` frees all.

    Args:
        welcome: what clients are told; its sizes are what requests are checked against.
        policies: one per client that can be served at the same time; they may share an engine.
        options: where to listen.
        keys: None = no encryption, everyone who reaches the address is served.
        now_ns: the clock that the policies were built with.
        tell: called with a line about the last second, at most once a second and only if there is something to say.

    Raises:
        BadConfig: an open port without keys, or no policies.
    """

    def __init__(
        self,
        welcome: Welcome,
        policies: Sequence[Policy],
        options: ServerOptions,
        keys: ServerKeys | None,
        now_ns: NowNs,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        options.check_keys(keys)
        if not policies:
            raise BadConfig("server: no policies; valid: one per client")
        self._welcome, self._options, self._keys, self._now_ns = welcome, options, keys, now_ns
        self._tell = tell
        self._seats = [_Seat(policy, _without_engine(policy, now_ns)) for policy in policies]
        self._num_seats = len(self._seats)
        self._sessions: dict[bytes, _Session] = {}
        self._turned_away: set[tuple[bytes, str]] = set()
        self._turns, self._tokens = Turns(), queue.SimpleQueue[bool]()
        self._planned: deque[_Planned] = deque()
        self._took_ns: deque[int] = deque(maxlen=_TYPICAL_OF)
        costs = welcome.costs
        #: What a plan takes at least: encoding and one prefill [ns].
        self._least_ns = 0 if costs is None else int(costs.encode_ns + costs.prefill_ns)
        self._context, grants = io_context("messages", options.io_priority)
        #: What was asked for the threads that carry messages, and what came of it.
        self.grants: tuple[Grant, ...] = grants
        self._authenticator: ThreadAuthenticator | None = None
        self._thread: threading.Thread | None = None
        self._is_ending = self._is_stopping = False
        self._error: BaseException | None = None
        self._was_told_ns = now_ns()
        #: Counts and times since the start; written by the listening thread.
        self.tally = Tally()
        #: Where it listens, with the real port; after `start`.
        self.address = options.bind

    def start(self) -> None:
        """Bind, and listen from now on.

        Raises:
            BadConfig: the address is in use, or not this machine's.
        """
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.MAXMSGSIZE, self._welcome.sizes.max_request_bytes)
        self._router.setsockopt(zmq.RCVHWM, 16)
        self._router.setsockopt(zmq.SNDHWM, 64)
        self._router.setsockopt(zmq.IPV6, int("[" in self._options.bind))
        if self._keys is not None:
            self._authenticator = ThreadAuthenticator(self._context, log=log)
            self._authenticator.start()
            # A key is asked about for this domain only; without an entry for a domain nobody comes in.
            self._authenticator.configure_curve_callback(_ZAP_DOMAIN, _Doorman(self._keys, self.tally))
            self._router.setsockopt(zmq.CURVE_SERVER, 1)
            self._router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.own.secret)
            self._router.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.own.public)
            self._router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
        try:
            self._bind()
        except zmq.ZMQError as error:
            self.close()
            reason = "in use" if error.errno == zmq.EADDRINUSE else (error.strerror or "refused").lower()
            raise BadConfig(
                f"--bind {self._options.bind}: {reason}; valid: a free address of this machine, port * picks a port"
            ) from None
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_in, self._wake_out = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://planned")
        self._wake_out.connect("inproc://planned")
        self._thread = threading.Thread(target=self._listen, name="vla_spec server", daemon=True)
        self._thread.start()

    def _bind(self) -> None:
        if not self._options.bind.startswith("ipc://"):
            self._router.bind(self._options.bind)
            return
        if _is_served(self._options.bind):  # ZeroMQ would take the path away from its owner
            raise zmq.ZMQError(zmq.EADDRINUSE)
        mask = os.umask(0o177)  # this user's processes only, from the first moment on
        try:
            self._router.bind(self._options.bind)
        finally:
            os.umask(mask)

    def run(self) -> None:
        """Plan until `stop` is called. What a plan or the listening thread raises ends it, and is raised here."""
        try:
            while self._tokens.get() and not self._is_ending and self._error is None:
                job = self._turns.take(self._now_ns())
                if job is not None:  # its place may have been taken by a newer one, which had a token of its own
                    self._plan(job)
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Let `run` return as soon as the plan in hand is made. From any thread, or a signal handler."""
        self._is_ending = True
        self._tokens.put(False)

    def close(self) -> None:
        """Say goodbye and free everything. From the thread of `run`, or where it never ran."""
        self._is_stopping = True
        if self._thread is not None:
            self._wake()
            self._thread.join()
            self._thread = None
            self._wake_out.close(0)
        elif not self._context.closed and hasattr(self, "_router"):
            self._router.close(0)
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.term()

    # --- the planning thread ---

    def _plan(self, job: Job) -> None:
        session = self._sessions.get(job.client)
        if session is None:  # it left meanwhile
            self._turns.done()
            return
        start_ns = self._now_ns()
        chunk, record = _plan_with(session, session.seat.policy, job.ask, job.due_ns)
        self._took_ns.append(self._now_ns() - start_ns)
        self._planned.append(_Planned(job, chunk, record))
        self._turns.done()
        self._wake()

    def _wake(self) -> None:
        """Let the listening thread look; it may have ended, or not have looked yet."""
        with contextlib.suppress(zmq.Again):
            self._wake_out.send(b"", zmq.NOBLOCK)

    # --- the listening thread ---

    def _listen(self) -> None:
        with thread_privileges("listening", self._options.io_priority, ()):
            self._serve()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        try:
            while not self._is_stopping:
                ready = dict(poller.poll(self._timeout_ms()))
                if self._wake_in in ready:
                    _drain(self._wake_in)
                    self._send_planned()
                if self._router in ready:
                    for _ in range(_MESSAGES_PER_TURN):
                        if not self._receive():
                            break
                for job in self._turns.take_hopeless(self._now_ns(), self._least_ns):
                    self._answer_late(self._sessions[job.client], job)
                self._forget_silent()
                self._say()
            self._send_planned()
            for client in self._sessions:
                self._send(client, Bye())
        except BaseException as error:  # the planning thread raises it
            self._error = error
            self._tokens.put(True)
        finally:
            self._router.close()  # what was sent is delivered as far as LINGER says
            self._wake_in.close(0)

    def _timeout_ms(self) -> int:
        hopeless_ns = self._turns.next_hopeless_ns(self._least_ns)
        if hopeless_ns is None:
            return _IDLE_MS
        return min(_IDLE_MS, max(1, math.ceil((hopeless_ns - self._now_ns()) / NS_PER_MS)))

    def _receive(self) -> bool:
        """Handle one message; False = there is none."""
        try:
            client = self._router.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        now_ns = self._now_ns()
        frame, num_frames = None, 0
        while self._router.getsockopt(zmq.RCVMORE):  # parts beyond the first are dropped one by one
            part = self._router.recv(zmq.NOBLOCK, copy=False)
            frame, num_frames = part if num_frames == 0 else frame, num_frames + 1
        try:
            if frame is None or num_frames != 1:
                raise BadMessage(f"message of {num_frames} frames; valid: one")
            request = decode_request(frame.buffer, self._welcome.sizes)
        except BadMessage as error:
            self.tally.num_bad += 1
            if self.tally.num_bad <= 10 or self.tally.num_bad % 1000 == 0:  # whoever sends many shall not fill the disk
                log.warning("refused a message, number %d: %s", self.tally.num_bad, error)
            self._send(client, Refused(str(error), isinstance(error, WrongVersion)))
            return True
        session = self._sessions.get(client)
        if session is not None:
            session.heard_ns = now_ns
        if isinstance(request, Hello):
            self._greet(client, request, now_ns)
        elif session is None:
            self._send(client, Unknown())
        elif isinstance(request, Ping):
            self._send(client, Pong(request.sent_ns, self._turns.busy_ns(now_ns)))
        elif isinstance(request, Ask):
            self._ask(client, session, request, now_ns)
        else:
            self._forget(client, "left")
        return True

    def _greet(self, client: bytes, hello: Hello, now_ns: int) -> None:
        mismatch = _mismatch(hello, self._welcome)
        if mismatch:
            self._turn_away(client, hello, mismatch, is_final=True)
            return
        if client not in self._sessions:
            if not self._leave_behind(hello):
                return  # it is being planned for in its old place; it knocks again
            if not self._seats:
                names = ", ".join(repr(session.name) for session in self._sessions.values())
                full = f"all {self._num_seats} places are taken, by {names}; --max-clients N makes more"
                self._turn_away(client, hello, full, is_final=False)
                return
            self._sessions[client] = _Session(hello.client, hello.token, self._seats.pop(), now_ns)
            self.tally.num_clients += 1
            log.info("client %r came", hello.client)
        self._send(client, self._welcome)

    def _leave_behind(self, hello: Hello) -> bool:
        """If the client has a place from a connection that broke, free it. False = not now."""
        for old, session in list(self._sessions.items()):
            if hello.token and session.token == hello.token:
                return self._forget(old, "came by another connection")
        return True

    def _turn_away(self, client: bytes, hello: Hello, why: str, is_final: bool) -> None:
        """Refuse a client; it knocks ten times a second, and is worth one line."""
        if (hello.token, why) not in self._turned_away:
            if len(self._turned_away) >= _MOST_REMEMBERED:
                self._turned_away.clear()
            self._turned_away.add((hello.token, why))
            log.warning("refused client %r: %s", hello.client, why)
        self._send(client, Refused(why, is_final))

    def _ask(self, client: bytes, session: _Session, ask: Ask, now_ns: int) -> None:
        self.tally.num_asked += 1
        if ask.id <= session.newest_id:
            self._overtake(client, Job(client, ask, now_ns, now_ns), session.newest_id)
            return
        session.newest_id = ask.id
        job = Job(client, ask, now_ns, now_ns + ask.remaining_ns - ask.network_ns)
        does_wait, replaced = self._turns.offer(job, now_ns, self._typical_ns, self._least_ns)
        if replaced is not None:
            self._overtake(client, replaced, ask.id)
        if does_wait:
            self._tokens.put(True)
        else:
            self._answer_late(session, job)

    @property
    def _typical_ns(self) -> int:
        took_ns = list(self._took_ns)
        return int(median(took_ns)) if took_ns else self._least_ns

    def _overtake(self, client: bytes, job: Job, by: int) -> None:
        self.tally.num_overtaken += 1
        held_ns = self._now_ns() - job.received_ns
        self._send(client, Answer(job.ask.id, by, None, None, held_ns, held_ns))

    def _answer_late(self, session: _Session, job: Job) -> None:
        """The ladder's answer to what can't be in time: no forward is spent on it."""
        now_ns = self._now_ns()
        chunk, record = _plan_with(session, session.seat.late, job.ask, now_ns - 1)
        chunk, record = replace(chunk, deadline_ns=job.due_ns), record._replace(deadline_ns=job.due_ns)
        self.tally.num_at_once += 1
        self._answer(session, _Planned(job, chunk, record))

    def _send_planned(self) -> None:
        while self._planned:
            planned = self._planned.popleft()
            session = self._sessions.get(planned.job.client)
            if session is not None:
                self._answer(session, planned)

    def _answer(self, session: _Session, planned: _Planned) -> None:
        job, zero_ns = planned.job, planned.job.received_ns
        chunk = replace(
            planned.chunk,
            chunk_id=session.next_chunk_id,
            start_ns=planned.chunk.start_ns - zero_ns,
            ready_ns=planned.chunk.ready_ns - zero_ns,
            deadline_ns=planned.chunk.deadline_ns - zero_ns,
        )
        session.next_chunk_id += 1
        held_ns = self._now_ns() - zero_ns
        self.tally.add(planned.record, chunk.start_ns, held_ns, is_late=held_ns > job.due_ns - zero_ns)
        self._send(job.client, Answer(job.ask.id, None, chunk, planned.record, chunk.start_ns, held_ns))

    def _send(self, client: bytes, reply: Reply) -> None:
        """To a client, or to nobody if it is gone; never waits."""
        try:
            self._router.send_multipart((client, encode(reply)), zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            self.tally.num_undelivered += 1
            log.warning("an answer was not delivered: %s", error.strerror)

    def _forget_silent(self) -> None:
        least_ns = self._now_ns() - int(self._options.silent_after_ms * NS_PER_MS)
        for client in [client for client, session in self._sessions.items() if session.heard_ns < least_ns]:
            self._forget(client, f"was silent for {self._options.silent_after_ms:g} ms")

    def _forget(self, client: bytes, why: str) -> bool:
        """Give a client's place away. False = not now, it is being planned for."""
        session = self._sessions[client]
        if not self._turns.withdraw(client):
            session.heard_ns = _NEVER_NS  # as soon as its policy is no longer in use
            return False
        del self._sessions[client]
        self._seats.append(session.seat)
        log.info("client %r %s", session.name, why)
        return True

    def _say(self) -> None:
        now_ns = self._now_ns()
        if self._tell is None or now_ns - self._was_told_ns < 1_000_000_000:
            return
        line = self.tally.line((now_ns - self._was_told_ns) / 1e9, len(self._sessions))
        self._was_told_ns = now_ns
        if line:
            self._tell(line)


@final
class _Doorman:
    """Which clients' keys may come in; the authenticator's thread asks."""

    def __init__(self, keys: ServerKeys, tally: Tally) -> None:
        self._keys, self._tally = keys, tally

    def callback(self, domain: str, key: bytes) -> bool:
        """True = may come in."""
        name = self._keys.clients.get(key)
        if name is None:
            self._tally.num_refused_keys += 1
            log.warning("refused a client with the unknown key %s", key.decode(errors="replace"))
        return name is not None


def _plan_with(session: _Session, policy: Policy, ask: Ask, due_ns: int) -> tuple[ActionChunk, PlanRecord]:
    """One plan. Only one of a session's two policies is at work at a time: they share the ladder."""
    if ask.episode != session.episode:
        policy.reset()
        session.episode = ask.episode
    chunk = policy.plan(ask.observation, due_ns, ask.history)
    record = policy.last_record
    assert record is not None, "a plan was made and not recorded"
    return chunk, record


def _without_engine(policy: Policy, now_ns: NowNs) -> Policy:
    """A policy with the same ladder, only asked when it is too late, so that it never touches the engine."""
    of = policy.decoder
    drafter = none.NoDrafter()
    rng = np.random.default_rng(0)
    decoder = SpeculativeDecoder(of.engine, drafter, of.rule, of.controller, of.num_tokens, now_ns, rng)
    return Policy(policy.adapter, decoder, policy.space, now_ns, policy.ladder, Trace(1, 1), policy.options)


def _mismatch(hello: Hello, welcome: Welcome) -> str:
    """What does not fit, both sides named; empty = all does."""
    sizes = welcome.sizes
    for name, theirs, ours in (
        ("model", hello.model_hash, welcome.model_hash),
        ("images", hello.image_shape, sizes.image_shape),
        ("state size", hello.state_size, sizes.state_size),
        ("action size", hello.action_size, sizes.action_size),
    ):
        if theirs is not None and theirs != ours:
            return f"{name}: the client has {_listed(theirs)}, the server {_listed(ours)}"
    if hello.dt_s is not None and not math.isclose(hello.dt_s, welcome.dt_s, rel_tol=1e-3):
        return f"control period: the client has {1e3 * hello.dt_s:g} ms, the server {1e3 * welcome.dt_s:g} ms"
    return ""


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _drain(pair: zmq.Socket[bytes]) -> None:
    with contextlib.suppress(zmq.Again):
        while True:
            pair.recv(zmq.NOBLOCK)


def _is_served(address: str) -> bool:
    """Somebody listens at an ``ipc`` path."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return False
    return True
