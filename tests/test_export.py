"""Exporting: equal weights give equal bytes, and what was written loads and agrees with the reference."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("onnx", reason="needs the extra [train]")
pytest.importorskip("onnxruntime", reason="needs the extra [run]")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vla_spec.engines import export  # noqa: E402
from vla_spec.engines._graph_engine import GraphEngine  # noqa: E402
from vla_spec.engines._model_files import ModelFiles  # noqa: E402
from vla_spec.engines.nets.block_head import BlockHead  # noqa: E402
from vla_spec.engines.nets.feature_head import FeatureHead  # noqa: E402
from vla_spec.engines.nets.head_config import HeadConfig  # noqa: E402
from vla_spec.engines.nets.vla import VLA, VLAConfig  # noqa: E402
from vla_spec.engines.nets.weights import load_policy, read_weights, save_half  # noqa: E402
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime  # noqa: E402
from vla_spec.engines.pytorch import PyTorchRuntime  # noqa: E402

WORDS = [f"word{i}" for i in range(9)]
TINY = VLAConfig(
    num_words=len(WORDS), width=32, num_layers=3, num_heads=2, mlp_width=32, image_size=32, num_cameras=1,
    tokens_per_camera=1, text_tokens=1, horizon=2, stem_channels=(4, 6, 8),
)  # fmt: skip
HEAD_SIZES = HeadConfig.for_target(TINY, 64)
FILES = {
    "policy.json", "engine.json", "target.safetensors", "prompt.onnx", "decoder.onnx", "commit.onnx", "golden.npz",
    "block_head.safetensors", "block_head.onnx", "feature_head.safetensors", "feature_head.onnx",
}  # fmt: skip


def write_model(out):
    """A tiny policy with both heads, from the same weights whenever it is called."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inputs = {
        "images": rng.integers(0, 255, (1, 1, 32, 32, 3), dtype=np.uint8),
        "words": rng.integers(0, len(WORDS), (1, TINY.max_words)),
        "state": rng.normal(size=(1, 4)).astype(np.float32),
    }
    export.export_policy(VLA(TINY).eval(), WORDS, out, inputs)
    export.export_head("block_head", BlockHead(HEAD_SIZES), out)
    export.export_head("feature_head", FeatureHead(HEAD_SIZES), out)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def test_two_exports_of_equal_weights_are_equal_byte_for_byte(model, tmp_path):
    again = write_model(tmp_path / "elsewhere" / "another name")
    assert {path.name for path in model.iterdir()} == {path.name for path in again.iterdir()} == FILES
    for name in sorted(FILES):
        assert (model / name).read_bytes() == (again / name).read_bytes(), name


def test_files_hold_no_path_of_the_machine_that_wrote_them(model):
    for name in sorted(FILES):
        content = (model / name).read_bytes()
        assert str(model.parent).encode() not in content, name
        assert not name.endswith(".onnx") or b".py" not in content, name  # no stack traces of the exporter's


def test_metadata_is_sorted_whatever_the_library_makes_of_it(tmp_path):
    """Ten keys: by chance alone, sorted once in 3.6 million."""
    metadata = {f"key{i}": f'"{i}" é' for i in range(10)}
    weights = {"b": torch.ones(3), "a": torch.arange(6.0).view(2, 3)}
    save_half(tmp_path / "one", weights, metadata)
    save_half(tmp_path / "two", dict(reversed(weights.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read, found = read_weights(tmp_path / "one")
    assert found == metadata
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"a": [[0, 1, 2], [3, 4, 5]], "b": [1, 1, 1]}


def test_weights_that_the_library_wrote_by_itself_are_read_as_well(model, tmp_path):
    """Model folders of before metadata was sorted."""
    with safe_open(model / "target.safetensors", "pt") as file:
        save_file({k: file.get_tensor(k) for k in file.keys()}, tmp_path / "old", file.metadata())
    network, vocabulary = load_policy(tmp_path / "old")
    assert network.config == TINY
    assert vocabulary == WORDS


def test_engines_load_what_was_written_and_agree(model):
    """Loading ONNX Runtime's runs the golden inputs that PyTorch answered."""
    ours, reference = GraphEngine(model, OnnxRuntimeRuntime()), GraphEngine(model, PyTorchRuntime())
    assert ours.info.model_hash == reference.info.model_hash == ModelFiles.open(model).weights_sha256
    assert ours.max_step == reference.max_step == 32
    with np.load(model / "golden.npz", allow_pickle=False) as golden:
        inputs = {name: golden[name] for name in ("images", "words", "state")}
    np.testing.assert_allclose(ours.prefill(inputs).logits, reference.prefill(inputs).logits, atol=1e-4)
    np.testing.assert_allclose(ours.features, reference.features, atol=1e-4)
    assert ours.length == reference.length == TINY.prompt_length
    assert ours.features.shape == (TINY.prompt_length, TINY.feature_width)
