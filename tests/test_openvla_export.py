"""OpenVLA end to end: a checkpoint in the published layout, exported, against the published forward written plainly."""

# ruff: noqa: E402

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [openvla]")
for library in ("transformers", "tokenizers", "onnxruntime"):
    pytest.importorskip(library, reason="needs the extra [openvla]")

from contract.test_drafter_contract import PLANS, check
from openvla_reference import PublishedDrafter, PublishedOpenVLA

from vla_spec import cli, plugins
from vla_spec.adapters.openvla import Options as AdapterOptions
from vla_spec.adapters.openvla import load
from vla_spec.assemble import Assembler
from vla_spec.config import resolve
from vla_spec.engines._graph_engine import GraphEngine
from vla_spec.engines._model_files import ModelFiles
from vla_spec.engines._safetensors import WeightsFile
from vla_spec.engines.nets.openvla import checkpoint as checkpoints
from vla_spec.engines.nets.openvla import streaming
from vla_spec.engines.nets.openvla.checkpoint import Checkpoint, Piece
from vla_spec.engines.nets.openvla.config import OpenVLAConfig
from vla_spec.engines.nets.openvla.export import ExportOptions, export_checkpoint
from vla_spec.engines.nets.openvla.layout import checkpoint_shapes, folder_pieces
from vla_spec.engines.nets.openvla.miniature import MiniatureOptions, write_checkpoint, write_random, write_shards
from vla_spec.engines.nets.openvla.spec_vla import drafter_shapes, drafter_spec, export_drafter
from vla_spec.engines.nets.openvla.timm_models import load_timm, sizes
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime
from vla_spec.engines.pytorch import PyTorchRuntime
from vla_spec.errors import BadConfig, BadModel, MissingDependency
from vla_spec.interfaces import ChunkHistory
from vla_spec.plugins import Parts
from vla_spec.types import Observation, Plan

try:
    load_timm()
except MissingDependency as missing:
    pytest.skip(str(missing), allow_module_level=True)

KEY = "bridge_orig"
INSTRUCTION = "Stack the Cups"
OPTIONS = ExportOptions(unnorm_key=KEY, max_words=96)
SIZES = MiniatureOptions(kv_heads=2)


def silent(_):
    pass


def write_drafter(folder, out, seed=1, **shapes):
    """A drafter for the model folder ``out`` in Spec-VLA's published layout."""
    folder.mkdir(parents=True)
    width = ModelFiles.describe(out).decoder.hidden_width
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": width, "intermediate_size": 96,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None, "vocab_size": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    spec = drafter_spec(config, ModelFiles.describe(out).decoder, folder)
    shapes = {**drafter_shapes(spec), "embed_tokens.weight": (576, width), **shapes}
    write_random(folder / "model.safetensors", shapes, np.random.default_rng(seed))
    return folder


def overwrite(file, change):
    """Give tensors of a bfloat16 safetensors file other values in place; ``change(name, shape)`` -> values or None."""
    stored = WeightsFile.open(file)
    with file.open("r+b") as out:
        for name, tensor in stored.tensors.items():
            values = change(name, tensor.shape)
            if values is not None:
                out.seek(tensor.offset)
                out.write((np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "checkpoint"
    write_checkpoint(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    out = checkpoint.parent / "model"
    export_checkpoint(checkpoint, out, OPTIONS, silent)
    export_drafter(write_drafter(checkpoint.parent / "drafter", out), out, silent)
    return out


@pytest.fixture(scope="module")
def published(checkpoint):
    return PublishedOpenVLA(checkpoint)


@pytest.fixture(scope="module")
def observation():
    picture = np.random.default_rng(3).integers(0, 256, (1, 90, 120, 3)).astype(np.uint8)
    return Observation(picture, np.zeros(0, np.float32), INSTRUCTION, 0, 0)


@pytest.fixture(scope="module")
def engine(model):
    return GraphEngine(model, OnnxRuntimeRuntime())


def decode(model, observation, drafter, history=None, **controller):
    controller = {"name": "fixed", **controller} if controller else "fixed"
    engine = {"name": "onnxruntime", "max_step": 64}
    tree = {"model": str(model), "engine": engine, "drafter": drafter, "controller": controller}
    assembly = Assembler().assemble(resolve(tree), observation)
    decoded = assembly.policy.decoder.decode(assembly.adapter.encode(observation), 1 << 62, history)
    return decoded, assembly


def test_logits_and_hidden_states_are_the_published_networks(model, engine, published, observation):
    inputs = load(model).encode(observation)
    np.testing.assert_array_equal(inputs["words"], published.prompt_ids(INSTRUCTION).numpy())
    embeds = published.embeds(observation.images[0], INSTRUCTION)
    first = published.first_action_id()
    tokens = np.array([3, 250, 17, 90], np.int32)
    logits, hidden = (t.numpy() for t in published.forward(embeds, first + tokens))
    prefill = engine.prefill(inputs).logits.copy()
    np.testing.assert_allclose(engine.prompt_embeds, embeds[0].numpy(), rtol=0, atol=2e-5)
    p = engine.length
    step = engine.step(tokens, np.arange(-1, 3, dtype=np.int32)).logits.copy()
    engine.commit(np.arange(4, dtype=np.int32))
    spread = logits[:, first : first + 256].std()
    np.testing.assert_allclose(prefill[0], logits[p - 1, first : first + 256], rtol=0, atol=1e-4 * spread)
    np.testing.assert_allclose(step, logits[p:, first : first + 256], rtol=0, atol=1e-4 * spread)
    np.testing.assert_allclose(engine.features, hidden, rtol=0, atol=1e-4)


def test_the_pytorch_engine_runs_the_reference(model, engine, observation):
    reference = GraphEngine(model, PyTorchRuntime())
    inputs = load(model).encode(observation)
    tree = np.array([5, 6, 7, 8], np.int32), np.array([-1, 0, 0, 2], np.int32)
    for one, other in (
        (engine.prefill(inputs), reference.prefill(inputs)),
        (engine.step(*tree), reference.step(*tree)),
    ):
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4)


def test_picture_and_sentence_to_action_is_the_published_one(model, checkpoint, published, observation):
    decoded, assembly = decode(model, observation, "none")
    ids = published.generate(observation.images[0], INSTRUCTION, 7)
    np.testing.assert_array_equal(decoded.tokens + published.first_action_id(), ids)
    statistics = published.config["norm_stats"][KEY]["action"]
    action = assembly.adapter.decode(decoded.tokens)
    np.testing.assert_allclose(action, [published.action(ids, statistics)], rtol=0, atol=1e-7)
    assert action.shape == (1, 7)


@pytest.mark.parametrize(
    ("drafter", "plan"),
    [("ngram", {"gamma": 6}), ("jacobi", {"gamma": 6}), ("spec_vla_head", {"gamma": 50, "depth": 5, "top_k": 8}),
     ("spec_vla_head", {"gamma": 6})],
)  # fmt: skip
def test_exact_speculative_equals_autoregressive(model, observation, drafter, plan):
    wanted, _ = decode(model, observation, "none")
    found, assembly = decode(model, observation, drafter, **plan)
    assert assembly.rule.exact
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert len(found.tokens) == 7


def test_a_chunk_that_comes_again_is_one_round(model, observation):
    wanted, _ = decode(model, observation, "none")
    found, _ = decode(model, observation, "previous_chunk", ChunkHistory(wanted.tokens, 0), gamma=6)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert [r.num_accepted for r in found.rounds] == [0, 5]  # one token came with the prompt, one comes for free


def test_a_drafter_that_is_right_is_accepted_along_its_branch(tmp_path, observation):
    """A target whose layers add nothing says what its last token's embedding says, and so can a drafter."""
    write_checkpoint(tmp_path / "checkpoint", MiniatureOptions(kv_heads=2, sharpness=40.0))

    def idle(name, shape):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return np.zeros(shape)
        return np.ones(shape) if name.endswith("model.norm.weight") else None

    for file in (tmp_path / "checkpoint").glob("*.safetensors"):
        overwrite(file, idle)
    out = tmp_path / "model"
    export_checkpoint(tmp_path / "checkpoint", out, OPTIONS, silent)
    drafter = write_drafter(tmp_path / "drafter", out)

    def knowing(name, shape):
        if name == "fc.weight":  # the token's embedding, and nothing of the hidden state
            return np.eye(*shape)
        is_idle = name.endswith(("o_proj.weight", "down_proj.weight", "fc.bias"))
        return np.zeros(shape) if is_idle else None

    overwrite(drafter / "model.safetensors", knowing)
    export_drafter(drafter, out, silent)
    wanted, _ = decode(out, observation, "none")
    found, _ = decode(out, observation, "spec_vla_head", gamma=50, depth=6, top_k=8)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert [r.num_accepted for r in found.rounds] == [0, 5]
    assert found.rounds[1].num_drafted > 20  # so the path that was kept has gaps


def build_drafter(model, engine):
    adapter = load(model)
    plugin = plugins.load("drafter", "spec_vla_head")
    return plugin.build(plugin.options(), Parts(adapter.domain, adapter.tokenizer, model_dir=model, target=engine))


def test_trees_are_those_of_the_published_drafter(model, engine, published, observation):
    """Every node's probability by a plain forward over its whole path, and the best nodes of all chosen from these."""
    plain = PublishedDrafter(model.parent / "drafter", published)
    drafter = build_drafter(model, engine)
    inputs = load(model).encode(observation)
    embeds = published.embeds(observation.images[0], INSTRUCTION)
    first = published.first_action_id()
    drafter.begin(inputs, None)
    engine.prefill(inputs)
    prefix = np.array([7], np.int32)
    for step in (None, np.array([7, 100], np.int32)):
        if step is not None:  # the next round, whose rows are behind those of the prompt
            engine.step(step, np.array([-1, 0], np.int32))
            engine.commit(np.arange(2, dtype=np.int32))
            prefix = np.array([7, 100, 31], np.int32)
        draft = drafter.propose(prefix, Plan(12, 3, 4), engine.features)
        hidden = published.forward(embeds, first + prefix[:-1])[1]
        levels, leaves = [], [((), 0.0)]
        for _ in range(3):
            grown = []
            for path, score in leaves:
                row = plain.log_probs(embeds, hidden, first + np.array([*prefix, *path]))
                grown += [((*path, int(t)), score + row[t]) for t in np.argsort(-row, kind="stable")[:4]]
            levels += grown
            leaves = sorted(grown, key=lambda node: -node[1])[:4]
        wanted = {path for path, _ in sorted(levels, key=lambda node: -node[1])[:12]}
        paths = []
        for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert set(paths) == wanted


class Tiered:
    """ONNX Runtime that runs a few sizes only, as a compiled engine does."""

    def __init__(self, tiers):
        self._inner, self.tiers = OnnxRuntimeRuntime(), tiers

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_padding_to_tiers_changes_no_tree(model, engine, observation):
    inputs = load(model).encode(observation)
    capacity = engine.spec.capacity
    padded = GraphEngine(model, Tiered((8, 64, capacity)))
    for prefix in (np.array([7], np.int32), np.array([7, 100, 31], np.int32)):
        drafts = []
        for one in (engine, padded):
            drafter = build_drafter(model, one)
            one.prefill(inputs)
            drafter.begin(inputs, None)
            if len(prefix) > 1:
                drafter.propose(prefix[:1], Plan(20, 4, 4), one.features)
                one.step(prefix[:2], np.array([-1, 0], np.int32))
                one.commit(np.arange(2, dtype=np.int32))
            drafts.append(drafter.propose(prefix, Plan(40, 5, 8), one.features))
        for found, wanted in zip(drafts[1][:2], drafts[0][:2], strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_any_prefix_and_plan_give_a_valid_tree(model, engine, observation, plan):
    """What every drafter promises (tests/contract), with jumps of the prefix forth and back."""
    drafter, adapter = build_drafter(model, engine), load(model)
    inputs = adapter.encode(observation)
    drafter.begin(inputs, None)
    base = np.array([5, 200, 31, 8, 77, 90], np.int32)
    for prefix in (base[:3], base, base[:2], np.array([5, 9], np.int32), base[:1]):
        engine.prefill(inputs)
        for token in prefix[:-1]:
            engine.step(np.array([token], np.int32), np.array([-1], np.int32))
            engine.commit(np.zeros(1, np.int32))
        check(drafter.propose(prefix, plan, engine.features), plan, adapter.domain)
    fresh = build_drafter(model, engine)
    fresh.begin(inputs, None)
    for found, wanted in zip(*(d.propose(base[:1], plan, engine.features)[:2] for d in (drafter, fresh)), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_drafter_from_pytorchs_archive_is_the_same(model, tmp_path):
    from safetensors.torch import load_file

    source = model.parent / "drafter"
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    before = {p: (model / p).read_bytes() for p in ("spec_vla_head.safetensors", "spec_vla_head.onnx")}
    export_drafter(folder, model, silent)
    assert before == {p: (model / p).read_bytes() for p in before}


class Code:
    """What a hostile archive would run."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_an_archive_with_code_in_it_is_refused_and_not_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "config.json").write_bytes((model.parent / "drafter" / "config.json").read_bytes())
    torch.save({"fc.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(BadModel, match="not an archive of tensors"):
        export_drafter(folder, model, silent)
    assert not (tmp_path / "touched").exists()


def test_drafters_of_something_else_are_refused(model, engine, tmp_path):
    out = model
    folder = write_drafter(tmp_path / "empty", out)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModel, match=r"model\.safetensors missing, and pytorch_model\.bin"):
        export_drafter(folder, out, silent)
    folder = write_drafter(tmp_path / "extra", out, **{"layers.1.mlp.up_proj.weight": (96, 64)})
    with pytest.raises(BadModel, match=r"unexpected layers\.1\.mlp\.up_proj\.weight"):
        export_drafter(folder, out, silent)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128, "num_hidden_layers": 2}))
    with pytest.raises(BadModel, match=r"hidden_size 128 \(valid: 64\), num_hidden_layers 2 \(valid: 1\)"):
        export_drafter(folder, out, silent)


def test_a_fine_tuned_checkpoints_statistics_take_the_place_of_the_configurations(tmp_path):
    write_checkpoint(tmp_path, MiniatureOptions(is_fine_tuned=True))
    config = OpenVLAConfig.from_folder(tmp_path)
    assert config.is_fine_tuned
    assert list(config.statistics) == ["libero_goal_no_noops"]
    (tmp_path / "dataset_statistics.json").unlink()
    config = OpenVLAConfig.from_folder(tmp_path)
    assert not config.is_fine_tuned
    assert len(config.statistics) == 2


def test_the_first_versions_checkpoints_have_one_transformer_and_another_prompt(tmp_path):
    """openvla-v01-7b: SigLIP alone, a projector of two layers, pictures padded to a square, a chat model's prompt."""
    write_checkpoint(tmp_path, SIZES)

    def one(config):
        for name in ("timm_model_ids", "image_sizes", "timm_override_act_layers", "timm_overrides"):
            config[name] = config[name][1:]
        config |= {"use_fused_vision_backbone": False, "image_resize_strategy": "letterbox"}
        config |= {"llm_backbone_id": "vicuna-v15-7b", "vision_backbone_id": "siglip-vit-so400m"}

    def one_picture(config):
        for name in ("input_sizes", "interpolations", "means", "stds"):
            config[name] = config[name][1:]
        config["image_resize_strategy"] = "letterbox"

    edit(tmp_path, "config.json", one)
    edit(tmp_path, "preprocessor_config.json", one_picture)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    config = OpenVLAConfig.from_folder(tmp_path)
    shapes = checkpoint_shapes(config, tuple(sizes(part) for part in config.vision))
    assert {name for name in shapes if name.startswith("projector")} == {
        f"projector.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    write_shards(tmp_path, shapes, SIZES, seed=0)
    out = tmp_path / "out"
    export_checkpoint(tmp_path, out, ExportOptions(unnorm_key=KEY, max_words=240), silent)
    engine = GraphEngine(out, OnnxRuntimeRuntime())  # which compares with the reference
    adapter = load(out)
    picture = np.full((1, 30, 60, 3), 200, np.uint8)
    inputs = adapter.encode(Observation(picture, np.zeros(0, np.float32), "go", 0, 0))
    assert inputs["images"].shape == (1, 56, 56, 3)
    assert (inputs["images"][0, 0] == 127).all()
    assert (inputs["images"][0, 28] == 200).all()
    engine.prefill(inputs)
    words = adapter._words_of.decode(inputs["words"][0].tolist())
    assert words.strip().startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert "USER: What action should the robot take to go? ASSISTANT:" in words


def test_transformers_that_resize_in_their_own_ways_get_a_picture_each(tmp_path):
    write_checkpoint(tmp_path, SIZES)
    edit(tmp_path, "preprocessor_config.json", lambda c: c.update(interpolations=["bicubic", "bilinear"]))
    export_checkpoint(tmp_path, tmp_path / "out", OPTIONS, silent)
    engine = GraphEngine(tmp_path / "out", OnnxRuntimeRuntime())
    adapter = load(tmp_path / "out")
    inputs = adapter.encode(adapter.example())
    assert inputs["images"].shape == (2, 56, 56, 3)
    before = engine.prefill(inputs).logits.copy()
    for i in (0, 1):
        other = {**inputs, "images": inputs["images"].copy()}
        other["images"][i] = 0
        assert np.abs(engine.prefill(other).logits - before).max() > 1e-3


def test_full_size_has_the_published_tensors():
    """Names and number of parameters of openvla-7b, from the configuration alone."""
    from vla_spec.engines.nets.openvla.config import DINO, SIGLIP, VisionPart

    parts = [VisionPart(name, 224, (0.5,) * 3, (0.5,) * 3, "bicubic") for name in (DINO, SIGLIP)]
    vision = tuple(sizes(part) for part in parts)
    config = OpenVLAConfig(
        tuple(parts), True, "resize-naive", 32, 32, 32, 128, 4096, 11008, 1e-6, 1e4, 32064, 64, 256, 1, False, {}, False
    )
    shapes = checkpoint_shapes(config, vision)
    assert sum(int(np.prod(s)) for s in shapes.values()) == 7_541_237_184
    assert shapes["vision_backbone.featurizer.blocks.23.ls2.scale_factor"] == (1024,)
    assert shapes["vision_backbone.featurizer.pos_embed"] == (1, 256, 1024)
    assert shapes["vision_backbone.fused_featurizer.attn_pool.latent"] == (1, 1, 1152)
    assert shapes["projector.fc1.weight"] == (8704, 2176)
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)
    assert config.first_action_token == 31744


def test_copying_takes_the_memory_of_a_block_whatever_the_size(tmp_path, monkeypatch):
    options = MiniatureOptions(layers=6, width=256, mlp_width=512, vocab_size=2048)
    config = write_checkpoint(tmp_path, options)
    vision = tuple(sizes(part) for part in config.vision)
    monkeypatch.setattr(checkpoints, "BLOCK", 1 << 16)
    tracemalloc.start()
    try:
        shards = Checkpoint.open(tmp_path)
        pieces = folder_pieces(config, vision)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        streaming.write_weights(tmp_path / "out", shards, pieces, {})
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    largest = max(t.length for t in WeightsFile.open(tmp_path / "out").tensors.values())
    assert (tmp_path / "out").stat().st_size > 8_000_000
    assert largest > 1_000_000
    assert peak < 300_000  # a block and the header


def test_a_disk_that_is_full_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    config = OpenVLAConfig.from_folder(checkpoint)
    pieces = folder_pieces(config, tuple(sizes(part) for part in config.vision))
    original, count = Checkpoint.blocks, []

    def failing(self, piece):
        count.append(piece)
        if len(count) == 20:
            raise OSError(28, "No space left on device")
        return original(self, piece)

    monkeypatch.setattr(Checkpoint, "blocks", failing)
    with pytest.raises(OSError, match="No space left"):
        streaming.write_weights(tmp_path / "target.safetensors", Checkpoint.open(checkpoint), pieces, {})
    assert not list(tmp_path.iterdir())


def test_pieces_of_one_tensor_have_one_type(checkpoint, tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 3), np.float16), "b": np.zeros((2, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(BadModel, match=r"a, b are F16 and F32; valid: one type"):
        streaming.write_weights(
            tmp_path / "out", Checkpoint.open(tmp_path), {"c": [Piece("a"), Piece("b")]}, {}
        )  # fmt: skip


@pytest.fixture
def damaged(tmp_path):
    write_checkpoint(tmp_path, SIZES)
    return tmp_path


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def forget(folder, name):
    """Take a tensor out of the index."""
    places = {k: v for k, v in index_of(folder).items() if k != name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def rename(folder, old, new):
    """Give a tensor another name of equal length, in the index and in its file."""
    file = folder / index_of(folder)[old]
    file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))
    places = {(new if k == old else k): v for k, v in index_of(folder).items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_tables_that_old_libraries_stored_are_passed_over(damaged):
    file = damaged / "model-00003-of-00003.safetensors"
    from safetensors.torch import load_file, save_file

    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(file), name: torch.ones(8)}, file)
    places = {**index_of(damaged), name: file.name}
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = OpenVLAConfig.from_folder(damaged)
    shards = Checkpoint.open(damaged)
    shards.check(checkpoint_shapes(config, tuple(sizes(part) for part in config.vision)))


QUERY, OTHER = (
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.layers.0.self_attn.x_proj.weight",
)
DAMAGES = {
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors.index.json missing"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "no shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.* missing"),
    "outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "files of the same folder",
    ),
    "truncated": (
        lambda f: (f / "model-00001-of-00003.safetensors").write_bytes(
            (f / "model-00001-of-00003.safetensors").read_bytes()[:-2]
        ),
        "model-00001-of-00003.safetensors: truncated",
    ),
    "missing": (lambda f: forget(f, QUERY), rf"missing {QUERY}$"),
    "renamed": (lambda f: rename(f, QUERY, OTHER), rf"missing {QUERY}; unexpected {OTHER}$"),
    "shape": (
        lambda f: edit(f, "config.json", lambda c: c["text_config"].update(intermediate_size=132)),
        r"wrong shape .*mlp\.gate_proj\.weight \[128, 64\] \(valid: \[132, 64\]\)",
    ),
    "family": (lambda f: edit(f, "config.json", lambda c: c.update(model_type="llava")), "valid: 'openvla'"),
    "backbone": (lambda f: edit(f, "config.json", lambda c: c.update(llm_backbone_id="phi-2-3b")), "llama2-"),
    "vision": (lambda f: edit(f, "config.json", lambda c: c.update(timm_model_ids=["a", "b"])), "valid: one or two of"),
    "strategy": (
        lambda f: edit(f, "config.json", lambda c: c.update(image_resize_strategy="squash")), "says 'squash'",
    ),
    "means": (lambda f: edit(f, "preprocessor_config.json", lambda c: c.pop("means")), "lack picture 0"),
    "statistics": (lambda f: edit(f, "config.json", lambda c: c.update(norm_stats={"a": {}})), "'a' has no action q01"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "vocabulary": (
        lambda f: edit(f, "config.json", lambda c: c["text_config"].update(vocab_size=500)), "valid: at most 436 words"
    ),
}  # fmt: skip


def edit(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_named_and_nothing_is_written(damaged, damage):
    break_it, words = DAMAGES[damage]
    break_it(damaged)
    with pytest.raises(BadModel, match=words):
        export_checkpoint(damaged, damaged / "out", OPTIONS, silent)
    assert not (damaged / "out").exists()


def test_the_command_writes_a_folder_that_runs(checkpoint, model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", "openvla", "--checkpoint", str(checkpoint), "--out", str(out), "--max-words", "96"]
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--unnorm-key", KEY, "--drafter", str(model.parent / "drafter")])
    assert not left.value.code, capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in model.iterdir()}
    for name in names - {"golden.npz"}:
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--unnorm-key", "bridge"])
    assert left.value.code == 2
    assert "did you mean 'bridge_orig'" in capsys.readouterr().err


def test_a_folder_for_several_data_sets_wants_to_know_which(checkpoint, tmp_path):
    export_checkpoint(checkpoint, tmp_path, ExportOptions(max_words=96), silent)
    with pytest.raises(BadConfig, match="set unnorm_key to one of bridge_orig, fractal20220817_data"):
        load(tmp_path)
    assert load(tmp_path, AdapterOptions(unnorm_key="fractal20220817_data")).domain.num_tokens == 7


def test_weights_of_another_model_are_noticed(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "target.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "target.safetensors").write_bytes(data)
    with pytest.raises(BadModel, match="corrupt or of another model"):
        GraphEngine(tmp_path, OnnxRuntimeRuntime())


@pytest.mark.slow
def test_the_drafter_builds_with_tensorrt(model, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [tensorrt-rtx]")
    from vla_spec.engines._trt.builder import BuilderOptions
    from vla_spec.engines.build import BuildOptions, build_engine
    from vla_spec.progress import Silent

    tiers = (8, 64, ModelFiles.describe(model).decoder.capacity)
    options = BuildOptions(precision="fp16", tiers=tiers, builder=BuilderOptions((89,)))
    summary = build_engine(model, options, Silent(), tmp_path).graphs["spec_vla_head"].summary
    assert (summary["kv_updates"], summary["attentions"]) == (2, 1)
    assert summary["precisions"]["MATRIX_MULTIPLY"] == {"fp16": 7}
