"""Start-up cost tables: measured without warm-up, interpolated, written and read."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from vla_spec.calib.cost_file import Wanted, load_costs
from vla_spec.calib.device import this_device
from vla_spec.config import resolve
from vla_spec.costs import (
    MEASURED_CALLS,
    WARMUP_CALLS,
    Costs,
    measure_adapter,
    measure_drafter,
    measure_engine,
)
from vla_spec.errors import BadConfig
from vla_spec.types import EMPTY_DRAFT, Plan, Scores


class Ticking:
    """A clock that a fake engine moves."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


class Engine:
    """A prefill costs 100, a step 10 plus 2 per token; the first calls of each kind cost ten times that."""

    max_step = 16
    features = None

    def __init__(self, clock):
        self.clock, self.calls = clock, {}

    def spend(self, kind, ns):
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.clock.now += ns * (10 if self.calls[kind] <= WARMUP_CALLS else 1)

    def prefill(self, inputs):
        self.spend("prefill", 100)
        return Scores(np.zeros((1, 4), np.float32))

    def step(self, tokens, parents):
        self.spend(f"step {len(tokens)}", 10 + 2 * len(tokens))


class Drafter:
    def __init__(self, clock):
        self.clock, self.begun, self.asked = clock, 0, 0

    def begin(self, inputs, history):
        self.begun += 1

    def propose(self, prefix, plan, features):
        self.asked += 1
        self.clock.now += 3 * plan.gamma
        return EMPTY_DRAFT


def wanted():
    """What a run's own table is never asked about."""
    return Wanted(None, None, this_device, None, 32, False)


def measured():
    clock = Ticking()
    engine = Engine(clock)
    return measure_engine(engine, {}, 32, clock), engine, clock


def test_warm_up_is_left_out_and_sizes_stop_at_the_engines_limit():
    costs, engine, _ = measured()
    assert costs.prefill_ns == 100
    assert {k: cost[0.5] for k, cost in costs.step.items()} == {k: 10 + 2 * k for k in (1, 2, 4, 6, 8, 12, 16)}
    assert engine.calls["step 4"] == WARMUP_CALLS + MEASURED_CALLS


def test_costs_between_sizes_are_interpolated_and_never_extrapolated():
    costs, _, _ = measured()
    assert costs.step_ns(10) == 30
    assert costs.step_ns(99) == costs.step_ns(16) == 42
    assert costs.limit_ns(12) == 100 + 34


def test_a_drafter_is_told_about_a_new_chunk_before_each_call():
    costs, engine, clock = measured()
    drafter = Drafter(clock)
    full = measure_drafter(costs, drafter, engine, {}, Plan(0, 0, 2), clock)
    assert drafter.begun == drafter.asked
    assert {k: cost[0.5] for k, cost in full.draft.items()} == {1: 3, 2: 6, 4: 12, 8: 24, 15: 45}
    assert full.medians()["draft"][4] == 12


def test_a_table_survives_being_written_and_read(tmp_path):
    costs = replace(measured()[0], encode={0.5: 7.0, 1.0: 9.0}, decode={0.5: 3.0})
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"exact": costs.as_json()}))
    assert load_costs(file, "exact", wanted()) == costs


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"exact": 3}', '{"exact": {"prefill": {"0.5": 1}, "step": {}}}'])
def test_what_is_no_table_is_refused_by_name(tmp_path, text):
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(BadConfig, match=r"runtime\.costs: .*costs\.json"):
        load_costs(file, "exact", wanted())
    with pytest.raises(BadConfig, match="can't be read"):
        load_costs(tmp_path / "none.json", "exact", wanted())


@pytest.mark.parametrize("key", ["prefill", "step"])
def test_a_table_needs_prefill_and_step(key):
    tree = measured()[0].as_json()
    del tree[key]
    with pytest.raises(BadConfig, match="not a cost table"):
        Costs.from_json(tree, "here")


def test_quantiles_rise():
    costs, _, _ = measured()
    for cost in (costs.prefill, *costs.step.values()):
        assert all(a <= b for a, b in itertools.pairwise(cost.values()))


def test_quantiles_between_the_stored_ones_are_interpolated_in_q_and_size_and_clamped_outside():
    step = {1: {0.5: 10.0, 0.9: 20.0}, 3: {0.5: 30.0, 0.9: 60.0}}
    costs = Costs({0.5: 100.0, 0.9: 140.0, 1.0: 200.0}, step, {2: {0.5: 4.0, 1.0: 8.0}}, {0.5: 7.0}, {0.5: 3.0})
    assert costs.prefill_quantile_ns(0.7) == pytest.approx(120)
    assert costs.prefill_quantile_ns(0.1) == 100
    assert costs.prefill_quantile_ns(0.99) == pytest.approx(194)
    assert costs.step_quantile_ns(1, 0.7) == pytest.approx(15)
    assert costs.step_quantile_ns(2, 0.7) == pytest.approx((15 + 45) / 2)
    assert costs.step_quantile_ns(0, 0.5) == 10
    assert costs.step_quantile_ns(9, 0.999) == 60
    assert costs.draft_quantile_ns(9, 0.75) == pytest.approx(6)
    assert (costs.encode_ns, costs.decode_ns) == (7, 3)


def test_what_was_not_measured_costs_nothing():
    costs = Costs.constant(100, {1: 10})
    assert (costs.encode_ns, costs.decode_ns, costs.draft_quantile_ns(4, 0.99)) == (0, 0, 0)
    assert costs.step_quantile_ns(4, 0.99) == 10


def test_encoding_and_decoding_are_measured_without_warm_up():
    clock = Ticking()

    class Adapter:
        calls = 0

        def encode(self, observation):
            self.calls += 1
            clock.now += 50 if self.calls <= WARMUP_CALLS else 5

        def decode(self, tokens):
            clock.now += len(tokens)

    full = measure_adapter(measured()[0], Adapter(), None, np.zeros(8, np.int32), clock)
    assert (full.encode_ns, full.decode_ns) == (5, 8)
    assert full.prefill_ns == 100


def test_a_runs_table_has_no_loads_to_choose_from(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"exact": measured()[0].as_json()}))
    with pytest.raises(BadConfig, match=r"costs_load.*'busy'.*without loads"):
        load_costs(file, "exact", wanted()._replace(load="busy"))


@pytest.mark.parametrize(
    ("prefill", "words"),
    [
        ({"0.5": -1}, "0 or more"),
        ({"0.5": 2, "0.9": 1}, "rising"),
        ({"0.5": float("nan")}, "NaN"),
        ({"0.9": 1}, "0.5"),
        ({"0.5": 1, "1.5": 2}, "from 0 to 1"),
    ],
)
def test_a_runs_table_with_impossible_costs_is_refused(tmp_path, prefill, words):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"exact": {**measured()[0].as_json(), "prefill": prefill}}))
    with pytest.raises(BadConfig, match=words):
        load_costs(file, "exact", wanted())


def test_a_tree_is_drafted_as_deep_as_its_controller_goes():
    asked = []

    class Asked(Drafter):
        def propose(self, prefix, plan, features):
            asked.append((plan.gamma, plan.depth, plan.top_k))
            return super().propose(prefix, plan, features)

    costs, engine, clock = measured()
    measure_drafter(costs, Asked(clock), engine, {}, Plan(0, 3, 2), clock)
    assert set(asked) == {(1, 1, 2), (2, 2, 2), (4, 3, 2), (8, 3, 2), (15, 3, 2)}


def test_a_load_without_a_table_is_refused():
    with pytest.raises(BadConfig, match=r"runtime.*costs_load is 'busy' without a table"):
        resolve({"engine": "toy", "robot": "toy", "runtime": {"costs_load": "busy"}})
