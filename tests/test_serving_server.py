"""Server and client on real sockets: answers, turns, deadlines, strangers' messages, losses and returns.

Everything is waited for, with a timeout that only a fault reaches; nothing sleeps.
"""

import ast
import contextlib
import dataclasses
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_policy import A, H
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgpack", reason="needs the extra [serve]")
pytest.importorskip("zmq", reason="needs the extra [serve]")

import zmq
from fake_serving import (
    ANYWHERE,
    PATIENCE_S,
    SIZES,
    WELCOME,
    Gate,
    connected,
    gated_policy,
    observation,
    serving,
)

from vla_spec import serving as serving_package
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.ladder import Reason
from vla_spec.runtime import PlanRequest
from vla_spec.serving.client import ClientOptions, Link, PlannerGone
from vla_spec.serving.keys import ClientKeys, ServerKeys, make_keys, read_clients, read_pair, read_public
from vla_spec.serving.server import PlanServer, ServerOptions
from vla_spec.serving.wire import (
    Answer,
    Ask,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    Unknown,
    Welcome,
    decode_reply,
    encode,
)
from vla_spec.types import Provenance, Rung

MS = 1_000_000
FAR_NS = 3_600_000 * MS
GO = encode(Hello("stranger"))


def request(step=0, history=None, budget_ns=FAR_NS, **changes):
    return PlanRequest(observation(step, **changes), time.monotonic_ns() + budget_ns, history)


def chunk_of(planner, asked):
    """Submit, and wait for the chunk."""
    planner.submit(asked)
    assert planner.wait(PATIENCE_S), planner.trouble
    chunk = planner.poll(time.monotonic_ns())
    assert chunk is not None
    assert not planner.is_busy
    return chunk


@contextlib.contextmanager
def raw(address):
    """A bare socket, as any program on the network may have."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        socket.connect(address)
        yield socket


def reply(socket):
    return decode_reply(socket.recv(), SIZES)


def ask(number=0, step=0, remaining_ns=FAR_NS, network_ns=0, history=None, episode=0, **changes):
    return Ask(number, episode, remaining_ns, network_ns, observation(step, **changes), history)


@contextlib.contextmanager
def greeted(address):
    """A bare socket that said hello."""
    with raw(address) as socket:
        socket.send(GO)
        assert isinstance(reply(socket), Welcome)
        yield socket


HISTORY = ChunkHistory(np.arange(8, 40, dtype=np.int32), 3 * A)


# --- answers ---


@pytest.mark.parametrize("bind", [ANYWHERE, "ipc"])
def test_a_chunk_is_the_one_that_would_have_been_planned_here(tmp_path, bind):
    bind = f"ipc://{tmp_path}/planner" if bind == "ipc" else bind
    asked = [request(step, HISTORY if step % 2 else None) for step in (3, 4, 5)]
    here = gated_policy()
    with serving(bind=bind) as server, connected(server.address) as planner:
        assert planner.welcome == dataclasses.replace(WELCOME, space=planner.welcome.space)
        for each in asked:
            chunk, local = chunk_of(planner, each), here.plan(*each)
            for name in ("actions", "provenance", "tokens"):
                np.testing.assert_array_equal(getattr(chunk, name), getattr(local, name))
                assert getattr(chunk, name).dtype == getattr(local, name).dtype
            for name in ("rung", "chunk_id", "instruction", "observation_stamp_ns", "observation_step", "deadline_ns"):
                assert getattr(chunk, name) == getattr(local, name)
            record, timing = planner.records[-1], planner.timings[-1]
            assert (record.reason, record.num_tokens, len(record.rounds)) == (Reason.NONE, H * A, H * A)
            assert record.plan_ns == timing.round_trip_ns == timing.network_ns + timing.held_ns
            assert timing.held_ns >= timing.queue_ns + timing.plan_ns
        assert len(planner.timings) == server.tally.num_answered == 3


def test_times_in_an_answer_count_from_the_requests_arrival():
    """Deadline: what was left when it was sent, less what the network takes. No clock is compared with another's."""
    with serving() as server, greeted(server.address) as socket:
        socket.send(encode(ask(7, remaining_ns=500 * MS, network_ns=20 * MS)))
        answer = reply(socket)
        assert (answer.id, answer.overtaken_by, answer.chunk.deadline_ns) == (7, None, 480 * MS)
        assert 0 < answer.chunk.start_ns == answer.queue_ns < answer.chunk.ready_ns <= answer.held_ns


def test_a_new_episode_ends_the_old_ones_stop():
    nan = np.full(4, np.nan, np.float32)
    with serving() as server, connected(server.address) as planner:
        assert [chunk_of(planner, request(i, state=nan)).rung for i in range(4)] == [Rung.HOLD] * 3 + [Rung.STOP]
        assert chunk_of(planner, request(4)).rung is Rung.STOP  # one good plan is not enough
        planner.reset()
        assert chunk_of(planner, request(0)).rung is Rung.EXACT


def test_a_chunk_of_the_old_episode_does_not_reach_the_new_one():
    gate = Gate()
    with serving(gated_policy(gate)) as server, connected(server.address) as planner:
        planner.submit(request(50))
        gate.wait_for_arrival()
        planner.reset()
        assert not planner.is_busy
        planner.submit(request(0))
        gate.is_open.set()
        assert planner.wait(PATIENCE_S)
        assert planner.poll(time.monotonic_ns()).observation_step == 0


def test_an_engine_that_falls_over_is_a_rung():
    policy = gated_policy()
    policy.decoder.engine.error_at = 0
    with serving(policy) as server, connected(server.address) as planner:
        chunk = chunk_of(planner, request(history=HISTORY))
        assert (chunk.rung, planner.records[-1].reason) == (Rung.LAST_CHUNK, Reason.ENGINE_ERROR)
        policy.decoder.engine.error_at = None
        assert chunk_of(planner, request(1)).rung is Rung.EXACT


# --- turns ---


def test_a_newer_request_replaces_a_waiting_one_which_is_told():
    gate = Gate()
    with serving(gated_policy(gate)) as server, greeted(server.address) as socket:
        socket.send(encode(ask(1)))
        gate.wait_for_arrival()
        for number in (2, 3, 4):
            socket.send(encode(ask(number, number)))
        for number in (2, 3):
            told = reply(socket)
            assert (told.id, told.overtaken_by, told.chunk) == (number, number + 1, None)
        gate.is_open.set()
        assert [(a.id, a.chunk.observation_step) for a in (reply(socket), reply(socket))] == [(1, 0), (4, 4)]
        socket.send(encode(ask(3, 3)))  # out of order: older than what was asked last
        assert (reply(socket).overtaken_by, server.tally.num_overtaken) == (4, 3)


def test_the_client_gives_out_the_newest_chunk_only():
    gate = Gate()
    with serving(gated_policy(gate)) as server, connected(server.address) as planner:
        planner.submit(request(1))
        gate.wait_for_arrival()
        planner.submit(request(2))
        planner.submit(request(3))
        assert planner.is_busy
        gate.is_open.set()
        assert planner.wait(PATIENCE_S)
        assert planner.poll(time.monotonic_ns()).observation_step == 3
        assert planner.poll(time.monotonic_ns()) is None
        assert planner.num_overtaken in (1, 2)  # the first one's answer may have been there before the second was sent
        assert planner.num_lost == 0


def test_clients_take_turns_and_have_ladders_of_their_own():
    gate, nan = Gate(), np.full(4, np.nan, np.float32)
    policies = [gated_policy(gate), gated_policy(gate), gated_policy(gate)]
    with serving(*policies) as server, greeted(server.address) as a, greeted(server.address) as b:
        with connected(server.address) as third:
            third.submit(request(9))
            gate.wait_for_arrival()
            order = []
            for socket, number, state in ((a, 1, nan), (b, 1, None), (a, 2, nan)):  # a asks twice as often
                socket.send(encode(ask(number, state=state)))
                socket.send(encode(Ping(number)))
                while not isinstance(got := reply(socket), Pong):  # so that they come in this order
                    order.append(got)
            assert [(told.id, told.overtaken_by) for told in order] == [(1, 2)]
            gate.is_open.set()
            assert (reply(a).chunk.rung, reply(b).chunk.rung) == (Rung.HOLD, Rung.EXACT)
            assert third.wait(PATIENCE_S)
        queued = [record.start_ns for record in server.tally.records]
        assert queued == sorted(queued)


def test_a_full_server_says_so_and_lets_the_next_one_in_when_there_is_room():
    with serving() as server, contextlib.ExitStack() as stack:
        with connected(server.address, name="first"):
            second = stack.enter_context(connected(server.address, name="second", is_connected=False))
            with pytest.raises(PlannerGone, match=r"not there within 0.3 s \(all 1 places are taken, by 'first'"):
                second.connect(0.3)
        assert second.connect(PATIENCE_S).mode == "exact"


# --- deadlines ---


def test_what_is_late_already_is_answered_at_once_while_another_is_planned():
    """By the ladder, without a forward, and labelled."""
    gate = Gate()
    with serving(gated_policy(gate), gated_policy(gate)) as server:
        with greeted(server.address) as busy, greeted(server.address) as late:
            busy.send(encode(ask(1)))
            gate.wait_for_arrival()
            late.send(encode(ask(1, remaining_ns=5 * MS, network_ns=6 * MS, history=HISTORY)))
            answer = reply(late)
            assert (answer.chunk.rung, answer.record.reason) == (Rung.LAST_CHUNK, Reason.DEADLINE_PAST)
            assert (answer.chunk.provenance == Provenance.TAIL).all()
            assert len(answer.chunk.actions) == H - 3
            assert answer.chunk.deadline_ns == -1 * MS
            late.send(encode(ask(2, remaining_ns=-1)))
            assert reply(late).chunk.rung is Rung.HOLD  # and without a chunk before: stand still
            assert server.tally.num_at_once == 2
            assert not gate.arrived.acquire(blocking=False)  # no forward was spent
            gate.is_open.set()
            assert reply(busy).chunk.rung is Rung.EXACT


def test_what_becomes_late_while_it_waits_is_answered_when_that_is_clear():
    gate = Gate()
    with serving(gated_policy(gate), gated_policy(gate)) as server:
        with greeted(server.address) as busy, greeted(server.address) as late:
            busy.send(encode(ask(1, remaining_ns=30 * MS)))
            gate.wait_for_arrival()
            late.send(encode(ask(1, remaining_ns=120 * MS, history=HISTORY)))
            answer = reply(late)  # the gate is closed: nothing else can answer
            assert (answer.chunk.rung, answer.record.reason) == (Rung.LAST_CHUNK, Reason.DEADLINE_PAST)
            assert answer.held_ns >= 120 * MS
            gate.is_open.set()
            assert reply(busy).id == 1


def test_a_plan_is_cut_at_its_deadline_and_labelled():
    gate = Gate()
    with serving(gated_policy(gate)) as server, connected(server.address) as planner:
        planner.submit(request(history=HISTORY, budget_ns=20 * MS))
        gate.wait_for_arrival()
        deadline_ns = time.monotonic_ns() + 25 * MS
        while time.monotonic_ns() < deadline_ns:
            planner.poll(time.monotonic_ns())
        gate.is_open.set()
        assert planner.wait(PATIENCE_S)
        chunk = planner.poll(time.monotonic_ns())
        assert chunk.is_late
        assert chunk.rung >= Rung.DRAFT_TAIL
        assert server.tally.num_late == 1


# --- strangers ---

STRANGE = [
    b"", b"hello", b"\x00" * 100, b"\xc1", encode(ask())[:-7], encode(ask()) + b"x", b"\x91" * 200,
    encode(WELCOME), encode(ask()).replace(b"|u1", b"|O8"), encode(Bye()).replace(b"bye", b"end"),
]  # fmt: skip


@pytest.mark.parametrize("frame", STRANGE, ids=range(len(STRANGE)))
def test_what_makes_no_sense_is_refused_and_the_next_request_is_served(frame):
    with serving() as server, greeted(server.address) as socket:
        socket.send(frame)
        refused = reply(socket)
        assert isinstance(refused, Refused)
        assert not refused.is_final
        socket.send(encode(ask(1)))
        assert reply(socket).chunk.rung is Rung.EXACT
        assert server.tally.num_bad == 1


@settings(max_examples=40)
@given(st.data())
def test_fuzzed_messages_leave_the_server_as_it_was(one_server, data):
    _, socket, number = one_server
    valid = data.draw(st.sampled_from([encode(ask(0)), encode(ask(0, history=HISTORY)), encode(Ping(1, 50))]))
    at = data.draw(st.integers(0, len(valid) - 1))
    frame = data.draw(
        st.one_of(
            st.binary(max_size=300),
            st.just(valid[:at]),
            st.integers(1, 255).map(lambda bits: valid[:at] + bytes([valid[at] ^ bits]) + valid[at + 1 :]),
            st.binary(min_size=1, max_size=20).map(lambda extra: valid[:at] + extra + valid[at:]),
        )
    )
    socket.send_multipart([frame, *data.draw(st.lists(st.binary(max_size=9), max_size=2))])
    number[0] += 1
    socket.send(encode(Ping(number[0])))
    for _ in range(3):  # at most one reply to the fuzzed one, late or not, then the pong
        got = reply(socket)
        if got == Pong(number[0], got.busy_ns if isinstance(got, Pong) else 0):
            break
    else:
        raise AssertionError("no pong")


@pytest.fixture(scope="module")
def one_server():
    with serving(silent_after_ms=1e9) as server, greeted(server.address) as socket:
        yield server, socket, [1000]
        for _ in range(100):  # what fuzzed requests were answered with
            socket.send(encode(ask(2**62, 5)))
            if isinstance(got := reply(socket), Answer) and got.id == 2**62 and got.chunk is not None:
                break
        assert got.chunk.rung is Rung.EXACT


def test_an_oversized_message_costs_its_sender_the_connection_and_nobody_else():
    with serving(gated_policy(), gated_policy()) as server, connected(server.address) as planner:
        with greeted(server.address) as socket, socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            socket.send(bytes(SIZES.max_request_bytes + 1))
            assert monitor.poll(PATIENCE_S * 1000), "the server took it"
            socket.disable_monitor()
        assert chunk_of(planner, request()).rung is Rung.EXACT
        with raw(server.address) as socket:
            socket.send(GO)  # and whoever comes next, or again, is welcome
            assert isinstance(reply(socket), Welcome | Refused)


def test_another_version_is_refused_by_name_on_both_sides():
    with serving() as server, raw(server.address) as socket:
        socket.send(GO.replace(b"\xa3vla\x01", b"\xa3vla\x02"))
        refused = reply(socket)
        assert refused.is_final
        assert "protocol version 2; valid: 1" in refused.message
    with stranger() as (address, socket), connected(address, is_connected=False) as planner:
        client, _ = socket.recv_multipart()
        socket.send_multipart([client, encode(Unknown()).replace(b"\xa3vla\x01", b"\xa3vla\x03")])
        with pytest.raises(PlannerGone, match=r"speaks another protocol version 3; valid: 1"):
            planner.connect(PATIENCE_S)


@contextlib.contextmanager
def stranger():
    """A bare server's socket: address, socket."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        socket.bind(ANYWHERE)
        yield socket.getsockopt_string(zmq.LAST_ENDPOINT), socket


def test_a_client_survives_a_server_that_talks_nonsense():
    with stranger() as (address, socket), connected(address, is_connected=False, gone_after_ms=60_000) as planner:
        client, _ = socket.recv_multipart()
        neither = encode(Answer(0, None, None, None, 0, 0))
        for frame in (b"", b"\xc1" * 50, neither, encode(WELCOME)[:-5], encode(Hello())):
            socket.send_multipart([client, frame])
        socket.send_multipart([client, b"two", b"frames"])
        socket.send_multipart([client, encode(WELCOME)])
        while b"ping" not in (frame := socket.recv_multipart()[1]):
            pass
        assert len(frame) > 3 * 16 * 16 * 3  # as long as a request
        socket.send_multipart([client, encode(Pong(0, 0))])
        planner.connect(PATIENCE_S)
        assert planner.num_bad == 6


def test_who_did_not_say_hello_is_asked_who_it_is():
    with serving() as server, raw(server.address) as socket:
        for message in (ask(), Ping(5)):
            socket.send(encode(message))
            assert reply(socket) == Unknown()
        socket.send(encode(Bye()))
        socket.send(GO)
        socket.send(GO)  # twice: no second place is taken
        assert isinstance(reply(socket), Unknown)
        assert isinstance(reply(socket), Welcome)
        assert isinstance(reply(socket), Welcome)
        assert server.tally.num_clients == 1


# --- what has to fit ---


@pytest.mark.parametrize(("hello", "words"), [
    (Hello(model_hash="cd"), f"model: the client has cd, the server {'ab' * 32}"),
    (Hello(image_shape=(2, 224, 224, 3)), r"images: the client has \[2, 224, 224, 3\], the server \[3, 16, 16, 3\]"),
    (Hello(state_size=7), "state size: the client has 7, the server 4"),
    (Hello(action_size=7), "action size: the client has 7, the server 4"),
    (Hello(dt_s=0.02), "control period: the client has 20 ms, the server 12.5 ms"),
])  # fmt: skip
def test_what_does_not_fit_is_said_with_both_sides(hello, words):
    with serving() as server, connected(server.address, hello=hello, is_connected=False) as planner:
        with pytest.raises(PlannerGone, match=words):
            planner.connect(PATIENCE_S)
        assert planner.link is Link.REFUSED
        assert planner.poll(time.monotonic_ns()) is None


def test_an_observation_that_does_not_fit_is_no_plan_and_no_exception():
    with serving() as server, connected(server.address) as planner:
        for wrong in (
            observation(image=np.zeros((3, 8, 8, 3), np.uint8)), observation(state=np.zeros(5, np.float32)),
            observation(instruction="x" * 2000), observation(instruction="\ud800"), observation(step=-1),
        ):  # fmt: skip
            planner.submit(PlanRequest(wrong, time.monotonic_ns() + FAR_NS, None))
            assert not planner.wait(PATIENCE_S)
            assert planner.poll(time.monotonic_ns()) is None
            assert not planner.is_busy
        planner.submit(request(history=ChunkHistory(np.array([999], np.int32), 0)))  # the server says no
        assert not planner.wait(PATIENCE_S)
        assert (planner.num_unsent, planner.num_lost) == (5, 6)
        assert "outside the domain" in planner.trouble
        assert chunk_of(planner, request()).rung is Rung.EXACT


# --- lost and found ---


def test_without_a_server_nothing_blocks_and_connecting_says_why():
    with connected("tcp://127.0.0.1:9", is_connected=False) as planner:
        assert planner.is_busy  # so the actor asks for nothing
        planner.submit(request())
        assert planner.poll(time.monotonic_ns()) is None
        assert planner.is_busy
        with pytest.raises(PlannerGone, match=r"tcp://127.0.0.1:9: not there within 0.2 s .*vla-spec serve"):
            planner.connect(0.2)


@pytest.mark.parametrize("bind", ["tcp", "ipc"])
def test_a_server_that_comes_back_is_found_again_by_the_same_client(tmp_path, bind):
    bind = ANYWHERE if bind == "tcp" else f"ipc://{tmp_path}/planner"
    gate = Gate()
    with contextlib.ExitStack() as stack:
        with serving(gated_policy(gate), bind=bind) as server:
            planner = stack.enter_context(connected(server.address, gone_after_ms=60_000))
            address = server.address
            planner.submit(request(1))
            gate.wait_for_arrival()
            gate.is_open.set()
        # It said goodbye, with the answer before it or without.
        assert planner.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
        planner.poll(time.monotonic_ns())
        assert planner.is_busy
        with serving(gated_policy(offset=1), bind=address):
            assert planner.wait_for(Link.READY, PATIENCE_S) is Link.READY
            planner.poll(time.monotonic_ns())
            chunk = chunk_of(planner, request(2))
            assert (chunk.observation_step, chunk.tokens[0]) == (2, 101)
            assert planner.num_gone == 1


@contextlib.contextmanager
def stranger_that_welcomed(**options):
    """A bare server's socket that said welcome: client's address, socket, planner."""
    with stranger() as (address, socket), connected(address, is_connected=False, **options) as planner:
        client, _ = socket.recv_multipart()
        socket.send_multipart([client, encode(WELCOME)])
        while b"ping" not in socket.recv_multipart()[1]:
            pass
        socket.send_multipart([client, encode(Pong(time.monotonic_ns(), 0))])
        planner.connect(PATIENCE_S)
        yield client, socket, planner


def pong(socket, client, busy_ns):
    """Answer the next ping."""
    while b"ping" not in (frame := socket.recv_multipart()[1]):
        assert b"hello" not in frame, "it was taken for gone"
    socket.send_multipart([client, encode(Pong(0, busy_ns))])


def test_a_server_that_lives_and_forgot_a_request_does_not_keep_the_actor_waiting():
    """A server that is busy is waited for; one that has nothing to do has lost the request, or its answer."""
    with stranger_that_welcomed(gone_after_ms=700, heartbeat_ms=5) as (client, socket, planner):
        planner.submit(request(budget_ns=1))
        for _ in range(20):
            pong(socket, client, busy_ns=1)
            assert planner.num_lost == 0
        while planner.num_lost == 0:
            pong(socket, client, busy_ns=0)
        assert not planner.wait(PATIENCE_S)
        assert planner.link is Link.READY
        assert (planner.num_lost, planner.num_gone) == (1, 0)


def test_a_server_that_falls_silent_is_gone_and_its_observation_is_lost():
    with stranger_that_welcomed(gone_after_ms=50) as (_, _, planner):
        planner.submit(request())
        assert not planner.wait(PATIENCE_S)  # ended by the loss, not by patience
        assert planner.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
        assert planner.loss == "no sign of life for 50 ms"
        assert (planner.num_gone, planner.num_lost) == (1, 1)
        assert planner.poll(time.monotonic_ns()) is None
        assert planner.is_busy


def test_a_server_with_another_model_is_not_taken_for_the_old_one():
    with contextlib.ExitStack() as stack:
        with serving() as server:
            planner = stack.enter_context(connected(server.address))
        assert planner.wait_for(Link.PLANNER_GONE, PATIENCE_S) is Link.PLANNER_GONE
        with serving(bind=server.address, welcome=dataclasses.replace(WELCOME, model_hash="cd")):
            assert planner.wait_for(Link.REFUSED, PATIENCE_S) is Link.REFUSED
            assert planner.trouble == f"model: the client has {'ab' * 32}, the server cd"


def test_a_silent_client_loses_its_place_and_a_living_one_comes_back_by_itself():
    with serving(gated_policy(), silent_after_ms=100) as server, greeted(server.address):
        with connected(server.address, heartbeat_ms=10_000, gone_after_ms=60_000) as planner:  # when the other is out
            assert planner.link is Link.READY
            with greeted_when_free(server.address) as socket:  # it was silent, too
                socket.send(encode(Bye()))
                planner.submit(request())  # and is told so when it speaks
                assert not planner.wait(PATIENCE_S)
                assert planner.wait_for(Link.READY, PATIENCE_S) is Link.READY
                assert chunk_of(planner, request()).rung is Rung.EXACT


@contextlib.contextmanager
def greeted_when_free(address):
    with raw(address) as socket:
        deadline_ns = time.monotonic_ns() + int(PATIENCE_S * 1e9)
        while time.monotonic_ns() < deadline_ns:
            socket.send(GO)
            if isinstance(reply(socket), Welcome):
                yield socket
                return
        raise AssertionError("no place became free")


def test_a_client_whose_connection_broke_gets_its_own_place_back():
    """Also if the server has not noticed, as with a pulled cable; and not while the place is in use."""
    gate, hello = Gate(), encode(Hello("robot", b"secret"))
    with serving(gated_policy(gate), silent_after_ms=1e9) as server, raw(server.address) as old:
        old.send(hello)
        assert isinstance(reply(old), Welcome)
        with raw(server.address) as new:
            new.send(encode(Hello("another", b"other")))
            assert "all 1 places" in reply(new).message
            old.send(encode(ask(1)))
            gate.wait_for_arrival()
            new.send(hello)  # not answered: what would be its policy plans
            new.send(encode(Ping(1)))
            assert reply(new) == Unknown()
            gate.is_open.set()
            while isinstance(got := knock(new, hello), Unknown):
                pass
            assert isinstance(got, Welcome)
            new.send(encode(ask(2)))
            assert reply(new).chunk.rung is Rung.EXACT
            old.send(encode(Ping(9)))
            while not isinstance(reply(old), Unknown):  # it may have had its answer before
                pass


def knock(socket, hello):
    """Say hello, and hear the answer to that or to what follows."""
    socket.send(hello)
    socket.send(encode(Ping(2)))
    got = reply(socket)
    if isinstance(got, Welcome):
        assert isinstance(reply(socket), Pong)
    return got


def test_a_fault_in_the_server_ends_it_and_is_raised():
    server = PlanServer(WELCOME, [gated_policy()], ServerOptions(ANYWHERE), None, time.monotonic_ns)
    server.start()
    with greeted(server.address) as socket:
        server.tally.add = None
        socket.send(encode(ask()))
        with pytest.raises(TypeError):
            server.run()


def test_threads_that_carry_messages_may_have_a_priority_and_do_without():
    """What is granted depends on the machine; asking must never end a process, and what came of it is told."""
    with serving(io_priority=2) as server, connected(server.address, io_priority=1) as planner:
        assert chunk_of(planner, request()).rung is Rung.EXACT
        for grants, asked in ((server.grants, "priority 2"), (planner.grants, "priority 1")):
            assert [(grant.what, grant.asked) for grant in grants] == [("SCHED_FIFO", asked)]
            assert grants[0].is_granted or grants[0].reason
    with serving() as server, connected(server.address) as planner:
        assert (server.grants, planner.grants) == ((), ())


# --- where to listen ---


def test_an_address_in_use_is_said(tmp_path):
    with serving() as server, pytest.raises(BadConfig, match=rf"--bind {server.address}: in use"):
        with serving(bind=server.address):
            pass
    path = f"ipc://{tmp_path}/planner"
    with serving(bind=path) as server:
        with pytest.raises(BadConfig, match="in use"), serving(bind=path):
            pass
        with connected(path) as planner:
            assert chunk_of(planner, request()).rung is Rung.EXACT
        if sys.platform != "win32":
            assert (tmp_path / "planner").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("options", "words"), [
    ({"bind": "tcp://0.0.0.0:5555"}, "other machines can reach it"),
    ({"bind": "tcp://*:5555"}, "other machines can reach it"),
    ({"bind": "tcp://robot.local:5555"}, "other machines can reach it"),
    ({"bind": "tcp://[::]:5555"}, "other machines can reach it"),
    ({"bind": "inproc://x"}, "valid: tcp://HOST:PORT"),
    ({"bind": "127.0.0.1:5555"}, "valid: tcp://HOST:PORT"),
    ({"bind": "tcp://127.0.0.1"}, "port"),
    ({"bind": "tcp://127.0.0.1:99999"}, "port"),
    ({"silent_after_ms": 0}, "silent_after_ms"),
    ({"io_priority": 100}, "io_priority is 100; valid: 1..99"),
])  # fmt: skip
def test_where_not_to_listen(options, words):
    with pytest.raises(BadConfig, match=words):
        ServerOptions(**options)


def test_an_open_port_wants_keys_or_that_it_is_meant():
    for bind in ("tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://localhost:1", "ipc:///x"):
        ServerOptions(bind).check_keys(None)
    with pytest.raises(BadConfig, match="open to other machines without keys"):
        ServerOptions("tcp://0.0.0.0:1", is_public=True).check_keys(None)
    ServerOptions("tcp://0.0.0.0:1", is_public=True, is_insecure=True).check_keys(None)


@pytest.mark.parametrize("options", [
    {"connect": "127.0.0.1:5"}, {"connect": "http://x"}, {"connect": "tcp://x:1", "gone_after_ms": 0},
    {"connect": "tcp://x:1", "io_priority": -1},
])  # fmt: skip
def test_where_not_to_connect(options):
    with pytest.raises(BadConfig, match="valid"):
        ClientOptions(**options)


def test_an_address_that_can_not_be_connected_to_is_said():
    with connected("tcp://no port", is_connected=False) as planner, pytest.raises(PlannerGone, match="not an address"):
        planner.connect(PATIENCE_S)


# --- keys ---


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Server's keys and two clients': one that may come, one that may not."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("server", "clients/robot", "stranger"):
        path = folder / name
        make_keys(path.parent, path.name)
    server = ServerKeys(read_pair(folder / "server.key_secret"), read_clients(folder / "clients"))
    public = read_public(folder / "server.key")
    known = ClientKeys(read_pair(folder / "clients/robot.key_secret"), public)
    return server, known, ClientKeys(read_pair(folder / "stranger.key_secret"), public)


def test_with_the_right_keys_it_works(keys):
    server_keys, known, _ = keys
    with serving(keys=server_keys) as server, connected(server.address, keys=known) as planner:
        assert chunk_of(planner, request(5, HISTORY)).rung is Rung.EXACT


def test_an_unknown_key_is_told_to_both_sides(keys, caplog):
    server_keys, known, unknown = keys
    with caplog.at_level(logging.WARNING), serving(keys=server_keys) as server:
        with connected(server.address, keys=unknown, is_connected=False) as planner:
            with pytest.raises(PlannerGone, match=r"not there within 1 s \(.*key"):
                planner.connect(1)
        assert server.tally.num_refused_keys >= 1
        assert f"unknown key {unknown.own.public.decode()}" in caplog.text
        with connected(server.address, keys=known) as planner:  # and others are served
            assert chunk_of(planner, request()).rung is Rung.EXACT


def test_the_wrong_servers_key_and_no_key_lead_nowhere(keys):
    server_keys, known, unknown = keys
    with serving(keys=server_keys) as server:
        for wrong in (known._replace(server=unknown.own.public), None):
            with connected(server.address, keys=wrong, is_connected=False) as planner:
                with pytest.raises(PlannerGone, match=r"not there within 0.5 s"):
                    planner.connect(0.5)
                assert planner.link is Link.CONNECTING
        assert server.tally.num_clients == 0
    with serving() as server, connected(server.address, keys=known, is_connected=False) as planner:
        with pytest.raises(PlannerGone, match="not there"):
            planner.connect(0.5)


# --- data only ---


PICKLED = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."


def test_nothing_is_ever_unpickled():
    """An audit hook hears of every unpickling in this process, whoever does it."""
    heard, is_listening = [], True

    def hook(event, arguments):
        if is_listening and event in ("pickle.find_class", "marshal.loads"):
            heard.append((event, arguments))

    with serving(gated_policy(), gated_policy()) as server:
        with greeted(server.address) as socket, connected(server.address) as planner:
            chunk_of(planner, request())  # what is imported late is imported now
            sys.addaudithook(hook)
            for frame in (*STRANGE, PICKLED):
                socket.send(frame)
                assert isinstance(reply(socket), Refused)
            chunk_of(planner, request(1, HISTORY))
    is_listening = False
    assert heard == []


def test_no_module_of_the_package_knows_a_format_that_runs_code():
    forbidden = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
    names = {"eval", "exec", "__import__", "recv_pyobj", "send_pyobj", "load_module"}
    files = list(Path(serving_package.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, file
            elif isinstance(node, ast.Name | ast.Attribute):
                called = node.attr if isinstance(node, ast.Attribute) else node.id
                assert called not in names, f"{file}: {called}"


def test_a_plan_that_takes_long_is_no_dead_server():
    gate = Gate()
    with serving(gated_policy(gate)) as server:
        with connected(server.address, heartbeat_ms=20, gone_after_ms=PATIENCE_S * 1000) as planner:
            planner.submit(request())
            gate.wait_for_arrival()
            with raw(server.address) as socket:
                socket.send(GO)
                assert isinstance(reply(socket), Refused)  # it is full, and listens
            assert planner.link is Link.READY
            gate.is_open.set()
            assert planner.wait(PATIENCE_S)
