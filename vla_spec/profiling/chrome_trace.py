"""The slowest plans as a file for Perfetto (ui.perfetto.dev) or chrome://tracing: one process per mode and condition.

Tracks of a process: the whole plan, then one per stage, then, from the real-time loop, what the actor did meanwhile.
The time between plans that are not shown is left as it was, so the ruler is the run's own clock.

Source: Trace Event Format, complete (X), instant (i) and metadata (M) events, times in µs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vla_spec.profiling.loop import Interval
from vla_spec.profiling.stages import NO_ROUND, STAGES, spans_of
from vla_spec.trace import PlanRecord

#: Track (thread id) of each kind of event.
PLAN_TRACK = 1
STAGE_TRACKS = {stage: PLAN_TRACK + 1 + i for i, stage in enumerate(STAGES)}
ACT_TRACK = PLAN_TRACK + 1 + len(STAGES)
OBSERVE_TRACK = ACT_TRACK + 1
_TRACK_NAMES = {
    PLAN_TRACK: "plan", **{track: stage for stage, track in STAGE_TRACKS.items()},
    ACT_TRACK: "actor: act", OBSERVE_TRACK: "actor: observe",
}  # fmt: skip


class SlowPlan(NamedTuple):
    """One plan to show.

    Attributes:
        plan: as measured.
        hand_over_ns: of its chunk; None = was not measured.
        num_switches, num_faults: see `planning.Measured`; None = were not counted.
    """

    plan: PlanRecord
    hand_over_ns: int | None = None
    num_switches: int | None = None
    num_faults: int | None = None


class Group(NamedTuple):
    """One process of the file: plans of one mode under one condition, and the actor's calls around them."""

    name: str
    plans: Sequence[SlowPlan]
    acts: Sequence[Interval] = ()
    observes: Sequence[Interval] = ()


def slowest(plans: Sequence[SlowPlan], number: int) -> list[SlowPlan]:
    """The ``number`` longest plans, in the order of time."""
    chosen = sorted(plans, key=lambda item: item.plan.plan_ns, reverse=True)[:number]
    return sorted(chosen, key=lambda item: item.plan.start_ns)


def chrome_trace(groups: Sequence[Group], facts: dict[str, str] | None = None) -> dict[str, Any]:
    """The file's content; times count from the first event on.

    Args:
        groups: any, those without plans are left out.
        facts: goes into ``otherData``.
    """
    shown = [group for group in groups if group.plans]
    begins = [item.plan.start_ns for group in shown for item in group.plans]
    begins += [begin for group in shown for begin, _ in (*group.acts, *group.observes)]
    zero_ns = min(begins, default=0)
    events: list[dict[str, Any]] = []
    for process, group in enumerate(shown, 1):
        own = [event for item in group.plans for event in _plan_events(item, process, zero_ns)]
        own += _call_events(group.acts, "act", process, ACT_TRACK, zero_ns)
        own += _call_events(group.observes, "observe", process, OBSERVE_TRACK, zero_ns)
        tracks = sorted({event["tid"] for event in own})
        events += _names(process, group.name, tracks)
        events += sorted(own, key=lambda event: (event["tid"], event["ts"]))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts or {}}


def around(calls: Sequence[Interval], plans: Sequence[SlowPlan], margin_ns: int) -> list[Interval]:
    """Calls that touch one of the plans, or lie no further than ``margin_ns`` from it."""
    windows = [(item.plan.start_ns - margin_ns, item.plan.ready_ns + margin_ns) for item in plans]
    return [call for call in calls if any(call[0] <= end and call[1] >= begin for begin, end in windows)]


def _plan_events(item: SlowPlan, process: int, zero_ns: int) -> list[dict[str, Any]]:
    plan = item.plan
    facts: dict[str, Any] = {
        "chunk_id": plan.chunk_id, "rung": plan.rung.name, "reason": plan.reason.name, "forwards": len(plan.rounds),
        "tokens": plan.num_tokens, "verified": plan.num_verified, "slack_ms": round(plan.slack_ns / 1e6, 4),
    }  # fmt: skip
    if item.num_switches is not None:
        facts |= {"involuntary_switches": item.num_switches, "page_faults": item.num_faults}
    name = f"plan {plan.chunk_id}"
    events = [_complete(name, "plan", process, PLAN_TRACK, plan.start_ns - zero_ns, plan.plan_ns, facts)]
    for span in spans_of(plan, item.hand_over_ns):
        about: dict[str, Any] = {"chunk_id": plan.chunk_id}
        if span.round != NO_ROUND:
            about |= {"round": span.round, "drafted": span.num_drafted, "accepted": span.num_accepted}
        track, start_ns = STAGE_TRACKS[span.stage], span.start_ns - zero_ns
        events.append(_complete(span.stage, "stage", process, track, start_ns, span.duration_ns, about))
    if plan.start_ns <= plan.deadline_ns <= plan.ready_ns:
        events.append({
            "name": "deadline", "cat": "plan", "ph": "i", "s": "t", "pid": process, "tid": PLAN_TRACK,
            "ts": (plan.deadline_ns - zero_ns) / 1e3, "args": {"chunk_id": plan.chunk_id},
        })  # fmt: skip
    return events


def _call_events(calls: Sequence[Interval], name: str, process: int, track: int, zero_ns: int) -> list[dict[str, Any]]:
    return [_complete(name, "actor", process, track, begin - zero_ns, end - begin, {}) for begin, end in calls]


def _complete(
    name: str, category: str, process: int, track: int, start_ns: int, duration_ns: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name, "cat": category, "ph": "X", "pid": process, "tid": track, "ts": start_ns / 1e3,
        "dur": duration_ns / 1e3, "args": arguments,
    }  # fmt: skip


def _names(process: int, name: str, tracks: Sequence[int]) -> list[dict[str, Any]]:
    """Metadata: what the process and its tracks are called, and their order."""
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}},
        {"name": "process_sort_index", "ph": "M", "pid": process, "tid": 0, "args": {"sort_index": process}},
    ]
    for track in tracks:
        about = {"pid": process, "tid": track, "ph": "M"}
        events.append({**about, "name": "thread_name", "args": {"name": _TRACK_NAMES[track]}})
        events.append({**about, "name": "thread_sort_index", "args": {"sort_index": track}})
    return events
