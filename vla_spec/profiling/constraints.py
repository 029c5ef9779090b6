"""A file of limits that turns a profile into pass or fail: one ``name operator number`` per line.

    chunk_p99_ms <= 80            # every mode, under every load that was measured
    exact.step_p50_ms < 5         # one mode
    busy.miss_rate <= 1e-3        # one condition
    relaxed.idle.slack_p1_ms > 0  # both

A file that ends in .yaml holds the same: a list of such lines, or a mapping of names to ``<= 80`` or to
``{min: 1, max: 80}`` (the form of Triton's Model Analyzer).
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vla_spec.errors import BadConfig, UnknownOption, VlaSpecError
from vla_spec.profiling.metrics import METRICS, WARM, Metric, places
from vla_spec.profiling.profile import CONDITIONS, Profile

_LINE = re.compile(r"(?P<name>[^\s<>=]+)\s*(?P<operator><=|>=|<|>)\s*(?P<limit>\S+)")
_FORM = "NAME OPERATOR NUMBER with <=, <, >= or >, as in chunk_p99_ms <= 80"


class ConstraintsViolated(VlaSpecError):
    """The profile is whole and written, and it is not good enough."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Constraint:
    """One limit.

    Attributes:
        text: as it was written, for tables. where: file and line.
        mode: None = every mode. condition: None = every load that was measured; cold only by its name.
        metric: what is limited. operator: ``<=``, ``<``, ``>=`` or ``>``. limit: in the metric's unit.
    """

    text: str
    where: str
    mode: str | None
    condition: str | None
    metric: Metric
    operator: str
    limit: float

    @property
    def is_upper(self) -> bool:
        """It limits from above."""
        return self.operator in ("<=", "<")

    def holds(self, value: float) -> bool:
        """The value keeps to the limit."""
        return {
            "<=": value <= self.limit, "<": value < self.limit, ">=": value >= self.limit, ">": value > self.limit
        }[self.operator]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """One constraint in one place.

    Attributes:
        constraint: as written. mode, condition: where it was looked at; condition is empty for the mode as a whole.
        value: found; None = not measured, or too few values to say.
        passed: it holds. A value that is missing does not.
        note: what else there is to say; empty = nothing.
    """

    constraint: str
    mode: str
    condition: str
    value: float | None
    passed: bool
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read(path: Path) -> tuple[Constraint, ...]:
    """The constraints in a file, each possible by itself and all of them together.

    Raises:
        BadConfig: unreadable, empty, not of the form, impossible or contradictory.
        UnknownOption: a name that does not exist.
    """
    where = f"--constraints {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{where}: can't be read ({type(error).__name__}); expected lines of {_FORM}") from error
    lines = _from_yaml(text, where) if path.suffix in (".yaml", ".yml") else _from_text(text, where)
    found = tuple(parse(line, at) for at, line in lines)
    if not found:
        raise BadConfig(f"{where}: holds no constraint; expected lines of {_FORM}")
    check_consistency(found)
    return found


def parse(text: str, where: str) -> Constraint:
    """One constraint.

    Raises:
        BadConfig: not of the form, or impossible.
        UnknownOption: no such metric.
    """
    match = _LINE.fullmatch(text.strip())
    if match is None:
        raise BadConfig(f"{where}: {_shorten(text)!r} is no constraint; expected {_FORM}")
    *scope, name = match["name"].replace("p99.9", "p999").split(".")
    metric = METRICS.get(name)
    if metric is None:
        close = difflib.get_close_matches(name, METRICS, 1, 0.0)[0]
        raise BadConfig(f"{where}: no metric named {name!r}; did you mean {close!r}? Valid: {_valid_names()}")
    condition = scope.pop() if scope and scope[-1] in CONDITIONS else None
    mode = ".".join(scope) or None
    if condition is not None and metric.source == "mode":
        raise BadConfig(f"{where}: {name} belongs to a mode as a whole; leave {condition!r} out")
    if condition == "cold" and metric.source == "loop":
        raise BadConfig(f"{where}: the real-time loop is never cold; valid: {', '.join(WARM)}, or leave it out")
    try:
        limit = float(match["limit"])
    except ValueError:
        raise BadConfig(f"{where}: limit of {name} is {_shorten(match['limit'])!r}; expected a number") from None
    constraint = Constraint(" ".join(text.split()), where, mode, condition, metric, match["operator"], limit)
    _check_possible(constraint)
    return constraint


def check_consistency(constraints: Sequence[Constraint]) -> None:
    """Raise BadConfig for two constraints that nothing can keep at once, or that say the same thing twice."""
    for one, other in itertools.combinations(constraints, 2):
        same_scope = (one.mode, one.condition) == (other.mode, other.condition)
        if one.metric is other.metric and same_scope and one.is_upper is other.is_upper:
            raise BadConfig(
                f"{other.where}: {other.text!r} limits {other.metric.name} a second time, after {one.text!r}; keep one"
            )
        upper, lower = (one, other) if one.is_upper else (other, one)
        if upper.is_upper is lower.is_upper or not _meet(one, other) or upper.metric.base != lower.metric.base:
            continue
        if upper.metric.source != lower.metric.source or lower.metric.rank > upper.metric.rank:
            continue  # a small median and a large maximum go together
        is_strict = upper.operator == "<" or lower.operator == ">"
        if lower.limit > upper.limit or (lower.limit == upper.limit and is_strict):
            raise BadConfig(
                f"{other.where}: {other.text!r} and {one.text!r} contradict each other: no value keeps both"
            )


def check_measurable(
    constraints: Sequence[Constraint], modes: Sequence[str], conditions: Sequence[str], has_loop: bool,
    has_tracing: bool, num_plans: int | None,
) -> None:  # fmt: skip
    """Refuse, before anything is measured, what this run will not be able to say.

    Args:
        constraints: any.
        modes: that will be measured.
        conditions: that they will be measured under.
        has_loop: the real-time loop will run.
        has_tracing: plans with and without trace will be compared.
        num_plans: per mode and warm condition; None = not known yet.

    Raises:
        BadConfig, UnknownOption: in one sentence which constraint, and which option is missing.
    """
    for item in constraints:
        name = item.metric.name
        if item.mode is not None and item.mode not in modes:
            raise UnknownOption("mode", item.mode, modes, item.where)
        if item.metric.source == "loop" and not has_loop:
            raise BadConfig(f"{item.where}: {name} comes from the real-time loop; add --real-time")
        if item.condition is not None and item.condition not in conditions:
            have = ", ".join(conditions)
            raise BadConfig(f"{item.where}: condition {item.condition!r} is not measured in this run; have {have}")
        if name in ("load_ms", "first_ms") and "cold" not in conditions:
            raise BadConfig(f"{item.where}: {name} needs a cold start; --cold-plans must be 1 or more")
        if name == "tracing_percent" and not has_tracing:
            raise BadConfig(f"{item.where}: {name} needs --tracing-pairs of 1 or more")
        is_per_plan = item.metric.base in ("chunk", "slack", "encode", "begin", "prefill", "tail", "hand_over")
        is_warm = item.condition != "cold"
        if num_plans is not None and is_per_plan and is_warm and num_plans < item.metric.num_needed:
            raise BadConfig(
                f"{item.where}: {name} needs {item.metric.num_needed} plans to say anything, --plans is {num_plans}"
            )


def check_all(constraints: Sequence[Constraint], profile: Profile) -> tuple[Check, ...]:
    """Every constraint everywhere it applies; one that applies nowhere fails."""
    checks: list[Check] = []
    for item in constraints:
        found = list(_checks(item, profile))
        checks += found or [Check(item.text, item.mode or "", item.condition or "", None, False, "was not measured")]
    return tuple(checks)


def raise_if_violated(checks: Sequence[Check]) -> None:
    """Raise ConstraintsViolated, which names the first ones, unless all passed."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    first = failed[0]
    value = first.note if first.value is None else f"found {first.value:.6g}"
    place = ".".join(filter(None, (first.mode, first.condition)))
    more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
    raise ConstraintsViolated(
        f"{len(failed)} of {len(checks)} checks failed: {first.constraint} in {place or 'no mode'}: {value}{more}"
    )


def _checks(item: Constraint, profile: Profile) -> Iterator[Check]:
    for mode, own in profile.modes.items():
        if item.mode not in (None, mode):
            continue
        for condition, place in places(own, item.metric.source).items():
            is_meant = condition == item.condition if item.condition else condition != "cold"
            if not is_meant:
                continue
            value = item.metric.read(place)
            if value is None:
                yield Check(item.text, mode, condition, None, False, _why_missing(item.metric))
            else:
                passed = item.holds(value)
                yield Check(item.text, mode, condition, value, passed, _doubt(item, place) if passed else "")


def _doubt(item: Constraint, place: Any) -> str:
    """A rate that passes by its estimate while its interval reaches beyond the limit."""
    if item.metric.name not in ("miss_rate", "loop_miss_rate") or not item.is_upper:
        return ""
    upper = place.miss_ci95[1]
    return "" if item.holds(upper) else f"not proven: 95 % interval reaches {upper:.3g} with {place.plans} plans"


def _why_missing(metric: Metric) -> str:
    return f"needs {metric.num_needed} values" if metric.num_needed > 1 else "was not measured"


def _check_possible(item: Constraint) -> None:
    metric, limit = item.metric, item.limit
    if not math.isfinite(limit):
        raise BadConfig(f"{item.where}: limit of {metric.name} is {limit}; expected a finite number")
    if limit < metric.lowest or limit > metric.highest:
        valid = "0 or more" if metric.highest == math.inf else f"{metric.lowest:g}..{metric.highest:g}"
        raise BadConfig(f"{item.where}: limit of {metric.name} is {limit:g}; valid: {valid}")
    at_lowest, at_highest = limit == metric.lowest, limit == metric.highest
    if (at_lowest and (item.operator == "<" or (item.operator == "<=" and not metric.can_be_lowest))) or (
        at_highest and item.operator == ">"
    ):
        raise BadConfig(f"{item.where}: {item.text!r} is impossible: nothing keeps it")


def _valid_names() -> str:
    """All names in one sentence."""
    ranked = dict.fromkeys(metric.base for metric in METRICS.values() if metric.name != f"{metric.base}_ms")
    parts = [base for base in ranked if f"{base}_p50_ms" in METRICS]
    ranks = [name.removeprefix("chunk_").removesuffix("_ms") for name in METRICS if name.startswith("chunk_")]
    others = [name for name, metric in METRICS.items() if metric.base not in parts]
    return f"PART_RANK_ms with part {', '.join(parts)} and rank {', '.join(ranks)}; and {', '.join(others)}"


def _meet(one: Constraint, other: Constraint) -> bool:
    """There is a place that both apply to."""
    modes_meet = one.mode is None or other.mode is None or one.mode == other.mode
    if one.condition is None or other.condition is None:
        return modes_meet and "cold" not in (one.condition, other.condition)
    return modes_meet and one.condition == other.condition


def _from_text(text: str, where: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if content:
            yield f"{where} line {number}", content


def _from_yaml(text: str, where: str) -> Iterator[tuple[str, str]]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise BadConfig(f"{where}{line}: not valid YAML ({str(error).splitlines()[0]})") from error
    if tree is None:
        return
    if isinstance(tree, list):
        for number, item in enumerate(tree, 1):
            if not isinstance(item, str):
                raise BadConfig(f"{where} entry {number}: {_shorten(repr(item))} is no constraint; expected {_FORM}")
            yield f"{where} entry {number}", item
        return
    if not isinstance(tree, dict):
        raise BadConfig(f"{where}: expected a list of constraints or a mapping of names to limits")
    for name, limits in tree.items():
        at = f"{where}: {name}"
        if isinstance(limits, str):
            yield at, f"{name} {limits}"
        elif isinstance(limits, dict) and limits and set(limits) <= {"min", "max"}:
            for bound, limit in limits.items():
                yield at, f"{name} {'<=' if bound == 'max' else '>='} {limit}"
        else:
            raise BadConfig(f"{at}: is {_shorten(repr(limits))}; expected '<= 80' or a mapping with min, max or both")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
