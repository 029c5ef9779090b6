"""An old profile beside a new one: ratios, and whether a difference is more than the spread within the two runs.

A number got worse if it is worse by more than a stated percentage *and* the interval of its ratio leaves 1 out. Plans
that follow each other have the same slow moment of the machine in common, so the interval comes from resampling
blocks of consecutive plans and not single ones. What no statistic over two runs can see is a machine that was slower
throughout the second one: hence the environment stamps, and hence compare on a quiet machine.

Source: moving block bootstrap, Künsch 1989, doi:10.1214/aos/1176347265, blocks of n^(1/3) as in Hall, Horowitz and Jing
1995, doi:10.1093/biomet/82.3.561; difference of rates, Newcombe 1998, method 10, doi:10.1002/(SICI)1097-0258(19980430).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadConfig, VlaSpecError
from vla_spec.profiling.histograms import num_needed
from vla_spec.profiling.metrics import WARM
from vla_spec.profiling.profile import Condition, Profile
from vla_spec.results import wilson_interval

#: Bootstrap draws; confidence of the interval of a ratio, and the same for the difference of miss rates.
NUM_DRAWS, LEVEL, Z = 2000, 0.99, 2.575829
#: Values that are sorted at once; bounds the memory.
_BATCH_VALUES = 2_000_000
#: Chunk quantiles that decide.
DECIDING = {"chunk_p50_ms": 0.5, "chunk_p90_ms": 0.9, "chunk_p99_ms": 0.99}
#: A difference of miss rates below this is none, whatever the ratio (0.1 % to 0.2 % is a doubling). [share]
LEAST_MISSES = 0.005


class Regressed(VlaSpecError):
    """The new profile is whole and written, and it is worse than the old one."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Change:
    """One number in both profiles.

    Attributes:
        mode, condition, name: where and what.
        old, new: values. ratio: new / old, None if the old one is 0.
        interval: of the ratio (of the difference for rates), at `LEVEL`; None = not tested, for the eye only.
        verdict: ``same``, ``slower`` (worse), ``faster`` (better), or ``shown`` for numbers that are not tested.
    """

    mode: str
    condition: str
    name: str
    old: float
    new: float
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True, slots=True)
class ProfileComparison:
    """All changes, and what makes the two profiles less than comparable."""

    threshold_percent: float
    old_created: str
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Changes for the worse."""
        return tuple(change for change in self.changes if change.verdict == "slower")

    @property
    def statement(self) -> str:
        """What a verdict means, in one sentence."""
        return (
            f"slower = worse by more than {self.threshold_percent:g} % and the {100 * LEVEL:g} % interval of the ratio "
            f"(block bootstrap over plans, {NUM_DRAWS} draws) lies above 1; miss rates: more than that and more than "
            f"{100 * LEAST_MISSES:g} points, with Newcombe's interval of the difference above 0; "
            f"{sum(change.interval is not None for change in self.changes)} tests, not corrected for their number"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "statement": self.statement}


def compare(old: Profile, new: Profile, threshold_percent: float) -> ProfileComparison:
    """Set side by side what both profiles have, warm conditions only.

    Args:
        old: the profile to compare with.
        new: the profile in question, of the same format.
        threshold_percent: smaller changes are none. [%]

    Raises:
        BadConfig: they have nothing in common, or treat late plans differently.
    """
    check_same_treatment(old, new.late)
    common = [
        (mode, condition)
        for mode in new.modes
        if mode in old.modes
        for condition in WARM
        if condition in new.modes[mode].conditions and condition in old.modes[mode].conditions
    ]
    if not common:
        raise BadConfig(
            f"--compare: the profiles have no mode and condition in common; old: {_have(old)}; new: {_have(new)}"
        )
    changes: list[Change] = []
    for mode, condition in common:
        pair = old.modes[mode].conditions[condition], new.modes[mode].conditions[condition]
        changes += _changes(mode, condition, *pair, threshold_percent)
    return ProfileComparison(threshold_percent, old.created, tuple(changes), tuple(differences(old, new, common)))


def check_same_treatment(old: Profile, late: str) -> None:
    """Raise BadConfig if the old profile treats late plans in another way than ``late``."""
    if old.late != late:
        raise BadConfig(
            f"--compare: the old profile was made with --late {old.late}, this one with --late {late}; measure with "
            f"--late {old.late}"
        )


def raise_if_regressed(compared: ProfileComparison) -> None:
    """Raise Regressed, which names the worst change, if there is one."""
    worse = compared.regressions
    if not worse:
        return
    worst = max(worse, key=lambda change: math.inf if change.ratio is None else change.ratio)
    more = f"; and {len(worse) - 1} more" if len(worse) > 1 else ""
    raise Regressed(
        f"slower than the old profile: {worst.mode}.{worst.condition}.{worst.name} went from {worst.old:.4g} to "
        f"{worst.new:.4g}{more}"
    )


def differences(old: Profile, new: Profile, common: Sequence[tuple[str, str]]) -> list[str]:
    """What is not the same about machine, libraries, model and configuration, in words."""
    found = []
    for name in sorted({*old.environment, *new.environment} - {"load_average"}):
        own, other = old.environment.get(name), new.environment.get(name)
        if isinstance(own, dict) and isinstance(other, dict):
            changed = [key for key in sorted({*own, *other}) if own.get(key) != other.get(key)]
            if changed:
                text = ", ".join(f"{key} {own.get(key)} -> {other.get(key)}" for key in changed)
                found.append(f"{name} differ: {text}")
        elif own != other:
            found.append(f"{name} differs: {own} -> {other}")
    busy = [profile.environment.get("load_average") or 0.0 for profile in (old, new)]
    if abs(busy[0] - busy[1]) > 1:
        found.append(f"load average differs: {busy[0]:g} -> {busy[1]:g}; something else was running in one of them")
    if old.model_hash != new.model_hash:
        found.append(f"model differs: {old.model_hash[:12]} -> {new.model_hash[:12]}")
    for what, first, second in (("tasks", old.tasks, new.tasks), ("seeds", old.seeds, new.seeds)):
        if first != second:
            found.append(f"{what} of the recorded observations differ: {_listed(first)} -> {_listed(second)}")
    for name in WARM:
        if old.loads.get(name) != new.loads.get(name) and any(condition == name for _, condition in common):
            found.append(f"load {name} differs: {old.loads.get(name)} -> {new.loads.get(name)}")
    for mode in dict.fromkeys(mode for mode, _ in common):
        before, after = old.modes[mode].config, new.modes[mode].config
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if changed:
            found.append(f"mode {mode} is configured differently: {', '.join(changed)}")
    return found


def ratio_intervals(
    old: npt.NDArray[np.int64], new: npt.NDArray[np.int64], shares: Sequence[float], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """For each q in ``shares`` the interval of quantile q of ``new`` / quantile q of ``old``, at `LEVEL`.

    Args:
        old: one value per plan in the order of time; resampled in blocks.
        new: the same.
        shares: in (0, 1).
        rng: draws the blocks.
    """
    tail = (1 - LEVEL) / 2
    ratios = _drawn_quantiles(new, shares, rng) / np.maximum(_drawn_quantiles(old, shares, rng), 1)  # [draws, shares]
    return [(low, high) for low, high in np.quantile(ratios, (tail, 1 - tail), axis=0).T.tolist()]


def difference_interval(old_hits: int, old_n: int, new_hits: int, new_n: int) -> tuple[float, float]:
    """Newcombe's interval of the rate of new minus the rate of old, at `LEVEL`."""
    old, new = wilson_interval(old_hits, old_n, Z), wilson_interval(new_hits, new_n, Z)
    assert old is not None, f"{old_n=}"
    assert new is not None, f"{new_n=}"
    first, second = old_hits / old_n, new_hits / new_n
    low = second - first - math.hypot(second - new[0], old[1] - first)
    high = second - first + math.hypot(new[1] - second, first - old[0])
    return low, high


def _changes(mode: str, condition: str, old: Condition, new: Condition, threshold_percent: float) -> list[Change]:
    limit = 1 + threshold_percent / 100
    series = np.array(old.series.chunk_us, np.int64), np.array(new.series.chunk_us, np.int64)
    found = []
    tested = {name: q for name, q in DECIDING.items() if min(map(len, series)) >= num_needed(q)}
    intervals = ratio_intervals(*series, tuple(tested.values()), np.random.default_rng(0))
    for name, interval in zip(tested, intervals, strict=True):
        values = getattr(old.chunk, name.removeprefix("chunk_")), getattr(new.chunk, name.removeprefix("chunk_"))
        ratio = values[1] / values[0] if values[0] else None
        verdict = "same"
        if ratio is not None and ratio > limit and interval[0] > 1:
            verdict = "slower"
        elif ratio is not None and ratio < 1 / limit and interval[1] < 1:
            verdict = "faster"
        found.append(Change(mode, condition, name, *values, ratio, _rounded(interval), verdict))
    interval = difference_interval(old.misses, old.plans, new.misses, new.plans)
    ratio = new.miss_rate / old.miss_rate if old.miss_rate else None
    difference, verdict = new.miss_rate - old.miss_rate, "same"
    if abs(difference) > LEAST_MISSES:
        if interval[0] > 0 and (ratio is None or ratio > limit):
            verdict = "slower"
        elif interval[1] < 0 and (ratio is None or ratio < 1 / limit):
            verdict = "faster"
    found.append(Change(mode, condition, "miss_rate", old.miss_rate, new.miss_rate, ratio, _rounded(interval), verdict))
    for stage, stored in new.stages.items():
        if stage in old.stages and stored.p50_ms is not None and (before := old.stages[stage].p50_ms):
            found.append(
                Change(mode, condition, f"{stage}_p50_ms", before, stored.p50_ms, stored.p50_ms / before, None, "shown")
            )
    return found


def _drawn_quantiles(
    values: npt.NDArray[np.int64], shares: Sequence[float], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Quantiles (nearest rank) of series that are put together from blocks of consecutive values, [draws, shares]."""
    n = len(values)
    length = max(1, round(n ** (1 / 3)))
    ranks = [max(1, math.ceil(q * n - 1e-9)) - 1 for q in shares]
    batch = max(1, _BATCH_VALUES // n)
    drawn = []
    for first in range(0, NUM_DRAWS, batch):
        num_rows = min(batch, NUM_DRAWS - first)
        starts = rng.integers(0, n - length + 1, (num_rows, -(-n // length)))
        rows = values[(starts[:, :, None] + np.arange(length)).reshape(num_rows, -1)[:, :n]]  # [rows, n]
        drawn.append(np.sort(rows, axis=1)[:, ranks])
    return np.concatenate(drawn)


def _rounded(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 5), round(interval[1], 5)


def _have(profile: Profile) -> str:
    return ", ".join(f"{mode} ({'/'.join(own.conditions)})" for mode, own in profile.modes.items()) or "nothing"


def _listed(items: Sequence[object]) -> str:
    text = ", ".join(map(str, items[:4]))
    return f"{text}, ..." if len(items) > 4 else text or "none"
