"""Exporting: equal weights give equal bytes, what was written agrees with the reference, and it is all or nothing."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("onnx", reason="needs the extra [train]")
pytest.importorskip("onnxruntime", reason="needs the extra [run]")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vla_spec import recipe  # noqa: E402
from vla_spec.cli import main  # noqa: E402
from vla_spec.drafters import block_head, feature_head, small_model  # noqa: E402
from vla_spec.engines import export  # noqa: E402
from vla_spec.engines._graph_engine import GraphEngine  # noqa: E402
from vla_spec.engines._model_files import ModelFiles  # noqa: E402
from vla_spec.engines._model_manifest import check_manifest  # noqa: E402
from vla_spec.engines.nets import distill  # noqa: E402
from vla_spec.engines.nets.block_head import BlockHead  # noqa: E402
from vla_spec.engines.nets.feature_head import FeatureHead  # noqa: E402
from vla_spec.engines.nets.head_config import HeadConfig  # noqa: E402
from vla_spec.engines.nets.vla import VLA, VLAConfig  # noqa: E402
from vla_spec.engines.nets.weights import (  # noqa: E402
    load_policy,
    policy_file,
    policy_sha256,
    read_weights,
    save_half,
)
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime  # noqa: E402
from vla_spec.engines.pytorch import PyTorchRuntime  # noqa: E402
from vla_spec.errors import BadConfig, BadModel  # noqa: E402
from vla_spec.plugins import Parts  # noqa: E402
from vla_spec.types import Plan, TokenDomain  # noqa: E402

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


def random_inputs():
    """What the adapter of a tiny policy could make of an observation."""
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 255, (1, 1, 32, 32, 3), dtype=np.uint8),
        "words": rng.integers(0, len(WORDS), (1, TINY.max_words)),
        "state": rng.normal(size=(1, 4)).astype(np.float32),
    }


def write_model(out):
    """A tiny policy with both heads, from the same weights whenever it is called."""
    torch.manual_seed(0)
    export.export_policy(VLA(TINY).eval(), WORDS, out, random_inputs())
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


# --- the whole command: all or nothing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny policy, one of each drafter, and another policy of the same size."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(1)
    policy = VLA(TINY).eval()
    save_half(folder / "policy.safetensors", *policy_file(policy, WORDS))
    policy, _ = load_policy(folder / "policy.safetensors")
    for name in distill.distillers():
        saved = {**distill.distiller(name).build(policy).state_dict(), "step": torch.tensor(3)}
        save_file(saved, folder / f"{name}.safetensors", {"target_sha256": policy_sha256(policy, WORDS)})
    save_half(folder / "other.safetensors", *policy_file(VLA(TINY).eval(), WORDS))
    return folder


@pytest.fixture(autouse=True)
def golden_inputs(monkeypatch):
    """Not from a simulator, which takes seconds to start."""
    monkeypatch.setattr(recipe, "_golden_inputs", lambda config, vocabulary: random_inputs())


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """What the command writes; to be copied."""
    out, said = tmp_path_factory.mktemp("exported") / "model", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_golden_inputs", lambda config, vocabulary: random_inputs())
        recipe.export_model(trained / "policy.safetensors", trained, out, said.append, command="vla-spec export")
    return out, said


@pytest.fixture
def exported(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "model")


def run_export(trained, out, checkpoint="policy", drafters=None, **options):
    recipe.export_model(trained / f"{checkpoint}.safetensors", drafters or trained, out, lambda text: None, **options)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_time(manifest):
    values = json.loads(manifest)
    del values["created"]
    return values


def test_the_command_writes_policy_drafters_and_manifest_and_they_decode(whole, tmp_path):
    out, said = whole
    assert {path.name for path in out.iterdir()} == {*FILES, "small", "manifest.json"}
    assert {path.name for path in (out / "small").iterdir()} == {
        name for name in (*FILES, "manifest.json") if "head" not in name
    }
    assert said[-1] == str(out / "manifest.json")
    assert "block_head, feature_head, small_model" in said[-2]
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == FILES
    assert manifest["command"] == "vla-spec export"
    check_manifest(out)
    check_manifest(out / "small")
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    engine = GraphEngine(out, OnnxRuntimeRuntime())
    inputs = random_inputs()
    domain = TokenDomain(
        TINY.num_bins, TINY.num_tokens, TINY.action_size, np.zeros(TINY.num_tokens, np.int32),
        np.zeros(TINY.num_tokens, bool), np.ones(TINY.num_tokens, np.float32),
    )  # fmt: skip
    first = int(engine.prefill(inputs).logits[0].argmax())
    for module in (block_head, feature_head, small_model):
        drafter = module.build(module.Options(), Parts(domain, None, out, engine))
        drafter.begin(inputs, None)
        assert len(drafter.propose(np.array([first], np.int32), Plan(4, 4), engine.features).tokens) > 0


def test_a_model_is_replaced_only_if_that_is_asked_for(exported, trained):
    (exported / "README.md").write_text("ours")
    before = content(exported)
    with pytest.raises(BadConfig, match=r"--out .*model: holds a model already .*valid: a new folder, or --force"):
        run_export(trained, exported)
    assert content(exported) == before
    run_export(trained, exported, checkpoint="other", drafters=trained / "none", force=True)
    after = content(exported)
    assert after[Path("target.safetensors")] != before[Path("target.safetensors")]
    assert after[Path("README.md")] == b"ours"
    engine = GraphEngine(exported, OnnxRuntimeRuntime())
    check_manifest(exported)
    parts = Parts(TokenDomain(TINY.num_bins, 8, 4, *[np.zeros(8)] * 3), None, exported, engine)
    with pytest.raises(BadModel, match=r"block_head\.safetensors: distilled for the policy"):  # it stayed
        block_head.build(block_head.Options(), parts)
    (exported.parent / "file").write_text("")
    with pytest.raises(BadConfig, match="is a file; name a folder"):
        run_export(trained, exported.parent / "file")


def test_an_export_through_the_command_line_asks_for_force(exported, trained, capsys):
    given = ["export", "--checkpoint", str(trained / "policy.safetensors"), "--drafters", str(trained / "none")]
    for extra, code in (([], 2), (["--force"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main([*given, "--out", str(exported), *extra])
        assert stopped.value.code == code
    said = capsys.readouterr()
    assert "or --force to replace it" in said.err
    assert said.out.splitlines()[-1].endswith("manifest.json")
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["command"].startswith("vla-spec export --checkpoint=")


def test_drafters_of_another_policy_of_the_same_size_are_not_exported(trained, tmp_path):
    with pytest.raises(BadModel, match=r"block_head\.safetensors: distilled for the policy .*; valid: .*the one given"):
        run_export(trained, tmp_path / "model", checkpoint="other")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["write_bytes", "write_text", "fsync"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_changes_nothing(exported, trained, monkeypatch, where, number):
    before, calls = content(exported), []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    owner = os if where == "fsync" else Path
    original = getattr(owner, where)
    monkeypatch.setattr(owner, where, full)
    with pytest.raises(
        BadConfig, match=r"can't be written \(No space left on device\); nothing was changed; free some"
    ):
        run_export(trained, exported, checkpoint="other", drafters=trained / "none", force=True)
    monkeypatch.undo()
    assert content(exported) == before
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("number", [2, 5, 8])
def test_a_model_that_is_half_moved_is_no_model_until_it_is_exported_again(exported, trained, monkeypatch, number):
    calls, original = [], Path.replace

    def torn(self, target):
        if Path(target).parent == exported:
            calls.append(target)
            if len(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", torn)
    options = {"checkpoint": "other", "drafters": trained / "none", "force": True}
    with pytest.raises(BadConfig, match="it is replaced in part, export it again"):
        run_export(trained, exported, **options)
    monkeypatch.setattr(Path, "replace", original)
    if not (exported / "engine.json").exists():
        with pytest.raises(BadModel, match=r"engine\.json missing"):
            GraphEngine(exported, OnnxRuntimeRuntime())
    else:  # all but the manifest is there
        GraphEngine(exported, OnnxRuntimeRuntime())
        with pytest.raises(BadModel, match=r"not the file that manifest\.json lists"):
            check_manifest(exported)
    run_export(trained, exported, **options)
    check_manifest(exported)
    GraphEngine(exported, OnnxRuntimeRuntime())


def test_equal_checkpoints_give_equal_folders(exported, trained, tmp_path):
    run_export(trained, tmp_path / "again")
    ours, theirs = content(tmp_path / "again"), content(exported)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.name != "manifest.json":
            assert value == theirs[name], name
        else:
            assert without_time(value)["files"] == without_time(theirs[name])["files"]
