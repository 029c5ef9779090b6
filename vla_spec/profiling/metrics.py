"""The named numbers of a profile, for constraints and comparisons: ``chunk_p99_ms``, ``miss_rate``, ``step_p50_ms``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vla_spec.calib.background_load import KINDS
from vla_spec.profiling.histograms import QUANTILES, Distribution, num_needed
from vla_spec.profiling.profile import Condition, Loop, ModeProfile
from vla_spec.profiling.stages import ROUND, STAGES

#: What a metric is read from: recorded observations under one condition, the real-time loop, or the mode as a whole.
Source = Literal["condition", "loop", "mode"]
#: Conditions that a constraint without one refers to.
WARM = tuple(KINDS)


@dataclass(frozen=True, slots=True)
class Metric:
    """One number.

    Attributes:
        name: with its unit at the end, as people write it.
        source: see `Source`.
        base, rank: metrics of one base rise with their rank (p50 <= p99 <= max); for contradictions.
        lowest, highest: what it can be at all.
        can_be_lowest: False where that value itself is out of reach (nothing takes 0 ms).
        num_needed: values below which it says nothing; 1 = always.
        read: the value, None where it was not measured or there were too few values.
    """

    name: str
    source: Source
    base: str
    rank: float
    lowest: float
    highest: float
    can_be_lowest: bool
    num_needed: int
    read: Callable[[Any], float | None]


class Found(NamedTuple):
    """A metric's value in one place; ``condition`` is empty for numbers of the mode as a whole."""

    mode: str
    condition: str
    value: float | None


def _of_distribution(
    name: str, source: Source, get: Callable[[Any], Distribution | None], is_signed: bool = False
) -> list[Metric]:
    def reader(attribute: str) -> Callable[[Any], float | None]:
        def read(place: Any) -> float | None:
            stored = get(place)
            return None if stored is None else getattr(stored, attribute)

        return read

    ranks = {"min": 0.0, **QUANTILES, "max": 1.0}
    lowest = float("-inf") if is_signed else 0.0
    return [
        Metric(
            f"{name}_{rank}_ms", source, name, q, lowest, float("inf"), is_signed,
            num_needed(q) if rank in QUANTILES else 1, reader(f"{rank}_ms"),
        )
        for rank, q in ranks.items()
    ]  # fmt: skip


def _rate(name: str, source: Source, read: Callable[[Any], float | None]) -> Metric:
    return Metric(name, source, name, 0.0, 0.0, 1.0, True, 1, read)


def _all() -> dict[str, Metric]:
    found: list[Metric] = _of_distribution("chunk", "condition", lambda c: c.chunk)
    for stage in (*STAGES, ROUND):
        found += _of_distribution(stage, "condition", lambda c, stage=stage: c.stages.get(stage))  # type: ignore[misc]
    found += _of_distribution("slack", "condition", lambda c: c.slack, is_signed=True)
    found += [
        _rate("miss_rate", "condition", lambda c: c.miss_rate),
        _rate("miss_rate_upper", "condition", lambda c: c.miss_ci95[1]),
        _rate("incomplete_rate", "condition", lambda c: c.incomplete / c.plans),
    ]
    found += _of_distribution("loop_chunk", "loop", lambda p: p.chunk)
    found += _of_distribution("loop_slack", "loop", lambda p: p.slack, is_signed=True)
    found += _of_distribution("period_error", "loop", lambda p: p.period_error, is_signed=True)
    found += _of_distribution("jitter", "loop", lambda p: p.jitter)
    found += _of_distribution("wait", "loop", lambda p: p.wait)
    found += [
        _rate("loop_miss_rate", "loop", lambda p: p.miss_rate),
        _rate("loop_miss_rate_upper", "loop", lambda p: p.miss_ci95[1]),
        _rate("late_step_rate", "loop", lambda p: p.late_steps / p.steps),
        _rate("hold_rate", "loop", lambda p: p.hold_steps / p.steps),
    ]
    found += [
        Metric("load_ms", "mode", "load", 0.0, 0.0, float("inf"), False, 1, lambda m: m.load_ms),
        Metric("first_ms", "mode", "first", 0.0, 0.0, float("inf"), False, 1, lambda m: m.first_ms),
        Metric(
            "tracing_percent", "mode", "tracing", 0.0, 0.0, float("inf"), True, 1,
            lambda m: m.tracing.percent_of_round if m.tracing else None,
        ),
    ]  # fmt: skip
    return {metric.name: metric for metric in found}


#: Name -> metric; everything that a constraint may say something about.
METRICS = _all()


def places(mode: ModeProfile, source: Source) -> dict[str, Condition | Loop | ModeProfile]:
    """Condition -> where metrics of this source are read in one mode."""
    if source == "mode":
        return {"": mode}
    found: dict[str, Condition | Loop | ModeProfile] = {}
    found.update(mode.conditions if source == "condition" else mode.loops)
    return found
