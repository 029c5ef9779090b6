import json

import numpy as np
import pytest

from vla_spec.errors import BadConfig
from vla_spec.ladder import Reason
from vla_spec.trace import PlanRecord, Quantiles, Trace, quantiles, summary
from vla_spec.types import Round, Rung


def round_(drafted=0, accepted=0, total=10, step=7):
    return Round(drafted, accepted, 0, 1, step, 1, 1, total)


PREFILL = round_(total=100, step=90)


def plan(chunk_id=0, took=50, deadline=100, rounds=(), rung=Rung.EXACT, reason=Reason.NONE):
    return PlanRecord(chunk_id, 4 * chunk_id, 0, 0, took, deadline, 5, 40, 5, rung, reason, 8, 32, 32, tuple(rounds))


def test_an_empty_window_has_no_statistics_and_says_so():
    empty = Trace().summary()
    assert (empty.num_plans, empty.num_rounds, empty.num_misses) == (0, 0, 0)
    assert empty.plan_ns is empty.tokens_per_forward is empty.forwards_per_chunk is empty.mean_acceptance_length is None
    assert empty.acceptance_by_position == ()
    json.dumps(empty.as_json(), allow_nan=False)


def test_statistics_of_one_chunk():
    trace = Trace()
    trace.record(plan(rounds=[PREFILL, round_(4, 4), round_(4, 1), round_(2, 0), round_(0, 0)]))
    s = trace.summary()
    assert s.tokens_per_forward == (1 + 5 + 2 + 1 + 1) / 5
    assert s.forwards_per_chunk == 5
    assert s.mean_acceptance_length == (5 + 2 + 1 + 1) / 4  # behind the prefill, the bonus included
    assert s.acceptance_by_position == (2 / 3, 1 / 3, 1 / 2, 1 / 2)
    assert s.step_ns == Quantiles(7, 7, 7, 7, 4)
    assert s.round_ns is not None
    assert (s.round_ns.max, s.round_ns.num_values) == (100, 5)
    assert (s.rungs["EXACT"], s.reasons["NONE"]) == (1, 1)


def test_a_plan_without_a_forward_counts_as_a_plan_only():
    trace = Trace()
    trace.record(plan(rounds=[PREFILL]))
    trace.record(plan(1, rung=Rung.HOLD, reason=Reason.DEADLINE_PAST))
    s = trace.summary()
    assert (s.num_plans, s.forwards_per_chunk, s.tokens_per_forward, s.mean_acceptance_length) == (2, 1, 1, None)


def test_a_miss_is_a_negative_slack():
    trace = Trace()
    for chunk_id, took in enumerate((99, 100, 101)):
        trace.record(plan(chunk_id, took))
    assert (trace.summary().num_misses, trace.total_misses) == (1, 1)


def test_the_rings_keep_the_last_rows_oldest_first():
    trace = Trace(num_plans=3, num_rounds=4)
    for chunk_id in range(5):
        trace.record(plan(chunk_id, rounds=[PREFILL, round_(1, 1)]))
    assert trace.plans()["chunk_id"].tolist() == [2, 3, 4]
    assert trace.rounds()["chunk_id"].tolist() == [3, 3, 4, 4]
    assert trace.rounds()["index"].tolist() == [0, 1, 0, 1]
    assert (trace.total_plans, trace.total_rounds, trace.summary().num_plans) == (5, 10, 3)


def test_what_is_read_is_a_copy():
    trace = Trace(num_plans=2)
    trace.record(plan())
    rows = trace.plans()
    trace.record(plan(7))
    trace.record(plan(8))
    assert rows["chunk_id"].tolist() == [0]


def test_every_field_arrives_in_its_column():
    trace = Trace()
    record = PlanRecord(1, 2, 3, 4, 5, 6, 7, 8, 9, Rung.STOP, Reason.BAD_SCORES, 12, 13, 14, (PREFILL, PREFILL))
    trace.record(record)
    row = trace.plans()[0]
    assert row.tolist() == (1, 2, 3, 4, 5, 6, 7, 8, 9, Rung.STOP, Reason.BAD_SCORES, 12, 13, 14, 2)
    for name in record._fields[:-1]:
        assert row[name] == getattr(record, name)
    for name, value in PREFILL._asdict().items():
        assert trace.rounds()[0][name] == value


def test_a_trace_that_is_switched_off_records_nothing():
    trace = Trace()
    trace.is_enabled = False
    trace.record(plan(took=200, rounds=[PREFILL]))
    assert (trace.total_plans, trace.total_rounds, trace.total_misses, len(trace.plans())) == (0, 0, 0, 0)


def test_a_miss_is_dumped_with_what_came_before_it(tmp_path):
    trace = Trace(dump_dir=tmp_path / "dumps", dump_plans=2)
    trace.record(plan(0, rounds=[PREFILL]))
    trace.record(plan(1, rounds=[PREFILL, round_(3, 2)]))
    trace.record(plan(2, took=200, rounds=[PREFILL], reason=Reason.DEADLINE))
    assert not (tmp_path / "dumps").exists()  # recording does no I/O
    (path,) = trace.flush()
    assert path.name == "miss-000002.json"
    dump = json.loads(path.read_text())
    assert [row["chunk_id"] for row in dump["plans"]] == [1, 2]
    assert [(row["chunk_id"], row["num_drafted"]) for row in dump["rounds"]] == [(1, 0), (1, 3), (2, 0)]
    assert trace.flush() == []


def test_dumps_are_bounded_and_overwritten_rows_are_left_out(tmp_path):
    trace = Trace(num_plans=4, dump_dir=tmp_path, max_dumps=2)
    for chunk_id in range(5):
        trace.record(plan(chunk_id, took=200))
    assert [path.name for path in trace.flush()] == ["miss-000001.json"]  # row 0 is gone
    for chunk_id in range(5, 9):
        trace.record(plan(chunk_id, took=200))
    assert len(trace.flush()) == 1
    trace.record(plan(9, took=200))
    assert trace.flush() == []
    assert trace.total_misses == 10


def test_summary_of_any_rows():
    trace = Trace()
    for chunk_id in range(4):
        trace.record(plan(chunk_id, took=10 * chunk_id))
    rows = trace.plans()
    assert summary(rows[2:], trace.rounds()).plan_ns == Quantiles(25, 29, 29.9, 30, 2)


def test_quantiles_interpolate_linearly():
    assert quantiles(np.arange(101)) == Quantiles(50, 90, 99, 100, 101)
    assert quantiles(np.empty(0)) is None


def test_capacities_are_checked():
    with pytest.raises(BadConfig, match="num_plans=0"):
        Trace(num_plans=0)
