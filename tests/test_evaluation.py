"""Closed loop and comparison with the toy engine and robot: rows, baselines, repeatability."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vla_spec.assemble import Assembler
from vla_spec.benchmark import BenchPlan, benchmark, grid
from vla_spec.comparison import Sample, compare
from vla_spec.config import merge, read_mode, resolve
from vla_spec.costs import Costs
from vla_spec.errors import BadConfig, BadModel, UnknownOption
from vla_spec.evaluation import Plan, baseline_of, evaluate, first_observation, task_names
from vla_spec.progress import Silent
from vla_spec.results import save

TOY = {"engine": "toy", "robot": "toy"}


class Listening:
    """A reporter that remembers."""

    def __init__(self):
        self.phases, self.texts = {}, []

    def phase(self, name, total):
        self.phases[name] = total

    def step(self, text=""):
        self.texts.append(text)


def configs(*names, **changes):
    return tuple(resolve(merge(merge(read_mode(name)[1], TOY), changes), name) for name in names)


@pytest.fixture(scope="module")
def looped():
    progress = Listening()
    plan = Plan(
        configs("autoregressive", "previous_chunk", "jacobi"), None, range(10_000, 10_003), max_steps=24,
        num_pictures=1, num_samples=6,
    )  # fmt: skip
    return evaluate(plan, progress), progress


def test_there_is_a_row_per_mode_with_all_episodes(looped):
    results, _ = looped
    assert [row.mode for row in results.rows] == ["autoregressive", "previous_chunk", "jacobi"]
    assert all(row.episodes == 3 for row in results.rows)
    assert len(results.episodes) == 9
    assert sum(score.episodes for score in results.scores) == 9


def test_exact_modes_agree_with_autoregression_token_for_token(looped):
    for row in looped[0].rows:
        assert row.is_exact
        assert row.token_agreement == 1.0
        assert row.max_deviation == 0.0


def test_autoregression_is_its_own_baseline(looped):
    base = looped[0].rows[0]
    assert base.speedup_decode == 1.0
    assert base.tokens_per_forward == 1.0
    assert base.forwards_per_chunk == 32.0


def test_speedups_are_the_ratio_of_the_rows_that_are_shown(looped):
    base, _, jacobi = looped[0].rows
    assert jacobi.speedup_decode == pytest.approx(base.decode_ms_p50 / jacobi.decode_ms_p50, rel=1e-3)
    assert jacobi.speedup_chunk == pytest.approx(base.chunk_ms_p50 / jacobi.chunk_ms_p50, rel=1e-3)
    assert jacobi.acceptance_length > 1.5


def test_percentiles_are_ordered_and_counts_add_up(looped):
    results, _ = looped
    for row in results.rows:
        assert row.chunk_ms_p50 <= row.chunk_ms_p90 <= row.chunk_ms_p99 <= row.chunk_ms_max
        assert row.chunks == sum(e["num_plans"] for e in results.episodes if e["mode"] == row.mode)
        assert len(results.series[row.mode].chunk_ms) == 101


def test_modes_take_turns_and_each_begins_once(looped):
    _, progress = looped
    order = [text.split()[-2].rstrip(":") for text in progress.texts if " seed " in text]
    assert order[:3] == ["autoregressive", "previous_chunk", "jacobi"]
    assert order[3:6] == ["previous_chunk", "jacobi", "autoregressive"]
    assert order[6:9] == ["jacobi", "autoregressive", "previous_chunk"]
    assert progress.phases["closed loop"] == 9


def test_films_hold_what_plans_were_made_from(looped):
    films = looped[0].films
    assert {film.mode for film in films} == {"autoregressive", "previous_chunk", "jacobi"}
    for film in films:
        assert film.frames.dtype == np.uint8
        assert film.frames.shape[1:] == (16, 32, 3)
        assert film.frame_s == pytest.approx(4 * 0.0125)


def test_real_time_never_leaves_the_robot_without_a_command():
    plan = Plan(
        configs("autoregressive", "jacobi", runtime={"clock": "real", "deadline_ms": 40}), None, range(1), 20, 0, 4
    )
    results = evaluate(plan, Silent())
    for row, episode in zip(results.rows, results.episodes, strict=True):
        assert episode["num_steps"] == 20
        assert sum(episode["rungs"].values()) == 20
        assert row.speedup_decode is not None


def test_virtual_time_repeats_bit_for_bit_from_a_cost_table(tmp_path):
    def once(costs):
        runtime = {"clock": "virtual", "deadline_ms": 5} | ({"costs": str(costs)} if costs else {})
        plan = Plan(configs("autoregressive", "jacobi", runtime=runtime), None, range(2), 24, 0, 0)
        return evaluate(plan, Silent())

    save(once(None), tmp_path, "first")
    first, second = once(tmp_path / "costs.json"), once(tmp_path / "costs.json")
    assert first.rows == second.rows
    assert first.episodes == second.episodes
    assert first.series == second.series


def test_a_deadline_that_nothing_meets_is_missed_by_all():
    tight = configs("autoregressive", runtime={"deadline_ms": 0.001})
    (row,) = evaluate(Plan(tight, None, range(1), 8, 0, 0), Silent()).rows
    assert row.deadline_miss_rate == 1.0
    wide = configs("autoregressive", runtime={"deadline_ms": 60_000})
    (row,) = evaluate(Plan(wide, None, range(1), 8, 0, 0), Silent()).rows
    assert row.deadline_miss_rate == 0.0


def test_without_autoregression_among_the_modes_it_is_measured_beside_them():
    (row,) = evaluate(Plan(configs("jacobi"), None, range(1), 16, 0, 4), Silent()).rows
    assert row.mode == "jacobi"
    assert row.speedup_decode is not None
    assert row.token_agreement == 1.0


def test_the_baseline_differs_in_decoding_only():
    (config,) = configs("jacobi", runtime={"deadline_ms": 7})
    base = baseline_of([config])
    assert (base.drafter.name, base.rule.name) == ("none", "greedy")
    assert base.controller.options.gamma == 0
    assert base.runtime == config.runtime
    assert base.engine == config.engine


def test_missing_weights_are_one_clear_error(tmp_path):
    missing = resolve({"engine": "onnxruntime", "robot": "toy", "model": str(tmp_path / "none")}, "autoregressive")
    with pytest.raises(BadModel, match=r"no weights in .*none.*vla-spec export"):
        evaluate(Plan((missing,), None, range(1)), Silent())


def test_tasks_that_do_not_exist_are_refused():
    with pytest.raises(BadConfig, match="robot 'toy' has no tasks"):
        task_names(resolve(TOY).robot, ("reach",))
    robot = resolve({"engine": "toy", "robot": "metaworld"}).robot
    with pytest.raises(UnknownOption, match="did you mean 'drawer-open'"):
        task_names(robot, ("drawer-opn",))
    assert len(task_names(robot, None)) >= 15
    with pytest.raises(BadConfig, match="twice"):
        task_names(robot, ("drawer-open", "drawer-open"))


def test_modes_with_different_robots_do_not_mix():
    mixed = (*configs("autoregressive"), *configs("jacobi", robot={"name": "toy", "image_size": 32}))
    with pytest.raises(BadConfig, match="same robot"):
        evaluate(Plan(mixed, None, range(1)), Silent())


def test_the_grid_pairs_every_drafter_with_every_rule():
    modes = {config.mode for config in grid(TOY)}
    assert {"autoregressive", "ngram+greedy", "jacobi+relaxed_bins", "previous_chunk+greedy"} <= modes
    assert all(config.engine.name == "toy" for config in grid(TOY))


@pytest.fixture(scope="module")
def benched():
    everything = grid(TOY)
    plan = BenchPlan(everything, None, range(10_000, 10_001), num_observations=5, num_repeats=2, max_steps=24)
    return benchmark(plan, Silent())


def test_a_benchmark_gives_every_mode_the_same_observations(benched):
    assert benched.rows[0].mode == "autoregressive"
    assert {row.chunks for row in benched.rows} == {10}


def test_modes_that_cannot_be_built_are_named_with_the_reason(benched):
    (note,) = [text for text in benched.notes if "block_head+greedy" in text]
    assert note.startswith("left out: ")
    assert "model folder" in note
    assert "block_head+greedy" not in {row.mode for row in benched.rows}


def test_exact_rows_of_a_benchmark_agree_and_relaxed_ones_say_how_far_off(benched):
    rows = {row.mode: row for row in benched.rows}
    assert rows["jacobi+greedy"].token_agreement == 1.0
    relaxed = rows["jacobi+relaxed_bins"]
    assert not relaxed.is_exact
    assert 0 < relaxed.max_deviation <= 9 * 2 / 256 + 1e-6
    assert relaxed.token_agreement < 1.0


def test_the_interesting_modes_of_a_benchmark_run_in_closed_loop(benched):
    looped = [row for row in benched.rows if row.episodes]
    assert "autoregressive" in {row.mode for row in looped}
    assert {row.is_exact for row in looped} == {True, False}


def test_a_benchmark_refuses_unknown_closed_loop_modes():
    plan = BenchPlan(configs("jacobi"), None, range(1), 2, 1, closed_loop=("nothing",), max_steps=8)
    with pytest.raises(BadConfig, match="no mode named 'nothing'"):
        benchmark(plan, Silent())


def test_saved_results_are_plain_json(looped, tmp_path):
    save(looped[0], tmp_path, "x")
    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["configs"]["jacobi"]["drafter"]["name"] == "jacobi"
    assert tree["costs"]["jacobi"]["step"]["1"]["0.5"] > 0


def test_the_limit_is_measured_in_turn_with_the_plans():
    """On a virtual clock it is what the cost table says: one prefill and one forward over the whole chunk."""
    assembler = Assembler()
    tree = {
        "engine": "toy", "robot": "toy", "drafter": "ngram", "controller": {"name": "fixed", "gamma": 4},
        "runtime": {"clock": "virtual"},
    }  # fmt: skip
    config = resolve(tree, "probe")
    example = first_observation(assembler, config.robot, None, 0)
    costs = Costs.constant(1000, {1: 100, 32: 720}, {1: 10, 31: 10})
    assembly = assembler.assemble(config, example, costs)
    compared = compare([assembly], assembly, [Sample(example, None)], 3, Silent())["probe"]
    assert compared.forward_ns.tolist() == [100] * 3
    assert compared.limit_ns.tolist() == [1000 + 720] * 3
    assert compared.limit_ratio == pytest.approx(compared.plans[0].plan_ns / 1720)
