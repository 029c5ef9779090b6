"""A profile in words and rows: what the terminal prints and the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.profiling.comparison import ProfileComparison
from vla_spec.profiling.constraints import Check
from vla_spec.profiling.histograms import Distribution
from vla_spec.profiling.profile import Profile
from vla_spec.profiling.stages import ROUND, STAGES
from vla_spec.profiling.tracing_cost import TracingCost

RANKS = ("p50", "p90", "p99", "p999")
RANK_NAMES = ("p50", "p90", "p99", "p99.9")


class Rows(NamedTuple):
    """One table: a title, what it shows, headings (the first ``num_names`` are names), rows of text."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_names: int = 2


def latency_table(profile: Profile) -> Rows:
    """Chunk latency of every mode and condition."""
    rows = []
    for mode, own in profile.modes.items():
        for load, c in own.conditions.items():
            forwards = "-" if c.forwards_per_chunk is None else f"{c.forwards_per_chunk:.1f}"
            rows.append((mode, load, str(c.plans), *spread(c.chunk), forwards))
    about = (
        "observation to chunk [ms]; fwds: target forwards of a chunk; a dash: too few plans to tell that percentile "
        "from the slowest plan"
    )
    return Rows("Chunk latency", about, ("mode", "load", "plans", *RANK_NAMES, "max", "fwds"), rows)


def deadline_table(profile: Profile) -> Rows:
    """What came late, and how much time was left."""
    rows = []
    for mode, own in profile.modes.items():
        for load, c in own.conditions.items():
            rows.append((
                mode, load, f"{own.deadline_ms:g}", rate(c.miss_rate), interval(c.miss_ci95), _ms(c.slack.p50_ms),
                _ms(c.slack.p1_ms), _ms(c.slack.min_ms), rate(c.incomplete / c.plans),
            ))  # fmt: skip
    columns = ("mode", "load", "due", "late", "95 % CI", "slack\np50", "p1", "least", "cut")
    about = (
        "due: the deadline; late: answers after it; slack: time left at the deadline [ms]; cut: answers that are no "
        "whole chunk seen by the target"
    )
    return Rows("Deadlines", about, columns, rows)


def stage_table(profile: Profile, condition: str) -> Rows:
    """Every stage of every mode under one condition, per call."""
    rows = []
    for mode, own in profile.modes.items():
        if condition not in own.conditions:
            continue
        stages = own.conditions[condition].stages
        for stage in (*STAGES, ROUND):
            if stage in stages:
                rows.append((mode, stage, str(stages[stage].n), *spread(stages[stage], 3)))
    about = "per call [ms]; round: draft to commit behind the prefill; hand_over: into the actor's buffer and out again"
    return Rows(f"Stages, {condition}", about, ("mode", "stage", "calls", *RANK_NAMES, "max"), rows)


def cold_table(profile: Profile) -> Rows:
    """What a new session costs."""
    rows = []
    for mode, own in profile.modes.items():
        if own.load_ms is not None and own.first_ms is not None and "cold" in own.conditions:
            chunk_us = own.conditions["cold"].series.chunk_us
            warm = next((c.chunk.p50_ms for load, c in own.conditions.items() if load != "cold"), None)
            rows.append((
                mode, _ms(own.load_ms), _ms(own.first_ms), " ".join(f"{us / 1e3:.1f}" for us in chunk_us[1:8]) or "-",
                _ms(warm),
            ))  # fmt: skip
    about = "in this process, libraries loaded and weights in the file cache [ms]"
    return Rows("Cold start", about, ("mode", "session", "first plan", "plans after it", "warm p50"), rows, 1)


def period_table(profile: Profile) -> Rows:
    """How regular the actor's commands were in the real-time loop."""
    rows = [
        (mode, load, str(loop.steps), f"{loop.period_ms:g}", *spread(loop.jitter, 2), str(loop.late_steps))
        for mode, own in profile.modes.items()
        for load, loop in own.loops.items()
    ]
    columns = ("mode", "load", "steps", "period", *RANK_NAMES, "max", "late")
    about = (
        "jitter by percentile: |time between two steps - period| [ms]; late: steps that began a whole period behind or "
        "more"
    )
    return Rows("Real-time loop: jitter of the control period", about, columns, rows)


def loop_table(profile: Profile) -> Rows:
    """The plans of the real-time loop."""
    rows = []
    for mode, own in profile.modes.items():
        for load, loop in own.loops.items():
            rows.append((
                mode, load, str(loop.plans), _ms(loop.chunk.p50_ms), _ms(loop.chunk.p99_ms), rate(loop.miss_rate),
                interval(loop.miss_ci95), _ms(loop.wait.p50_ms if loop.wait else None),
                rate(loop.hold_steps / loop.steps), f"{loop.successes}/{loop.episodes}",
            ))  # fmt: skip
    columns = ("mode", "load", "plans", "p50", "p99", "late", "95 % CI", "wait", "holds", "ok")
    about = (
        "chunk latency [ms], late against the mode's deadline; wait: from ready to the first command, median [ms]; "
        "holds: steps without a plan; ok: episodes that solved their task"
    )
    return Rows("Real-time loop: plans", about, columns, rows)


def grant_table(profile: Profile) -> Rows:
    """What the loop asked of the operating system, refusals of any mode first."""
    seen: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for own in profile.modes.values():
        for load, loop in own.loops.items():
            for grant in loop.realtime.get("grants", ()):
                answer = "yes" if grant["granted"] else f"no: {grant['reason']}"
                key = (load, grant["role"], grant["what"])
                if key not in seen or seen[key][-1] == "yes":
                    seen[key] = (f"{grant['role']}: {grant['what']}", load, grant["asked"], answer)
    return Rows("Real-time loop: asked for", "", ("what", "load", "asked", "granted"), tuple(seen.values()))


def tracing_table(profile: Profile) -> Rows:
    """What measuring costs."""
    rows = [(mode, *_tracing(own.tracing)) for mode, own in profile.modes.items() if own.tracing is not None]
    columns = ("mode", "pairs", "with -\nwithout", "95 % CI", "of plan", "record", "of\nround", "with\nstamps")
    about = (
        "plans with and without the trace in turns, median difference [us] (its interval is the plans' own noise); "
        "record: Trace.record of one plan [us], as a share of a round, and with the clock readings, which controllers "
        "need anyway"
    )
    return Rows("What tracing costs", about, columns, rows, 1)


def check_table(checks: Sequence[Check]) -> Rows:
    """Constraints, with pass or fail."""
    rows = [
        (
            check.constraint, check.mode or "-", check.condition or "-",
            "-" if check.value is None else f"{check.value:.6g}", "pass" if check.passed else "FAIL", check.note,
        )
        for check in checks
    ]  # fmt: skip
    return Rows("Constraints", "", ("constraint", "mode", "load", "found", "result", "note"), rows, 3)


def change_table(compared: ProfileComparison) -> Rows:
    """Old beside new."""
    rows = []
    for change in compared.changes:
        if change.name == "miss_rate":
            old, new = rate(change.old), rate(change.new)
            between = (
                "-" if change.interval is None else f"{100 * change.interval[0]:+.1f}..{100 * change.interval[1]:+.1f}"
            )
        else:
            old, new = f"{change.old:.4g}", f"{change.new:.4g}"
            between = "-" if change.interval is None else f"{change.interval[0]:.3f}..{change.interval[1]:.3f}"
        ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
        name = change.name.removesuffix("_ms")
        rows.append((f"{change.mode}.{change.condition}", name, change.verdict, old, new, ratio, between))
    about = f"times in ms; old: {compared.old_created or 'unknown time'}; {compared.statement}"
    return Rows(
        "Compared with the old profile", about, ("mode", "number", "verdict", "old", "new", "ratio", "99 %"), rows,
    )  # fmt: skip


def main_tables(profile: Profile) -> list[Rows]:
    """All but stages and verdicts; some may be empty."""
    makers = latency_table, deadline_table, cold_table, period_table, loop_table, grant_table, tracing_table
    return [make(profile) for make in makers]


def print_tables(
    profile: Profile, checks: Sequence[Check], compared: ProfileComparison | None, console: Console
) -> None:
    """What a person wants to see first; the page has the rest."""
    tables = [*main_tables(profile), *(stage_table(profile, name) for name in list(profile.loads)[:1])]
    tables += [check_table(checks)]
    tables += [change_table(compared)] if compared is not None else []
    for table in tables:
        if table.rows:
            _print(table, console)
    for note in profile.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for warning in compared.warnings if compared is not None else ():
        console.print(f"warning: {warning}", highlight=False, markup=False)


def spread(stored: Distribution | None, digits: int = 1) -> tuple[str, ...]:
    """p50, p90, p99, p99.9 and the maximum; a dash where there are too few values."""
    if stored is None:
        return ("-",) * (len(RANKS) + 1)
    return (*(_ms(getattr(stored, f"{rank}_ms"), digits) for rank in RANKS), _ms(stored.max_ms, digits))


def rate(value: float) -> str:
    """``0.5 %``."""
    return f"{100 * value:.1f} %" if value < 0.9995 else "100 %"


def interval(value: tuple[float, float]) -> str:
    """``0.0-1.9``, in percent."""
    return f"{100 * value[0]:.1f}-{100 * value[1]:.1f}"


def _tracing(cost: TracingCost) -> tuple[str, ...]:
    low, high = cost.difference_ci95_us
    rounds = [cost.percent_of_round, cost.percent_of_round_with_stamps]
    return (
        str(cost.pairs), f"{cost.difference_us:+.0f}", f"{low:+.0f}..{high:+.0f}",
        f"{cost.difference_percent_of_plan:+.2f} %", f"{cost.record_us:.1f}",
        *("-" if share is None else f"{share:.2f} %" for share in rounds),
    )  # fmt: skip


def _ms(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print(table: Rows, console: Console) -> None:
    shown = Table(title=table.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(table.columns):
        is_name = i < table.num_names
        # Names may fold where they are very long, numbers may not.
        width = min(18, max(len(row[i]) for row in table.rows)) if is_name else None
        shown.add_column(
            name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold", min_width=width
        )
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown, markup=False)
    if table.about:
        console.print(table.about, highlight=False, markup=False, style="dim")
