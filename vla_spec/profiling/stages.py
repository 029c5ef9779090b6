"""A plan as a list of spans: which stage ran from when to when. Pure functions of what `Policy` has measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vla_spec.trace import PlanRecord

#: Stage -> what it is, in the order in which a plan goes through them. Every one is measured per call.
STAGES = {
    "encode": "the adapter: observation to engine inputs",
    "begin": "controller and drafter are told about the new chunk",
    "prefill": "target forward over the prompt",
    "draft": "the controller plans a round, the drafter proposes",
    "step": "target forward over the last token and the draft",
    "judge": "the acceptance rule; a learning drafter sees the scores, tokens are appended",
    "commit": "the engine keeps the cache rows of the accepted path",
    "tail": "the answer: unverified tail if any, tokens to actions (un-normalising), ladder",
    "hand_over": "the chunk goes into the actor's buffer, the first command comes out",
}
#: What lies between the stages of one plan: the controller learns, the loop turns.
BETWEEN = "between"
#: Per round behind the prefill, draft to commit.
ROUND = "round"
#: Round of a span that belongs to none.
NO_ROUND = -1

Nanoseconds = npt.NDArray[np.int64]


class Span(NamedTuple):
    """One stage of one plan. Times in ns on the planner's clock; ``round`` counts from the prefill on."""

    stage: str
    start_ns: int
    duration_ns: int
    round: int = NO_ROUND
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def end_ns(self) -> int:
        """When the next stage may begin."""
        return self.start_ns + self.duration_ns


def spans_of(plan: PlanRecord, hand_over_ns: int | None = None) -> tuple[Span, ...]:
    """All stages of a plan in the order of time; they never overlap.

    Args:
        plan: as measured.
        hand_over_ns: how long the actor's buffer took afterwards; None = was not measured.
    """
    spans = [Span("encode", plan.start_ns, plan.encode_ns)] if plan.encode_ns else []
    for index, measured in enumerate(plan.rounds):
        at = measured.start_ns
        first, forward = ("draft", "step") if index else ("begin", "prefill")
        for stage, duration_ns in (
            (first, measured.draft_ns),
            (forward, measured.step_ns),
            ("judge", measured.judge_ns),
            ("commit", measured.commit_ns),
        ):
            spans.append(Span(stage, at, duration_ns, index, measured.num_drafted, measured.num_accepted))
            at += duration_ns
    spans.append(Span("tail", plan.ready_ns - plan.tail_ns, plan.tail_ns))
    if hand_over_ns is not None:
        spans.append(Span("hand_over", plan.ready_ns, hand_over_ns))
    return tuple(spans)


def stage_durations(plans: Sequence[PlanRecord], hand_over_ns: Iterable[int] = ()) -> dict[str, Nanoseconds]:
    """Stage -> int64 [calls], the duration of every call in these plans; stages that never ran are left out.

    `ROUND` is in it too: whole rounds behind the prefill.
    """
    taken: dict[str, list[int]] = {stage: [] for stage in (*STAGES, ROUND)}
    for plan in plans:
        for span in spans_of(plan):
            taken[span.stage].append(span.duration_ns)
        taken[ROUND] += [measured.total_ns for measured in plan.rounds[1:]]
    taken["hand_over"] += hand_over_ns
    return {stage: np.array(durations, np.int64) for stage, durations in taken.items() if durations}


def stage_totals(plan: PlanRecord) -> dict[str, int]:
    """Stage -> its time in one plan [ns]; together with `BETWEEN` they add up to ``plan.plan_ns``."""
    totals = dict.fromkeys(STAGES, 0)
    del totals["hand_over"]  # lies behind the plan
    for span in spans_of(plan):
        totals[span.stage] += span.duration_ns
    return {**totals, BETWEEN: plan.plan_ns - sum(totals.values())}
