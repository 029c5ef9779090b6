"""The engine over graphs, on a runtime of this file that pads and breaks on purpose, against the plain one."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from pathlib import Path

from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._model_files import ModelFiles
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime
from vla_spec.errors import BadConfig, BadModel

MODEL = Path(__file__).parents[1] / "models" / "metaworld" / "small"
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")


class Tiered:
    """ONNX Runtime that claims to run three sizes only, and keeps what it gave out."""

    def __init__(self, tiers):
        self._inner, self.tiers, self.calls, self.states = OnnxRuntimeRuntime(), tiers, [], []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def open(self, file):
        return Recorded(self._inner.open(file), self.calls)

    def state(self, shape):
        self.states.append(self._inner.state(shape))
        return self.states[-1]


class Recorded:
    """Notes how many rows each tied decoder call has."""

    def __init__(self, graph, calls):
        self._graph, self._calls = graph, calls
        self.inputs, self.outputs = graph.inputs, graph.outputs

    def tie(self, arrays, state=None, state_names=()):
        if "mask" in arrays:
            self._calls.append(arrays["mask"].shape[2])
        return self._graph.tie(arrays, state, state_names)


@pytest.fixture(scope="module")
def inputs():
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        return {name: golden[name] for name in ("images", "words", "state")}


@pytest.fixture(scope="module")
def plain():
    return GraphEngine(MODEL, OnnxRuntimeRuntime())


TREE = np.array([7, 9, 11, 13, 200, 3], np.int32), np.array([-1, 0, 0, 2, 2, 4], np.int32)
PATH = np.array([0, 2, 4, 5], np.int32)


def play(engine, inputs):
    """A prompt, a chain with a part of it kept, a tree with a path kept, a token: everything that is returned."""
    seen = [engine.prefill(inputs).logits.copy()]
    seen.append(engine.step(np.arange(5, dtype=np.int32), np.arange(-1, 4, dtype=np.int32)).logits.copy())
    engine.commit(np.arange(2, dtype=np.int32))
    seen.append(engine.step(*TREE).logits.copy())
    engine.commit(PATH)
    seen.append(engine.step(np.array([5], np.int32), np.array([-1], np.int32)).logits.copy())
    seen.append(engine.features.copy())
    return seen


def test_padding_to_tiers_changes_no_score(plain, inputs):
    runtime = Tiered((1, 8, 32))
    for found, wanted in zip(play(GraphEngine(MODEL, runtime), inputs), play(plain, inputs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    assert set(runtime.calls) == {1, 8}


def test_sizes_of_one_tier_share_their_buffers(inputs):
    runtime = Tiered((8, 32))
    engine = GraphEngine(MODEL, runtime)
    before = len(runtime.calls)
    for k in (8, 3, 5, 2):
        engine.step(np.zeros(k, np.int32), np.arange(-1, k - 1, dtype=np.int32))
    assert len(runtime.calls) == before


def test_more_rows_than_the_largest_tier_are_refused():
    with pytest.raises(BadModel, match=r"rows are more than the largest that was built for \(4\)"):
        GraphEngine(MODEL, Tiered((1, 4)))


def test_nan_in_scratch_rows_does_not_outlive_the_chunk(plain, inputs):
    """A masked row that holds NaN makes every score NaN; a new prompt has to be clean again."""
    runtime = Tiered(None)
    engine = GraphEngine(MODEL, runtime)
    runtime.states[0].tensors[:] = np.nan
    assert not np.isfinite(engine.prefill(inputs).logits).all()
    np.testing.assert_array_equal(engine.prefill(inputs).logits, plain.prefill(inputs).logits)


def test_a_committed_path_of_a_tree_equals_its_tokens_one_by_one(plain, inputs):
    plain.prefill(inputs)
    plain.step(*TREE)
    plain.commit(PATH)
    row, features = plain.step(np.array([1], np.int32), np.array([-1], np.int32)).logits.copy(), plain.features.copy()
    plain.prefill(inputs)
    for token in TREE[0][PATH]:
        plain.step(np.array([token], np.int32), np.array([-1], np.int32))
        plain.commit(np.zeros(1, np.int32))
    np.testing.assert_allclose(plain.features, features, rtol=0, atol=2e-5)
    again = plain.step(np.array([1], np.int32), np.array([-1], np.int32)).logits
    np.testing.assert_allclose(again, row, rtol=0, atol=2e-5)


def test_max_step_beyond_the_scratch_rows_is_refused():
    with pytest.raises(BadConfig, match="max_step 33; valid: 1 to 32"):
        GraphEngine(MODEL, OnnxRuntimeRuntime(), 33)


def test_a_spec_survives_json_and_names_what_is_wrong():
    spec = ModelFiles.describe(MODEL).decoder
    values = spec.to_json()
    assert DecoderSpec.from_json(values, "here") == spec
    with pytest.raises(BadModel, match=r"here: unknown \['heads'\]"):
        DecoderSpec.from_json({**values, "heads": 3}, "here")
    for name, value in (("num_heads", 0), ("norm", "batch"), ("rope_theta", -1.0), ("taps", [99]), ("rows", 3)):
        with pytest.raises(BadModel, match="here: "):
            DecoderSpec.from_json({**values, name: value}, "here")
    with pytest.raises(BadModel, match="valid: an object"):
        DecoderSpec.from_json([], "here")


def test_a_weights_file_that_is_cut_off_is_refused(tmp_path):
    content = (MODEL / "target.safetensors").read_bytes()
    for length in (0, 5, 200, len(content) - 1):
        (tmp_path / "w.safetensors").write_bytes(content[:length])
        with pytest.raises(BadModel, match=r"w\.safetensors"):
            WeightsFile.open(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(BadModel, match="no tensor nothing; has "):
        WeightsFile.open(tmp_path / "w.safetensors").read("nothing")
