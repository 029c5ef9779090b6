"""A profile: what `vla-spec profile` found, as one JSON file that can be read back, merged, judged and compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vla_spec import __version__
from vla_spec.calib.background_load import KINDS
from vla_spec.errors import BadConfig
from vla_spec.profiling.histograms import Distribution, decode, merged
from vla_spec.profiling.tracing_cost import TracingCost
from vla_spec.results import wilson_interval
from vla_spec.trace import write_json

#: Version of the layout of profile.json.
FORMAT = 1
KIND = "vla-spec profile"
#: Conditions under which recorded observations are planned: a new session, then warm under each load.
CONDITIONS = ("cold", *KINDS)
#: Plans that the series of one condition keeps at most, the first ones.
MAX_SERIES = 50_000
#: What every number means; saved with them.
MEANING = {
    "chunk": "from an observation in hand to its action chunk: encode to tail",
    "cold": "the first plans of a new session; libraries are loaded and the weights' file is in memory",
    "loads": "what ran beside the plans of the other conditions, all of them warm",
    "slack": "time left at the answer: to the mode's deadline if chunks are decoded whole, else to the plan's own; "
    "negative = late",
    "misses": "plans with negative slack; miss_ci95 is their Wilson score interval",
    "incomplete": "plans whose answer is no whole chunk that the target has seen (cut, draft tail, last chunk, hold)",
    "stages": "per call, so several per chunk; round = draft to commit behind the prefill",
    "hand_over": "putting a chunk into the actor's buffer and reading the first command",
    "first_ms": "the first plan of a new session",
    "load_ms": "making the session: reading weights, building graph, drafter and controller",
    "period_error": "real-time loop: time between the beginnings of two control steps minus the period, drawing of "
    "pictures left out where it is free; jitter is its magnitude",
    "wait": "real-time loop: from a chunk's being ready until its first command goes out; null where the actor has a "
    "process of its own",
    "realtime": "what was asked of the operating system for the loop, and whether it was granted",
    "quantiles": "nearest rank from HdrHistogram (three significant digits); null where the number of values is too "
    "small to tell it from the extreme one: p99 needs 100, p999 needs 1000; min, max and mean are exact",
    "series": "per plan in the order of time: at_ms since the condition began, chunk_us, slack_us, rounds",
    "tracing": "plans with and without the trace in turns, and the trace's own calls timed",
    "warm_up": "start-up measurements and the first plans of each mode are in cold only",
}


@dataclass(frozen=True, slots=True)
class Series:
    """One value per plan, in the order of time. See `MEANING`."""

    at_ms: tuple[float, ...]
    chunk_us: tuple[int, ...]
    slack_us: tuple[int, ...]
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """One stage of a waterfall. Times in µs since the plan began; ``round`` is -1 outside of rounds."""

    stage: str
    start_us: float
    duration_us: float
    round: int
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Waterfall:
    """One plan, stage by stage.

    Attributes:
        label: why it is here: typical (nearest to the median) or slowest.
        chunk_ms: how long it took; at_ms: when it began, since its condition did.
        rung, reason: of the answer.
        switches: times that the core was taken away meanwhile. faults: pages that had to be provided.
        bars: by time.
    """

    label: str
    chunk_ms: float
    at_ms: float
    rung: str
    reason: str
    switches: int
    faults: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """Recorded observations planned under one condition; see `MEANING`.

    Attributes:
        stages: stage -> per call.
        stage_ms: stage -> mean time in one chunk; adds up to the mean chunk.
    """

    plans: int
    seconds: float
    chunk: Distribution
    slack: Distribution
    misses: int
    miss_rate: float
    miss_ci95: tuple[float, float]
    incomplete: int
    forwards_per_chunk: float | None
    stages: dict[str, Distribution]
    stage_ms: dict[str, float]
    rungs: dict[str, int]
    reasons: dict[str, int]
    switches: int
    faults: int
    series: Series
    waterfalls: tuple[Waterfall, ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """The closed loop in real time; see `MEANING`.

    Attributes:
        jitter: magnitude of period_error.
        late_steps: control steps that began a whole period late or more. hold_steps: those without a plan.
        observe: one look of the robot, drawing included.
        realtime: what was asked of the operating system and what was granted, page faults and context switches; see
            `vla_spec.realtime.report`.
    """

    episodes: int
    successes: int
    steps: int
    period_ms: float
    late_steps: int
    hold_steps: int
    plans: int
    misses: int
    miss_rate: float
    miss_ci95: tuple[float, float]
    incomplete: int
    chunk: Distribution
    slack: Distribution
    period_error: Distribution
    jitter: Distribution
    wait: Distribution | None
    observe: Distribution | None
    rungs: dict[str, int]
    realtime: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModeProfile:
    """One decoding mode. ``conditions``: name in `CONDITIONS` -> what was found; ``loops``: load -> the same."""

    engine: str
    drafter: str
    rule: str
    controller: str
    is_exact: bool
    deadline_ms: float
    load_ms: float | None
    first_ms: float | None
    conditions: dict[str, Condition]
    loops: dict[str, Loop]
    tracing: TracingCost | None
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Profile:
    """All modes of one profile. ``late``: ``count`` = whole chunks, late ones are counted; ``cut`` = real deadlines."""

    modes: dict[str, ModeProfile]
    late: str
    model_hash: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    num_observations: int
    loads: dict[str, str]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()
    command: str = ""
    created: str = ""
    checks: tuple[dict[str, Any], ...] = ()
    comparison: dict[str, Any] | None = None
    meaning: dict[str, str] = field(default_factory=lambda: dict(MEANING))

    def as_json(self) -> dict[str, Any]:
        """Plain values, marked with kind and format."""
        return {"kind": KIND, "format": FORMAT, "vla_spec": __version__, **asdict(self)}


def stamped(profile: Profile, command: str, created: str) -> Profile:
    """With the command line that made it and the time."""
    return replace(profile, command=command, created=created)


def save(profile: Profile, path: Path) -> None:
    """Write the file, whole or not at all."""
    write_json(path, profile.as_json())


def read(path: Path, where: str) -> Profile:
    """A profile from its file, every histogram checked.

    Args:
        path: of a profile.json.
        where: which option named it, for messages.

    Raises:
        BadConfig: missing, cut off, no profile, of another format, or inconsistent.
    """
    where = f"{where} {path}"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{where}: can't be read ({error.strerror}); expected the profile.json of a run") from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 alike
        raise BadConfig(f"{where}: not whole JSON ({error}); the file was cut off or is no profile.json") from error
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise BadConfig(f"{where}: is no profile; expected a profile.json that `vla-spec profile` has written")
    if tree.get("format") != FORMAT:
        raise BadConfig(
            f"{where}: has format {tree.get('format')!r}, this version reads {FORMAT}; measure it again with this one"
        )
    del tree["kind"], tree["format"]
    tree.pop("vla_spec", None)
    try:
        profile: Profile = TypeAdapter(Profile).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise BadConfig(f"{where}: {at}: {first['msg'].lower()}; the file was changed or cut off") from None
    for place, stored in distributions(profile):
        decode(stored, f"{where}: {place}")
    return profile


def distributions(profile: Profile) -> list[tuple[str, Distribution]]:
    """Every distribution in a profile, with its place for messages."""
    found: list[tuple[str, Distribution | None]] = []
    for mode, own in profile.modes.items():
        for name, condition in own.conditions.items():
            at = f"modes.{mode}.conditions.{name}"
            found += [(f"{at}.chunk", condition.chunk), (f"{at}.slack", condition.slack)]
            found += [(f"{at}.stages.{stage}", stored) for stage, stored in condition.stages.items()]
        for name, loop in own.loops.items():
            at = f"modes.{mode}.loops.{name}"
            for kind in ("chunk", "slack", "period_error", "jitter", "wait", "observe"):
                found.append((f"{at}.{kind}", getattr(loop, kind)))
    return [(place, stored) for place, stored in found if stored is not None]


def merge(first: Profile, second: Profile) -> Profile:
    """Two profiles of the same modes and model as one, as if one run had measured both.

    Raises:
        BadConfig: another model, another treatment of late plans, or modes that are configured differently.
    """
    for what, one, another in (
        ("model", first.model_hash, second.model_hash),
        ("late", first.late, second.late),
        ("modes", sorted(first.modes), sorted(second.modes)),
    ):
        if one != another:
            raise BadConfig(f"profiles of different {what} can't be merged: {one} and {another}")
    modes: dict[str, ModeProfile] = {}
    for mode, own in first.modes.items():
        other = second.modes[mode]
        if own.config != other.config:
            raise BadConfig(f"mode {mode} is configured differently in the profiles that are to be merged")
        modes[mode] = replace(
            own,
            conditions=_joined(own.conditions, other.conditions, _merge_condition),
            loops=_joined(own.loops, other.loops, _merge_loop),
            tracing=own.tracing or other.tracing,
        )
    return replace(
        first, modes=modes, seeds=tuple(dict.fromkeys(first.seeds + second.seeds)),
        tasks=tuple(dict.fromkeys(first.tasks + second.tasks)),
        notes=(*first.notes, f"merged with the profile of {second.created}"), checks=(), comparison=None,
    )  # fmt: skip


def _joined(first: dict[str, Any], second: dict[str, Any], join: Any) -> dict[str, Any]:
    names = dict.fromkeys((*first, *second))
    return {
        name: join(first[name], second[name]) if name in first and name in second else first.get(name, second.get(name))
        for name in names
    }


def _merge_condition(first: Condition, second: Condition) -> Condition:
    plans, misses = first.plans + second.plans, first.misses + second.misses
    chunk, slack = merged(first.chunk, second.chunk), merged(first.slack, second.slack)
    interval = wilson_interval(misses, plans)
    assert chunk is not None, f"{plans=}"
    assert slack is not None, f"{plans=}"
    assert interval is not None, f"{plans=}"
    offset_ms = 1e3 * first.seconds
    series = Series(
        (*first.series.at_ms, *(round(at + offset_ms, 3) for at in second.series.at_ms))[:MAX_SERIES],
        (*first.series.chunk_us, *second.series.chunk_us)[:MAX_SERIES],
        (*first.series.slack_us, *second.series.slack_us)[:MAX_SERIES],
        (*first.series.rounds, *second.series.rounds)[:MAX_SERIES],
    )
    stages = _joined(first.stages, second.stages, merged)
    return Condition(
        plans=plans,
        seconds=first.seconds + second.seconds,
        chunk=chunk,
        slack=slack,
        misses=misses,
        miss_rate=misses / plans,
        miss_ci95=interval,
        incomplete=first.incomplete + second.incomplete,
        forwards_per_chunk=_weighted(first.forwards_per_chunk, first.plans, second.forwards_per_chunk, second.plans),
        stages=stages,
        stage_ms={
            stage: _weighted(first.stage_ms.get(stage, 0.0), first.plans, second.stage_ms.get(stage, 0.0), second.plans)
            or 0.0
            for stage in dict.fromkeys((*first.stage_ms, *second.stage_ms))
        },
        rungs=_joined(first.rungs, second.rungs, int.__add__),
        reasons=_joined(first.reasons, second.reasons, int.__add__),
        switches=first.switches + second.switches,
        faults=first.faults + second.faults,
        series=series,
        waterfalls=(*first.waterfalls, *second.waterfalls),
    )


def _merge_loop(first: Loop, second: Loop) -> Loop:
    if first.period_ms != second.period_ms:
        raise BadConfig(f"loops of {first.period_ms} and {second.period_ms} ms a step can't be merged")
    plans, misses = first.plans + second.plans, first.misses + second.misses
    interval = wilson_interval(misses, plans)
    joined: dict[str, Any] = {
        kind: merged(getattr(first, kind), getattr(second, kind))
        for kind in ("chunk", "slack", "period_error", "jitter", "wait", "observe")
    }
    counted = {
        name: getattr(first, name) + getattr(second, name)
        for name in ("episodes", "successes", "steps", "late_steps", "hold_steps", "incomplete")
    }
    assert interval is not None, f"{plans=}"
    return Loop(
        **joined, **counted, period_ms=first.period_ms, plans=plans, misses=misses, miss_rate=misses / plans,
        miss_ci95=interval, rungs=_joined(first.rungs, second.rungs, int.__add__),
        realtime=first.realtime,
    )  # fmt: skip


def _weighted(first: float | None, num_first: int, second: float | None, num_second: int) -> float | None:
    if first is None or second is None:
        return first if second is None else second
    return (first * num_first + second * num_second) / (num_first + num_second)
