"""From plans as measured to the figures of one row. Pure functions; what each figure means is in `results.MEANING`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vla_spec.costs import Costs
from vla_spec.ladder import Reason
from vla_spec.trace import PlanRecord

#: Drafters whose time is mostly one model call; for all others drafting counts as host overhead.
MODEL_DRAFTERS = frozenset({"small_model", "feature_head", "block_head"})
#: Rules that report deviations in bins; the others do so in physical units.
RULES_IN_BINS = frozenset({"relaxed_bins", "typical"})
NS_PER_MS = 1e6

_LATE = frozenset({Reason.DEADLINE, Reason.DEADLINE_PAST, Reason.NO_TIME})


class Figures(NamedTuple):
    """Figures of one mode over its plans; arrays are per plan that was decoded. None = no such plan or round."""

    chunk_ms: npt.NDArray[np.float64]
    decode_ms: npt.NDArray[np.float64]
    slack_ms: npt.NDArray[np.float64]
    accepted: tuple[int, ...]
    prefill_ms_p50: float | None
    tokens_per_forward: float | None
    acceptance_length: float | None
    forwards_per_chunk: float | None
    limit_ratio: float | None
    host_overhead_ratio: float | None
    host_ns_p50: float | None
    deadline_miss_rate: float | None


def figures(
    plans: Sequence[PlanRecord], costs: Costs, num_tokens: int, deadline_ms: float, has_model_drafter: bool
) -> Figures:
    """Work out the figures of one mode.

    Args:
        plans: all of its plans, warm-up left out.
        costs: start-up costs of its engine.
        num_tokens: T.
        deadline_ms: what counts as late, for plans that had no deadline of their own. [ms]
        has_model_drafter: drafting is a model call and no host work.
    """
    decoded = [plan for plan in plans if plan.rounds]
    rounds = [measured for plan in decoded for measured in plan.rounds[1:] if not measured.num_forced]
    chunk_ms = np.array([plan.plan_ns / NS_PER_MS for plan in decoded])
    decode_ms = np.array([sum(r.total_ns for r in plan.rounds[1:]) / NS_PER_MS for plan in decoded])
    slack_ms = np.array([min(plan.slack_ns / NS_PER_MS, deadline_ms - plan.plan_ns / NS_PER_MS) for plan in plans])
    is_late = [plan.slack_ns < 0 or plan.plan_ns > deadline_ms * NS_PER_MS or plan.reason in _LATE for plan in plans]
    num_forwards = sum(len(plan.rounds) for plan in decoded)
    num_decoded = sum(plan.num_verified for plan in decoded)
    host_ns = [r.total_ns - r.step_ns - r.commit_ns - (r.draft_ns if has_model_drafter else 0) for r in rounds]
    accepted = np.bincount([r.num_accepted for r in rounds]) if rounds else np.zeros(0, int)
    return Figures(
        chunk_ms=chunk_ms,
        decode_ms=decode_ms,
        slack_ms=slack_ms,
        accepted=tuple(int(count) for count in accepted),
        prefill_ms_p50=_median([plan.rounds[0].step_ns / NS_PER_MS for plan in decoded]),
        tokens_per_forward=num_decoded / num_forwards if num_forwards else None,
        acceptance_length=float(np.mean([r.num_accepted for r in rounds])) + 1 if rounds else None,
        forwards_per_chunk=num_forwards / len(decoded) if decoded else None,
        limit_ratio=float(np.median(chunk_ms)) * NS_PER_MS / costs.limit_ns(num_tokens) if decoded else None,
        host_overhead_ratio=float(np.median(host_ns)) / costs.step_ns(1) if rounds else None,
        host_ns_p50=float(np.median(host_ns)) if rounds else None,
        deadline_miss_rate=float(np.mean(is_late)) if plans else None,
    )


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
