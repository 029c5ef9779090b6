"""Pictures of a profile, as inline SVG: percentile curves, slack, time series, stages and waterfalls."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.errors import MissingDependency
from vla_spec.profiling.histograms import FIX, Distribution, curve
from vla_spec.profiling.profile import Condition, Profile, Series, Waterfall
from vla_spec.profiling.stages import BETWEEN, STAGES
from vla_spec.report import Plot

#: Points of one time series at most; longer ones show the longest plan of each stretch.
MAX_POINTS = 800
#: Conditions as lines.
DASHES: dict[str, Any] = {"idle": "-", "busy": (0, (4, 1.5)), "memory": (0, (1.2, 1.2)), "cold": ":"}
#: Shares of the values with a tick of their own on the percentile axis.
_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
#: And as points.
MARKERS = {"idle": ".", "busy": "x", "memory": "+"}
_WIDE, _NORMAL = 12.6, 6.2


def draw_plots(profile: Profile) -> list[Plot]:
    """All pictures that there are numbers for. Small ones first, the waterfalls last.

    Raises:
        MissingDependency: no matplotlib.
    """
    drawn = [
        _figure(lambda axes: _percentiles(axes, _chunks(profile), profile), "chunk-percentiles",
                "Observation-to-chunk latency by percentile; dashed or dotted: loaded; grey: the deadlines."),
        _figure(lambda axes: _slack(axes, profile), "slack",
                "Deadline slack; left of zero: late. Filled: idle, outlined: loaded."),
        _figure(lambda axes: _over_time(axes, profile), "time",
                "Chunk latency in the order of time; crosses: loaded; grey: the deadlines."),
        _figure(lambda axes: _stage_means(axes, profile), "stages",
                "Where the time of a mean chunk goes."),
    ]  # fmt: skip
    if any("cold" in own.conditions for own in profile.modes.values()):
        drawn.append(
            _figure(lambda axes: _cold(axes, profile), "cold",
                    "First plans of a new session; dotted: the warm median.")
        )  # fmt: skip
    loops = [(mode, load, loop) for mode, own in profile.modes.items() for load, loop in own.loops.items()]
    for name, caption in (
        ("jitter", "Real-time loop: deviation of the control period by percentile."),
        ("wait", "Real-time loop: from a chunk's being ready to its first command, by percentile."),
        ("slack", "Real-time loop: answers relative to their deadline, by percentile; above zero: late."),
    ):
        of_kind = [(mode, load, getattr(loop, name)) for mode, load, loop in loops if getattr(loop, name) is not None]
        if of_kind:
            drawn.append(
                _figure(
                    lambda axes, of_kind=of_kind, name=name: _percentiles(axes, of_kind, None, name == "slack"),  # type: ignore[misc]
                    f"loop-{name}", caption,
                )
            )  # fmt: skip
    return drawn


def draw_waterfalls(profile: Profile) -> list[Plot]:
    """One picture per mode: a typical plan and the slowest ones, stage by stage, on one time axis."""
    drawn = []
    for mode, own in profile.modes.items():
        rows = [
            (f"{load}: {fall.label}", fall)
            for load, condition in own.conditions.items()
            if load != "cold"
            for fall in condition.waterfalls
        ]
        if rows:
            drawn.append(
                _figure(
                    lambda axes, rows=rows, own=own: _bars(axes, rows, own.deadline_ms),  # type: ignore[misc]
                    f"waterfall-{mode}",
                    f"{mode}: a typical plan and the slowest ones; dotted: the deadline. Preempted: times that the "
                    f"system took the core away.",
                    (_WIDE, 0.9 + 0.34 * len(rows)),
                )
            )
    return drawn


def _percentiles(
    axes: Any, found: Sequence[tuple[str, str, Distribution]], profile: Profile | None, is_flipped: bool = False
) -> None:
    """Value over 1 / (1 - share) on a logarithmic axis: each tick is ten times rarer than the one before.

    Flipped, small values are the rare ones: minus the value is drawn.
    """
    modes = list(dict.fromkeys(mode for mode, _, _ in found))
    most = 10.0
    for mode, load, stored in found:
        shares, values = curve(stored)
        middle = (np.array([0.0, *shares[:-1]]) + np.array(shares)) / 2  # a value stands for its own step
        if is_flipped:
            middle, values = 1 - middle[::-1], [-value for value in reversed(values)]
        at = 1 / (1 - middle)
        most = max(most, float(at[-1]))
        axes.step(
            at, values, where="mid", label=f"{mode}, {load}", color=_colour(modes.index(mode)), linestyle=DASHES[load],
            linewidth=1.3,
        )  # fmt: skip
    if profile is not None:
        _deadlines(axes.axhline, profile)
    axes.set_xscale("log")
    ticks = [share for share in _TICKS if 1 / (1 - share) <= most * 1.01]
    axes.set_xticks([1 / (1 - share) for share in ticks], [f"{100 * share:.6g} %" for share in ticks])
    axes.minorticks_off()
    axes.set_xlim(1, most * 1.05)
    axes.set_xlabel("percentile")
    axes.set_ylabel("ms")
    if not is_flipped and all(stored.min_ms >= 0 for _, _, stored in found):
        axes.set_ylim(bottom=0)
    else:
        axes.axhline(0, color="#888", linestyle=":", linewidth=1)
    axes.legend(frameon=False, fontsize=8)


def _slack(axes: Any, profile: Profile) -> None:
    series = list(_series(profile))
    values = [np.array(own.slack_us) / 1e3 for _, _, own in series]
    edges = np.histogram_bin_edges(np.concatenate(values), 60)
    modes = list(profile.modes)
    for (mode, load, _), slack in zip(series, values, strict=True):
        shares = np.histogram(slack, edges)[0] / len(slack) * 100
        colour, is_idle = _colour(modes.index(mode)), load == "idle"
        axes.stairs(
            shares, edges, label=f"{mode}, {load}", fill=is_idle, alpha=0.45 if is_idle else 1.0, color=colour,
            linewidth=1.3, linestyle=DASHES[load],
        )  # fmt: skip
    axes.axvline(0, color="#888", linestyle=":", linewidth=1)
    axes.set_xlabel("time left at the deadline [ms]")
    axes.set_ylabel("% of plans")
    axes.legend(frameon=False, fontsize=8)


def _over_time(axes: Any, profile: Profile) -> None:
    modes = list(profile.modes)
    for mode, load, own in _series(profile):
        at, chunk = _thinned(np.array(own.at_ms) / 1e3, np.array(own.chunk_us) / 1e3)
        axes.plot(
            at, chunk, MARKERS[load], markersize=3.5, label=f"{mode}, {load}", markeredgewidth=0.8,
            color=_colour(modes.index(mode)), alpha=0.8,
        )  # fmt: skip
    _deadlines(axes.axhline, profile)
    axes.set_xlabel("since the condition began [s]")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=7, columnspacing=1.0)


def _stage_means(axes: Any, profile: Profile) -> None:
    rows = [
        (f"{mode}, {load}", condition.stage_ms)
        for mode, own in profile.modes.items()
        for load, condition in own.conditions.items()
    ]
    for i, (_, means) in enumerate(rows):
        left = 0.0
        for stage in _shown_stages():
            width = means.get(stage, 0.0)
            axes.barh(i, width, 0.65, left=left, color=_stage_colour(stage), label=stage if i == 0 else None)
            left += width
        axes.text(left, i, f" {left:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms per chunk")
    axes.grid(axis="y", visible=False)
    _stage_legend(axes)


def _cold(axes: Any, profile: Profile) -> None:
    modes = list(profile.modes)
    longest = 1
    for mode, own in profile.modes.items():
        if "cold" not in own.conditions:
            continue
        chunk = np.array(own.conditions["cold"].series.chunk_us) / 1e3
        longest = max(longest, len(chunk))
        colour = _colour(modes.index(mode))
        axes.plot(np.arange(1, len(chunk) + 1), chunk, marker="o", markersize=3.5, label=mode, color=colour)
        warm = next((c for load, c in own.conditions.items() if load != "cold"), None)
        if warm is not None and warm.chunk.p50_ms is not None:
            axes.axhline(warm.chunk.p50_ms, color=colour, linestyle=":", linewidth=1)
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlabel("plan since the session was made")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, rows: Sequence[tuple[str, Waterfall]], deadline_ms: float) -> None:
    for i, (_, fall) in enumerate(rows):
        end = 1e3 * fall.chunk_ms
        axes.broken_barh([(0.0, end / 1e3)], (i - 0.35, 0.7), color=_stage_colour(BETWEEN), linewidth=0)
        for stage in STAGES:  # one collection per stage: a plan of 32 rounds has 130 bars
            spans = [(bar.start_us / 1e3, bar.duration_us / 1e3) for bar in fall.bars if bar.stage == stage]
            if spans and stage != "hand_over":
                axes.broken_barh(spans, (i - 0.35, 0.7), color=_stage_colour(stage), linewidth=0)
        for bar in fall.bars:
            if bar.stage == "step" and bar.drafted:
                axes.text(
                    (bar.start_us + bar.duration_us / 2) / 1e3, i, str(bar.accepted), ha="center", va="center",
                    fontsize=6, color="white", clip_on=True,
                )  # fmt: skip
        said = f" {fall.chunk_ms:.1f} ms"
        said += f", preempted {fall.switches}×" if fall.switches else ""
        said += f", {fall.faults} page faults" if fall.faults else ""
        axes.text(end / 1e3, i, said, va="center", fontsize=7)
    axes.axvline(deadline_ms, color="#555", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(deadline_ms, *(fall.chunk_ms for _, fall in rows)))
    axes.margins(y=0.02)
    axes.set_xlabel("ms since the observation was handed over; numbers in steps: accepted tokens")
    axes.grid(axis="y", visible=False)
    _stage_legend(axes)


def _chunks(profile: Profile) -> list[tuple[str, str, Distribution]]:
    return [(mode, load, condition.chunk) for mode, load, condition in _warm(profile)]


def _series(profile: Profile) -> Iterator[tuple[str, str, Series]]:
    for mode, load, condition in _warm(profile):
        yield mode, load, condition.series


def _warm(profile: Profile) -> Iterator[tuple[str, str, Condition]]:
    for mode, own in profile.modes.items():
        for load, condition in own.conditions.items():
            if load != "cold":
                yield mode, load, condition


def _deadlines(line: Callable[..., Any], profile: Profile) -> None:
    for deadline in sorted({own.deadline_ms for own in profile.modes.values()}):
        line(deadline, color="#888", linestyle=":", linewidth=1)


def _thinned(
    at: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The largest value of each stretch, so that no slow plan disappears."""
    if len(values) <= MAX_POINTS:
        return at, values
    kept = [part[values[part].argmax()] for part in np.array_split(np.arange(len(values)), MAX_POINTS)]
    return at[kept], values[kept]


def _shown_stages() -> list[str]:
    return [stage for stage in (*STAGES, BETWEEN) if stage != "hand_over"]


def _stage_legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_stage_colour(stage), label=stage) for stage in _shown_stages()]
    axes.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False, fontsize=7,
        handlelength=1.0, columnspacing=1.0, handletextpad=0.4,
    )  # fmt: skip


def _figure(draw: Callable[[Any], None], salt: str, caption: str, size: tuple[float, float] = (_NORMAL, 3.6)) -> Plot:
    """One plot as inline SVG without references to anything outside; the same input gives the same text."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib, which the page of a profile needs,", FIX) from error
    style = {"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#ddd", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return Plot(text[text.index("<svg") :], caption)


def _colour(index: int) -> str:
    """A palette that colour-blind readers can tell apart. Source: Okabe & Ito 2008."""
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
    return palette[index % len(palette)]


def _stage_colour(stage: str) -> str:
    return {
        "encode": "#7fc8f8", "begin": "#f2c14e", "prefill": "#1b6ca8", "draft": "#e8871e", "step": "#2a9d8f",
        "judge": "#8e5ea2", "commit": "#c45ab3", "tail": "#d1495b", BETWEEN: "#bbbbbb",
    }.get(stage, "#000000")  # fmt: skip
