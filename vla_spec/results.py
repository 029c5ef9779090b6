"""What a run found: rows, one per decoding mode, beside everything that is needed to read or repeat them.

Files are written atomically: results.json is whole or not there. A statistic over nothing is null, never 0.
"""

from __future__ import annotations

import datetime
import math
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec import __version__, doctor
from vla_spec.atomic import replacing
from vla_spec.errors import BadConfig
from vla_spec.trace import write_json
from vla_spec.types import UInt8

#: Version of the layout of results.json.
FORMAT = 1
#: Where runs go if nothing else is said.
RUNS_DIR = Path("runs")
#: What every number means; saved with them, so that nobody has to guess.
MEANING = {
    "chunk_ms": "from an observation in hand to its action chunk: encoding, prefill, decoding, un-normalising",
    "decode_ms": "the part of it behind the prefill",
    "tokens_per_forward": "decoded tokens / target forwards, prefill included in both",
    "acceptance_length": "mean of accepted + 1 (the recovered or bonus token) over rounds behind the prefill",
    "forwards_per_chunk": "mean target forwards of a chunk, prefill included",
    "speedup_decode": "median decode_ms of autoregression / median decode_ms, same engine and process",
    "speedup_chunk": "the same for chunk_ms",
    "limit_ratio": "median chunk_ms / median of (one prefill + one forward over the whole chunk), on the same recorded "
    "observations, measured in turn with the plans (against start-up medians where nothing was recorded)",
    "host_overhead_ratio": "median time of a round that is no call of the engine (step, commit) or of a drafter's "
    "model / median single-token forward, measured likewise",
    "deadline_miss_rate": "share of plans whose complete chunk was not ready deadline_ms after planning began "
    "(with the clock real or virtual: after the observation was due)",
    "token_agreement": "share of tokens equal to autoregression's on the same recorded observations and history",
    "max_deviation": "largest distance of an accepted token from the target's own choice, in the physical unit of the "
    "tokenizer (metres for the shipped policy)",
    "success_ci95": "Wilson score interval",
    "realtime": "per mode, clock real: what was asked of the operating system and whether it was granted; lateness and "
    "jitter of control steps, page faults and context switches per step of the actor and per plan of the planner, the "
    "plan before the first step left out",
    "warm_up": "start-up measurements and the first plans of each mode are left out of every number",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One decoding mode. Times in ms; see `MEANING`. None = was not measured."""

    mode: str
    engine: str
    drafter: str
    rule: str
    controller: str
    is_exact: bool
    episodes: int
    success_rate: float | None
    success_ci95: tuple[float, float] | None
    chunks: int
    chunk_ms_p50: float | None
    chunk_ms_p90: float | None
    chunk_ms_p99: float | None
    chunk_ms_max: float | None
    decode_ms_p50: float | None
    decode_ms_p99: float | None
    prefill_ms_p50: float | None
    tokens_per_forward: float | None
    acceptance_length: float | None
    forwards_per_chunk: float | None
    speedup_decode: float | None
    speedup_chunk: float | None
    limit_ratio: float | None
    host_overhead_ratio: float | None
    deadline_ms: float
    deadline_miss_rate: float | None
    token_agreement: float | None
    max_deviation: float | None
    max_action_difference: float | None = None
    hold_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Distributions behind a row, for plots.

    Attributes:
        chunk_ms, decode_ms, slack_ms: percentiles 0, 1, ... 100; empty = nothing was measured.
        accepted: accepted[i] = rounds behind the prefill that accepted i drafted tokens.
    """

    chunk_ms: tuple[float, ...] = ()
    decode_ms: tuple[float, ...] = ()
    slack_ms: tuple[float, ...] = ()
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Success of one mode on one task."""

    mode: str
    task: str
    episodes: int
    successes: int


@dataclass(frozen=True, slots=True)
class Film:
    """Pictures of one episode, in order. Not part of results.json.

    Attributes:
        frames: uint8 [n, h, w, 3].
        frame_s: time between two frames as the robot lived it. [s]
    """

    mode: str
    task: str
    seed: int
    success: bool
    frames: UInt8
    frame_s: float


@dataclass(frozen=True, slots=True)
class Results:
    """One run. ``films`` stay in memory; the rest is results.json."""

    kind: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    model_hash: str
    series: dict[str, Series] = field(default_factory=dict)
    scores: tuple[TaskScore, ...] = ()
    episodes: tuple[dict[str, Any], ...] = ()
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    realtime: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    films: tuple[Film, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values, films left out."""
        tree = asdict(replace(self, films=()))
        del tree["films"]
        return {"format": FORMAT, "vla_spec": __version__, **tree, "meaning": MEANING}


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float] | None:
    """95 % confidence interval of a success rate; None without trials.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if trials == 0:
        return None
    share, z2 = successes / trials, z * z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def environment(num_threads: int) -> dict[str, Any]:
    """Where and with what a run was made."""
    libraries = {name: version for name in doctor.LIBRARIES if (version := doctor.version_of(name))}
    return {
        **doctor.machine(),
        "libraries": libraries,
        "providers": list(doctor.onnxruntime_providers()),
        "num_threads": num_threads,
        "load_average": round(os.getloadavg()[0], 2) if sys.platform != "win32" else None,
        "gl": os.environ.get("MUJOCO_GL"),
    }


def run_folder(out: Path | None, kind: str) -> Path:
    """The folder of a new run, made if it is not there.

    Args:
        out: as the user said; None = ``runs/<date and time>-<kind>``.
        kind: what the run is.

    Raises:
        BadConfig: it can't be written to.
    """
    folder = out or RUNS_DIR / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{kind}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"--out {folder}: can't be made ({error.strerror}); name one that may be written") from None
    if not os.access(folder, os.W_OK):
        raise BadConfig(f"--out {folder}: not writable; name a folder that may be written")
    return folder


def save(results: Results, folder: Path, command: str) -> Results:
    """Write results.json, costs.json and one resolved configuration per mode; point ``latest`` beside it to it.

    Returns:
        The results with command and time filled in.
    """
    stamped = replace(results, command=command, created=datetime.datetime.now().astimezone().isoformat("T", "seconds"))
    write_text(folder / "configs.yaml", yaml.safe_dump(stamped.configs, sort_keys=False))
    write_json(folder / "costs.json", stamped.costs)
    write_json(folder / "results.json", stamped.as_json())
    if folder.parent.name == RUNS_DIR.name:
        point_latest_to(folder)
    return stamped


def write_text(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def point_latest_to(folder: Path) -> None:
    """Make ``latest`` beside ``folder`` a relative link to it, in one step."""
    link = folder.parent / "latest"
    if link.exists() and not link.is_symlink():
        return  # somebody's own folder of that name
    temporary = folder.parent / f".latest.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    temporary.replace(link)


def percentiles(values: Any) -> tuple[float, ...]:
    """Percentiles 0, 1, ... 100, rounded to 0.1 µs; empty for no values."""
    if len(values) == 0:
        return ()
    return tuple(round(float(v), 4) for v in np.percentile(values, np.arange(101)))


def print_table(results: Results, console: Console) -> None:
    """The rows, for people: what the robot got, then how it was decoded. Fits 80 columns."""
    outcome = _table("What the robot got", "success", "95 % CI", "chunk p50", "p90", "p99", "max ms", "late")
    decoding = _table(
        "How it was decoded",
        "tokens/\nfwd", "accept.\nlength", "fwds/\nchunk", "faster\ndecode", "faster\nchunk", "x\nlimit", "host",
        "agree",
    )  # fmt: skip
    for row in results.rows:
        outcome.add_row(
            row.mode, percent(row.success_rate), interval(row.success_ci95), number(row.chunk_ms_p50),
            number(row.chunk_ms_p90), number(row.chunk_ms_p99), number(row.chunk_ms_max),
            percent(row.deadline_miss_rate, 1),
        )  # fmt: skip
        decoding.add_row(
            row.mode,
            number(row.tokens_per_forward, 2),
            number(row.acceptance_length, 2),
            number(row.forwards_per_chunk),
            number(row.speedup_decode, 2),
            number(row.speedup_chunk, 2),
            number(row.limit_ratio, 2),
            percent(row.host_overhead_ratio),
            percent(row.token_agreement, 1),
        )
    console.print(outcome)
    console.print(decoding)
    deadlines = sorted({row.deadline_ms for row in results.rows})
    console.print(
        f"late: of {', '.join(f'{d:g}' for d in deadlines)} ms. seeds {_seed_range(results.seeds)}, "
        f"{len(results.tasks)} task{'s' if len(results.tasks) != 1 else ''}, model {results.model_hash[:12]}. "
        f"Warm-up left out.",
        highlight=False,
    )
    for note in results.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _table(title: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("mode", overflow="fold", min_width=14)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def number(value: float | None, digits: int = 1) -> str:
    """``3.14``; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """``93 %``; a dash where nothing was measured."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def interval(value: tuple[float, float] | None) -> str:
    """``88-97``, in percent."""
    return "-" if value is None else f"{100 * value[0]:.0f}-{100 * value[1]:.0f}"


def _seed_range(seeds: tuple[int, ...]) -> str:
    if not seeds:
        return "-"
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}..{seeds[-1]}"
