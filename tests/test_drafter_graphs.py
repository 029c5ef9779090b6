"""Networks of drafters on the one graph form: they draft what the trained modules say, padded or not, cached or not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the extra [train]")
onnx = pytest.importorskip("onnx", reason="needs the extra [train]")
pytest.importorskip("onnxruntime", reason="needs the extra [run]")

from vla_spec.adapters import vla  # noqa: E402
from vla_spec.drafters import block_head, feature_head, small_model  # noqa: E402
from vla_spec.drafters._head_graph import check_target, open_head, thinned  # noqa: E402
from vla_spec.engines import export  # noqa: E402
from vla_spec.engines._decoder_spec import DecoderSpec  # noqa: E402
from vla_spec.engines._model_files import ModelFiles, hash_weights  # noqa: E402
from vla_spec.engines._safetensors import WeightsFile  # noqa: E402
from vla_spec.engines.graphs.block_head import block_head_model  # noqa: E402
from vla_spec.engines.graphs.feature_head import feature_head_model  # noqa: E402
from vla_spec.engines.nets import head_config  # noqa: E402
from vla_spec.engines.nets.block_head import BlockHead  # noqa: E402
from vla_spec.engines.nets.feature_head import FeatureHead  # noqa: E402
from vla_spec.engines.nets.graphs import load_head  # noqa: E402
from vla_spec.engines.nets.head_config import HeadConfig  # noqa: E402
from vla_spec.engines.nets.weights import save_half  # noqa: E402
from vla_spec.engines.onnxruntime import OnnxRuntimeRuntime  # noqa: E402
from vla_spec.engines.pytorch import PyTorchRuntime  # noqa: E402
from vla_spec.errors import BadModel  # noqa: E402
from vla_spec.interfaces import ChunkHistory  # noqa: E402
from vla_spec.plugins import Parts  # noqa: E402
from vla_spec.types import Plan, TokenDomain  # noqa: E402

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
P, T, V = 5, 24, 20
SIZES = HeadConfig(
    width=24, feature_width=36, num_heads=3, mlp_width=32, prompt_length=P, num_tokens=T, num_bins=V
)  # fmt: skip
DOMAIN = TokenDomain(V, T, 4, np.zeros(T, np.int32), np.zeros(T, bool), np.ones(T, np.float32))
WRITERS = {"block_head": block_head_model, "feature_head": feature_head_model}
RUNTIMES = {
    "as it is": OnnxRuntimeRuntime,
    "torch": PyTorchRuntime,
    "few sizes": lambda: Tiered((1, 2, 4, 8, 16, 32, 64)),
    "three sizes": lambda: Tiered((3, 11, 40)),
}


class Tiered:
    """ONNX Runtime as a library that was built for some numbers of rows only; counts what is tied and moved."""

    name, precision, provider, is_batch_invariant = "tiered", "fp32", "cpu", True

    def __init__(self, tiers=None):
        self.tiers, self._inner = tiers, OnnxRuntimeRuntime()
        self.sizes, self.num_moves = [], 0
        self.empty = self._inner.empty

    def open(self, file):
        graph, outer = self._inner.open(file), self

        class Graph:
            inputs, outputs = graph.inputs, graph.outputs

            def tie(self, arrays, state=None, state_names=()):
                rows, queries = arrays["features"].shape[0], arrays["mask"].shape[2]
                most = {SIZES.block_capacity, SIZES.feature_capacity, T}
                assert outer.tiers is None or {rows, queries} <= {*outer.tiers, *most}
                outer.sizes.append((rows, queries))
                return graph.tie(arrays, state, state_names)

        return Graph()

    def state(self, shape):
        state = self._inner.state(shape)
        move = state.move

        def counted(start, rows):
            self.num_moves += 1
            move(start, rows)

        state.move = counted
        return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads with random weights that are sure of something now and then, in the folder of a policy without any."""
    out = tmp_path_factory.mktemp("heads")
    (out / "target.safetensors").write_bytes(b"not read, only hashed")
    (out / "policy.json").write_text("{}")
    spec = DecoderSpec(3, 3, 3, 8, 12, 16, V, P + T, taps=(1, 2))
    ModelFiles(out, hash_weights(out), spec, P, None, "token.weight", None).write()
    torch.manual_seed(3)
    for name, head in (("block_head", BlockHead(SIZES)), ("feature_head", FeatureHead(SIZES))):
        with torch.no_grad():
            head.head.weight.mul_(6)
        export.export_head(name, head, out)
    return out


def make(name, folder, runtime, **options):
    kind = {"block_head": block_head.BlockHeadDrafter, "feature_head": feature_head.FeatureHeadDrafter}[name]
    chosen = (block_head if name == "block_head" else feature_head).Options(**options)
    return kind(folder / f"{name}.onnx", SIZES, runtime, T, chosen)


# --- what a straightforward computation drafts -----------------------------------------------------------------------


@torch.inference_mode()
def plain_block(head, prefix, plan, features, history, floor):
    """No cache: all rows at once through the trained module, as its training runs it."""
    m, total = len(prefix), P + len(prefix) - 1
    n = min(plan.depth, T - m)
    keys, values = head.context(torch.from_numpy(features[:total]), torch.arange(total))
    planned = np.full(n, V)
    if history is not None:
        rest = history.tokens[history.consumed :][m : m + n]
        planned[: len(rest)] = rest
    logits = head.draft(
        keys, values, torch.zeros(1, 1, total), torch.tensor([int(prefix[-1])]), torch.arange(m, m + n),
        torch.from_numpy(planned),
    )  # fmt: skip
    probs, tokens = logits.softmax(-1).max(-1)
    length = int((probs.cumprod(0) >= floor).sum())
    return tokens[: max(1, min(length, plan.gamma))].tolist()


@torch.inference_mode()
def plain_tree(head, prefix, plan, features, floor):
    """No cache, no pruning: each path by itself, one row after the other; then the best nodes."""
    context, total = P - 1, P - 1 + len(prefix)
    fused = head.fused(torch.from_numpy(features[:total]))
    ids = torch.tensor([V] * context + prefix.tolist())

    def children(path):
        """Log-probabilities of what follows the committed tokens and a path: its rows are fed by the head itself."""
        rows, tokens, out = fused, ids, None
        for i in range(len(path) + 1):
            x, q, k, v = head.project(rows, tokens, torch.arange(len(rows)).clamp(max=SIZES.feature_capacity - 1))
            gap = torch.where(torch.tril(torch.ones(len(rows), len(rows))) > 0, 0.0, -torch.inf)
            out = head.attend(x, q, k, v, gap)[-1]
            if i < len(path):
                rows, tokens = torch.cat((rows, out[None])), torch.cat((tokens, torch.tensor([path[i]])))
        logp, best = head.scores(out).log_softmax(-1).topk(min(plan.top_k, 8))
        return [(float(p), int(t)) for p, t in zip(logp, best, strict=True)]

    nodes = [(p, (t,)) for p, t in children(())]
    level = nodes
    for _ in range(1, min(plan.depth, T - len(prefix))):
        leaves = sorted(level, key=lambda node: -node[0])[: min(plan.top_k, 8)]
        level = [(score + p, (*path, t)) for score, path in leaves for p, t in children(path)]
        nodes = nodes + level
    best = sorted(nodes, key=lambda node: -node[0])[: plan.gamma]
    return {path for score, path in best if score >= np.log(floor) or path == best[0][1]}


def paths(draft):
    """The nodes of a draft, each as the tokens from the root to it."""
    found = []
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def walk(rng, steps):
    """Prefixes as a decoder brings them, and steps back to a changed prefix; with the features that belong to them."""
    tokens = rng.integers(0, V, T).astype(np.int32)
    features = rng.normal(size=(P + T, SIZES.feature_width)).astype(np.float32)
    m = int(rng.integers(1, 4))
    for _ in range(steps):
        yield tokens[:m], features[: P + m - 1]
        if rng.random() < 0.3:  # from here on everything is another
            keep = int(rng.integers(0, m))
            tokens = np.concatenate((tokens[:keep], (tokens[keep:] + 1) % V)).astype(np.int32)
            features = features.copy()
            features[P + keep :] = rng.normal(size=(T - keep, SIZES.feature_width))
            m = int(rng.integers(keep + 1, T))
        else:
            m = int(rng.integers(1, m + 1)) if m > T - 6 else m + int(rng.integers(1, 6))


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000))
def test_the_block_head_drafts_what_the_trained_module_says(folder, runtime, seed):
    rng, head = np.random.default_rng(seed), load_head(folder / "block_head.safetensors")
    drafter = make("block_head", folder, RUNTIMES[runtime](), min_confidence=0.02)
    for chunk in range(2):
        history = ChunkHistory(rng.integers(0, V, T).astype(np.int32), 4) if chunk else None
        drafter.begin({}, history)
        for prefix, features in walk(rng, 8):
            plan = Plan(*rng.integers(1, T, 2).tolist())
            draft = drafter.propose(prefix, plan, features)
            assert draft.tokens.tolist() == plain_block(head, prefix, plan, features, history, 0.02)
            assert draft.parents.tolist() == list(range(-1, len(draft.tokens) - 1))


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_the_feature_head_drafts_what_the_trained_module_says(folder, runtime, seed):
    rng, head = np.random.default_rng(seed), load_head(folder / "feature_head.safetensors")
    drafter = make("feature_head", folder, RUNTIMES[runtime](), min_confidence=0.01)
    drafter.begin({}, None)
    for prefix, features in walk(rng, 6):
        plan = Plan(int(rng.integers(1, 32)), int(rng.integers(1, 6)), int(rng.integers(1, 5)))
        draft = drafter.propose(prefix, plan, features)
        found = paths(draft)
        assert set(found) == plain_tree(head, prefix, plan, features, 0.01)
        assert len(found) == len(set(found)) <= plan.gamma


def test_a_tree_of_more_rows_than_there_is_room_for_gives_up_those_that_lead_nowhere(folder, tmp_path, monkeypatch):
    """Room for 11 rows; of the leaves that were grown only those on the way to the best 6 are kept."""
    monkeypatch.setattr(head_config, "TREE_ROWS", 1)
    for file in ("target.safetensors", "policy.json", "engine.json", "feature_head.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    export.write_head_graph("feature_head", tmp_path)
    head, plan = load_head(folder / "feature_head.safetensors"), Plan(6, 8, 4)
    plain, padded = Tiered(), Tiered((4, 16))
    drafters = [make("feature_head", tmp_path, runtime, min_confidence=0.0) for runtime in (plain, padded)]
    for seed in range(6):
        rng = np.random.default_rng(seed)
        prefix = rng.integers(0, V, 14).astype(np.int32)
        features = rng.normal(size=(P + 13, SIZES.feature_width)).astype(np.float32)
        expected = plain_tree(head, prefix, plan, features, 1e-9)
        for drafter in drafters:
            drafter.begin({}, None)
            assert set(paths(drafter.propose(prefix, plan, features))) == expected
    assert padded.num_moves > 0


@pytest.mark.parametrize(
    ("tiers", "sizes"),
    [
        ((1, 2, 4, 8, 16, 32), (1, 4, 16, 24)), ((3, 11, 40), (3, 24)), ((40,), (24,)), ((24,), (24,)),
        (range(1, 50), (1, 4, 16, 24)),
    ],
)  # fmt: skip
def test_few_of_the_runtimes_sizes_are_used(tiers, sizes):
    assert thinned(tuple(tiers), 24) == sizes


@pytest.mark.parametrize(("name", "count"), [("block_head", 9), ("feature_head", 3)])
def test_with_tiers_every_size_is_tied_before_the_first_draft_and_none_after(folder, name, count):
    rng, runtime = np.random.default_rng(0), Tiered((4, 16))
    drafter = make(name, folder, runtime)
    assert len(runtime.sizes) == len(set(runtime.sizes)) == count
    for _ in range(3):
        drafter.begin({}, None)
        for prefix, features in walk(rng, 12):
            drafter.propose(prefix, Plan(12, 6, 2), features)
    assert len(runtime.sizes) == count


@pytest.mark.parametrize("name", WRITERS)
def test_bad_features_are_no_draft_and_leave_no_trace(folder, name):
    rng = np.random.default_rng(2)
    features = rng.normal(size=(P + T, SIZES.feature_width)).astype(np.float32)
    prefix, plan = rng.integers(0, V, 6).astype(np.int32), Plan(8, 4, 2)
    used, fresh = make(name, folder, OnnxRuntimeRuntime()), make(name, folder, OnnxRuntimeRuntime())
    used.begin({}, None)
    spoilt = features.copy()
    spoilt[3] = np.nan
    with np.errstate(invalid="ignore"):
        assert len(used.propose(prefix, plan, spoilt).tokens) == 0
    fresh.begin({}, None)
    for m in (2, 6):  # without `begin`: it reads all rows again
        again, wanted = (d.propose(prefix[:m], plan, features) for d in (used, fresh))
        assert again.tokens.tolist() == wanted.tokens.tolist()
        assert again.parents.tolist() == wanted.parents.tolist()
        assert len(wanted.tokens) > 0


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_drafted_where_nothing_may_be(folder, name):
    drafter = make(name, folder, OnnxRuntimeRuntime())
    drafter.begin({}, None)
    prefix, features = np.zeros(T, np.int32), np.zeros((P + T, SIZES.feature_width), np.float32)
    for m, plan, given_features in ((T, Plan(4, 4), features), (3, Plan(0, 4), features), (3, Plan(4, 4), None)):
        assert len(drafter.propose(prefix[:m], plan, given_features).tokens) == 0


# --- the graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", WRITERS)
def test_each_precision_is_a_valid_graph_with_the_same_outside(folder, name, precision, tmp_path):
    weights = WeightsFile.open(folder / f"{name}.safetensors")
    (tmp_path / weights.path.name).write_bytes(weights.path.read_bytes())
    file = tmp_path / f"{name}.onnx"
    file.write_bytes(WRITERS[name](SIZES, weights, precision).SerializeToString())
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    caches = {n: kind for n, kind in kinds.items() if n.startswith(("past_", "present_"))}
    wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    assert set(caches.values()) == {wanted[precision]}
    assert len(caches) == 4
    outside = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    assert {kind for n, kind in kinds.items() if n not in caches} == outside
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("TensorScatter") == 2
    assert operators.count("Attention") == 1
    assert model.opset_import[0].version == 24


@pytest.mark.parametrize("name", WRITERS)
def test_half_precision_computes_the_same_to_its_rounding(folder, name, tmp_path):
    """By ONNX's own reference: ONNX Runtime has no half-precision Attention on CPUs."""
    from onnx.reference import ReferenceEvaluator

    weights = WeightsFile.open(folder / f"{name}.safetensors")
    (tmp_path / weights.path.name).write_bytes(weights.path.read_bytes())
    rng, n, r = np.random.default_rng(1), 4, 6
    rows = SIZES.block_rows if name == "block_head" else SIZES.feature_rows
    mask = np.zeros((1, 1, n, rows), bool)
    mask[..., :r] = True
    feeds = {"write_index": np.array([0]), "mask": mask, "positions": np.arange(n)}
    features = rng.normal(size=(r, SIZES.feature_width)).astype(np.float32)
    if name == "block_head":
        ids = rng.integers(0, V, n)
        feeds |= {"features": features, "row": np.arange(r), "last": np.array([3]), "history": ids}
    else:
        hidden = rng.normal(size=(n, SIZES.width)).astype(np.float32)
        own = np.array([[False], [True], [False], [True]])
        feeds |= {"features": features[:n], "hidden": hidden, "is_own": own, "ids": rng.integers(0, V + 1, n)}
    results = []
    for precision, kind in (("fp32", np.float32), ("fp16", np.float16)):
        file = tmp_path / f"{precision}.onnx"
        file.write_bytes(WRITERS[name](SIZES, weights, precision).SerializeToString())
        cache = {f"past_{k}": np.zeros((1, SIZES.num_heads, rows, SIZES.head_width), kind) for k in ("key", "value")}
        results.append(ReferenceEvaluator(str(file)).run(["probs" if "block" in name else "logp"], feeds | cache)[0])
    assert results[1].dtype == np.float32
    np.testing.assert_allclose(*results, atol=3e-2)


# --- what does not belong together -----------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def parts(folder, domain=DOMAIN):
    return Parts(domain, None, model_dir=folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_head_of_this_policy_is_built_and_one_of_another_is_refused(copy, name):
    module = block_head if name == "block_head" else feature_head
    drafter = module.build(module.Options(), parts(copy))
    drafter.begin({}, None)
    features = np.random.default_rng(0).normal(size=(P + 2, SIZES.feature_width)).astype(np.float32)
    assert len(drafter.propose(np.array([1, 2, 3], np.int32), Plan(4, 4), features).tokens) > 0
    (copy / "target.safetensors").write_bytes(b"another policy of the same size")
    files = ModelFiles.describe(copy)
    dataclasses.replace(files, weights_sha256=hash_weights(copy)).write()
    with pytest.raises(BadModel, match=rf"{name}\.safetensors: distilled for the policy [0-9a-f]{{12}}…; valid: "):
        module.build(module.Options(), parts(copy))


def test_a_head_that_does_not_say_its_policy_is_refused(copy):
    head = load_head(copy / "block_head.safetensors")
    save_half(copy / "block_head.safetensors", head.state_dict(), {"config": SIZES.to_json()})
    with pytest.raises(BadModel, match="does not say for which policy it was distilled"):
        open_head("block_head", parts(copy))
    check_target(copy / "x", {"target_sha256": "0" * 64}, "0" * 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "its header has no sizes"),
        ('{"width": 3}', "its header has no sizes"),
        (json.dumps(dataclasses.asdict(SIZES) | {"width": 25}), "impossible sizes of a head .width by num_heads"),
        (json.dumps(dataclasses.asdict(SIZES) | {"mlp_width": 0}), "impossible sizes of a head .mlp_width"),
        (json.dumps(dataclasses.asdict(SIZES) | {"mlp_width": "a"}), "impossible sizes of a head .mlp_width"),
    ],
)
def test_sizes_that_can_not_be_are_named(copy, config, message):
    save_half(copy / "block_head.safetensors", {"x": torch.zeros(1)}, {"config": config})
    with pytest.raises(BadModel, match=rf"block_head\.safetensors: {message}"):
        open_head("block_head", parts(copy))


def test_missing_files_and_other_tokens_are_named(copy):
    with pytest.raises(BadModel, match=rf"for {T} tokens of {V}; valid: {T} of {V + 1}"):
        open_head("block_head", parts(copy, dataclasses.replace(DOMAIN, vocab_size=V + 1)))
    (copy / "feature_head.safetensors").unlink()
    with pytest.raises(BadModel, match=r"feature_head\.safetensors: missing; `vla-spec export` writes it after"):
        feature_head.build(feature_head.Options(), parts(copy))
    (copy / "block_head.onnx").unlink()
    with pytest.raises(BadModel, match=r"block_head\.onnx: missing"):
        block_head.build(block_head.Options(), parts(copy))
    with pytest.raises(BadModel, match="needs a model folder"):
        block_head.build(block_head.Options(), parts(None))


def test_a_graph_of_another_form_is_refused(copy):
    (copy / "block_head.onnx").write_bytes((copy / "feature_head.onnx").read_bytes())
    with pytest.raises(
        BadModel, match=r"block_head\.onnx: its inputs are features, hidden, .*exported in another form"
    ):
        block_head.build(block_head.Options(), parts(copy))


def test_weights_of_other_sizes_than_the_header_says_are_named(copy):
    wrong = dataclasses.replace(SIZES, mlp_width=40)
    weights = load_head(copy / "block_head.safetensors").state_dict()
    save_half(copy / "block_head.safetensors", weights, {"config": wrong.to_json()})
    with pytest.raises(BadModel, match=r"tensor up.weight is F16 \[32, 24\]; valid: .*\[40, 24\]"):
        export.write_head_graph("block_head", copy)
    with pytest.raises(BadModel, match="don't have the names and sizes of a block_head"):
        load_head(copy / "block_head.safetensors")


def test_a_small_model_of_other_inputs_is_refused(tmp_path):
    values = {"image_size": 96, "vocabulary": ["a"], "tokenizer": {"name": "uniform_bins"}, "groups": [0]}
    small = tmp_path / "small"
    small.mkdir()
    (tmp_path / "policy.json").write_text(json.dumps(values))
    (small / "policy.json").write_text(json.dumps(values | {"groups": [1]}))
    small_model.check_policy(small, tmp_path)
    (small / "policy.json").write_text(json.dumps(values | {"image_size": 64, "vocabulary": ["b"]}))
    with pytest.raises(BadModel, match=r"policy\.json: image_size, vocabulary differ from the target's"):
        small_model.check_policy(small, tmp_path)
    (small / "policy.json").write_text("{")
    with pytest.raises(BadModel, match="missing or no JSON"):
        small_model.check_policy(small, tmp_path)


# --- on TensorRT's side of the runtime -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_engine(tmp_path_factory):
    """The shipped policy in half precision, on doubles of CUDA and TensorRT."""
    from fake_tensorrt import Place

    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("trt"), patch, MODEL).load()


@pytest.mark.parametrize("name", WRITERS)
def test_heads_run_on_the_targets_device_in_its_precision_and_in_a_stream_of_their_own(gpu_engine, name):
    """They draft what ONNX Runtime drafts in single precision, but for a close call here and there."""
    module = block_head if name == "block_head" else feature_head
    adapter = vla.load(MODEL)
    shipped = Parts(adapter.domain, adapter.tokenizer, MODEL, gpu_engine)
    ours, plain = module.build(module.Options(), shipped), module.build(module.Options(), shipped_on_cpu(shipped))
    assert ours._network._runtime.precision == "fp16"
    assert ours._network._runtime.lane is not gpu_engine.runtime.lane
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        inputs = {key: golden[key] for key in ("images", "words", "state")}
    token = int(gpu_engine.prefill(inputs).logits[0].argmax())
    tokens, same, count = [token], 0, 0
    for drafter in (ours, plain):
        drafter.begin(inputs, None)
    for _ in range(6):
        drafts = [d.propose(np.array(tokens, np.int32), Plan(6, 4, 2), gpu_engine.features) for d in (ours, plain)]
        both = [set(paths(draft)) for draft in drafts]
        same, count = same + len(both[0] & both[1]), count + len(both[1])
        chosen = int(gpu_engine.step(np.array(tokens[-1:], np.int32), np.array([-1], np.int32)).logits[0].argmax())
        gpu_engine.commit(np.zeros(1, np.int32))
        tokens.append(chosen)
    assert same >= 0.8 * count > 0


def shipped_on_cpu(shipped):
    """The same parts without a runtime to share: drafters then take ONNX Runtime."""
    return dataclasses.replace(shipped, target=None)
