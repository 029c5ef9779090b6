"""Old beside new: slower means by more than the threshold and by more than chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_profile import MS, a_mode, a_profile, some_extras

from vla_spec.errors import BadConfig
from vla_spec.profiling.comparison import (
    Regressed,
    compare,
    difference_interval,
    differences,
    raise_if_regressed,
    ratio_intervals,
)
from vla_spec.profiling.profile import Profile


def of(extras, **changes) -> Profile:
    return a_profile({"exact": a_mode(np.asarray(extras, np.int64), has_loop=False)}, **changes)


def verdicts(compared):
    return {change.name: change.verdict for change in compared.changes if change.verdict != "shown"}


OLD = of(some_extras(300))


def test_the_same_program_is_the_same():
    compared = compare(OLD, of(some_extras(300, seed=5)), 10)
    assert verdicts(compared) == dict.fromkeys(("chunk_p50_ms", "chunk_p90_ms", "chunk_p99_ms", "miss_rate"), "same")
    raise_if_regressed(compared)


def test_a_third_more_is_slower_and_the_error_names_the_worst():
    slow = some_extras(300, seed=5) + 6 * MS
    compared = compare(OLD, of(slow), 10)
    assert verdicts(compared)["chunk_p50_ms"] == verdicts(compared)["chunk_p99_ms"] == "slower"
    with pytest.raises(Regressed, match=r"exact\.idle\.\w+ went from .* to .*; and \d more"):
        raise_if_regressed(compared)
    assert Regressed.exit_code == 4
    assert verdicts(compare(of(slow), OLD, 10))["chunk_p50_ms"] == "faster"


def test_a_certain_change_below_the_threshold_is_none():
    compared = compare(OLD, of(some_extras(300) + MS), 10)
    (median,) = (change for change in compared.changes if change.name == "chunk_p50_ms")
    assert median.interval[0] > 1
    assert median.verdict == "same"
    assert verdicts(compare(OLD, of(some_extras(300) + MS), 3))["chunk_p50_ms"] == "slower"


def test_a_large_change_by_chance_is_none():
    """One slow stretch of the machine moves the p90 of 40 plans far, and proves nothing."""
    extras = some_extras(40)
    hiccup = extras.copy()
    hiccup[10:16] += 12 * MS
    compared = compare(of(extras), of(hiccup), 10)
    (p90,) = (change for change in compared.changes if change.name == "chunk_p90_ms")
    assert p90.ratio > 1.2
    assert p90.interval[0] < 1
    assert p90.verdict == "same"


def test_quantiles_without_enough_plans_are_not_tested():
    assert set(verdicts(compare(of(some_extras(50)), OLD, 10))) == {"chunk_p50_ms", "chunk_p90_ms", "miss_rate"}
    assert set(verdicts(compare(of([0]), OLD, 10))) == {"chunk_p50_ms", "miss_rate"}


def test_more_misses_are_slower():
    few, many = some_extras(400), some_extras(400)
    few[:] = 0
    many[:] = 0
    many[::20] = 9 * MS
    compared = compare(of(few), of(many), 10)
    (misses,) = (change for change in compared.changes if change.name == "miss_rate")
    assert (misses.old, misses.new, misses.ratio, misses.verdict) == (0, 0.05, None, "slower")
    with pytest.raises(Regressed, match="miss_rate"):
        raise_if_regressed(compared)
    one = few.copy()
    one[0] = 9 * MS
    assert verdicts(compare(of(few), of(one), 10))["miss_rate"] == "same"


def test_stages_are_shown_and_not_judged():
    compared = compare(OLD, of(some_extras(300) + 60 * MS), 10)
    shown = {change.name: change for change in compared.changes if change.verdict == "shown"}
    assert {"prefill_p50_ms", "step_p50_ms", "tail_p50_ms", "round_p50_ms"} <= set(shown)
    assert shown["prefill_p50_ms"].ratio == 1
    assert shown["prefill_p50_ms"].interval is None
    assert not [change for change in compared.regressions if change.name == "step_p50_ms"]


def test_the_statement_says_what_the_words_mean():
    compared = compare(OLD, OLD, 7.5)
    assert "more than 7.5 %" in compared.statement
    assert "99 % interval" in compared.statement
    assert "4 tests" in compared.statement
    assert compared.as_json()["statement"] == compared.statement


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(40):
        old, new = rng.gamma(3, 1e4, (2, 120)).astype(np.int64)
        ((low, high),) = ratio_intervals(old, new, (0.5,), rng)
        hits += low <= 1 <= high
    assert hits >= 37


def test_runs_of_slow_plans_widen_the_interval():
    """The same values, once shuffled and once in long runs: neighbours say less than strangers."""
    rng = np.random.default_rng(0)
    runs = np.repeat(rng.gamma(3, 1e4, 30), 10).astype(np.int64)
    loose = rng.permutation(runs)

    def width(values):
        ((low, high),) = ratio_intervals(values, values, (0.5,), np.random.default_rng(1))
        return high - low

    assert width(runs) > 1.3 * width(loose)


def test_the_difference_of_rates_is_newcombes():
    """Example (a) of Newcombe 1998, Table II, method 10: 56/70 - 48/80, 95 % interval 0.0524 to 0.3339."""
    from vla_spec.profiling import comparison

    z, comparison.Z = comparison.Z, 1.959964
    try:
        assert difference_interval(48, 80, 56, 70) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    finally:
        comparison.Z = z


def test_what_differs_about_the_circumstances_is_said():
    environment = {"cpu": "another", "cores": "2", "libraries": {"numpy": "3"}, "load_average": 4.0}
    other = replace(OLD, environment=environment, model_hash="fff", tasks=("reach",), loads={"idle": "another idle"})
    mode = replace(other.modes["exact"], config={"drafter": "jacobi"})
    text = "; ".join(differences(OLD, replace(other, modes={"exact": mode}), [("exact", "idle")]))
    for word in (
        "cpu differs: A <fast> one -> another", "numpy 2 -> 3", "load average differs: 0.1 -> 4", "model differs",
        "tasks of the recorded observations differ: push -> reach", "load idle differs",
        "mode exact is configured differently: drafter",
    ):  # fmt: skip
        assert word in text
    assert differences(OLD, OLD, [("exact", "idle")]) == []


def test_profiles_with_nothing_in_common_are_refused():
    with pytest.raises(BadConfig, match=r"no mode and condition in common; old: exact .*; new: relaxed"):
        compare(OLD, a_profile({"relaxed": a_mode([0])}), 10)
    with pytest.raises(BadConfig, match="measure with --late count"):
        compare(OLD, of([0], late="cut"), 10)
