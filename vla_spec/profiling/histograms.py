"""Distributions of durations that can be stored, merged and asked for any quantile.

High dynamic range histograms: buckets grow with the value, so that every value from a nanosecond to ten minutes keeps
three significant digits (a quantile is off by 0.1 % at most), in a few hundred bytes of JSON.

Source: Tene, HdrHistogram, encoding V2 with compression, hdrhistogram.org; library hdrhistogram.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadConfig, MissingDependency

#: Range and precision of every histogram; larger values are counted in the last bucket, the maximum stays exact.
LOWEST_NS, HIGHEST_NS, SIGNIFICANT_DIGITS = 1, 600_000_000_000, 3
#: Name -> share of the values that lie at or below it.
QUANTILES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
FIX = "pip install 'vla_spec[profile]'"
NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class Distribution:
    """Durations or signed times of one kind. None where there are too few values to say: see `num_needed`.

    Attributes:
        n: values.
        min_ms, max_ms, mean_ms: exact.
        p1_ms, p10_ms, p50_ms, p90_ms, p99_ms, p999_ms: nearest rank, from the histogram.
        hdr: values of 0 and more in ns, HdrHistogram V2, compressed, base64; empty = there are none.
        hdr_below: magnitudes of the values below 0, the same way.
    """

    n: int
    min_ms: float
    max_ms: float
    mean_ms: float
    p1_ms: float | None
    p10_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    hdr: str
    hdr_below: str = ""

    def quantile_ms(self, q: float) -> float:
        """The value of nearest rank, whatever the number of values [ms]."""
        return _at_rank(*_steps(*decode(self, "distribution")), q) / NS_PER_MS


def num_needed(q: float) -> int:
    """Values from which on a quantile is more than the extreme one: 1 / (1 - q), and 1 / q on the lower side."""
    return math.ceil(1 / min(q, 1 - q) - 1e-9) if q != 0.5 else 1


def distribution(values_ns: npt.NDArray[np.int64] | Sequence[int]) -> Distribution | None:
    """Of any times in ns, negative ones included; None if there are none.

    Raises:
        MissingDependency: the library is not installed.
    """
    values = np.asarray(values_ns, np.int64)
    if not len(values):
        return None
    above, below = _new(), _new()
    for value in values.tolist():
        (above if value >= 0 else below).record_value(min(abs(value), HIGHEST_NS))
    return _summarised(above, below, float(values.min()), float(values.max()), float(values.mean()))


def merged(first: Distribution | None, second: Distribution | None) -> Distribution | None:
    """Of the values of both together."""
    if first is None or second is None:
        return first or second
    above, below = decode(first, "distribution")
    for own, other in zip((above, below), decode(second, "distribution"), strict=True):
        own.add(other)
    n = first.n + second.n
    mean_ms = (first.mean_ms * first.n + second.mean_ms * second.n) / n
    least, most = min(first.min_ms, second.min_ms), max(first.max_ms, second.max_ms)
    return _summarised(above, below, least * NS_PER_MS, most * NS_PER_MS, mean_ms * NS_PER_MS)


def decode(stored: Distribution, where: str) -> tuple[Any, Any]:
    """The two histograms of a distribution: values of 0 and more, and magnitudes of those below 0.

    Raises:
        BadConfig: the text is no histogram, or not one of ``n`` values.
    """
    above, below = _decoded(stored.hdr, where), _decoded(stored.hdr_below, where)
    found = above.get_total_count() + below.get_total_count()
    if found != stored.n:
        raise BadConfig(f"{where}: its histogram holds {found} values, it says {stored.n}; the file was changed")
    return above, below


def curve(stored: Distribution) -> tuple[list[float], list[float]]:
    """Shares of the values (rising, in (0, 1]) and the values at or below which they lie [ms], one pair per bucket."""
    values, counts = _steps(*decode(stored, "distribution"))
    return (counts.cumsum() / stored.n).tolist(), (values / NS_PER_MS).tolist()


def _summarised(above: Any, below: Any, least_ns: float, most_ns: float, mean_ns: float) -> Distribution:
    values, counts = _steps(above, below)
    n = int(counts.sum())

    def at(q: float) -> float | None:
        if n < num_needed(q):
            return None
        return _ms(min(max(_at_rank(values, counts, q), least_ns), most_ns))

    return Distribution(
        n=n,
        min_ms=_ms(least_ns),
        max_ms=_ms(most_ns),
        mean_ms=_ms(mean_ns),
        **{f"{name}_ms": at(q) for name, q in QUANTILES.items()},
        hdr=_encoded(above),
        hdr_below=_encoded(below),
    )


def _at_rank(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], q: float) -> float:
    """The value of rank ceil(q n)."""
    rank = max(1, math.ceil(q * int(counts.sum()) - 1e-9))
    return float(values[np.searchsorted(counts.cumsum(), rank)])


def _steps(above: Any, below: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Values [buckets], rising, and how many there are of each; empty buckets are left out."""
    magnitudes, num_below = _buckets(below)
    values, num_above = _buckets(above)
    return np.concatenate((-magnitudes[::-1], values)), np.concatenate((num_below[::-1], num_above))


def _buckets(histogram: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Largest value of each bucket that is not empty, rising, and its count.

    The library's own iterators visit every bucket in Python, 10 ms each time; NumPy sees the same array at once.
    """
    if not histogram.get_total_count():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    counts = np.ctypeslib.as_array(histogram.counts).astype(np.int64)
    (filled,) = np.nonzero(counts)
    largest = [histogram.get_highest_equivalent_value(histogram.get_value_from_index(int(i))) for i in filled]
    return np.array(largest, np.int64), counts[filled]


def _new() -> Any:
    return _library().HdrHistogram(LOWEST_NS, HIGHEST_NS, SIGNIFICANT_DIGITS)


def _encoded(histogram: Any) -> str:
    return histogram.encode().decode("ascii") if histogram.get_total_count() else ""


def _decoded(text: str, where: str) -> Any:
    if not text:
        return _new()
    try:
        histogram = _library().HdrHistogram.decode(text.encode("ascii"))
    except MissingDependency:
        raise
    except Exception as error:  # base64, zlib and codec each have their own
        raise BadConfig(f"{where}: not an HdrHistogram ({type(error).__name__}); the file was changed") from error
    own = _new()
    own.add(histogram)
    return own


def _library() -> Any:
    try:
        from hdrh import histogram
    except ImportError as error:
        raise MissingDependency("hdrhistogram, which profiles need,", FIX) from error
    return histogram


def _ms(ns: float) -> float:
    return round(ns / NS_PER_MS, 6)
