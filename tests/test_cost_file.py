"""Cost tables on disk: what is written is read; what can't be right, or is of something else, is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest

from vla_spec.calib.cost_file import (
    CostFile,
    Device,
    DrafterIdentity,
    EngineIdentity,
    Wanted,
    is_supported,
    load_costs,
    read_cost_file,
    write_cost_file,
)
from vla_spec.costs import Costs
from vla_spec.errors import BadConfig

HASH = "a" * 64
ENGINE = {"name": "onnxruntime", "model_hash": HASH, "precision": "fp32", "provider": "CPU", "num_threads": 1}
BLOCK = {"name": "block_head", "options": {"min_confidence": 0.15}}
DEVICE = {"cpu": "some CPU", "cores": 2, "gpu": None}


def cost(median, n=1000, spread=1.1):
    quantiles = {"0.01": median, "0.5": median, "0.9": median * spread, "0.99": median * spread * 1.2}
    if n >= 1000:
        quantiles["0.999"] = median * spread * 1.3
    return {"n": n, "warm_up": 11, "first_call": 5 * median, "quantiles": quantiles, "max": median * spread * 2}


def table(load="idle", scale=1.0, **changes):
    return {
        "load": {"key": load, "description": "nothing"},
        "engine": ENGINE,
        "prefill": cost(7e6 * scale),
        "step": {str(k): cost((2e6 + 2e5 * k) * scale) for k in (1, 4, 16, 32)},
        "step_tree": {str(k): cost((3e6 + 2e5 * k) * scale) for k in (4, 32)},
        "encode": cost(7e4),
        "decode": cost(6e4),
        "drafters": [{"modes": ["exact"], "drafter": BLOCK, "draft": {"1": cost(4e5), "31": cost(9e5)}}],
        **changes,
    }


def measured(*tables, **changes):
    return {
        "format": "vla_spec.costs/1",
        "origin": "measured",
        "label": "measured on some CPU",
        "device": DEVICE,
        "created": "2026-11-24T12:00:00+00:00",
        "tables": list(tables or [table()]),
        **changes,
    }


def wanted(**changes):
    """What the loaded engine and drafter ask for."""
    full = {
        "engine": EngineIdentity(**ENGINE),
        "drafter": DrafterIdentity(**BLOCK),
        "device": lambda: Device(**DEVICE),
        "load": None,
        "num_tokens": 32,
        "is_other_device_allowed": False,
        **changes,
    }
    return Wanted(**full)


@pytest.fixture
def store(tmp_path):
    def write(tree):
        path = tmp_path / "machine.costs.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return path

    return write


def refusal(path, want=None):
    """The one sentence that is given."""
    with pytest.raises(BadConfig) as raised:
        load_costs(path, "exact", want or wanted())
    message = str(raised.value)
    assert message.startswith("runtime.costs")
    assert "\n" not in message
    return message


def test_a_calibration_becomes_costs_with_the_maximum_as_last_level(store):
    costs = load_costs(store(measured()), "whatever the mode is called", wanted())
    assert isinstance(costs, Costs)
    assert costs.prefill_ns == 7e6
    assert costs.prefill_quantile_ns(1.0) == 7e6 * 1.1 * 2
    assert costs.prefill_quantile_ns(0.9) == pytest.approx(7.7e6)
    assert costs.step_ns(1) == 2.2e6
    assert costs.draft_quantile_ns(31, 0.5) == 9e5
    assert (costs.encode_ns, costs.decode_ns) == (7e4, 6e4)


def test_a_drafter_that_branches_gets_the_costs_of_branching_steps(store):
    tree = {**BLOCK, "top_k": 4, "depth": 6}
    drafters = [{"drafter": tree, "draft": {"1": cost(4e5), "31": cost(9e5)}}]
    costs = load_costs(store(measured(table(drafters=drafters))), "", wanted(drafter=DrafterIdentity(**tree)))
    assert {k: step[0.5] for k, step in costs.step.items()} == {1: 2.2e6, 4: 3.8e6, 32: 9.4e6}


def test_what_was_written_is_read_back(store, tmp_path):
    file = CostFile.model_validate(measured(table(), table("busy", 2.0)))
    path = tmp_path / "again.costs.json"
    write_cost_file(path, file)
    assert read_cost_file(path) == file
    assert [path.name for path in tmp_path.iterdir()] == ["again.costs.json"]


def test_a_load_is_chosen_by_its_key(store):
    path = store(measured(table(), table("busy", 2.0)))
    assert load_costs(path, "", wanted(load="busy")).prefill_ns == 14e6
    assert load_costs(path, "", wanted(load="idle")).prefill_ns == 7e6
    message = refusal(path)
    for word in ("several loads", "costs_load", "idle, busy"):
        assert word in message
    message = refusal(path, wanted(load="bussy"))
    for word in ("runtime.costs_load", "'bussy'", "idle, busy"):
        assert word in message
    assert load_costs(store(measured(table("busy"))), "", wanted()).prefill_ns == 7e6


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("name", "pytorch", ["another engine", "'onnxruntime'", "'pytorch'", "calibrate costs"]),
        ("model_hash", "b" * 64, ["another model", "aaaaaaaaaaaa,", "bbbbbbbbbbbb"]),
        ("precision", "int8", ["another precision", "'fp32'", "'int8'"]),
        ("provider", "CUDA", ["another provider", "'CPU'", "'CUDA'"]),
        ("num_threads", 2, ["another number of threads", "has 1", "loaded is 2"]),
    ],
)
def test_costs_of_another_engine_are_refused_also_on_a_virtual_clock(store, key, value, words):
    engine = EngineIdentity(**{**ENGINE, key: value})
    for is_allowed in (False, True):
        message = refusal(store(measured()), wanted(engine=engine, is_other_device_allowed=is_allowed))
        for word in words:
            assert word in message


@pytest.mark.parametrize(
    "drafter",
    [
        {"name": "ngram"},
        {**BLOCK, "options": {"min_confidence": 0.2}},
        {**BLOCK, "top_k": 4},
        {**BLOCK, "depth": 3},
    ],
)
def test_costs_of_another_drafter_or_shape_are_refused(store, drafter):
    message = refusal(store(measured()), wanted(drafter=DrafterIdentity(**drafter)))
    assert "no costs of drafter" in message
    assert "block_head (min_confidence=0.15)" in message


def test_plain_decoding_needs_no_drafting_column(store):
    costs = load_costs(store(measured()), "", wanted(drafter=DrafterIdentity(name="none")))
    assert costs.step_ns(1) == 2.2e6
    assert costs.draft == {}
    assert costs.draft_quantile_ns(8, 0.99) == 0


@pytest.mark.parametrize("change", [{"cpu": "another CPU"}, {"cores": 4}, {"gpu": "NVIDIA X"}])
def test_costs_of_another_device_are_refused_unless_allowed(store, change):
    elsewhere = Device(**{**DEVICE, **change})
    want = wanted(device=lambda: elsewhere)
    message = refusal(store(measured()), want)
    for word in ("another device", "some CPU, 2 cores", str(elsewhere), "allow_other_device", "virtual"):
        assert word in message
    assert load_costs(store(measured()), "", want._replace(is_other_device_allowed=True)).prefill_ns == 7e6


def test_costs_are_never_extrapolated_to_larger_steps(store):
    message = refusal(store(measured()), wanted(num_tokens=48))
    for word in ("steps of 32 tokens", "takes 48", "never extrapolated"):
        assert word in message


def changed(change):
    tree = measured()
    change(tree, tree["tables"][0])
    return tree


def without(*path):
    def change(tree, one):
        at = one
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change


def setting(value, *path):
    def change(tree, one):
        at = one
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("prefill"), ["tables.0.prefill", "required"]),
        (without("step"), ["tables.0.step", "required"]),
        (without("encode"), ["tables.0.encode", "required"]),
        (without("decode"), ["tables.0.decode", "required"]),
        (without("drafters"), ["tables.0.drafters", "required"]),
        (setting({}, "drafters", 0, "draft"), ["draft of block_head", "no sizes"]),
        (without("step", "1"), ["step: no cost of size 1"]),
        (without("prefill", "quantiles", "0.5"), ["prefill", "no median"]),
        (setting(1.0, "prefill", "quantiles", "0.9"), ["p90 (1 ns) lies below p50"]),
        (setting(1.0, "prefill", "max"), ["max (1 ns) lies below p99.9"]),
        (setting(-1.0, "prefill", "quantiles", "0.01"), ["prefill.quantiles", "greater than or equal to 0"]),
        (setting("fast", "prefill", "quantiles", "0.5"), ["prefill.quantiles", "number"]),
        (setting(9e6, "prefill", "quantiles", "1.5"), ["level 1.5", "between 0 and 1"]),
        (setting(999, "prefill", "n"), ["p99.9 from 999 samples", "1000 or more"]),
        (setting(50, "encode", "n"), ["p1 from 50 samples", "100 or more"]),
        (setting(cost(1.9e6), "step", "4"), ["step: size 4 costs 1.900 ms and size 1 2.200 ms", "10%"]),
        (setting(cost(2e5), "drafters", 0, "draft", "31"), ["draft of block_head", "size 31", "size 1"]),
        (setting(cost(1e6), "step_tree", "32"), ["step_tree", "size 32"]),
        (setting(cost(1e6), "step", "0"), ["size 0", "1 or more"]),
        (setting(cost(1e6), "step", "few"), ["step.few", "integer"]),
        (setting(7, "prefil"), ["tables.0.prefil", "not permitted"]),
        (lambda tree, one: tree.update(format="vla_spec.costs/2"), ["'vla_spec.costs/2'", "'vla_spec.costs/1'"]),
        (lambda tree, one: tree.update(tables=[]), ["tables", "at least 1 item"]),
        (lambda tree, one: tree.update(unit="ms"), ["unit", "'ns'"]),
        (lambda tree, one: tree["tables"].append(copy.deepcopy(one)), ["two tables of one engine"]),
        (lambda tree, one: tree.update(device={}), ["device: measured where"]),
        (lambda tree, one: one["prefill"].update(n=None), ["prefill", "without a number of samples"]),
    ],
)
def test_tables_that_contradict_themselves_are_refused_where_they_do(store, change, words):
    path = store(changed(change))
    message = refusal(path)
    assert str(path) in message
    for word in words:
        assert word in message


def test_noise_is_no_contradiction(store):
    costs = load_costs(store(changed(setting(cost(2.1e6), "step", "4"))), "", wanted())
    assert costs.step_ns(4) == 2.1e6
    # 15 µs less for a draft that costs 20 µs is a timer's jitter.
    drafts = {"1": cost(2e4), "31": cost(5e3)}
    assert load_costs(store(changed(setting(drafts, "drafters", 0, "draft"))), "", wanted()).draft[31][0.5] == 5e3


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused(store, number):
    message = refusal(store(changed(setting(number, "prefill", "quantiles", "0.5"))))
    assert "NaN" in message or "Infinity" in message
    assert "finite" in message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_off_is_refused(store, share):
    text = json.dumps(measured())
    message = refusal(store(text[: int(share * len(text))]))
    for word in ("cut off or no JSON", "calibrate costs"):
        assert word in message


def test_a_file_that_is_missing_or_no_text_is_refused(store, tmp_path):
    assert "FileNotFoundError" in refusal(tmp_path / "none.costs.json")
    (tmp_path / "binary.costs.json").write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in refusal(tmp_path / "binary.costs.json")
    assert "no key `format`" in refusal(store("{}"))
    assert "no key `format`" in refusal(store("[]"))


def published(**changes):
    def stated(ns):
        return {"quantiles": {"0.5": ns}, "stated": f"{ns} ns"}

    one = {
        "load": {"key": "published", "description": "not stated"},
        "engine": {"name": "OpenVLA-7B", "model_hash": "", "precision": "bf16", "provider": "X", "num_threads": 0},
        "prefill": stated(4e7),
        "step": {"1": stated(14e6), "64": {"quantiles": {"0.5": 14e6}, "derived": "step(k) = step(1)"}},
        "encode": stated(0),
        "decode": stated(0),
        "drafters": [{"drafter": {"name": "EAGLE-2"}, "draft": {"4": stated(16e6)}}],
    }
    return {
        **measured(one),
        "origin": "published",
        "label": "OpenVLA-7B on X: estimate",
        "sources": ["arXiv:0000.00000"],
        "device": {"gpu": "X"},
        **changes,
    }


def test_published_figures_are_for_virtual_time_only_unless_allowed(store):
    path = store(published())
    message = refusal(path)
    for word in ("published", "estimate", "runtime.clock=virtual", "allow_other_device"):
        assert word in message
    costs = load_costs(path, "", wanted(is_other_device_allowed=True))
    assert (costs.prefill_ns, costs.step_ns(7), costs.draft_quantile_ns(4, 0.99)) == (4e7, 14e6, 16e6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": []}, "needs sources"),
        ({"label": "OpenVLA-7B on X"}, "calls it an estimate"),
        ({"origin": "measured", "device": DEVICE}, "measured without a number of samples"),
    ],
)
def test_published_figures_say_that_they_are(store, change, words):
    assert words in refusal(store(published(**change)))


@pytest.mark.parametrize(
    "one",
    [
        {"quantiles": {"0.5": 1}},
        {"quantiles": {"0.5": 1}, "stated": "1", "derived": "1"},
        {"quantiles": {"0.5": 1}, "stated": "1", "n": 10},
    ],
)
def test_a_published_cost_is_either_stated_or_derived(store, one):
    tree = published()
    tree["tables"][0]["decode"] = one
    assert "either stated or derived" in refusal(store(tree))


def test_quantiles_need_a_sample_beyond_them():
    assert is_supported(0.999, 1000)
    assert not is_supported(0.999, 999)
    assert is_supported(0.01, 100)
    assert not is_supported(0.01, 99)
    assert is_supported(0.5, 2)
