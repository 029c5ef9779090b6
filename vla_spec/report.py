"""A run as one self-contained HTML file: table, plots, moving pictures. Nothing is loaded from anywhere else."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from vla_spec.errors import MissingDependency
from vla_spec.results import MEANING, Film, Results, Row, interval, number, percent, write_text

TEMPLATES = Path(__file__).parent / "templates"
#: Width of one film in the report. [px]
FILM_WIDTH = 288
#: Frames of one film at most; longer episodes are thinned out.
MAX_FRAMES = 60
#: A film shows at this multiple of the robot's own speed.
FILM_SPEED = 1.0
#: Modes in one plot at most: the baseline and the fastest.
MAX_MODES = 8
FIX = "pip install 'vla_spec[report]'"


class Column(NamedTuple):
    """One column of the table: heading, what it means, how a row fills it."""

    name: str
    meaning: str
    cell: Callable[[Row], str]


COLUMNS = (
    Column("mode", "decoding mode", lambda r: r.mode),
    Column("drafter", "what proposes tokens", lambda r: r.drafter),
    Column("rule", "what accepts them", lambda r: r.rule + (" (exact)" if r.is_exact else "")),
    Column("success", "share of episodes", lambda r: percent(r.success_rate)),
    Column("95 % CI", MEANING["success_ci95"], lambda r: interval(r.success_ci95)),
    Column("episodes", "in closed loop", lambda r: str(r.episodes)),
    Column("chunk ms p50", MEANING["chunk_ms"], lambda r: number(r.chunk_ms_p50)),
    Column("p90", MEANING["chunk_ms"], lambda r: number(r.chunk_ms_p90)),
    Column("p99", MEANING["chunk_ms"], lambda r: number(r.chunk_ms_p99)),
    Column("max", MEANING["chunk_ms"], lambda r: number(r.chunk_ms_max)),
    Column("decode ms p50", MEANING["decode_ms"], lambda r: number(r.decode_ms_p50)),
    Column("speed-up decode", MEANING["speedup_decode"], lambda r: number(r.speedup_decode, 2)),
    Column("speed-up chunk", MEANING["speedup_chunk"], lambda r: number(r.speedup_chunk, 2)),
    Column("tokens / forward", MEANING["tokens_per_forward"], lambda r: number(r.tokens_per_forward, 2)),
    Column("acceptance length", MEANING["acceptance_length"], lambda r: number(r.acceptance_length, 2)),
    Column("forwards / chunk", MEANING["forwards_per_chunk"], lambda r: number(r.forwards_per_chunk)),
    Column("× limit", MEANING["limit_ratio"], lambda r: number(r.limit_ratio, 2)),
    Column("host overhead", MEANING["host_overhead_ratio"], lambda r: percent(r.host_overhead_ratio, 1)),
    Column("deadline ms", "time that a plan may take", lambda r: f"{r.deadline_ms:g}"),
    Column("missed", MEANING["deadline_miss_rate"], lambda r: percent(r.deadline_miss_rate, 1)),
    Column("without plan", "control steps on which the robot held", lambda r: percent(r.hold_rate, 1)),
    Column("agreement", MEANING["token_agreement"], lambda r: percent(r.token_agreement, 1)),
    Column("max deviation", MEANING["max_deviation"], lambda r: number(r.max_deviation, 4)),
)


class Plot(NamedTuple):
    """An inline picture with its caption."""

    svg: Any
    caption: str


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.html`` into the run's folder, atomically.

    Returns:
        Its path.

    Raises:
        MissingDependency: a library that draws is not installed.
    """
    path = folder / "report.html"
    write_text(path, render(results))
    return path


def render(results: Results) -> str:
    """The whole report as HTML."""
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingDependency(f"{error.name}, which the report needs,", FIX) from error
    plots = [Plot(markupsafe.Markup(plot.svg), plot.caption) for plot in draw_plots(results)]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip
    seeds = results.seeds
    environment = results.environment
    html: str = template.render(
        title=f"vla-spec {results.kind}",
        css=markupsafe.Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        created=results.created or "not saved",
        command=results.command or "-",
        seeds=f"seeds {seeds[0]}–{seeds[-1]}" if seeds else "no seeds",
        num_tasks=f"{len(results.tasks)} task" + ("" if len(results.tasks) == 1 else "s"),
        model=results.model_hash[:16],
        machine=f"{environment.get('cpu', 'unknown CPU')}, {environment.get('cores', '?')} cores",
        columns=COLUMNS,
        rows=[[column.cell(row) for column in COLUMNS] for row in results.rows],
        notes=results.notes,
        plots=plots,
        films=[_film_tree(film) for film in results.films],
        task_modes=[row.mode for row in results.rows if row.episodes],
        tasks=_task_table(results),
        meaning=list(MEANING.items()),
        environment=[(name, _flat(value)) for name, value in environment.items()],
        configs=[(mode, yaml.safe_dump(tree, sort_keys=False)) for mode, tree in results.configs.items()],
    )
    return html


def draw_plots(results: Results) -> list[Plot]:
    """Latency, percentiles, acceptance, success and slack, as far as there are numbers for them."""
    rows = _shown(results.rows)
    modes = [row.mode for row in rows]
    left_out = len(results.rows) - len(rows)
    suffix = f" The fastest {len(rows)} of {len(results.rows)} modes." if left_out else ""
    drawn = []
    series = results.series
    deadline = rows[0].deadline_ms if rows else None

    def cumulative(axes: Any, of: Callable[[str], Sequence[float]]) -> None:
        for i, mode in enumerate(modes):
            if len(of(mode)):
                axes.plot(of(mode), np.linspace(0, 100, len(of(mode))), label=mode, color=_colour(i))
        axes.set_ylabel("% of chunks")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False, fontsize=8)

    if any(series[m].chunk_ms for m in modes if m in series):

        def latency(axes: Any) -> None:
            cumulative(axes, lambda mode: series[mode].chunk_ms)
            axes.axvline(deadline, color="#888", linestyle=":", linewidth=1)
            axes.set_xlabel("observation to chunk [ms]")
            axes.set_xlim(left=0)

        drawn.append(_figure(latency, "Observation-to-chunk latency; dotted: the deadline." + suffix))

        def tail(axes: Any) -> None:
            names = ("chunk_ms_p50", "chunk_ms_p90", "chunk_ms_p99", "chunk_ms_max")
            width = 0.8 / len(names)
            for j, name in enumerate(names):
                heights = [getattr(row, name) or 0.0 for row in rows]
                at = np.arange(len(rows)) + (j - 1.5) * width
                axes.bar(at, heights, width, label=name.removeprefix("chunk_ms_"), color=_shade(j))
            axes.axhline(deadline, color="#888", linestyle=":", linewidth=1)
            _name_ticks(axes, modes)
            axes.set_ylabel("observation to chunk [ms]")
            axes.legend(frameon=False, fontsize=8)

        drawn.append(_figure(tail, "The same as percentiles." + suffix))
    if any(row.acceptance_length is not None for row in rows):

        def acceptance(axes: Any) -> None:
            axes.bar(range(len(rows)), [row.acceptance_length or 0.0 for row in rows], 0.6, color=_colour(0))
            for i, row in enumerate(rows):
                if row.speedup_decode is not None and row.acceptance_length is not None:
                    axes.annotate(f"{row.speedup_decode:.2f}×", (i, row.acceptance_length), ha="center", va="bottom")
            axes.set_ylabel("tokens per verified round")
            _name_ticks(axes, modes)

        drawn.append(_figure(acceptance, "Acceptance length with the bonus token; above: decode speed-up." + suffix))
    scored = [row for row in results.rows if row.success_rate is not None and row.success_ci95 is not None]
    if scored:

        def success(axes: Any) -> None:
            for i, row in enumerate(scored):
                rate, (low, high) = row.success_rate or 0.0, row.success_ci95 or (0.0, 1.0)
                error = [[100 * (rate - low)], [100 * (high - rate)]]
                axes.errorbar(i, 100 * rate, yerr=np.maximum(error, 0), fmt="o", capsize=5, color=_colour(0))
            axes.set_ylim(0, 102)
            axes.set_ylabel("success [%]")
            _name_ticks(axes, [row.mode for row in scored])

        drawn.append(_figure(success, "Success in closed loop with its 95 % Wilson interval."))
    if any(series[m].slack_ms for m in modes if m in series):

        def slack(axes: Any) -> None:
            cumulative(axes, lambda mode: series[mode].slack_ms)
            axes.axvline(0, color="#888", linestyle=":", linewidth=1)
            axes.set_xlabel("time left at the chunk's deadline [ms]")

        drawn.append(_figure(slack, "Deadline slack; left of zero: late." + suffix))
    if any(len(series[m].accepted) > 1 for m in modes if m in series):

        def accepted(axes: Any) -> None:
            for i, mode in enumerate(modes):
                counts = np.array(series[mode].accepted, float)
                if len(counts) > 1:
                    axes.plot(100 * counts / counts.sum(), marker=".", label=mode, color=_colour(i))
            axes.set_xlabel("drafted tokens accepted in a round")
            axes.set_ylabel("% of rounds")
            axes.legend(frameon=False, fontsize=8)

        drawn.append(_figure(accepted, "How many drafted tokens a round accepts." + suffix))
    return drawn


def film_data(film: Film) -> str:
    """An animated WebP (GIF where Pillow has none) as a data URI.

    Raises:
        MissingDependency: no Pillow.
    """
    try:
        from PIL import Image, features
    except ImportError as error:
        raise MissingDependency("Pillow, which the report needs,", FIX) from error
    step = -(-len(film.frames) // MAX_FRAMES)
    frames = film.frames[::step]
    size = FILM_WIDTH, round(FILM_WIDTH * frames.shape[1] / frames.shape[2])
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    duration_ms = max(20, round(1000 * film.frame_s * step / FILM_SPEED))
    durations = [duration_ms] * (len(pictures) - 1) + [1500]  # rest on the last picture
    kind = "WEBP" if features.check("webp") else "GIF"
    buffer = io.BytesIO()
    options = {"quality": 60, "method": 3} if kind == "WEBP" else {}
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _film_tree(film: Film) -> dict[str, Any]:
    height = round(FILM_WIDTH * film.frames.shape[1] / film.frames.shape[2])
    caption = f"{film.task}, {film.mode}, seed {film.seed}"
    return {
        "data": film_data(film), "caption": caption, "success": film.success, "width": FILM_WIDTH, "height": height
    }  # fmt: skip


def _task_table(results: Results) -> list[dict[str, Any]]:
    modes = [row.mode for row in results.rows if row.episodes]
    scores = {(score.task, score.mode): score for score in results.scores}
    if not scores:
        return []
    table = []
    for task in results.tasks:
        found = [scores.get((task, mode)) for mode in modes]
        table.append({"name": task, "cells": [f"{s.successes} / {s.episodes}" if s else "-" for s in found]})
    return table


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The first row (the baseline) and the fastest of the rest, in their own order."""
    if len(rows) <= MAX_MODES:
        return list(rows)
    fastest = sorted(rows[1:], key=lambda row: -(row.speedup_decode or 0.0))[: MAX_MODES - 1]
    return [rows[0], *(row for row in rows[1:] if row in fastest)]


def _figure(draw: Callable[[Any], None], caption: str) -> Plot:
    """One plot as inline SVG without references to anything outside."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib, which the report needs,", FIX) from error
    style = {"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": caption}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#ddd", linewidth=0.6)
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return Plot(text[text.index("<svg") :], caption)


def _name_ticks(axes: Any, names: Sequence[str]) -> None:
    is_long = len(names) > 4 or max(map(len, names), default=0) > 14
    axes.set_xticks(range(len(names)), names, rotation=25 if is_long else 0, ha="right" if is_long else "center")


def _colour(index: int) -> str:
    """A palette that colour-blind readers can tell apart. Source: Okabe & Ito 2008."""
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
    return palette[index % len(palette)]


def _shade(index: int) -> str:
    return ("#08519c", "#3182bd", "#6baed6", "#bdd7e7")[index % 4]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
