"""What every plan and every round took, in preallocated rings; summaries with their window; dumps after a miss.

`Trace.record` is for the planner's thread: it writes numbers into arrays and does no I/O. Everything else copies.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from vla_spec.atomic import replacing
from vla_spec.errors import BadConfig
from vla_spec.ladder import Reason
from vla_spec.types import Round, Rung

Structured = npt.NDArray[np.void]

ROUND_DTYPE = np.dtype(
    [("chunk_id", "i8"), ("index", "i4"), ("num_drafted", "i4"), ("num_accepted", "i4"), ("num_relaxed", "i4")]
    + [(name, "i8") for name in ("draft_ns", "step_ns", "judge_ns", "commit_ns", "total_ns", "start_ns")]
    + [("num_forced", "i4")]
)
PLAN_DTYPE = np.dtype(
    [("chunk_id", "i8"), ("observation_step", "i8"), ("observation_stamp_ns", "i8")]
    + [(name, "i8") for name in ("start_ns", "ready_ns", "deadline_ns", "encode_ns", "decode_ns", "tail_ns")]
    + [("rung", "i4"), ("reason", "i4"), ("num_steps", "i4"), ("num_tokens", "i4"), ("num_verified", "i4")]
    + [("num_rounds", "i4")]
)


class PlanRecord(NamedTuple):
    """One planning tick as measured. Durations in ns.

    encode_ns, decode_ns, tail_ns: adapter, decode loop, and everything after it; 0 where it was not reached.
    num_steps: actions in the answer. num_tokens, num_verified: tokens in the answer, and those the target has judged
    (a fixed beginning is neither judged nor counted).
    rounds: one entry per target forward, prefill first; empty if the decode raised.
    """

    chunk_id: int
    observation_step: int
    observation_stamp_ns: int
    start_ns: int
    ready_ns: int
    deadline_ns: int
    encode_ns: int
    decode_ns: int
    tail_ns: int
    rung: Rung
    reason: Reason
    num_steps: int
    num_tokens: int
    num_verified: int
    rounds: tuple[Round, ...]

    @property
    def plan_ns(self) -> int:
        """From the start of planning to the answer."""
        return self.ready_ns - self.start_ns

    @property
    def slack_ns(self) -> int:
        """Time left at the answer; negative = late."""
        return self.deadline_ns - self.ready_ns


class Quantiles(NamedTuple):
    """p50, p90, p99 (linear interpolation) and the largest of ``num_values`` values."""

    p50: float
    p90: float
    p99: float
    max: float
    num_values: int


class Summary(NamedTuple):
    """What the rings say. Window: the last ``num_plans`` plans and ``num_rounds`` rounds, at most the capacities.

    Every statistic over an empty window is None, and a count is 0.

    Attributes:
        num_plans, num_rounds: the window.
        num_misses: plans of the window that were ready after their deadline.
        plan_ns, slack_ns, encode_ns, decode_ns: per plan; round_ns, draft_ns, step_ns: per round.
        tokens_per_forward: decoded tokens / target forwards, prefill included in both.
        forwards_per_chunk: mean target forwards of the plans that had any.
        mean_acceptance_length: mean of accepted + 1 (the bonus or recovered token) over rounds behind the prefill,
            rounds that drafted nothing included.
        acceptance_by_position: entry i: of the rounds that drafted more than i tokens, the share that accepted more
            than i. For trees, nodes count as drafted, so entries are lower bounds.
        rungs, reasons: plans by name.
    """

    num_plans: int
    num_rounds: int
    num_misses: int
    plan_ns: Quantiles | None
    slack_ns: Quantiles | None
    encode_ns: Quantiles | None
    decode_ns: Quantiles | None
    round_ns: Quantiles | None
    draft_ns: Quantiles | None
    step_ns: Quantiles | None
    tokens_per_forward: float | None
    forwards_per_chunk: float | None
    mean_acceptance_length: float | None
    acceptance_by_position: tuple[float, ...]
    rungs: dict[str, int]
    reasons: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers."""
        return {k: v._asdict() if isinstance(v, Quantiles) else v for k, v in self._asdict().items()}


@final
class Trace:
    """Two rings, one row per plan and one per round; the oldest rows are overwritten.

    Args:
        num_plans, num_rounds: capacities.
        dump_dir: where `flush` writes one file per miss; None = nowhere.
        max_dumps: files that are written at most, so that a bad day does not fill the disk; later misses only count.
        dump_plans: plans in one file: the miss and those before it.
    """

    def __init__(
        self,
        num_plans: int = 1024,
        num_rounds: int = 8192,
        dump_dir: Path | None = None,
        max_dumps: int = 16,
        dump_plans: int = 8,
    ) -> None:
        if num_plans < 1 or num_rounds < 1 or max_dumps < 0 or dump_plans < 1:
            raise BadConfig(
                f"trace: {num_plans=}, {num_rounds=} and {dump_plans=} must be 1 or more, {max_dumps=} 0 or more"
            )
        self._plans = np.zeros(num_plans, PLAN_DTYPE)
        self._rounds = np.zeros(num_rounds, ROUND_DTYPE)
        #: Written since construction, overwritten rows included.
        self.total_plans = self.total_rounds = self.total_misses = 0
        #: False = `record` does nothing, so that what recording costs can be measured by leaving it out.
        self.is_enabled = True
        self._dump_dir, self._dumps_left, self._dump_plans = dump_dir, max_dumps, dump_plans
        self._to_dump: deque[int] = deque(maxlen=max(1, max_dumps))  # running numbers of plans

    def record(self, plan: PlanRecord) -> None:
        """Append one plan and its rounds. Call from the planner only; no I/O."""
        if not self.is_enabled:
            return
        for index, measured in enumerate(plan.rounds):
            self._rounds[self.total_rounds % len(self._rounds)] = (plan.chunk_id, index, *measured)
            self.total_rounds += 1
        self._plans[self.total_plans % len(self._plans)] = (*plan[:-1], len(plan.rounds))
        if plan.slack_ns < 0:
            self.total_misses += 1
            if self._dump_dir is not None and len(self._to_dump) < self._dumps_left:
                self._to_dump.append(self.total_plans)
        self.total_plans += 1

    def plans(self) -> Structured:
        """Copy of the plans in the ring, oldest first; fields of `PLAN_DTYPE`."""
        return _unrolled(self._plans, self.total_plans)

    def rounds(self) -> Structured:
        """Copy of the rounds in the ring, oldest first; fields of `ROUND_DTYPE`."""
        return _unrolled(self._rounds, self.total_rounds)

    def summary(self) -> Summary:
        """Statistics of what is in the rings."""
        return summary(self.plans(), self.rounds())

    def flush(self) -> list[Path]:
        """Write one JSON file per miss since the last call, atomically. Not for the control loop: it does I/O.

        Returns:
            The files written. Misses whose rows were overwritten meanwhile are left out.
        """
        written: list[Path] = []
        if self._dump_dir is None:
            return written
        oldest = max(0, self.total_plans - len(self._plans))
        plans, rounds = self.plans(), self.rounds()
        while self._to_dump and self._dumps_left > 0:
            number = self._to_dump.popleft()
            if number < oldest:
                continue
            rows = plans[max(0, number - oldest - self._dump_plans + 1) : number - oldest + 1]
            of_rows = rounds[np.isin(rounds["chunk_id"], rows["chunk_id"])]
            path = self._dump_dir / f"miss-{int(rows[-1]['chunk_id']):06d}.json"
            write_json(path, {"reason": "deadline missed", "plans": _as_dicts(rows), "rounds": _as_dicts(of_rows)})
            self._dumps_left -= 1
            written.append(path)
        return written


def summary(plans: Structured, rounds: Structured) -> Summary:
    """Statistics of rows of `PLAN_DTYPE` and `ROUND_DTYPE`; the window is what is handed in."""
    slack = plans["deadline_ns"] - plans["ready_ns"]
    decoded = plans[plans["num_rounds"] > 0]
    is_forced = rounds["num_forced"] > 0
    behind = rounds[(rounds["index"] > 0) & ~is_forced]
    accepted = behind["num_accepted"]
    # A prefill or a round without a draft yields one token, as any round yields one more than it accepted.
    # The prefill before a forced beginning yields none.
    num_tokens = len(rounds) + int(rounds["num_accepted"].sum()) - int(is_forced.sum())
    by_position = []
    for i in range(int(behind["num_drafted"].max(initial=0))):
        reached = behind["num_drafted"] > i
        by_position.append(float((accepted[reached] > i).mean()))
    return Summary(
        num_plans=len(plans),
        num_rounds=len(rounds),
        num_misses=int((slack < 0).sum()),
        plan_ns=quantiles(plans["ready_ns"] - plans["start_ns"]),
        slack_ns=quantiles(slack),
        encode_ns=quantiles(plans["encode_ns"]),
        decode_ns=quantiles(plans["decode_ns"]),
        round_ns=quantiles(rounds["total_ns"]),
        draft_ns=quantiles(behind["draft_ns"]),
        step_ns=quantiles(behind["step_ns"]),
        tokens_per_forward=num_tokens / len(rounds) if len(rounds) else None,
        forwards_per_chunk=float(decoded["num_rounds"].mean()) if len(decoded) else None,
        mean_acceptance_length=float(accepted.mean()) + 1 if len(behind) else None,
        acceptance_by_position=tuple(by_position),
        rungs={rung.name: int((plans["rung"] == rung).sum()) for rung in Rung},
        reasons={reason.name: int((plans["reason"] == reason).sum()) for reason in Reason},
    )


def quantiles(values: npt.NDArray[Any]) -> Quantiles | None:
    """Of a one-dimensional array; None if it is empty."""
    if len(values) == 0:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Quantiles(float(p50), float(p90), float(p99), float(values.max()), len(values))


def write_json(path: Path, value: object) -> None:
    """Write a file that is either whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _unrolled(ring: Structured, total: int) -> Structured:
    if total <= len(ring):
        return ring[:total].copy()
    start = total % len(ring)
    return np.concatenate((ring[start:], ring[:start]))


def _as_dicts(rows: Structured) -> list[dict[str, int]]:
    names = rows.dtype.names or ()
    return [{name: int(row[name]) for name in names} for row in rows]
