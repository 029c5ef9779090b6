"""profile.json reads back as it was written; anything else is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fake_profile import MS, a_mode, a_plan, a_profile, measured, played, some_extras

from vla_spec.errors import BadConfig
from vla_spec.profiling.profile import FORMAT, MEANING, distributions, merge, read, save
from vla_spec.profiling.profiler import condition_of, loop_of


@pytest.fixture(scope="module")
def profile():
    return a_profile({"exact": a_mode(loads=("idle", "busy"))})


@pytest.fixture
def path(profile, tmp_path):
    save(profile, tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_a_profile_reads_back_as_it_was_written(profile, path):
    assert read(path, "--compare") == profile
    tree = json.loads(path.read_text())
    assert (tree["kind"], tree["format"]) == ("vla-spec profile", FORMAT)
    assert tree["meaning"] == MEANING
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def broken(path, change):
    text = path.read_text()
    tree = json.loads(text)
    chunk = tree["modes"]["exact"]["conditions"]["idle"]["chunk"]
    if change == "cut":
        path.write_text(text[: len(text) // 2])
    elif change == "empty":
        path.write_text("")
    elif change == "binary":
        path.write_bytes(b"\xff\x00\x80")
    elif change == "deep":
        path.write_text("[" * 200_000)
    elif change == "gone":
        path.unlink()
    else:
        if change == "list":
            tree = [tree]
        elif change == "other":
            tree = {"rows": []}
        elif change == "newer":
            tree["format"] = FORMAT + 1
        elif change == "unformatted":
            del tree["format"]
        elif change == "missing":
            del tree["modes"]["exact"]["conditions"]["idle"]["misses"]
        elif change == "type":
            chunk["n"] = "many"
        elif change == "count":
            chunk["n"] += 1
        elif change == "hdr":
            chunk["hdr"] = chunk["hdr"][:-8]
        path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("cut", "not whole JSON.*cut off"),
        ("empty", "not whole JSON"),
        ("binary", "not whole JSON"),
        ("deep", "not whole JSON"),
        ("gone", "can't be read"),
        ("list", "is no profile"),
        ("other", "is no profile"),
        ("newer", f"has format {FORMAT + 1}, this version reads {FORMAT}"),
        ("unformatted", "has format None"),
        ("missing", r"modes.exact.conditions.idle.misses: .*required"),
        ("type", r"modes.exact.conditions.idle.chunk.n: .*integer"),
        ("count", r"modes.exact.conditions.idle.chunk: its histogram holds 200 values, it says 201"),
        ("hdr", r"modes.exact.conditions.idle.chunk: not an HdrHistogram"),
    ],
)
def test_what_is_no_whole_profile_is_refused_in_one_sentence(path, change, word):
    with pytest.raises(BadConfig, match=rf"--compare .*profile.json: .*{word}"):
        read(broken(path, change), "--compare")


def test_a_condition_is_what_its_plans_are():
    condition = condition_of(measured([0, MS, 2 * MS, 9 * MS]), 32)
    base = a_plan().plan_ns / 1e6
    assert (condition.plans, condition.misses, condition.miss_rate) == (4, 1, 0.25)
    assert condition.chunk.min_ms == pytest.approx(base)
    assert condition.chunk.max_ms == pytest.approx(base + 9)
    assert condition.slack.min_ms == pytest.approx(20 - base - 9)
    assert sum(condition.stage_ms.values()) == pytest.approx(condition.chunk.mean_ms, abs=1e-3)
    assert condition.forwards_per_chunk == 3
    assert (condition.stages["step"].n, condition.stages["prefill"].n, condition.stages["hand_over"].n) == (8, 4, 4)
    assert condition.rungs == {"EXACT": 4}
    assert condition.switches == 2
    assert condition.series.rounds == (3, 3, 3, 3)
    assert condition.series.at_ms[0] == 0
    assert [us / 1e3 for us in condition.series.chunk_us] == pytest.approx([base, base + 1, base + 2, base + 9])
    assert [fall.label for fall in condition.waterfalls] == ["typical", "slowest 1", "slowest 2", "slowest 3"]
    assert [round(fall.chunk_ms - base, 3) for fall in condition.waterfalls] == [1, 9, 2, 1]


def test_a_plan_of_fewer_verified_tokens_is_incomplete_whatever_its_rung():
    plans = measured([0, 0])
    plans[1] = plans[1]._replace(plan=plans[1].plan._replace(num_verified=16))
    assert condition_of(plans, 32).incomplete == 1


def test_a_loop_is_what_its_episodes_are():
    loop = loop_of([played(40), played(40)], 32)
    assert (loop.episodes, loop.successes, loop.steps, loop.plans, loop.misses) == (2, 2, 80, 20, 0)
    assert (loop.late_steps, loop.period_ms) == (2, 12.5)
    assert loop.jitter.max_ms == loop.jitter.min_ms == 0.1
    assert (loop.period_error.min_ms, loop.period_error.max_ms) == (-0.1, 0.1)
    assert loop.wait.p50_ms == pytest.approx(3, rel=1e-3)


def test_merging_is_one_run_that_measured_both():
    first, second = some_extras(120), some_extras(80, seed=1)
    both = merge(a_profile({"exact": a_mode(first)}), a_profile({"exact": a_mode(second)}, seeds=(11,)))
    own = both.modes["exact"].conditions["idle"]
    together = condition_of(measured([*first, *second]), 32)
    assert own.plans == own.chunk.n == 200
    assert (own.misses, own.miss_ci95) == (together.misses, together.miss_ci95)
    assert own.chunk.p99_ms == pytest.approx(together.chunk.p99_ms)
    assert own.stages["step"].p50_ms == pytest.approx(together.stages["step"].p50_ms)
    assert own.series.chunk_us == together.series.chunk_us
    assert list(own.series.at_ms) == sorted(own.series.at_ms)
    assert own.stage_ms["step"] == pytest.approx(together.stage_ms["step"], abs=1e-4)
    assert both.modes["exact"].loops["idle"].steps == 80
    assert both.seeds == (10, 11)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (a_profile({"exact": a_mode([0])}, model_hash="another"), "different model"),
        (a_profile({"exact": a_mode([0])}, late="cut"), "different late"),
        (a_profile({"relaxed": a_mode([0])}), "different modes"),
        (a_profile({"exact": a_mode([0], config={"drafter": "jacobi"})}), "mode exact is configured differently"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(profile, other, word):
    with pytest.raises(BadConfig, match=word):
        merge(profile, other)


def test_a_missing_condition_comes_from_the_other_profile(profile):
    both = merge(a_profile({"exact": a_mode([0, 1])}), profile)
    assert list(both.modes["exact"].conditions) == ["cold", "idle", "busy"]
    assert both.modes["exact"].conditions["busy"] == profile.modes["exact"].conditions["busy"]


def test_every_distribution_has_its_place(profile):
    places = [place for place, _ in distributions(profile)]
    assert len(set(places)) == len(places)
    assert "modes.exact.conditions.busy.stages.step" in places
    assert "modes.exact.loops.idle.jitter" in places
    nothing = replace(profile.modes["exact"].loops["idle"], wait=None, observe=None)
    mode = replace(profile.modes["exact"], loops={"idle": nothing})
    assert "modes.exact.loops.idle.wait" not in [p for p, _ in distributions(replace(profile, modes={"exact": mode}))]
