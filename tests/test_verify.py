"""Verification: an engine that is the model passes, each way of not being it is seen by the metric that is for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from contract import fakes
from hypothesis import given
from hypothesis import strategies as st

from vla_spec.cli import main
from vla_spec.engines import verify as verifying
from vla_spec.engines.verify import Gate, compare_rows, read_thresholds, verify
from vla_spec.errors import BadConfig, BadModel
from vla_spec.progress import Silent
from vla_spec.types import Observation, Scores
from vla_spec.wrapped_engine import WrappedEngine

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
NUM_TOKENS = 12
INPUTS = [fakes.toy_inputs(step) for step in range(3)]


class Bent(WrappedEngine):
    """An engine whose logits are changed on their way out. change: (logits, rows in the call) -> logits."""

    def __init__(self, change, **info):
        super().__init__(fakes.toy_engine(fakes.toy_parts()))
        self._change, self._info = change, info

    @property
    def info(self):
        return self.engine.info._replace(**self._info)

    def prefill(self, inputs):
        return Scores(self._change(self.engine.prefill(inputs).logits.copy(), 1))

    def step(self, tokens, parents):
        return Scores(self._change(self.engine.step(tokens, parents).logits.copy(), len(tokens)))


def gates(**limits):
    return {name: Gate(good, poor, verifying.METRICS[name]) for name, (good, poor) in limits.items()}


STRICT = gates(
    cosine_min=(0.999, 0.99), difference_max=(1e-3, 1e-1), token_agreement=(0.999, 0.99), free_agreement=(0.99, 0.9),
    batch_difference_max=(1e-3, 1e-1),
)  # fmt: skip


def check(change=lambda logits, k: logits, limits=STRICT, seed=0, **info):
    reference = fakes.toy_engine(fakes.toy_parts())
    rng = np.random.default_rng(seed)
    return verify(Bent(change, **info), reference, INPUTS, NUM_TOKENS, limits, None, rng, Silent())


def test_an_engine_passes_beside_itself_with_perfect_numbers():
    result = check()
    assert result.outcome == "pass"
    assert set(result.outcomes.values()) == {"pass"}
    assert result.num_observations == 3
    assert result.num_rows == 3 * (2 * NUM_TOKENS + 12)  # one by one, at once, and a tree
    exact = {name: value for name, value in result.metrics.items() if value is not None}
    for name in ("token_agreement", "free_agreement", "chunk_agreement", "batch_agreement"):
        assert exact[name] == 1, name
    assert exact["cosine_min"] == pytest.approx(1, abs=1e-12)
    assert exact["difference_max"] == exact["batch_difference_max"] == 0
    assert result.metrics["margin_lost_max"] is None
    assert result.metrics["golden_difference_max"] is None
    assert "golden_difference_max" not in result.outcomes


def test_an_offset_of_all_logits_is_no_difference():
    result = check(lambda logits, k: logits + np.float32(3))
    assert result.outcome == "pass"
    assert result.metrics["difference_max"] < 1e-5


def test_another_model_fails_in_every_respect():
    rng = np.random.default_rng(5)
    result = check(lambda logits, k: logits[:, rng.permutation(logits.shape[1])])
    assert result.outcome == "fail"
    for name in ("cosine_min", "difference_max", "token_agreement", "free_agreement"):
        assert result.outcomes[name] == "fail", name
    assert result.metrics["chunk_agreement"] == 0
    assert result.metrics["margin_lost_max"] > 0


def test_small_noise_is_seen_in_size_and_not_in_tokens():
    rng = np.random.default_rng(5)

    def noisy(logits, k):
        return logits + rng.uniform(-1, 1, logits.shape).astype(np.float32) * np.float32(0.01 * logits.std())

    result = check(noisy)
    assert 1e-3 < result.metrics["difference_max"] < 1e-1
    assert result.outcomes["difference_max"] == "warn"
    assert result.outcomes["token_agreement"] == "pass"
    assert result.outcome == "warn"


def test_an_engine_that_claims_batch_invariance_has_to_have_it():
    """The fault of quantised engines: a row's numbers depend on how many rows are in the call."""

    def scaled(logits, k):
        return logits * np.float32(1 + 0.3 * (k > 1))

    result = check(scaled, is_batch_invariant=True)
    assert result.outcomes["batch_difference_max"] == "fail"
    assert result.metrics["batch_agreement"] == 1  # the same choice, other numbers
    result = check(
        scaled, gates(token_agreement=(0.999, 0.99), batch_difference_max=(1e-3, 1e-1)), is_batch_invariant=False
    )
    assert "batch_difference_max" not in result.outcomes
    assert result.metrics["batch_difference_max"] > 0.1  # told all the same
    assert result.outcome == "pass"
    assert not result.to_json()["is_batch_invariant"]


def test_a_tree_that_is_scored_wrongly_is_seen():
    """Nodes that see their siblings change nothing in chains."""

    class Deaf(Bent):
        def step(self, tokens, parents):
            return super().step(tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32))

    reference = fakes.toy_engine(fakes.toy_parts())
    engine = Deaf(lambda logits, k: logits)
    result = verify(engine, reference, INPUTS, NUM_TOKENS, STRICT, None, np.random.default_rng(0), Silent())
    assert result.outcomes["cosine_min"] == "fail"
    assert result.metrics["free_agreement"] == 1


def test_an_engine_without_trees_is_compared_on_chains():
    result = check(has_tree_mask=False)
    assert result.outcome == "pass"
    assert result.num_rows == 3 * 2 * NUM_TOKENS


def test_numbers_that_are_not_finite_fail():
    def broken(logits, k):
        logits[..., 3] = np.nan
        return logits

    with np.errstate(invalid="ignore"):
        result = check(broken)
    assert result.outcome == "fail"
    assert result.outcomes["cosine_min"] == "fail"


def test_a_prefix_that_differs_does_not_spoil_what_follows():
    """Fed the reference's tokens, one wrong choice is one wrong row; decoding freely it is what it leads to."""

    class WrongPrefill(Bent):
        def prefill(self, inputs):
            logits = super().prefill(inputs).logits
            logits[-1] = np.roll(logits[-1], 1)
            return Scores(logits)

    reference = fakes.toy_engine(fakes.toy_parts())
    engine = WrongPrefill(lambda logits, k: logits)
    result = verify(engine, reference, INPUTS, NUM_TOKENS, STRICT, None, np.random.default_rng(0), Silent())
    assert result.metrics["token_agreement"] == pytest.approx(1 - 2 / (2 * NUM_TOKENS + 12))
    assert result.metrics["free_agreement"] < result.metrics["token_agreement"]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_known_rows():
    wanted = np.array([[1, 0, -1], [0, 2, -2]], np.float32)
    got = np.array([[1, 0, -1], [2, 0, -2]], np.float32)
    metrics = compare_rows(wanted, got, spread=2.0)
    assert metrics["cosine_min"] == pytest.approx(4 / 8)
    assert metrics["cosine_mean"] == pytest.approx(0.75)
    assert metrics["difference_max"] == pytest.approx(1)
    assert metrics["token_agreement"] == 0.5
    assert metrics["margin_lost_max"] == pytest.approx(1)  # 2 - 0, in units of 2


def test_rows_without_any_preference():
    flat = np.zeros((1, 4), np.float32)
    assert compare_rows(flat, flat, 1.0)["cosine_min"] == 1
    assert compare_rows(flat, np.float32([[1, 0, 0, 0]]), 1.0)["cosine_min"] == 0


@given(st.integers(0, 1000), st.integers(2, 9), st.floats(0.1, 10))
def test_the_cosine_does_not_see_scale_or_offset(seed, width, scale):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, width)).astype(np.float32)
    metrics = compare_rows(rows, (rows * np.float32(scale) + np.float32(2)), 1.0)
    assert metrics["cosine_min"] == pytest.approx(1, abs=1e-5)
    assert metrics["token_agreement"] == 1


@pytest.mark.parametrize(
    ("gate", "value", "outcome"),
    [
        (Gate(0.99, 0.9, False), 0.99, "pass"),
        (Gate(0.99, 0.9, False), 0.95, "warn"),
        (Gate(0.99, 0.9, False), 0.9, "warn"),
        (Gate(0.99, 0.9, False), 0.89, "fail"),
        (Gate(0.1, 0.2, True), 0.1, "pass"),
        (Gate(0.1, 0.2, True), 0.15, "warn"),
        (Gate(0.1, 0.2, True), 0.21, "fail"),
        (Gate(0.1, 0.2, True), math.nan, "fail"),
        (Gate(0.1, 0.2, True), math.inf, "fail"),
        (Gate(0.1, 0.2, True), None, "fail"),
    ],
)
def test_gates(gate, value, outcome):
    assert gate.judge(value) == outcome


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_random_trees_have_parents_before_children(seed, size):
    parents = verifying.random_tree(size, np.random.default_rng(seed))
    assert parents[0] == -1
    assert all(-1 <= parent < i for i, parent in enumerate(parents))


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_the_shipped_thresholds_are_ordered_by_precision():
    table = {name: read_thresholds(verifying.THRESHOLDS, name) for name in ("fp32", "fp16", "bf16", "int8", "fp8")}
    assert table["fp8"] == read_thresholds(verifying.THRESHOLDS, "other")
    for strict, loose in (("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "int8"), ("int8", "fp8")):
        for name in set(table[strict]) & set(table[loose]):
            if (loose, name) == ("int8", "batch_difference_max"):
                continue  # in eight bits a claim holds to the bit, or an activation moves by a whole step
            a, b = table[strict][name], table[loose][name]
            assert a.good <= b.good if a.is_at_most else a.good >= b.good, (strict, name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "valid: precision"),
        ("[]", "valid: precision"),
        ('{"fp16": {}}', "valid: precision"),
        ('{"fp32": {}}', "has no gate"),
        ('{"fp32": {"beauty": [1, 0]}}', "'beauty'"),
        ('{"fp32": {"cosine_min": [0.9]}}', "valid: precision"),
        ('{"fp32": {"cosine_min": [0.9, 0.99]}}', r"cosine_min is \[0.9, 0.99\]; valid: better first"),
        ('{"fp32": {"difference_max": [0.2, 0.1]}}', "better first"),
    ],
)
def test_thresholds_that_can_not_be_are_refused(content, says, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(BadConfig, match=says):
        read_thresholds(tmp_path / "t.json", "fp32")


def test_missing_thresholds_are_refused(tmp_path):
    with pytest.raises(BadConfig, match="No such file"):
        read_thresholds(tmp_path / "none.json", "fp32")


# --- observations and golden inputs ----------------------------------------------------------------------------------


def test_seeded_observations_repeat_and_differ():
    example = Observation(np.full((2, 30, 40, 3), 128, np.uint8), np.zeros(4, np.float32), "push", 0, 0)
    first, again = (verifying.seeded_observations(example, 3, np.random.default_rng(1)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.state, b.state)
    assert first[0].images.shape == example.images.shape
    assert not np.array_equal(first[0].images, first[1].images)
    assert first[0].images.std() > 20
    assert first[2].step == 2


def test_recorded_observations_are_spread_over_the_recording(tmp_path):
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1, 1) * np.ones((1, 1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "r.npz", images=images, state=np.zeros((10, 4), np.float32), instruction="push")
    got = verifying.recorded_observations(tmp_path / "r.npz", 4)
    assert [int(one.images.flat[0]) for one in got] == [0, 3, 6, 9]
    assert len(verifying.recorded_observations(tmp_path / "r.npz", 99)) == 10


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None])
def test_golden_inputs_that_can_not_be_read_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "golden.npz").write_bytes(content)
    engine = fakes.toy_engine(fakes.toy_parts())
    with pytest.raises(BadModel, match=r"golden\.npz: no golden inputs"):
        verifying.check_golden(engine, tmp_path / "golden.npz")


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code


def test_the_command_verifies_the_shipped_model(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the extra [train]")
    pytest.importorskip("onnxruntime", reason="needs the extra [run]")
    assert run("verify", MODEL, "--observations", 1, "--out", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["outcome"] == "pass"
    assert (results["engine"]["name"], results["reference"]["name"]) == ("onnxruntime", "pytorch")
    assert results["metrics"]["token_agreement"] == 1
    assert results["metrics"]["golden_difference_max"] < 1e-4
    assert set(results["metrics"]) < set(results["meaning"])
    assert results["command"].startswith("vla-spec verify ")
    assert "pass: 1 observations" in capsys.readouterr().out


def test_the_command_fails_if_a_gate_does(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the extra [train]")
    pytest.importorskip("onnxruntime", reason="needs the extra [run]")
    (tmp_path / "t.json").write_text('{"fp32": {"difference_max": [0, 0]}}')
    arguments = ("--observations", 1, "--thresholds", tmp_path / "t.json", "--out", tmp_path / "out")
    assert run("verify", MODEL / "small", *arguments) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["outcome"] == "fail"
    assert "fail: 1 observations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--reference", "onnxruntime"), "is the engine under test itself"),
        (("--engine", "onxruntime"), "did you mean 'onnxruntime'?"),
        (("--recording", "none.npz"), "none.npz: no such file"),
        (("--thresholds", "none.json"), "none.json: No such file"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, tmp_path, capsys):
    assert run("verify", MODEL / "small", *arguments, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
