"""Whose observation is next, and what the network takes: exact, without sockets."""

import numpy as np
import pytest

pytest.importorskip("msgpack", reason="needs the extra [serve]")

from vla_spec.errors import BadConfig
from vla_spec.serving.network_time import NetworkTime
from vla_spec.serving.turns import Job, Turns
from vla_spec.serving.wire import Ask
from vla_spec.types import Observation

MS = 1_000_000
SEEN = Observation(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1, np.float32), "go", 0, 0)


def job(client, number, due_ms=1000, received_ms=0):
    return Job(client, Ask(number, 0, 0, 0, SEEN, None), received_ms * MS, due_ms * MS)


def offer(turns, *jobs, now_ms=0, plan_ms=20, least_ms=5):
    return [turns.offer(each, now_ms * MS, plan_ms * MS, least_ms * MS) for each in jobs]


def order(turns):
    taken = []
    while (next_ := turns.take(0)) is not None:
        taken.append((next_.client, next_.ask.id))
    return taken


def test_clients_take_turns_in_the_order_in_which_they_came():
    turns = Turns()
    assert offer(turns, job(b"a", 1), job(b"b", 1), job(b"c", 1)) == [(True, None)] * 3
    assert turns.take(0) == job(b"a", 1)
    offer(turns, job(b"a", 2))  # whoever was served stands at the end
    assert order(turns) == [(b"b", 1), (b"c", 1), (b"a", 2)]


def test_a_newer_request_takes_its_clients_place_and_no_better_one():
    turns = Turns()
    offer(turns, job(b"a", 1), job(b"b", 1))
    assert offer(turns, job(b"b", 2), job(b"b", 3)) == [(True, job(b"b", 1)), (True, job(b"b", 2))]
    assert offer(turns, job(b"a", 2)) == [(True, job(b"a", 1))]
    assert order(turns) == [(b"a", 2), (b"b", 3)]


def test_what_can_not_be_in_time_does_not_wait():
    turns = Turns()
    assert offer(turns, job(b"a", 1, due_ms=5)) == [(True, None)]  # nobody is before it: 5 ms are just enough
    assert offer(turns, job(b"b", 1, due_ms=24), job(b"c", 1, due_ms=25)) == [(False, None), (True, None)]
    turns.take(0)
    # a has run for 5 of 20 ms, but is cut when it is due, at 5 ms; then comes c.
    assert offer(turns, job(b"b", 2, due_ms=29), job(b"d", 1, due_ms=30), now_ms=5) == [(False, None), (True, None)]


def test_a_request_that_does_not_wait_takes_the_older_one_out_too():
    turns = Turns()
    offer(turns, job(b"a", 1))
    assert offer(turns, job(b"a", 2, due_ms=4)) == [(False, job(b"a", 1))]
    assert turns.take(0) is None


def test_a_client_that_is_planned_for_waits_in_any_case():
    """What would answer it at once, its ladder, is in use."""
    turns = Turns()
    offer(turns, job(b"a", 1))
    turns.take(0)
    assert offer(turns, job(b"a", 2, due_ms=-50)) == [(True, None)]
    assert turns.take_hopeless(0, 0) == []
    assert turns.next_hopeless_ns(0) is None
    turns.done()
    assert turns.next_hopeless_ns(5 * MS) == -55 * MS
    assert turns.take_hopeless(0, 0) == [job(b"a", 2, due_ms=-50)]
    assert turns.take(0) is None


def test_waiting_becomes_hopeless_when_a_plan_no_longer_fits():
    turns = Turns()
    offer(turns, job(b"a", 1, due_ms=100), job(b"b", 1, due_ms=60))
    assert turns.next_hopeless_ns(5 * MS) == 55 * MS
    assert turns.take_hopeless(55 * MS, 5 * MS) == []
    assert turns.take_hopeless(55 * MS + 1, 5 * MS) == [job(b"b", 1, due_ms=60)]
    assert order(turns) == [(b"a", 1)]


def test_who_leaves_is_out_unless_it_is_being_planned_for():
    turns = Turns()
    offer(turns, job(b"a", 1), job(b"b", 1))
    turns.take(7)
    assert not turns.withdraw(b"a")
    assert turns.withdraw(b"b")
    assert turns.withdraw(b"nobody")
    assert turns.busy_ns(19) == 12
    turns.done()
    assert turns.busy_ns(20) == 0
    assert turns.withdraw(b"a")
    assert turns.take(0) is None


def test_network_time_is_what_the_server_did_not_hold():
    network = NetworkTime(quantile=0.9, window=10)
    assert network.expected_ns == 0
    assert network.record(round_trip_ns=50, held_ns=47) == 3
    assert network.record(round_trip_ns=50, held_ns=60) == 0  # clocks of two hosts tick a little differently
    assert network.expected_ns == 3
    for trip in range(1, 11):
        network.record(trip, 0)
    assert network.expected_ns == 9
    for _ in range(10):
        network.record(2, 0)
    assert network.expected_ns == 2  # a slow moment is forgotten
    network.forget()
    assert network.expected_ns == 0


@pytest.mark.parametrize("arguments", [{"quantile": 1.1}, {"window": 0}])
def test_network_time_refuses_what_makes_no_sense(arguments):
    with pytest.raises(BadConfig, match="network time"):
        NetworkTime(**arguments)
