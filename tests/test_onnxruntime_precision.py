"""ONNX Runtime in fp32 beside PyTorch: within 1e-4 on golden inputs and on seeded prompts with random trees.

Run as a script for many: ``python tests/test_onnxruntime_precision.py 250`` prints the largest differences.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from vla_spec.adapters.vla import load as load_adapter
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime
from vla_spec.engines.pytorch import PyTorchRuntime
from vla_spec.engines.verify import check_golden, random_tree, seeded_observations

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
ATOL = 1e-4
pytestmark = pytest.mark.skipif(not (MODEL / "decoder.onnx").exists(), reason="no shipped model here")


def differences(engine, reference, inputs, rng):
    """Prefill, then trees of random sizes with a random path kept, to the end of the cache.

    Returns:
        Largest difference of a logit per call; largest difference of a feature, as a share of the largest feature.
    """
    logits = [np.abs(engine.prefill(inputs).logits - reference.prefill(inputs).logits).max()]
    while engine.length < engine.spec.capacity - 1:
        k = int(rng.integers(1, engine.max_step + 1))
        parents = random_tree(k, rng)
        tokens = rng.integers(0, engine.spec.vocab_size, k).astype(np.int32)
        logits.append(np.abs(engine.step(tokens, parents).logits - reference.step(tokens, parents).logits).max())
        path = [int(rng.integers(0, k))]
        while parents[path[0]] >= 0:
            path.insert(0, int(parents[path[0]]))
        kept = np.array(path[: engine.spec.capacity - engine.length], np.int32)
        for one in (engine, reference):
            one.commit(kept)
    features = np.abs(engine.features - reference.features).max() / np.abs(reference.features).max()
    return logits, float(features)


def differences_of(folder, count):
    engine, reference = GraphEngine(folder, OnnxRuntimeRuntime()), GraphEngine(folder, PyTorchRuntime())
    adapter = load_adapter(folder)
    rng = np.random.default_rng(0)
    observations = seeded_observations(adapter.example(), count, rng)
    found = [differences(engine, reference, adapter.encode(one), rng) for one in observations]
    return np.concatenate([logits for logits, _ in found]), max(features for _, features in found)


@pytest.mark.parametrize("folder", [MODEL, MODEL / "small"], ids=["target", "small"])
def test_golden_inputs(folder):
    engine = GraphEngine(folder, OnnxRuntimeRuntime())
    assert check_golden(engine, folder / "golden.npz") < ATOL


@pytest.mark.parametrize(("folder", "count"), [(MODEL, 4), (MODEL / "small", 10)], ids=["target", "small"])
def test_seeded_prompts_and_random_trees(folder, count):
    logits, features = differences_of(folder, count)
    assert logits.max() < ATOL
    assert features < 1e-5


if __name__ == "__main__":
    for path in (MODEL, MODEL / "small"):
        logits, features = differences_of(path, int(sys.argv[1]))
        print(f"{path.name}: logits max {logits.max():.2g}, p99 {np.quantile(logits, 0.99):.2g} of {len(logits)} calls")
        print(f"{path.name}: features max {features:.2g} of the largest")
