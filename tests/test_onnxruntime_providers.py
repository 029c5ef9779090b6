"""ONNX Runtime's providers without a GPU: caches in the library's values, writing in place proved, no silent slowness.

The library's own CPU provider stands in for a device where results count; where refusals count, a double of its module.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from int8_model import write_int8_model, write_plain_model

from vla_spec.engines import onnxruntime as plugin
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._host_state import HostState
from vla_spec.engines._ort_session import CPU, CUDA, TENSORRT, SessionOptions, nodes_elsewhere, open_session
from vla_spec.engines._ort_state import OrtState
from vla_spec.engines.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeRuntime, Options
from vla_spec.errors import BadConfig, BadModel, SlowPath
from vla_spec.plugins import Parts

MODEL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")
TREE = np.array([7, 9, 11, 13, 200, 3], np.int32), np.array([-1, 0, 0, 2, 2, 4], np.int32)
PATH = np.array([0, 2, 4, 5], np.int32)


@pytest.fixture(scope="module")
def inputs():
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        return {name: golden[name] for name in ("images", "words", "state")}


@pytest.fixture(scope="module")
def wanted(inputs):
    return play(GraphEngine(MODEL, OnnxRuntimeRuntime()), inputs)


def on_device():
    """The runtime of a GPU, on a machine without one: caches are the library's, rows are moved by commit.onnx."""
    return OnnxRuntimeRuntime(provider=CUDA, allow_slow=True)


def play(engine, inputs):
    """Two prompts, steps, a path of a tree that is kept, a token: everything that is returned."""
    seen = []
    for _ in range(2):
        seen.append(engine.prefill(inputs).logits.copy())
        seen.append(engine.step(np.arange(5, dtype=np.int32), np.arange(-1, 4, dtype=np.int32)).logits.copy())
        engine.commit(np.arange(2, dtype=np.int32))
        seen.append(engine.step(*TREE).logits.copy())
        engine.commit(PATH)
        seen.append(engine.step(np.array([5], np.int32), np.array([-1], np.int32)).logits.copy())
    return seen


def check(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


class TestCaches:
    def test_on_a_device_give_the_same_bits(self, inputs, wanted):
        engine = GraphEngine(MODEL, on_device())
        assert isinstance(engine._state, OrtState)
        check(play(engine, inputs), wanted)

    def test_are_written_in_place(self, inputs):
        for runtime in (OnnxRuntimeRuntime(), on_device()):
            engine = GraphEngine(MODEL, runtime)
            assert engine._decoder.writes_in_place is True
            assert engine._prompt.writes_in_place is None

    def test_are_zeros_after_the_proof(self):
        for runtime in (OnnxRuntimeRuntime(), on_device()):
            graph = runtime.open(MODEL / "decoder.onnx")
            state = tie_decoder(graph, runtime)
            values = state.read() if isinstance(state, OrtState) else state.tensors
            assert not values.any()
            assert graph.writes_in_place

    def test_move_without_a_commit_graph_of_their_form(self):
        """A drafter's caches: another number of them, another shape."""
        pytest.importorskip("onnx")
        runtime = on_device()
        runtime.open(MODEL / "decoder.onnx")
        state, host = runtime.state((2, 1, 3, 20, 8)), HostState((2, 1, 3, 20, 8))
        values = np.random.default_rng(0).normal(size=host.shape).astype(np.float32)
        state.write(values)
        host.tensors[...] = values
        for start, rows in ((4, [4, 6, 9]), (5, [5]), (7, [8, 9, 10])):  # the last ones overlap
            for one in (state, host):
                one.move(start, np.array(rows, np.int32))
            np.testing.assert_array_equal(state.read(), host.tensors)
        state.clear()
        assert not state.read().any()


def tie_decoder(graph, runtime, k=4):
    shapes = {name: tuple(k if d is None else d for d in spec.shape) for name, spec in graph.inputs.items()}
    pasts = [name for name in graph.inputs if name.startswith("past_")]
    arrays = {n: runtime.empty(s, graph.inputs[n].dtype) for n, s in shapes.items() if n not in pasts}
    for name in ("logits", "features"):
        spec = graph.outputs[name]
        arrays[name] = runtime.empty(tuple(k if d is None else d for d in spec.shape), spec.dtype)
    state = runtime.state((len(pasts), *graph.inputs[pasts[0]].shape))
    graph.tie(arrays, state, [(name, name.replace("past", "present")) for name in pasts])
    return state


class Copying:
    """A session that does not write in place: caches that are bound as input and as output stay as they were."""

    def __init__(self, session):
        self._session = session

    def __getattr__(self, name):
        return getattr(self._session, name)

    def io_binding(self):
        return CopyingBinding(self._session.io_binding())

    def run_with_iobinding(self, binding):
        self._session.run_with_iobinding(binding.binding())


class CopyingBinding:
    def __init__(self, binding):
        self._binding, self._read, self._shared = binding, {}, []

    def __getattr__(self, name):
        return getattr(self._binding, name)

    def bind_input(self, name, device, device_id, dtype, shape, address):
        self._read[name] = address
        self._binding.bind_input(name, device, device_id, dtype, shape, address)

    def bind_ortvalue_input(self, name, value):
        self._read[name] = value.data_ptr()
        self._binding.bind_ortvalue_input(name, value)

    def bind_output(self, name, device, device_id, dtype, shape, address):
        if address in self._read.values():
            aside = np.zeros(shape, dtype)
            self._shared.append(aside)
            address = aside.ctypes.data
        self._binding.bind_output(name, device, device_id, dtype, shape, address)

    def bind_ortvalue_output(self, name, value):
        if value.data_ptr() in self._read.values():
            self.bind_output(name, "cpu", 0, np.float32, value.shape(), value.data_ptr())
        else:
            self._binding.bind_ortvalue_output(name, value)

    def binding(self):
        return self._binding


@pytest.mark.parametrize("make", [OnnxRuntimeRuntime, on_device], ids=["host", "device"])
def test_caches_that_are_not_written_in_place_are_copied_and_right(make, inputs, wanted, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "open_session", lambda *args: Copying(open_session(*args)))
    engine = GraphEngine(MODEL, make())
    assert engine._decoder.writes_in_place is False
    assert "does not write the cache in place" in caplog.text
    check(play(engine, inputs), wanted)


class Node(SimpleNamespace):
    """What ONNX Runtime says about a node."""


def double_of_onnxruntime(monkeypatch, have, placed, got=None):
    """A module whose sessions say these things about themselves. Returns what sessions were opened with.

    Args:
        have: providers that the library lists.
        placed: provider -> operators that it got.
        got: providers of the session; None = as asked for.
    """
    opened = []

    class Session:
        def __init__(self, path, settings, providers):
            self._providers = got or [name for name, _ in providers]
            opened.append((path, settings, dict(providers)))

        def get_providers(self):
            return self._providers

        def get_provider_graph_assignment_info(self):
            return [
                SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [Node(op_type=op) for op in ops])
                for name, ops in placed.items()
            ]

    class Settings:
        def __init__(self):
            self.entries = {}

        def add_session_config_entry(self, key, value):
            self.entries[key] = value

    double = SimpleNamespace(InferenceSession=Session, SessionOptions=Settings, get_available_providers=lambda: have)
    monkeypatch.setitem(sys.modules, "onnxruntime", double)
    return opened


GRAPH = MODEL / "decoder.onnx"


class TestRefusals:
    def test_a_provider_that_is_not_there(self):
        with pytest.raises(SlowPath, match=r"CUDAExecutionProvider is not in this ONNX Runtime; have .*CPUExecution"):
            OnnxRuntimeRuntime(provider=CUDA).open(GRAPH)

    def test_a_provider_that_is_listed_and_not_used(self, monkeypatch):
        double_of_onnxruntime(monkeypatch, [CUDA, CPU], {}, got=[CPU])
        with pytest.raises(SlowPath, match=r"decoder\.onnx would run on CPUExecutionProvider, asked for CUDA"):
            open_session(GRAPH, SessionOptions(provider=CUDA))
        assert open_session(GRAPH, SessionOptions(provider=CUDA, allow_slow=True)).get_providers() == [CPU]

    def test_nodes_that_fell_back_are_named_and_counted(self, monkeypatch):
        double_of_onnxruntime(
            monkeypatch, [CUDA, CPU], {CUDA: ["Gemm"] * 9, CPU: ["Attention", "Shape", "Attention", "Gelu", "Gather"]}
        )
        with pytest.raises(SlowPath, match=r"3 nodes would not run on CUDA.*\(2 Attention on CPU.*, 1 Gelu on CPU"):
            open_session(GRAPH, SessionOptions(provider=CUDA))
        session = open_session(GRAPH, SessionOptions(provider=CUDA, allow_slow=True))
        assert nodes_elsewhere(session, CUDA) == {f"Attention on {CPU}": 2, f"Gelu on {CPU}": 1}

    def test_arithmetic_on_shapes_may_stay_on_the_cpu(self, monkeypatch):
        opened = double_of_onnxruntime(monkeypatch, [CUDA, CPU], {CUDA: ["Gemm"], CPU: ["Shape", "Gather"]})
        open_session(GRAPH, SessionOptions(provider=CUDA))
        assert opened[0][1].entries == {"session.record_ep_graph_assignment_info": "1"}

    def test_nodes_of_tensorrt_that_cuda_got_count_as_well(self, monkeypatch):
        double_of_onnxruntime(monkeypatch, [TENSORRT, CUDA, CPU], {TENSORRT: ["Gemm"], CUDA: ["TensorScatter"]})
        with pytest.raises(SlowPath, match=r"1 nodes would not run on Tensorrt.*TensorScatter on CUDA"):
            open_session(GRAPH, SessionOptions(provider=TENSORRT))

    def test_a_real_session_says_where_its_nodes_are(self):
        session = open_session(GRAPH, SessionOptions(provider=CUDA, allow_slow=True))
        elsewhere = nodes_elsewhere(session, CUDA)
        assert elsewhere[f"Attention on {CPU}"] == 2
        assert not any(name.startswith("Cast") for name in elsewhere)

    def test_a_graph_that_is_cut_off(self, tmp_path):
        content = GRAPH.read_bytes()
        for length in (0, 100, len(content) // 2, len(content) - 1):
            (tmp_path / "decoder.onnx").write_bytes(content[:length])
            with pytest.raises(BadModel, match=r"decoder\.onnx: ONNX Runtime can't load it"):
                open_session(tmp_path / "decoder.onnx", SessionOptions())

    def test_a_graph_of_a_later_opset(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        model = onnx.load(str(GRAPH), load_external_data=False)
        model.opset_import[0].version = 99
        (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(BadModel, match=r"decoder\.onnx: ONNX Runtime can't load it .*99"):
            open_session(tmp_path / "decoder.onnx", SessionOptions())

    def test_a_graph_that_is_missing(self, tmp_path):
        with pytest.raises(BadModel, match="missing; `vla-spec export` writes it"):
            open_session(tmp_path / "decoder.onnx", SessionOptions())

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"provider": "cuda"}, "provider is 'cuda'; valid: CPUExecutionProvider, CUDAExecutionProvider, Tensorrt"),
            ({"precision": "fp8"}, "precision is 'fp8'; valid: fp32, int8, fp16"),
            ({"precision": "fp16"}, "fp16' with provider CPUExecutionProvider; valid: fp32, int8; fp16 with Tensorrt"),
            ({"device_id": -1}, "device_id is -1; valid: 0 or more"),
        ],
    )
    def test_options_that_can_not_be(self, values, message):
        with pytest.raises(BadConfig, match=message):
            Options(**values)


class TestProviderOptions:
    def test_cuda_computes_in_fp32_and_not_in_tf32(self, monkeypatch):
        opened = double_of_onnxruntime(monkeypatch, [CUDA, CPU], {CUDA: []})
        monkeypatch.setattr(plugin, "OnnxRuntimeGraph", lambda *args: args)
        OnnxRuntimeRuntime(provider=CUDA, device_id=1).open(GRAPH)
        assert opened[0][2] == {CUDA: {"device_id": "1", "use_tf32": "0"}, CPU: {}}

    def test_tensorrt_keeps_engines_and_knows_the_sizes(self, monkeypatch, tmp_path):
        opened = double_of_onnxruntime(monkeypatch, [TENSORRT, CUDA, CPU], {TENSORRT: []})
        monkeypatch.setattr(plugin, "OnnxRuntimeGraph", lambda *args: args)
        runtime = OnnxRuntimeRuntime(provider=TENSORRT, precision="fp16", cache_dir=tmp_path / "engines")
        runtime.open(GRAPH)
        runtime.open(MODEL / "prompt.onnx")
        decoder, prompt = (one[2][TENSORRT] for one in opened)
        assert (decoder["trt_fp16_enable"], decoder["trt_int8_enable"]) == ("True", "False")
        assert decoder["trt_engine_cache_enable"] == "True"
        assert decoder["trt_engine_cache_path"] == decoder["trt_timing_cache_path"] == str(tmp_path / "engines")
        assert (tmp_path / "engines").is_dir()
        assert decoder["trt_profile_min_shapes"] == "embeds:1x96,mask:1x1x1x72"
        assert decoder["trt_profile_opt_shapes"] == "embeds:8x96,mask:1x1x8x72"
        assert decoder["trt_profile_max_shapes"] == "embeds:72x96,mask:1x1x72x72"
        assert "trt_profile_min_shapes" not in prompt
        assert list(opened[0][2]) == [TENSORRT, CUDA, CPU]

    def test_claims_follow_from_what_really_runs(self):
        runtime = OnnxRuntimeRuntime(provider=TENSORRT, precision="fp16", allow_slow=True)
        assert not runtime.is_batch_invariant
        runtime.open(GRAPH)
        assert (runtime.provider, runtime.precision) == (CPU, "fp32")
        assert runtime.is_batch_invariant
        assert not OnnxRuntimeRuntime(precision="int8").is_batch_invariant
        assert not OnnxRuntimeRuntime(provider=CUDA).is_batch_invariant


class TestInt8:
    def test_one_row_is_scored_as_two(self, int8, inputs):
        engine = plugin.build(Options(precision="int8"), Parts(None, None, model_dir=int8))
        assert engine.info.precision == "int8"
        assert engine.runtime.is_batch_invariant  # claimed; the engine takes it back where a chain shows otherwise
        assert engine.runtime.tiers[:2] == (2, 3)
        assert engine.runtime.tiers[-1] == engine.spec.rows
        assert engine.runtime.aside().tiers is None
        plain = GraphEngine(int8, OnnxRuntimeRuntime(precision="int8"))
        for one in (engine, plain):
            one.prefill(inputs)
        token = np.array([5], np.int32), np.array([-1], np.int32)
        found, wanted = engine.step(*token).logits, plain.step(*token).logits
        assert found.shape == wanted.shape
        assert found.argmax() == wanted.argmax()

    def test_it_is_near_the_original_and_not_the_original(self, int8, inputs, wanted):
        found = play(plugin.build(Options(precision="int8"), Parts(None, None, model_dir=int8)), inputs)
        worst = max(float(np.abs(a - b).max() / b.std()) for a, b in zip(found, wanted, strict=True))
        assert 1e-3 < worst < 0.5

    def test_without_a_quantised_graph_it_is_refused(self, tmp_path):
        folder = write_plain_model(tmp_path / "small")
        with pytest.raises(BadModel, match="vla-spec quantize"):
            plugin.build(Options(precision="int8"), Parts(None, None, model_dir=folder))


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return write_int8_model(tmp_path_factory.mktemp("int8") / "small")


def test_a_graph_without_a_cache_is_tied_as_it_is(inputs):
    graph = on_device().open(MODEL / "prompt.onnx")
    assert isinstance(graph, OnnxRuntimeGraph)
    arrays = {name: inputs[name].copy() for name in graph.inputs}
    arrays["embeds"] = np.zeros(graph.outputs["embeds"].shape, np.float32)
    call = graph.tie(arrays)
    call.run()
    first = arrays["embeds"].copy()
    arrays["state"] += 0.1  # read again at every run
    call.run()
    assert np.abs(arrays["embeds"] - first).max() > 1e-4
