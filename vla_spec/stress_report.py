"""A stress run for people: tables at the terminal, and one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.errors import MissingDependency
from vla_spec.invariants import INVARIANTS
from vla_spec.report import FIX, TEMPLATES
from vla_spec.results import interval, number, percent, write_text
from vla_spec.stress import MEANING, Details, StressResults, StressRow


def rate(value: float | None) -> str:
    """``0.12 %``; two digits, since a bound of one in a thousand is to be seen."""
    return percent(value, 2)


#: Heading, key of `MEANING`, and what fills the cell.
_COLUMNS: tuple[tuple[str, str, Callable[[StressRow], str]], ...] = (
    ("mode", "", lambda r: r.mode),
    ("violations", "violations", lambda r: str(r.violations)),
    ("late", "deadline_miss_rate", lambda r: rate(r.deadline_miss_rate)),
    ("late where feasible", "late_feasible_rate", lambda r: rate(r.late_feasible_rate)),
    ("late / feasible", "feasible_plans", lambda r: f"{r.late_feasible} / {r.feasible_plans}"),
    ("whole", "complete_rate", lambda r: percent(r.complete_rate, 1)),
    ("tokens / chunk", "verified_tokens_per_chunk", lambda r: number(r.verified_tokens_per_chunk, 2)),
    ("oracle", "oracle_tokens_per_chunk", lambda r: number(r.oracle_tokens_per_chunk, 2)),
    ("of oracle", "oracle_ratio", lambda r: percent(r.oracle_ratio, 1)),
    ("held", "hold_rate", lambda r: percent(r.hold_rate, 1)),
    ("success", "success_rate", lambda r: success(r)),
    ("steps to success", "steps_to_success", lambda r: number(r.steps_to_success)),
)  # fmt: skip


def success(row: StressRow) -> str:
    """``80 % (70-88)``; a dash for a robot without tasks."""
    return "-" if row.success_rate is None else f"{percent(row.success_rate)} ({interval(row.success_ci95)})"


def print_stress(results: StressResults, console: Console) -> None:
    """What the modes got, then what struck them. Fits 80 columns."""
    first = results.rows[0]
    table = _table(
        f"{first.ticks} control steps of {first.period_ms:g} ms, deadline {first.deadline_ms:g} ms",
        "late", "where\nfeasible", "tokens/\nchunk", "of\noracle", "held", "success", "broken",
    )  # fmt: skip
    for row in results.rows:
        table.add_row(
            row.mode, rate(row.deadline_miss_rate), rate(row.late_feasible_rate),
            number(row.verified_tokens_per_chunk, 2), percent(row.oracle_ratio, 1),
            percent(row.hold_rate, 1), percent(row.success_rate), str(row.violations),
        )  # fmt: skip
    console.print(table)
    console.print(_fault_table(results))
    for row in results.rows:
        for example in results.details[row.mode].examples[:3]:
            text = f"{row.mode}, step {example['tick']}: {example['invariant']}: {example['what']}"
            console.print(text, style="red", markup=False, highlight=False)
    for note in results.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _fault_table(results: StressResults) -> Table:
    table = _table("How often each fault struck", *(row.mode for row in results.rows))
    for name in results.faults:
        table.add_row(name, *(str(results.details[row.mode].fired[name]) for row in results.rows))
    return table


def _table(title: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", overflow="fold", min_width=14)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def write_stress_report(results: StressResults, folder: Path) -> Path:
    """Write ``report.html`` into the run's folder, atomically.

    Returns:
        Its path.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingDependency(f"{error.name}, which the report needs,", FIX) from error
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template("stress.html.j2")  # fmt: skip
    environment = results.environment
    details = [(row.mode, results.details[row.mode]) for row in results.rows]
    html: str = template.render(
        css=markupsafe.Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        created=results.created or "not saved",
        command=results.command or "-",
        seed=results.seed,
        machine=f"{environment.get('cpu', 'unknown CPU')}, {environment.get('cores', '?')} cores",
        columns=[(name, MEANING.get(key, "decoding mode")) for name, key, _ in _COLUMNS],
        rows=[[fill(row) for _, _, fill in _COLUMNS] for row in results.rows],
        notes=results.notes,
        modes=[row.mode for row in results.rows],
        tables=[
            ("How often each fault struck", "fault", _counts(details, lambda d: d.fired)),
            ("Late although feasible, by fault that had struck", "fault",
             _counts(details, lambda d: d.late_feasible_by_fault)),
            ("Plans by rung", "rung", _counts(details, lambda d: d.plan_rungs)),
            ("Plans by reason", "reason", _counts(details, lambda d: d.reasons)),
            ("Control steps by rung", "rung", _counts(details, lambda d: d.command_rungs)),
            ("Violations by invariant", "invariant", _counts(details, lambda d: d.violations)),
        ],
        examples=[(mode, example) for mode, of_mode in details for example in of_mode.examples],
        invariants=list(INVARIANTS.items()),
        meaning=list(MEANING.items()),
        faults=[(name, ", ".join(f"{k} {v}" for k, v in values.items())) for name, values in results.faults.items()],
        environment=[(name, str(value)) for name, value in environment.items()],
    )  # fmt: skip
    path = folder / "report.html"
    write_text(path, html)
    return path


def _counts(details: list[tuple[str, Details]], of: Callable[[Details], dict[str, int]]) -> list[list[str]]:
    """One line per name that any mode has, one number per mode."""
    names = list(dict.fromkeys(name for _, of_mode in details for name in of(of_mode)))
    return [[name, *(str(of(of_mode).get(name, 0)) for _, of_mode in details)] for name in names]
