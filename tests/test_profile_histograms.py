"""Stored distributions answer like the values they hold, to three digits, alone or merged."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_spec.errors import BadConfig, MissingDependency
from vla_spec.profiling import histograms
from vla_spec.profiling.histograms import QUANTILES, curve, decode, distribution, merged, num_needed

TIMES = st.lists(st.integers(-(10**9), 10**11), min_size=1, max_size=60)


def nearest_rank(values, q):
    return sorted(values)[max(1, math.ceil(q * len(values) - 1e-9)) - 1]


@given(TIMES, st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]))
def test_any_quantile_is_the_value_of_its_rank_to_a_thousandth(values, q):
    found = distribution(values).quantile_ms(q) * 1e6
    assert found == pytest.approx(nearest_rank(values, q), rel=1.1e-3, abs=1)


@given(TIMES)
def test_extremes_and_mean_are_exact(values):
    stored = distribution(values)
    assert stored.n == len(values)
    assert stored.min_ms * 1e6 == pytest.approx(min(values), abs=0.6)
    assert stored.max_ms * 1e6 == pytest.approx(max(values), abs=0.6)
    assert stored.mean_ms * 1e6 == pytest.approx(np.mean(values), abs=0.6)


@given(TIMES, TIMES)
def test_merging_is_the_distribution_of_all_values(first, second):
    both, together = merged(distribution(first), distribution(second)), distribution(first + second)
    assert both.n == together.n
    for name in ("min_ms", "max_ms", "p50_ms", "p1_ms", "p99_ms"):
        assert getattr(both, name) == pytest.approx(getattr(together, name), abs=1e-6), name
    assert both.mean_ms == pytest.approx(together.mean_ms, rel=1e-6, abs=2e-6)
    assert curve(both) == curve(together)


def test_a_percentile_needs_enough_values_to_differ_from_the_extreme_one():
    assert [num_needed(q) for q in QUANTILES.values()] == [100, 10, 1, 10, 100, 1000]
    few, enough, many = (distribution(np.arange(1, n + 1) * 1_000_000) for n in (99, 100, 1000))
    assert few.p99_ms is few.p1_ms is None
    assert few.p90_ms == pytest.approx(90, rel=1e-3)
    assert enough.p99_ms == pytest.approx(99, rel=1e-3)
    assert enough.p1_ms == pytest.approx(1, rel=1e-3)
    assert enough.p999_ms is None
    assert many.p999_ms == pytest.approx(999, rel=1e-3)


def test_nothing_has_no_distribution():
    assert distribution([]) is None
    one = distribution([5])
    assert merged(None, one) is one is merged(one, None)
    assert merged(None, None) is None


def test_values_beyond_the_range_are_counted_and_the_maximum_is_kept():
    stored = distribution([10**6, 10**15])
    assert stored.n == 2
    assert stored.max_ms == 1e9


def test_what_is_stored_is_small():
    values = np.random.default_rng(0).gamma(4, 5e6, 5000).astype(np.int64)
    assert len(distribution(values).hdr) < 6000


def test_a_curve_rises_to_one():
    shares, values = curve(distribution([-3_000_000, -1_000_000, 2_000_000, 2_000_000]))
    assert shares == [0.25, 0.5, 1.0]
    assert values == pytest.approx([-3, -1, 2], rel=1e-3)


@pytest.mark.parametrize("change", ["cut", "nonsense", "count", "below"])
def test_a_changed_histogram_is_refused(change):
    stored = distribution([1000, 2000, 30_000])
    broken = {
        "cut": lambda: replace(stored, hdr=stored.hdr[:-8]),
        "nonsense": lambda: replace(stored, hdr="hello"),
        "count": lambda: replace(stored, n=4),
        "below": lambda: replace(stored, hdr_below="\N{SNOWMAN}"),
    }[change]()
    with pytest.raises(BadConfig, match=r"here: .*the file was changed"):
        decode(broken, "here")


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "hdrh":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"hdrhistogram.*pip install 'vla_spec\[profile\]'"):
        histograms.distribution([1])
