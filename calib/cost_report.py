"""Cost tables for people: one line per kind of call, the loads side by side."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.calib.cost_file import CostFile, Distribution, EngineTable

#: Columns under every load: heading -> level, None = the largest.
COLUMNS: dict[str, float | None] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": None}
NS_PER_MS = 1_000_000


def print_costs(file: CostFile, console: Console) -> None:
    """One table per engine, times in ms, then what should be known about them."""
    for tables in _by_engine(file.tables):
        engine = tables[0].engine
        title = f"{engine.name} {engine.precision}, {engine.provider}, {engine.num_threads} thread(s), ms"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", overflow="fold", min_width=8)
        for of_load in tables:
            for i, heading in enumerate(COLUMNS):
                load = of_load.load.key if i == 0 else ""
                table.add_column(f"{load}\n{heading}", justify="right", no_wrap=True)
        rows = [of_load.distributions() for of_load in tables]
        drafters = tables[0].drafters
        for name in rows[0]:
            costs = [row.get(name) for row in rows]
            label = name.replace(drafters[0].drafter.name, "draft") if len(drafters) == 1 else name
            table.add_row(label, *(cell for cost in costs for cell in _cells(cost)))
        console.print(table)
        for of_load in tables:
            console.print(_about(of_load), highlight=False, markup=False)
        for column in tables[0].drafters:
            console.print(f"{', '.join(column.modes) or 'drafting'}: {column.drafter}", highlight=False, markup=False)
    for note in (file.label, *file.notes):
        console.print(f"note: {note}", highlight=False, markup=False)


def _by_engine(tables: Iterable[EngineTable]) -> list[list[EngineTable]]:
    groups: dict[str, list[EngineTable]] = {}
    for table in tables:
        groups.setdefault(table.engine.model_dump_json(), []).append(table)
    return list(groups.values())


def _cells(cost: Distribution | None) -> list[str]:
    if cost is None:
        return ["-"] * len(COLUMNS)
    values = [cost.max if level is None else cost.quantiles.get(level) for level in COLUMNS.values()]
    return ["-" if ns is None else _ms(ns) for ns in values]


def _ms(ns: float) -> str:
    """Three digits that count, as far as they mean anything."""
    ms = ns / NS_PER_MS
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _about(table: EngineTable) -> str:
    """Samples, warm-up and first calls of one load."""
    n = table.prefill.n
    text = f"{table.load.key}: {table.load.description}"
    if n is None:
        return text
    text += f"; n = {n} behind {table.prefill.warm_up} of warm-up"
    if table.prefill.first_call is not None and table.step[1].first_call is not None:
        text += f"; first prefill {_ms(table.prefill.first_call)} ms, first step {_ms(table.step[1].first_call)} ms"
    if table.load.other_cores is not None:
        text += f"; other processes {table.load.other_cores:g} cores"
    return text
