"""Privileges, quiet garbage collection, usage and cadence. No test needs a privilege or asserts wall-clock time."""

import errno
import gc
import os
import sys

import numpy as np
import pytest

from vla_spec import realtime
from vla_spec.clock import VirtualClock
from vla_spec.config import as_tree, resolve
from vla_spec.errors import BadConfig, UnknownOption
from vla_spec.realtime import (
    Grant,
    QuietInterpreter,
    RealtimeOptions,
    RealtimeRecord,
    UsageLog,
    ask,
    cadence,
    locked_memory,
    report,
    thread_privileges,
    usage_summary,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's calls to replace them")
MS = 1_000_000


# --- asked, and granted or not ---


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def test_a_refusal_is_a_grant_with_its_reason():
    assert ask("actor", "x", "1", lambda: None) == Grant("actor", "x", "1", True)
    assert ask("actor", "x", "1", refuse(errno.EPERM)).reason == f"EPERM: {os.strerror(errno.EPERM)}"
    assert "no such call" in ask("actor", "x", "1", lambda: os.no_such_call()).reason
    assert ask("actor", "x", "1", lambda: int("a")).is_granted is False
    with pytest.raises(ZeroDivisionError):  # a fault of ours is no refusal
        ask("actor", "x", "1", lambda: 1 / 0)


@pytest.fixture
def calls(monkeypatch):
    """The system's calls, recorded instead of made."""
    made = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, param: made.append(
        ("scheduler", pid, policy, param.sched_priority)))  # fmt: skip
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: made.append(("cores", pid, tuple(cpus))))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_OTHER)

    def libc(name, *arguments):
        made.append((name, *arguments))
        return 50_000 if arguments[:1] == (30,) else 0

    monkeypatch.setattr(realtime, "_libc_call", libc)
    return made


@on_linux
def test_a_thread_gets_what_it_asks_for_and_gives_it_back(calls):
    with thread_privileges("actor", 50, (1,)) as grants:
        assert [(g.what, g.asked, g.is_granted) for g in grants] == [
            ("cores", "1", True), ("SCHED_FIFO", "priority 50", True), ("timer slack", "1 ns", True),
        ]  # fmt: skip
        held = len(calls)
    fifo = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK  # children must not inherit it
    assert calls[:held] == [("cores", 0, (1,)), ("scheduler", 0, fifo, 50), ("prctl", 30, 0, 0, 0, 0),
                            ("prctl", 29, 1, 0, 0, 0)]  # fmt: skip
    assert calls[held:] == [
        ("prctl", 29, 50_000, 0, 0, 0),
        ("scheduler", 0, os.SCHED_OTHER, 0),
        ("cores", 0, (0, 1, 2)),
    ]


@on_linux
def test_what_is_refused_is_reported_and_nothing_else_suffers(calls, monkeypatch):
    monkeypatch.setattr(os, "sched_setscheduler", refuse(errno.EPERM))
    monkeypatch.setattr(os, "sched_setaffinity", refuse(errno.EINVAL))
    with thread_privileges("planner", 40, (7,)) as grants:
        pass
    assert [(g.what, g.is_granted) for g in grants] == [("cores", False), ("SCHED_FIFO", False), ("timer slack", True)]
    assert grants[0].reason.startswith("EINVAL")
    assert grants[1].reason.startswith("EPERM")
    assert calls[-1] == ("prctl", 29, 50_000, 0, 0, 0)  # only what was granted is taken back


@on_linux
def test_nothing_is_asked_that_was_not_wanted(calls):
    with thread_privileges("actor", 0, ()) as grants:
        assert [g.what for g in grants] == ["timer slack"]
    with locked_memory("actor", False) as none:
        assert none == ()
    assert all(call[0] == "prctl" for call in calls)


@on_linux
def test_locked_memory_is_unlocked_and_a_refusal_is_not(calls, monkeypatch):
    with locked_memory("actor", True) as (grant,):
        assert grant.is_granted
        assert calls == [("mlockall", 3)]
    assert calls[1:] == [("munlockall",)]
    monkeypatch.setattr(realtime, "_libc_call", refuse(errno.ENOMEM))
    with locked_memory("actor", True) as (grant,):
        assert (grant.is_granted, grant.reason[:6]) == (False, "ENOMEM")


@on_linux
def test_the_real_calls_exist_and_answer():
    """Granted or not depends on the machine; that there is an answer does not, nor that all is as before."""
    before = os.sched_getscheduler(0), os.sched_getaffinity(0)
    with thread_privileges("actor", 1, tuple(before[1])) as grants, locked_memory("actor", False):
        assert all(g.is_granted or g.reason for g in grants)
        assert grants[0].is_granted
    assert (os.sched_getscheduler(0), os.sched_getaffinity(0)) == before


# --- garbage collection ---


def test_garbage_is_collected_in_slack_only(monkeypatch):
    clock, collected = VirtualClock(), []
    took = {0: 100_000, 1: 900_000, 2: 5 * MS}

    def collect(generation=2):
        collected.append(generation)
        clock.advance(took[generation])

    was_enabled = gc.isenabled()
    with QuietInterpreter(clock.now_ns) as quiet:
        monkeypatch.setattr(gc, "collect", collect)
        assert not gc.isenabled()
        quiet.collect_in(1 * MS)  # less than three times what a collection is taken to last before it was measured
        quiet.collect_in(-5)
        assert collected == []
        for _ in range(13):
            quiet.collect_in(2 * MS)
        assert collected == [0] * 13  # the 16th call is an older generation's
        collected.clear()
        for _ in range(33):
            quiet.collect_in(2 * MS)
        assert collected.count(1) == 1  # 0.9 ms once; from then on 2 ms are too short for that
        assert quiet.num_collections == 13 + len(collected)
        assert quiet.longest_ns == 900_000
    assert gc.isenabled() == was_enabled


def test_what_is_frozen_is_thawed_again():
    clock = VirtualClock()
    before = gc.get_freeze_count()
    with QuietInterpreter(clock.now_ns) as quiet:
        grant = quiet.freeze("actor")
        assert grant.is_granted
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() <= before


# --- page faults and context switches ---


def test_usage_is_counted_per_tick(monkeypatch):
    numbers = iter([(100, 1, 10, 0), (103, 1, 11, 0), (103, 2, 12, 1), (110, 2, 13, 1), (111, 2, 14, 1)])
    monkeypatch.setattr(realtime, "_usage", lambda: next(numbers))
    log = UsageLog(3)
    log.begin()
    for _ in range(4):
        log.tick()
    # The fourth tick has no row of its own.
    assert log.rows.tolist() == [[3, 0, 1, 0], [0, 1, 1, 1], [8, 0, 2, 0]]
    summary = usage_summary([log.rows])
    assert summary["minor_faults"] == {"total": 11, "ticks_with_any": 2, "p99": pytest.approx(7.9), "max": 8}
    assert summary["involuntary_switches"]["total"] == 1


def test_a_system_that_does_not_say_gives_no_rows(monkeypatch):
    monkeypatch.setattr(realtime, "_usage", lambda: None)
    log = UsageLog(3)
    log.begin()
    log.tick()
    assert log.rows.shape == (0, 4)
    assert usage_summary([log.rows]) == {}


@on_linux
def test_the_real_counters_count():
    log = UsageLog(1)
    log.begin()
    np.ones(64 << 20, np.uint8).sum()  # pages that nobody touched before
    log.tick()
    assert log.rows[0, 0] > 0


# --- cadence and the report ---


def test_jitter_is_the_error_of_a_period_and_never_spans_episodes():
    late = [np.array([0, 2000, 1000, 1000]), np.array([500_000, 500_000])]
    found = cadence(late)
    assert found.num_ticks == 6
    assert found.jitter_us == {"p50": 0.5, "p99": 2.0, "p99_9": 2.0, "max": 2.0}
    assert found.lateness_us["max"] == 500
    assert cadence([]).num_ticks == 0


def record(**changes):
    usage = np.ones((2, 4), np.int64)
    values = dict(
        period_ns=12_500_000, lateness_ns=np.array([0, 1000]), actor_usage=usage, planner_usage=usage[:1],
        grants=(Grant("actor", "SCHED_FIFO", "priority 50", True),), num_collections=3, longest_collection_ns=2000,
    )  # fmt: skip
    return RealtimeRecord(**{**values, **changes})


def test_a_refusal_in_any_episode_is_in_the_report():
    refused = Grant("actor", "SCHED_FIFO", "priority 50", False, "EPERM: no")
    block = report([record(), record(grants=(refused,)), record()])
    assert block["grants"] == [refused.as_json()]
    assert block["cadence"]["num_ticks"] == 6
    assert block["actor"]["num_ticks"] == 6
    assert block["planner"]["minor_faults"]["total"] == 3
    assert block["garbage_collection"] == {"num_collections": 9, "longest_us": 2.0}
    assert report([]) == {}


# --- configuration ---


def test_the_configuration_asks():
    config = resolve({"engine": "toy", "robot": "toy", "runtime": {"clock": "real", "realtime": {"actor_cpus": 0}}})
    assert config.runtime.realtime == RealtimeOptions(actor_cpus=(0,))
    assert resolve(as_tree(config)) == config
    assert resolve({"engine": "toy", "robot": "toy", "runtime": {"clock": "real"}}).runtime.realtime is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fifo_priority": 100}, r"runtime\.realtime\.fifo_priority is 100; valid: 1\.\.99"),
        ({"planner_priority": 50}, "less than fifo_priority 50"),
        ({"actor_cpus": [-1]}, r"actor_cpus is \[-1\]"),
        ({"lock_memory": "perhaps"}, r"runtime\.realtime\.lock_memory"),
    ],
)
def test_what_can_not_be_is_refused_by_name(asked, message):
    with pytest.raises(BadConfig, match=message):
        resolve({"engine": "toy", "robot": "toy", "runtime": {"clock": "real", "realtime": asked}})


def test_an_unknown_key_and_a_clock_that_waits_are_refused():
    with pytest.raises(UnknownOption, match=r"runtime\.realtime\.fifo"):
        resolve({"engine": "toy", "runtime": {"clock": "real", "realtime": {"fifo": 50}}})
    with pytest.raises(BadConfig, match="realtime is given with clock lockstep"):
        resolve({"engine": "toy", "robot": "toy", "runtime": {"realtime": {}}})
