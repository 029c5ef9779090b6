"""The real-time block of a run for people: what was asked for, what was granted, and how regular the ticks were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def print_realtime(realtime: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Two tables; nothing if no mode ran in real time.

    Args:
        realtime: mode -> what `vla_spec.realtime.report` says of it.
        console: where to.
    """
    blocks = {mode: block for mode, block in realtime.items() if block}
    if not blocks:
        return
    grants = _table("What was asked for in real time")
    grants.add_column("asked")
    grants.add_column("granted", overflow="fold")
    seen: dict[tuple[str, str], Mapping[str, Any]] = {}
    for block in blocks.values():
        for grant in block["grants"]:
            key = (grant["role"], grant["what"])
            if key not in seen or seen[key]["granted"]:  # a refusal in any mode is shown
                seen[key] = grant
    for (role, what), grant in seen.items():
        answer = "yes" if grant["granted"] else f"no: {grant['reason']}"
        grants.add_row(f"{role}: {what}", grant["asked"], answer)
    if seen:
        console.print(grants)
    else:
        console.print("real time: nothing was asked of the operating system (--realtime asks)", highlight=False)
    ticks = _table("How regular control steps were", "late p99\nus", "jitter\np50", "p99", "p99.9", "max us")
    costs = _table("Page faults and context switches", "minor\nfaults", "major", "waited", "pushed\naside")
    for mode, block in blocks.items():
        late, jitter = block["cadence"]["lateness_us"], block["cadence"]["jitter_us"]
        where = "own process" if block["is_own_process"] else "thread"
        row = [_number(late.get("p99"))] + [_number(jitter.get(name)) for name in ("p50", "p99", "p99_9", "max")]
        ticks.add_row(f"{mode} ({where})", *row)
        for role, per in (("actor", "step"), ("planner", "plan")):
            usage = block[role]
            if usage:
                names = ("minor_faults", "major_faults", "voluntary_switches", "involuntary_switches")
                rates = [f"{usage[name]['total'] / usage['num_ticks']:.2f}" for name in names]
                costs.add_row(f"{mode}: {role}, per {per}", *rates)
    console.print(ticks)
    console.print(costs)


def _table(title: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold", min_width=14)
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
