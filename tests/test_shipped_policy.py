"""The shipped weights: engines agree, exact is exact, the arm succeeds, broken files are refused in one sentence."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vla_spec import plugins
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadConfig, BadModel, SlowPath
from vla_spec.interfaces import ChunkHistory

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
NO_DEADLINE = 1 << 62
DRAFTERS = ["previous_chunk", "ngram", "jacobi", "block_head", "feature_head", "small_model"]

pytest.importorskip("onnxruntime", reason="needs the extra [run]")


@pytest.fixture(scope="module")
def shipped():
    """Adapter, engine and parts of the shipped model."""
    from vla_spec.adapters import vla

    adapter = vla.load(MODEL)
    first = plugins.Parts(adapter.domain, adapter.tokenizer, MODEL)
    plugin = plugins.load("engine", "onnxruntime")
    engine = plugin.build(plugin.options(), first)
    return adapter, engine, plugins.Parts(adapter.domain, adapter.tokenizer, MODEL, engine)


@pytest.fixture(scope="module")
def inputs():
    """The observation that was exported with the weights."""
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        return {name: golden[name] for name in ("images", "words", "state")}


def build(kind, name, parts, **options):
    plugin = plugins.load(kind, name)
    return plugin.build(plugin.options(**options), parts)


def decoder(shipped, drafter, rule="greedy", **controller):
    adapter, engine, parts = shipped
    controller = controller or {"gamma": 16}
    return SpeculativeDecoder(
        engine, build("drafter", drafter, parts), build("rule", rule, parts),
        build("controller", "fixed", parts, **controller), adapter.domain.num_tokens, lambda: 0,
        np.random.default_rng(0),
    )  # fmt: skip


def test_onnxruntime_says_what_pytorch_says(shipped, inputs):
    """Prefill, a chain, a tree, a commit and a chain after it, on both engines."""
    pytest.importorskip("torch", reason="needs the extra [torch]")
    _, engine, parts = shipped
    reference = build("engine", "pytorch", parts)
    rng = np.random.default_rng(1)

    def close(ours, theirs):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-3)
        assert (ours.logits.argmax(1) == theirs.logits.argmax(1)).all()

    close(engine.prefill(inputs), reference.prefill(inputs))
    tokens = rng.integers(0, 256, 7).astype(np.int32)
    for parents in ([-1, 0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 2, 4]):
        close(engine.step(tokens, np.array(parents, np.int32)), reference.step(tokens, np.array(parents, np.int32)))
    for one in (engine, reference):
        one.commit(np.array([0, 2, 4, 6], np.int32))
    chain = np.array([-1, 0, 1], np.int32)
    close(engine.step(tokens[:3], chain), reference.step(tokens[:3], chain))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_exact_speculation_writes_the_autoregressive_tokens(shipped, inputs, drafter):
    """Chain and, where the drafter can, tree; on the exported picture and on disturbed copies of it."""
    try:
        decoders = [decoder(shipped, drafter), decoder(shipped, drafter, gamma=24, depth=5, top_k=3)]
    except BadModel as error:
        pytest.skip(str(error))
    plain = decoder(shipped, "none", gamma=0)
    rng = np.random.default_rng(2)
    history = None
    for _ in range(4):
        shift = rng.normal(0, 0.05, inputs["state"].shape).astype(np.float32)
        seen = {**inputs, "state": inputs["state"] + shift}
        truth = plain.decode(seen, NO_DEADLINE, history)
        for speculative in decoders:
            got = speculative.decode(seen, NO_DEADLINE, history)
            np.testing.assert_array_equal(got.tokens, truth.tokens)
            assert len(got.rounds) <= len(truth.rounds)
        history = ChunkHistory(truth.tokens, 16)


def test_the_block_head_needs_far_fewer_forwards_than_tokens(shipped, inputs):
    """Distillation worked: less than half of the forwards of plain decoding."""
    drafted = decoder(shipped, "block_head").decode(inputs, NO_DEADLINE)
    assert len(drafted.rounds) < len(drafted.tokens) / 2


def copy_model(folder):
    for name in ("policy.json", "engine.json", "target.safetensors", "prompt.onnx", "decoder.onnx", "golden.npz"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def build_engine(folder, **options):
    plugin = plugins.load("engine", "onnxruntime")
    return plugin.build(plugin.options(**options), plugins.Parts(None, None, folder))


def test_corrupt_weights_are_refused(tmp_path):
    folder = copy_model(tmp_path)
    weights = bytearray((folder / "target.safetensors").read_bytes())
    weights[-1000] ^= 0xFF
    (folder / "target.safetensors").write_bytes(weights)
    with pytest.raises(BadModel, match="corrupt or of another model"):
        build_engine(folder)


def test_missing_files_are_named(tmp_path):
    folder = copy_model(tmp_path)
    (folder / "decoder.onnx").unlink()
    with pytest.raises(BadModel, match=r"decoder\.onnx"):
        build_engine(folder)
    (folder / "engine.json").unlink()
    with pytest.raises(BadModel, match=r"engine\.json missing"):
        build_engine(folder)


def test_a_truncated_graph_is_refused(tmp_path):
    folder = copy_model(tmp_path)
    (folder / "decoder.onnx").write_bytes((folder / "decoder.onnx").read_bytes()[:5000])
    with pytest.raises(BadModel, match=r"decoder\.onnx"):
        build_engine(folder)


def test_golden_inputs_that_disagree_are_refused(tmp_path):
    folder = copy_model(tmp_path)
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        changed = {**golden, "tree_logits": golden["tree_logits"] + 0.01}
    np.savez(folder / "golden.npz", **changed)
    with pytest.raises(BadModel, match="golden inputs"):
        build_engine(folder)


def test_another_provider_than_the_one_asked_for_is_refused():
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(SlowPath, match="CUDAExecutionProvider"):
            build_engine(MODEL, provider="CUDAExecutionProvider")
    with pytest.raises(BadConfig, match="provider is 'NoSuchProvider'; valid: CPUExecutionProvider"):
        build_engine(MODEL, provider="NoSuchProvider")


def test_a_graph_without_sizes_is_refused(tmp_path):
    folder = copy_model(tmp_path)
    sizes = json.loads((folder / "engine.json").read_text())
    del sizes["decoder"]["capacity"]
    (folder / "engine.json").write_text(json.dumps(sizes))
    with pytest.raises(BadModel, match="capacity"):
        build_engine(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["greedy", "relaxed_physical"])
def test_the_arm_closes_the_drawer(shipped, rule):
    """Closed loop with rendered pictures and the held-out sentence, on a seed that training never saw."""
    if importlib.util.find_spec("metaworld") is None:  # importing it here would choose the renderer too early
        pytest.skip("needs the extra [sim]")
    from vla_spec.robots.metaworld import MetaWorldRobot

    adapter, _, _ = shipped
    decode = decoder(shipped, "block_head", rule)
    robot = MetaWorldRobot("drawer-close")
    try:
        robot.reset(10_001)
        while not robot.is_success and robot.step < 200:
            chunk = decode.decode(adapter.encode(robot.observe(0)), NO_DEADLINE)
            for action in adapter.decode(chunk.tokens)[:4]:
                robot.act(action, 0)
        assert robot.is_success
    finally:
        robot.close()
