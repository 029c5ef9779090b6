"""The engine `tensorrt` from configuration to tokens, in half precision: only the GPU and the compiler are doubles.

Graphs are prepared, keyed, cached, found, checked and run as on a robot; what runs them is ONNX Runtime on the fake
device's memory. The engine contract at the end is the one that every engine is held to.
"""

import gc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from contract import test_engine_contract as contract
from contract.conftest import Built
from fake_tensorrt import Place

from vla_spec import plugins
from vla_spec.engines import cache, tensorrt
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime
from vla_spec.engines.tensorrt import Options
from vla_spec.errors import BadConfig, BadEngine, BadModel, MissingDependency, SlowPath
from vla_spec.plugins import Parts

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "metaworld" / "small"
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("trt"), patch, MODEL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch, MODEL)


@pytest.fixture(scope="module")
def inputs():
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        return {name: golden[name] for name in ("images", "words", "state")}


def test_agrees_with_the_reference_to_half_precision(shared, inputs):
    engine, plain = shared.load(), GraphEngine(MODEL, OnnxRuntimeRuntime())
    nodes, parents = np.array([7, 9, 11, 13], np.int32), np.array([-1, 0, 0, 2], np.int32)
    for e in (engine, plain):
        e.prefill(inputs)
        e.step(nodes, parents)
        e.commit(np.array([0, 2, 3], np.int32))
    found, wanted = (e.step(nodes, parents).logits for e in (engine, plain))
    assert np.abs(found - wanted).max() <= 2e-2 * wanted.std() * 10
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.75
    assert np.abs(found - wanted).max() > 0, "half precision must have been used"
    engine.runtime.close()


def test_says_what_it_is(shared):
    engine = shared.load()
    assert engine.info.name == "tensorrt"
    assert engine.info.precision == "fp16"
    assert engine.info.provider == "tensorrt-rtx 1.7.1 on Fake GPU (SM 89, CUDA 13.0)"
    assert not engine.info.is_batch_invariant
    assert engine.max_step == 32
    engine.runtime.close()


def test_every_step_size_is_captured_at_load_and_leaves_no_trace(shared, inputs):
    engine = shared.load()
    calls = [call for graph in engine.runtime.graphs for call in graph.calls]
    assert len(calls) >= 6
    assert all(call.is_captured and call.num_nodes == 3 for call in calls)
    cuda = shared.cuda
    engine.prefill(inputs)
    cuda.forget()
    for k in range(1, 33):
        engine.step(np.zeros(k, np.int32), np.arange(-1, k - 1, dtype=np.int32))
    assert set(cuda.calls) == {"launch", "record", "wait"}
    assert cuda.count("wait") == 32
    engine.runtime.close()


def test_one_size_for_all_steps_is_batch_invariant_bit_for_bit(shared, inputs):
    engine = shared.load(tiers=(32,))
    assert engine.info.is_batch_invariant
    chain = np.arange(-1, 31, dtype=np.int32)
    tokens = np.arange(32, dtype=np.int32) * 7 % 256
    engine.prefill(inputs)
    together = engine.step(tokens, chain).logits.copy()
    for i in range(3):
        alone = engine.step(tokens[:1], chain[:1]).logits.copy()
        np.testing.assert_array_equal(alone[0], together[i])
        engine.commit(np.zeros(1, np.int32))
        tokens = tokens[1:]
    engine.runtime.close()


def test_is_built_once_and_then_found(place):
    place.load().runtime.close()
    (folder,) = [path for path in place.folder.iterdir() if not path.name.startswith(".")]
    made = (folder / "manifest.json").stat().st_mtime_ns
    place.load(allow_build=False).runtime.close()
    assert (folder / "manifest.json").stat().st_mtime_ns == made
    assert cache.read(folder).tiers == (1, 2, 4, 8, 16, 32)


def test_without_an_engine_it_says_how_to_build_one(place):
    with pytest.raises(BadEngine, match="vla-spec build"):
        place.load(allow_build=False)
    assert place.cuda.live == {}


def test_a_damaged_plan_is_never_loaded_and_built_anew_if_allowed(place):
    place.load().runtime.close()
    (plan,) = place.folder.glob("*/decoder.plan")
    content = bytearray(plan.read_bytes())
    content[-3] ^= 1
    plan.write_bytes(content)
    with pytest.raises(BadEngine, match="corrupt"):
        place.load(allow_build=False)
    gc.collect()
    assert place.cuda.live == {}


def test_an_engine_of_another_gpu_is_not_taken(place):
    place.load().runtime.close()
    place.cuda._capability, place.trt.sm = (12, 0), 120
    with pytest.raises(BadEngine, match=r"for SM89, wanted SM120"):
        place.load(allow_build=False)


def test_a_model_that_it_does_not_compute_is_refused(place, monkeypatch):
    place.load().runtime.close()
    monkeypatch.setitem(__import__("fake_tensorrt").NUMPY, "FLOAT", np.float32)
    from vla_spec.engines import _graph_engine

    monkeypatch.setitem(_graph_engine.GOLDEN_TOLERANCE, "fp16", 1e-9)
    with pytest.raises(BadModel, match="golden inputs"):
        place.load()
    gc.collect()
    assert place.cuda.live == {}


def test_a_plan_of_another_precision_than_its_manifest_says_is_refused(place, monkeypatch):
    from vla_spec.engines._trt import runtime

    monkeypatch.setitem(runtime.ITEMSIZE, "fp16", 4)
    with pytest.raises(BadModel, match="another precision"):
        place.load()


def test_an_engine_that_fell_back_to_single_precision_is_refused(place):
    place.trt.inspected = "FP32"
    with pytest.raises(SlowPath, match=r"built for fp16, but .* 4 in fp32: TensorRT fell back"):
        place.load()
    gc.collect()
    assert place.cuda.live == {}
    place.load(allow_slow=True).runtime.close()
    place.trt.inspected = None  # built without details: it can't be told
    engine = place.load()
    assert all(tensorrt.check_layers(graph, "fp16") is None for graph in engine.runtime.graphs)


def test_max_step_is_held_to_the_tiers(place):
    assert place.load(max_step=5).max_step == 5
    with pytest.raises(BadConfig, match="valid: 1 to 8"):
        place.load(tiers=(1, 8), max_step=9)
    assert place.load(tiers=(1, 8)).max_step == 8


def test_a_drafter_model_gets_its_own_engine_and_stream(place):
    from vla_spec.engines._drafter_runtime import runtime_for

    engine = place.load()
    parts = Parts(None, None, model_dir=MODEL, target=engine)
    beside = runtime_for(parts, MODEL)
    assert beside is not engine.runtime
    assert place.cuda.streams[beside.lane.stream]["priority"] == 0
    assert GraphEngine(MODEL, beside).info.name == "tensorrt"
    with pytest.raises(BadModel, match="not of"):
        beside.open(MODEL.parent / "decoder.onnx")


def test_auto_takes_the_first_library_that_is_installed(monkeypatch):
    def open_library(backend):
        if backend not in have:
            raise MissingDependency(backend, "somehow")
        return backend

    monkeypatch.setattr(tensorrt, "open_library", open_library)
    have = {"tensorrt", "tensorrt-rtx"}
    assert tensorrt.find_library() == "tensorrt"
    have = {"tensorrt-rtx"}
    assert tensorrt.find_library() == "tensorrt-rtx"
    with pytest.raises(MissingDependency, match="tensorrt is missing"):
        tensorrt.find_library("tensorrt")
    have = set()
    with pytest.raises(MissingDependency, match="somehow"):
        tensorrt.find_library()


@pytest.mark.parametrize(
    "wrong", [{"library": "trt"}, {"precision": "fp64"}, {"max_step": 0}, {"wait": "sleep"}, {"cuda_graphs": "no"}]
)
def test_options_are_checked(wrong):
    with pytest.raises(BadConfig, match="valid"):
        Options(**wrong)


# --- the contract of engines ---


@pytest.fixture(scope="module")
def engine(shared):
    plugin = plugins.load("adapter", "vla")
    adapter = plugin.build(plugin.options(), Parts(None, None, model_dir=MODEL))
    loader = plugins.load("engine", "tensorrt")
    parts = Parts(adapter.domain, adapter.tokenizer, model_dir=MODEL)
    inputs = []
    for step in range(3):
        varied = adapter.encode(adapter.example())
        varied["state"] = varied["state"] + 0.01 * step
        inputs.append(varied)
    return Built(loader.build(shared.options(), parts), parts, inputs)


@pytest.fixture
def tokens(engine):
    return np.random.default_rng(1).integers(0, engine.parts.domain.vocab_size, 12).tolist()


@pytest.fixture(autouse=True)
def half_precision(monkeypatch):
    """Kernels of different sizes sum in different orders, in half precision."""
    monkeypatch.setattr(contract, "ATOL", 0.1)


for _name in [name for name in dir(contract) if name.startswith("test_")]:
    globals()[_name.replace("test_", "test_contract_", 1)] = getattr(contract, _name)
