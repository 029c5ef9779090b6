"""A file of limits: read strictly, judged everywhere it applies, refused where nothing could keep it."""

from __future__ import annotations

import pytest
from fake_profile import MS, a_mode, a_profile, some_extras

from vla_spec.errors import BadConfig, UnknownOption
from vla_spec.profiling.constraints import (
    ConstraintsViolated,
    check_all,
    check_consistency,
    check_measurable,
    parse,
    raise_if_violated,
    read,
)
from vla_spec.profiling.metrics import METRICS


def constraints(*lines):
    return tuple(parse(line, f"line {i}") for i, line in enumerate(lines, 1))


@pytest.fixture(scope="module")
def profile():
    modes = {"exact": a_mode(loads=("idle", "busy")), "my.mode": a_mode(some_extras(200, 1), loads=("idle", "busy"))}
    return a_profile(modes)


def test_every_part_of_a_constraint_is_read():
    one, two, three, four = constraints(
        "chunk_p99_ms <= 80", "exact.step_p50_ms<5", "busy.miss_rate <= 1e-3", "my.mode.idle.slack_p99.9_ms > -2"
    )
    assert (one.mode, one.condition, one.metric.name, one.operator, one.limit) == (None, None, "chunk_p99_ms", "<=", 80)
    assert (two.mode, two.condition, two.operator, two.limit) == ("exact", None, "<", 5)
    assert (three.mode, three.condition, three.limit) == (None, "busy", 0.001)
    assert (four.mode, four.condition, four.metric.name, four.limit) == ("my.mode", "idle", "slack_p999_ms", -2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("limits.txt", "# what the arm needs\nchunk_p99_ms <= 80   # of every mode\n\nexact.miss_rate <= 1e-3\n"),
        ("limits.yaml", "- chunk_p99_ms <= 80\n- exact.miss_rate <= 1e-3\n"),
        ("limits.yml", "chunk_p99_ms: <= 80\nexact.miss_rate: {max: 1e-3}\n"),
    ],
)
def test_text_and_yaml_say_the_same(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = read(tmp_path / name)
    assert [(c.mode, c.metric.name, c.operator, c.limit) for c in found] == [
        (None, "chunk_p99_ms", "<=", 80), ("exact", "miss_rate", "<=", 0.001)
    ]  # fmt: skip


def test_yaml_knows_both_bounds(tmp_path):
    (tmp_path / "c.yaml").write_text("chunk_p50_ms: {min: 1, max: 80}\n")
    assert [(c.operator, c.limit) for c in read(tmp_path / "c.yaml")] == [(">=", 1), ("<=", 80)]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("c.txt", None, "can't be read"),
        ("c.txt", "", "holds no constraint"),
        ("c.txt", "# nothing\n", "holds no constraint"),
        ("c.txt", "chunk_p99_ms", "line 1: 'chunk_p99_ms' is no constraint"),
        ("c.txt", "\nchunk_p99_ms = 3", "line 2: .* is no constraint"),
        ("c.txt", "chunk_p99_ms <= fast", "limit of chunk_p99_ms is 'fast'"),
        ("c.txt", "chunk_p99_ms <= 80 ms", "is no constraint"),
        ("c.txt", "chunk_p98_ms <= 80", "no metric named 'chunk_p98_ms'; did you mean 'chunk_p9[09]_ms'"),
        ("c.txt", "exact.mis_rate <= 1", "did you mean 'miss_rate'"),
        ("c.txt", "latency <= 80", "Valid: PART_RANK_ms with part chunk, encode"),
        ("c.txt", "chunk_p99_ms <= -1", "limit of chunk_p99_ms is -1; valid: 0 or more"),
        ("c.txt", "chunk_p99_ms <= 0", "impossible"),
        ("c.txt", "chunk_p99_ms < 0", "impossible"),
        ("c.txt", "chunk_p99_ms <= nan", "is nan"),
        ("c.txt", "chunk_p99_ms <= inf", "is inf"),
        ("c.txt", "miss_rate <= 5", "limit of miss_rate is 5; valid: 0..1"),
        ("c.txt", "miss_rate > 1", "impossible"),
        ("c.txt", "miss_rate < 0", "impossible"),
        ("c.txt", "busy.load_ms <= 5", "belongs to a mode as a whole"),
        ("c.txt", "cold.jitter_p50_ms <= 5", "never cold"),
        ("c.txt", "chunk_p50_ms <= 5\nchunk_p50_ms >= 6", "line 2.*contradict"),
        ("c.txt", "chunk_p50_ms < 5\nchunk_p50_ms >= 5", "contradict"),
        ("c.txt", "chunk_p50_ms <= 5\nexact.busy.chunk_p50_ms >= 6", "contradict"),
        ("c.txt", "chunk_p50_ms >= 60\nchunk_p99_ms <= 50", "contradict"),
        ("c.txt", "chunk_p50_ms <= 5\nchunk_p50_ms <= 6", "a second time"),
        ("c.yaml", "chunk_p50_ms: [", "not valid YAML"),
        ("c.yaml", "3", "expected a list"),
        ("c.yaml", "- 3", "entry 1: 3 is no constraint"),
        ("c.yaml", "chunk_p50_ms: 80", "expected '<= 80' or a mapping"),
        ("c.yaml", "chunk_p50_ms: {maximum: 80}", "expected '<= 80' or a mapping"),
        ("c.yaml", "chunk_p50_ms: {max: [1]}", "(is no constraint|limit of)"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadConfig, match=rf"--constraints .*{word}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "lines",
    [
        ("chunk_p50_ms <= 5", "chunk_p50_ms >= 5"),
        ("exact.chunk_p50_ms <= 5", "relaxed.chunk_p50_ms >= 6"),
        ("idle.chunk_p50_ms <= 5", "busy.chunk_p50_ms >= 6"),
        ("chunk_p50_ms <= 5", "cold.chunk_p50_ms >= 6"),  # without a condition, cold is not meant
        ("chunk_p50_ms <= 5", "chunk_p99_ms >= 6"),  # a small median and a long tail go together
        ("chunk_p50_ms <= 5", "loop_chunk_p50_ms >= 6"),
        ("miss_rate <= 0",),
        ("slack_p1_ms >= -3",),
    ],
)
def test_what_can_be_kept_at_once_is_taken(lines):
    check_consistency(constraints(*lines))


def test_a_constraint_without_mode_and_condition_applies_everywhere_but_cold(profile):
    checks = check_all(constraints("chunk_p99_ms <= 80", "cold.chunk_max_ms <= 1", "my.mode.load_ms <= 90"), profile)
    assert [(c.mode, c.condition, c.passed) for c in checks] == [
        ("exact", "idle", True), ("exact", "busy", True), ("my.mode", "idle", True), ("my.mode", "busy", True),
        ("exact", "cold", False), ("my.mode", "cold", False), ("my.mode", "", True),
    ]  # fmt: skip
    with pytest.raises(ConstraintsViolated, match=r"2 of 7 checks failed: cold.chunk_max_ms <= 1 in exact.cold: found"):
        raise_if_violated(checks)
    raise_if_violated(checks[:4])
    assert ConstraintsViolated.exit_code == 3


@pytest.mark.parametrize(("operator", "passes"), [("<=", True), ("<", False), (">=", True), (">", False)])
def test_operators_mean_what_they_say(profile, operator, passes):
    value = profile.modes["exact"].conditions["idle"].miss_rate
    (check,) = check_all(constraints(f"exact.idle.miss_rate {operator} {value!r}"), profile)
    assert check.passed is passes
    assert check.value == value


def test_a_number_that_was_not_measured_does_not_pass(profile):
    (check,) = check_all(constraints("exact.idle.chunk_p999_ms <= 80"), profile)
    assert (check.value, check.passed, check.note) == (None, False, "needs 1000 values")
    (nowhere,) = check_all(constraints("memory.chunk_p50_ms <= 80"), profile)
    assert (nowhere.passed, nowhere.note) == (False, "was not measured")
    with pytest.raises(ConstraintsViolated, match="needs 1000 values"):
        raise_if_violated([check])


def test_a_rate_that_passes_without_enough_plans_says_so():
    profile = a_profile({"exact": a_mode([0] * 50)})
    (check,) = check_all(constraints("miss_rate <= 1e-3"), profile)
    assert check.passed
    assert "not proven: 95 % interval reaches 0.07" in check.note
    assert "50 plans" in check.note
    (upper,) = check_all(constraints("miss_rate_upper <= 1e-3"), profile)
    assert not upper.passed


def measurable(*lines, modes=("exact",), conditions=("cold", "idle"), loop=False, tracing=True, plans=200):
    check_measurable(constraints(*lines), modes, conditions, loop, tracing, plans)


@pytest.mark.parametrize(
    ("line", "changes", "word"),
    [
        ("exat.chunk_p50_ms <= 3", {}, "did you mean 'exact'"),
        ("busy.chunk_p50_ms <= 3", {}, "'busy' is not measured in this run; have cold, idle"),
        ("jitter_p99_ms <= 3", {}, "add --real-time"),
        ("load_ms <= 3", {"conditions": ("idle",)}, "--cold-plans"),
        ("tracing_percent <= 1", {"tracing": False}, "--tracing-pairs"),
        ("chunk_p99_ms <= 3", {"plans": 99}, "needs 100 plans to say anything, --plans is 99"),
        ("slack_p1_ms >= 3", {"plans": 50}, "needs 100 plans"),
    ],
)
def test_what_the_run_can_not_say_is_refused_before_it(line, changes, word):
    with pytest.raises((BadConfig, UnknownOption), match=word):
        measurable(line, **changes)


def test_and_what_it_can_is_not():
    measurable("chunk_p99_ms <= 3", "step_p999_ms <= 3", "cold.chunk_p50_ms <= 3", "load_ms <= 3")
    measurable("jitter_p99_ms <= 3", loop=True, plans=10)
    measurable("chunk_p99_ms <= 3", plans=None)


def test_every_metric_can_be_read(profile):
    mode = profile.modes["exact"]
    place = {"condition": mode.conditions["idle"], "loop": mode.loops["idle"], "mode": mode}
    values = {name: metric.read(place[metric.source]) for name, metric in METRICS.items()}
    assert {name for name, value in values.items() if value is None} <= {
        name for name, metric in METRICS.items() if metric.num_needed > 1
    }
    assert values["hold_rate"] == 0
    assert values["late_step_rate"] == 1 / 40
    assert values["wait_p50_ms"] == pytest.approx(3, rel=1e-3)
    assert values["prefill_p50_ms"] == pytest.approx(7, rel=1e-3)
    assert values["first_ms"] == pytest.approx(mode.conditions["cold"].chunk.max_ms)
    assert values["slack_min_ms"] < values["slack_p50_ms"]
    assert values["chunk_max_ms"] * MS > 0
