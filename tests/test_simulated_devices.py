"""The table of tables: stated acceptance is what comes out, and the virtual clock adds up to the published times."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_spec.calib.cost_file import read_cost_file
from vla_spec.costs import Costs

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "simulated_devices.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("simulated_devices", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulated_devices"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def costs_of(program, name):
    (table,) = read_cost_file(program.PUBLISHED / f"{name}.costs.json").tables
    return table.costs(table.drafters[0])


@pytest.mark.parametrize(
    ("name", "expected_ms"),
    [("a800_openvla_7b", 174.0), ("rtx4090_openvla_7b", 161.9), ("h100_openvla_7b", 7e3 / 51.0)],
)
def test_autoregression_takes_as_long_as_was_published(program, name, expected_ms):
    found = program.Simulation(costs_of(program, name), 1, "autoregression", 0.0, 0).run(20, None)
    assert found["chunk_ms_p50"] == pytest.approx(expected_ms, abs=0.01)
    assert found["chunk_ms_p99"] == pytest.approx(expected_ms, abs=0.01)
    assert found["rate_hz"] == pytest.approx(1e3 / expected_ms, rel=1e-3)
    assert (found["tokens"], found["tokens_per_forward"], found["draft_length"]) == (7, 1, 0)


def test_a_deadline_cuts_the_slow_and_spares_the_fast(program):
    costs = costs_of(program, "rtx4090_openvla_7b")
    just_late = program.Simulation(costs, 1, "autoregression", 0.0, 0).run(20, 161.8)
    assert (just_late["miss_rate"], just_late["late_rate"], just_late["rate_hz"]) == (1, 1, 0)
    in_time = program.Simulation(costs, 1, "autoregression", 0.0, 0).run(20, 162.0)
    assert (in_time["miss_rate"], in_time["late_rate"]) == (0, 0)
    aware = program.Simulation(costs, 1, "deadline", 0.99, 0).run(60, 150.0)
    assert aware["miss_rate"] < 0.2
    assert aware["late_rate"] == 0


@pytest.mark.parametrize("length", [1.63, 2.36])
def test_the_drafter_reaches_the_published_tokens_per_forward(program, length):
    probability = program.probability_of(length, 4, 7)
    found = program.Simulation(Costs.constant(1e6, {1: 1e6, 64: 1e6}), 1, "fixed", probability, 0).run(600, None)
    assert found["tokens_per_forward"] == pytest.approx(length, rel=0.03)


def test_certain_and_hopeless_drafters_are_the_ends_of_the_scale(program):
    assert program.probability_of(1.0, 4, 7) == pytest.approx(0, abs=1e-6)
    # One round of five tokens and one of the last: three tokens per forward at most.
    assert program.probability_of(3.0, 4, 7) == pytest.approx(1, abs=1e-6)
    assert program.probability_of(1.5, 1, 3) == pytest.approx(2 / 3, abs=1e-6)


def test_a_spread_keeps_medians_and_repeats_from_its_seed(program):
    costs = costs_of(program, "a800_openvla_7b")
    spread = program.with_spread(costs, 0.1)
    assert spread.prefill_ns == pytest.approx(costs.prefill_ns)
    assert spread.step_quantile_ns(1, 0.9) == pytest.approx(1.1367 * costs.step_ns(1), rel=1e-3)
    one, again = (program.Simulation(spread, 1, "fixed", 0.5, 3).run(30, 150.0) for _ in range(2))
    assert one == again
    assert one != program.Simulation(spread, 1, "fixed", 0.5, 4).run(30, 150.0)


def test_tokens_are_openvlas(program):
    domain = program.domain_of(3)
    assert (domain.num_tokens, domain.tokens_per_step, domain.vocab_size) == (21, 7, 256)
    assert np.flatnonzero(domain.never_relaxed).tolist() == [6, 13, 20]
    assert domain.group.tolist() == [0] * 6 + [1] + [2] * 6 + [3] + [4] * 6 + [5]


def test_the_program_writes_rows_that_say_what_they_are(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "DEADLINES", (None, 1.0))
    monkeypatch.setattr(program, "WARMUP_CHUNKS", 2)
    monkeypatch.setattr(sys, "argv", ["simulated_devices.py", "--out", str(tmp_path), "--chunks", "4"])
    program.main()
    out = capsys.readouterr().out
    assert out.count("SIMULATION") == 6

    result = json.loads((tmp_path / "simulated_devices.json").read_text())
    assert result["kind"] == "simulation"
    assert len(result["rows"]) == 6 * 2 * 5
    assert {row["table"] for row in result["rows"]} == set(result["tables"])
    assert all("estimate" in label for label in result["tables"].values())
