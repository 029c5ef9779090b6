"""int8: ranges of activations, the quantised graph, its files, and what they are refused for."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the extra [train]")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from vla_spec import plugins
from vla_spec.adapters.vla import load as load_adapter
from vla_spec.assemble import Assembler
from vla_spec.calib.activation_ranges import Magnitudes, check_method, migration_factor
from vla_spec.calib.observations import Recorded, demonstrated_observations, stratified
from vla_spec.calib.quantize import (
    Calibration,
    Recipe,
    Study,
    calibration_file,
    choose,
    compare,
    forced_rows,
    write_calibration,
    write_quantized,
)
from vla_spec.config import merge, read_mode, resolve
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._quantized_files import names_of, quantized_graph
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.graphs.quantized import find_linears, quantize_rows, quantized_model
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime
from vla_spec.engines.verify import greedy, seeded_observations
from vla_spec.errors import BadConfig, BadModel, MissingDependency, VlaSpecError
from vla_spec.progress import Silent
from vla_spec.runtime import NO_DEADLINE_NS
from vla_spec.types import Observation

MODEL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
needs_model = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")
T = 32


def magnitudes(values, name="x"):
    out = Magnitudes(name, values.shape[1])
    out.add(values)
    return out


class TestRanges:
    def test_percentiles_are_numpys_to_the_width_of_a_bin(self):
        values = np.random.default_rng(0).standard_t(3, (4000, 8)).astype(np.float32)
        seen = magnitudes(values)
        for q in (50, 99, 99.9, 99.99):
            exact = np.percentile(np.abs(values), q, method="inverted_cdf")
            assert exact <= seen.clip(str(q)) <= 1.008 * exact
        assert seen.clip("max") == seen.clip("100") == np.abs(values).max()

    def test_neither_order_nor_size_of_calls_matters(self):
        values = np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
        whole, parts = magnitudes(values), Magnitudes("x", 5)
        for row in reversed(values):
            parts.add(row[None])
        assert np.array_equal(whole.counts, parts.counts)
        assert np.array_equal(whole.channel_max, np.abs(values).max(0))
        assert np.array_equal(parts.channel_max, whole.channel_max)
        assert parts.largest == whole.largest

    @pytest.mark.parametrize("tail", [2, 3, 30])
    def test_least_squares_is_least_squares(self, tail):
        values = np.random.default_rng(2).standard_t(tail, (4000, 4)).astype(np.float32)

        def error(clip):
            step = clip / 127
            return float(((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2).sum())

        seen = magnitudes(values)
        best = min(error(seen.largest * fraction) for fraction in np.linspace(0.1, 1, 91))
        assert error(seen.clip("mse")) <= 1.03 * best
        assert error(seen.clip("mse")) < error(seen.clip("max")) or tail == 30

    def test_numbers_that_are_not_finite_are_named(self):
        for bad in (np.nan, np.inf, -np.inf):
            with pytest.raises(BadModel, match=r"blocks.3.gelu: not a finite number in row 1"):
                magnitudes(np.array([[1, 2], [bad, 0]], np.float32), "blocks.3.gelu")

    def test_nothing_but_zeros_can_not_be_calibrated(self):
        for method in ("max", "mse", "99.9"):
            with pytest.raises(BadModel, match="nothing but zeros"):
                magnitudes(np.zeros((2, 3), np.float32)).clip(method)

    @pytest.mark.parametrize("method", ["", "median", "0", "-3", "100.1", "nan", "inf"])
    def test_unknown_methods_are_refused(self, method):
        with pytest.raises(BadConfig, match=r"valid: max, mse, a percentile"):
            check_method(method)

    def test_migration_is_equation_four(self):
        channel_max = np.array([1, 2, 64, 0.5], np.float32)
        weights = np.array([[1, -2, 0.25, 1], [0.5, 1, 0.125, -4]], np.float32)
        factor = migration_factor(channel_max, weights, 0.5)
        wanted = np.sqrt(channel_max / np.abs(weights).max(0))
        assert factor / factor[0] == pytest.approx(wanted / wanted[0], rel=1e-5)
        assert np.log(factor).mean() == pytest.approx(0, abs=1e-6)
        assert np.isfinite(migration_factor(np.zeros(3, np.float32), np.zeros((2, 3), np.float32), 0.5)).all()


def seen(step):
    return Observation(np.full((1, 2, 2, 3), step, np.uint8), np.zeros(2, np.float32), "push", 0, step)


def pool(**counts):
    return {task: [Recorded(task, i // 3, seen(i)) for i in range(n)] for task, n in counts.items()}


class TestObservations:
    def test_every_task_is_in_and_each_as_often(self):
        chosen = stratified(pool(a=10, b=40, c=7), 20)
        assert chosen.by_task == {"a": 7, "b": 7, "c": 6}
        assert [item.observation.step for item in chosen.items if item.task == "b"] == [0, 6, 13, 20, 26, 32, 39]

    def test_too_few_are_refused(self):
        with pytest.raises(BadConfig, match=r"at least 3, one of every task"):
            stratified(pool(a=10, b=40, c=7), 2)
        with pytest.raises(BadConfig, match=r"7 of task c are needed and 3 are recorded"):
            stratified(pool(a=10, b=40, c=3), 21)
        with pytest.raises(BadConfig, match=r"observations 5"):
            stratified({}, 5)

    def test_the_hash_follows_every_byte(self):
        items = stratified(pool(a=10), 4).items
        hashes = {stratified({"a": items}, 4).sha256}
        for change in (
            {"images": seen(9).images},
            {"state": np.ones(2, np.float32)},
            {"instruction": "pull"},
            {"step": 77},
        ):
            one = items[0].observation
            fields = {n: getattr(one, n) for n in ("images", "state", "instruction", "stamp_ns", "step")}
            changed = Recorded("a", items[0].seed, Observation(**{**fields, **change}))
            hashes.add(stratified({"a": (changed, *items[1:])}, 4).sha256)
        assert len(hashes) == 5

    def test_demonstrations_of_failed_episodes_have_no_pictures(self, tmp_path):
        for seed, n in ((0, 0), (1, 5), (2, 30)):
            (tmp_path / "door-open").mkdir(exist_ok=True)
            np.savez(
                tmp_path / "door-open" / f"{seed}.npz",
                images=np.full((n, 3, 4, 4, 3), seed, np.uint8), steps=np.arange(n, dtype=np.int32) * 2,
                state=np.zeros((80, 4), np.float32), labels=np.zeros((80, 4), np.float32),
            )  # fmt: skip
        chosen = demonstrated_observations(tmp_path, None, range(3), 10)
        assert {item.seed for item in chosen.items} == {1, 2}
        assert chosen.provenance()["by_task"] == {"door-open": 10}
        with pytest.raises(BadConfig, match="no episode with a seed in 5"):
            demonstrated_observations(tmp_path, None, range(5, 7), 10)
        with pytest.raises(BadConfig, match="no demonstrations"):
            demonstrated_observations(tmp_path / "nowhere", None, range(3), 10)


def one_product(folder, bias=True, width_in=6, width_out=4, attributes=None):
    """A graph of one product whose weight and bias lie in target.safetensors, in half precision."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(width_out, width_in)).astype(np.float16)
    weight[1] = 0
    save_file(
        {"a.weight": weight, "a.bias": rng.normal(size=width_out).astype(np.float16)}, folder / "target.safetensors"
    )
    weights = WeightsFile.open(folder / "target.safetensors")
    initializers, nodes = [], []
    for name in ("a.weight", "a.bias") if bias else ("a.weight",):
        place = weights.tensors[name]
        tensor = TensorProto(
            name=f"{name}.stored", data_type=TensorProto.FLOAT16, dims=place.shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", "target.safetensors"), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        nodes.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    inputs = ["x", "a.weight", "a.bias"] if bias else ["x", "a.weight"]
    nodes.append(helper.make_node("Gemm", inputs, ["y"], name="y", **(attributes or {"transB": 1})))
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["k", width_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k", width_out])], initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), weights


def run(model, folder, feeds, level=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = level
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def check(model, folder):
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / "model.onnx"))


class TestGraph:
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_product_is_the_integers_product(self, tmp_path, bias):
        model, weights = one_product(tmp_path, bias)
        quantized, tensors = quantized_model(model, weights, {"x": 2.0})
        check(quantized, tmp_path)
        x = np.array([[0.1, -0.3, 2.5, 1.99, -2, 0], [1, 1, 1, 1, 1, 1]], np.float32)
        integers = np.clip(np.rint(x / np.float32(2 / 127)), -128, 127).astype(np.int64)
        wanted = (integers @ tensors["a.weight.quantized"].astype(np.int64).T) * (
            tensors["a.weight.scale"] * np.float32(2 / 127)
        )
        if bias:
            wanted = wanted + weights.read("a.bias")
        for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
            (y,) = run(quantized, tmp_path, {"x": x}, level)
            assert y == pytest.approx(wanted, rel=1e-5, abs=1e-6)

    def test_migrated_outliers_no_longer_spoil_the_rest(self, tmp_path):
        model, weights = one_product(tmp_path)
        x = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
        x[:, 2] *= 200
        (wanted,) = run(model, tmp_path, {"x": x})
        seen = magnitudes(x)
        factor = migration_factor(seen.channel_max, weights.read("a.weight"), 0.5)
        plain, _ = quantized_model(model, weights, {"x": seen.clip("max")})
        migrated, _ = quantized_model(model, weights, {"x": float((seen.channel_max / factor).max())}, {"x": factor})
        check(migrated, tmp_path)
        # In the products the outlier itself is the loudest: what was lost are the channels beside it.
        errors = [np.abs(run(m, tmp_path, {"x": x})[0] - wanted).mean() for m in (plain, migrated)]
        assert errors[1] < 0.7 * errors[0]

    def test_rows_are_quantised_to_nearest_and_zeros_stay(self):
        weight = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
        weight[3] = 0
        integers, scale = quantize_rows(weight)
        assert np.abs(integers * scale[:, None] - weight).max() <= scale.max() / 2 * 1.001
        assert (np.abs(integers).max(1)[[0, 1, 2, 4]] == 127).all()
        assert scale[3] == 1
        assert not integers[3].any()

    def test_other_products_are_left_alone(self, tmp_path):
        for attributes in ({"transB": 1, "alpha": 2.0}, {"transB": 1, "beta": 0.5}):
            model, weights = one_product(tmp_path, attributes=attributes)
            with pytest.raises(BadModel, match="nothing to quantise"):
                find_linears(model, weights)

    @pytest.mark.parametrize("clips", [{}, {"x": 0.0}, {"x": -1.0}, {"x": float("nan")}, {"x": np.inf}, {"z": 1.0}])
    def test_impossible_ranges_are_refused(self, tmp_path, clips):
        model, weights = one_product(tmp_path)
        with pytest.raises(BadModel, match="one: "):
            quantized_model(model, weights, clips)

    def test_weights_that_are_not_finite_are_refused(self, tmp_path):
        model, weights = one_product(tmp_path)
        raw = bytearray((tmp_path / "target.safetensors").read_bytes())
        raw[weights.tensors["a.weight"].offset :][:2] = b""
        start = weights.tensors["a.weight"].offset
        raw[start : start + 2] = np.float16(np.nan).tobytes()
        (tmp_path / "target.safetensors").write_bytes(raw)
        with pytest.raises(BadModel, match=r"a.weight has numbers that are not finite"):
            quantized_model(model, weights, {"x": 1.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the shipped small model."""
    out = tmp_path_factory.mktemp("model") / "small"
    out.mkdir()
    for file in MODEL.iterdir():
        if file.is_file() and ".int8." not in file.name and not file.name.startswith("quantization"):
            shutil.copyfile(file, out / file.name)
    return out


@pytest.fixture(scope="module")
def inputs(folder):
    adapter = load_adapter(folder)
    return [adapter.encode(one) for one in seeded_observations(adapter.example(), 6, np.random.default_rng(0))]


@pytest.fixture(scope="module")
def study(folder):
    return Study(folder, T)


@pytest.fixture(scope="module")
def chosen(study, inputs):
    return choose(
        study,
        inputs[:4],
        inputs[4:],
        [Recipe(ranges="99"), Recipe(ranges="99.99"), Recipe(ranges="max"), Recipe(ranges="mse")],
        Silent(),
    )


@pytest.fixture(scope="module")
def written(folder, chosen):
    """The model folder with its int8 graph."""
    write_calibration(calibration_file(folder, "int8"), chosen[0])
    write_quantized(folder, chosen[0], calibration_file(folder, "int8"))
    return folder


def parts_of(folder):
    adapter = load_adapter(folder)
    return plugins.Parts(adapter.domain, adapter.tokenizer, folder)


def rows_by(engine, inputs, tokens, size):
    """Logits about given tokens, [T, V], so many a call."""
    rows = [engine.prefill(inputs).logits[-1:].copy()]
    for start in range(0, len(tokens) - 1, size):
        part = tokens[start : min(start + size, len(tokens) - 1)]
        chain = np.arange(-1, len(part) - 1, dtype=np.int32)
        rows.append(engine.step(part, chain).logits.copy())
        engine.commit(chain + 1)
    return np.concatenate(rows)


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


@needs_model
class TestStudy:
    def test_activations_are_those_of_the_prompt_and_of_every_step(self, study, inputs):
        tokens = study.tokens_of(inputs[:1], Silent())
        observed = study.observe(inputs[:1], tokens, Silent())
        spec = study.files.decoder
        rows = study.files.base_rows + T - 1  # nothing is decoded from the last token
        for name, one in observed.magnitudes.items():
            width = spec.mlp_width if name.endswith("gelu") else spec.hidden_width
            assert one.counts.sum() == rows * width, name
        assert len(observed.magnitudes) == 4 * spec.num_layers + 1

    def test_the_best_recipe_on_held_out_tokens_wins(self, chosen):
        best, tried = chosen
        assert len(tried) == 4
        assert all(one.quality.num_rows == 2 * T for one in tried)
        assert best.quality.divergence == min(one.quality.divergence for one in tried)
        assert best.quality.divergence < 0.2 * next(t.quality.divergence for t in tried if t.recipe.ranges == "99")
        assert best.quality.token_agreement > 0.9

    def test_what_is_kept_is_what_it_was(self, study, inputs):
        tokens = study.tokens_of(inputs[:1], Silent())
        observed = study.observe(inputs[:1], tokens, Silent())
        wanted = study.wanted(inputs[:1], tokens)
        everything = study.calibrate(observed, Recipe(ranges="max"))
        kept = study.calibrate(observed, Recipe(ranges="max", keep=("head.*", "blocks.0.*")))
        assert set(kept.kept) == {w.stored for w in study._linears if w.stored.startswith(("head.", "blocks.0."))}
        assert set(everything.clips) - set(kept.clips) == {
            n for n in everything.clips if n.startswith(("blocks.0", "fin"))
        }
        better, worse = (study.quality(study.engine(c), inputs[:1], tokens, wanted) for c in (kept, everything))
        assert better.divergence < worse.divergence
        for keep in (("nothing.*",), ("*",)):
            with pytest.raises(BadConfig, match="keep"):
                study.calibrate(observed, Recipe(ranges="max", keep=keep))

    def test_migration_changes_nothing_but_rounding(self, study, inputs):
        tokens = study.tokens_of(inputs[:1], Silent())
        observed = study.observe(inputs[:1], tokens, Silent())
        calibration = study.calibrate(observed, Recipe(ranges="max", migration=0.5))
        quality = study.quality(study.engine(calibration), inputs[:1], tokens, study.wanted(inputs[:1], tokens))
        assert quality.difference_max < 0.5
        assert quality.token_agreement > 0.85

    def test_the_librarys_largest_magnitudes_are_ours(self, study, inputs):
        pytest.importorskip("modelopt.onnx.quantization", reason="needs the extra [modelopt]", exc_type=ImportError)
        tokens = study.tokens_of(inputs[:2], Silent())
        observed = study.observe(inputs[:2], tokens, Silent(), num_kept=2)
        # For fp8 it takes the scale of int8 times 448 / 127, which leaves twelve times the range as headroom.
        for precision, headroom in (("int8", 1), ("fp8", (448 / 127) ** 2)):
            theirs, ours = (study.calibrate(observed, Recipe(precision, r)).clips for r in ("modelopt-max", "max"))
            assert theirs.keys() == ours.keys()
            for name, clip in ours.items():
                assert theirs[name] == pytest.approx(clip * headroom, rel=0.02), name

    def test_without_that_library(self, study, inputs, monkeypatch):
        monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
        tokens = study.tokens_of(inputs[:1], Silent())
        observed = study.observe(inputs[:1], tokens, Silent(), num_kept=1)
        assert [sorted(call)[:2] for call in observed.calls] == [["embeds", "mask"]] * 2
        with pytest.raises(MissingDependency, match="modelopt"):
            study.calibrate(observed, Recipe(ranges="modelopt-max"))

    def test_activations_that_are_not_finite_name_tensor_and_observation(self, study, inputs):
        broken = {**inputs[1], "state": np.full_like(inputs[1]["state"], np.nan)}
        tokens = study.tokens_of(inputs[:1], Silent()) * 2
        with pytest.raises(BadModel, match=r"observation 1: blocks.0.norm1.out: not a finite number in row"):
            study.observe([inputs[0], broken], tokens, Silent())

    def test_no_observations_are_refused(self, study, inputs):
        with pytest.raises(BadConfig, match="observations 0"):
            study.observe([], [], Silent())
        with pytest.raises(BadConfig, match="held-out observations 0"):
            choose(study, inputs[:1], [], [Recipe()], Silent())

    def test_impossible_recipes_are_refused(self):
        for options in ({"ranges": "best"}, {"precision": "int3"}, {"migration": 1.0}, {"migration": -0.1}):
            with pytest.raises(BadConfig, match="valid"):
                Recipe(**options)


def test_quality_of_the_same_and_of_another():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 7)).astype(np.float32)
    same = compare(rows, rows + 5)
    assert same.token_agreement == 1
    assert same.divergence == pytest.approx(0, abs=1e-6)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (rows.astype(float), rows[::-1].astype(float)))
    other = compare(rows, rows[::-1])
    assert other.divergence == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)
    assert other.token_agreement == (p.argmax(1) == q.argmax(1)).mean()


@needs_model
class TestFiles:
    def test_the_calibration_file_is_read_as_it_was_written(self, written, chosen):
        read = Calibration.read(calibration_file(written, "int8"))
        assert read == chosen[0]
        assert {"tried", "outliers", "versions"} <= set(read.evidence)

    def test_what_is_written_is_what_was_studied(self, written, study, chosen, inputs):
        engine = GraphEngine(written, OnnxRuntimeRuntime(precision="int8", pads_one=True))
        assert engine.info.precision == "int8"
        in_memory = study.engine(chosen[0])
        tokens = greedy(engine, inputs[0], T)
        assert np.array_equal(forced_rows(engine, inputs[0], tokens), forced_rows(in_memory, inputs[0], tokens))

    def test_a_row_does_not_depend_on_its_call_where_that_is_claimed(self, written, inputs):
        engine = plugins.load("engine", "onnxruntime").build(
            plugins.load("engine", "onnxruntime").options(precision="int8"), parts_of(written)
        )
        tokens = greedy(engine, inputs[0], T)
        single = rows_by(engine, inputs[0], tokens, 1)
        # A float that rounds otherwise moves an activation by a whole step: not a rounding any more.
        tolerance = 1e-4 if engine.info.is_batch_invariant else 0.3
        for size in (2, 3, 8, T - 1):
            assert np.abs(rows_by(engine, inputs[0], tokens, size) - single).max() <= tolerance * single.std()
        engine.prefill(inputs[0])
        parents = np.array([-1, -1, 1, 1, 2, 3, 5], np.int32)
        nodes = np.array([9, tokens[0], 8, tokens[1], 7, tokens[2], tokens[3]], np.int32)
        tree = engine.step(nodes, parents).logits[[1, 3, 5, 6]]
        assert np.abs(tree - single[1:5]).max() <= tolerance * single.std()

    def test_the_claim_is_dropped_where_one_call_differs_from_many(self, written):
        class Noisy(OnnxRuntimeRuntime):
            """Scores single tokens a little differently, as a kernel for one row may."""

            def open(self, file):
                return NoisyGraph(super().open(file)) if file.name == "decoder.onnx" else super().open(file)

        class NoisyGraph:
            def __init__(self, graph):
                self._graph, self.inputs, self.outputs = graph, graph.inputs, graph.outputs

            def tie(self, arrays, state=None, state_names=()):
                return NoisyCall(self._graph.tie(arrays, state, state_names), arrays["logits"])

        class NoisyCall:
            def __init__(self, call, logits):
                self._call, self._logits = call, logits

            def run(self):
                self._call.run()
                if len(self._logits) == 2:  # one, padded
                    self._logits += np.float32(1e-5)

        for runtime, claim in ((OnnxRuntimeRuntime, True), (Noisy, False)):
            engine = GraphEngine(written, runtime(precision="int8", pads_one=True))
            assert engine.info.is_batch_invariant is claim
        assert not GraphEngine(written, OnnxRuntimeRuntime(precision="int8")).info.is_batch_invariant

    @pytest.mark.parametrize("mode", ["ngram", "jacobi"])
    def test_exact_speculation_is_autoregression_in_int8(self, written, inputs, mode):
        tree = {"model": str(written), "engine": {"name": "onnxruntime", "precision": "int8"}}
        config = resolve(merge(read_mode(mode)[1], tree), mode)
        assembly = Assembler().assemble(config, load_adapter(written).example())
        if not assembly.engine.info.is_batch_invariant:
            pytest.skip("this CPU's int8 kernels score one row and many differently, and the engine says so")
        decoder, drafted = assembly.policy.decoder, 0
        for one in inputs:
            decoded = decoder.decode(one, assembly.clock.now_ns() + NO_DEADLINE_NS)
            drafted += sum(r.num_drafted for r in decoded.rounds)
            assert np.array_equal(decoded.tokens, greedy(assembly.engine, one, T))
        assert drafted > 0

    def test_int8_weights_lie_in_a_file_of_their_own_and_the_rest_where_it_was(self, written):
        graph, weights, _ = names_of(written / "decoder.onnx", "int8")
        model = onnx.load(str(graph), load_external_data=False)
        onnx.checker.check_model(str(graph))
        places = {}
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                places.setdefault(place["location"], set()).add(tensor.name)
        assert set(places) == {"target.safetensors", weights.name}
        assert not any("qkv" in name or "up.weight" in name for name in places["target.safetensors"])
        assert graph.stat().st_size < 100_000
        assert weights.stat().st_size < 0.6 * (written / "target.safetensors").stat().st_size
        used = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= used
        zeros = [t for t in model.graph.initializer if t.name.endswith(".zero")]
        assert zeros
        assert not any(numpy_helper.to_array(t).any() for t in zeros)

    def test_writing_twice_gives_the_same_bytes(self, written, chosen, tmp_path):
        other = copied(written, tmp_path / "again")
        write_quantized(other, chosen[0], calibration_file(other, "int8"))
        for ours, theirs in zip(
            names_of(written / "decoder.onnx", "int8"), names_of(other / "decoder.onnx", "int8"), strict=True
        ):
            assert ours.read_bytes() == theirs.read_bytes()

    def test_of_another_model(self, written, chosen, tmp_path):
        other = copied(written, tmp_path / "other")
        values = json.loads((other / "engine.json").read_text())
        raw = bytearray((other / "target.safetensors").read_bytes())
        raw[-2:] = b"\0\0"
        (other / "target.safetensors").write_bytes(raw)
        import hashlib

        values["weights_sha256"] = hashlib.sha256(raw).hexdigest()
        (other / "engine.json").write_text(json.dumps(values))
        with pytest.raises(BadModel, match="of another model"):
            write_quantized(other, chosen[0], calibration_file(other, "int8"))
        with pytest.raises(BadModel, match=r"made from another decoder.onnx or other weights"):
            quantized_graph(other / "decoder.onnx", "int8", is_needed=True)

    @pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
    @pytest.mark.parametrize("damage", ["cut", "byte", "gone"])
    def test_damaged_files_are_not_loaded(self, written, tmp_path, suffix, damage):
        other = copied(written, tmp_path / "other")
        file = other / f"decoder.int8{suffix}"
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        match damage:
            case "cut":
                file.write_bytes(raw[: len(raw) // 2])
            case "byte":
                file.write_bytes(raw)
            case "gone":
                file.unlink()
        with pytest.raises(BadModel, match=f"decoder.int8{suffix}: missing, cut off or changed"):
            quantized_graph(other / "decoder.onnx", "int8", is_needed=True)

    def test_without_its_manifest_it_is_none(self, written, tmp_path):
        other = copied(written, tmp_path / "other")
        manifest = names_of(other / "decoder.onnx", "int8")[2]
        manifest.write_text("{")
        with pytest.raises(BadModel, match="not a quantised graph's manifest"):
            quantized_graph(other / "decoder.onnx", "int8", is_needed=False)
        manifest.unlink()
        for is_needed in (True, False):
            with pytest.raises(BadModel, match=r"vla-spec quantize"):
                quantized_graph(other / "decoder.onnx", "int8", is_needed)

    def test_an_export_does_not_list_it(self, written, tmp_path):
        from vla_spec.engines._model_manifest import check_manifest, write_manifest

        other = copied(written, tmp_path / "other")
        listed = json.loads(write_manifest(other).read_text())["files"]
        assert "decoder.onnx" in listed
        assert not [name for name in listed if ".int8." in name]
        for file in other.glob("*.int8.*"):
            file.unlink()
        check_manifest(other)

    def test_where_nothing_was_quantised(self, tmp_path):
        file = tmp_path / "block_head.onnx"
        assert quantized_graph(file, "int8", is_needed=False) == file
        with pytest.raises(BadModel, match="missing"):
            quantized_graph(file, "int8", is_needed=True)

    def test_a_full_disk_leaves_nothing(self, written, chosen, tmp_path, monkeypatch):
        for failing in ("decoder.int8.safetensors", "decoder.int8.onnx", "decoder.int8.json"):
            other = copied(written, tmp_path / failing)

            def write(self, data, *args, name=failing, real=Path.write_bytes, **kwargs):
                if name in self.name:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(self, data)

            def write_text(self, data, *args, name=failing, real=Path.write_text, **kwargs):
                if name in self.name:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(self, data, *args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_bytes", write)
                patch.setattr(Path, "write_text", write_text)
                with pytest.raises(BadModel, match=r"no space left.*nothing is left of it"):
                    write_quantized(other, chosen[0], calibration_file(other, "int8"))
            assert not list(other.glob("*.int8.*"))
            assert not list(other.glob(".*"))

    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", '{"format": 2, "kind": "quantization"}', '{"format": 1, "kind": "quantization"}']
    )
    def test_files_that_are_no_calibration(self, tmp_path, text):
        file = calibration_file(tmp_path, "int8")
        with pytest.raises(BadModel, match="missing"):
            Calibration.read(file)
        file.write_text(text)
        with pytest.raises(BadModel, match="not a calibration"):
            Calibration.read(file)

    def test_without_onnx(self, written, chosen, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(MissingDependency, match="ONNX is missing"):
            write_quantized(written, chosen[0], calibration_file(written, "int8"))
        with pytest.raises(MissingDependency, match="ONNX is missing"):
            Study(written, T)

    def test_the_command_writes_it(self, written, tmp_path):
        from vla_spec.cli import app

        other = copied(written, tmp_path / "other")
        for file in other.glob("*.int8.*"):
            file.unlink()
        result = CliRunner().invoke(app, ["quantize", str(other)])
        assert result.exit_code == 0, result.output
        assert "held-out tokens equal" in result.output
        assert quantized_graph(other / "decoder.onnx", "int8", is_needed=True).name == "decoder.int8.onnx"
        for arguments, message in (
            (["--precision", "int3"], "valid: int8, fp8"),
            (["--calibration", str(calibration_file(other, "int8"))], "valid: a folder"),
            (["--calibration", str(tmp_path)], "missing"),
        ):
            result = CliRunner().invoke(app, ["quantize", str(other), *arguments])
            assert isinstance(result.exception, VlaSpecError)
            assert message in str(result.exception)

    def test_the_other_command_calibrates(self, folder, tmp_path):
        from vla_spec.cli import app

        rng = np.random.default_rng(0)
        for task in ("door-open", "push"):
            (tmp_path / "data" / task).mkdir(parents=True)
            for seed in range(3):
                np.savez(
                    tmp_path / "data" / task / f"{seed}.npz",
                    images=rng.integers(0, 256, (4, 3, 96, 96, 3), dtype=np.uint8),
                    steps=np.arange(4, dtype=np.int32), state=rng.uniform(0, 0.5, (9, 4)).astype(np.float32),
                    labels=np.zeros((9, 4), np.float32),
                )  # fmt: skip
        out = tmp_path / "out"
        arguments = [
            "calibrate", "quantization", str(folder), "--data", str(tmp_path / "data"), "--seed-start", "0",
            "--episodes", "2", "--observations", "4", "--held-out", "2", "--ranges", "max,mse", "--out", str(out),
        ]  # fmt: skip
        result = CliRunner().invoke(app, arguments, obj=arguments)
        assert result.exit_code == 0, result.output
        fitted = Calibration.read(calibration_file(out, "int8"))
        assert [one["ranges"] for one in fitted.evidence["tried"]] == ["max", "mse"]
        assert fitted.evidence["observations"]["by_task"] == {"door-open": 2, "push": 2}
        assert fitted.evidence["observations"]["seeds"] == [0, 1]
        assert fitted.evidence["held_out"]["seeds"] == [2, 2]
        for changed, message in (
            (["--observations", "1"], "at least 2, one of every task"),
            (["--observations", "40"], "20 of task door-open are needed and 8 are recorded"),
            (["--ranges", ""], "--ranges is empty"),
            (["--ranges", "best"], "range 'best'"),
            (["--seed-start", "9999"], "kept for evaluation"),
            (["--precision", "int3"], "valid: int8, fp8"),
        ):
            result = CliRunner().invoke(app, [*arguments, *changed], obj=arguments)
            assert isinstance(result.exception, VlaSpecError)
            assert message in str(result.exception)
