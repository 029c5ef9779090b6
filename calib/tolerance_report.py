"""A fitted tolerance for people: two tables, and a plot of success and speed over the cap."""

from __future__ import annotations

import io
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.calib.tolerance import EXACT, ClosedLoopRow, ToleranceFit
from vla_spec.errors import MissingDependency
from vla_spec.results import interval, number, percent, write_text

MM = 1000.0
FIX = "pip install 'vla_spec[report]'"
#: Colour and marker of each way, told apart without colour too.
_STYLE = {"drafted": ("#0072b2", "o", "-"), "used_up": ("#d55e00", "s", "--")}


def print_fit(fit: ToleranceFit, console: Console) -> None:
    """Both curves and what was chosen; lengths in millimetres (or milliradians)."""
    opened = _table(
        "Recorded observations", "cap", "rel.", "most\noff", "rms\noff", "dis-\nplaced", "not\nexact",
        "accept.\nlength", "fwds/\nchunk", "decode\nms p50", "\np99", "times\nfaster",
    )  # fmt: skip
    relative = {max(point.cap): point.relative for point in fit.grid}
    for row in fit.open_loop:
        share = next((relative[cap] for cap in relative if abs(cap - row.cap) < 1e-12), 0.0)
        opened.add_row(
            number(row.cap * MM, 2), number(share, 2), number(max(row.deviation_max) * MM, 2),
            number(max(row.deviation_rms) * MM, 3), number(row.displacement_max * MM, 1),
            percent(row.relaxed_share, 1), number(row.acceptance_length, 2), number(row.forwards_per_chunk, 1),
            number(row.decode_ms_p50), number(row.decode_ms_p99), number(row.speedup_decode, 2),
        )  # fmt: skip
    console.print(opened)
    tasks = list(fit.closed_loop[0].by_task)
    headings = [task.replace("-", "-\n") for task in tasks]
    closed = _table("Closed loop", "way", "cap", "success", "95 % CI", *headings, "steps", "bound", "not\nworse")
    for one in fit.closed_loop:
        closed.add_row(
            one.way.replace("_", " "), number(one.cap * MM, 2), percent(one.success_rate), interval(one.success_ci95),
            *(f"{one.by_task[task][0]}/{one.by_task[task][1]}" for task in tasks), number(one.steps_mean, 0),
            "-" if one.lower_bound is None else f"{100 * one.lower_bound:+.0f} %",
            "-" if one.is_not_worse is None else "yes" if one.is_not_worse else "no",
        )  # fmt: skip
    console.print(closed)
    evidence = fit.fitted.evidence
    chosen = evidence["chosen_cap"]
    console.print(
        "fitted: none; not even the smallest tolerance is shown not to be worse: exact decoding, or more episodes"
        if chosen is None
        else f"fitted: cap {chosen * MM:g} mm, budget {max(fit.fitted.budget) * MM:g} mm, relative "
        f"{fit.fitted.relative:g}",
        highlight=False,
    )
    console.print(
        f"not worse: the one-sided {100 * evidence['confidence']:g} % bound of the paired difference from exact lies "
        f"above -{100 * evidence['margin']:g} %. Lengths in mm.",
        highlight=False,
    )


def write_plot(fit: ToleranceFit, path: Path) -> None:
    """An SVG beside the fitted file.

    Raises:
        MissingDependency: no matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingDependency("matplotlib, which draws the curve,", FIX) from error
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    by_way: dict[str, list[ClosedLoopRow]] = {}
    for row in fit.closed_loop:
        by_way.setdefault(row.way, []).append(row)
    exact = by_way.pop(EXACT)[0]
    margin = fit.fitted.evidence["margin"]
    left.axhline(exact.success_rate or 0.0, color="black", linewidth=1, label=f"exact, n = {exact.episodes}")
    left.axhline((exact.success_rate or 0.0) - margin, color="black", linewidth=1, linestyle=":", label="margin")
    for way, rows in by_way.items():
        colour, marker, line = _STYLE[way]
        caps = [row.cap * MM for row in rows]
        rates = [row.success_rate or 0.0 for row in rows]
        spans = [row.success_ci95 or (0.0, 1.0) for row in rows]
        errors = [[r - s[0] for r, s in zip(rates, spans, strict=True)],
                  [s[1] - r for r, s in zip(rates, spans, strict=True)]]  # fmt: skip
        left.errorbar(caps, rates, yerr=errors, color=colour, marker=marker, linestyle=line, capsize=3,
                      label=way.replace("_", " "))  # fmt: skip
    chosen = fit.fitted.evidence["chosen_cap"]
    if chosen is not None:
        left.axvline(chosen * MM, color="grey", linewidth=1, label="fitted")
    left.set(xscale="log", ylim=(-0.03, 1.03), xlabel="cap per token [mm]", ylabel="success")
    left.legend(fontsize=8, loc="center right")
    shown = fit.open_loop[1:]
    caps = [row.cap * MM for row in shown]
    right.plot(caps, [row.speedup_decode for row in shown], color="#009e73", marker="o", label="decode, times faster")
    right.set(xscale="log", xlabel="cap per token [mm]", ylabel="times faster than exact", ylim=(0, None))
    other = right.twinx()
    other.plot(caps, [max(row.deviation_max) * MM for row in shown], color="#cc79a7", marker="v", linestyle="--")
    other.plot(caps, caps, color="grey", linewidth=1, linestyle=":")
    other.set(yscale="log", ylabel="largest deviation [mm] (dashed)")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.set_xticks(caps, [f"{cap:g}" for cap in caps], fontsize=8)
        axes.minorticks_off()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    write_text(path, text.getvalue())


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
