"""The file for Perfetto keeps to the Trace Event Format, and shows the plans that took longest."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict

import pytest
from fake_profile import MS, a_plan, measured, played

from vla_spec.profiling.chrome_trace import (
    ACT_TRACK,
    PLAN_TRACK,
    STAGE_TRACKS,
    Group,
    SlowPlan,
    around,
    chrome_trace,
    slowest,
)


def validate(tree):
    """What chrome://tracing and Perfetto need of a JSON trace; returns the complete events by track."""
    assert set(tree) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert tree["displayTimeUnit"] in ("ms", "ns")
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    tracks, named = defaultdict(list), set()
    for event in tree["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            named.add((event["pid"], event["tid"], event["name"]))
        elif event["ph"] == "i":
            assert event["s"] in ("t", "p", "g")
            assert event["ts"] >= 0
        else:
            assert event["ph"] == "X", event
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append(event)
    for (process, track), events in tracks.items():
        assert (process, 0, "process_name") in named
        assert (process, track, "thread_name") in named
        for before, after in itertools.pairwise(events):
            # Slices of one track follow each other, else viewers nest them by accident.
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    return tracks


def test_the_format_is_kept():
    plans = [SlowPlan(*item) for item in measured([0, MS, 9 * MS])]
    episode = played()
    in_loop = [SlowPlan(plan) for plan in episode.result.plans]
    groups = [
        Group("exact, recorded, idle", plans),
        Group("exact, real time, idle", in_loop, episode.acts, episode.observes),
        Group("nothing", []),
    ]
    tracks = validate(chrome_trace(groups, {"machine": "a"}))
    assert {process for process, _ in tracks} == {1, 2}
    assert len(tracks[1, PLAN_TRACK]) == 3
    assert len(tracks[1, STAGE_TRACKS["step"]]) == 6
    assert len(tracks[1, STAGE_TRACKS["hand_over"]]) == 3
    assert (2, STAGE_TRACKS["hand_over"]) not in tracks
    assert len(tracks[2, ACT_TRACK]) == 40


def test_stages_lie_inside_their_plan():
    tracks = validate(chrome_trace([Group("g", [SlowPlan(a_plan(start_ns=5 * MS))])]))
    (plan,) = tracks[1, PLAN_TRACK]
    assert plan["ts"] == 0
    assert plan["dur"] == a_plan().plan_ns / 1e3
    inside = [e for (_, track), events in tracks.items() if track != PLAN_TRACK for e in events]
    assert len(inside) == 1 + 3 * 4 + 1
    assert all(e["ts"] >= 0 and e["ts"] + e["dur"] <= plan["dur"] + 1e-6 for e in inside)
    step = tracks[1, STAGE_TRACKS["step"]][0]
    assert step["args"] == {"chunk_id": 0, "round": 1, "drafted": 4, "accepted": 3}
    assert plan["args"]["forwards"] == 3
    assert plan["args"]["rung"] == "EXACT"


def test_a_late_plan_shows_its_deadline():
    def deadlines(plan):
        return [e for e in chrome_trace([Group("g", [SlowPlan(plan)])])["traceEvents"] if e["ph"] == "i"]

    (mark,) = deadlines(a_plan(deadline_ms=10))
    assert (mark["name"], mark["ts"]) == ("deadline", 10_000)
    assert deadlines(a_plan(deadline_ms=20)) == []


def test_times_count_from_the_first_event():
    tree = chrome_trace([Group("g", [SlowPlan(a_plan(start_ns=10**15))], [(10**15 - 500, 10**15 - 400)])])
    assert min(event["ts"] for event in tree["traceEvents"] if event["ph"] == "X") == 0


def test_the_slowest_come_in_the_order_of_time():
    plans = [SlowPlan(*item) for item in measured([5 * MS, 0, 9 * MS, MS])]
    assert [item.plan.chunk_id for item in slowest(plans, 2)] == [0, 2]
    assert len(slowest(plans, 99)) == 4


def test_the_actor_is_shown_around_the_plans_only():
    calls = [(i * MS, i * MS + 10) for i in range(100)]
    plan = a_plan(start_ns=50 * MS)
    kept = around(calls, [SlowPlan(plan)], 2 * MS)
    assert kept[0][0] == 48 * MS
    assert kept[-1][0] == pytest.approx(plan.ready_ns + 2 * MS, abs=MS)
    assert around(calls, [], 2 * MS) == []


def test_nothing_is_an_empty_trace():
    validate(chrome_trace([]))
