"""The fitted tolerance: its file, the rule that reads it, the statistics, the sweep and what it keeps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from contract.fakes import build, toy_domain, toy_engine, toy_parts

from vla_spec import cli
from vla_spec.acceptance._fitted import FittedTolerance
from vla_spec.acceptance.relaxed_physical import Options as RuleOptions
from vla_spec.calib.episode_log import EpisodeKey, EpisodeLog
from vla_spec.calib.non_inferiority import Pairs, episodes_needed, is_not_worse, lower_bound
from vla_spec.calib.tolerance import TolerancePlan, choose, closed_loop_rows, make_grid
from vla_spec.calib.used_up_robot import Tolerance, UsedUpRobot
from vla_spec.config import resolve
from vla_spec.errors import BadConfig
from vla_spec.robots.toy import ToyRobot
from vla_spec.types import Committed, Draft, Scores

NONE_COMMITTED = Committed(np.empty(0, np.int32), np.empty(0, np.float32))
TOY = {"engine": "toy", "robot": "toy"}


# ---- the file and the rule ------------------------------------------------------------------------------------


def saved(path, model_hash, cap=(0.001, 0.002, 0.003, 0.0), budget=(0.004, 0.004, 0.004, 0.0), relative=0.25):
    fitted = FittedTolerance(model_hash, cap, budget, relative, {"chosen_cap": 0.003})
    path.write_text(json.dumps(fitted.as_json()))
    return fitted


def test_a_fitted_tolerance_comes_back(tmp_path):
    fitted = saved(tmp_path / "t.json", "abc")
    assert FittedTolerance.from_file(tmp_path / "t.json") == fitted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read"),
        ("{", "not JSON, or cut off"),
        ("[]", "not a fitted tolerance"),
        ('{"format": 1, "kind": "costs"}', "not a fitted tolerance"),
        ('{"format": 1, "kind": "tolerance", "cap": [1]}', "'model_hash'"),
        ('{"format": 1, "kind": "tolerance", "model_hash": "a", "cap": [-1], "budget": [1], "relative": 0}', ">= 0"),
        ('{"format": 1, "kind": "tolerance", "model_hash": "a", "cap": [1], "budget": [1, 1], "relative": 0}', "each"),
        ('{"format": 1, "kind": "tolerance", "model_hash": "a", "cap": [NaN], "budget": [1], "relative": 0}', ">= 0"),
        ('{"format": 1, "kind": "tolerance", "model_hash": "a", "cap": 3, "budget": [1], "relative": 0}', "TypeError"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadConfig, match=rf"t\.json: .*{message}"):
        FittedTolerance.from_file(path)


def judged(rule, off, position=0):
    """Is a token accepted whose distance from the target's choice (bin 228, 100 bins of motion) is ``off`` bins."""
    logits = np.zeros((2, 256), np.float32)
    logits[:, 228] = 9
    committed = Committed(np.zeros(position, np.int32), np.zeros(position, np.float32))
    draft = Draft.chain(np.array([228 - off], np.int32))
    return len(rule.judge(draft, Scores(logits), committed, np.random.default_rng(0)).path) == 1


def test_the_rule_takes_its_numbers_from_the_file(tmp_path):
    parts = toy_parts()
    engine = toy_engine(parts)
    parts = toy_parts(target=engine)
    unit = float(parts.domain.unit_per_bin[0])
    path = tmp_path / "t.json"
    saved(path, engine.info.model_hash, (2 * unit, 3 * unit, 2 * unit, 0.0), (40 * unit,) * 3 + (0.0,), 0.05)
    rule = build("rule", "relaxed_physical", parts, fitted=path, cap=(99.0,), budget=(99.0,), relative=1.0)
    assert judged(rule, 7)  # 2 bins, and 5 % of 100 bins
    assert not judged(rule, 8)
    assert judged(rule, 8, position=1)
    assert not judged(rule, 1, position=3)  # the switch
    assert not rule.exact


def test_a_tolerance_of_another_model_is_refused(tmp_path):
    parts = toy_parts()
    saved(tmp_path / "t.json", "f" * 64)
    with pytest.raises(BadConfig, match=r"fitted on model ffffffffffff, the one that is loaded is"):
        build("rule", "relaxed_physical", toy_parts(target=toy_engine(parts)), fitted=tmp_path / "t.json")
    with pytest.raises(BadConfig, match="needs the target engine"):
        build("rule", "relaxed_physical", parts, fitted=tmp_path / "t.json")


def test_a_fit_that_found_nothing_is_exact(tmp_path):
    parts = toy_parts()
    engine = toy_engine(parts)
    saved(tmp_path / "t.json", engine.info.model_hash, (0.0,) * 4, (0.0,) * 4, 0.0)
    assert build("rule", "relaxed_physical", toy_parts(target=engine), fitted=tmp_path / "t.json").exact


def test_steps_of_the_chunk_have_a_scale_of_their_own():
    parts = toy_parts()
    unit = float(parts.domain.unit_per_bin[0])
    rule = build(
        "rule",
        "relaxed_physical",
        parts,
        cap=(2 * unit,),
        budget=(8 * unit,),
        relative=0.02,
        step_scale=(1.0, 0.0, 2.0),
    )
    accepted = [[off for off in range(1, 20) if judged(rule, off, 4 * step)][-1:] for step in range(4)]
    assert accepted == [[4], [], [8], [8]]  # 2 + 2 % of 100 bins, nothing, twice as much from the third step on
    with pytest.raises(BadConfig, match="step_scale must be numbers >= 0"):
        RuleOptions(step_scale=(1.0, -1.0))


# ---- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "expected"), [((36, 12, 2, 0), 0.0569), ((20, 12, 2, 16), 0.0562)])
def test_the_paired_interval_is_newcombes(table, expected):
    """Lower limits of method 10 in Newcombe's table of examples, two-sided 95 % = one-sided 97.5 %."""
    assert lower_bound(Pairs(*table), 0.975) == pytest.approx(expected, abs=1e-4)


def test_pairs_are_counted_by_outcome():
    pairs = Pairs.of([True, True, False, False, True], [True, False, True, False, True])
    assert pairs == Pairs(2, 1, 1, 1)
    assert (pairs.total, pairs.difference) == (5, 0.0)
    assert lower_bound(Pairs(0, 0, 0, 0)) == -1.0
    assert not is_not_worse(Pairs(0, 0, 0, 0), 0.5)


@pytest.mark.parametrize("margin", [0.05, 0.1, 0.2])
def test_so_many_episodes_without_failure_are_needed_and_enough(margin):
    needed = episodes_needed(margin)
    assert is_not_worse(Pairs(needed, 0, 0, 0), margin)
    assert not is_not_worse(Pairs(needed - 1, 0, 0, 0), margin)
    assert not is_not_worse(Pairs(needed - 1, 0, 1, 0), margin)


def test_the_bound_falls_with_every_failure_and_rises_with_evidence():
    bounds = [lower_bound(Pairs(60 - k, 0, k, 0)) for k in range(20)]
    assert bounds == sorted(bounds, reverse=True)
    assert lower_bound(Pairs(600, 0, 0, 0)) > lower_bound(Pairs(60, 0, 0, 0))


def test_a_truly_worse_way_is_seldom_found_not_to_be():
    """Simulated: both lose the same share but the new way 10 % more; at most 5 % (and noise) pass a margin of 10 %."""
    rng = np.random.default_rng(0)
    num_passed = 0
    for _ in range(400):
        reference = rng.random(60) < 0.95
        new = reference & (rng.random(60) > 0.1 / 0.95)
        num_passed += is_not_worse(Pairs.of(new.tolist(), reference.tolist()), 0.1)
    assert num_passed / 400 <= 0.08


# ---- grid and choice ------------------------------------------------------------------------------------------


def test_the_grid_keeps_the_proportions_of_the_rule():
    options = RuleOptions(cap=(0.001, 0.001, 0.002, 0.0), budget=(0.01,), relative=0.25)
    small, large = make_grid(options, (0.001, 0.016), 4)
    assert small.cap == pytest.approx((0.0005, 0.0005, 0.001, 0.0))
    assert small.budget == pytest.approx((0.005,) * 4)
    assert small.relative == pytest.approx(0.125)
    assert (large.relative, large.budget[0]) == (1.0, pytest.approx(0.08))
    with pytest.raises(BadConfig, match=r"rule\.cap is 0"):
        make_grid(RuleOptions(cap=(0.0,)), (0.001,), 4)


def plan_of(caps=(0.1, 0.2, 0.4), **more):
    config = resolve({**TOY, "drafter": "ngram", "rule": {"name": "relaxed_physical", "cap": 0.1, "budget": 0.4}})
    return TolerancePlan(config=config, caps=caps, tasks=None, seeds=range(3), **more)


def episodes_of(success):
    """``success(way, cap, seed)`` for every run of the plan."""
    runs = [("exact", 0.0)] + [(way, cap) for way in ("drafted", "used_up") for cap in (0.1, 0.2, 0.4)]
    return {
        EpisodeKey("toy", seed, way, cap): {
            "task": "toy", "success": success(way, cap, seed), "num_steps": 10, "chunk_ms_p50": 2.0,
        }
        for way, cap in runs
        for seed in range(3)
    }  # fmt: skip


def test_the_largest_tolerance_that_holds_in_every_way_is_chosen():
    plan = plan_of(margin=0.6)  # 3 episodes are enough for that
    found = episodes_of(lambda way, cap, seed: not (way == "used_up" and cap == 0.4))
    rows = closed_loop_rows(found, plan, [None], "toy")
    assert [(row.way, row.cap, row.successes) for row in rows[:2]] == [("exact", 0.0, 3), ("drafted", 0.1, 3)]
    assert choose(rows, plan.caps, ("drafted", "used_up")) == 0.2
    assert choose(rows, plan.caps, ("drafted",)) == 0.4


def test_a_large_tolerance_that_was_lucky_is_not_chosen():
    plan = plan_of(margin=0.6)
    rows = closed_loop_rows(episodes_of(lambda way, cap, seed: cap != 0.2), plan, [None], "toy")
    assert choose(rows, plan.caps, plan.ways) == 0.1
    rows = closed_loop_rows(episodes_of(lambda way, cap, seed: way == "exact"), plan, [None], "toy")
    assert choose(rows, plan.caps, plan.ways) is None


def test_rows_compare_only_episodes_that_were_run_both_ways():
    found = episodes_of(lambda way, cap, seed: seed != 0)
    del found[EpisodeKey("toy", 0, "exact", 0.0)]
    rows = closed_loop_rows(found, plan_of(), [None], "toy")
    assert {row.episodes for row in rows} == {2}
    assert {row.success_rate for row in rows} == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caps": ()}, "--caps"),
        ({"caps": (0.2, 0.1)}, "ascending"),
        ({"margin": 0.0}, "margin in"),
        ({"ways": ("guessed",)}, "--ways guessed: valid: drafted, used_up"),
    ],
)
def test_plans_that_can_not_be_right(change, message):
    with pytest.raises(BadConfig, match=message):
        plan_of(**change)


def test_only_a_mode_with_a_stated_physical_tolerance_can_be_fitted():
    plan = plan_of()
    with pytest.raises(BadConfig, match="rule is greedy; fitting needs relaxed_physical"):
        replace(plan, config=resolve({**TOY, "rule": "greedy"}))


# ---- used up --------------------------------------------------------------------------------------------------


class RecordingRobot(ToyRobot):
    def __init__(self):
        super().__init__()
        self.sent = []

    def act(self, action, now_ns):
        self.sent.append(np.array(action))
        return super().act(action, now_ns)


def used_up(cap=0.001, budget=1.0, relative=0.0, unit=0.01):
    robot = RecordingRobot()
    tolerance = Tolerance((cap,) * 4, (budget,) * 4, relative)
    return robot, UsedUpRobot(robot, tolerance, toy_domain(), np.full(4, unit, np.float32))


def test_every_action_is_off_by_the_whole_tolerance_in_one_direction():
    robot, wrapped = used_up(cap=0.001, relative=0.5)
    wrapped.reset(3)
    action = np.array([0.2, -0.4, 0.0, 1.0], np.float32)
    for _ in range(5):
        wrapped.act(action, 0)
    off = (np.array(robot.sent) - action) * 0.01
    np.testing.assert_allclose(np.abs(off), [[0.001 + 0.001, 0.001 + 0.002, 0.001, 0.0]] * 5, atol=1e-8)
    assert (np.sign(off) == np.sign(off[0])).all()


def test_the_sum_of_a_group_stays_within_its_budget():
    _, wrapped = used_up(cap=0.002, budget=0.003)
    wrapped.reset(0)
    off = wrapped.offset(np.zeros(4, np.float32))
    np.testing.assert_allclose(np.abs(off), [0.001, 0.001, 0.001, 0.0])


def test_a_controllers_tolerance_scales_it():
    _, wrapped = used_up(cap=0.002)
    wrapped.reset(0)
    wrapped.scale = 0.25
    np.testing.assert_allclose(np.abs(wrapped.offset(np.zeros(4, np.float32)))[:3], 0.0005)


def test_directions_follow_from_the_seed_and_differ():
    _, wrapped = used_up()
    directions = []
    for seed in (*range(12), 0):
        wrapped.reset(seed)
        directions.append(tuple(np.sign(wrapped.offset(np.zeros(4, np.float32)))))
    assert directions[0] == directions[-1]
    assert len(set(directions)) >= 4


# ---- the log --------------------------------------------------------------------------------------------------

SETTINGS = {"kind": "a test", "model_hash": "abc"}
KEY = EpisodeKey("push", 7, "drafted", 0.001)


def test_episodes_are_kept_from_run_to_run(tmp_path):
    log = EpisodeLog(tmp_path / "deep" / "log.jsonl", SETTINGS)
    log.add(KEY, {"success": True})
    again = EpisodeLog(log.path, SETTINGS)
    assert again.episodes[KEY]["success"] is True
    again.add(KEY._replace(seed=8), {"success": False})
    assert len(EpisodeLog(log.path, SETTINGS).episodes) == 2


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    log = EpisodeLog(tmp_path / "log.jsonl", SETTINGS)
    log.add(KEY, {"success": True})
    log.add(KEY._replace(seed=8), {"success": True})
    log.path.write_text(log.path.read_text()[:-9])
    again = EpisodeLog(log.path, SETTINGS)
    assert list(again.episodes) == [KEY]
    again.add(KEY._replace(seed=9), {"success": True})
    assert [key.seed for key in EpisodeLog(log.path, SETTINGS).episodes] == [7, 9]


def test_the_log_of_another_run_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    EpisodeLog(path, SETTINGS)
    with pytest.raises(BadConfig, match="differs in model_hash; name another --out"):
        EpisodeLog(path, {**SETTINGS, "model_hash": "other"})
    path.write_text("hello\n")
    with pytest.raises(BadConfig, match="not a log of episodes"):
        EpisodeLog(path, SETTINGS)


# ---- the command ----------------------------------------------------------------------------------------------

SWEEP = [
    "calibrate", "tolerance", "--engine", "toy", "--robot", "toy", "--mode", "relaxed", "--set", "drafter=ngram",
    "--set", "rule.cap=[0.05]", "--set", "rule.budget=[0.2]", "--caps", "0.05,0.4", "--max-steps", "12",
    "--observations", "3", "--seed-start", "5",
]  # fmt: skip


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    return ended.value.code, " ".join(captured.out.split()), " ".join(captured.err.split())


def test_the_sweep_writes_a_file_that_the_rule_takes_and_goes_on_where_it_was(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    out = tmp_path / "fit" / "tolerance.json"
    code, text, err = run(capsys, *SWEEP, "--episodes", "1", "--out", str(out))
    assert code == 0, err
    assert "even without a failure 25 are needed" in text
    log = out.with_suffix(".episodes.jsonl")
    lines = log.read_text().splitlines()
    assert len(lines) == 1 + 5  # settings; exact, two caps in two ways
    assert sorted(file.name for file in out.parent.iterdir()) == sorted([out.name, log.name, "tolerance.svg"])
    tree = json.loads(out.read_text())
    assert tree["command"].startswith("vla-spec calibrate tolerance")
    assert [row["cap"] for row in tree["open_loop"]] == [0.0, 0.05, 0.4]
    exact, _, widest = tree["open_loop"]
    assert exact["relaxed_share"] == max(exact["deviation_max"]) == max(exact["difference_max"]) == 0
    assert widest["relaxed_share"] > 0
    assert widest["acceptance_length"] > exact["acceptance_length"]
    assert [(row["way"], row["cap"]) for row in tree["closed_loop"]][:2] == [("exact", 0.0), ("drafted", 0.05)]

    code, _, err = run(capsys, *SWEEP, "--episodes", "2", "--out", str(out))
    assert code == 0, err
    again = log.read_text().splitlines()
    assert again[: len(lines)] == lines, "known episodes were run again"
    assert len(again) == 1 + 10
    code, _, err = run(
        capsys, "run", "--engine", "toy", "--robot", "toy", "--modes", "relaxed", "--set", "drafter=ngram",
        "--set", f"rule.fitted={out}", "--episodes", "1", "--max-steps", "8", "--no-report", "--out",
        str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 0, err
    code, _, err = run(capsys, *SWEEP, "--max-steps", "9", "--out", str(out))
    assert code == 2
    assert "differs in max_steps" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed-start", "9999", "--episodes", "2"], "kept for evaluation"),
        (["--caps", "a,b"], "--caps a,b: valid: numbers"),
        (["--mode", "exact"], "fitting needs relaxed_physical"),
        (["--out", "x.yaml"], "valid: a file name that ends in .json"),
        (["--tasks", "push"], "has no tasks"),
    ],
)
def test_bad_requests_are_one_sentence(capsys, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *(SWEEP if "--mode" not in change else SWEEP[:6]), *change)
    assert code == 2
    assert message in err
